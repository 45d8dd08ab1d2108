"""LoRA adapters through peft: added, counted, switched off, and told apart from the weights they adapt."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers import PreTrainedModel
from typing_extensions import override

from lightning_pref.models.quantised import dense_weight, is_quantized_layer, num_weights, quantized_layers

# What a model is for, in peft's words.
Task = Literal["CAUSAL_LM", "SEQ_CLS"]


@dataclass(frozen=True, kw_only=True)
class LoraSettings:
    """Low-rank adaptation (Hu et al. 2021, arXiv 2106.09685): W x becomes W x + (alpha / r) B A x, with B = 0 at the start.

    Attributes:
        r: Rank of each update, at least 1.
        alpha: Scale of the update; it is divided by `r`, or by sqrt(r) with `rslora`.
        dropout: Rate on the input of A, in [0, 1). It acts on the trained policy only, never on the reference.
        target_modules: `all-linear` is every linear layer except the head; or the last parts of module names.
        modules_to_save: Modules that are trained in full, on a copy, and saved with the adapter.
        rslora: Rank-stabilised scale (Kalajdzievski 2023, arXiv 2312.03732).
    """

    r: int = 16
    alpha: int = 32
    dropout: float = 0.0
    target_modules: Literal["all-linear"] | list[str] = "all-linear"
    modules_to_save: list[str] | None = None
    rslora: bool = False

    def __post_init__(self) -> None:
        if self.r < 1:
            raise ValueError(f"`r` of LoRA must be at least 1, got {self.r!r}; to train without an adapter leave LoRA out.")
        if self.alpha < 1:
            raise ValueError(f"`alpha` of LoRA must be at least 1, got {self.alpha!r}; below it the adapter would do nothing.")
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"`dropout` of LoRA must be in [0, 1), got {self.dropout!r}.")


def lora_config(settings: LoraSettings, task: Task) -> LoraConfig:
    """The settings in peft's words."""
    return LoraConfig(
        task_type=task,
        r=settings.r,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        target_modules=settings.target_modules,
        modules_to_save=settings.modules_to_save,
        use_rslora=settings.rslora,
    )


@contextmanager
def without_peft_warnings() -> Iterator[None]:
    """Without those warnings of peft that a user could do nothing about."""
    with warnings.catch_warnings():
        # peft finds the orientation of GPT-2's Conv1D weights by itself, and says so.
        warnings.filterwarnings("ignore", message=".*fan_in_fan_out")
        # Asked by peft 0.21 of transformers 5.23; nothing a user could change.
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing")
        # Our export unties a head that was adapted apart from its embedding.
        warnings.filterwarnings("ignore", message=".*tie_word_embeddings")
        yield


def add_lora(
    model: PreTrainedModel | PeftModel, settings: LoraSettings, *, task: Task = "CAUSAL_LM", name: str = "default"
) -> PeftModel:
    """Wrap the model so that only a fresh adapter is trained; its own weights stay as they are, frozen.

    Args:
        model: The plain model.
        settings: Of the adapter.
        task: What the model is for, in peft's words. The head of a sequence classifier is trained and saved with the adapter.
        name: Of the adapter.
    """
    if isinstance(model, PeftModel):
        raise ValueError("The model has an adapter already; add LoRA to the plain model.")
    _check_names("target_modules", settings.target_modules, model)
    _check_names("modules_to_save", settings.modules_to_save or [], model)
    _refuse_quantized_copies(settings.modules_to_save or [], model)
    with without_peft_warnings():
        adapted = get_peft_model(model, lora_config(settings, task), adapter_name=name)
    if not isinstance(adapted, PeftModel):
        raise RuntimeError(f"peft returned a {type(adapted).__name__}, expected a PeftModel.")
    return adapted


class ParameterCount(NamedTuple):
    """Sizes of a model; prints as one line for the log."""

    trainable: int
    total: int

    @override
    def __str__(self) -> str:
        return f"{self.trainable:,} of {self.total:,} parameters are trained ({self.trainable / max(self.total, 1):.2%})"


def count_parameters(model: nn.Module) -> ParameterCount:
    """Trainable and all parameters; tied ones count once."""
    sizes = [(num_weights(parameter), parameter.requires_grad) for parameter in model.parameters()]
    return ParameterCount(sum(size for size, trained in sizes if trained), sum(size for size, _ in sizes))


def adapter_is_fresh(model: PeftModel) -> bool:
    """Whether the adapter changes nothing yet: every B is 0 and every module to save equals its original."""
    state = model.get_base_model().state_dict()
    adapter = _active_adapter(model)
    for name, tensor in state.items():
        if ("lora_B" in name or "lora_embedding_B" in name) and bool(tensor.any()):
            return False
        if f".modules_to_save.{adapter}." in name:
            original = state[name.replace(f".modules_to_save.{adapter}.", ".original_module.")]
            if not bool((tensor == original).all()):
                return False
    return True


@contextmanager
def adapters_off(model: PeftModel) -> Iterator[None]:
    """The base model inside, with the original of every module to save; afterwards all as it was, also after an error.

    peft turns gradients on for the whole active adapter when it comes back, so the flags are kept and restored here.
    """
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        with model.disable_adapter():
            yield
    finally:
        for parameter, requires_grad in flags:
            parameter.requires_grad_(requires_grad)


def plain_state(model: PeftModel, *, merged: bool, dense: bool = False) -> dict[str, Tensor]:
    """The tensors of the model under the names they have without an adapter.

    Args:
        model: The adapted model; it is not changed.
        merged: With the update B A added to the weights and the trained copies of modules to save; else the base model as it was
            before the adapter.
        dense: On the CPU, with 4-bit weights multiplied out; always so where the update is added.
    """
    base = model.get_base_model()
    adapter = _active_adapter(model)
    named = ((_plain_name(name, adapter, merged), tensor) for name, tensor in base.state_dict().items())
    state = {name: tensor for name, tensor in named if name is not None}
    if not (merged or dense):
        return state
    scales = tuple(f"{name.removesuffix('.base_layer')}.weight." for name, _ in quantized_layers(base))
    state = {name: tensor.cpu() for name, tensor in state.items() if not (scales and name.startswith(scales))}
    for name, module in base.named_modules():
        if merged and isinstance(module, LoraLayer):
            state[f"{name}.weight"] = _merged_weight(module, adapter).cpu()
        elif is_quantized_layer(module) and not (merged and name.endswith(".base_layer")):
            state[f"{name.removesuffix('.base_layer')}.weight"] = dense_weight(module).cpu()
    return state


def _merged_weight(adapted: Any, adapter: str) -> Tensor:  # Any: the update is on each of peft's concrete classes
    """The weight of a layer with the update of its adapter."""
    base = adapted.get_base_layer()
    if is_quantized_layer(base):
        # peft would quantise the sum again.
        weight: Tensor = dense_weight(base)
        change: Tensor = adapted.get_delta_weight(adapter)
        return (weight.float() + change.detach().float()).to(weight.dtype)
    # One layer at a time: a copy of the whole model may not fit beside the training state.
    layer = copy.deepcopy(adapted)
    layer.merge(safe_merge=True, adapter_names=[adapter])
    merged: Tensor = layer.get_base_layer().weight.detach()
    return merged


def _plain_name(name: str, adapter: str, merged: bool) -> str | None:
    """The name without the adapter's parts, or `None` for a tensor that the plain model does not have."""
    parts = name.split(".")
    if any(part.startswith("lora_") for part in parts):
        return None
    if "modules_to_save" in parts:
        start = parts.index("modules_to_save")
        if not merged or parts[start + 1] != adapter:
            return None
        return ".".join(parts[:start] + parts[start + 2 :])
    if "original_module" in parts and merged:
        return None
    return ".".join(part for part in parts if part not in ("original_module", "base_layer"))


def _active_adapter(model: PeftModel) -> str:
    if len(model.active_adapters) != 1:
        raise ValueError(
            f"Expected one active adapter, found {model.active_adapters}; call `model.set_adapter(name)` with the one that "
            "is trained."
        )
    return str(model.active_adapters[0])


def _refuse_quantized_copies(names: list[str], model: PreTrainedModel) -> None:
    """Raise for a module to be trained in full whose weights are in 4 bit."""
    for layer, _ in quantized_layers(model):
        for name in names:
            if f".{layer}".endswith(f".{name}"):
                raise ValueError(
                    f"`modules_to_save` names {name!r}, but the layer {layer!r} is in 4 bit and cannot be trained in full. Adapt "
                    "it by `target_modules`, or load the model without `quantization`."
                )


def _check_names(option: str, names: list[str] | str, model: PreTrainedModel) -> None:
    """Raise for a name that no module of the model ends with, and list those that it has."""
    if isinstance(names, str):
        if names != "all-linear":
            raise ValueError(f"`{option}` must be 'all-linear' or a list of module names, got {names!r}.")
        return
    modules = [name for name, module in model.named_modules() if name and next(module.parameters(False), None) is not None]
    unknown = [name for name in names if not any(f".{found}".endswith(f".{name}") for found in modules)]
    if unknown:
        known = sorted({found.rsplit(".", 1)[-1] for found in modules})
        raise ValueError(
            f"`{option}` names {', '.join(map(repr, unknown))}, which no module of {type(model).__name__} is called. Modules "
            f"with weights of their own: {', '.join(known)}."
        )
