"""Schedules and callbacks that go by a metric decide after a resume what they would have decided without one."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import Callback, EarlyStopping
from placed_loaders import PlacedLoader
from speakers import pair_rows
from torch import Tensor, nn
from torch.optim.lr_scheduler import ReduceLROnPlateau
from torch.utils.data import DataLoader
from typing_extensions import override

from lightning_pref.callbacks import ExactResume
from lightning_pref.checkpoints import checkpoints_of

NUM_BATCHES = 5
EPOCHS = 4


class Falling(L.LightningModule):
    """A module whose steps are too large, so that its validation loss goes up and down and the schedule has work to do."""

    def __init__(self, interval: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Linear(9, 1)
        self.interval = interval

    @override
    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        loss: Tensor = self.body(batch).square().mean()
        return loss

    @override
    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self.log("val/loss", self.body(batch).square().mean())

    @override
    def configure_optimizers(self) -> Any:  # Any: Lightning's own type
        optimizer = torch.optim.SGD(self.parameters(), lr=0.3, momentum=0.9)
        schedule = ReduceLROnPlateau(optimizer, patience=0, factor=0.5)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {
                "scheduler": schedule,
                "monitor": "val/loss",
                "interval": self.interval,
                "strict": self.interval == "epoch",  # nothing is validated yet at the first steps
            },
        }


class Rates(Callback):
    """Keeps the learning rate that each update is made with, and the metrics there are."""

    def __init__(self) -> None:
        self.rates: dict[int, float] = {}
        self.metrics: dict[int, dict[str, float]] = {}

    @override
    def on_before_optimizer_step(
        self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        self.rates[trainer.global_step] = optimizer.param_groups[0]["lr"]
        self.metrics[trainer.global_step] = {name: float(value) for name, value in trainer.callback_metrics.items()}


class Run(NamedTuple):
    rates: dict[int, float]
    metrics: dict[int, dict[str, float]]
    weights: dict[str, Tensor]
    epochs: int


def run(folder: Path, interval: str, *more: Callback, resume: Path | None = None, **settings: Any) -> Run:
    rows: Any = list(pair_rows(2 * NUM_BATCHES))
    module, witness = Falling(interval), Rates()
    trainer = L.Trainer(
        accelerator="cpu",
        logger=False,
        callbacks=[*more, witness, ExactResume(str(folder), every_n_updates=1, keep_last=-1)],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **{"max_epochs": EPOCHS, "val_check_interval": 2, **settings},
    )
    loaders = PlacedLoader(rows, batch_size=2), DataLoader(rows, batch_size=5)
    trainer.fit(module, *loaders, ckpt_path=None if resume is None else str(resume), weights_only=True)
    return Run(witness.rates, witness.metrics, module.state_dict(), trainer.current_epoch)


def places(folder: Path) -> dict[int, Path]:
    return {int(path.stem.removeprefix("step=")): path for path in checkpoints_of(folder)}


def check_same(tmp_path: Path, whole: Run, resumed: Run, step: int) -> None:
    assert resumed.rates == {update: rate for update, rate in whole.rates.items() if update >= step}, f"after update {step}"
    assert resumed.metrics == {update: seen for update, seen in whole.metrics.items() if update >= step}
    assert all(torch.equal(whole.weights[name], resumed.weights[name]) for name in whole.weights)
    assert resumed.epochs == whole.epochs


@pytest.mark.filterwarnings("ignore:ReduceLROnPlateau conditioned on metric val/loss which is not available but strict")
@pytest.mark.parametrize(
    ("interval", "settings"),
    [
        ("epoch", {}),  # the last validation of an epoch is at its fourth batch of five
        ("epoch", {"max_steps": EPOCHS * NUM_BATCHES, "max_epochs": -1}),
        ("step", {}),
    ],
    ids=["epoch", "max-steps", "step"],
)
def test_C1_a_schedule_that_goes_by_a_metric_takes_the_same_decisions(
    tmp_path: Path, interval: str, settings: dict[str, Any]
) -> None:
    whole = run(tmp_path / "whole", interval, **settings)
    assert len(set(whole.rates.values())) > 2, "the rate has fallen more than once"
    there = places(tmp_path / "whole")
    assert sorted(there) == list(range(1, EPOCHS * NUM_BATCHES + 1))
    for step in range(1, EPOCHS * NUM_BATCHES):
        resumed = run(tmp_path / f"from-{step}", interval, resume=there[step], **settings)
        check_same(tmp_path, whole, resumed, step)


def test_C1_early_stopping_that_looks_at_the_end_of_an_epoch_stops_there(tmp_path: Path) -> None:
    def stopping() -> EarlyStopping:
        return EarlyStopping("val/loss", patience=2, check_on_train_epoch_end=True)

    whole = run(tmp_path / "whole", "epoch", stopping(), max_epochs=40)
    assert 2 < whole.epochs < 40
    last = max(places(tmp_path / "whole"))
    for step in (last - 1, last - 2, last - NUM_BATCHES):
        resumed = run(tmp_path / f"from-{step}", "epoch", stopping(), resume=places(tmp_path / "whole")[step], max_epochs=40)
        check_same(tmp_path, whole, resumed, step)
