"""What a run shows on the terminal while it goes on."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback, RichProgressBar
from rich.console import Console
from rich.progress import BarColumn
from transformers.utils.logging import disable_progress_bar, enable_progress_bar, is_progress_bar_enabled
from typing_extensions import override

from lightning_pref.models.adapters import count_parameters

# Where Lightning says what it is about to do.
LIGHTNING_LOG = "lightning.pytorch.utilities.rank_zero"

# Said in every run, and nothing follows from it for the user.
IDLE_TALK = (
    "\N{ELECTRIC LIGHT BULB} Tip:",
    "TPU available: False",
    "Loading `train_dataloader` to estimate",
    "`Trainer.fit` stopped:",
)

# Likewise, as warnings: patterns by category.
IDLE_WARNINGS: tuple[tuple[str, type[Warning]], ...] = (
    # Lightning calls a torch function that torch is about to rename.
    (r".*isinstance.treespec, LeafSpec", FutureWarning),
    # TensorBoard's logger has been in the run folder already; the command line has looked for other runs.
    (r"Experiment logs directory .* exists and is not empty", UserWarning),
    # Recipes hand the command line on, so that it can be told whether the run is on the playground.
    (r"LightningCLI's args parameter is intended", UserWarning),
    # Lightning's command line calls methods that jsonargparse is about to rename.
    (r"\s[\s\S]*(JsonargparseDeprecationWarning|v5\.0\.0)", DeprecationWarning),
    # A resumed run has a folder of its own.
    (r"The dirpath has changed from", UserWarning),
    # That folder is ours and the checkpoints in it are of the run that goes on.
    (r"Checkpoint directory .* exists and is not empty", UserWarning),
)

# Narrow, so that the numbers beside it fit on the line.
BAR_WIDTH = 16
BAR_METRICS = {
    "throughput/tokens_per_second": ("tokens/s", ".0f"),
    "throughput/rows_per_second": ("rows/s", ".0f"),
    "loss": ("loss", ".3f"),
    "rewards/margins": ("margin", ".3f"),
}


@contextmanager
def readable_terminal() -> Iterator[None]:
    """Keep back idle talk of the libraries, and let this package's own reports through."""

    def is_news(record: logging.LogRecord) -> bool:
        return not record.getMessage().startswith(IDLE_TALK)

    ours, handler = logging.getLogger("lightning_pref"), logging.StreamHandler()
    level, has_handlers, had_bars = ours.level, ours.hasHandlers(), is_progress_bar_enabled()
    logging.getLogger(LIGHTNING_LOG).addFilter(is_news)
    disable_progress_bar()  # type: ignore[no-untyped-call]
    if not has_handlers:
        ours.addHandler(handler)
        ours.setLevel(logging.INFO)
    with warnings.catch_warnings():
        for message, category in IDLE_WARNINGS:
            warnings.filterwarnings("ignore", message=message, category=category)
        try:
            yield
        finally:
            logging.getLogger(LIGHTNING_LOG).removeFilter(is_news)
            ours.removeHandler(handler)
            ours.setLevel(level)
            if had_bars:
                enable_progress_bar()  # type: ignore[no-untyped-call]


class RunProgressBar(RichProgressBar):
    """Lightning's bar with the few numbers that tell how a run goes, under short names."""

    @override
    def configure_columns(self, trainer: L.Trainer) -> list[Any]:
        # Any: Lightning's own type; rich may not be there when it is imported
        columns = super().configure_columns(trainer)
        for column in columns:
            if isinstance(column, BarColumn):
                column.bar_width = BAR_WIDTH
        return columns

    @override
    def get_metrics(self, trainer: L.Trainer, pl_module: L.LightningModule) -> dict[str, Any]:
        # Any: Lightning's own type for what a bar shows
        logged = trainer.logged_metrics
        return {short: f"{float(logged[key]):{form}}" for key, (short, form) in BAR_METRICS.items() if key in logged}


class StartLine(Callback):
    """Says at the start of training what is trained and where the run is kept.

    Needs: nothing.
    Logs: nothing.
    Changes: nothing.

    Args:
        title: Name of the recipe.
        folder: Folder of the run.
        console: Where to print; standard output if not given.
    """

    def __init__(self, title: str, folder: Path, *, console: Console | None = None) -> None:
        self.title = title
        self.folder = folder
        self.console = console or Console()

    @override
    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.is_global_zero:
            text = f"{self.title}: {count_parameters(pl_module)}; run folder {self.folder}"
            self.console.print(text, highlight=False, markup=False, soft_wrap=True)
