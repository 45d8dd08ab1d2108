"""How much real work is done per second."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from typing_extensions import override

from lightning_pref.data.groups import GroupBatch


class Work(NamedTuple):
    """Size of one micro-batch."""

    tokens: int
    rows: int


def group_work(batch: object) -> Work:
    """Work of a `GroupBatch`: real tokens, every prompt once, no padding; rows are its groups."""
    if not isinstance(batch, GroupBatch):
        raise TypeError(
            f"Throughput knows the size of a GroupBatch only, got a {type(batch).__name__}. Give it a function: "
            "Throughput(work=lambda batch: Work(tokens=..., rows=...))."
        )
    return Work(tokens=batch.num_tokens, rows=batch.num_groups)


class Throughput(Callback):
    """Watches the speed of training, between one logged update and the next, validation left out.

    Needs: nothing of the module; a function from batch to `Work`, which for our batches is the default.
    Logs: `throughput/tokens_per_second`, `throughput/rows_per_second` (real tokens; all ranks together).
    Changes: nothing.
    """

    def __init__(self, work: Callable[[Any], Work] = group_work) -> None:  # Any: the batch of the user's own loader
        self.work = work
        self._reset()

    def _reset(self) -> None:
        self._tokens = 0
        self._rows = 0
        self._seconds = 0.0
        self._started: float | None = None
        self._updates = 0

    @override
    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._reset()
        self._updates = trainer.global_step
        self._started = time.perf_counter()

    @override
    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._pause(pl_module.device)

    @override
    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._started = time.perf_counter()

    def _pause(self, device: torch.device) -> None:
        if self._started is not None:
            if device.type == "cuda":
                torch.cuda.synchronize(device)  # else the clock would stop before the work that is queued
            self._seconds += time.perf_counter() - self._started
            self._started = None

    @override
    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        size = self.work(batch)
        self._tokens += size.tokens
        self._rows += size.rows
        updates = trainer.global_step
        every = trainer.log_every_n_steps  # type: ignore[attr-defined]  # set by Lightning outside __init__
        if not every or updates // every == self._updates // every:  # a batch may make several updates
            return
        self._updates = updates
        self._pause(pl_module.device)
        # All ranks run in step, so the sum over ranks of the work over this rank's time is the speed of the whole.
        totals = torch.tensor([self._tokens, self._rows], dtype=torch.float64, device=pl_module.device)
        totals = trainer.strategy.reduce(totals, reduce_op="sum")
        assert isinstance(totals, torch.Tensor)
        tokens, rows = (totals / self._seconds).float()
        pl_module.log("throughput/tokens_per_second", tokens, prog_bar=True, batch_size=1)
        pl_module.log("throughput/rows_per_second", rows, batch_size=1)
        self._tokens, self._rows, self._seconds = 0, 0, 0.0
        self._started = time.perf_counter()
