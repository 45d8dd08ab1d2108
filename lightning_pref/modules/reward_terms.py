"""From the scores of a batch to the losses of its pairs, lists, responses or steps, with what is logged beside.

Every member of an ensemble has a loss of its own; the loss of an example is their mean. What is logged is computed from the
one reward that the members make together.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from typing_extensions import override

from lightning_pref.data.groups import GroupBatch, Pairs, PairSelection, select_pairs
from lightning_pref.functional.masked import segment_sum
from lightning_pref.losses.ensemble import How, ensemble_reward
from lightning_pref.losses.reward import bradley_terry, ordinal, plackett_luce, regression, step_bce
from lightning_pref.models.full_precision import FullPrecision
from lightning_pref.models.reward_models import ResponseScores, step_labels
from lightning_pref.modules.objectives import Measured, StepTerms, desirable_responses
from lightning_pref.modules.reward_choice import RewardLossName

MEAN, SQUARE, STD = "rewards/mean", "rewards/square", "rewards/std"
UNCERTAINTY = "rewards/uncertainty"
WITHIN_PROMPT = "rewards/within_prompt_variance"
OF_RESPONSES = (MEAN, SQUARE, UNCERTAINTY, WITHIN_PROMPT)
OF_PAIRS = ("rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies", "rewards/ties")
OF_LABELS = ("rewards/chosen", "rewards/rejected", "rewards/accuracies")

METRICS: Mapping[RewardLossName, tuple[str, ...]] = {
    "bradley_terry": ("loss", *OF_PAIRS, *OF_RESPONSES),
    "plackett_luce": ("loss", *OF_PAIRS, *OF_RESPONSES),
    "regression": ("loss", *OF_PAIRS, "rewards/errors", *OF_RESPONSES),
    "ordinal": ("loss", *OF_PAIRS, *OF_RESPONSES),
    "outcome_bce": ("loss", *OF_LABELS, *OF_RESPONSES),
    "implicit_prm": ("loss", *OF_LABELS, *OF_RESPONSES),
    "step_bce": ("loss", *OF_LABELS, *OF_RESPONSES),
}


class Scored(NamedTuple):
    """A batch with its scores."""

    out: ResponseScores
    rewards: Tensor  # [R] float32, of the members together
    batch: GroupBatch
    bootstrap: Tensor | None = None  # [K, G], how often a row counts for a member; None: once

    @property
    def weights(self) -> Tensor:
        """Weight of each response, [R]."""
        return self.batch.weights[self.batch.group_of_response]


def scored(out: ResponseScores, batch: GroupBatch, how: How, coefficient: float, bootstrap: Tensor | None = None) -> Scored:
    """A batch with its scores and their aggregate, which carries no gradient."""
    return Scored(out, out.rewards(how, coefficient=coefficient).detach(), batch, bootstrap)


def pair_terms(
    found: Scored, pairs: Pairs, *, margin_scale: float = 1.0, center: float = 0.0, label_smoothing: float = 0.0
) -> StepTerms:
    """Bradley-Terry on ordered pairs; a margin of the data asks for a lead of `margin_scale` times itself."""
    margins = found.batch.margins
    margin = None if margins is None else margin_scale * margins[pairs.group]
    losses = _over_members(
        found,
        found.out.members,
        lambda scores: bradley_terry(
            scores[pairs.chosen], scores[pairs.rejected], margin, center, label_smoothing=label_smoothing
        ),
        pairs.group,
    )
    return StepTerms(losses, pairs.weights, "groups", [_of_pairs(found.rewards, pairs), *_of_responses(found)])


def list_terms(found: Scored, *, top_k: int | None = None) -> StepTerms:
    """Plackett-Luce on the ranked responses of every prompt."""
    batch = found.batch
    pairs = batch.pairs()  # raises for a row without an order
    ranks = torch.tensor([rank for own in batch.ranks for rank in own or ()], device=batch.row_ids.device)
    losses = _over_members(
        found,
        found.out.members,
        lambda scores: plackett_luce(scores, ranks, batch.group_of_response, batch.num_groups, top_k=top_k),
        torch.arange(batch.num_groups, device=batch.row_ids.device),
    )
    return StepTerms(losses, batch.weights, "groups", [_of_pairs(found.rewards, pairs), *_of_responses(found)])


def regression_terms(found: Scored) -> StepTerms:
    """Squared error against annotated scores."""
    targets = annotated_scores(found.batch)
    losses = _over_members(found, found.out.members, lambda scores: regression(scores, targets), found.batch.group_of_response)
    error = Measured({"rewards/errors": (found.rewards - targets).abs()}, found.weights)
    return StepTerms(losses, found.weights, "responses", [error, *_of_ordered_pairs(found), *_of_responses(found)])


def ordinal_terms(found: Scored, levels: Tensor, thresholds: Tensor) -> StepTerms:
    """Cumulative logits of annotated levels, [R] int64, over trained thresholds."""
    losses = _over_members(
        found, found.out.members, lambda scores: ordinal(scores, levels, thresholds), found.batch.group_of_response
    )
    return StepTerms(losses, found.weights, "responses", [*_of_ordered_pairs(found), *_of_responses(found)])


def outcome_terms(found: Scored, losses: Callable[[Tensor, Tensor], Tensor]) -> StepTerms:
    """A loss of (scores, labels), [R] each, on responses that are labelled right or wrong."""
    labels = desirable_responses(found.batch)
    terms = _over_members(found, found.out.members, lambda scores: losses(scores, labels), found.batch.group_of_response)
    measured = [*_of_labels(found.rewards, labels, found.weights), *_of_responses(found)]
    return StepTerms(terms, found.weights, "responses", measured)


def step_terms(found: Scored, how: How, coefficient: float) -> StepTerms:
    """Cross-entropy at the last token of every step. Responses weigh the same, their steps share that weight."""
    out, batch = found.out, found.batch
    assert out.token_members is not None, "the module asks for it"
    labels = step_labels(batch)
    is_mark = labels >= 0
    counts = segment_sum(is_mark.float(), out.response, batch.num_responses).clamp(min=1.0)
    losses = _over_members(
        found, out.token_members, lambda scores: step_bce(scores, labels), batch.group_of_response[out.response]
    )
    by_response = segment_sum(losses, out.response, batch.num_responses) / counts
    rewards = ensemble_reward(out.token_members, how, coefficient).detach()
    weights = (found.weights / counts)[out.response] * is_mark
    measured = [*_of_labels(rewards, labels > 0, weights), *_of_responses(found)]
    return StepTerms(by_response, found.weights, "responses", measured)


def annotated_scores(batch: GroupBatch) -> Tensor:
    """The scores of the data, [R]."""
    if batch.scores is None:
        raise ValueError(
            "A row of this batch has no scores, which this loss is fitted to. Give rows with `responses` and `scores`, or train "
            "on preferences with the loss 'bradley_terry'."
        )
    return batch.scores


class OrdinalThresholds(FullPrecision):
    """Ascending thresholds between L levels, trained: a first one and the softplus of the gaps, which begin as -(L-2)/2 and 1."""

    def __init__(self, num_levels: int) -> None:
        super().__init__()
        self.first = nn.Parameter(torch.tensor([-(num_levels - 2) / 2], dtype=torch.float32))
        one = torch.tensor(1.0, dtype=torch.float32).expm1().log()  # softplus of it is 1
        self.gaps = nn.Parameter(one.repeat(num_levels - 2))

    @override
    def forward(self) -> Tensor:
        return torch.cat([self.first, self.first + F.softplus(self.gaps).cumsum(0)])


def ordered_pairs(batch: GroupBatch, how: PairSelection = "all") -> Pairs | None:
    """The ordered pairs of those groups that have some; `None` where none has. Unlike `batch.pairs`, for looking only."""
    starts = accumulate(batch.group_sizes, initial=0)
    found = []
    for g, (start, ranks) in enumerate(zip(starts, batch.ranks, strict=False)):
        chosen = select_pairs(ranks, how) if ranks is not None else []
        found += [(start + better, start + worse, g, 1.0 / len(chosen)) for better, worse in chosen]
    if not found:
        return None
    columns = torch.tensor(found, dtype=torch.float64).T.to(batch.row_ids.device)
    group = columns[2].long()
    return Pairs(columns[0].long(), columns[1].long(), group, columns[3].float() * batch.weights[group])


def _over_members(found: Scored, members: Tensor, losses: Callable[[Tensor], Tensor], group: Tensor) -> Tensor:
    """Mean over the members, [K, ...], of the losses of each, in which a row counts as often as that member drew it.

    Args:
        found: The batch.
        members: Scores by every member.
        losses: From the scores by one of them.
        group: The row that each loss belongs to.
    """
    of_each = torch.stack([losses(scores) for scores in members])
    return (of_each if found.bootstrap is None else of_each * found.bootstrap[:, group]).mean(0)


def _of_pairs(rewards: Tensor, pairs: Pairs) -> Measured:
    chosen, rejected = rewards[pairs.chosen], rewards[pairs.rejected]
    values = (chosen, rejected, chosen - rejected, (chosen > rejected).float(), (chosen == rejected).float())
    return Measured(dict(zip(OF_PAIRS, values, strict=True)), pairs.weights)


def _of_ordered_pairs(found: Scored) -> list[Measured]:
    pairs = ordered_pairs(found.batch)
    return [] if pairs is None else [_of_pairs(found.rewards, pairs)]


def _of_labels(rewards: Tensor, labels: Tensor, weights: Tensor) -> list[Measured]:
    is_right = (rewards > 0) == labels
    return [
        Measured({"rewards/chosen": rewards}, weights * labels),
        Measured({"rewards/rejected": rewards}, weights * ~labels),
        Measured({"rewards/accuracies": is_right.float()}, weights),
    ]


def _of_responses(found: Scored) -> Sequence[Measured]:
    """Mean and square of the rewards, the members' disagreement, and the variance within prompts of two responses or more."""
    rewards, batch = found.rewards, found.batch
    uncertainty = found.out.uncertainty.detach()
    groups, owner = batch.num_groups, batch.group_of_response
    counts = segment_sum(torch.ones_like(rewards), owner, groups)
    deviations = rewards - (segment_sum(rewards, owner, groups) / counts)[owner]
    variances = segment_sum(deviations.square(), owner, groups) / (counts - 1).clamp(min=1.0)
    return [
        Measured({MEAN: rewards, SQUARE: rewards.square(), UNCERTAINTY: uncertainty}, found.weights),
        Measured({WITHIN_PROMPT: variances}, batch.weights * (counts > 1)),
    ]
