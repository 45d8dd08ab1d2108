"""A module whose steps have rewards, and a logger that keeps everything: parts for tests of what watches rewards."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from speakers import quiet_trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader
from typing_extensions import override

from lightning_pref import RewardObservation, observe
from lightning_pref.reports import RunRecord

PROMPTS, RESPONSES = 8, 4
# Gives rewards [P * K] and lengths, for the number of the batch.
Rewards = Callable[[int], "tuple[Tensor, Tensor | None]"]


class Series(RunRecord):
    """Everything logged under a key, by step."""

    def __init__(self) -> None:
        super().__init__()
        self.series: dict[str, dict[int, float]] = {}

    @override
    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        for key, value in metrics.items():
            self.series.setdefault(key, {})[step or 0] = float(value)


class Rewarded(L.LightningModule):
    """Somebody's RLHF module as far as the monitor can see: a batch has rewards, and weights move."""

    def __init__(self, rewards: Rewards, *, says: bool = True) -> None:
        super().__init__()
        self.rewards = rewards
        self.says = says
        self.layer = nn.Sequential(nn.Linear(2, 4), nn.Dropout(0.5), nn.Linear(4, 1))

    @override
    def training_step(self, batch: Tensor, batch_idx: int) -> dict[str, Tensor]:
        rewards, lengths = self.rewards(batch_idx * self.trainer.world_size + self.trainer.global_rank)
        prompt_ids = torch.arange(len(rewards)) // RESPONSES
        if self.says:
            observe(self, RewardObservation(rewards=rewards, prompt_ids=prompt_ids, lengths=lengths))
        return {"loss": self.layer(batch).square().mean(), "rewards": rewards, "group": prompt_ids}

    @override
    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=0.05)


def healthy(number: int) -> tuple[Tensor, Tensor]:
    """Rewards that differ within and between prompts, lengths that have nothing to do with them."""
    generator = torch.Generator().manual_seed(number)
    rewards = torch.randn(PROMPTS, RESPONSES, generator=generator) + 0.5 * torch.randn(PROMPTS, 1, generator=generator)
    return rewards.flatten(), torch.randint(5, 50, (PROMPTS * RESPONSES,), generator=generator)


def fit(
    callbacks: list[Callback], rewards: Rewards = healthy, *, updates: int = 12, says: bool = True, **settings: Any
) -> tuple[Series, Rewarded]:
    L.seed_everything(0, verbose=False)
    module, series = Rewarded(rewards, says=says), Series()
    rows = torch.randn(updates * int(settings.get("accumulate_grad_batches", 1)), 2, generator=torch.Generator().manual_seed(0))
    resume = settings.pop("resume", None)
    trainer = quiet_trainer(callbacks=callbacks, logger=series, **settings)
    loader: DataLoader[Tensor] = DataLoader(list(rows), batch_size=1)  # type: ignore[arg-type]
    trainer.fit(module, loader, ckpt_path=resume, weights_only=True if resume else None)
    return series, module
