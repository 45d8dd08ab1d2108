"""The end of a run in one file and one table: every metric first against last, and where everything lies."""

from __future__ import annotations

import json
import math
import platform
from argparse import Namespace
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

from lightning.fabric.utilities.rank_zero import rank_zero_only
from lightning.pytorch.loggers import Logger
from rich.console import Console
from rich.table import Table
from typing_extensions import override

from lightning_pref.alerts import Alert
from lightning_pref.callbacks.gold_reward import Sample
from lightning_pref.escaping import on_terminal

PACKAGES = ("lightning-pref", "torch", "lightning", "transformers", "peft", "datasets")


class FirstLast(NamedTuple):
    """A metric at its first and at its latest logging."""

    first: float
    last: float


class RunRecord(Logger):
    """A logger that remembers, of every metric, the first and the last value; it writes nothing by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.metrics: dict[str, FirstLast] = {}

    @property
    @override
    def name(self) -> str:
        return "run_record"

    @property
    @override
    def version(self) -> str:
        return ""

    @override
    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        for key, value in metrics.items():
            if key != "epoch":
                first = self.metrics[key].first if key in self.metrics else float(value)
                self.metrics[key] = FirstLast(first, float(value))

    def rank_state(self) -> dict[str, Any]:  # Any: plain data
        """All values, for an exact resume."""
        return {"metrics": {key: tuple(pair) for key, pair in self.metrics.items()}}

    def load_rank_state(self, state: dict[str, Any]) -> None:  # Any: as above
        """Take up what `rank_state` gave."""
        self.metrics = {key: FirstLast(*pair) for key, pair in state["metrics"].items()}

    @override
    def log_hyperparams(self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any) -> None:
        """Hyper-parameters are in the run's config.yaml."""


def _json_number(value: float) -> float | None:
    """JSON has no nan; undefined is null."""
    return value if math.isfinite(value) else None


def write_summary(
    path: Path,
    *,
    recipe: str,
    steps: int,
    seconds: float,
    metrics: Mapping[str, FirstLast],
    alerts: int,
    digests: Mapping[str, str],
) -> None:
    """Write `summary.json`, the one file a script needs to read about a run."""
    summary = {
        "recipe": recipe,
        "steps": steps,
        "seconds": round(seconds, 3),
        "metrics": {
            key: {"first": _json_number(pair.first), "last": _json_number(pair.last)} for key, pair in sorted(metrics.items())
        },
        "alerts": alerts,
        "versions": {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}},
        "digests": dict(digests),
    }
    path.write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")


def print_summary(
    *,
    title: str,
    metrics: Mapping[str, FirstLast],
    headline: Sequence[str],
    places: Mapping[str, Path | str],
    console: Console | None = None,
) -> None:
    """Print the headline metrics, first against last, and where everything lies.

    Args:
        title: First line of the table.
        metrics: Everything the run logged.
        headline: Keys to show, in order; those the run did not log are left out.
        places: What lies where.
        console: Where to print; standard output if not given.
    """
    console = console or Console()
    table = Table(title=title, title_justify="left")
    table.add_column("metric")
    for column in ("first", "last", "change"):
        table.add_column(column, justify="right")
    for key in headline:
        if key in metrics:
            first, last = metrics[key]
            table.add_row(key, f"{first:.4g}", f"{last:.4g}", f"{last - first:+.4g}")
    console.print(table if table.row_count else f"{title}, nothing new was measured")
    width = max(len(name) for name in places)
    for name, place in places.items():
        console.print(f"  {name.ljust(width)}  {place}", highlight=False, markup=False, soft_wrap=True)


def read_alerts(path: Path) -> list[Alert]:
    """The alerts of a run, those from before a resume too; none where the file is not there."""
    if not path.exists():
        return []
    return [Alert(**json.loads(line)) for line in path.read_text(encoding="utf-8").splitlines()]


def print_alerts(alerts: Sequence[Alert], *, console: Console | None = None) -> None:
    """Print at the end what was warned of in the run, in a line each; the whole text is in `alerts.jsonl`."""
    console = console or Console()
    for alert in alerts:
        where = "" if alert.source == "train" else f" ({alert.source})"
        line = f"  {alert.level} {alert.name}{where} since step {alert.since_step}"
        console.print(line, highlight=False, markup=False, soft_wrap=True)


def print_samples(first: Sequence[Sample], last: Sequence[Sample], *, console: Console | None = None) -> None:
    """Print what the policy answered one prompt before and after, with the rewards: the one of median change."""
    if not first:  # a finished run that was resumed measures nothing
        return
    console = console or Console()
    pairs = sorted(zip(first, last, strict=True), key=lambda pair: pair[1].reward - pair[0].reward)
    before, after = pairs[len(pairs) // 2]
    lines = {
        "prompt": before.prompt,
        f"answer before ({before.reward:.2f})": before.response,
        f"answer after ({after.reward:.2f})": after.response,
    }
    width = max(map(len, lines))
    for name, text in lines.items():
        console.print(f"  {name.ljust(width)}  {on_terminal(text)}", highlight=False, markup=False, soft_wrap=True)
