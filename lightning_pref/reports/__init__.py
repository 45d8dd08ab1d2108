"""What a run shows and leaves: the terminal, the summary for scripts and the closing table for people."""

from lightning_pref.reports.console import RunProgressBar, StartLine, readable_terminal
from lightning_pref.reports.summary import (
    RunRecord,
    print_alerts,
    print_samples,
    print_summary,
    read_alerts,
    write_summary,
)

__all__ = [
    "RunProgressBar",
    "RunRecord",
    "StartLine",
    "print_alerts",
    "print_samples",
    "print_summary",
    "read_alerts",
    "readable_terminal",
    "write_summary",
]
