"""What the true reward does while a proxy of it is optimised: by best-of-n sampling, without training anything.

Gao et al. 2022, "Scaling Laws for Reward Model Overoptimization" (arXiv 2210.10760), and Coste et al. 2023 (arXiv 2310.02743).
"""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_pref.functional.masked import wide


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
