"""Parts of an update that a diagnostic may hold: gradients by process, learning rates for one step, a copy to go back to."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy
from torch.distributed.tensor import DTensor, Shard
from torch.optim import Optimizer

from lightning_pref.callbacks.optimizer_state import Group, MomentumState, copied, local

# Devices on which looking at a number waits for nothing.
FREE_TO_READ: tuple[str, ...] = ("cpu",)


def reads_are_free(tensor: Tensor) -> bool:
    """Whether a branch on a value of this tensor costs no wait for its device."""
    return tensor.device.type in FREE_TO_READ


class LocalGradient(NamedTuple):
    """The gradient of one parameter, as far as this process holds it."""

    group: Group
    parameter: Tensor
    values: Tensor  # shares memory with the gradient


def local_gradients(optimizer: Optimizer) -> list[LocalGradient]:
    """Gradients of an optimiser's parameters, where there are any."""
    return [
        LocalGradient(group, parameter, local(parameter.grad))
        for group in optimizer.param_groups
        for parameter in group["params"]
        if parameter.grad is not None
    ]


def drop_gradients(optimizer: Optimizer) -> None:
    """Make the coming step do nothing: without gradients no optimiser touches weights, moments, decay or counters.

    Gradients of zero would not do: moments decay, Adam goes on moving along them, and weight decay acts.
    """
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = None


def num_copies(tensor: Tensor, world_size: int, flat_shards: int = 1) -> int:
    """How many processes hold the same part of a tensor.

    Args:
        tensor: A parameter.
        world_size: Number of processes.
        flat_shards: Into how many parts FSDP's flat parameters split the model; DTensors say it themselves.
    """
    if isinstance(tensor, DTensor):
        axes = zip(tensor.device_mesh.shape, tensor.placements, strict=True)
        return max(1, world_size // math.prod(size for size, placed in axes if isinstance(placed, Shard)))
    return max(1, world_size // flat_shards)


def num_flat_shards(model: nn.Module) -> int:
    """Into how many parts FSDP (the first) splits a model's flat parameters; 1 where it does not."""
    sizes = [
        part.process_group.size()
        for part in model.modules()
        if isinstance(part, FullyShardedDataParallel)
        and part.process_group is not None
        and part.sharding_strategy is not ShardingStrategy.NO_SHARD
    ]
    return max(sizes, default=1)


def squared_norm(parts: Iterable[tuple[Tensor, Tensor]], world_size: int, flat_shards: int = 1) -> Tensor:
    """This process's share of the squared norm of many tensors together: shares of all processes add up to it.

    Args:
        parts: The parameter, which says how it is sharded, and the values that this process holds for it. At least one.
        world_size: Number of processes.
        flat_shards: See `num_copies`.

    Returns:
        [], float64 where the device has it; not finite where any entry is not.
    """
    held = list(parts)
    copies = [num_copies(parameter, world_size, flat_shards) for parameter, _ in held]
    squares = _norms([values for _, values in held]).square()
    # Numbers of Python, since a tensor of them would have to be brought to the device.
    if len(set(copies)) == 1:
        return squares.sum() / copies[0]
    return torch.stack([square / times for square, times in zip(squares.unbind(), copies, strict=True)]).sum()


def _norms(tensors: Sequence[Tensor]) -> Tensor:
    """Norm of each tensor, float64 where the device has it."""
    if all(map(reads_are_free, tensors)):
        # There float32 is four times as fast, and that it could not square a spike can be seen at once.
        quick = [torch.linalg.vector_norm(values, dtype=torch.promote_types(values.dtype, torch.float32)) for values in tensors]
        norms = torch.stack([norm.double() for norm in quick])
        if norms.isfinite().all():
            return norms
    exact = torch.float32 if tensors[0].device.type == "mps" else torch.float64
    return torch.stack([torch.linalg.vector_norm(values, dtype=exact) for values in tensors])


class ScaledRates:
    """Learning rates of an optimiser, scaled for one step, and put back after it.

    Decoupled weight decay is a product with the learning rate; it is divided by the factor, so that the product stays.
    """

    def __init__(self, moments: MomentumState) -> None:
        self.moments = moments
        self._kept: list[tuple[Group, str, Any]] = []  # Any: float or tensor

    def scale(self, factor: float) -> None:
        """Multiply the learning rate of every group."""
        if factor == 1.0:
            return
        for group in self.moments.optimizer.param_groups:
            self._set(group, "lr", factor)
            if self.moments.decouples_decay(group) and group.get("weight_decay"):
                self._set(group, "weight_decay", 1.0 / factor)

    def _set(self, group: Group, key: str, factor: float) -> None:
        value = group[key]
        if isinstance(value, Tensor):  # a captured or compiled step reads this very tensor
            self._kept.append((group, key, value.clone()))
            value.mul_(factor)
        else:
            self._kept.append((group, key, value))
            group[key] = value * factor

    def restore(self) -> None:
        """Put back what the groups held; does nothing where nothing was scaled."""
        with torch.no_grad():
            while self._kept:
                group, key, value = self._kept.pop()
                if isinstance(value, Tensor):
                    group[key].copy_(value)
                else:
                    group[key] = value

    def largest(self) -> float:
        """The largest learning rate of the groups as they stand."""
        return max(float(group["lr"]) for group in self.moments.optimizer.param_groups)


class WeightCopy:
    """The weights before a step, to measure the step and to undo it."""

    def __init__(self, parameters: Iterable[Tensor]) -> None:
        self._pairs = [(parameter, local(parameter).clone()) for parameter in parameters]

    def differences(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Each parameter and what the step added to the part that this process holds."""
        for parameter, before in self._pairs:
            yield parameter, local(parameter) - before

    @torch.no_grad()
    def restore(self) -> None:
        """Undo the step on the weights."""
        for parameter, before in self._pairs:
            local(parameter).copy_(before)


class Snapshot:
    """Weights and optimiser state of one moment, kept in memory; buffers of the module are not part of it.

    Args:
        optimizer: Whose parameters and state.
        where: `cpu`, or `device` for a copy beside the weights.
    """

    def __init__(self, optimizer: Optimizer, where: Literal["cpu", "device"]) -> None:
        self.optimizer = optimizer
        self.where = where
        self._kept: list[tuple[Tensor, Tensor, dict[str, Any]]] = []

    @property
    def is_empty(self) -> bool:
        """Whether nothing was kept yet."""
        return not self._kept

    @torch.no_grad()
    def take(self) -> None:
        """Keep what is there now instead of what was kept before."""
        self._kept = [
            (parameter, self._copy(parameter), self._copy_state(self.optimizer.state.get(parameter, {})))
            for group in self.optimizer.param_groups
            for parameter in group["params"]
        ]

    @torch.no_grad()
    def restore(self) -> None:
        """Bring weights and state back to what was kept."""
        for parameter, values, state in self._kept:
            local(parameter).copy_(values)
            now = self.optimizer.state[parameter]
            for key in [key for key in now if key not in state]:
                del now[key]
            for key, value in state.items():
                if isinstance(value, Tensor) and isinstance(now.get(key), Tensor):
                    local(now[key]).copy_(value)
                else:
                    now[key] = value.clone() if isinstance(value, Tensor) else value

    def _copy(self, tensor: Tensor) -> Tensor:
        return copied(local(tensor), "cpu" if self.where == "cpu" else tensor.device)

    def _copy_state(self, state: Mapping[str, Any]) -> dict[str, Any]:
        return {key: self._copy(value) if isinstance(value, Tensor) else value for key, value in state.items()}
