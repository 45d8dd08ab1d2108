"""Whether a reward model is as sure as it is right, where it is right, and whether it merely likes length.

All of them read pairs of scores, chosen and rejected, and accumulate sums. A model says that the chosen response is better
with the probability sigmoid(chosen - rejected) (Bradley-Terry). In an accuracy a tie is not right, as in `measures.teaching`;
ties are reported beside it. A score that is `nan` makes the numbers it enters `nan`. What needs all responses of a fixed set
at once is in `measures.teaching`, too.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torchmetrics import Metric
from typing_extensions import override

from lightning_pref.functional.masked import wide


def pair_confidence(chosen: Tensor, rejected: Tensor) -> tuple[Tensor, Tensor]:
    """The probability the model gives the response it prefers, in [0.5, 1], and how often it is right then: 0 or 1, [B] each.

    The preferred one, not the chosen one: pairs are stored with the chosen response first, and against labels that are all
    "yes" no model but a boundless one is calibrated. A tie prefers neither: it says 0.5, and drawing lots is right half the
    time.

    >>> pair_confidence(torch.tensor([0.0, 0.0]), torch.tensor([1.0, 0.0]))
    (tensor([0.7311, 0.5000]), tensor([0.0000, 0.5000]))
    """
    difference = wide(chosen) - wide(rejected)
    return torch.sigmoid(difference.abs()), 0.5 * (1.0 + difference.sign())


class Calibration(NamedTuple):
    """Calibration of a model on pairs. An empty bin is `nan`, and so is everything without pairs.

    Attributes:
        error: Expected calibration error, [], in [0, 1].
        confidence: Mean confidence of each bin, [num_bins].
        accuracy: Share of pairs in it that are right, [num_bins].
        num_pairs: Pairs in it, [num_bins].
    """

    error: Tensor
    confidence: Tensor
    accuracy: Tensor
    num_pairs: Tensor


def calibration(chosen: Tensor, rejected: Tensor, *, num_bins: int = 10) -> Calibration:
    """Mean distance of confidence and accuracy over equally wide bins of [0.5, 1] (Guo et al., arXiv:1706.04599, eq. 3).

    Args:
        chosen: Scores, [B].
        rejected: Scores, [B].
        num_bins: Bins.

    >>> round(calibration(torch.zeros(4), torch.tensor([1.0, 1.0, 1.0, -1.0])).error.item(), 4)  # 0.7311 sure, 0.25 right
    0.4811
    """
    metric = PairCalibration(num_bins).to(chosen.device)
    metric.update(chosen, rejected)
    return metric.compute()


class _Sums(Metric):
    """A metric whose states are float64 sums, exact over ragged batches and ranks."""

    full_state_update = False

    def _add_sums(self, *names: str, size: int) -> None:
        for name in names:
            self.add_state(name, torch.zeros(size, dtype=torch.float64), dist_reduce_fx="sum")

    @override
    def _apply(self, fn: Callable[[Tensor], Tensor], exclude_state: Sequence[str] = "") -> nn.Module:
        """Go along to another device, but stay in float64: `Module.to(torch.bfloat16)` gets past torchmetrics' own guard."""
        return super()._apply(lambda tensor: tensor.to(fn(tensor).device), exclude_state)


class PairCalibration(_Sums):
    """Accumulates `calibration`.

    >>> metric = PairCalibration(num_bins=5)
    >>> metric.update(torch.tensor([0.0]), torch.tensor([0.0]))
    >>> metric.compute().error.item()
    0.0
    """

    def __init__(self, num_bins: int = 10, **metric_kwargs: Any) -> None:  # Any: torchmetrics' own keyword arguments
        super().__init__(**metric_kwargs)
        if num_bins < 1:
            raise ValueError(f"`num_bins` must be at least 1, got {num_bins!r}.")
        self.num_bins = num_bins
        self.num_pairs: Tensor
        self.confidence: Tensor
        self.right: Tensor
        self._add_sums("num_pairs", "confidence", "right", size=num_bins)

    @override
    def update(self, chosen: Tensor, rejected: Tensor) -> None:
        """Add pairs, scores [B] each."""
        confidence, right = pair_confidence(chosen.detach(), rejected.detach())
        # The last bin is closed: a probability of exactly 1 is in it.
        place = ((confidence - 0.5) * 2 * self.num_bins).long().clamp(0, self.num_bins - 1)
        self.num_pairs.index_add_(0, place, torch.ones_like(confidence, dtype=torch.float64))
        self.confidence.index_add_(0, place, confidence.double())
        self.right.index_add_(0, place, right.double())

    @override
    def compute(self) -> Calibration:
        """The calibration of all pairs so far."""
        return Calibration(
            error=(self.confidence - self.right).abs().sum() / self.num_pairs.sum(),
            confidence=self.confidence / self.num_pairs,
            accuracy=self.right / self.num_pairs,
            num_pairs=self.num_pairs.clone(),
        )


class SourceAccuracy(_Sums):
    """Accuracy and share of ties by source of the pairs; `nan` for a source without pairs.

    >>> metric = SourceAccuracy(["helpful"])
    >>> metric.update(torch.tensor([1.0, 0.0]), torch.tensor([0.0, 0.0]), torch.tensor([0, 0]))
    >>> {name: value.item() for name, value in metric.compute().items()}
    {'helpful/accuracy': 0.5, 'helpful/ties': 0.5}
    """

    def __init__(self, sources: Sequence[str], **metric_kwargs: Any) -> None:  # Any: torchmetrics' own keyword arguments
        super().__init__(**metric_kwargs)
        self.sources = tuple(sources)
        self.num_pairs: Tensor
        self.right: Tensor
        self.tied: Tensor
        self._add_sums("num_pairs", "right", "tied", size=len(sources))

    @override
    def update(self, chosen: Tensor, rejected: Tensor, source: Tensor) -> None:
        """Add pairs.

        Args:
            chosen: Scores, [B].
            rejected: Scores, [B].
            source: Index of each pair's source in `sources`, [B], int64.
        """
        self.num_pairs.index_add_(0, source, torch.ones_like(source, dtype=torch.float64))
        difference = chosen.detach().double() - rejected.detach().double()
        self.right.index_add_(0, source, _share_where(difference > 0, difference))
        self.tied.index_add_(0, source, _share_where(difference == 0, difference))

    @override
    def compute(self) -> dict[str, Tensor]:
        """Both shares of every source."""
        accuracy, ties = self.right / self.num_pairs, self.tied / self.num_pairs
        named = ((f"{name}/accuracy", accuracy[i]) for i, name in enumerate(self.sources))
        return dict(named) | {f"{name}/ties": ties[i] for i, name in enumerate(self.sources)}


def length_balanced_accuracy(chosen: Tensor, rejected: Tensor, chosen_lengths: Tensor, rejected_lengths: Tensor) -> Tensor:
    """Mean of the accuracy where the chosen response is longer and of that where it is shorter; equal lengths are left out.

    That is the accuracy on pairs reweighted so that length says nothing about the label: a model that scores length alone
    gets exactly 0.5, however often the longer response is the better one.

    Args:
        chosen: Scores, [B].
        rejected: Scores, [B].
        chosen_lengths: Response tokens, [B].
        rejected_lengths: Response tokens, [B].

    Returns:
        [], float64; `nan` where one of the two kinds is missing.

    >>> lengths = torch.tensor([5, 6, 2]), torch.tensor([3, 3, 3])
    >>> length_balanced_accuracy(lengths[0].float(), lengths[1].float(), *lengths).item()
    0.5
    """
    metric = LengthBias().to(chosen.device)
    metric.update(chosen, rejected, chosen_lengths, rejected_lengths)
    return metric.compute()["balanced_accuracy"]


class LengthBias(_Sums):
    """Correlation of scores with lengths, and accuracy where the chosen response is longer and where it is shorter.

    The correlation is within pairs: that of the deviations from the pair's means, `length_correlation(...).within` of
    `measures.teaching` for the same responses. It does not depend on which of the two is called chosen.

    >>> metric = LengthBias()
    >>> metric.update(torch.tensor([2.0, 1.0]), torch.zeros(2), torch.tensor([3, 1]), torch.tensor([1, 2]))
    >>> {name: round(value.item(), 3) for name, value in metric.compute().items()}
    {'correlation': 0.6, 'accuracy_longer': 1.0, 'accuracy_shorter': 1.0, 'balanced_accuracy': 1.0}
    """

    def __init__(self, **metric_kwargs: Any) -> None:  # Any: torchmetrics' own keyword arguments
        super().__init__(**metric_kwargs)
        self.products: Tensor  # of the differences of scores s and of lengths l: ss, ll, sl
        self.num_pairs: Tensor  # with the chosen response longer, shorter
        self.right: Tensor
        self._add_sums("products", size=3)
        self._add_sums("num_pairs", "right", size=2)

    @override
    def update(self, chosen: Tensor, rejected: Tensor, chosen_lengths: Tensor, rejected_lengths: Tensor) -> None:
        """Add pairs: scores and response tokens, [B] each."""
        score = chosen.detach().double() - rejected.detach().double()
        length = (chosen_lengths - rejected_lengths).double()
        kinds = torch.stack([length > 0, length < 0])
        self.products += torch.stack([score * score, length * length, score * length]).sum(1)
        self.num_pairs += kinds.sum(1)
        self.right += torch.where(kinds, _share_where(score > 0, score), 0.0).sum(1)

    @override
    def compute(self) -> dict[str, Tensor]:
        """The four numbers, `nan` where there are no pairs for one, or where scores or lengths never differ."""
        scores, lengths, both = self.products.unbind()
        accuracy = self.right / self.num_pairs
        return {
            "correlation": both / (scores * lengths).sqrt(),
            "accuracy_longer": accuracy[0],
            "accuracy_shorter": accuracy[1],
            "balanced_accuracy": accuracy.mean(),
        }


def _share_where(holds: Tensor, difference: Tensor) -> Tensor:
    """1 or 0, and `nan` where the difference is: a comparison with `nan` is false and would pass for a wrong order."""
    return torch.where(difference.isnan(), torch.nan, holds.double())
