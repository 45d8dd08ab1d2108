"""What is left of a run: the summary for scripts and the closing table for people."""

from lightning_pref.reports.summary import RunRecord, print_samples, print_summary, write_summary

__all__ = ["RunRecord", "print_samples", "print_summary", "write_summary"]
