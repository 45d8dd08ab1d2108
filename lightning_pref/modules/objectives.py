"""From the log-probabilities of a batch to the losses of its pairs, responses or prompts, with what is logged beside.

An objective is made once, from the name and the options of a loss, and refuses there what cannot work. For every batch it
gets the policy's and the reference's token log-probabilities and returns `StepTerms`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from lightning_pref.data.groups import GroupBatch, Pairs, PairSelection
from lightning_pref.losses import (
    FORGET_LOSSES,
    GROUP_LOSSES,
    UNPAIRED_LOSSES,
    PairLogps,
    PreferenceLoss,
    ScoredTokens,
    implicit_rewards,
    length_decoupled_sums,
    preference_loss,
    wpo_weights,
)
from lightning_pref.models.forward import ResponseLogps

PAIR_METRICS = (
    "loss",
    "rewards/chosen",
    "rewards/rejected",
    "rewards/margins",
    "rewards/accuracies",
    "logps/chosen",
    "logps/rejected",
)
# Of single responses: good ones are called chosen, bad ones rejected.
RESPONSE_METRICS = ("loss", "rewards/chosen", "rewards/rejected", "logps/chosen", "logps/rejected")
# Losses that give no response a reward.
LIKELIHOOD_METRICS = ("loss", "logps/chosen", "logps/rejected")


class Measured(NamedTuple):
    """Named values of one shape and the weight of each entry in its mean."""

    values: Mapping[str, Tensor]
    weights: Tensor


class StepTerms(NamedTuple):
    """What one micro-batch adds to the loss and to the metrics."""

    losses: Tensor  # [M], one per pair, response, token or prompt, with gradient
    weights: Tensor  # [M]
    unit: Literal["groups", "responses", "response_tokens"]  # which count of the update divides the weighted sum
    measured: Sequence[Measured]


@dataclass(frozen=True, kw_only=True)
class PairObjective:
    """A pairwise loss on every ordered pair of the batch; the pairs of one prompt share its weight.

    Attributes:
        loss: Name, mix or function.
        options: Options of the loss.
        selection: Which pairs of a prompt with more than two ranked responses.
        tail_weight: Weight of tokens beyond the length of the partner (LD-DPO); 1 is the plain sum.
        weigh_by_policy: Weigh every pair by how on-policy its responses are (WPO).
    """

    loss: PreferenceLoss
    options: Mapping[str, Any]  # Any: each loss has options of its own
    selection: PairSelection = "all"
    tail_weight: float = 1.0
    weigh_by_policy: bool = False

    def logps(self, out: ResponseLogps, reference: Tensor | None, pairs: Pairs) -> PairLogps:
        """What the loss sees.

        Args:
            out: The policy's log-probabilities.
            reference: Those of the reference: [N] by token where `tail_weight` is not 1, else [R] summed.
            pairs: The pairs of the batch.
        """
        chosen, rejected = self._sums(out, out.token_logps, out.logps, pairs)
        references: tuple[Tensor | None, Tensor | None] = (None, None)
        if reference is not None:
            references = self._sums(out, reference, reference, pairs)
        return PairLogps(chosen, rejected, *references, out.lengths[pairs.chosen], out.lengths[pairs.rejected])

    def _sums(self, out: ResponseLogps, tokens: Tensor, sums: Tensor, pairs: Pairs) -> tuple[Tensor, Tensor]:
        if self.tail_weight == 1.0:
            return sums[pairs.chosen], sums[pairs.rejected]
        scored = ScoredTokens(tokens, out.response, out.lengths)
        return length_decoupled_sums(scored, pairs.chosen, pairs.rejected, alpha=self.tail_weight)

    def terms(self, out: ResponseLogps, pair: PairLogps, pairs: Pairs) -> StepTerms:
        """Losses of the pairs, and the rewards that the loss compares."""
        losses = preference_loss(self.loss, pair, **self.options)
        if self.weigh_by_policy:
            assert out.collision is not None, "the module asks the forward for it"
            by_response = wpo_weights(ScoredTokens(out.token_logps, out.response, out.lengths), out.collision)
            losses = losses * by_response[pairs.chosen] * by_response[pairs.rejected]
        chosen, rejected = implicit_rewards(self.loss, pair, **self.options)
        values = {
            "rewards/chosen": chosen,
            "rewards/rejected": rejected,
            "rewards/margins": chosen - rejected,
            "rewards/accuracies": (chosen > rejected).float(),
            # The full sums, also where the loss weighs tails: the same key means the same thing in every run.
            "logps/chosen": out.logps[pairs.chosen],
            "logps/rejected": out.logps[pairs.rejected],
        }
        return StepTerms(losses, pairs.weights, "groups", [Measured(values, pairs.weights)])


def desirable_responses(batch: GroupBatch) -> Tensor:
    """Which responses are good, [R] bool: by their label, or where there is none, the best of a ranked prompt."""
    if batch.labels is not None:
        return batch.labels
    if any(ranks is None for ranks in batch.ranks):
        raise ValueError(
            "An unpaired loss needs to know which responses are good, but a row of this batch has neither `label` nor "
            "ranked responses. Use rows with `prompt`, `completion`, `label`, or preference pairs."
        )
    best = [rank == min(ranks) for ranks in batch.ranks if ranks is not None for rank in ranks]
    return torch.tensor(best, device=batch.row_ids.device)


def _by_side(values: Mapping[str, Tensor], desirable: Tensor, weights: Tensor) -> list[Measured]:
    """The values of good responses under `<key>/chosen`, of bad ones under `<key>/rejected`."""
    sides = {"chosen": desirable, "rejected": ~desirable}
    return [Measured({f"{key}/{side}": value for key, value in values.items()}, weights * mask) for side, mask in sides.items()]


def unpaired_terms(
    name: str, out: ResponseLogps, reference: Tensor, batch: GroupBatch, **options: Any
) -> StepTerms:  # Any: each loss has options of its own
    """Losses of single responses labelled good or bad (KTO, BCO, APO)."""
    desirable = desirable_responses(batch)
    weights = batch.weights[batch.group_of_response]
    spec = UNPAIRED_LOSSES[name]
    losses = spec.fn(out.logps, reference, desirable, **options)
    beta = options.get("beta", spec.options["beta"])
    values = {"rewards": beta * (out.logps - reference), "logps": out.logps}
    return StepTerms(losses, weights, "responses", _by_side(values, desirable, weights))


def forget_terms(
    name: str, out: ResponseLogps, reference: Tensor | None, batch: GroupBatch, *, retain_weight: float, **options: Any
) -> StepTerms:  # Any: each loss has options of its own
    """Losses that forget the bad responses (NPO, SimNPO) and keep the good ones by their mean negative log-likelihood."""
    desirable = desirable_responses(batch)
    weights = batch.weights[batch.group_of_response]
    spec = FORGET_LOSSES[name]
    forget = spec.fn(out.logps, reference if spec.needs_reference else out.lengths, **options)
    losses = torch.where(desirable, -retain_weight * out.logps / out.lengths, forget)
    return StepTerms(losses, weights, "responses", _by_side({"logps": out.logps}, desirable, weights))


def group_terms(name: str, out: ResponseLogps, batch: GroupBatch, **options: Any) -> StepTerms:
    """Losses of whole prompts (AFT): every better response against every worse one, and the NLL of the best."""
    # Any: each loss has options of its own
    groups, width = batch.num_groups, max(batch.group_sizes)
    device = out.logps.device
    ranks = torch.zeros(groups, width, dtype=torch.int64)
    mask = torch.zeros(groups, width, dtype=torch.bool)
    for g, own in enumerate(batch.ranks):
        if own is None:
            raise ValueError(f"Loss {name!r} needs ranked responses, but row {int(batch.row_ids[g])} has no order.")
        ranks[g, : len(own)] = torch.tensor(own)
        mask[g, : len(own)] = True
    is_best = mask & (ranks == ranks.masked_fill(~mask, torch.iinfo(torch.int64).max).amin(1, keepdim=True))
    best = is_best[mask].to(device)
    ranks, mask, is_best = ranks.to(device), mask.to(device), is_best.to(device)
    means = out.logps / out.lengths
    # Of the means' own dtype: under half precision Lightning makes that the default.
    scores = means.new_zeros(groups, width).masked_scatter(mask, means)
    likelihood = -(scores * is_best).sum(1) / is_best.sum(1)
    losses = likelihood + GROUP_LOSSES[name].fn(scores, ranks, mask, **options)
    weights = batch.weights[batch.group_of_response]
    return StepTerms(losses, batch.weights, "groups", _by_side({"logps": out.logps}, best, weights))
