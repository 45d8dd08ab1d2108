"""From scores to advantages, by algorithm. All statistics are over the whole rollout and all ranks, before it is cut."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_pref.functional.advantages import (
    flat_gae,
    grpo_advantages,
    reinforce_pp_advantages,
    returns_to_go,
    rloo_advantages,
)
from lightning_pref.functional.masked import segment_sum
from lightning_pref.functional.moments import Moments, moment_sums, whiten
from lightning_pref.functional.token_rewards import token_rewards
from lightning_pref.modules.rlhf_settings import AdvantageSettings, Algorithm

# Sum over all ranks.
Total = Callable[[Tensor], Tensor]


class Evidence(NamedTuple):
    """What advantages are made from: R responses of one rank, N tokens, one response after the other."""

    scores: Tensor  # [R], `nan` for what counts nowhere
    response: Tensor  # [N] index of the response of each token
    prompt_ids: Tensor  # [R]
    kl: Tensor | None  # [N] log-ratio to the reference of each token, nats; None: not part of the reward
    kl_coefficient: Tensor  # []
    values: Tensor | None = None  # [N]

    @property
    def counted(self) -> Tensor:
        """Tokens of responses with a finite score, [N] bool."""
        return self.scores.isfinite()[self.response]


class Estimate(NamedTuple):
    """Advantages, and what the values are trained towards."""

    advantages: Tensor  # [N], 0 where the score is not finite
    returns: Tensor | None  # [N], `nan` where the score is not finite


def estimate(algorithm: Algorithm, settings: AdvantageSettings, evidence: Evidence, total: Total) -> Estimate:
    """Advantages of every token.

    Args:
        algorithm: Any with a surrogate.
        settings: Its options.
        evidence: Scores, log-ratios and values.
        total: Sum over all ranks; called equally often on each.
    """
    if algorithm in ("rloo", "grpo"):
        return Estimate(_of_responses(algorithm, settings, evidence, total)[evidence.response], None)
    counted = evidence.counted
    rewards = _token_rewards(evidence, settings)
    if algorithm == "reinforce_pp":
        sums = over_ranks(moment_sums(returns_to_go(rewards, evidence.response, gamma=settings.gamma), counted), total)
        advantages = reinforce_pp_advantages(rewards, evidence.response, gamma=settings.gamma, sums=sums)
        return Estimate(torch.where(counted, advantages, 0.0), None)
    assert evidence.values is not None, "PPO has a value function"
    found = flat_gae(rewards, evidence.values, evidence.response, gamma=settings.gamma, lam=settings.lam)
    advantages = torch.where(counted, found.advantages, 0.0)
    if settings.whiten:
        advantages = whiten(advantages, counted, sums=over_ranks(moment_sums(advantages, counted), total))
    return Estimate(advantages, torch.where(counted, found.returns, torch.nan))


def over_ranks(sums: Moments, total: Total) -> Moments:
    """Moments of the numbers of all ranks."""
    return Moments(*total(torch.stack(sums)))


def _of_responses(algorithm: Algorithm, settings: AdvantageSettings, evidence: Evidence, total: Total) -> Tensor:
    rewards = evidence.scores
    if evidence.kl is not None:
        rewards = rewards - evidence.kl_coefficient * segment_sum(evidence.kl, evidence.response, len(rewards))
    if algorithm == "rloo":
        return rloo_advantages(rewards, evidence.prompt_ids)
    sums = over_ranks(moment_sums(rewards, rewards.isfinite()), total) if settings.scale == "batch" else None
    return grpo_advantages(rewards, evidence.prompt_ids, scale=settings.scale, sums=sums)


def _token_rewards(evidence: Evidence, settings: AdvantageSettings) -> Tensor:
    scores = evidence.scores
    if settings.group_baseline:
        scores = grpo_advantages(scores, evidence.prompt_ids, scale="none")
    kl = torch.zeros_like(evidence.response, dtype=scores.dtype) if evidence.kl is None else evidence.kl
    known = torch.where(scores.isfinite(), scores, 0.0)
    return token_rewards(known, kl, evidence.response, kl_coefficient=evidence.kl_coefficient)
