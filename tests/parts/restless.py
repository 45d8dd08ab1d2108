"""A callback that makes no two runs alike."""

from __future__ import annotations

import time
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from typing_extensions import override


class Restless(Callback):
    """Moves a weight by what the clock says."""

    @override
    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int) -> None:
        with torch.no_grad():
            next(pl_module.parameters()).add_(1e-3 * (time.time_ns() % 1000))
