"""The policy that a preference loss measures against: a frozen copy, the base under an adapter, or a moving average."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel
from typing_extensions import override

from lightning_pref.data.groups import GroupBatch
from lightning_pref.models.adapters import adapters_off
from lightning_pref.models.backbones import evaluating
from lightning_pref.models.digests import weights_digest
from lightning_pref.models.forward import Layout, response_logps
from lightning_pref.models.quantised import is_quantized, without_scales

# Log-probs of a batch under a model: [R] sums, or [N] by token for a loss that cuts responses. Bind options of the
# forward with `functools.partial`. A cache holds sums only.
Score = Callable[[PreTrainedModel | PeftModel, GroupBatch], Tensor]


def summed_logps(model: PreTrainedModel | PeftModel, batch: GroupBatch, *, layout: Layout = "auto") -> Tensor:
    """Summed log-prob of each response in nats, [R] float32."""
    return response_logps(model, batch, layout=layout).logps


def token_logps(model: PreTrainedModel | PeftModel, batch: GroupBatch, *, layout: Layout = "auto") -> Tensor:
    """Log-prob of each response token in nats, [N] float32."""
    return response_logps(model, batch, layout=layout).token_logps


class Reference(Protocol):
    """What a loss asks of a reference policy."""

    def logps(self, batch: GroupBatch) -> Tensor:
        """Log-probs in nats, float32, [R] or what the score returns, without gradient and without dropout."""
        ...


class FrozenCopy(nn.Module):
    """A copy of a model that never changes, in eval mode whatever the mode of the module around it.

    Its weights are no part of a checkpoint, since they come from where the policy came from. Their digest is: resuming
    with another reference than the run began with raises.

    Args:
        model: The policy at the start, or another model.
        take_over: Freeze the given model itself, one that was loaded for this alone, and save the memory of a copy.
        score: How a response is scored.

    Attributes:
        saves_weights: Set where weights have to be in checkpoints, too.
    """

    def __init__(self, model: PreTrainedModel | PeftModel, *, take_over: bool = False, score: Score = summed_logps) -> None:
        super().__init__()
        self.model = _frozen(model if take_over else copy.deepcopy(model))
        self.score = score
        self.digest = weights_digest(self.model)
        self.saves_weights = False
        self.register_state_dict_post_hook(_drop_weights)  # type: ignore[no-untyped-call]
        self.register_load_state_dict_pre_hook(_keep_weights)  # type: ignore[no-untyped-call]

    @torch.no_grad()
    def logps(self, batch: GroupBatch) -> Tensor:
        return self.score(self.model, batch)

    @override
    def train(self, mode: bool = True) -> FrozenCopy:
        """Stay in eval mode."""
        return super().train(False)

    @override
    def get_extra_state(self) -> dict[str, str]:
        return {"digest": self.digest}

    @override
    def set_extra_state(self, state: dict[str, str]) -> None:
        check_same_reference(self.digest, state["digest"])


class AdapterOff:
    """The policy without its LoRA adapter: a reference that needs no memory of its own.

    Not an `nn.Module`, so that the policy is not registered twice in the module that holds both.
    """

    def __init__(self, policy: PeftModel, *, score: Score = summed_logps) -> None:
        trained_biases = getattr(policy.peft_config[policy.active_adapters[0]], "bias", "none")
        if trained_biases != "none":
            raise ValueError(
                f"The adapter trains biases of the base model (`bias={trained_biases!r}`), which switching it off does not "
                "undo, so the base is no reference. Use `bias='none'`, or the reference 'copy'."
            )
        self.policy = policy
        self.score = score

    def logps(self, batch: GroupBatch) -> Tensor:
        with evaluating(self.policy), adapters_off(self.policy):
            return self.score(self.policy, batch)


@dataclass(frozen=True, kw_only=True)
class EmaSettings:
    """How the reference follows the policy (TR-DPO, Gorbatovski et al. 2024, arXiv 2404.09656, eq. 4).

    Attributes:
        mixing: alpha in theta_ref <- alpha theta + (1 - alpha) theta_ref, in (0, 1]; 1 replaces the reference.
        every_n_updates: Updates of the policy between two steps of the reference. 1 with a small `mixing` is the usual
            exponential moving average.
    """

    mixing: float = 0.6
    every_n_updates: int = 512

    def __post_init__(self) -> None:
        if not 0.0 < self.mixing <= 1.0:
            raise ValueError(f"`mixing` must be in (0, 1], got {self.mixing!r}.")
        if self.every_n_updates < 1:
            raise ValueError(f"`every_n_updates` must be at least 1, got {self.every_n_updates!r}.")


class EmaReference(nn.Module):
    """A copy of the policy that follows it; weights and counter are part of the checkpoint."""

    def __init__(self, policy: PreTrainedModel | PeftModel, settings: EmaSettings, *, score: Score = summed_logps) -> None:
        super().__init__()
        if is_quantized(policy):
            raise ValueError(
                "A moving reference averages weights, which those in 4 bit cannot do. Use the reference 'adapter', or load the "
                "model without `quantization`."
            )
        dtypes = {parameter.dtype for parameter in policy.parameters()}
        # Below one half the step is smaller than the rounding of a 16-bit weight more often than not.
        if settings.mixing < 0.5 and dtypes != {torch.float32}:
            raise ValueError(
                f"A moving average with `mixing={settings.mixing}` over {', '.join(sorted(map(str, dtypes)))} weights would "
                "round most of its steps away. Load the policy with `dtype: float32` and train with `precision: bf16-mixed`."
            )
        self.model = _frozen(copy.deepcopy(policy))
        self.settings = settings
        self.score = score
        self.num_updates = 0

    @torch.no_grad()
    def logps(self, batch: GroupBatch) -> Tensor:
        return self.score(self.model, batch)

    @torch.no_grad()
    def after_update(self, policy: PreTrainedModel | PeftModel) -> bool:
        """Count one optimiser update of the policy and follow it when due; whether the reference moved."""
        self.num_updates += 1
        if self.num_updates % self.settings.every_n_updates:
            return False
        for mine, trained in zip(self.model.parameters(), policy.parameters(), strict=True):
            mine.lerp_(trained, self.settings.mixing)
        return True

    @override
    def train(self, mode: bool = True) -> EmaReference:
        """Stay in eval mode."""
        return super().train(False)

    @override
    def get_extra_state(self) -> dict[str, int]:
        return {"num_updates": self.num_updates}

    @override
    def set_extra_state(self, state: dict[str, int]) -> None:
        self.num_updates = state["num_updates"]


def check_same_reference(found: str, expected: str) -> None:
    """Raise if a run would go on with another reference than the checkpoint was trained against."""
    if found != expected:
        raise ValueError(
            f"The checkpoint was trained against the reference {expected[:12]}, but this run has {found[:12]}: its model, "
            "or what its cached log-probs were made from, has changed. Give the model the run began with, or start a new run."
        )


def _frozen(model: PreTrainedModel | PeftModel) -> PreTrainedModel | PeftModel:
    model.requires_grad_(False)
    model.eval()
    return model


def _drop_weights(module: nn.Module, state: dict[str, Any], prefix: str, _metadata: object) -> None:
    """Hook of `state_dict`; the state holds tensors and extra states."""
    if module.saves_weights:
        return
    for name in [name for name in state if name.startswith(f"{prefix}model.")]:
        del state[name]


def _keep_weights(module: nn.Module, state: dict[str, Any], prefix: str, *_: object) -> None:
    """Hook of `load_state_dict`: what the checkpoint leaves out is as the module has it."""
    if module.saves_weights:
        return
    model, inside = module.get_submodule("model"), f"{prefix}model."
    own = model.state_dict(prefix=inside)
    state.update({name: own[name] for name in without_scales(list(own), model, inside)})
