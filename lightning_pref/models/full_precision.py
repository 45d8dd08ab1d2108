"""Modules that stay in float32 whatever the model around them is cast to."""

from __future__ import annotations

from collections.abc import Callable
from typing import Self

import torch
from torch import Tensor, nn
from typing_extensions import override


class FullPrecision(nn.Module):
    """Parameters in float32 or better, whatever the model around them is cast to.

    A score is a sum over thousands of products, and differences of scores are what is trained: bfloat16 would keep two or
    three digits of them, and lose most updates of a weight.
    """

    @override
    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        def cast(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            if not moved.is_floating_point():
                return moved
            return tensor.to(moved.device, torch.promote_types(moved.dtype, torch.float32))

        return super()._apply(cast, recurse)  # type: ignore[no-untyped-call, no-any-return]
