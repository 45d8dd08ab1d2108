"""Models whose weights are split over processes: split layer by layer, run through their hooks, and made whole again.

FSDP2 puts hooks on a model and on each of its layers, which gather weights when a forward pass comes by. What reads a part of
a model by itself, a backbone or the weight of a head, has to do so inside a forward pass of the model: `within_forward`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, TypeVar

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from lightning_pref.functional.linear_logps import LowRank
from lightning_pref.models.full_precision import FullPrecision
from lightning_pref.models.heads import LMHead, causal_lm_of

# What FSDP puts into the names of what it wraps.
WRAPPED = "_fsdp_wrapped_module."

T = TypeVar("T")
M = TypeVar("M", bound=nn.Module)


def layers_of(model: nn.Module) -> list[nn.Module]:
    """The repeated layers of a model: members of its outermost module lists.

    >>> layers_of(nn.Sequential(nn.Embedding(2, 1), nn.ModuleList([nn.Tanh(), nn.ReLU()])))
    [Tanh(), ReLU()]
    """
    if isinstance(model, nn.ModuleList):
        return list(model)
    return [layer for child in model.children() for layer in layers_of(child)]


def shard(model: PreTrainedModel | PeftModel, mesh: DeviceMesh) -> None:
    """Split the weights of a model over the processes of a mesh (FSDP2), each layer by itself and the rest together.

    Tied embeddings are among the rest, and stay tied. A module that stays in float32 is split apart from it.

    Args:
        model: Whole, and equal on all processes.
        mesh: One dimension.
    """
    root = causal_lm_of(model)
    apart = [module for module in root.modules() if isinstance(module, FullPrecision)]
    for part in [*apart, *layers_of(root)]:
        if next(part.parameters(), None) is not None:
            fully_shard(part, mesh=mesh)
    # The root would by default stay whole until the next backward pass, and a pass without gradients has none: an update
    # before the next forward pass would then go unseen.
    fully_shard(root, mesh=mesh, reshard_after_forward=True)


def shard_alone(module: nn.Module, mesh: DeviceMesh) -> None:
    """Split a small module that is no model; its weights are whole inside its forward pass."""
    fully_shard(module, mesh=mesh, reshard_after_forward=True)


def is_split(model: PreTrainedModel | PeftModel) -> bool:
    """Whether FSDP2 has split the weights of a model."""
    return isinstance(causal_lm_of(model), FSDPModule)


def within_forward(model: PreTrainedModel | PeftModel, compute: Callable[[], T]) -> T:
    """Run a function on parts of a model with their weights whole; for a model that is not split, simply run it.

    Args:
        model: Whose parts the function runs. Every process has to come by.
        compute: Gives tensors, in tuples at most, so that the hooks find those that have gradients. It may not call the model
            itself.
    """
    root = causal_lm_of(model)
    if isinstance(root, FSDPModule):
        return run_as_forward(root, compute, called=root)
    _refuse_flat(root)
    return compute()


def whole_head(head: LMHead) -> LMHead:
    """The head with its weights put together, without gradients, where they are split; then every process has to come by."""
    low_rank = None if head.low_rank is None else LowRank(*map(_put_together, head.low_rank))
    bias = None if head.bias is None else _put_together(head.bias)
    return replace(head, weight=_put_together(head.weight), bias=bias, low_rank=low_rank)


def _put_together(value: Tensor) -> Tensor:
    return value.full_tensor().detach() if isinstance(value, DTensor) else value


def run_as_forward(module: nn.Module, compute: Callable[[], T], *, called: nn.Module) -> T:
    """Run a function in the place of the forward pass of a module.

    Args:
        module: Whose `forward` is exchanged, for this one time.
        compute: What runs instead.
        called: What is called: the module, or a wrapper around it.
    """
    own = module.__dict__.get("forward")

    def give_back() -> None:
        module.__dict__.pop("forward", None)
        if own is not None:
            module.__dict__["forward"] = own

    def instead() -> T:
        give_back()
        return compute()

    module.__dict__["forward"] = instead
    try:
        found: T = called()
        return found
    finally:
        give_back()


def _refuse_flat(root: PreTrainedModel) -> None:
    """Raise for a model whose weights FSDP has taken away, since nobody came through its wrapper."""
    weight = root.get_input_embeddings().weight
    if isinstance(weight, Tensor) and weight.dim() != 2:
        raise ValueError(
            f"The weights of this {type(root).__name__} are split by FSDP, which puts them together in training and validation "
            "steps only, but something else wants to run it. Use FSDP2 (`--trainer.strategy fsdp2`), under which models can be "
            "run at any time, or leave out what runs it between steps (a probe, a gold reward)."
        )


def skeleton_of(model: M) -> M:
    """A copy of a model without memory for its weights, for `filled`."""
    memo: dict[int, Any] = {  # Any: as `deepcopy` has it
        id(parameter): nn.Parameter(torch.empty_like(parameter, device="meta"), requires_grad=parameter.requires_grad)
        for parameter in model.parameters()
    }
    return copy.deepcopy(model, memo)


def filled(skeleton: M, state: Mapping[str, Tensor]) -> M:
    """The skeleton with these weights, itself."""
    wanted = skeleton.state_dict().keys()
    skeleton.load_state_dict({name: value for name, value in state.items() if name in wanted}, assign=True)
    return skeleton


def whole_state(model: nn.Module, *, keep: bool) -> dict[str, Tensor]:
    """All weights of a model that FSDP2 has split, whole, on the CPU; every process has to come by.

    Args:
        model: The model, or a part of it.
        keep: Whether this process wants them; else it gets nothing.
    """
    state = {}
    for name, value in model.state_dict().items():
        # One at a time: all together may not fit on the device.
        found = _put_together(value)
        if keep:
            state[name] = found.detach().cpu()
    return state


def whole_state_within(wrapper: FullyShardedDataParallel, model: nn.Module, *, keep: bool) -> dict[str, Tensor]:
    """The same of what FSDP has split.

    Args:
        wrapper: Around everything.
        model: Inside of it.
        keep: Whether this process wants the weights.
    """
    # All are put together at once. FSDP's own full state dict, which would not, crashes on a CPU (torch 2.13).
    with FullyShardedDataParallel.summon_full_params(wrapper, writeback=False):
        if not keep:
            return {}
        named = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
        return {name.replace(WRAPPED, ""): value.detach().cpu().clone() for name, value in named}
