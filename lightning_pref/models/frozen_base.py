"""Checkpoints of a run on a 4-bit base: without the base, which never changes, and with its digest."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lightning_pref.models.digests import tensors_digest
from lightning_pref.models.quantised import quantized_layers

DIGEST = "quantized_base_digest"


def leave_base_out(holder: nn.Module, place: str) -> None:
    """Keep the 4-bit weights of a model out of the state of the module that holds it.

    They come from where the run began, and bitsandbytes cannot load them into a model. Going on with others than the run
    began with raises.

    Args:
        holder: The module whose `state_dict` goes into a checkpoint.
        place: Name of the model in it.
    """
    model = holder.get_submodule(place)
    digest = tensors_digest(_base(model.state_dict(), model))
    holder.register_state_dict_post_hook(partial(_drop_base, place=place, digest=digest))  # type: ignore[no-untyped-call]
    holder.register_load_state_dict_pre_hook(partial(_keep_base, place=place, digest=digest))  # type: ignore[no-untyped-call]


def _base(state: dict[str, Tensor], model: nn.Module, prefix: str = "") -> dict[str, Tensor]:
    """The 4-bit weights and their scales."""
    starts = tuple(f"{prefix}{name}.weight" for name, _ in quantized_layers(model))
    return {name: tensor for name, tensor in state.items() if name.startswith(starts)}


def _drop_base(holder: nn.Module, state: dict[str, Any], prefix: str, _metadata: object, *, place: str, digest: str) -> None:
    """Hook of `state_dict`; the state holds tensors and extra states."""
    for name in _base(state, holder.get_submodule(place), f"{prefix}{place}."):
        del state[name]
    state[f"{prefix}{DIGEST}"] = torch.frombuffer(bytearray.fromhex(digest), dtype=torch.uint8)


def _keep_base(holder: nn.Module, state: dict[str, Any], prefix: str, *_: object, place: str, digest: str) -> None:
    """Hook of `load_state_dict`: what the checkpoint leaves out is as the module has it."""
    saved = state.pop(f"{prefix}{DIGEST}", None)
    found = None if saved is None else bytes(saved.tolist()).hex()
    if found != digest:
        was = "a base that was not in 4 bit" if found is None else f"the 4-bit base {found[:12]}"
        raise ValueError(
            f"The checkpoint was trained on {was}, but this run has the 4-bit base {digest[:12]}: its model, or how it is "
            "quantised, has changed. Give the model and the `quantization` that the run began with, or start a new run."
        )
    model = holder.get_submodule(place)
    for name, layer in quantized_layers(model):
        state[f"{prefix}{place}.{name}.weight"] = layer.weight.data
