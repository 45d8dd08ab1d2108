"""Sums, means and variances over the elements a mask counts.

One rule for all: what is not counted has no influence, not even where it is `nan` or infinite, and gets a zero gradient.
Half-precision values are added up in float32; float64 stays float64.
"""

from typing import Literal

import torch
from torch import Tensor

Aggregation = Literal["token_mean", "sequence_mean", "sequence_sum"]


def wide(values: Tensor) -> Tensor:
    """The same values in a type fit for adding many of them up: float64 stays, everything else becomes float32.

    >>> wide(torch.tensor([1, 2], dtype=torch.bfloat16)).dtype
    torch.float32
    """
    return values if values.dtype in (torch.float32, torch.float64) else values.float()


def masked_sum(values: Tensor, mask: Tensor, dim: int | None = None) -> Tensor:
    """Sum of the counted elements; 0 where none is counted.

    Args:
        values: Any shape.
        mask: Same shape, bool, `True` = count.
        dim: Dimension to reduce; all of them if `None`.

    >>> masked_sum(torch.tensor([1.0, 2.0, float("nan")]), torch.tensor([True, True, False]))
    tensor(3.)
    """
    _check_mask(values, mask)
    # Not `values * mask`: a banned token has log-probability -inf, and -inf * 0 is nan.
    return torch.where(mask, wide(values), 0.0).sum(dim)


def masked_mean(values: Tensor, mask: Tensor, dim: int | None = None) -> Tensor:
    """Mean of the counted elements; `nan` where none is counted, since a mean of nothing is not zero.

    Shapes as in `masked_sum`.

    >>> masked_mean(torch.tensor([[1.0, 3.0], [5.0, 7.0]]), torch.tensor([[True, True], [True, False]]), dim=1)
    tensor([2., 5.])
    """
    total = masked_sum(values, mask, dim)
    return total / mask.sum(dim)


def masked_var(values: Tensor, mask: Tensor, dim: int | None = None, *, correction: int = 1) -> Tensor:
    """Variance of the counted elements, in two passes; `nan` where no more than `correction` are counted.

    Args:
        values: Any shape.
        mask: Same shape, bool, `True` = count.
        dim: Dimension to reduce; all of them if `None`.
        correction: Subtracted from the count in the divisor: 1 is unbiased, 0 is the population's variance.

    >>> masked_var(torch.tensor([1.0, 3.0, 100.0]), torch.tensor([True, True, False]))
    tensor(2.)
    """
    mean = masked_mean(values, mask, dim)
    # Masked before they are squared: the derivative of an infinite square is nan even where the square is not used.
    deviations = torch.where(mask, wide(values) - (mean if dim is None else mean.unsqueeze(dim)), 0.0)
    freedom = mask.sum(dim) - correction
    return torch.where(freedom > 0, deviations.square().sum(dim) / freedom, torch.nan)


def aggregate(values: Tensor, mask: Tensor, how: Aggregation) -> Tensor:
    """One loss from per-token losses; a sequence without counted tokens is left out, and nothing at all gives 0.

    Args:
        values: Loss of each token, [B, T].
        mask: Tokens that count, [B, T], bool.
        how: `token_mean` weighs every token alike, `sequence_mean` every sequence (mean over its tokens, then over
            sequences), `sequence_sum` adds up the tokens of a sequence and takes the mean over sequences.

    >>> losses, mask = torch.tensor([[1.0, 3.0], [6.0, 0.0]]), torch.tensor([[True, True], [True, False]])
    >>> [aggregate(losses, mask, how).item() for how in ("sequence_mean", "sequence_sum")]
    [4.0, 5.0]
    """
    counts = mask.sum(-1)
    sums = masked_sum(values, mask, -1)
    if how == "token_mean":
        return sums.sum() / counts.sum().clamp(min=1)
    if how == "sequence_mean":
        sums = sums / counts.clamp(min=1)
    elif how != "sequence_sum":
        raise ValueError(f"`how` must be 'token_mean', 'sequence_mean' or 'sequence_sum', got {how!r}.")
    return sums.sum() / (counts > 0).sum().clamp(min=1)


def segment_sum(values: Tensor, segment: Tensor, num_segments: int) -> Tensor:
    """Sum of the values of each segment; 0 for a segment without values.

    Args:
        values: [N].
        segment: Index of the segment each value belongs to, [N], int64, in any order.
        num_segments: Segments of the result.

    Returns:
        [num_segments], float32 (float64 for float64 values).

    >>> segment_sum(torch.tensor([1.0, 2.0, 4.0]), torch.tensor([0, 2, 0]), 3)
    tensor([5., 0., 2.])
    """
    if values.ndim != 1 or values.shape != segment.shape:
        raise ValueError(f"`values` and `segment` must both be [N], got {list(values.shape)} and {list(segment.shape)}.")
    values = wide(values)
    # Added one after the other, thousands of float32 terms lose digits, and on a GPU their order changes from run to run.
    # In float64 neither is seen after rounding to float32. Apple's GPUs have no float64.
    total_dtype = torch.float32 if values.device.type == "mps" else torch.float64
    totals = torch.zeros(num_segments, dtype=total_dtype, device=values.device)
    return totals.index_add(0, segment, values.to(total_dtype)).to(values.dtype)


def _check_mask(values: Tensor, mask: Tensor) -> None:
    if mask.dtype != torch.bool or mask.shape != values.shape:
        raise ValueError(
            f"`mask` must be bool and have the shape of what it masks, {list(values.shape)}; "
            f"got {mask.dtype} of shape {list(mask.shape)}."
        )
