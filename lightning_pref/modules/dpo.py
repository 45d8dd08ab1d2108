"""Direct preference optimisation with every loss of the family, against any reference."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from lightning.fabric.utilities.warnings import PossibleUserWarning
from torch import Tensor, nn
from transformers import PreTrainedModel
from typing_extensions import override

from lightning_pref.data.groups import GroupBatch, Pairs, PairSelection
from lightning_pref.domains import check_range
from lightning_pref.functional import segment_sum
from lightning_pref.losses import UNPAIRED_LOSSES, RunningMean, kto_baseline
from lightning_pref.models.adapters import LoraSettings
from lightning_pref.models.forward import Layout, Quantity, ResponseLogps
from lightning_pref.models.pair_scores import counted_pairs, hidden_of_pairs, logps_of_pairs
from lightning_pref.models.reference import EmaReference, EmaSettings, Reference, summed_logps, token_logps
from lightning_pref.models.reference_choice import ReferenceKind, resolve_kind, resolve_reference
from lightning_pref.modules.group_module import Loading, sum_over_ranks
from lightning_pref.modules.loss_choice import LossKind, choose_loss, coupled_losses
from lightning_pref.modules.objectives import (
    LIKELIHOOD_METRICS,
    PAIR_METRICS,
    RESPONSE_METRICS,
    PairObjective,
    StepTerms,
    forget_terms,
    group_terms,
    unpaired_terms,
)
from lightning_pref.modules.optimisation import OptimizerSettings
from lightning_pref.modules.policy import PolicyModule
from lightning_pref.modules.reference_pass import cached_references
from lightning_pref.observations import PairHiddenObservation, PairObservation, observe, wants

METRICS: Mapping[LossKind, tuple[str, ...]] = {
    "pair": PAIR_METRICS,
    "unpaired": RESPONSE_METRICS,
    "forget": LIKELIHOOD_METRICS,
    "group": LIKELIHOOD_METRICS,
}


class DPOModule(PolicyModule):
    """Trains a policy on preferences: pairs, ranked lists, or single labelled responses, by the kind of the loss.

    Args:
        model: Folder or hub name of a causal language model, `playground:tiny`, `playground:small`, or a model object.
        loss: Name of a loss (docs/losses.md), or several with their weights: `{sigmoid: 0.8, bco_pair: 0.2, sft: 1.0}`.
        beta: Strength of the tie to the reference; the loss's own default if not given.
        loss_options: Further options of the loss; of a mix, options by the name of the loss.
        reference: What the policy is compared with. `auto`: nothing where the loss needs nothing, the base model under a
            fresh LoRA adapter, else a frozen copy. `cache`: log-probabilities computed once and kept on disk.
        reference_model: A model other than the policy's start as the reference.
        ema: Let the reference follow the policy (TR-DPO).
        reference_cache: Folder of the disk cache; below the data's cache folder if not given.
        pairs: Which pairs are made of more than two ranked responses.
        tail_weight: Weight of tokens beyond the length of the shorter response (LD-DPO), in [0, 1]; 1 is the plain sum.
        weigh_by_policy: Weigh pairs by how likely the policy itself would say them (WPO).
        retain_weight: Weight of the likelihood of responses to keep, for `npo` and `simnpo`.
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
        loss: str | dict[str, float] = "sigmoid",
        beta: float | None = None,
        loss_options: dict[str, Any] | None = None,  # Any: each loss has options of its own
        reference: ReferenceKind = "auto",
        reference_model: str | None = None,
        ema: EmaSettings | None = None,
        reference_cache: str | None = None,
        pairs: PairSelection = "all",
        tail_weight: float = 1.0,
        weigh_by_policy: bool = False,
        retain_weight: float = 1.0,
        layout: Layout = "auto",
        lora: LoraSettings | None = None,
        optimizer: OptimizerSettings = OptimizerSettings(),  # noqa: B008  # frozen
        loading: Loading = Loading(),  # noqa: B008  # frozen
        gradient_checkpointing: bool = False,
        log_entropy: bool = False,
    ) -> None:
        chosen = choose_loss(loss, beta, loss_options or {})
        super().__init__(
            model,
            metric_names=METRICS[chosen.kind],
            layout=layout,
            lora=lora,
            optimizer=optimizer,
            loading=loading,
            gradient_checkpointing=gradient_checkpointing,
            log_entropy=log_entropy,
        )
        self.kind = chosen.kind
        self.loss = chosen.loss
        self.options = chosen.options
        self.needs_reference = chosen.needs_reference
        check_range("tail_weight", tail_weight, at_least=0, at_most=1)
        check_range("retain_weight", retain_weight, at_least=0)
        if chosen.kind != "pair":
            _refuse_pair_settings(str(loss), pairs=pairs, tail_weight=tail_weight, weigh_by_policy=weigh_by_policy)
        if weigh_by_policy and (coupled := coupled_losses(chosen)):
            raise ValueError(
                f"`weigh_by_policy` weighs single pairs, but {coupled[0]!r} sorts the pairs of a batch, so that a loss belongs "
                "to no one pair. Leave it out, or choose another loss."
            )
        if chosen.kind != "forget" and retain_weight != 1.0:
            raise ValueError(f"`retain_weight` acts on 'npo' and 'simnpo' only; with the loss {loss!r} it has no effect.")
        if loss == "kto" and reference == "cache":
            raise ValueError(
                "KTO's baseline scores prompts with unrelated responses, which no cache of the data set holds; use the "
                "reference 'copy' or 'adapter'."
            )
        if tail_weight != 1.0 and reference == "cache":
            raise ValueError(
                "`tail_weight` needs the reference's log-probability of every token, but a cache holds sums; use the "
                "reference 'copy' or 'adapter'."
            )
        self.objective = PairObjective(
            loss=chosen.loss,
            options=chosen.options,
            selection=pairs,
            tail_weight=tail_weight,
            weigh_by_policy=weigh_by_policy,
        )
        self.retain_weight = retain_weight
        self.reference_kind = reference
        self.reference_model = reference_model
        self.ema = ema
        self.reference_cache = reference_cache
        self.reference: Reference | None = None
        # A cache holds one data set, so validation has one of its own.
        self.val_reference: Reference | None = None
        self.bco_threshold = BcoThreshold() if loss == "bco" else None

    @override
    def build_models(self) -> None:
        super().build_models()
        # A frozen reference stays in eval mode on purpose; Lightning would advise against it in every run.
        warnings.filterwarnings("ignore", message=r"Found \d+ module\(s\) in eval mode", category=PossibleUserWarning)
        other = self.reference_model is not None
        kind = resolve_kind(
            self.reference_kind, self.policy, needs_reference=self.needs_reference, other_model=other, ema=self.ema
        )
        other_model = self.load(self.reference_model) if self.reference_model is not None else None
        score = summed_logps if self.objective.tail_weight == 1.0 else token_logps
        bound = partial(score, layout=self.layout)
        if kind == "cache":
            self.reference, self.val_reference = cached_references(
                self.trainer, other_model or self.policy, folder=self.reference_cache, score=bound
            )
            return
        self.reference = resolve_reference(
            self.reference_kind,
            self.policy,
            needs_reference=self.needs_reference,
            other_model=other_model,
            ema=self.ema,
            score=bound,
        )

    def reference_logps(self, batch: GroupBatch) -> Tensor | None:
        """Log-probabilities under the reference, [R] summed ([N] by token where tails are weighed); `None` without one."""
        reference = self.reference if self.training or self.val_reference is None else self.val_reference
        return None if reference is None else reference.logps(batch)

    @override
    def terms(self, batch: GroupBatch) -> StepTerms:
        out = self.policy_logps(batch, self._wanted())
        reference = self.reference_logps(batch)
        terms = self._terms(out, reference, batch)
        return terms._replace(measured=[*terms.measured, *self.entropy_of(out, batch)])

    def _terms(self, out: ResponseLogps, reference: Tensor | None, batch: GroupBatch) -> StepTerms:
        if self.kind == "pair":
            pairs = batch.pairs(self.objective.selection)
            pair = self.objective.logps(out, reference, pairs)
            self._publish(out, reference, pairs, batch)
            return self.objective.terms(out, pair, pairs)
        name = str(self.loss)
        if self.kind == "group":
            return group_terms(name, out, batch, **self.options)
        if self.kind == "forget":
            return forget_terms(name, out, reference, batch, retain_weight=self.retain_weight, **self.options)
        assert reference is not None, "every unpaired loss has a reference"
        return unpaired_terms(name, out, reference, batch, **self.options, **self._measured_option(out, reference, batch))

    def _wanted(self) -> set[Quantity]:
        wanted: set[Quantity] = {"collision"} if self.objective.weigh_by_policy else set()
        return wanted | {"hidden"} if self.kind == "pair" and wants(self, PairHiddenObservation) else wanted

    def _publish(self, out: ResponseLogps, reference: Tensor | None, pairs: Pairs, batch: GroupBatch) -> None:
        """What callbacks may want to see: plain sums, also where the loss weighs tails."""
        if not (wants(self, PairObservation) or wants(self, PairHiddenObservation)):
            return
        pairs = counted_pairs(pairs)
        if not len(pairs.group):
            return
        if reference is not None and self.objective.tail_weight != 1.0:
            reference = segment_sum(reference, out.response, batch.num_responses)
        observe(self, logps_of_pairs(out, pairs, batch, reference))
        if out.hidden is not None:
            observe(self, hidden_of_pairs(out, pairs, batch))

    def _measured_option(self, out: ResponseLogps, reference: Tensor, batch: GroupBatch) -> dict[str, Tensor]:
        """The option of an unpaired loss that is measured on the batch, the same on every rank."""
        if self.loss == "kto":
            return {"baseline": self._kto_baseline(batch)}
        if self.loss == "bco":
            return {"delta": self._bco_threshold(out, reference, batch)}
        return {}

    @torch.no_grad()
    def _kto_baseline(self, batch: GroupBatch) -> Tensor:
        """Mean log-ratio of unrelated prompts and responses over all ranks; a batch of one prompt has none to add."""
        # The forward also runs where it counts nothing: under FSDP every rank has to come by.
        unrelated = batch.mismatched() if batch.num_groups > 1 else batch
        reference = self.reference_logps(unrelated)
        assert reference is not None
        weights = unrelated.weights[unrelated.group_of_response] * float(batch.num_groups > 1)
        log_ratios = self.policy_logps(unrelated).logps - reference
        log_ratio_sum, count = sum_over_ranks(torch.stack([(weights * log_ratios).sum(), weights.sum()]))
        return kto_baseline(log_ratio_sum, count.clamp(min=1.0))

    @torch.no_grad()
    def _bco_threshold(self, out: ResponseLogps, reference: Tensor, batch: GroupBatch) -> Tensor:
        """Mean reward of everything trained on so far, this batch of all ranks included."""
        assert self.bco_threshold is not None
        if self.training:
            weights = batch.weights[batch.group_of_response]
            beta = self.options.get("beta", UNPAIRED_LOSSES["bco"].options["beta"])
            rewards = beta * (out.logps - reference)
            self.bco_threshold.update(*sum_over_ranks(torch.stack([(weights * rewards).sum(), weights.sum()])))
        return self.bco_threshold.mean.clone()

    @override
    def after_update(self) -> None:
        if isinstance(self.reference, EmaReference):
            self.reference.after_update(self.policy)


class BcoThreshold(nn.Module):
    """BCO's mean reward of everything trained on so far: part of the checkpoint, in float32 under every precision."""

    mean: Tensor  # []
    num_seen: Tensor  # []

    def __init__(self) -> None:
        super().__init__()
        for name, value in RunningMean.empty()._asdict().items():
            self.register_buffer(name, value)

    def update(self, total: Tensor, count: Tensor) -> None:
        """Add `count` rewards that add up to `total`, over all ranks."""
        seen = RunningMean(self.mean, self.num_seen).updated(total, count)
        self.mean.copy_(seen.mean)
        self.num_seen.copy_(seen.num_seen)

    @override
    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> BcoThreshold:
        """Go along to another device, not to another dtype."""
        super()._apply(lambda tensor: tensor.to(fn(tensor).device), recurse)  # type: ignore[no-untyped-call]
        return self


def _refuse_pair_settings(loss: str, *, pairs: PairSelection, tail_weight: float, weigh_by_policy: bool) -> None:
    defaults = {"pairs": (pairs, "all"), "tail_weight": (tail_weight, 1.0), "weigh_by_policy": (weigh_by_policy, False)}
    for name, (value, default) in defaults.items():
        if value != default:
            raise ValueError(
                f"`{name}` acts on pairs, but the loss {loss!r} takes single responses or whole prompts; with it the setting "
                "has no effect. Leave it out, or choose a pairwise loss."
            )
