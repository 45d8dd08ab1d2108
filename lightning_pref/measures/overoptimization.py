"""What the true reward does while a proxy of it is optimised: by best-of-n sampling, without training anything.

Gao et al. 2022, "Scaling Laws for Reward Model Overoptimization" (arXiv 2210.10760), and Coste et al. 2023 (arXiv 2310.02743).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from lightning_pref.functional.masked import wide

Form = Literal["bon", "rl"]


class GaoFit(NamedTuple):
    """Gold reward above that of the initial policy as a function of d = sqrt(KL): d (alpha - beta d), or with log d for RL.

    Attributes:
        form: `bon` or `rl`.
        alpha: Gain per unit of d at the start.
        beta: How fast it is eaten up.
    """

    form: Form
    alpha: float
    beta: float

    def reward(self, distance: Tensor) -> Tensor:
        """Fitted gain at each distance, float64, shape of `distance`; 0 at 0."""
        coefficients = torch.tensor([self.alpha, self.beta], dtype=torch.float64, device=distance.device)
        return (_regressors(distance.double(), self.form) * coefficients).sum(-1)

    def optimum(self) -> tuple[float, float]:
        """Distance d* of the highest fitted gain, and that gain R*; `inf` both where the curve never turns (beta <= 0).

        >>> GaoFit("bon", alpha=2.0, beta=0.5).optimum()
        (2.0, 2.0)
        """
        if not self.beta > 0:
            return math.inf, math.inf
        if self.form == "bon":
            # With alpha <= 0 it falls from the start, and the start is the best place.
            best = max(self.alpha, 0.0) / (2 * self.beta)
            return best, self.beta * best**2
        best = math.exp(self.alpha / self.beta - 1)
        return best, self.beta * best


def best_of_n(proxy: Tensor, gold: Tensor, n: int) -> Tensor:
    """Expected gold reward of the sample with the highest proxy reward among n, from N scored samples.

    It is the exact mean over all subsets of n samples, and so the unbiased estimate from the N samples at hand: sorted by
    proxy, the sample of rank i is the best of C(i - 1, n - 1) of the C(N, n) subsets. Samples with equal proxy are told apart
    by lot, which comes to the same as giving each the mean gold reward of those it is tied with. n = 1 is the mean of all,
    n = N the gold reward of the best.

    Args:
        proxy: Reward that is optimised, [N].
        gold: Reward that is meant, of the same samples, [N]; `proxy` again gives the proxy's own rise.
        n: Samples to choose from, 1 <= n <= N.

    Returns:
        [], float32 (float64 for float64 rewards), in the unit of `gold`; `nan` where a reward is.

    >>> best_of_n(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([0.0, 6.0, 3.0]), n=2)  # (6 + 3 + 3) / 3
    tensor(4.)
    """
    if proxy.ndim != 1 or proxy.shape != gold.shape:
        raise ValueError(
            f"`proxy` and `gold` are rewards of the same samples, [N], got {list(proxy.shape)} and {list(gold.shape)}."
        )
    num_samples = len(proxy)
    if not 1 <= n <= num_samples:
        raise ValueError(f"`n` must be in 1 ... {num_samples}, the number of scored samples, got {n!r}.")
    order = proxy.argsort(stable=True)
    levelled = _mean_of_ties(proxy[order], gold[order].double())
    estimate = (_weights(num_samples, n, proxy.device) * levelled).sum().masked_fill(proxy.isnan().any(), torch.nan)
    return estimate.to(wide(gold).dtype)


def best_of_n_curve(proxy: Tensor, gold: Tensor, grid: Sequence[int]) -> Tensor:
    """`best_of_n` for each n of a grid, [len(grid)]."""
    return torch.stack([best_of_n(proxy, gold, n) for n in grid])


def kl_of_best_of_n(n: int) -> float:
    """KL of best-of-n sampling to the policy it samples from, in nats: log n - (n - 1) / n.

    An upper bound where responses can repeat.

    >>> round(kl_of_best_of_n(12_500), 2)
    8.43
    """
    if n < 1:
        raise ValueError(f"`n` must be at least 1 sample, got {n!r}.")
    return math.log(n) - (n - 1) / n


def fit_gao(distance: Tensor, gain: Tensor, form: Form) -> GaoFit:
    """Least-squares fit of the gold reward over d = sqrt(KL); linear in alpha and beta.

    Args:
        distance: sqrt(KL), KL in nats, [M], not negative.
        gain: Gold reward less that of the initial policy, [M].
        form: `bon` for best-of-n, d (alpha - beta d); `rl` for a trained policy, d (alpha - beta log d).
    """
    if distance.ndim != 1 or distance.shape != gain.shape:
        raise ValueError(f"`distance` and `gain` are both [M], got {list(distance.shape)} and {list(gain.shape)}.")
    # Nothing but zeros at d = 0: the start says nothing about either coefficient.
    if len(set(distance[distance > 0].tolist())) < 2:
        raise ValueError("A fit of two coefficients needs two different distances above 0.")
    if (distance < 0).any() or not (distance.isfinite().all() and gain.isfinite().all()):
        raise ValueError("`distance` and `gain` must be finite, and `distance` not negative.")
    alpha, beta = torch.linalg.lstsq(_regressors(distance.double(), form), gain.double()[:, None]).solution[:, 0].tolist()
    return GaoFit(form, alpha, beta)


def past_peak(proxy: Tensor, gold: Tensor, *, tolerance: float, window: int = 3) -> bool:
    """Whether the gold reward has passed its peak while the proxy still rises.

    Both are smoothed by the mean over the last `window` measurements: the gold reward lies more than `tolerance` below its
    highest smoothed value, and the proxy is higher than it was there.

    Args:
        proxy: Mean proxy reward by measurement, [M].
        gold: Likewise, [M].
        tolerance: In the unit of `gold`, not negative; above the noise of a mean.
        window: Measurements to smooth over.
    """
    if proxy.ndim != 1 or proxy.shape != gold.shape:
        raise ValueError(f"`proxy` and `gold` are both [M], got {list(proxy.shape)} and {list(gold.shape)}.")
    if tolerance < 0 or window < 1:
        raise ValueError(f"`tolerance` must not be negative and `window` at least 1, got {tolerance!r} and {window!r}.")
    if len(gold) < window:
        return False
    smooth_proxy, smooth_gold = (values.double().unfold(0, window, 1).mean(-1) for values in (proxy, gold))
    peak = int(smooth_gold.argmax())
    return bool((smooth_gold[-1] < smooth_gold[peak] - tolerance) & (smooth_proxy[-1] > smooth_proxy[peak]))


def ensemble_growth(variance: Tensor, first: Tensor) -> Tensor:
    """Mean variance between the members over that of the first measurement, []; `nan` where the members agreed at first.

    Args:
        variance: Variance over the members of each response, any shape.
        first: Likewise at the first measurement.

    >>> ensemble_growth(torch.tensor([3.0, 5.0]), torch.tensor([2.0]))
    tensor(2., dtype=torch.float64)
    """
    start = first.double().mean()
    return (variance.double().mean() / start).masked_fill(start <= 0, torch.nan)


def _regressors(distance: Tensor, form: Form) -> Tensor:
    """(d, -d^2) or (d, -d log d), [..., 2]."""
    if form == "bon":
        return torch.stack([distance, -distance.square()], -1)
    if form == "rl":
        return torch.stack([distance, -torch.xlogy(distance, distance)], -1)
    raise ValueError(f"`form` must be 'bon' or 'rl', got {form!r}.")


def _weights(num_samples: int, n: int, device: torch.device) -> Tensor:
    """C(i - 1, n - 1) / C(N, n) for i = 1 ... N, [N] float64, by w_N = n / N and w_{i-1} = w_i (i - n) / (i - 1)."""
    ranks = torch.arange(num_samples, 1, -1, dtype=torch.float64, device=device)
    # At i = n the factor is 0, so that everything below stays 0. Clamped, since below that it would be negative.
    factors = (ranks - n).clamp(min=0.0) / (ranks - 1)
    first = torch.full((1,), n / num_samples, dtype=torch.float64, device=device)
    return torch.cat([first, factors]).cumprod(0).flip(0)


def _mean_of_ties(ordered: Tensor, values: Tensor) -> Tensor:
    """Each value replaced by the mean over the entries with the same key; keys are sorted."""
    block = torch.cat([ordered.new_zeros(1, dtype=torch.int64), (ordered[1:] != ordered[:-1]).cumsum(0)])
    sums = torch.zeros_like(values).index_add_(0, block, values)
    counts = torch.zeros_like(values).index_add_(0, block, torch.ones_like(values))
    return (sums / counts)[block]
