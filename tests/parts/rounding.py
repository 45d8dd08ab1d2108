"""Finds lines of the package whose numbers are 16 bits wide although nothing they were made of is."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from typing_extensions import override

import lightning_pref

PACKAGE = Path(lightning_pref.__file__).parent
TORCH = Path(torch.__file__).parent
HALVES = (torch.bfloat16, torch.float16)
# They say themselves what dtype they want.
CASTS = ("to", "type", "bfloat16", "half", "copy_", "_to_copy")


def _tensors(values: object) -> Iterable[Tensor]:
    return (value for value in pytree.tree_leaves(values) if isinstance(value, Tensor))


class NarrowLines(TorchFunctionMode):
    """Keeps, while it is active, the lines of this package that make 16-bit numbers of anything else.

    Lightning's half-precision plugins make bfloat16 the default while a step runs: a new tensor without a dtype is in it, and so
    is the quotient of two integers. Autocast casts products of float32 matrices.
    """

    def __init__(self) -> None:
        super().__init__()
        self.lines: set[str] = set()

    @override
    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        narrow = any(tensor.dtype in HALVES for tensor in _tensors(result))
        if narrow and not any(tensor.dtype in HALVES for tensor in _tensors((args, kwargs))):
            asked = "dtype" in (kwargs or {}) or getattr(func, "__name__", "") in CASTS
            frame = sys._getframe(1)
            while frame.f_back is not None and Path(frame.f_code.co_filename).is_relative_to(TORCH):
                frame = frame.f_back
            path = Path(frame.f_code.co_filename)
            if not asked and path.is_relative_to(PACKAGE):
                self.lines.add(f"{path.relative_to(PACKAGE)}:{frame.f_lineno} {getattr(func, '__name__', func)}")
        return result
