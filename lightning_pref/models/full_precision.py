"""Modules and tables that stay in float32 whatever the model around them is cast to."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
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


@contextmanager
def keeping_tables(module: nn.Module) -> Iterator[None]:
    """Within it, a cast of a module leaves its float32 tables as they are: buffers that are no part of its state.

    Rotary frequencies are such. `from_pretrained` keeps them in float32 whatever the weights; rounded to bfloat16 they would turn
    the thousandth token by as much as a radian wrong, and a model saved after that would be another one when it is loaded.
    """
    before = [
        (part, name, table)
        for part in module.modules()
        for name, table in part.named_buffers(recurse=False)
        if name in part._non_persistent_buffers_set and table.dtype == torch.float32  # noqa: SLF001  # it has no public name
    ]
    yield
    for part, name, table in before:
        now = part.get_buffer(name)
        if now.is_floating_point() and now.dtype.itemsize < table.dtype.itemsize:
            setattr(part, name, table.to(now.device))
