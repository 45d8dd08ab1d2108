"""Likelihood displacement: preferred responses that lose probability while a preference loss falls.

Razin et al. 2024, arXiv 2410.08847. A margin loss fixes only the difference of two log-probabilities, so both may fall, and the
probability goes to responses that nobody asked for.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torchmetrics import Metric
from typing_extensions import override

from lightning_pref.measures.correlation import rank_correlation
from lightning_pref.measures.pair_history import PairChanges


class DisplacementSummary(NamedTuple):
    """Means over the pairs whose change is known; `nan` where there is none."""

    chosen_logp_change: Tensor  # [] nats, log-probability of the chosen response now minus at the anchor
    rejected_logp_change: Tensor  # [] nats
    margin_change: Tensor  # [] nats, chosen minus rejected
    share: Tensor  # [] in [0, 1], pairs whose chosen response fell
    both_fell: Tensor  # [] in [0, 1], pairs whose responses both fell
    chosen_logp_change_per_token: Tensor  # [] nats per token, mean of each pair's own quotient
    rejected_logp_change_per_token: Tensor  # []


def displacement(
    chosen_change: Tensor,
    rejected_change: Tensor,
    chosen_lengths: Tensor | None = None,
    rejected_lengths: Tensor | None = None,
) -> DisplacementSummary:
    """How far the log-probabilities of B pairs have moved from their anchors.

    Args:
        chosen_change: Log-probability of the chosen response now minus at the anchor, [B], nats. A pair with a change that is
            not finite is left out.
        rejected_change: The same of the rejected response, [B].
        chosen_lengths: Response tokens, [B]; a pair with none is left out of the means per token.
        rejected_lengths: The same of the rejected response, [B].

    >>> moved = displacement(torch.tensor([-3.0, 1.0]), torch.tensor([-5.0, -2.0]), torch.tensor([3, 2]), torch.tensor([5, 2]))
    >>> [round(value.item(), 2) for value in moved]
    [-1.0, -3.5, 2.5, 0.5, 0.5, -0.25, -1.0]
    """
    sums = displacement_sums(chosen_change, rejected_change, chosen_lengths, rejected_lengths)
    return summary_of_sums(sums)


def displacement_sums(
    chosen_change: Tensor,
    rejected_change: Tensor,
    chosen_lengths: Tensor | None = None,
    rejected_lengths: Tensor | None = None,
) -> Tensor:
    """Counts and sums behind `displacement`, [8] float64; those of disjoint sets of pairs add up.

    Pairs, pairs with lengths, chosen change, rejected change, fallen, both fallen, and both changes per token.
    """
    chosen, rejected = chosen_change.double(), rejected_change.double()
    known = chosen.isfinite() & rejected.isfinite()
    if chosen_lengths is None or rejected_lengths is None:
        sized, lengths = torch.zeros_like(known), (torch.ones_like(chosen), torch.ones_like(chosen))
    else:
        sized = known & (chosen_lengths > 0) & (rejected_lengths > 0)
        lengths = (chosen_lengths.double().clamp(min=1), rejected_lengths.double().clamp(min=1))
    terms = [
        (known, torch.ones_like(chosen)),
        (sized, torch.ones_like(chosen)),
        (known, chosen),
        (known, rejected),
        (known, (chosen < 0).double()),
        (known, ((chosen < 0) & (rejected < 0)).double()),
        (sized, chosen / lengths[0]),
        (sized, rejected / lengths[1]),
    ]
    return torch.stack([torch.where(mask, values, 0.0).sum() for mask, values in terms])


def summary_of_sums(sums: Tensor) -> DisplacementSummary:
    """The means behind counts and sums of `displacement_sums`."""
    count, sized, chosen, rejected, fell, both, chosen_rate, rejected_rate = sums.unbind()
    return DisplacementSummary(
        chosen_logp_change=chosen / count,
        rejected_logp_change=rejected / count,
        margin_change=(chosen - rejected) / count,
        share=fell / count,
        both_fell=both / count,
        chosen_logp_change_per_token=chosen_rate / sized,
        rejected_logp_change_per_token=rejected_rate / sized,
    )


def is_displaced(loss: Tensor, first_loss: Tensor, chosen_logps: Tensor, first_chosen_logps: Tensor) -> Tensor:
    """The paper's criterion for a set of pairs: the loss fell, and so did the mean log-probability of the chosen responses.

    Args:
        loss: Preference loss now, any shape; its mean counts.
        first_loss: The same at the anchor.
        chosen_logps: Log-probabilities of the chosen responses now, [B], nats, summed over tokens.
        first_chosen_logps: The same at the anchor, [B].

    Returns:
        [] bool. Definition 1 of arXiv 2410.08847.

    >>> is_displaced(torch.tensor(0.4), torch.tensor(0.7), torch.tensor([-9.0, -3.0]), torch.tensor([-4.0, -4.0])).item()
    True
    """
    return (loss.double().mean() < first_loss.double().mean()) & (
        chosen_logps.double().mean() < first_chosen_logps.double().mean()
    )


def max_drawdown(series: Tensor) -> Tensor:
    """Largest fall from a value to any later one; 0 for a series that never falls, `nan` for an empty one.

    The paper's code takes only pairs of different times, which makes a series that rises throughout negative; here it is 0.

    >>> max_drawdown(torch.tensor([1.0, 3.0, 2.0, 2.5, 0.5])).item()
    2.5
    """
    if not len(series):
        return torch.tensor(torch.nan, dtype=series.dtype)
    return (series.cummax(0).values - series).max()


class Displacement(Metric):
    """Sums and counts of `displacement`, exact over ragged batches and ranks.

    With `details` the changes of all rows since the last reset are kept too, for quantiles and for the correlation with CHES;
    they are gathered from all ranks.

    >>> metric, nan = Displacement(), torch.full((2,), torch.nan)
    >>> changes = [torch.tensor([-3.0, 1.0]), torch.tensor([-5.0, -2.0])]
    >>> metric.update(PairChanges(torch.arange(2), *changes, nan, nan, nan, nan, torch.zeros(2, dtype=torch.bool), nan))
    >>> metric.compute()["share"].item()
    0.5
    """

    full_state_update = False

    def __init__(self, *, details: bool = False, **metric_kwargs: Any) -> None:  # Any: torchmetrics' own keyword arguments
        super().__init__(**metric_kwargs)
        self.details = details
        self.sums: Tensor
        self.sights: Tensor
        self.rows: list[Tensor] | Tensor
        self.add_state("sums", torch.zeros(8, dtype=torch.float64), dist_reduce_fx="sum")
        # Sights, those whose anchor is late, and those that are left out.
        self.add_state("sights", torch.zeros(3, dtype=torch.float64), dist_reduce_fx="sum")
        # There without `details`, too, so that a checkpoint fits either way.
        self.add_state("rows", [], dist_reduce_fx="cat")

    @override
    def update(self, changes: PairChanges) -> None:
        """Add the changes of M sights; M may be 0, and is where a rank saw nothing."""
        sums = displacement_sums(changes.chosen, changes.rejected, changes.chosen_lengths, changes.rejected_lengths)
        self.sums += sums.to(self.sums.device)
        num_sights = len(changes.row_ids) + changes.num_left_out
        counts = torch.tensor([num_sights, int(changes.is_late.sum()), changes.num_left_out], dtype=torch.float64)
        self.sights += counts.to(self.sights.device)
        if self.details:
            rows = torch.stack([changes.chosen, changes.normalized_ches], dim=1).double()
            assert isinstance(self.rows, list)  # a tensor only while it is gathered from all ranks
            self.rows.append(rows[changes.chosen.isfinite() & changes.rejected.isfinite()].to(self.sums.device))

    @override
    def compute(self) -> dict[str, Tensor]:
        """The means by name, the shares of late and missing anchors; with `details` quantiles and the correlation with CHES."""
        num_sights, late, left_out = self.sights.unbind()
        found = {**summary_of_sums(self.sums)._asdict(), "late_anchors": late / num_sights, "left_out": left_out / num_sights}
        if not self.details:
            return found
        # One tensor after a gather over ranks, a list before.
        rows = torch.cat([self.sums.new_empty(0, 2), *self.rows]) if isinstance(self.rows, list) else self.rows
        change = rows[:, 0]
        levels = torch.tensor([0.05, 0.5, 0.95], dtype=change.dtype, device=change.device)
        quantiles = change.quantile(levels) if len(change) else change.new_full((3,), torch.nan)
        names = ("chosen_logp_change_q05", "chosen_logp_change_median", "chosen_logp_change_q95")
        found |= dict(zip(names, quantiles, strict=True))
        return found | {"ches_correlation": rank_correlation(rows[:, 1], change)}
