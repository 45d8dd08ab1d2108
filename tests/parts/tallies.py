"""What became of the cases of the fuzz tests, and of the runs that were killed: printed when all tests are over."""

from __future__ import annotations

import json
from collections import Counter

import pytest

# By which the tally of a test travels from the process that ran it to the one that prints it.
TALLY = "fuzz_tally"
KILLS = "kills"


def print_tallies(terminalreporter: pytest.TerminalReporter) -> None:
    """Print the tallies that tests have recorded."""
    tallies: dict[str, Counter[str]] = {}
    for report in terminalreporter.getreports("passed") + terminalreporter.getreports("failed"):
        for name, tally in getattr(report, "user_properties", ()):
            if name == TALLY:
                tallies.setdefault(report.nodeid.rpartition("::")[2], Counter()).update(json.loads(tally))
    _print_kills(terminalreporter)
    if not tallies:
        return
    terminalreporter.section("fuzz")
    for test, outcomes in sorted(tallies.items()):
        terminalreporter.write_line(f"{sum(outcomes.values()):6d}  {test}")
        for outcome, count in outcomes.most_common():
            terminalreporter.write_line(f"        {count:6d}  {outcome}")
    terminalreporter.write_line(f"{sum(sum(outcomes.values()) for outcomes in tallies.values()):6d}  in all")


def _print_kills(terminalreporter: pytest.TerminalReporter) -> None:
    passed = terminalreporter.getreports("passed")
    lines = [text for report in passed for name, text in getattr(report, "user_properties", ()) if name == KILLS]
    if lines:
        terminalreporter.section("kill -9")
        for line in lines:
            terminalreporter.write_line(str(line))
