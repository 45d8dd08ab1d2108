"""8-bit AdamW of torchao, ready for every device and for checkpoints that are read with `weights_only=True`.

Imported only where torchao is asked for, since it is an extra.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torchao.optim import AdamW8bit as CompiledAdamW8bit
from torchao.optim.subclass_8bit import OptimState8bit
from typing_extensions import override

SIGNED, DTYPE = "signed", "dtype"
MOMENTS = ("exp_avg", "exp_avg_sq")
HALVES = (torch.bfloat16, torch.float16)


class AdamW8bit(CompiledAdamW8bit):  # type: ignore[misc]  # torchao has no type information
    """AdamW whose moments are kept in 8 bit, block by block; those of tensors below 4096 entries are in float32.

    torchao compiles its update. On a CPU that would need a C++ compiler and a minute for an update of microseconds, so
    there the same arithmetic runs uncompiled. Its moments are tensors of a class of their own, which torch does not
    load from one device to another; in `state_dict` they are dictionaries of plain tensors, apart from split ones (DTensor).
    And it would keep the moments of small tensors in the dtype of the weights: in bfloat16 a mean of squares with the decay rate
    0.999 never falls.
    """

    @override
    def _new_buffer(self, p: Tensor, signed: bool) -> Tensor:
        made: Tensor = super()._new_buffer(p, signed)
        return made.float() if _is_plain(made) and made.dtype in HALVES else made

    @override
    def step(self, closure: Any = None) -> Any:  # Any: as torch declares it
        on_cpu = all(parameter.device.type == "cpu" for group in self.param_groups for parameter in group["params"])
        with torch.compiler.set_stance("force_eager") if on_cpu else nullcontext():
            return super().step(closure)

    @override
    def state_dict(self) -> dict[str, Any]:  # Any: as torch declares it
        return _with_moments(super().state_dict(), _taken_apart)

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:  # Any: as torch declares it
        super().load_state_dict(_with_moments(state_dict, _put_together))
        # Torch has cast them to the dtype of the weights.
        places = (place for group in state_dict["param_groups"] for place in group["params"])
        parameters = (parameter for group in self.param_groups for parameter in group["params"])
        for place, parameter in zip(places, parameters, strict=True):
            saved = state_dict["state"].get(place, {})
            for name in MOMENTS:
                if _is_plain(saved.get(name)) and parameter.dtype in HALVES:
                    self.state[parameter][name] = saved[name].to(parameter.device, torch.float32, copy=True)


def _is_plain(moment: object) -> bool:
    """Whether a moment is an ordinary tensor: not in 8 bit, and not split."""
    return type(moment) is Tensor


def _with_moments(state: Mapping[str, Any], change: Callable[[Any], Any]) -> dict[str, Any]:
    """A copy of an optimiser's state with every value of every parameter changed."""
    by_parameter = {key: {name: change(value) for name, value in own.items()} for key, own in state["state"].items()}
    return {**state, "state": by_parameter}


def _taken_apart(value: Any) -> Any:
    if not isinstance(value, OptimState8bit):
        return value
    return {**{name: getattr(value, name) for name in value.tensor_attrs}, SIGNED: value.signed, DTYPE: value.dtype}


def _put_together(value: Any) -> Any:
    if not (isinstance(value, dict) and SIGNED in value):
        return value
    return OptimState8bit(*(value[name] for name in OptimState8bit.tensor_attrs), value[SIGNED], value[DTYPE])
