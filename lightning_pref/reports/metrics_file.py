"""`metrics.csv`: every logged number of a run, also of a run that was interrupted and went on."""

from __future__ import annotations

import csv
import os
from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.fabric.utilities.rank_zero import rank_zero_only
from lightning.pytorch.loggers import Logger
from torch import Tensor
from typing_extensions import override

from lightning_pref.reports.summary import FirstLast

FILE = "metrics.csv"
STEP = "step"


class MetricsFile(Logger):
    """A logger that writes one row for each call, at once, and cuts off what a resumed run will log again.

    Lightning's CSV logger keeps a hundred rows in memory and removes the file of an earlier run in the same folder.

    Args:
        folder: Where `metrics.csv` lies.
    """

    def __init__(self, folder: str | Path) -> None:
        super().__init__()
        self.path = Path(folder) / FILE
        self._columns: list[str] | None = None  # of the file; read when the first row comes
        self._num_rows = 0

    @property
    @override
    def name(self) -> str:
        return "metrics_file"

    @property
    @override
    def version(self) -> str:
        return ""

    @property
    @override
    def save_dir(self) -> str:
        return str(self.path.parent)

    @override
    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float | Tensor], step: int | None = None) -> None:
        columns = self._known()
        row: dict[str, object] = {key: float(value) for key, value in metrics.items()}
        row[STEP] = step
        new = sorted(row.keys() - set(columns))
        if new or not self.path.exists():
            columns = [*columns, *new]
            self._rewrite(columns, self._num_rows)
        with self.path.open("a", encoding="utf-8", newline="") as file:
            csv.DictWriter(file, columns).writerow(row)
        self._num_rows += 1

    @override
    def log_hyperparams(self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any) -> None:
        """Hyper-parameters are in the run's config.yaml."""

    def rank_state(self) -> dict[str, Any]:  # Any: plain data
        """How many rows there are; the first process alone writes them, and knows."""
        if rank_zero_only.rank != 0:  # type: ignore[attr-defined]  # Lightning sets it on the function
            return {}
        self._known()
        return {"num_rows": self._num_rows}

    @rank_zero_only
    def load_rank_state(self, state: dict[str, Any]) -> None:  # Any: as above
        """Cut off the rows that were written after the checkpoint, and one that was cut short by the end of the process."""
        if self.path.exists():
            content = self.path.read_bytes()
            os.truncate(self.path, content.rfind(b"\n") + 1)
            self._columns = None
        columns = self._known()
        if self._num_rows > state["num_rows"]:
            self._rewrite(columns, state["num_rows"])

    def _known(self) -> list[str]:
        """The columns of the file, its rows counted."""
        if self._columns is None:
            self._columns, self._num_rows = [], 0
            if self.path.exists():
                with self.path.open(encoding="utf-8", newline="") as file:
                    reader = csv.reader(file)
                    self._columns = next(reader, [])
                    self._num_rows = sum(1 for _ in reader)
        return self._columns

    def _rewrite(self, columns: list[str], num_rows: int) -> None:
        """Write the first rows anew, with these columns; whoever reads the file sees the old one or the new one."""
        part = self.path.with_name(f".{FILE}.part")
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with part.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, columns)
            writer.writeheader()
            if self.path.exists():
                with self.path.open(encoding="utf-8", newline="") as old:
                    for _, row in zip(range(num_rows), csv.DictReader(old), strict=False):
                        writer.writerow(row)
        part.replace(self.path)
        self._columns, self._num_rows = columns, num_rows


def read_metrics(folder: Path) -> dict[str, FirstLast]:
    """Every metric of a run's `metrics.csv` at its first and at its latest logging; none where there is no such file."""
    if not (folder / FILE).exists():
        return {}
    found: dict[str, FirstLast] = {}
    with (folder / FILE).open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            for key, text in row.items():
                if text and key not in (STEP, "epoch"):
                    first = found[key].first if key in found else float(text)
                    found[key] = FirstLast(first, float(text))
    return found
