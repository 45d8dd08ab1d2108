"""The two halves of a causal language model: the backbone that makes hidden states and the head that scores tokens."""

from dataclasses import dataclass
from typing import NoReturn

import torch
from peft import PeftModel
from peft.tuners.lora import Linear as LoraLinear
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn
from transformers import PreTrainedModel

from lightning_pref.functional.linear_logps import LowRank

# Names under which configurations of transformers keep what happens to the logits after the linear map.
SOFTCAPS = ("final_logit_softcapping", "logits_soft_cap")
MULTIPLIERS = ("logit_scale", "lm_head_multiplier")
DIVISORS = ("logits_scaling",)


@dataclass(frozen=True)
class LMHead:
    """What turns a hidden state into logits. The tensors are those of the model, so gradients reach its parameters."""

    weight: Tensor  # [V, D]
    bias: Tensor | None = None  # [V]
    low_rank: LowRank | None = None  # LoRA adapters that are active on the head
    scale: float = 1.0
    softcap: float | None = None

    def first_rows(self, num_rows: int) -> "LMHead":
        """The head over the first tokens of the vocabulary only, for models that cut off padded rows."""
        low_rank = None if self.low_rank is None else LowRank(self.low_rank.down, self.low_rank.up[:num_rows])
        bias = None if self.bias is None else self.bias[:num_rows]
        return LMHead(self.weight[:num_rows], bias, low_rank, self.scale, self.softcap)


def causal_lm_of(model: PreTrainedModel | PeftModel) -> PreTrainedModel:
    """The transformers model itself, taken out of peft's wrapper.

    Raises:
        TypeError: If there is no causal language model inside.
        ValueError: If the model or its adapter cannot be run in the two halves backbone and head.
    """
    found: nn.Module = model
    if isinstance(model, PeftModel):
        adapter = model.active_peft_config
        if adapter.is_prompt_learning or getattr(adapter, "alora_invocation_tokens", None) is not None:
            raise ValueError(
                f"The active adapter is a {type(adapter).__name__} that acts on the input sequence, not on layers alone. "
                "Response log-probs need an adapter inside the layers: use LoRA or another layer-wise peft method."
            )
        found = model.get_base_model()
    if not isinstance(found, PreTrainedModel):
        raise TypeError(
            f"Response log-probs need a transformers PreTrainedModel or a peft PeftModel, got {type(found).__name__}. "
            "Pass the model itself, not a wrapper around it."
        )
    if found.config.is_encoder_decoder:
        raise ValueError(
            f"{type(found).__name__} is an encoder-decoder model; prompts and responses here form one sequence. "
            "Use a decoder-only model (AutoModelForCausalLM)."
        )
    text_config = found.config.get_text_config()
    if getattr(text_config, "use_bidirectional_attention", None) in (True, "all") or not getattr(text_config, "is_causal", True):
        raise ValueError(
            f"{type(found).__name__} is configured to attend to later tokens, so its next-token log-probs mean nothing. "
            "Set `use_bidirectional_attention=False` (or `is_causal=True`) in its config."
        )
    return found


def backbone_of(model: PreTrainedModel | PeftModel) -> PreTrainedModel:
    """The module whose first output is the hidden state that the head reads, after the final norm."""
    causal_lm = causal_lm_of(model)
    backbone: nn.Module = causal_lm.get_decoder()  # type: ignore[no-untyped-call]
    if backbone is causal_lm:
        # Some classes name their backbone otherwise than their base_model_prefix says; `model` is the usual name.
        backbone = getattr(causal_lm, "model", causal_lm)
    if not isinstance(backbone, PreTrainedModel) or backbone is causal_lm or _output_layer(causal_lm) is None:
        raise ValueError(
            f"{type(causal_lm).__name__} has no language-model head. Load it with AutoModelForCausalLM, not AutoModel."
        )
    return backbone


def head_of(model: PreTrainedModel | PeftModel) -> LMHead:
    """The head as it stands now: with the adapters that are active now, and none inside `model.disable_adapter()`.

    Raises:
        ValueError: If the head is of a kind whose logits are not known here to the last term.
    """
    causal_lm = causal_lm_of(model)
    weight, bias, low_rank = _linear_of(_output_layer(causal_lm), type(causal_lm).__name__)
    config = causal_lm.config.get_text_config()
    scale = 1.0
    for name in MULTIPLIERS:
        scale *= _number(config, name, default=1.0)
    for name in DIVISORS:
        scale /= _number(config, name, default=1.0)
    # A soft-cap of 0 stands for none, as `None` does.
    softcap = next((cap for name in SOFTCAPS if (cap := _number(config, name, default=0.0))), None)
    return LMHead(weight, bias, low_rank, scale, softcap)


def _output_layer(causal_lm: PreTrainedModel) -> nn.Module | None:
    layer: nn.Module | None = causal_lm.get_output_embeddings()  # type: ignore[no-untyped-call]
    return layer


def _number(config: object, name: str, *, default: float) -> float:
    value = getattr(config, name, None)
    return default if value is None else float(value)


def _linear_of(head: nn.Module | None, model_name: str) -> tuple[Tensor, Tensor | None, LowRank | None]:
    if isinstance(head, ModulesToSaveWrapper):
        saved = [name for name in head.active_adapters if name in head.modules_to_save]
        enabled = saved and not head.disable_adapters
        return _linear_of(head.modules_to_save[saved[0]] if enabled else head.original_module, model_name)
    if isinstance(head, LoraLinear):
        return _lora_linear(head, model_name)
    # Subclasses that only hold the parameters in another way (FSDP2 makes such) are fine, quantised ones are not.
    if not isinstance(head, nn.Linear) or type(head).forward is not nn.Linear.forward:
        _refuse(model_name, f"is a {type(head).__module__}.{type(head).__name__}", "leave the head a plain torch.nn.Linear")
    return head.weight, head.bias, None


def _lora_linear(head: LoraLinear, model_name: str) -> tuple[Tensor, Tensor | None, LowRank | None]:
    """Base weight plus active adapters; the counterpart of what peft does to an input of the layer."""
    if head.disable_adapters and head.merged:
        # peft does the same in its forward pass: merged adapters leave the weight when adapters are disabled.
        head.unmerge()
    weight, bias, _ = _linear_of(head.get_base_layer(), model_name)
    names = [name for name in head.active_adapters if name in head.lora_A]
    if head.disable_adapters or head.merged or not names:
        return weight, bias, None
    ups = []
    for name in names:
        if name in head.lora_variant:
            _refuse(
                model_name, f"carries a LoRA variant ({type(head.lora_variant[name]).__name__})", "use plain LoRA on the head"
            )
        if head.training and getattr(head.lora_dropout[name], "p", 0.0) > 0:
            _refuse(model_name, "carries LoRA with dropout", "set `lora_dropout=0` or leave the head out of `target_modules`")
        ups.append(head.lora_B[name].get_parameter("weight") * head.scaling[name])
        if head.lora_B[name].bias is not None:
            shift = head.lora_B[name].bias * head.scaling[name]
            bias = shift if bias is None else bias + shift
    downs: list[Tensor] = [head.lora_A[name].get_parameter("weight") for name in names]
    return weight, bias, LowRank(torch.cat(downs), torch.cat(ups, dim=1))


def _refuse(model_name: str, finding: str, cure: str) -> NoReturn:
    raise ValueError(
        f"The language-model head of {model_name} {finding}; response log-probs are computed in chunks from the head's own "
        f"weights and would drop what that adds. Supported are torch.nn.Linear, LoRA on it and `modules_to_save`: {cure}."
    )
