"""From the log-probabilities of a micro-batch of experience to the losses of its tokens or pairs, with what is logged beside."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from lightning_pref.functional.logprobs import KLEstimator
from lightning_pref.functional.masked import segment_sum
from lightning_pref.losses.policy import (
    aggregation_weights,
    cispo,
    kl_loss,
    log_ratios,
    ppo_clip,
    reinforce,
    sequence_log_ratios,
    value_loss,
)
from lightning_pref.measures.policy_update import is_clipped, is_value_clipped
from lightning_pref.models.forward import ResponseLogps
from lightning_pref.modules.objectives import Measured, PairObjective, StepTerms
from lightning_pref.modules.rlhf_settings import Resolved, SurrogateSettings
from lightning_pref.rollouts.experience import ExperienceBatch

LOGP_DIFFERENCE = "sampling/logp_difference"
POLICY_METRICS = ("loss", "approx_kl", LOGP_DIFFERENCE)
CLIP_FRACTION = "clip_fraction"
VALUE_METRICS = ("value/loss", "value/clip_fraction")


@dataclass(frozen=True, kw_only=True)
class PolicyObjective:
    """The loss of the policy on tokens with advantages.

    Attributes:
        settings: Form, ratio and clipping.
        resolved: Those of its settings that an algorithm decides.
        kl_estimator: Value of the KL in the loss.
        kl_gradient: Gradient of the KL in the loss.
        entropy_bonus: Weight of the entropy.
    """

    settings: SurrogateSettings
    resolved: Resolved
    kl_estimator: KLEstimator = "k3"
    kl_gradient: Literal["kl", "own"] = "kl"
    entropy_bonus: float = 0.0

    def terms(self, out: ResponseLogps, batch: ExperienceBatch, kl_coefficient: Tensor) -> StepTerms:
        """Losses of the tokens, weighted so that the sum over all micro-batches and ranks is the aggregation asked for.

        Args:
            out: The policy's log-probabilities, and its entropy where there is a bonus on it.
            batch: The experience.
            kl_coefficient: Of the KL in the loss, [].
        """
        advantages = batch.tokens.advantages
        assert advantages is not None, "every algorithm with a surrogate has advantages"
        old = old_logps(out, batch)
        by_token = log_ratios(out.token_logps, old)
        log_ratio = self._of_sequences(by_token, out)
        losses = self._surrogate(out, log_ratio, advantages)
        ref = batch.tokens.ref_logps
        if self.resolved.kl_place == "loss" and self.resolved.kl_coefficient > 0:
            assert ref is not None, "a tie to the reference needs one"
            losses = losses + kl_coefficient * kl_loss(out.token_logps, ref, value=self.kl_estimator, gradient=self.kl_gradient)
        if self.entropy_bonus:
            assert out.entropy is not None, "the module asks the forward for it"
            losses = losses - self.entropy_bonus * out.entropy
        how = self.resolved.aggregation
        weights = aggregation_weights(out.response, out.lengths, how, max_length=self.settings.max_length)
        alive = batch.weights[out.response]
        values = {
            "approx_kl": by_token.detach().square() / 2,
            LOGP_DIFFERENCE: (old - batch.tokens.sampled_logps).abs(),
        }
        if self.settings.form == "clip":
            values[CLIP_FRACTION] = is_clipped(
                log_ratio.detach(), advantages, clip_low=self.settings.clip_low, clip_high=self.settings.clip_high
            ).float()
        unit: Literal["responses", "response_tokens"] = "response_tokens" if how == "token_mean" else "responses"
        return StepTerms(losses, weights * alive, unit, [Measured(values, alive)])

    def _of_sequences(self, by_token: Tensor, out: ResponseLogps) -> Tensor:
        if self.resolved.ratio == "token":
            return by_token
        how: Literal["mean", "sum"] = "mean" if self.resolved.ratio == "sequence_mean" else "sum"
        return sequence_log_ratios(by_token, out.response, out.lengths, how=how)

    def _surrogate(self, out: ResponseLogps, log_ratio: Tensor, advantages: Tensor) -> Tensor:
        chosen = self.settings
        if chosen.form == "reinforce":
            return reinforce(out.token_logps, advantages)
        if chosen.form == "cispo":
            return cispo(out.token_logps, log_ratio, advantages, max_weight=chosen.max_weight)
        return ppo_clip(log_ratio, advantages, clip_low=chosen.clip_low, clip_high=chosen.clip_high, dual_clip=chosen.dual_clip)


def value_terms(values: Tensor, response: Tensor, batch: ExperienceBatch, *, clip: float | None) -> StepTerms:
    """Losses of the values, one per token, every token of the update alike.

    Args:
        values: Now, [N].
        response: Index of the response of each token, [N].
        batch: The experience, with the values and returns of when it was collected.
        clip: See `losses.policy.value_loss`.
    """
    returns, before = batch.tokens.returns, batch.tokens.values
    assert returns is not None and before is not None, "experience of a module with a value function has both"
    # A response without a finite reward has no return to learn.
    known = returns.isfinite()
    losses = value_loss(values, torch.where(known, returns, values.detach()), before, clip=clip)
    alive = batch.weights[response]
    measured = {"value/loss": losses}
    if clip is not None:
        measured["value/clip_fraction"] = is_value_clipped(values.detach(), before, clip=clip).float()
    return StepTerms(losses, alive * known, "response_tokens", [Measured(measured, alive * known)])


def pair_terms(objective: PairObjective, out: ResponseLogps, batch: ExperienceBatch) -> StepTerms:
    """Losses of the pairs that the scores of sampled responses make."""
    pairs = batch.groups.pairs(objective.selection)
    ref = batch.tokens.ref_logps
    reference = None if ref is None else segment_sum(ref, out.response, len(out.lengths))
    if objective.loss == "inpo":
        before = segment_sum(old_logps(out, batch), out.response, len(out.lengths))
        previous: Mapping[str, Tensor] = {"previous_chosen": before[pairs.chosen], "previous_rejected": before[pairs.rejected]}
        objective = replace(objective, options={**objective.options, **previous})
    terms = objective.terms(out, objective.logps(out, reference, pairs), pairs)
    difference = (old_logps(out, batch) - batch.tokens.sampled_logps).abs()
    sampling = Measured({LOGP_DIFFERENCE: difference}, batch.weights[out.response])
    return terms._replace(measured=[*terms.measured, sampling])


def old_logps(out: ResponseLogps, batch: ExperienceBatch) -> Tensor:
    """Log-probs under the policy that sampled, [N]; before the only update of a rollout that is the policy as it stands."""
    kept = batch.tokens.old_logps
    return out.token_logps.detach() if kept is None else kept


def response_kl(out: ResponseLogps, batch: ExperienceBatch) -> Tensor:
    """Estimate of KL(policy || reference) from each response that was sampled, summed over its tokens, [R] nats."""
    ref = batch.tokens.ref_logps
    assert ref is not None, "asked for where there is a reference"
    return segment_sum(old_logps(out, batch) - ref, out.response, len(out.lengths))
