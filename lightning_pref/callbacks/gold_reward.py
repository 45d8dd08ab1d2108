"""What the policy's own answers are worth to a known reward."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from typing_extensions import override

GOLD_REWARD = "gold_reward"

AnswerPrompts = Callable[[L.LightningModule, Sequence[str]], list[str]]


class Sample(NamedTuple):
    """One answer of the policy and its worth."""

    prompt: str
    response: str
    reward: float


class GoldReward(Callback):
    """Watches the mean true reward of answers sampled for a fixed set of prompts.

    Needs: a function that lets the module answer prompts, and the reward as a function of prompt and answer.
    Logs: `gold_reward` (unit of the reward), before the first update, every N updates and after the last.
    Changes: nothing; the answering function must leave the model and random state as it found them.

    Args:
        prompts: Prompt texts, the same every time. Several processes share them; one that would have fewer than another
            answers one more, which counts nowhere.
        answer: `answer(module, prompts)` gives one response text per prompt.
        reward: `reward(prompt, response)`, larger is better.
        every_n_updates: Distance between measurements.
    """

    def __init__(
        self,
        prompts: Sequence[str],
        answer: AnswerPrompts,
        reward: Callable[[str, str], float],
        *,
        every_n_updates: int = 50,
    ) -> None:
        if not prompts:
            raise ValueError("GoldReward needs at least one prompt, got none.")
        if every_n_updates < 1:
            raise ValueError(f"`every_n_updates` must be at least 1, got {every_n_updates!r}.")
        self.prompts = list(prompts)
        self.answer = answer
        self.reward = reward
        self.every_n_updates = every_n_updates
        self.first: list[Sample] = []
        self.last: list[Sample] = []
        self._measured_at = -1

    @override
    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self._measured_at < 0:  # a run that goes on has measured what it began with
            self._measure(trainer, pl_module)

    @override
    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        # A batch may make several updates, and pass a multiple by.
        if trainer.global_step // self.every_n_updates > self._measured_at // self.every_n_updates:
            self._measure(trainer, pl_module)

    @override
    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._measure(trainer, pl_module)

    @override
    def state_dict(self) -> dict[str, Any]:  # Any: Lightning's own type
        return {
            "version": 1,
            "measured_at": self._measured_at,
            "first": [tuple(sample) for sample in self.first],
            "last": [tuple(sample) for sample in self.last],
        }

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:  # Any: as above
        self._measured_at = state_dict["measured_at"]
        self.first = [Sample(*sample) for sample in state_dict["first"]]
        self.last = [Sample(*sample) for sample in state_dict["last"]]

    def _measure(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.global_step == self._measured_at:
            return
        self._measured_at = trainer.global_step
        mine = self.prompts[trainer.global_rank :: trainer.world_size]
        # Where the weights are split, every forward pass is a joint act: all processes answer equally many prompts.
        most = -(-len(self.prompts) // trainer.world_size)
        asked = [*mine, *self.prompts[: most - len(mine)]]
        answered = list(zip(asked, self.answer(pl_module, asked), strict=True))[: len(mine)]
        self.last = [Sample(prompt, response, self.reward(prompt, response)) for prompt, response in answered]
        self.first = self.first or self.last
        sums = torch.tensor([sum(s.reward for s in self.last), len(self.last)], dtype=torch.float64)
        sums = trainer.strategy.reduce(sums.to(pl_module.device), reduce_op="sum")
        assert isinstance(sums, torch.Tensor)
        # Straight to the loggers: before the first and after the last update `log` is not allowed.
        metrics = {GOLD_REWARD: (sums[0] / sums[1]).item()}
        for logger in trainer.loggers:
            logger.log_metrics(metrics, step=trainer.global_step)
