"""Every optimiser whose moments can be reset, by name, and what trains two tensors with one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

try:
    import bitsandbytes as bnb
except ImportError:
    bnb = None
try:
    from lightning_pref.modules.torchao_adamw import AdamW8bit as TorchaoAdamW8bit
except ImportError:
    TorchaoAdamW8bit = None
try:
    import optimi
except ImportError:
    optimi = None

Make = Callable[[Any], Optimizer]
optim = torch.optim

TORCH: dict[str, Make] = {
    "Adam": lambda p: optim.Adam(p, lr=0.01),
    "AdamW": lambda p: optim.AdamW(p, lr=0.01, weight_decay=0.1),
    "AdamW single-tensor": lambda p: optim.AdamW(p, lr=0.01, foreach=False),
    "AdamW foreach": lambda p: optim.AdamW(p, lr=0.01, foreach=True),
    "AdamW fused": lambda p: optim.AdamW(p, lr=0.01, fused=True),
    "AdamW amsgrad": lambda p: optim.AdamW(p, lr=0.01, amsgrad=True),
    "AdamW amsgrad fused": lambda p: optim.AdamW(p, lr=0.01, amsgrad=True, fused=True),
    "AdamW tensor lr": lambda p: optim.AdamW(p, lr=torch.tensor(0.01), foreach=False),
    "Adam decoupled": lambda p: optim.Adam(p, lr=0.01, weight_decay=0.1, decoupled_weight_decay=True),
    "NAdam": lambda p: optim.NAdam(p, lr=0.01),
    "NAdam foreach": lambda p: optim.NAdam(p, lr=0.01, foreach=True),
    "RAdam": lambda p: optim.RAdam(p, lr=0.01),
    "Adamax": lambda p: optim.Adamax(p, lr=0.01),
    "RMSprop": lambda p: optim.RMSprop(p, lr=0.01, momentum=0.9, centered=True),
    "SGD": lambda p: optim.SGD(p, lr=0.01, momentum=0.9),
    "SGD dampened": lambda p: optim.SGD(p, lr=0.01, momentum=0.9, dampening=0.5),
    "SGD nesterov fused": lambda p: optim.SGD(p, lr=0.01, momentum=0.9, nesterov=True, fused=True),
}
needs_bnb = pytest.mark.skipif(bnb is None, reason="the extra 'bnb' is not installed")
BNB: dict[str, Make] = {
    "bnb Adam8bit": lambda p: bnb.optim.Adam8bit(p, lr=0.01),
    "bnb AdamW8bit": lambda p: bnb.optim.AdamW8bit(p, lr=0.01, weight_decay=0.1),
    "bnb PagedAdamW8bit": lambda p: bnb.optim.PagedAdamW8bit(p, lr=0.01),
    "bnb AdamW 32 bit": lambda p: bnb.optim.AdamW(p, lr=0.01),
}
needs_torchao = pytest.mark.skipif(TorchaoAdamW8bit is None, reason="the extra 'torchao' is not installed")
TORCHAO: dict[str, Make] = {
    "torchao AdamW8bit": lambda p: TorchaoAdamW8bit(p, lr=0.01, weight_decay=0.1),
}
needs_optimi = pytest.mark.skipif(optimi is None, reason="the extra 'optimi' is not installed")
EVERY = {**TORCH, **BNB, **TORCHAO}
MARKS = {**dict.fromkeys(BNB, needs_bnb), **dict.fromkeys(TORCHAO, needs_torchao)}


def optimizers(*without: str) -> list[Any]:
    """Names of all optimisers but those that begin with some words."""
    return only(*[name for name in EVERY if not name.startswith(without)] if without else EVERY)


def only(*names: str) -> list[Any]:
    """Names of optimisers, each skipped where its package is missing."""
    return [pytest.param(name, marks=MARKS.get(name, ())) for name in names]


DECOUPLED = ("bnb AdamW8bit", "torchao AdamW8bit")
every_optimizer = pytest.mark.parametrize("name", optimizers())
# CPU has no paging, which bitsandbytes says once per optimiser.
quiet_paging = pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")


def parameters(seed: int = 0) -> list[nn.Parameter]:
    """A matrix of 8192 entries, which 8-bit optimisers quantise, and a vector, which they do not."""
    generator = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(64, 128, generator=generator)), nn.Parameter(torch.randn(10, generator=generator))]


def give_gradients(params: list[nn.Parameter], seed: int, scale: float = 1.0) -> None:
    generator = torch.Generator().manual_seed(100 + seed)
    for parameter in params:
        parameter.grad = scale * torch.randn(parameter.shape, generator=generator)


def trained(make: Make, updates: int = 5) -> tuple[list[nn.Parameter], Optimizer]:
    params = parameters()
    optimizer = make(params)
    for update in range(updates):
        give_gradients(params, update)
        optimizer.step()
    return params, optimizer


def flat(params: list[nn.Parameter]) -> Tensor:
    return torch.cat([parameter.detach().flatten().clone() for parameter in params])


def state_tensors(optimizer: Optimizer) -> dict[str, Tensor]:
    return {
        f"{index}/{key}": plain(value)
        for index, state in enumerate(optimizer.state.values())
        for key, value in state.items()
        if value is not None
    }


def plain(value: Any) -> Tensor:
    """A copy, with torchao's codes multiplied out."""
    if not isinstance(value, Tensor):
        return torch.tensor(float(value))
    return value.dequantize() if hasattr(value, "codes") else value.clone()
