"""What every update was made of, on one rank or over all of them."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from speakers import quiet_trainer
from torch import Tensor
from typing_extensions import override

from lightning_pref.data.groups import GroupBatch


class Witness(Callback):
    """Keeps the rows of every update of this rank and the gradient that the update is made with."""

    def __init__(self) -> None:
        self.rows: list[list[list[int]]] = []  # by update and micro-batch
        self.gradients: list[Tensor] = []
        self._window: list[list[int]] = []

    @override
    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, batch: GroupBatch, batch_idx: int) -> None:
        self._window.append([row for row, weight in zip(batch.row_ids.tolist(), batch.weights.tolist(), strict=True) if weight])

    @override
    def on_before_optimizer_step(
        self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        self.gradients.append(torch.cat([p.grad.flatten().clone() for p in pl_module.parameters() if p.grad is not None]))
        self.rows.append(self._window)
        self._window = []


def rows_of_updates(by_rank: Sequence[list[list[list[int]]]]) -> list[list[int]]:
    """The rows of every update, over all ranks and micro-batches."""
    return [[row for windows in update for batch in windows for row in batch] for update in zip(*by_rank, strict=True)]


def trainer_of_ranks(folder: Path, ranks: int, callbacks: Sequence[Callback], **settings: Any) -> L.Trainer:
    # What Lightning says under DDP about metrics that are not reduced is always a mistake here.
    warnings.filterwarnings("error", message=".*sync_dist")
    parallel: dict[str, Any] = {"devices": ranks, "strategy": "ddp"} if ranks > 1 else {}
    return quiet_trainer(
        default_root_dir=folder,
        log_every_n_steps=1,
        callbacks=list(callbacks),
        num_sanity_val_steps=0,
        **parallel,
        **settings,
    )
