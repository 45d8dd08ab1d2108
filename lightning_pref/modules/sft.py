"""Supervised fine-tuning on prompts with their responses."""

from __future__ import annotations

from typing import Literal

from transformers import PreTrainedModel
from typing_extensions import override

from lightning_pref.data.groups import GroupBatch
from lightning_pref.models.adapters import LoraSettings
from lightning_pref.models.forward import Layout
from lightning_pref.modules.group_module import Loading
from lightning_pref.modules.objectives import Measured, StepTerms
from lightning_pref.modules.optimisation import OptimizerSettings
from lightning_pref.modules.policy import PolicyModule


class SFTModule(PolicyModule):
    """Maximises the likelihood of every response; the prompt is never scored, and rows with bad responses are refused.

    Args:
        model: Folder or hub name of a causal language model, `playground:tiny`, `playground:small`, or a model object.
        normalize: `token`: every response token of an update weighs the same; `sequence`: every response does.
        layout: How prompts and responses are laid out for the forward pass; `auto` picks the cheapest.
        lora: Train low-rank adapters instead of all weights.
        optimizer: The optimiser and its schedule.
        loading: How a model given by name is loaded.
        gradient_checkpointing: Recompute activations in the backward pass to save memory.
        log_entropy: Also log the mean entropy of the policy on response tokens.
    """

    def __init__(
        self,
        model: str | PreTrainedModel = "playground:tiny",
        *,
        normalize: Literal["token", "sequence"] = "token",
        layout: Layout = "auto",
        lora: LoraSettings | None = None,
        optimizer: OptimizerSettings = OptimizerSettings(learning_rate=2e-5),  # noqa: B008  # frozen
        loading: Loading = Loading(),  # noqa: B008  # frozen
        gradient_checkpointing: bool = False,
        log_entropy: bool = False,
    ) -> None:
        super().__init__(
            model,
            metric_names=("loss", "logps/response"),
            layout=layout,
            lora=lora,
            optimizer=optimizer,
            loading=loading,
            gradient_checkpointing=gradient_checkpointing,
            log_entropy=log_entropy,
        )
        self.normalize = normalize

    @override
    def terms(self, batch: GroupBatch) -> StepTerms:
        _check_demonstrations(batch)
        out = self.policy_logps(batch)
        weights = batch.weights[batch.group_of_response]
        measured = [Measured({"logps/response": out.logps}, weights), *self.entropy_of(out, batch)]
        if self.normalize == "token":
            return StepTerms(-out.token_logps, weights[out.response], "response_tokens", measured)
        return StepTerms(-out.logps / out.lengths, weights, "responses", measured)


def _check_demonstrations(batch: GroupBatch) -> None:
    """Refuse rows that say that some response is bad: its likelihood would be raised like that of a good one."""
    ranked = [g for g, ranks in enumerate(batch.ranks) if ranks is not None and max(ranks) > 0]
    if ranked or batch.labels is not None:
        raise ValueError(
            f"Row {int(batch.row_ids[ranked[0] if ranked else 0])} has {'ranked responses' if ranked else 'a label'}, but "
            "supervised fine-tuning raises the likelihood of every response, bad ones too. Give demonstrations (`prompt` and "
            "`completion`, `messages`, or `text`) with the good responses only, or train on preferences with the `dpo` recipe."
        )
