"""Reinforcement learning from rewards: PPO, RLOO, GRPO and their kin, REINFORCE++, and online DPO."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Sequence
from typing import Any, Literal

import torch
from lightning.fabric.utilities.warnings import PossibleUserWarning
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR
from transformers import PreTrainedModel
from typing_extensions import override

from lightning_pref.data.groups import GroupBatch, PromptGroup
from lightning_pref.domains import check_range
from lightning_pref.measures.means import WeightedMeans
from lightning_pref.models.adapters import LoraSettings, add_lora
from lightning_pref.models.backbones import evaluating
from lightning_pref.models.forward import Layout, Quantity, ResponseLogps, response_logps
from lightning_pref.models.heads import backbone_of
from lightning_pref.models.reference import EmaReference, EmaSettings, Reference
from lightning_pref.models.reference_choice import resolve_reference
from lightning_pref.modules.group_module import Loading, sum_over_ranks
from lightning_pref.modules.objectives import PAIR_METRICS, StepTerms
from lightning_pref.modules.optimisation import OptimizerSettings
from lightning_pref.modules.policy import PolicyModule
from lightning_pref.modules.rlhf_advantages import Evidence, estimate
from lightning_pref.modules.rlhf_collecting import log_ratios, paired_responses, shaped_scores, steer
from lightning_pref.modules.rlhf_pairs import choose_pair_loss
from lightning_pref.modules.rlhf_report import RolloutMeans, show_samples
from lightning_pref.modules.rlhf_settings import (
    AdvantageSettings,
    Algorithm,
    KLSettings,
    ScoreSettings,
    SurrogateSettings,
    ValueSettings,
    changed_settings,
    check_settings,
    check_task,
    resolve,
)
from lightning_pref.modules.rlhf_state import RolloutState, TokenScore
from lightning_pref.modules.rlhf_terms import (
    CLIP_FRACTION,
    LOGP_DIFFERENCE,
    POLICY_METRICS,
    VALUE_METRICS,
    PolicyObjective,
    pair_terms,
    response_kl,
    value_terms,
)
from lightning_pref.modules.rlhf_validation import HeldOutMeans, held_out_kl
from lightning_pref.modules.value import OwnTrunk, SharedTrunk, value_classifier, with_rate_factor
from lightning_pref.observations import observe
from lightning_pref.rollouts.collecting import Collected, chunks, sample_and_score
from lightning_pref.rollouts.experience import Experience, ExperienceBatch, Task, TokenRecord
from lightning_pref.rollouts.validation import HeldOutTask

RolloutReference = Literal["auto", "copy", "adapter", "ema", "none"]


class RLHFModule(PolicyModule):
    """Trains a policy on the rewards of its own samples, which `RolloutData` asks it for.

    Args:
        model: Folder or hub name of a causal language model, `playground:tiny`, `playground:small`, or a model object.
        algorithm: `grpo`, `rloo`, `ppo` (with a value function), `reinforce_pp`, or `online_dpo` on pairs that the rewards make.
        surrogate: Loss of the policy: ratio, clipping, aggregation.
        kl: Tie to the reference.
        advantage: How much better than expected.
        value: Value function of `ppo`.
        scores: What happens to the rewards before they are trained on.
        pair_loss: Pairwise loss of `online_dpo`, by name, or several with their weights; `inpo` plays against the last policy.
        beta: Strength of the tie to the reference in `pair_loss`; the loss's own default if not given.
        loss_options: Further options of `pair_loss`.
        reference: What the policy is compared with. `auto`: nothing where nothing is, the base model under a fresh LoRA adapter,
            else a frozen copy.
        reference_model: A model other than the policy's start as the reference.
        ema: Let the reference follow the policy.
        entropy_bonus: Weight of the entropy that is added to the objective.
        log_samples_every: Rollouts between two tables of samples in TensorBoard; 0 for none.
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
        algorithm: Algorithm = "grpo",
        surrogate: SurrogateSettings = SurrogateSettings(),  # noqa: B008  # frozen
        kl: KLSettings = KLSettings(),  # noqa: B008  # frozen
        advantage: AdvantageSettings = AdvantageSettings(),  # noqa: B008  # frozen
        value: ValueSettings = ValueSettings(),  # noqa: B008  # frozen
        scores: ScoreSettings = ScoreSettings(),  # noqa: B008  # frozen
        pair_loss: str | dict[str, float] = "sigmoid",
        beta: float | None = None,
        loss_options: dict[str, Any] | None = None,  # Any: each loss has options of its own
        reference: RolloutReference = "auto",
        reference_model: str | None = None,
        ema: EmaSettings | None = None,
        entropy_bonus: float = 0.0,
        log_samples_every: int = 50,
        layout: Layout = "auto",
        lora: LoraSettings | None = None,
        optimizer: OptimizerSettings = OptimizerSettings(schedule="constant", warmup=0.0),  # noqa: B008  # frozen
        loading: Loading = Loading(),  # noqa: B008  # frozen
        gradient_checkpointing: bool = False,
        log_entropy: bool = True,
    ) -> None:
        given = {
            "surrogate": surrogate, "kl": kl, "advantage": advantage, "value": value, "entropy_bonus": (entropy_bonus, 0.0),
            "pair_loss": (pair_loss, "sigmoid"), "beta": (beta, None), "loss_options": (loss_options, None),
        }  # fmt: skip
        changed = changed_settings(given)
        check_range("entropy_bonus", entropy_bonus)
        check_range("log_samples_every", log_samples_every, at_least=0)
        check_settings(algorithm, changed, surrogate, kl, scores, value)
        resolved = resolve(algorithm, surrogate, kl)
        pairs = choose_pair_loss(pair_loss, beta, loss_options or {}) if algorithm == "online_dpo" else None
        needs_reference = resolved.kl_coefficient > 0 if pairs is None else pairs.needs_reference
        # One that was asked for by name is there to be watched, where nothing ties the policy to it.
        has_reference = needs_reference or reference not in ("auto", "none") or ema is not None or reference_model is not None
        names = [*(POLICY_METRICS if pairs is None else (*PAIR_METRICS, LOGP_DIFFERENCE))]
        names += ["kl"] * has_reference + [CLIP_FRACTION] * (pairs is None and surrogate.form == "clip")
        names += VALUE_METRICS if algorithm == "ppo" else ()
        super().__init__(
            model,
            metric_names=names,
            layout=layout,
            lora=lora,
            optimizer=optimizer,
            loading=loading,
            gradient_checkpointing=gradient_checkpointing,
            log_entropy=log_entropy,
        )
        self.algorithm: Algorithm = algorithm
        self._changed = changed
        self.settings = resolved
        self.advantage = advantage
        self.value_settings = value
        self.scores = scores
        self.pairs = None if pairs is None else pairs.objective
        self.objective = PolicyObjective(
            settings=surrogate,
            resolved=resolved,
            kl_estimator=kl.estimator,
            kl_gradient=kl.gradient,
            entropy_bonus=entropy_bonus,
        )
        self.is_adaptive = kl.target is not None
        self.state = RolloutState(kl.controller(resolved.kl_coefficient))
        self.needs_reference = needs_reference
        self.has_reference = has_reference
        self.reference_kind: RolloutReference = reference
        self.reference_model = reference_model
        self.ema = ema
        self.log_samples_every = log_samples_every
        self.reference: Reference | None = None
        self.token_score = TokenScore(layout)
        self.value: OwnTrunk | SharedTrunk | None = None
        self.rollout_means = RolloutMeans(has_values=algorithm == "ppo")
        self.held_out_means = HeldOutMeans()
        self._num_rollouts = 0  # since the last report

    @override
    def build_models(self) -> None:
        # Before the policy takes a model object over and adapts it.
        value = self._built_value() if self.algorithm == "ppo" else None
        super().build_models()
        # A frozen reference stays in eval mode on purpose; Lightning would advise against it in every run.
        warnings.filterwarnings("ignore", message=r"Found \d+ module\(s\) in eval mode", category=PossibleUserWarning)
        self.reference = resolve_reference(
            self.reference_kind,
            self.policy,
            needs_reference=self.needs_reference,
            other_model=None if self.reference_model is None else self.load(self.reference_model),
            ema=self.ema,
            score=self.token_score,
        )
        if self.algorithm == "ppo":
            hidden_size = int(backbone_of(self.policy).config.get_text_config().hidden_size)
            self.value = SharedTrunk(hidden_size) if value is None else value

    def _built_value(self) -> OwnTrunk | None:
        if self.value_settings.trunk == "shared":
            return None
        (given,) = self._given
        classifier = self.made_ready(value_classifier(self.value_settings.model or given, self.loading))
        adapted = classifier if self.lora is None else add_lora(classifier, self.lora, task="SEQ_CLS")
        return OwnTrunk(adapted, self.layout)

    @override
    def configure_optimizers(self) -> OptimizerLRScheduler:
        made: Any = super().configure_optimizers()  # Any: the dictionary of `GroupModule`
        if self.value is not None and self.value_settings.rate_factor != 1.0:
            with_rate_factor(made["optimizer"], self.value, self.value_settings.rate_factor)
            shape = made["lr_scheduler"]["scheduler"].lr_lambdas[0]
            made["lr_scheduler"]["scheduler"] = LambdaLR(made["optimizer"], shape)
        return made  # type: ignore[no-any-return]

    def total(self, values: Tensor) -> Tensor:
        """Sum over all ranks, on every one of them."""
        return sum_over_ranks(values.to(self.device)).to(values.device)

    @override
    def policy_logps(self, batch: GroupBatch, want: Collection[Quantity] = ()) -> ResponseLogps:
        """Log-probabilities of every response under the tempered policy, in this module's layout."""
        return response_logps(self.policy, batch, layout=self.layout, want=want, temperature=self.token_score.temperature)

    def collect(self, task: Task) -> Experience:
        """One rollout: sample, score, and work out what the updates on it need. Every rank is called, equally often."""
        return self.run_whole(lambda: self._collect(task))

    def _collect(self, task: Task) -> Experience:
        check_task(self.algorithm, self.advantage, self._changed, task)
        self.token_score.temperature = task.instruments.sampling.temperature
        with torch.no_grad(), self.trainer.precision_plugin.forward_context():
            found = sample_and_score(self.policy, task)
            scores = shaped_scores(found, self.scores, self.state, self.total)
            self._report(found, task)
            if self.pairs is not None:
                self._publish(found, task)
                return self._pair_experience(found, scores, task)
            tokens = self._remember(found.answers.groups, found.sampled_logps, task)
            self._publish(found, task, tokens.ref_logps)
            needs_kl = self._kl_in_reward or self.is_adaptive
            kl = log_ratios(tokens) if needs_kl else None
            evidence = Evidence(
                scores=scores,
                response=found.response,
                prompt_ids=found.row_of_response,
                kl=kl if self._kl_in_reward else None,
                kl_coefficient=self.state.kl_coefficient.clone(),
                values=tokens.values,
            )
            made = estimate(self.algorithm, self.advantage, evidence, self.total)
            if self.is_adaptive and kl is not None:
                steer(self.state, kl, found, self.total)
        tokens = tokens._replace(advantages=made.advantages, returns=made.returns)
        if tokens.values is not None and made.returns is not None:
            self.rollout_means.add_values(tokens.values, made.returns, found.weights[found.response])
        weights = found.weights * found.ended if self.scores.skip_unfinished else found.weights
        return Experience(
            groups=found.answers.groups, tokens=tokens, weights=weights.cpu(), temperature=self.token_score.temperature
        )

    @property
    def _kl_in_reward(self) -> bool:
        return self.settings.kl_place == "reward" and self.settings.kl_coefficient > 0

    def _remember(self, groups: Sequence[PromptGroup], sampled_logps: Tensor, task: Task) -> TokenRecord:
        """Log-probs and values of every token before the first update, by the forward that trains."""
        # Before the only update of a rollout the policy is the one that sampled: the update's own forward tells.
        once = task.plan.num_updates == 1 and not self._kl_in_reward and not self.is_adaptive
        wants_hidden = isinstance(self.value, SharedTrunk)
        parts: dict[str, list[Tensor]] = {"old_logps": [], "ref_logps": [], "values": []}
        with evaluating(self):
            for batch in chunks(groups, task.plan.num_parts, self.device):
                out = None
                if wants_hidden or not once:
                    out = self.policy_logps(batch, {"hidden"} if wants_hidden else ())
                    parts["old_logps"].append(out.token_logps)
                if self.reference is not None:
                    parts["ref_logps"].append(self.reference.logps(batch))
                if self.value is not None:
                    parts["values"].append(self.value(batch, out))
        joined = {name: torch.cat(values) for name, values in parts.items() if values}
        return TokenRecord(sampled_logps=sampled_logps, **joined)

    def _pair_experience(self, found: Collected, scores: Tensor, task: Task) -> Experience:
        pairs = paired_responses(found, scores, seed=task.seed)
        return Experience(
            groups=pairs.groups,
            tokens=self._remember(pairs.groups, pairs.sampled_logps, task),
            weights=pairs.weights,
            temperature=self.token_score.temperature,
            keeps_groups=True,
        )

    @override
    def training_step(self, batch: ExperienceBatch, batch_idx: int) -> Tensor:  # type: ignore[override]  # experience, not rows
        self.token_score.temperature = batch.temperature
        out = self.policy_logps(batch.groups, self._wanted())
        terms = self._policy_terms(out, batch)
        alive = batch.weights[out.response]
        self.train_means.update({"loss": terms.losses}, terms.weights)
        if out.entropy is not None and self.log_entropy:
            self.train_means.update({"entropy": out.entropy}, alive)
        if batch.tokens.ref_logps is not None:
            self.train_means.update({"kl": response_kl(out, batch)}, batch.weights)
        loss = self._share(terms, batch)
        if self.value is not None:
            missed = value_terms(self.value(batch.groups, out), out.response, batch, clip=self.value_settings.clip)
            self._measure(missed)
            loss = loss + self.value_settings.coefficient * self._share(missed, batch)
        return loss

    def _policy_terms(self, out: ResponseLogps, batch: ExperienceBatch) -> StepTerms:
        if self.pairs is not None:
            terms = pair_terms(self.pairs, out, batch)
        else:
            terms = self.objective.terms(out, batch, self.state.kl_coefficient)
        self._measure(terms)
        return terms

    def _measure(self, terms: StepTerms) -> None:
        for values, weights in terms.measured:
            self.train_means.update(values, weights)

    def _share(self, terms: StepTerms, batch: ExperienceBatch) -> Tensor:
        return self.exact_mean((terms.losses * terms.weights).sum(), terms, batch.groups)

    def _wanted(self) -> set[Quantity]:
        wanted: set[Quantity] = {"entropy"} if self.log_entropy or self.objective.entropy_bonus else set()
        return wanted | {"hidden"} if isinstance(self.value, SharedTrunk) else wanted

    @override
    def terms(self, batch: GroupBatch) -> StepTerms:
        raise TypeError(
            "An RLHFModule trains on experience, which `RolloutData` has it collect, and not on rows of data; give the Trainer a "
            "RolloutData, or train on rows with a DPOModule."
        )

    def _report(self, found: Collected, task: Task) -> None:
        """Tell loggers of a rollout."""
        self.rollout_means.add(found)
        self._num_rollouts += 1
        if self.log_samples_every and task.number % self.log_samples_every == 0 and self.trainer.is_global_zero:
            show_samples(found, task, self.trainer.loggers, self.trainer.global_step)

    def _publish(self, found: Collected, task: Task, ref_logps: Tensor | None = None) -> None:
        """Tell callbacks of a rollout; prompts that only fill a batch are left out."""
        observation = found.observation(task.num_fillers * task.num_samples, ref_logps)
        if observation is not None:
            observe(self, observation)

    @override
    def validation_step(self, batch: HeldOutTask, batch_idx: int) -> None:  # type: ignore[override]  # prompts, not rows
        task = batch.task
        self.token_score.temperature = task.instruments.sampling.temperature
        found = sample_and_score(self.policy, task)
        kl = held_out_kl(found, task, self.policy_logps, self.reference)
        self.held_out_means.add_validation(found, task, kl)
        if task.num_samples > 1:  # one response to a prompt tells callbacks of rewards nothing
            self._publish(found, task)

    @override
    def on_validation_epoch_end(self) -> None:
        # They are the same on every rank already; without `sync_dist` Lightning would advise it in every run.
        self.log_dict(self.held_out_means.held_out_report(), sync_dist=True)

    @override
    def _flush(self, means: WeightedMeans) -> dict[str, Tensor]:
        values = super()._flush(means)
        if means is not self.train_means or not self._num_rollouts:
            return values
        self._num_rollouts = 0
        values |= self.rollout_means.report()
        return values | {"kl_coefficient": self.state.kl_coefficient.clone()} if self.is_adaptive else values

    @override
    def rank_state(self) -> dict[str, Any]:
        return super().rank_state() | {"rollout_means": self.rollout_means.partial(), "num_rollouts": self._num_rollouts}

    @override
    def load_rank_state(self, state: dict[str, Any]) -> None:
        super().load_rank_state(state)
        self.rollout_means.take_up(state["rollout_means"])
        self._num_rollouts = int(state["num_rollouts"])

    @override
    def after_update(self) -> None:
        if isinstance(self.reference, EmaReference):
            self.reference.after_update(self.policy)
