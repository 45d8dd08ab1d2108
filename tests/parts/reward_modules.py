"""Reward modules around tiny models, their data and trainers, and the oracle of their scores."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor
from torch.utils.data import DataLoader
from typing_extensions import override

from lightning_pref.data.groups import GroupBatch, PromptGroup
from lightning_pref.data.sampler import GroupBatches, GroupBatchSampler
from lightning_pref.data.store import GroupStore, GroupStoreWriter
from lightning_pref.modules.optimisation import OptimizerSettings
from lightning_pref.modules.reward import RewardModule
from lightning_pref.observations import Observation, Observer, RewardObservation

STILL = OptimizerSettings(learning_rate=1e-12, schedule="constant", warmup=0)


STEADY = OptimizerSettings(learning_rate=1e-3, schedule="constant", warmup=0)


def configured(model: Any, **options: Any) -> RewardModule:
    module = RewardModule(model, **options)
    module.configure_model()
    return module


def mean_loss(module: RewardModule, groups: Sequence[PromptGroup]) -> Tensor:
    terms = module.terms(GroupBatch.from_groups(groups))
    return (terms.losses * terms.weights).sum() / terms.weights.sum()


def measured(module: RewardModule, groups: Sequence[PromptGroup]) -> dict[str, float]:
    module._measured_terms(GroupBatch.from_groups(groups), module.train_means)
    return {name: value.item() for name, value in module._flush(module.train_means).items()}


def scores_of(model: Any, groups: Sequence[PromptGroup]) -> list[list[list[float]]]:
    """Oracle: by member, group and response, from single rows without padding."""
    weight = model.score.weight.detach().double()
    return [
        [[float(weight[k] @ state(model, group.prompt, response)) for response in group.responses] for group in groups]
        for k in range(len(weight))
    ]


@torch.no_grad()
def state(model: Any, prompt: Any, response: Any) -> Tensor:
    ids = torch.tensor([[*prompt.tolist(), *response.tolist()]])
    return model.base_model(ids).last_hidden_state[0, -1].double()


def softplus(x: float) -> float:
    return math.log1p(math.exp(x))


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def stored(groups: Sequence[PromptGroup], folder: Path) -> GroupBatches:
    if not folder.exists():
        with GroupStoreWriter(folder, vocab_size=64) as writer:
            for group in groups:
                writer.append(group)
    return GroupBatches(GroupStore(folder))


def loader(groups: Sequence[PromptGroup], folder: Path, *, batch_size: int = 4, accumulate: int = 1) -> DataLoader[Any]:
    batches = stored(groups, folder)
    sampler = GroupBatchSampler(batches, batch_size=batch_size, accumulate=accumulate, shuffle=False)
    return DataLoader(batches, batch_size=None, sampler=sampler)


def trainer(folder: Path, *callbacks: Callback, **settings: Any) -> L.Trainer:
    options: dict[str, Any] = {"max_epochs": 1, "logger": False, "log_every_n_steps": 1, "enable_checkpointing": False}
    return L.Trainer(
        accelerator="cpu",
        default_root_dir=folder,
        callbacks=list(callbacks),
        enable_progress_bar=False,
        enable_model_summary=False,
        **{**options, **settings},
    )


def labelled(groups: Sequence[PromptGroup]) -> list[PromptGroup]:
    return [replace(group, ranks=None, labels=(row % 2 == 0, row == 1)) for row, group in enumerate(groups)]


def stepwise(groups: Sequence[PromptGroup]) -> list[PromptGroup]:
    """One response each, with a step that ends at its second token and one at its last."""
    return [
        replace(
            group,
            ranks=None,
            responses=group.responses[:1],
            step_ends=((1, len(group.responses[0]) - 1) if len(group.responses[0]) > 2 else (1,),),
            step_labels=((True, False) if len(group.responses[0]) > 2 else (row % 2 == 0,),),
        )
        for row, group in enumerate(groups)
    ]


class Listener(Callback, Observer):
    consumes = (RewardObservation,)

    def __init__(self) -> None:
        self.heard: list[tuple[str, RewardObservation]] = []

    @override
    def on_observation(self, trainer: L.Trainer, pl_module: L.LightningModule, observation: Observation, source: str) -> None:
        assert isinstance(observation, RewardObservation)
        self.heard.append((source, observation))
