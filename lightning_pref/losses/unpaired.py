"""Losses of single responses that are labelled desirable or not. N responses, one loss each."""

from typing import NamedTuple, Self

import torch
from torch import Tensor

from lightning_pref.functional import wide
from lightning_pref.losses import links


def kto(
    logps: Tensor,
    ref_logps: Tensor,
    desirable: Tensor,
    *,
    baseline: float | Tensor,
    beta: float = 0.1,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> Tensor:
    """KTO (arXiv:2402.01306, eq. 7): how far each log-ratio is on the right side of the baseline, saturating.

    Args:
        logps: Summed log-probabilities, [N].
        ref_logps: Same under the reference, [N].
        desirable: [N], bool.
        baseline: The policy's typical log-ratio in nats, not yet times beta: `kto_baseline`. One number for all ranks.
        beta: Positive.
        desirable_weight: lambda_D. Keep (lambda_D * desirable rows) / (lambda_U * undesirable rows) in [1, 4/3].
        undesirable_weight: lambda_U.

    >>> two, labels = torch.zeros(2), torch.tensor([True, False])
    >>> kto(two, two, labels, baseline=0.0)
    tensor([0.5000, 0.5000])
    """
    above = beta * (_log_ratio(logps, ref_logps, desirable) - baseline)
    return torch.where(desirable, desirable_weight * torch.sigmoid(-above), undesirable_weight * torch.sigmoid(above))


def kto_baseline(log_ratio_sum: Tensor, count: Tensor | int) -> Tensor:
    """Baseline of `kto`: mean log-ratio of prompts with unrelated responses, at least 0, without gradient.

    It is the average over **all** ranks: give it sums and counts that have been all-reduced, so that every rank uses the
    same number (`GroupBatch.mismatched` makes the unrelated pairs).

    Args:
        log_ratio_sum: Sum of S - R over the unrelated pairs, [].
        count: How many there are.

    >>> kto_baseline(torch.tensor(6.0), 4), kto_baseline(torch.tensor(-6.0), 4)
    (tensor(1.5000), tensor(0.))
    """
    return (log_ratio_sum.detach() / count).clamp(min=0.0)


def bco(logps: Tensor, ref_logps: Tensor, desirable: Tensor, *, beta: float = 0.01, delta: float | Tensor = 0.0) -> Tensor:
    """BCO (arXiv:2404.04656): a binary classifier whose logit is the reward less `delta`.

    Args:
        logps: Summed log-probabilities, [N].
        ref_logps: Same under the reference, [N].
        desirable: [N], bool.
        beta: Positive.
        delta: Reward at which a response is as likely good as bad: a `RunningMean` of beta * (S - R) over both classes.

    >>> bco(torch.zeros(2), torch.zeros(2), torch.tensor([True, False]))
    tensor([0.6931, 0.6931])
    """
    above = beta * _log_ratio(logps, ref_logps, desirable) - delta
    return links.logistic(torch.where(desirable, above, -above))


def apo_zero_unpaired(logps: Tensor, ref_logps: Tensor, desirable: Tensor, *, beta: float = 0.1) -> Tensor:
    """APO-zero of single responses (arXiv:2408.06266): KTO with its baseline fixed at 0. Shapes as in `kto`.

    >>> apo_zero_unpaired(torch.zeros(2), torch.zeros(2), torch.tensor([True, False]))
    tensor([0.5000, 0.5000])
    """
    return kto(logps, ref_logps, desirable, baseline=0.0, beta=beta)


class RunningMean(NamedTuple):
    """Mean of everything seen so far. Two tensors, made to be kept as buffers and to travel in a checkpoint.

    >>> RunningMean.empty().updated(torch.tensor(6.0), torch.tensor(3.0)).updated(torch.tensor(0.0), torch.tensor(1.0)).mean
    tensor(1.5000)
    """

    mean: Tensor  # []
    num_seen: Tensor  # []

    @classmethod
    def empty(cls) -> Self:
        return cls(torch.zeros((), dtype=torch.float32), torch.zeros((), dtype=torch.float32))

    def updated(self, total: Tensor, count: Tensor) -> Self:
        """The mean with `count` more values that add up to `total`; all-reduce both first. Nothing seen leaves it as is."""
        seen = self.num_seen + count
        return type(self)(self.mean + (total.detach() - count * self.mean) / seen.clamp(min=1.0), seen)


def _log_ratio(logps: Tensor, ref_logps: Tensor, desirable: Tensor) -> Tensor:
    if not logps.ndim == 1 or not logps.shape == ref_logps.shape == desirable.shape or desirable.dtype != torch.bool:
        raise ValueError(
            "An unpaired loss needs `logps`, `ref_logps` and a bool `desirable`, all [N]; got "
            f"{list(logps.shape)}, {list(ref_logps.shape)} and {desirable.dtype} {list(desirable.shape)}."
        )
    return wide(logps) - wide(ref_logps.detach())
