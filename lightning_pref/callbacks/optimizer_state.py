"""One view of the momentum that optimisers keep: read the second moment, reset either moment, restart the bias correction.

Every tensor here is the part that this process holds, so that sharded state (DTensor, FSDP) needs no communication.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import SGD, Adam, Adamax, NAdam, Optimizer, RAdam, RMSprop
from typing_extensions import override

Group = dict[str, Any]  # Any: options of the optimiser's own

SUPPORTED = (
    "Adam, AdamW, NAdam, RAdam, Adamax, RMSprop and SGD with momentum of torch; "
    "Adam and AdamW of bitsandbytes in 8 and 32 bit, paged or not, and of torchao in 8 bit"
)

# Why an optimiser is refused, and what comes nearest, by the first letters of its class name.
REFUSED: Mapping[str, tuple[str, str]] = {
    "Adagrad": ("its sum of squares is its learning-rate schedule, which a reset would undo", "torch.optim.RMSprop"),
    "Adadelta": ("its mean of past updates, reset to zero, would stop training", "torch.optim.RMSprop"),
    "Adafactor": ("it keeps means of rows and columns, not a second moment of each coordinate", "torch.optim.AdamW"),
    "AdEMAMix": ("its second, slow momentum has no counterpart in a fresh run's schedule", "AdamW8bit of bitsandbytes"),
    "DeepSpeed": ("the engine keeps moments in partitions of its own", "torch.optim.AdamW with the strategy 'fsdp'"),
    "LAMB": ("it scales updates by layer after the moments", "AdamW8bit of bitsandbytes"),
    "LBFGS": ("it keeps past gradients, not moments", "torch.optim.AdamW"),
    "Lion": ("it keeps no second moment, and its steps have one size whatever the gradient", "torch.optim.AdamW"),
    "SGD": ("without momentum it keeps nothing that a spike could spoil", "torch.optim.SGD with `momentum`"),
    "SparseAdam": ("it keeps moments of touched rows only", "torch.optim.AdamW"),
}
# Those of torch-optimi have names that torch's have, too.
REFUSED_OPTIMI = (
    "it counts updates by group, skipped ones included, so that no reset could set its bias correction right",
    "torch.optim.AdamW",
)


def local(tensor: Tensor) -> Tensor:
    """The part of a tensor that this process holds, sharing its memory; call it under `no_grad`."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def copied(tensor: Tensor, device: torch.device | str) -> Tensor:
    """A copy on a device that shares no memory; also of a tensor that is made of others, which torchao's cannot clone."""
    if not hasattr(tensor, "__tensor_flatten__"):
        return tensor.detach().to(device, copy=True)
    parts, context = tensor.__tensor_flatten__()
    copies = {name: copied(getattr(tensor, name), device) for name in parts}
    made: Tensor = type(tensor).__tensor_unflatten__(copies, context, tensor.shape, tensor.stride())  # type: ignore[attr-defined]
    return made


class MomentumState(ABC):
    """The moments of one optimiser.

    Args:
        optimizer: The optimiser; its state may not exist yet.
    """

    keeps_squares: bool  # a running mean of squared gradients, which SPAM's rule needs
    corrects_bias: bool

    def __init__(self, optimizer: Optimizer) -> None:
        self.optimizer = optimizer

    @abstractmethod
    def decouples_decay(self, group: Group) -> bool:
        """Whether weight decay acts on the weights (times the learning rate) and not on the gradient."""

    @abstractmethod
    def betas(self, group: Group) -> tuple[float, float]:
        """Decay rates of the two moments; 0 for one that is not kept or not a mean."""

    @abstractmethod
    def squares(self, parameter: Tensor) -> Tensor | None:
        """Running mean of squared gradients, local and in floating point; `None` before the first update."""

    @abstractmethod
    def reset_state(self, state: dict[str, Any], group: Group, *, first: bool, second: bool, restart: bool) -> None:
        """Make moments of one parameter as they are before the first update."""

    @torch.no_grad()
    def reset(self, *, first: bool, second: bool, restart: bool) -> None:
        """Make moments of all parameters as they are before the first update.

        Args:
            first: The mean of gradients.
            second: The mean of squares, with what is derived from it (the maximum of AMSGrad).
            restart: The counters of the bias correction.
        """
        for group, parameter in self.parameters():
            state = self.state(parameter)
            if state:
                self.reset_state(state, group, first=first, second=second, restart=restart)

    def parameters(self) -> Iterator[tuple[Group, Tensor]]:
        """Every parameter with its group."""
        for group in self.optimizer.param_groups:
            for parameter in group["params"]:
                yield group, parameter

    def state(self, parameter: Tensor) -> dict[str, Any]:
        """State of a parameter; empty before its first update, and not created by asking."""
        found: dict[str, Any] = self.optimizer.state.get(parameter, {})
        return found

    def corrected_squares(self, parameter: Tensor, group: Group) -> Tensor | None:
        """The mean of squares over what the optimiser's own counter says went into it, free of bias towards 0."""
        squares = self.squares(parameter)
        decay = self.betas(group)[1]
        if squares is None or decay == 0.0:
            return squares
        count: Tensor | int = self.state(parameter)["step"]
        if not isinstance(count, Tensor):
            return squares / -math.expm1(count * math.log(decay))
        # 1 - decay^count, without losing its digits to a small count; a counter on the device is not asked for its value.
        return squares / -torch.expm1(local(count).to(squares.dtype) * math.log(decay))


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Where an optimiser of torch keeps its moments.

    Attributes:
        first: Keys of the first moment.
        second: Keys of the second moment and what is derived from it.
        squares: Key of the running mean of squared gradients.
        counters: Keys of the bias correction, with their values before the first update.
    """

    first: tuple[str, ...]
    second: tuple[str, ...] = ()
    squares: str | None = None
    counters: Mapping[str, float] = field(default_factory=dict)


_ADAM = Layout(first=("exp_avg",), second=("exp_avg_sq", "max_exp_avg_sq"), squares="exp_avg_sq", counters={"step": 0.0})

LAYOUTS: Mapping[type[Optimizer], Layout] = {
    Adam: _ADAM,  # and AdamW
    NAdam: Layout(first=("exp_avg",), second=("exp_avg_sq",), squares="exp_avg_sq", counters={"step": 0.0, "mu_product": 1.0}),
    RAdam: _ADAM,
    Adamax: Layout(first=("exp_avg",), second=("exp_inf",), counters={"step": 0.0}),
    # The mean gradient of the centered variant belongs to the second moment: the variance is their difference.
    RMSprop: Layout(first=("momentum_buffer",), second=("square_avg", "grad_avg"), squares="square_avg"),
    SGD: Layout(first=("momentum_buffer",)),
}


class TorchMomentum(MomentumState):
    """The moments of an optimiser of torch, one tensor per parameter: single-tensor, foreach, fused or capturable."""

    def __init__(self, optimizer: Optimizer, layout: Layout) -> None:
        super().__init__(optimizer)
        self.layout = layout
        self.keeps_squares = layout.squares is not None
        self.corrects_bias = bool(layout.counters)

    @override
    def decouples_decay(self, group: Group) -> bool:
        return bool(group.get("decoupled_weight_decay", False))

    @override
    def betas(self, group: Group) -> tuple[float, float]:
        if "alpha" in group:
            return 0.0, float(group["alpha"])
        if "betas" not in group:
            return float(group["momentum"]), 0.0
        first, second = group["betas"]
        return float(first), float(second) if self.keeps_squares else 0.0

    @override
    def squares(self, parameter: Tensor) -> Tensor | None:
        found = self.state(parameter).get(self.layout.squares or "")
        return None if found is None else local(found)

    @override
    def reset_state(self, state: dict[str, Any], group: Group, *, first: bool, second: bool, restart: bool) -> None:
        keys = (self.layout.first if first else ()) + (self.layout.second if second else ())
        for key in keys:
            if state.get(key) is None:
                continue
            if group.get("dampening"):
                state[key] = None  # SGD's first gradient enters its buffer undamped, which zeros would not tell
            else:
                local(state[key]).zero_()
        for key, value in self.layout.counters.items() if restart else ():
            if isinstance(state[key], Tensor):
                local(state[key]).fill_(value)
            else:
                state[key] = value


class BitsandbytesMomentum(MomentumState):
    """The moments of bitsandbytes' Adam: 8-bit codes with a scale per block, or float32 where a tensor is small."""

    keeps_squares = True
    corrects_bias = True

    @override
    def decouples_decay(self, group: Group) -> bool:
        return True  # in Adam as in AdamW

    @override
    def betas(self, group: Group) -> tuple[float, float]:
        return float(group["betas"][0]), float(group["betas"][1])

    @override
    def squares(self, parameter: Tensor) -> Tensor | None:
        state = self.state(parameter)
        if not state:
            return None
        codes: Tensor = state["state2"]
        if codes.dtype != torch.uint8:
            return codes
        _refuse_unblocked(state)
        return dequantized(codes.to(parameter.device), state["qmap2"], state["absmax2"])

    @override
    def reset_state(self, state: dict[str, Any], group: Group, *, first: bool, second: bool, restart: bool) -> None:
        for number in (["1"] if first else []) + (["2"] if second else []):
            values: Tensor = state["state" + number]
            if values.dtype != torch.uint8:
                values.zero_()
                continue
            _refuse_unblocked(state)
            # Code 0 of the signed map stands for almost -1: zeroed codes would be a large momentum as soon as a scale returns.
            values.fill_(zero_code(state["qmap" + number]).to(values.device))
            state["absmax" + number].zero_()
        if restart:
            state["step"] = 0


class TorchaoMomentum(MomentumState):
    """The moments of torchao's Adam: codes with a scale per block, in a tensor of its own, or plain where a tensor is small."""

    keeps_squares = True
    corrects_bias = True

    @override
    def decouples_decay(self, group: Group) -> bool:
        return bool(self.optimizer.is_adamw)  # type: ignore[attr-defined]  # of torchao's base class

    @override
    def betas(self, group: Group) -> tuple[float, float]:
        return float(group["betas"][0]), float(group["betas"][1])

    @override
    def squares(self, parameter: Tensor) -> Tensor | None:
        found = self.state(parameter).get("exp_avg_sq")
        if found is None:
            return None
        held: Any = local(found)  # Any: torchao's tensor has parts
        return dequantized(held.codes, held.qmap, held.scale) if hasattr(held, "codes") else held.float()

    @override
    def reset_state(self, state: dict[str, Any], group: Group, *, first: bool, second: bool, restart: bool) -> None:
        keys = (["exp_avg"] if first else []) + (["exp_avg_sq", "max_exp_avg_sq"] if second else [])
        for key in [key for key in keys if key in state]:
            held: Any = local(state[key])  # Any: torchao's tensor has parts
            if not hasattr(held, "codes"):
                held.zero_()
                continue
            held.codes.fill_(zero_code(held.qmap))
            held.scale.zero_()
        if restart:
            state["step"].zero_()


def zero_code(qmap: Tensor) -> Tensor:
    """The code that stands for 0, [] uint8.

    Args:
        qmap: Values of the 256 codes, [256].
    """
    return qmap.abs().argmin().to(torch.uint8)


def dequantized(codes: Tensor, qmap: Tensor, absmax: Tensor) -> Tensor:
    """Values of blockwise quantised codes.

    Args:
        codes: Any shape, uint8.
        qmap: Values of the 256 codes, [256], in [-1, 1].
        absmax: Scale of each block of consecutive codes, [number of blocks].

    Returns:
        Values, shape of the codes.
    """
    block = 1
    while -(-codes.numel() // block) > len(absmax):
        block *= 2
    scales = absmax.repeat_interleave(block)[: codes.numel()]
    return (qmap[codes.flatten().int()] * scales).view(codes.shape)


def _refuse_unblocked(state: Mapping[str, Any]) -> None:
    if "absmax1" not in state:
        raise ValueError(
            "The 8-bit optimiser state has no scale per block (`absmax1`): it comes from a bitsandbytes without blockwise "
            "quantisation. Install bitsandbytes >= 0.48 and start the optimiser afresh."
        )


def is_bitsandbytes(optimizer: object) -> bool:
    """Whether an optimiser is one of bitsandbytes; said without importing it."""
    return _comes_from("bitsandbytes.", optimizer)


def _comes_from(package: str, optimizer: object) -> bool:
    return any(kind.__module__.startswith(package) for kind in type(optimizer).__mro__)


def momentum_state(optimizer: object, *, asked_by: str = "SpikeAwareOptimizerReset") -> MomentumState:
    """The view of an optimiser's moments; raises where none is known.

    Args:
        optimizer: Any optimiser.
        asked_by: Who needs it, for the message.
    """
    if isinstance(optimizer, Optimizer):
        if is_bitsandbytes(optimizer) and getattr(optimizer, "optimizer_name", None) == "adam":
            return BitsandbytesMomentum(optimizer)
        if _comes_from("torchao.optim.adam", optimizer) and type(optimizer).__name__ in ("Adam8bit", "AdamW8bit"):
            return TorchaoMomentum(optimizer)
        layout = next((layout for kind, layout in LAYOUTS.items() if isinstance(optimizer, kind)), None)
        has_momentum = not isinstance(optimizer, SGD) or all(group["momentum"] for group in optimizer.param_groups)
        if layout is not None and has_momentum:
            return TorchMomentum(optimizer, layout)
    name = type(optimizer).__name__
    why, nearest = next(
        (reason for start, reason in REFUSED.items() if name.removeprefix("Paged").startswith(start)),
        REFUSED_OPTIMI if _comes_from("optimi.", optimizer) else ("how it keeps its momentum is not known", "torch.optim.AdamW"),
    )
    raise ValueError(
        f"{asked_by} cannot reset {type(optimizer).__module__}.{name}: {why}. It supports {SUPPORTED}. "
        f"The nearest of these is {nearest}."
    )
