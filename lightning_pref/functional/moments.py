"""Number, sum and sum of squares: what a mean and a variance over many ranks are made of, and whitening with them."""

from typing import NamedTuple, Self

import torch
from torch import Tensor

from lightning_pref.functional.masked import wide

# Added to a variance before its root, the value the first RLHF codes used: advantages of a spread far below 1e-4 are noise
# and must not be blown up to unit size.
WHITENING_EPS = 1e-8


def widest(values: Tensor) -> Tensor:
    """The same values in float64, so that sums of squares keep their digits; float32 on Apple's GPUs, which have no more.

    >>> widest(torch.tensor([1.0])).dtype
    torch.float64
    """
    return values.to(torch.float32 if values.device.type == "mps" else torch.float64)


class Moments(NamedTuple):
    """Sums of a set of numbers. Those of all ranks are `Moments(*total(torch.stack(local)))`, with `total` an all-reduce.

    >>> sums = Moments(*torch.stack(moment_sums(torch.tensor([1.0, 3.0])).merged(moment_sums(torch.tensor([5.0])))))
    >>> sums.mean.item(), sums.var().item()
    (3.0, 4.0)
    """

    weight: Tensor  # [], how many there are, or the sum of their weights
    total: Tensor  # []
    squares: Tensor  # []

    @property
    def mean(self) -> Tensor:
        """Mean, [], `nan` of nothing."""
        return self.total / self.weight

    def var(self, correction: int = 1) -> Tensor:
        """Variance, [], with `weight - correction` in the divisor; `nan` where that is not positive."""
        freedom = self.weight - correction
        spread = (self.squares - self.total * self.mean).clamp(min=0.0)
        return torch.where(freedom > 0, spread / freedom, torch.nan)

    def merged(self, other: Self) -> Self:
        """Sums of both sets."""
        return type(self)(self.weight + other.weight, self.total + other.total, self.squares + other.squares)


def moment_sums(values: Tensor, mask: Tensor | None = None, weights: Tensor | None = None) -> Moments:
    """Number, sum and sum of squares of the counted values, in float64 and without gradient.

    Args:
        values: Any shape.
        mask: Same shape, bool, `True` = count; everything if `None`.
        weights: Same shape, how often each value counts; once if `None`. Whoever spreads one number of a response over its
            tokens counts it once per token: weights of 1 / length give every response one vote again.

    >>> sums = moment_sums(torch.tensor([2.0, 4.0, 9.0]), torch.tensor([True, True, False]))
    >>> sums.weight.item(), sums.total.item(), sums.squares.item()
    (2.0, 6.0, 20.0)
    """
    for name, other in (("mask", mask), ("weights", weights)):
        if other is not None and other.shape != values.shape:
            raise ValueError(f"`{name}` must have the shape of the values, {list(values.shape)}; got {list(other.shape)}.")
    exact = widest(values.detach())
    weight = torch.ones_like(exact) if weights is None else widest(weights.detach())
    if mask is not None:
        exact, weight = torch.where(mask, exact, 0.0), torch.where(mask, weight, 0.0)
    return Moments(weight.sum(), (weight * exact).sum(), (weight * exact.square()).sum())


def whiten_with(values: Tensor, sums: Moments, *, shift_mean: bool = True, correction: int = 1) -> Tensor:
    """(x - mean) / sqrt(variance + 1e-8) with the mean and the variance of `sums`.

    Equal numbers, and a single one, become 0 (or stay what they are without `shift_mean`), never `nan`.

    Args:
        values: Any shape.
        sums: Moments of all values that share the mean and the variance, also of those on other ranks.
        shift_mean: Whether the mean goes to 0; otherwise it is put back, as is done with rewards.
        correction: See `Moments.var`. TRL's PPO divided by n - 1, the first RLHF code and OpenRLHF by n.

    >>> values = torch.tensor([1.0, 3.0])
    >>> whiten_with(values, moment_sums(values), correction=0)
    tensor([-1.,  1.])
    """
    mean = torch.where(sums.weight > 0, sums.mean, 0.0)
    scale = (sums.var(correction).nan_to_num(nan=0.0) + WHITENING_EPS).sqrt()
    # A lone number has no variance to be divided by, only a mean to be measured from.
    scale = torch.where(sums.weight > correction, scale, 1.0)
    white = (widest(values) - mean) / scale
    return (white if shift_mean else white + mean).to(wide(values).dtype)


def whiten(
    values: Tensor,
    mask: Tensor | None = None,
    *,
    shift_mean: bool = True,
    sums: Moments | None = None,
    weights: Tensor | None = None,
    correction: int = 1,
) -> Tensor:
    """Give the counted values mean 0 and variance 1; 0 where nothing is counted.

    Args:
        values: Any shape.
        mask: Same shape, bool, `True` = count; everything if `None`.
        shift_mean: See `whiten_with`.
        sums: Moments over all ranks. `None` takes those of `values` alone, which on several ranks is another number.
        weights: Same shape, see `moment_sums`; not together with `sums`, which have their weights in them.
        correction: See `whiten_with`.

    >>> whiten(torch.tensor([1.0, 3.0, 99.0]), torch.tensor([True, True, False]), correction=0)
    tensor([-1.,  1.,  0.])
    """
    if sums is not None and weights is not None:
        raise ValueError("Give `sums` or `weights`, not both: the moments in `sums` are weighted already.")
    white = whiten_with(
        values,
        moment_sums(values, mask, weights) if sums is None else sums,
        shift_mean=shift_mean,
        correction=correction,
    )
    return white if mask is None else torch.where(mask, white, 0.0)


class RunningMoments(NamedTuple):
    """Mean and spread of everything seen so far. Three tensors, made to be kept as buffers and to travel in a checkpoint.

    >>> seen = RunningMoments.empty().updated(moment_sums(torch.tensor([1.0, 3.0]))).updated(moment_sums(torch.tensor([5.0])))
    >>> seen.mean.item(), seen.std.item()
    (3.0, 2.0)
    """

    mean: Tensor  # []
    squared_deviations: Tensor  # [], summed
    num_seen: Tensor  # []

    @classmethod
    def empty(cls, device: torch.device | str | None = None) -> Self:
        """Nothing seen: mean 0, standard deviation 1."""
        zero = widest(torch.zeros((), device=device))
        return cls(zero, zero, zero)

    @property
    def std(self) -> Tensor:
        """Unbiased standard deviation, []; 1 while fewer than two numbers, or only equal ones, have been seen."""
        variance = self.squared_deviations / (self.num_seen - 1)
        return torch.where((self.num_seen > 1) & (variance > 0), variance, 1.0).sqrt()

    def updated(self, sums: Moments) -> Self:
        """The moments with those numbers added; nothing is kept of an update that is not finite.

        All-reduce `sums` first, so that every rank keeps the same.
        """
        count = sums.weight.clamp(min=1.0)
        new_mean = sums.total / count
        new_deviations = (sums.squares - sums.total * new_mean).clamp(min=0.0)
        seen = self.num_seen + sums.weight
        step = new_mean - self.mean
        share = sums.weight / seen.clamp(min=1.0)
        mean = self.mean + step * share
        deviations = self.squared_deviations + new_deviations + step.square() * self.num_seen * share
        is_sound = (sums.weight > 0) & mean.isfinite() & deviations.isfinite()
        return type(self)(
            torch.where(is_sound, mean, self.mean),
            torch.where(is_sound, deviations, self.squared_deviations),
            torch.where(is_sound, seen, self.num_seen),
        )

    def normalized(self, values: Tensor, *, shift_mean: bool = True) -> Tensor:
        """(x - mean) / std, or x / std, of any shape, in float32 or better."""
        centered = widest(values) - self.mean if shift_mean else widest(values)
        return (centered / self.std).to(wide(values).dtype)
