"""What makes a reward model a good teacher, beside its variance: order, ties, saturation, drift, a taste for length.

Razin et al. 2025, arXiv 2503.15477. All functions take flat batches: one entry per response, and the prompt it belongs to.
They are exact and meant for a fixed set of responses of some thousands.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_pref.measures.correlation import pearson, rank_correlation
from lightning_pref.measures.variance import prompt_slots

# Below this slope of the Bradley-Terry loss a pair has next to nothing to teach the reward model.
SATURATED_SLOPE = 0.01
# Difference of two scores at which the slope sigmoid(-difference) gets there, about 4.6.
SATURATED_DIFFERENCE = math.log(1 / SATURATED_SLOPE - 1)
# Scores this close to the smallest or largest, as a share of the range between them, are at an end of it.
END_SHARE = 0.01

# Pairs of so many responses with all others are compared at a time.
_ROWS_AT_A_TIME = 512


class PairCounts(NamedTuple):
    """Unordered pairs of responses to the same prompt, counted; float64 [].

    Attributes:
        pairs: All of them.
        ties: Those whose scores are equal.
        saturated: Those whose scores differ so much that sigmoid(-difference) < `SATURATED_SLOPE`.
        gold_pairs: Those that the gold reward tells apart; 0 without a gold reward.
        agreements: Of these, the ones that the scores put in the same order.
        gold_ties: Of these, the ones whose scores are equal: neither right nor wrong.
        both_tied: Pairs that neither tells apart.
    """

    pairs: Tensor
    ties: Tensor
    saturated: Tensor
    gold_pairs: Tensor
    agreements: Tensor
    gold_ties: Tensor
    both_tied: Tensor

    @property
    def accuracy(self) -> Tensor:
        """Share of the pairs with a gold order that the scores put in this order; a tie is not right. `nan` without gold."""
        return self.agreements / self.gold_pairs

    @property
    def accuracy_with_ties(self) -> Tensor:
        """The paper's accuracy: share of all pairs in which the signs of both differences agree, 0 with 0 as well."""
        return torch.where(self.gold_pairs > 0, (self.agreements + self.both_tied) / self.pairs, torch.nan)

    @property
    def tie_share(self) -> Tensor:
        """Share of pairs with equal scores: of those that the gold reward tells apart, of all pairs without one."""
        return torch.where(self.gold_pairs > 0, self.gold_ties / self.gold_pairs, self.ties / self.pairs)

    @property
    def saturated_share(self) -> Tensor:
        """Share of all pairs on which the Bradley-Terry loss is flat."""
        return self.saturated / self.pairs


def compare_pairs(scores: Tensor, prompt_ids: Tensor, gold: Tensor | None = None) -> PairCounts:
    """Count ties, saturated pairs and, with a gold reward, agreements over all pairs of responses to the same prompt.

    A pair with a score or gold reward that is not finite is left out.

    Args:
        scores: Score of each response, [N].
        prompt_ids: Equal for responses to one prompt, integer [N].
        gold: What each response is really worth, [N], on any monotone scale.

    >>> counts = compare_pairs(torch.tensor([0.0, 1.0, 1.0]), torch.zeros(3, dtype=torch.long), torch.tensor([0.0, 1.0, 2.0]))
    >>> round(counts.accuracy.item(), 3), round(counts.tie_share.item(), 3)
    (0.667, 0.333)
    """
    values = scores.detach().double()
    truth = torch.zeros_like(values) if gold is None else gold.detach().double()
    usable = values.isfinite() & truth.isfinite()
    places = torch.arange(len(values), device=values.device)
    counts = torch.zeros(len(PairCounts._fields), dtype=torch.float64, device=values.device)
    for start in range(0, len(values), _ROWS_AT_A_TIME):
        rows = places[start : start + _ROWS_AT_A_TIME]
        is_pair = (prompt_ids[rows, None] == prompt_ids) & (places[rows, None] < places)
        is_pair &= usable[rows, None] & usable
        differences = values[rows, None] - values
        truths = truth[rows, None] - truth
        tied, gold_tied = differences == 0, truths == 0
        found = (
            torch.ones_like(tied),
            tied,
            differences.abs() > SATURATED_DIFFERENCE,
            ~gold_tied,
            ~gold_tied & (differences.sign() == truths.sign()),
            ~gold_tied & tied,
            gold_tied & tied,
        )
        counts += torch.stack([(is_pair & kind).sum() for kind in found])
    return PairCounts(*counts)


def end_share(scores: Tensor) -> Tensor:
    """Share of scores at the ends of their range, within `END_SHARE` of it: large where scores are clipped or squashed.

    Args:
        scores: All scores, [N]; those that are not finite are left out. `nan` where all are equal.

    >>> end_share(torch.tensor([-1.0, -1.0, 0.0, 1.0])).item()
    0.75
    """
    finite = scores.isfinite()
    values = scores.detach().double()
    lowest = torch.where(finite, values, torch.inf).amin()
    highest = torch.where(finite, values, -torch.inf).amax()
    margin = END_SHARE * (highest - lowest)
    at_end = finite & ((values <= lowest + margin) | (values >= highest - margin))
    return torch.where(highest > lowest, at_end.sum() / finite.sum(), torch.nan).double()


class ScoreDrift(NamedTuple):
    """How far scores of the same responses have moved since the first measurement; float64 [].

    Attributes:
        shift: Change of the mean, in standard deviations of the first scores; a shift alone changes nothing for a policy.
        spread: Standard deviation over that of the first scores.
        rank_correlation: Spearman's, over all responses; 1 is the same order.
    """

    shift: Tensor
    spread: Tensor
    rank_correlation: Tensor


def score_drift(scores: Tensor, first: Tensor) -> ScoreDrift:
    """Compare scores with the first scores of the same responses.

    Args:
        scores: Now, [N].
        first: Then, [N], in the same order.

    >>> drift = score_drift(torch.tensor([2.0, 4.0, 6.0]), torch.tensor([1.0, 2.0, 3.0]))
    >>> drift.shift.item(), drift.spread.item(), round(drift.rank_correlation.item(), 3)
    (2.0, 2.0, 1.0)
    """
    if scores.shape != first.shape:
        raise ValueError(
            f"Drift compares the same responses: expected {len(first)} scores as in the first measurement, got {len(scores)}."
        )
    now, then = scores.double(), first.double()
    scale = then.std()
    return ScoreDrift((now.mean() - then.mean()) / scale, now.std() / scale, rank_correlation(now, then))


class LengthCorrelation(NamedTuple):
    """Pearson's correlation of rewards with lengths, float64 [].

    Attributes:
        within: Of deviations from the prompt's means: what a policy can exploit.
        pooled: Over all responses; questions that want long answers enter it too.
    """

    within: Tensor
    pooled: Tensor


def length_correlation(rewards: Tensor, lengths: Tensor, prompt_ids: Tensor) -> LengthCorrelation:
    """Whether longer responses get more.

    Args:
        rewards: One per response, [N].
        lengths: Tokens of each response, [N].
        prompt_ids: Equal for responses to one prompt, integer [N].

    >>> prompts = torch.tensor([0, 0, 1, 1])
    >>> within, pooled = length_correlation(torch.tensor([1.0, 2.0, 9.0, 8.0]), torch.tensor([5, 6, 10, 11]), prompts)
    >>> round(within.item(), 3), round(pooled.item(), 3)
    (0.0, 0.971)
    """
    order, slots = prompt_slots(prompt_ids)

    def centred(values: Tensor) -> Tensor:
        ordered = values.double()[order]
        counts = torch.zeros_like(ordered).index_add_(0, slots, torch.ones_like(ordered))
        return ordered - (torch.zeros_like(ordered).index_add_(0, slots, ordered) / counts)[slots]

    return LengthCorrelation(pearson(centred(rewards), centred(lengths)), pearson(rewards, lengths))


def relative_speed(whitened: Sequence[float]) -> list[float]:
    """Highest learning speed of a policy under each teacher, relative to the best of them, in [0, 1].

    The time a policy gradient needs to raise the expected reward by a given amount grows at least like variance^(-1/3)
    (arXiv 2503.15477, Theorem 1), so that its speed falls at least like variance^(1/3). A bound, no forecast: the bounds of
    two teachers compare, other things being equal.

    Args:
        whitened: Whitened variance within prompts under each teacher; 0 has speed 0.

    >>> relative_speed([0.8, 0.1])
    [1.0, 0.5]
    """
    best = max((value for value in whitened if value == value), default=0.0)
    return [(value / best) ** (1 / 3) if best > 0 else 0.0 for value in whitened]


def speed_in_words(speed: float) -> str:
    """What a relative speed means.

    >>> speed_in_words(0.5)
    'at best 2.0 times slower than the best'
    """
    if speed != speed:
        return "unknown"
    if speed == 0:
        return "teaches nothing: every response gets the same reward"
    if speed == 1:
        return "the fastest of those compared"
    if speed > 0.95:
        return "about as fast as the best"
    return f"at best {1 / speed:.1f} times slower than the best"
