"""What a run shows and leaves: the terminal, the summary for scripts and the closing table for people."""

from lightning_pref.reports.console import RunProgressBar, StartLine, readable_terminal
from lightning_pref.reports.summary import RunRecord, print_samples, print_summary, write_summary

__all__ = ["RunProgressBar", "RunRecord", "StartLine", "print_samples", "print_summary", "readable_terminal", "write_summary"]
