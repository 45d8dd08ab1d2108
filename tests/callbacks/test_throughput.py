from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor
from torch.utils.data import DataLoader
from typing_extensions import override

from lightning_pref.callbacks import Throughput
from lightning_pref.callbacks.throughput import Work, group_work
from lightning_pref.data.groups import GroupBatch, PromptGroup

TOKENS, ROWS = "throughput/tokens_per_second", "throughput/rows_per_second"


class Clock:
    """Time that passes only where the test says so."""

    def __init__(self) -> None:
        self.now = 100.0


class Steps(L.LightningModule):
    """Someone's module: a training batch takes one second, a validation batch a hundred."""

    def __init__(self, clock: Clock) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(()))
        self.clock = clock

    @override
    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        self.clock.now += 1.0
        return self.weight * batch.float().mean()

    @override
    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self.clock.now += 100.0

    @override
    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Speeds(Callback):
    def __init__(self) -> None:
        self.seen: list[tuple[int, float, float]] = []

    @override
    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if TOKENS in trainer.callback_metrics:
            self.seen.append((trainer.global_step, *(trainer.callback_metrics[key].item() for key in (TOKENS, ROWS))))


def fit(folder: Path, monkeypatch: pytest.MonkeyPatch, callbacks: list[Callback], **settings: Any) -> Steps:
    clock = Clock()
    monkeypatch.setattr(time, "perf_counter", lambda: clock.now)
    module = Steps(clock)
    options: dict[str, Any] = {"max_epochs": 1, "log_every_n_steps": 2, **settings}
    trainer = L.Trainer(
        accelerator="cpu",
        logger=CSVLogger(folder),
        callbacks=callbacks,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )
    batches = [torch.full((8,), i) for i in range(8)]
    train: DataLoader[Any] = DataLoader(batches, batch_size=None)  # type: ignore[arg-type]
    val: DataLoader[Any] = DataLoader(batches[:2], batch_size=None)  # type: ignore[arg-type]
    trainer.fit(module, train, val)
    return module


def work(batch: Tensor) -> Work:
    """Batch i has 10 + i tokens and 2 rows."""
    return Work(tokens=10 + int(batch[0]), rows=2)


def test_speed_is_work_over_time_from_one_logged_update_to_the_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    speeds = Speeds()
    fit(tmp_path, monkeypatch, [Throughput(work), speeds])
    # batches 0 and 1 have 10 + 11 tokens in two seconds; 2 and 3 have 12 + 13; ...
    assert [seen for seen in speeds.seen if seen[0] % 2 == 0] == [(2, 10.5, 2.0), (4, 12.5, 2.0), (6, 14.5, 2.0), (8, 16.5, 2.0)]


def test_micro_batches_of_an_update_count_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    speeds = Speeds()
    fit(tmp_path, monkeypatch, [Throughput(work), speeds], accumulate_grad_batches=2)
    assert {step: speed for step, speed, _ in speeds.seen if step % 2 == 0} == {2: 11.5, 4: 15.5}


@pytest.mark.parametrize("interval", [1, 3, 4])
def test_time_spent_in_validation_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, interval: int) -> None:
    speeds = Speeds()
    fit(tmp_path, monkeypatch, [Throughput(work), speeds], val_check_interval=interval)
    assert {step: rows for step, _, rows in speeds.seen} == dict.fromkeys(range(2, 9), 2.0)


def test_a_second_fit_begins_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    throughput, speeds = Throughput(work), Speeds()
    fit(tmp_path, monkeypatch, [throughput], max_steps=3)
    fit(tmp_path, monkeypatch, [throughput, speeds], max_steps=2)
    assert speeds.seen == [(2, 10.5, 2.0)]


def test_training_is_the_same_with_and_without_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with_it = fit(tmp_path, monkeypatch, [Throughput(work)])
    without = fit(tmp_path, monkeypatch, [])
    assert torch.equal(with_it.weight, without.weight)


def test_a_group_batch_counts_real_tokens_and_rows(random_groups: Callable[..., list[PromptGroup]]) -> None:
    groups = random_groups(3)
    assert group_work(GroupBatch.from_groups(groups)) == (sum(group.num_tokens for group in groups), 3)


def test_another_batch_needs_a_function_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(
        TypeError, match=r"knows the size of a GroupBatch only, got a Tensor. Give it a function: Throughput\(work"
    ):
        fit(tmp_path, monkeypatch, [Throughput()])
