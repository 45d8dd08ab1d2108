"""Writes docs/keys.md: what every monitor logs, and every alert with its limits, read off the code.

Run it from anywhere: `python docs/make_monitors.py`. With `--check` nothing is written; it fails where the page is out of date.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from lightning_pref import callbacks
from lightning_pref.alerts import ALERT_RULES, Limit
from lightning_pref.callbacks import Diagnostic

PAGE = Path(__file__).resolve().parent / "keys.md"

PREAMBLE = """# Keys and alerts

What the monitors log, and when they raise an alert. Numbers of validation and of probes carry their source in front:
`val/displacement/share`, `probe/fixed/displacement/share`. An undefined value is `nan`, never 0.

This page is written by `docs/make_monitors.py`; edit the callbacks and `lightning_pref/alerts.py`.
"""

ALERTS = """
## Alerts

An alert is raised once per run and source, when all limits of its rule have been passed in as many measurements in a row as its
patience says. It goes to the console, to TensorBoard as text, and to `alerts.jsonl` in the run's folder. A limit is changed, or
turned off with `nan`, where the monitor is made: `RewardVarianceMonitor(thresholds={"reward_variance/zero_share": 0.95})`; of a
rule with several limits the key's last part is added: `{"displacement/chosen_falls/share": 0.7}`. The limits are conventions of
the field and of this project, not laws: a run on your data may be healthy beyond them.

| alert | level | raised when | patience | what to change |
|---|---|---|---|---|
"""


def table(diagnostic: type[Diagnostic]) -> str:
    """One monitor's keys."""
    lines = [f"\n## {diagnostic.__name__}\n", "| key | what | unit |", "|---|---|---|"]
    lines += [f"| `{key.name}` | {key.text} | {key.unit} |" for key in diagnostic.keys]
    return "\n".join(lines) + "\n"


def condition(limit: Limit) -> str:
    """A limit in words."""
    return f"`{limit.key}` above {limit.above:g}" if limit.above is not None else f"`{limit.key}` below {limit.below:g}"


def page() -> str:
    """The whole page."""
    public = [getattr(callbacks, name) for name in callbacks.__all__]
    diagnostics = [kind for kind in public if issubclass(kind, Diagnostic) and kind.keys]
    rows = [
        f"| `{name}` | {rule.level} | {', '.join(map(condition, rule.limits))} | {rule.patience} | {rule.advice} |"
        for name, rule in ALERT_RULES.items()
    ]
    return PREAMBLE + "".join(map(table, diagnostics)) + ALERTS + "\n".join(rows) + "\n"


def main() -> None:
    """Write the page, or compare it."""
    parser = argparse.ArgumentParser(description="Write docs/keys.md from the monitors and the table of alerts.")
    parser.add_argument("--check", action="store_true", help="write nothing; fail where the page is out of date")
    text = page()
    if not parser.parse_args().check:
        PAGE.write_text(text, encoding="utf-8")
    elif not PAGE.exists() or PAGE.read_text(encoding="utf-8") != text:
        raise SystemExit("docs/keys.md is out of date; run `python docs/make_monitors.py` and commit the result.")


if __name__ == "__main__":
    main()
