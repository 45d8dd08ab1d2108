"""Looking in on somebody else's objects for a while: a method of one of them, and what models return."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn


@contextmanager
def replaced(owner: object, name: str, by: Callable[..., Any]) -> Iterator[None]:
    """Call `by(original, ...)` wherever a method of this one object is called; afterwards it is as it was."""
    original, own = getattr(owner, name), vars(owner).get(name)
    setattr(owner, name, functools.update_wrapper(functools.partial(by, original), original))
    try:
        yield
    finally:
        if own is None:
            delattr(owner, name)
        else:
            setattr(owner, name, own)


@contextmanager
def forwards_of(models: Sequence[nn.Module]) -> Iterator[list[Any]]:
    """What the models return, in order."""
    outputs: list[Any] = []

    def keep(_module: nn.Module, _args: object, output: Any) -> None:
        outputs.append(output)

    handles = [model.register_forward_hook(keep) for model in {id(model): model for model in models}.values()]
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()
