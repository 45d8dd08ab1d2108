from __future__ import annotations

from collections.abc import Sequence
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

from lightning_pref.callbacks import GoldReward
from lightning_pref.reports import RunRecord


class Counter(L.LightningModule):
    """Someone's module: one weight that moves by exactly one an update."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))

    @override
    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return -self.weight

    @override
    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=1.0)


def answer(module: L.LightningModule, prompts: Sequence[str]) -> list[str]:
    assert isinstance(module, Counter)
    return [f"{prompt}{module.weight.item():.0f}" for prompt in prompts]


def reward(prompt: str, response: str) -> float:
    return float(response.removeprefix(prompt)) + len(prompt)


def fit(tmp_path: Path, callbacks: list[Callback], record: RunRecord, accumulate: int = 1) -> Counter:
    module = Counter()
    trainer = L.Trainer(
        max_steps=5,
        accumulate_grad_batches=accumulate,
        accelerator="cpu",
        logger=[CSVLogger(tmp_path, name="", version=""), record],
        callbacks=callbacks,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    loader: DataLoader[Any] = DataLoader([torch.zeros(1)] * 20)
    trainer.fit(module, loader)
    return module


@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_reward_is_measured_before_the_first_and_after_the_last_update(tmp_path: Path, accumulate: int) -> None:
    calls: list[int] = []
    record = RunRecord()

    def counted(module: L.LightningModule, prompts: Sequence[str]) -> list[str]:
        calls.append(len(prompts))
        return answer(module, prompts)

    gold = GoldReward(["a", "bcd"], counted, reward, every_n_updates=2)
    fit(tmp_path, [gold], record, accumulate)
    # mean length of the prompts is 2; the weight is 0 at the start, 5 at the end
    assert record.metrics["gold_reward"] == (2.0, 7.0)
    # updates 0, 2, 4, 5: each once, also where two micro-batches make an update
    assert calls == [2, 2, 2, 2]
    assert [sample.response for sample in gold.first] == ["a0", "bcd0"]
    assert [sample.response for sample in gold.last] == ["a5", "bcd5"]
    assert "gold_reward" in (tmp_path / "metrics.csv").read_text()


def test_training_is_the_same_with_and_without_it(tmp_path: Path) -> None:
    with_it = fit(tmp_path / "with", [GoldReward(["a"], answer, reward)], RunRecord())
    without = fit(tmp_path / "without", [], RunRecord())
    assert torch.equal(with_it.weight, without.weight)


def test_no_prompts_and_no_interval_are_refused() -> None:
    with pytest.raises(ValueError, match="at least one prompt"):
        GoldReward([], answer, reward)
    with pytest.raises(ValueError, match="`every_n_updates` must be at least 1, got 0"):
        GoldReward(["a"], answer, reward, every_n_updates=0)
