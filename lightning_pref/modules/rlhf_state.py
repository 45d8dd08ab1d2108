"""What a run of reinforcement learning carries from rollout to rollout, apart from weights; part of the checkpoint."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel
from typing_extensions import override

from lightning_pref.data.groups import GroupBatch
from lightning_pref.functional.kl_control import KLController
from lightning_pref.functional.moments import Moments, RunningMoments
from lightning_pref.models.forward import Layout, response_logps


@dataclass
class TokenScore:
    """Log-prob of each response token under a reference, tempered as the policy is."""

    layout: Layout
    temperature: float = 1.0

    def __call__(self, model: PreTrainedModel | PeftModel, batch: GroupBatch) -> Tensor:
        return response_logps(model, batch, layout=self.layout, temperature=self.temperature).token_logps


class RolloutState(nn.Module):
    """The coefficient of the KL, and the moments of all scores seen so far, in full precision under every plugin.

    Args:
        controller: What moves the coefficient.
    """

    kl_coefficient: Tensor  # []
    score_mean: Tensor  # []
    score_squares: Tensor  # []
    num_scores: Tensor  # []

    def __init__(self, controller: KLController) -> None:
        super().__init__()
        self.controller = controller
        seen = RunningMoments.empty()
        self.register_buffer("kl_coefficient", controller.start())
        self.register_buffer("score_mean", seen.mean.clone())
        self.register_buffer("score_squares", seen.squared_deviations.clone())
        self.register_buffer("num_scores", seen.num_seen.clone())

    @property
    def scores(self) -> RunningMoments:
        """Moments of the scores."""
        return RunningMoments(self.score_mean, self.score_squares, self.num_scores)

    def add_scores(self, sums: Moments) -> None:
        """Count the scores of a rollout, over all ranks."""
        seen = self.scores.updated(sums)
        self.score_mean.copy_(seen.mean)
        self.score_squares.copy_(seen.squared_deviations)
        self.num_scores.copy_(seen.num_seen)

    def steer(self, kl: Tensor, num_responses: Tensor) -> None:
        """Move the coefficient by the KL of a rollout: its mean per response over all ranks, in nats."""
        self.kl_coefficient.copy_(self.controller.updated(self.kl_coefficient, kl, num_responses))

    @override
    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> RolloutState:
        """Go along to another device, not to another dtype."""
        super()._apply(lambda tensor: tensor.to(fn(tensor).device), recurse)  # type: ignore[no-untyped-call]
        return self
