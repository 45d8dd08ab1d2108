"""Reward models: trained on pairs, ranked lists, scores, outcomes or steps, alone or as an ensemble on one backbone."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from typing_extensions import override

from lightning_pref.data.groups import GroupBatch, PairSelection
from lightning_pref.losses.ensemble import How, bootstrap_weights
from lightning_pref.losses.reward import implicit_prm, step_bce
from lightning_pref.models.adapters import LoraSettings, add_lora
from lightning_pref.models.backbones import load_tokenizer
from lightning_pref.models.exports import export
from lightning_pref.models.forward import Layout, response_logps
from lightning_pref.models.frozen_base import leave_base_out
from lightning_pref.models.heads import causal_lm_of
from lightning_pref.models.quantised import is_quantized
from lightning_pref.models.reference import Reference
from lightning_pref.models.reward_exports import Member, export_reward_model
from lightning_pref.models.reward_heads import LinearRewardHead, ScoreHead, VerbalizerRewardHead
from lightning_pref.models.reward_members import add_members, member_scores
from lightning_pref.models.reward_models import ResponseScores, ScoreScale, build_reward_model, last_tokens, response_scores
from lightning_pref.modules.group_module import GroupModule, Loading
from lightning_pref.modules.objectives import StepTerms
from lightning_pref.modules.optimisation import OptimizerSettings
from lightning_pref.modules.reward_choice import (
    EnsembleKind,
    HeadKind,
    RewardLossName,
    check_choice,
    check_ensemble,
    check_values,
)
from lightning_pref.modules.reward_reference import RewardReference, digest_of_reference, implicit_reference, save_reference
from lightning_pref.modules.reward_terms import (
    MEAN,
    METRICS,
    SQUARE,
    STD,
    UNCERTAINTY,
    OrdinalThresholds,
    Scored,
    annotated_scores,
    list_terms,
    ordered_pairs,
    ordinal_terms,
    outcome_terms,
    pair_terms,
    regression_terms,
    scored,
    step_terms,
)
from lightning_pref.modules.reward_validation import ScaleSums, ValidationPairs
from lightning_pref.observations import RewardObservation, observe, wants

LabelWords = tuple[str | int, str | int]

SCALE = "score_scale"  # in a checkpoint


class RewardModule(GroupModule):
    """Trains a reward model, which gives a response one number.

    Args:
        model: Folder or hub name of a language model or of a reward model, `playground:tiny`, `playground:small`, or a model
            object, which is taken over.
        loss: `bradley_terry` on pairs, `plackett_luce` on ranked lists, `regression` and `ordinal` on annotated scores,
            `outcome_bce` on responses labelled right or wrong, `step_bce` on labelled steps; `implicit_prm` is `outcome_bce` for
            the head `implicit`.
        head: `linear`: a new head reads the state at the last token. `verbalizer`: the logit of one word less that of another,
            no new weights. `implicit`: `beta` times the log-ratio of a language model to its reference; on pairs that is DPO.
        num_members: Members of an ensemble. A reward model brings its own number of heads; else 1.
        ensemble: What its members are: `heads` on the one backbone, or LoRA `adapters` with a head each, for which the backbone
            runs once each.
        bootstrap: Let every member draw the rows with replacement: a row counts 0, 1, 2, ... times for it, the same in every
            epoch.
        head_seed: Of the weights of new heads, and of what `bootstrap` draws.
        aggregate: How the members' scores become the reward that is logged and published: mean, worst case (`wco`), or mean less
            variance (`uwo`). The members themselves are trained one by one.
        uwo_coefficient: Weight of the variance in `uwo`.
        pairs: Which pairs are made of more than two ranked responses.
        margin_scale: Factor on the margins of the data, by which the chosen score has to be ahead; 0 leaves them aside.
        center: Weight of (chosen + rejected)^2, which keeps scores near 0; 0.01 is common.
        label_smoothing: Share of preferences believed to be flipped, in [0, 0.5).
        top_k: Only the first places of a ranked list count; all if not given.
        levels: The scores that annotators could give, ascending, for `ordinal`.
        label_words: A word that speaks for a response and one against it, or their token ids, for the head `verbalizer`.
        beta: Unit of an implicit reward, in rewards per nat.
        reference: Of an implicit reward: the base under a fresh LoRA adapter, or a frozen copy; `auto` takes the first it can.
        reference_model: Another model as that reference.
        layout: How prompts and responses are laid out for the forward pass; `auto` picks the cheapest.
        lora: Train low-rank adapters, and the head, instead of all weights.
        optimizer: The optimiser and its schedule.
        loading: How a model given by name is loaded.
        gradient_checkpointing: Recompute activations in the backward pass to save memory.
    """

    def __init__(
        self,
        model: str | PreTrainedModel = "playground:tiny",
        *,
        loss: RewardLossName = "bradley_terry",
        head: HeadKind = "linear",
        num_members: int | None = None,
        ensemble: EnsembleKind = "heads",
        bootstrap: bool = False,
        head_seed: int = 0,
        aggregate: How = "mean",
        uwo_coefficient: float = 0.5,
        pairs: PairSelection = "all",
        margin_scale: float = 1.0,
        center: float = 0.0,
        label_smoothing: float = 0.0,
        top_k: int | None = None,
        levels: list[float] | None = None,
        label_words: LabelWords | None = None,
        beta: float = 0.05,
        reference: RewardReference = "auto",
        reference_model: str | None = None,
        layout: Layout = "auto",
        lora: LoraSettings | None = None,
        optimizer: OptimizerSettings = OptimizerSettings(learning_rate=1e-5),  # noqa: B008  # frozen
        loading: Loading = Loading(),  # noqa: B008  # frozen
        gradient_checkpointing: bool = False,
    ) -> None:
        given = {
            "num_members": (num_members, None), "head_seed": (head_seed, 0), "aggregate": (aggregate, "mean"),
            "ensemble": (ensemble, "heads"), "bootstrap": (bootstrap, False),
            "uwo_coefficient": (uwo_coefficient, 0.5), "pairs": (pairs, "all"), "margin_scale": (margin_scale, 1.0),
            "center": (center, 0.0), "label_smoothing": (label_smoothing, 0.0), "top_k": (top_k, None),
            "levels": (levels, None), "label_words": (label_words, None), "beta": (beta, 0.05),
            "reference": (reference, "auto"), "reference_model": (reference_model, None),
        }  # fmt: skip
        changed: Mapping[str, Any] = {
            name: value for name, (value, default) in given.items() if value != default
        }  # Any: any type
        check_choice(loss, head, changed, aggregate=aggregate, num_members=num_members)
        check_ensemble(ensemble, num_members, has_lora=lora is not None, gradient_checkpointing=gradient_checkpointing)
        check_values(
            center=center,
            label_smoothing=label_smoothing,
            top_k=top_k,
            levels=levels,
            beta=beta,
            margin_scale=margin_scale,
            num_members=num_members,
            uwo_coefficient=uwo_coefficient,
            head_seed=head_seed,
        )
        super().__init__(
            model,
            metric_names=METRICS[loss],
            layout=layout,
            lora=lora,
            optimizer=optimizer,
            loading=loading,
            gradient_checkpointing=gradient_checkpointing,
        )
        self.loss = loss
        self.head_kind = head
        self.num_members = num_members
        self.ensemble: EnsembleKind = ensemble
        self.bootstrap = bootstrap
        self.head_seed = head_seed
        self.aggregate: How = aggregate
        self.uwo_coefficient = uwo_coefficient
        self.pairs: PairSelection = pairs
        self.pair_options = {"margin_scale": margin_scale, "center": center, "label_smoothing": label_smoothing}
        self.top_k = top_k
        self.levels = levels
        self.label_words = label_words
        self.beta = beta
        self.reference_kind: RewardReference = reference
        self.reference_model = reference_model
        self.thresholds = OrdinalThresholds(len(levels)) if levels is not None else None
        self.reference: Reference | None = None
        self._reference_digest = ""
        self.head: ScoreHead = LinearRewardHead()
        self.val_pairs = ValidationPairs()
        self.val_scale = ScaleSums()
        self._final_ids: Tensor | None = None  # [V] bool, tokens that end a response
        self._levels_checked = False

    @property
    @override
    def trained(self) -> PreTrainedModel | PeftModel:
        return self.reward_model

    @override
    def build_models(self) -> None:
        (given,) = self._given
        is_linear = self.head_kind == "linear"
        model = self.made_ready(self._with_head(given) if is_linear else self.load(given) if isinstance(given, str) else given)
        if is_linear:
            # That of the reward model it starts from; the first validation tells its own.
            ScoreScale.forget(model.config)
            if self.ensemble == "heads":
                self.num_members = int(model.config.num_labels or 1)
            if self.aggregate != "mean" and self.num_members == 1:
                raise ValueError(
                    f"`aggregate: {self.aggregate}` compares the members of an ensemble, but the model has one head. Set "
                    "`num_members`, or leave `aggregate` out."
                )
        if self.label_words is not None:
            self.head = _verbalizer(self.label_words, given)
        self.reward_model: PreTrainedModel | PeftModel = self._adapted(model)
        if is_quantized(self.reward_model):
            leave_base_out(self, "reward_model")
        if self.head_kind == "implicit":
            other = None if self.reference_model is None else self.load(self.reference_model)
            self.reference = implicit_reference(self.reference_kind, self.reward_model, other_model=other, layout=self.layout)
            self._reference_digest = digest_of_reference(self.reference, self.reward_model)

    def _with_head(self, model: str | PreTrainedModel) -> PreTrainedModel:
        options = self.loading.dense("a classifier")
        num_heads = 1 if self.ensemble == "adapters" else self.num_members
        return build_reward_model(model, num_members=num_heads, head_seed=self.head_seed, **options)

    def _adapted(self, model: PreTrainedModel) -> PreTrainedModel | PeftModel:
        if self.lora is None:
            return model
        if self.ensemble == "adapters":
            assert self.num_members is not None, "`check_ensemble` wants members"
            return add_members(model, self.lora, self.num_members, head_seed=self.head_seed)
        return add_lora(model, self.lora, task="SEQ_CLS" if self.head_kind == "linear" else "CAUSAL_LM")

    def scores(self, batch: GroupBatch) -> ResponseScores:
        """Scores of every response by every member, and at every token where the loss is one of steps."""
        if self.head_kind == "implicit":
            assert self.reference is not None
            out = response_logps(self.reward_model, batch, layout=self.layout)
            rewards = self.beta * (out.logps - self.reference.logps(batch))
            return ResponseScores(rewards[None], out.lengths, out.response, None, None, out.layout)
        want: tuple[Literal["tokens"], ...] = ("tokens",) if self.loss == "step_bce" else ()
        if self.ensemble == "adapters":
            assert isinstance(self.reward_model, PeftModel)
            return member_scores(self.reward_model, batch, layout=self.layout, want=want)
        return response_scores(self.reward_model, batch, layout=self.layout, want=want, head=self.head)

    def rewards(self, batch: GroupBatch) -> Tensor:
        """The reward of every response, of all members together, [R] float32."""
        return self.scores(batch).rewards(self.aggregate, coefficient=self.uwo_coefficient)

    @override
    def terms(self, batch: GroupBatch) -> StepTerms:
        found = scored(self.scores(batch), batch, self.aggregate, self.uwo_coefficient, self._drawn(batch))
        self._remember_ends(batch)
        self._publish(found)
        if not self.training:
            self.val_scale.add(found.out.members, found.weights)
            seen = ordered_pairs(batch, self.pairs)
            if seen is not None:
                self.val_pairs.add(found.rewards, seen, batch)
        return self._terms_of[self.loss](found)

    def _drawn(self, batch: GroupBatch) -> Tensor | None:
        """How often each row counts for each member; in validation all count once."""
        if not self.bootstrap or not self.training:
            return None
        return bootstrap_weights(batch.row_ids, self.num_members or 1, seed=self.head_seed)

    @property
    def _terms_of(self) -> Mapping[RewardLossName, Callable[[Scored], StepTerms]]:
        return {
            "bradley_terry": lambda found: pair_terms(found, found.batch.pairs(self.pairs), **self.pair_options),
            "plackett_luce": lambda found: list_terms(found, top_k=self.top_k),
            "regression": regression_terms,
            "ordinal": self._ordinal_terms,
            "outcome_bce": lambda found: outcome_terms(found, lambda scores, labels: step_bce(scores, labels.long())),
            "implicit_prm": lambda found: outcome_terms(found, self._implicit_losses),
            "step_bce": lambda found: step_terms(found, self.aggregate, self.uwo_coefficient),
        }

    def _implicit_losses(self, rewards: Tensor, labels: Tensor) -> Tensor:
        # The rewards are scaled already, and the reference is in them.
        return implicit_prm(rewards, torch.zeros_like(rewards), labels, beta=1.0)

    def _ordinal_terms(self, found: Scored) -> StepTerms:
        assert self.levels is not None and self.thresholds is not None, "`check_choice` wants levels"
        scores = annotated_scores(found.batch)
        known = torch.tensor(self.levels, dtype=scores.dtype, device=scores.device)
        places = torch.bucketize(scores, known).clamp(max=len(self.levels) - 1)
        # Looked at in the first batch after each change of mode, to spare the device a stop in every step.
        if not self._levels_checked and not torch.equal(known[places], scores):
            wrong = sorted(set(scores.tolist()) - set(known.tolist()))
            raise ValueError(f"The data has the score {wrong[0]:g}, which is not among `levels` {self.levels}. Name every level.")
        self._levels_checked = True
        return ordinal_terms(found, places, self.thresholds())

    def _publish(self, found: Scored) -> None:
        """What callbacks may want to see; rows of weight 0 only fill a batch and are left out."""
        if not wants(self, RewardObservation):
            return
        batch = found.batch
        counts = found.weights > 0
        if not bool(counts.any()):
            return
        observe(
            self,
            RewardObservation(
                rewards=found.rewards[counts],
                prompt_ids=batch.row_ids[batch.group_of_response][counts],
                lengths=batch.response_lengths[counts],
                gold=None if batch.scores is None else batch.scores[counts],
            ),
        )

    @torch.no_grad()
    def _remember_ends(self, batch: GroupBatch) -> None:
        """Which tokens end responses: none of them can be the padding token of the export."""
        if self._final_ids is None:
            embeddings = self.reward_model.get_input_embeddings().weight
            assert isinstance(embeddings, Tensor)
            self._final_ids = torch.zeros(embeddings.shape[0], dtype=torch.bool, device=batch.input_ids.device)
        self._final_ids[batch.input_ids[batch.response >= 0][last_tokens(batch)]] = True

    @override
    def reported(self, means: Mapping[str, Tensor]) -> dict[str, Tensor]:
        values = {name: value for name, value in means.items() if name != SQUARE}
        # The population's: rewards are many, and a single one has no spread.
        values[STD] = (means[SQUARE] - means[MEAN].square()).clamp(min=0.0).sqrt()
        if self.num_members in (None, 1):
            del values[UNCERTAINTY]
        return values

    @override
    def on_validation_epoch_start(self) -> None:
        # What was scored in eval mode outside of a validation has no part in it.
        self.val_pairs, self.val_scale = ValidationPairs(), ScaleSums()

    @override
    def on_validation_epoch_end(self) -> None:
        super().on_validation_epoch_end()
        values = self.val_pairs.compute(self.device)
        scale = self.val_scale.compute(self.num_members or 1, self.device)
        if self.head_kind == "linear" and not self.trainer.sanity_checking:
            self._set_scale(scale)
        self.log_dict({f"val/{name}": value.float() for name, value in values.items()}, sync_dist=True)

    def _set_scale(self, scale: ScoreScale | None) -> None:
        config = causal_lm_of(self.reward_model).config
        if scale is None:
            ScoreScale.forget(config)
        else:
            scale.remember(config)

    @override
    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:  # Any: Lightning's own
        super().on_save_checkpoint(checkpoint)
        scale = ScoreScale.recall(causal_lm_of(self.reward_model).config)
        checkpoint[SCALE] = None if scale is None else [values.tolist() for values in scale]

    @override
    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:  # Any: Lightning's own
        super().on_load_checkpoint(checkpoint)
        saved = checkpoint.get(SCALE)
        self._set_scale(None if saved is None else ScoreScale(*map(torch.tensor, saved)))

    @override
    def train(self, mode: bool = True) -> RewardModule:
        """Change the mode, which also brings other batches."""
        self._levels_checked = False
        return super().train(mode)

    @override
    def save_pretrained(
        self, folder: str | Path, tokenizer: PreTrainedTokenizerBase, *, merge: bool = True, member: Member = "all"
    ) -> None:
        """Write a folder that `AutoModelForSequenceClassification` loads, with the same scores; see `export_reward_model`.

        An implicit reward is a language model, and is written as one, with what makes it a reward beside it where the models
        were given by name, or are in 4 bit.
        """
        if self.head_kind == "implicit":
            export(self.whole, tokenizer, folder, merge_adapter=merge)
            if merge:
                save_reference(
                    Path(folder),
                    tokenizer,
                    reference=self.reference,
                    trained=self.reward_model,
                    name=self.reference_model or self._given[0],
                    digest=self._reference_digest,
                    beta=self.beta,
                    loading=self.loading,
                )
            return
        verbalizer = self.head if isinstance(self.head, VerbalizerRewardHead) else None
        ends = None if self._final_ids is None else self._final_ids.cpu()
        export_reward_model(
            self.whole, tokenizer, folder, merge_adapter=merge, member=member, verbalizer=verbalizer, final_ids=ends
        )


def _verbalizer(words: LabelWords, model: str | PreTrainedModel) -> VerbalizerRewardHead:
    positive, negative = words
    if isinstance(positive, int) and isinstance(negative, int):
        return VerbalizerRewardHead(positive=positive, negative=negative)
    if not isinstance(model, str):
        raise ValueError("`label_words` are looked up in the tokenizer of a model given by name; for an object give token ids.")
    return VerbalizerRewardHead.from_words(load_tokenizer(model), str(positive), str(negative))
