"""Updates that the rounding of low-precision weights swallows: the step is smaller than half the distance to the next number.

bfloat16 has 8 bits of precision: between 1 and 2 its numbers are 1/128 apart, so that a weight of 1 does not feel a step below
1/256 upwards or 1/512 downwards. Adam's steps are about as large as the learning rate, whatever the gradient.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Integers of as many bytes as the numbers have.
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
# 2^32 divided by the golden ratio: multiples of it, modulo 2^32, fill the range more evenly than chance would, however many
# are taken, and share no period with the rows of a matrix.
_GOLDEN = 2_654_435_769
# So that place times size stays within 64 bits; a tensor beyond it is sampled in its first part.
_MAX_SIZE = 2**31 - 1


def is_lost(before: Tensor, after: Tensor, gradients: Tensor) -> Tensor:
    """Which elements a step left as they were, bit for bit, although their gradient is not zero.

    Args:
        before: Weights before the step, any shape and floating type.
        after: The same weights after it.
        gradients: What the step was made with, of the same shape; of any scale.

    Returns:
        Same shape, bool.

    >>> weights = torch.tensor([1.0, 1.0, 1.0], dtype=torch.bfloat16)
    >>> is_lost(weights, weights - torch.tensor([1e-3, 1e-2, 0.0]).bfloat16(), torch.tensor([1.0, 1.0, 0.0]))
    tensor([ True, False, False])
    """
    bits = _BITS[before.element_size()]
    return (before.view(bits) == after.view(bits)) & (gradients != 0)


def lost_share(before: Tensor, after: Tensor, gradients: Tensor) -> Tensor:
    """Share of the elements with a gradient that a step left as they were; `nan` where no element has one.

    Shapes as in `is_lost`.

    >>> weights = torch.tensor([1.0, 1.0, 1.0], dtype=torch.bfloat16)
    >>> lost_share(weights, weights - torch.tensor([1e-3, 1e-2, 0.0]).bfloat16(), torch.tensor([1.0, 1.0, 0.0]))
    tensor(0.5000)
    """
    return is_lost(before, after, gradients).sum(dtype=torch.float32) / (gradients != 0).sum(dtype=torch.float32)


def sample_places(num_elements: int, max_places: int) -> Tensor:
    """Places in a flat tensor, spread over all of it: every element of a small one, else `max_places` of them.

    They depend on the two numbers alone, so that the same elements are looked at in every run, and draw no random numbers.

    Args:
        num_elements: Size of the tensor, >= 1.
        max_places: Upper bound of places, >= 1.

    Returns:
        [min(num_elements, max_places)], int64, on the CPU.

    >>> sample_places(4, 8)
    tensor([0, 1, 2, 3])
    >>> sample_places(100, 3)
    tensor([ 0, 61, 23])
    """
    if num_elements <= max_places:
        return torch.arange(num_elements, dtype=torch.int64)
    spread = torch.arange(max_places, dtype=torch.int64) * _GOLDEN % 2**32
    return spread * min(num_elements, _MAX_SIZE) // 2**32
