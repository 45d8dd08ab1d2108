"""From sampled and scored responses to experience: the scores that are trained on, pairs of responses, and the KL that steers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_pref.data.groups import PromptGroup
from lightning_pref.functional.masked import segment_sum
from lightning_pref.functional.moments import moment_sums
from lightning_pref.functional.token_rewards import shape_scores
from lightning_pref.modules.rlhf_advantages import Total, over_ranks
from lightning_pref.modules.rlhf_pairs import best_against_worst
from lightning_pref.modules.rlhf_settings import ScoreSettings
from lightning_pref.modules.rlhf_state import RolloutState
from lightning_pref.rollouts.collecting import Collected
from lightning_pref.rollouts.experience import TokenRecord


def shaped_scores(found: Collected, how: ScoreSettings, state: RolloutState, total: Total) -> Tensor:
    """Scores as the policy is to see them, [R]; `nan` for what counts nowhere.

    Args:
        found: The responses of this rank.
        how: What happens to their rewards.
        state: Takes their moments where scores are normalised.
        total: Sum over all ranks.
    """
    counted = found.rewards.isfinite() & (found.weights > 0)
    if how.normalize:
        state.add_scores(over_ranks(moment_sums(found.rewards, counted), total))
    shaped = shape_scores(
        found.rewards,
        found.ended,
        running=state.scores if how.normalize else None,
        shift_mean=how.shift_mean,
        clip=how.clip,
        missing_eos_score=how.missing_eos_score,
        missing_eos_penalty=how.missing_eos_penalty,
    )
    return torch.where(counted, shaped, torch.nan)


class PairedResponses(NamedTuple):
    """The best and the worst response to each prompt, 2 P of them, with N tokens."""

    groups: Sequence[PromptGroup]
    sampled_logps: Tensor  # [N]
    weights: Tensor  # [2 P] float32 on the CPU


def paired_responses(found: Collected, scores: Tensor, *, seed: int) -> PairedResponses:
    """The responses that pairs are made of, and what is known of them.

    Args:
        found: All responses.
        scores: Of all responses, [R].
        seed: Of the chance that breaks ties.
    """
    made = best_against_worst(found.answers.groups, scores.tolist(), seed=seed)
    ends, sizes = found.lengths.cumsum(0).tolist(), found.lengths.tolist()
    tokens = torch.cat([torch.arange(ends[r] - sizes[r], ends[r]) for r in made.places])
    # Of a dtype of its own: half precision makes its own the default while experience is collected.
    weights = torch.tensor([group.weight for group in made.groups for _ in group.responses], dtype=torch.float32)
    return PairedResponses(made.groups, found.sampled_logps[tokens.to(found.sampled_logps.device)], weights)


def log_ratios(tokens: TokenRecord) -> Tensor:
    """Log-ratio to the reference of each token when it was sampled, [N] nats."""
    assert tokens.old_logps is not None and tokens.ref_logps is not None, "a tie to the reference has both"
    return tokens.old_logps - tokens.ref_logps


def steer(state: RolloutState, kl: Tensor, found: Collected, total: Total) -> None:
    """Move the coefficient of the next rollout by the KL of this one.

    Args:
        state: Has the coefficient.
        kl: Log-ratio of each token to the reference, [N] nats.
        found: The responses of this rank.
        total: Sum over all ranks.
    """
    sums = segment_sum(kl, found.response, len(found.lengths))
    of_responses, count = total(torch.stack([(found.weights * sums).sum(), found.weights.sum()]))
    state.steer(of_responses / count, count)
