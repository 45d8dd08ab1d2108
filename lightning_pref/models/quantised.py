"""Language models whose frozen weights are kept in 4 bit by bitsandbytes, for LoRA on top of them (QLoRA)."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import BitsAndBytesConfig, PreTrainedConfig, PreTrainedModel

ComputeDtype = Literal["float32", "bfloat16", "float16"]


@dataclass(frozen=True, kw_only=True)
class QuantizationSettings:
    """How the linear layers of a frozen base are kept (Dettmers et al. 2023, arXiv 2305.14314). Embeddings and head stay dense.

    Attributes:
        kind: `nf4`, whose 16 values suit weights with a normal distribution, or `fp4`.
        compute_dtype: In which a layer multiplies. If not given, in what a dense layer in its place would: the dtype of the
            weights around it, and bfloat16 or float16 under a precision of that name.
        double: Keep the scales of the blocks in 8 bit, too: 0.37 bits less for each weight.
    """

    kind: Literal["nf4", "fp4"] = "nf4"
    compute_dtype: ComputeDtype | None = None
    double: bool = True

    def __post_init__(self) -> None:
        if find_spec("bitsandbytes") is None or find_spec("accelerate") is None:
            missing = " and ".join(name for name in ("bitsandbytes", "accelerate") if find_spec(name) is None)
            raise ValueError(
                f"A model in 4 bit needs {missing}, which is not installed. Install it with `pip install 'lightning-pref[bnb]'`, "
                "or load the model as it is."
            )


def quantization_config(settings: QuantizationSettings) -> BitsAndBytesConfig:
    """The settings in the words of transformers, which quantises a checkpoint while it reads it."""
    return BitsAndBytesConfig(  # type: ignore[no-untyped-call]
        load_in_4bit=True,
        bnb_4bit_quant_type=settings.kind,
        bnb_4bit_use_double_quant=settings.double,
        bnb_4bit_compute_dtype=None if settings.compute_dtype is None else getattr(torch, settings.compute_dtype),
    )


def check_saved_quantization(config: PreTrainedConfig, settings: QuantizationSettings | None, name: str) -> None:
    """Raise for a checkpoint that was saved in a quantisation other than this one, or would be quantised twice."""
    saved: Any = getattr(config, "quantization_config", None)  # Any: a dictionary, or a class of the method
    if saved is None:
        return
    entries: dict[str, Any] = saved if isinstance(saved, dict) else saved.to_dict()
    method = str(entries.get("quant_method", "unknown"))
    if not entries.get("load_in_4bit"):
        raise ValueError(
            f"The checkpoint {name!r} was saved quantised by {method!r}; trained can be dense weights, or LoRA on weights in "
            "4 bit of bitsandbytes. Give the original checkpoint, and `quantization: {kind: nf4}` if memory is short."
        )
    if settings is not None:
        raise ValueError(
            f"The checkpoint {name!r} is in 4 bit already, so `quantization` cannot be chosen. Leave it out, or give the "
            "original checkpoint."
        )


def quantize(model: PreTrainedModel, settings: QuantizationSettings) -> PreTrainedModel:
    """Turn the linear layers of a dense model into 4-bit ones, in place; its head stays as it is.

    Args:
        model: A causal language model, on the device where its weights are quantised.
        settings: Of the quantisation.
    """
    kinds: Any = import_module("bitsandbytes.nn")  # Any: it exports nothing explicitly
    head: nn.Module | None = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    found = [(name, module) for name, module in model.named_modules() if type(module) is nn.Linear and module is not head]
    if not found:
        raise ValueError(f"{type(model).__name__} has no torch.nn.Linear apart from its head, so nothing of it can be quantised.")
    for name, dense in found:
        with torch.device("meta"):
            layer = kinds.Linear4bit(
                dense.in_features, dense.out_features, bias=False, compress_statistics=settings.double, quant_type=settings.kind
            )
        layer.bias = dense.bias
        unpacked = kinds.Params4bit(
            dense.weight.detach(),
            requires_grad=False,
            compress_statistics=settings.double,
            quant_type=settings.kind,
            module=layer,
        )
        layer.weight = unpacked.to(dense.weight.device)
        model.set_submodule(name, layer)
    # Read by peft, which has a LoRA layer of its own for such a base.
    model.is_loaded_in_4bit = True  # type: ignore[assignment]
    made_exact(model, settings)
    return model


def made_exact(model: nn.Module, settings: QuantizationSettings | None = None) -> None:
    """Let 4-bit layers give the same, right numbers in training and evaluation mode; raise where they cannot.

    On a CPU with AVX512-BF16, bitsandbytes packs a weight anew in the first evaluation: it rounds the scales to bfloat16,
    keeps them that way, and gives no gradients any more. The reference would change under a run. And on any CPU it takes a
    row of a weight for whole blocks, which it quantised across rows: elsewhere the values are right.

    Args:
        model: Any model.
        settings: Of the quantisation, where it was made by them; else the layers say themselves in what they multiply.
    """
    for name, layer in quantized_layers(model):
        if getattr(layer.weight.quant_state, "packing_format_for_cpu", False):
            raise ValueError(
                f"The 4-bit layer {name!r} was evaluated on this CPU before, where bitsandbytes rounds its scales to bfloat16 "
                "for good. Load the model anew and give it to the module before it is called."
            )
        block = layer.weight.quant_state.blocksize
        if layer.weight.device.type == "cpu" and layer.in_features % block:
            raise ValueError(
                f"The 4-bit layer {name!r} has {layer.in_features} inputs, no multiple of the {block} weights that share a "
                "scale. On a CPU bitsandbytes gives such weights wrong values. Train on a GPU, or load the model without "
                "`quantization`."
            )
        layer.support_avx512bf16_for_cpu = False
        if settings is not None:
            layer.compute_dtype = None if settings.compute_dtype is None else getattr(torch, settings.compute_dtype)
            layer.compute_type_is_set = layer.compute_dtype is not None
        if not layer.compute_type_is_set:
            # Else bitsandbytes would keep to the dtype of the very first batch.
            layer.compute_type_is_set = True
            layer.register_forward_pre_hook(_as_under_autocast)


def _as_under_autocast(_: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...] | None:  # Any: as torch hands them on
    """Cast the input as autocast does that of a dense layer; it does not know the product of bitsandbytes."""
    states, *rest = inputs
    device = states.device.type
    if not torch.is_autocast_enabled(device) or states.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return None
    return (states.to(torch.get_autocast_dtype(device)), *rest)


def is_quantized_layer(module: nn.Module) -> bool:
    """Whether a module is a 4-bit linear layer of bitsandbytes; said without importing it."""
    return any(kind.__name__ == "Linear4bit" and kind.__module__.startswith("bitsandbytes.") for kind in type(module).__mro__)


def quantized_layers(model: nn.Module) -> Iterator[tuple[str, Any]]:  # Any: bitsandbytes has no type information
    """Every 4-bit layer with its name."""
    return ((name, module) for name, module in model.named_modules() if is_quantized_layer(module))


def is_quantized(model: nn.Module) -> bool:
    """Whether any layer is in 4 bit."""
    return next(quantized_layers(model), None) is not None


def dense_weight(layer: Any) -> Tensor:  # Any: bitsandbytes has no type information
    """What a 4-bit layer stands for, [outputs, inputs] in the dtype it was quantised from."""
    from bitsandbytes.functional import dequantize_4bit

    weight: Tensor = dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    return weight


def dense_state(model: nn.Module) -> dict[str, Tensor]:
    """The tensors of a model, with 4-bit weights multiplied out.

    Args:
        model: Any model, without an adapter.
    """
    state = model.state_dict()
    dense = {f"{name}.weight": dense_weight(layer) for name, layer in quantized_layers(model)}
    return {name: dense.get(name, state[name]) for name in without_scales(list(state), model)}


def num_weights(parameter: Tensor) -> int:
    """Weights that a parameter stands for; two 4-bit ones share a byte."""
    state: Any = getattr(parameter, "quant_state", None)  # Any: bitsandbytes has no type information
    return parameter.numel() if state is None else math.prod(state.shape)


def without_scales(names: Iterator[str] | list[str], model: nn.Module, prefix: str = "") -> list[str]:
    """Names of a model's state without those of the scales of its 4-bit weights, which `load_state_dict` does not know.

    Args:
        names: Of tensors, as `state_dict` gives them.
        model: Whose they are.
        prefix: In front of every name.
    """
    packed = tuple(f"{prefix}{layer}.weight." for layer, _ in quantized_layers(model))
    return [name for name in names if not name.startswith(packed)] if packed else list(names)
