"""What every module that trains a policy shares: loading, log-probabilities, entropy, export."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path

from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from typing_extensions import override

from lightning_pref.data.groups import GroupBatch
from lightning_pref.models.adapters import LoraSettings, add_lora
from lightning_pref.models.exports import export
from lightning_pref.models.forward import Layout, Quantity, ResponseLogps, response_logps
from lightning_pref.models.frozen_base import leave_base_out
from lightning_pref.models.quantised import is_quantized
from lightning_pref.modules.group_module import GroupModule, Loading
from lightning_pref.modules.objectives import Measured
from lightning_pref.modules.optimisation import OptimizerSettings


class PolicyModule(GroupModule):
    """A causal language model trained on group batches."""

    def __init__(
        self,
        model: str | PreTrainedModel,
        *,
        metric_names: Sequence[str],
        layout: Layout,
        lora: LoraSettings | None,
        optimizer: OptimizerSettings,
        loading: Loading,
        gradient_checkpointing: bool,
        log_entropy: bool,
    ) -> None:
        super().__init__(
            model,
            metric_names=[*metric_names, "entropy"] if log_entropy else metric_names,
            layout=layout,
            lora=lora,
            optimizer=optimizer,
            loading=loading,
            gradient_checkpointing=gradient_checkpointing,
        )
        self.log_entropy = log_entropy

    @override
    def build_models(self) -> None:
        """Load and adapt the policy."""
        (given,) = self._given
        if not isinstance(given, str) and self.loading.quantization is not None:
            raise ValueError(
                "`loading.quantization` acts on a model given by name, but an object is given. Turn it into 4 bit by "
                "`lightning_pref.models.quantised.quantize(model, settings)`, or give its name."
            )
        policy = self.made_ready(self.load(given) if isinstance(given, str) else given)
        self.policy = policy if self.lora is None else add_lora(policy, self.lora)
        if is_quantized(policy):
            leave_base_out(self, "policy")

    @property
    @override
    def trained(self) -> PreTrainedModel | PeftModel:
        return self.policy

    @override
    def save_pretrained(self, folder: str | Path, tokenizer: PreTrainedTokenizerBase, *, merge: bool = True) -> None:
        """Write the policy as a plain transformers folder, LoRA merged unless `merge` is off."""
        export(self.whole, tokenizer, Path(folder), merge_adapter=merge)

    def policy_logps(self, batch: GroupBatch, want: Collection[Quantity] = ()) -> ResponseLogps:
        """Log-probabilities of every response under the policy, in this module's layout."""
        wanted = {*want, "entropy"} if self.log_entropy else set(want)
        return response_logps(self.policy, batch, layout=self.layout, want=wanted)

    def entropy_of(self, out: ResponseLogps, batch: GroupBatch) -> list[Measured]:
        """The entropy as a token mean, where it is asked for."""
        if out.entropy is None:
            return []
        return [Measured({"entropy": out.entropy}, batch.weights[batch.group_of_response][out.response])]
