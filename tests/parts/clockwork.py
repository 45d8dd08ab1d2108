"""A module that counts its updates, and scores that are a function of their number."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lightning as L
import torch
from speakers import quiet_trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from typing_extensions import override

from lightning_pref import TaskSwitch, observe
from lightning_pref.callbacks.stability_gap import StabilityGapEvaluator
from lightning_pref.reports import RunRecord


class Clockwork(L.LightningModule):
    """Its one parameter is the number of updates, so that a score can be a function of it."""

    def __init__(self, switches: dict[int, str] | None = None) -> None:
        super().__init__()
        self.position = nn.Parameter(torch.zeros(()))
        self.switches = switches or {}

    @override
    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        if self.global_step in self.switches:
            observe(self, TaskSwitch(task=self.switches[self.global_step]))
        return -self.position * 1.0

    @override
    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=1.0)


SPREAD = torch.linspace(-0.1, 0.1, 16)


def by_table(values: list[float]) -> Callable[[Clockwork, Tensor], Tensor]:
    """Sixteen examples around the value that the table has for this update; the last one from its end on."""

    def score(module: Clockwork, batch: Tensor) -> Tensor:
        return values[min(int(module.position.item()), len(values) - 1)] + SPREAD * batch

    return score


def by_task(tables: dict[int, list[float]]) -> Callable[[Clockwork, Tensor], Tensor]:
    """A batch is the number of its task; every example has the value."""

    def score(module: Clockwork, batch: Tensor) -> Tensor:
        table = tables[int(batch)]
        return torch.full((64,), table[min(int(module.position.item()), len(table) - 1)])

    return score


def run(
    evaluator: StabilityGapEvaluator, updates: int, switches: dict[int, str] | None = None, **settings: Any
) -> tuple[RunRecord, Clockwork]:
    record = RunRecord()
    module = Clockwork(switches)
    resume = settings.pop("resume", None)
    trainer = quiet_trainer(
        callbacks=[evaluator, *settings.pop("callbacks", [])],
        **{"max_steps": updates, "max_epochs": -1, "log_every_n_steps": 1, "logger": record, **settings},
    )
    trainer.fit(module, DataLoader(TensorDataset(torch.zeros(7, 1)), batch_size=1), ckpt_path=resume)
    return record, module


ONE = [torch.tensor(1.0)]
DIP = [2.0, 2.6, 3.5, 3.0, 2.3, 2.0, 2.0, 2.0, 2.0]
