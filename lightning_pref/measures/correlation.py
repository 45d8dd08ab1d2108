"""How two series go together."""

from __future__ import annotations

import torch
from torch import Tensor


def average_ranks(values: Tensor) -> Tensor:
    """Ranks from 0, ties sharing their mean rank, [N] float64.

    >>> average_ranks(torch.tensor([5.0, 1.0, 5.0])).tolist()
    [1.5, 0.0, 1.5]
    """
    ordered = values.sort().values
    below = torch.searchsorted(ordered, values)
    up_to = torch.searchsorted(ordered, values, right=True)
    return (below + up_to - 1).double() / 2


def pearson(x: Tensor, y: Tensor) -> Tensor:
    """Pearson's correlation in float64, []; `nan` where one of the two does not vary.

    >>> round(pearson(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([5.0, 3.0, 1.0])).item(), 3)
    -1.0
    """
    dx, dy = (values.double() - values.double().mean() for values in (x, y))
    return (dx * dy).sum() / (dx.square().sum() * dy.square().sum()).sqrt()


def rank_correlation(first: Tensor, second: Tensor) -> Tensor:
    """Spearman's correlation of two series; `nan` where fewer than two entries are finite, or one series is constant.

    Args:
        first: [N]; entries where either is not finite are left out.
        second: [N].

    >>> rank_correlation(torch.tensor([1.0, 2.0, 9.0]), torch.tensor([3.0, 2.0, 1.0])).item()
    -1.0
    """
    known = first.isfinite() & second.isfinite()
    if int(known.sum()) < 2:
        return torch.tensor(torch.nan, dtype=torch.float64)
    return pearson(average_ranks(first[known]), average_ranks(second[known]))
