"""Alerts: when the numbers of a diagnostic are worth a word, and what the word is.

`ALERT_RULES` is the one table of limits; a `Judge` of `judge.py` applies it to the numbers a diagnostic logs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal, NamedTuple

Level = Literal["info", "warning", "critical"]


@dataclass(frozen=True, kw_only=True)
class Alert:
    """Something that goes wrong in a run.

    Attributes:
        level: How bad it is.
        name: Name of the rule in `ALERT_RULES`.
        source: Where the numbers come from: `train`, `val`, or a probe.
        since_step: Optimiser step at which the limit was first passed without a break.
        step: Optimiser step at which the alert was raised.
        evidence: The numbers, and rows where there are any.
        advice: What to change.
    """

    level: Level
    name: str
    source: str = "train"
    since_step: int
    step: int
    evidence: str
    advice: str

    def text(self) -> str:
        """The alert in one paragraph."""
        where = "" if self.source == "train" else f" ({self.source})"
        return f"{self.level.upper()} {self.name}{where} since step {self.since_step}: {self.evidence} {self.advice}"

    def as_dict(self) -> dict[str, Any]:  # Any: strings and integers
        """The fields, for `alerts.jsonl`."""
        return asdict(self)


class Limit(NamedTuple):
    """A bound on one logged value; passed when the value is on the far side of it. `nan` passes no limit."""

    key: str
    above: float | None = None
    below: float | None = None

    def passed(self, values: Mapping[str, float]) -> bool:
        """Whether the value is there and beyond the bound."""
        value = values.get(self.key, math.nan)
        return (self.above is not None and value > self.above) or (self.below is not None and value < self.below)

    def text(self, values: Mapping[str, float]) -> str:
        """The value beside its bound."""
        bound = f"above {self.above:g}" if self.above is not None else f"below {self.below:g}"
        return f"{self.key} is {values[self.key]:.4g} ({bound})"


@dataclass(frozen=True, kw_only=True)
class AlertRule:
    """When an alert is raised: all limits passed, in `patience` measurements in a row."""

    level: Level = "warning"
    limits: tuple[Limit, ...]
    patience: int = 1
    advice: str

    def passed(self, values: Mapping[str, float]) -> bool:
        """Whether every limit is passed."""
        return all(limit.passed(values) for limit in self.limits)


ALERT_RULES: dict[str, AlertRule] = {
    # The reward-variance monitor.
    "reward_variance/constant": AlertRule(
        level="critical",
        # All responses to all prompts: with zero variance within prompts alone, the policy may only repeat itself.
        limits=(Limit("reward_variance/zero_share", above=0.999), Limit("reward_variance/between_prompt", below=1e-12)),
        patience=3,
        advice=(
            "Every response gets the same reward, so that nothing is learned. Score two responses by hand: the reward model "
            "may be collapsed, loaded without its head, or read at a padding token; a rule may never match."
        ),
    ),
    "reward_variance/zero_share": AlertRule(
        limits=(Limit("reward_variance/zero_share", above=0.8),),
        patience=5,
        advice=(
            "Most prompts give the same reward to all their responses and teach nothing. Drop prompts that are too easy or "
            "too hard, sample more responses to each, raise the temperature, or use a finer reward."
        ),
    ),
    "reward_variance/flat": AlertRule(
        limits=(Limit("reward_variance/whitened", below=0.05),),
        patience=3,
        advice=(
            "Nearly all variance of the reward lies between prompts, which a baseline cancels: learning will be slow, however "
            "well the reward model ranks. Compare reward models for this policy with `python -m lightning_pref teacher`, train "
            "the reward model on responses of this policy, or choose other prompts."
        ),
    ),
    "reward_variance/vanishing": AlertRule(
        limits=(Limit("reward_variance/change", below=0.1),),
        patience=5,
        advice=(
            "The variance within prompts is below a tenth of what it was. If the reward is as high as it can get, stop: "
            "training is over. If not, the policy has collapsed or the reward is saturated: strengthen the tie to the reference, "
            "raise the temperature, or take new prompts."
        ),
    ),
    "reward_variance/ties": AlertRule(
        limits=(Limit("reward_variance/ties", above=0.05),),
        advice=(
            "The reward model gives different responses the same score. Compute its head in float32 (bfloat16 keeps three "
            "digits), look for clipped scores, and for responses that are cut to the same text."
        ),
    ),
    "reward_variance/pays_length": AlertRule(
        limits=(Limit("reward_variance/length_correlation", above=0.6),),
        patience=5,
        advice=(
            "Longer responses to the same prompt get more, and the policy will find out. Balance lengths in the preference "
            "data, subtract a length term from the reward, or penalise length."
        ),
    ),
    "reward_variance/pays_brevity": AlertRule(
        limits=(Limit("reward_variance/length_correlation", below=-0.6),),
        patience=5,
        advice=(
            "Shorter responses to the same prompt get more, and the policy will find out. Balance lengths in the preference "
            "data, and look whether cut responses are punished (a missing EOS)."
        ),
    ),
    "reward_variance/not_finite": AlertRule(
        level="critical",
        limits=(Limit("reward_variance/not_finite", above=0.0),),
        advice="Rewards are nan or infinite; they are left out here, but not in training. Find out which responses get them.",
    ),
    "reward_variance/single_responses": AlertRule(
        limits=(Limit("reward_variance/single_share", above=0.5),),
        advice=(
            "Most prompts have one response, from which no variance can be told. Sample two or more to each prompt, or attach a "
            "`Probe` that samples several for a fixed set of prompts."
        ),
    ),
    # The over-optimisation monitor.
    "overoptimization/gold_falls": AlertRule(
        level="critical",
        limits=(Limit("overoptimization/gold_drop", above=0.2), Limit("overoptimization/gold_drop_errors", above=3.0)),
        patience=2,
        advice=(
            "The reward that is trained on rises while the gold reward falls: the policy exploits what the reward gets wrong. "
            "Stop at the peak, strengthen the tie to the reference (`kl.coefficient`), take a conservative ensemble (`aggregate: "
            "wco`), or train the reward model on answers of this policy."
        ),
    ),
    "overoptimization/disagreement": AlertRule(
        limits=(Limit("overoptimization/uncertainty_growth", above=2.0),),
        patience=3,
        advice=(
            "The members of the ensemble disagree more and more: the policy has left what they were trained on, and what it gets "
            "for that means little. Lean on the worst case (`aggregate: wco`, or `uwo`), strengthen the tie to the reference "
            "(`kl.coefficient`), or train the reward models on answers of this policy."
        ),
    ),
    "overoptimization/length": AlertRule(
        limits=(
            Limit("overoptimization/length_growth", above=1.5),
            Limit("overoptimization/length_correlation", above=0.3),
            Limit("overoptimization/proxy_gain", above=0.5),
        ),
        patience=3,
        advice=(
            "The reward rises as responses grow, and pays for length. Read a few: if they only say more, subtract a length term "
            "from the reward, balance lengths in the preference data, or lower `max_new_tokens`."
        ),
    ),
    # The likelihood-displacement tracker.
    "displacement/chosen_falls": AlertRule(
        limits=(
            Limit("displacement/share", above=0.5),
            Limit("displacement/margin_change", above=0.0),
            Limit("displacement/chosen_logp_change_per_token", below=-0.1),
        ),
        patience=2,
        advice=(
            "The loss falls, but so does what it should prefer, and the probability goes elsewhere. Drop the pairs of largest "
            "length-normalised CHES (`python -m lightning_pref ches ... --drop_top 5%`), add a likelihood term "
            "(`loss: {sigmoid: 1.0, sft: 0.1}`), take `loss: dpop`, lower the learning rate, or raise `beta`."
        ),
    ),
    "displacement/chosen_falls_faster": AlertRule(
        level="critical",
        limits=(
            Limit("displacement/share", above=0.5),
            Limit("displacement/margin_change", below=0.0),
            Limit("displacement/chosen_logp_change", below=-1.0),
        ),
        patience=2,
        advice=(
            "Chosen responses fall faster than rejected ones: the model unlearns the preference. Check that chosen and rejected "
            "are not swapped and that the learning rate is not too high; then drop the pairs of largest length-normalised CHES "
            "(`python -m lightning_pref ches ... --drop_top 5%`), or add a likelihood term (`loss: {sigmoid: 1.0, sft: 0.1}`)."
        ),
    ),
    "displacement/both_fall": AlertRule(
        level="info",
        limits=(
            Limit("displacement/both_fell", above=0.5),
            Limit("displacement/margin_change", above=0.0),
            Limit("displacement/chosen_logp_change", below=-1.0),
        ),
        patience=2,
        advice=(
            "The margin grows because rejected responses fall further, not because chosen ones rise. That is common and may be "
            "harmless; see on a probe where the probability goes (`MassShift`), and watch the change per token."
        ),
    ),
    "displacement/late_anchors": AlertRule(
        level="info",
        limits=(Limit("displacement/late_anchors", above=0.0),),
        advice=(
            "Changes of these rows count from when a row was first seen, not from the start, and are too small. Publish "
            "`ref_chosen_logps` and `ref_rejected_logps`, or watch a fixed set with `Probe`, which is measured before training."
        ),
    ),
    "displacement/left_out": AlertRule(
        limits=(Limit("displacement/left_out", above=0.01),),
        advice=(
            "Some rows are not followed. Raise `max_rows` of the tracker if the data set has more pairs; if not, look for "
            "log-probabilities that are infinite or nan."
        ),
    ),
    # Where the mass went, and gradient entanglement.
    "mass_shift/goes_elsewhere": AlertRule(
        limits=(Limit("mass_shift/chosen_token", below=-0.05), Limit("mass_shift/other_tokens", above=0.1)),
        advice=(
            "Where chosen and rejected responses part, both give probability to tokens that neither of them has. Read what these "
            "begin: if it is the opposite of what is wanted, stop. Drop the pairs of largest length-normalised CHES "
            "(`python -m lightning_pref ches ... --drop_top 5%`), or add a likelihood term (`loss: {sigmoid: 1.0, sft: 0.1}`)."
        ),
    ),
    "entanglement/both_down": AlertRule(
        limits=(Limit("entanglement/regime_both_down", above=0.5),),
        patience=2,
        advice=(
            "The responses of most pairs fall together. Take a loss that pulls the chosen one harder (`loss: dpop`, or "
            "`loss: {sigmoid: 1.0, sft: 0.1}`), or drop pairs whose responses share most of their tokens."
        ),
    ),
    "entanglement/out_of_band": AlertRule(
        level="info",
        limits=(Limit("entanglement/in_band", below=0.5),),
        advice=(
            "For most pairs a gradient step of this loss cannot raise the chosen response and lower the rejected one. The middle "
            "of the band is at d_c / d_r = `entanglement/norm_ratio`; `entanglement/sensitivity_ratio` is where the loss stands."
        ),
    ),
    # The guard against what is no number.
    "non_finite/seen": AlertRule(
        limits=(Limit("non_finite/in_a_row", above=0.0),),
        advice="The update was skipped, and nothing was lost by it. If it comes again, look at these rows.",
    ),
    "non_finite/returning": AlertRule(
        level="critical",
        limits=(Limit("non_finite/in_a_row", above=2.0),),
        advice=(
            "The run will not recover by itself. Look at these rows, lower the learning rate or lengthen its warm-up, clip "
            "gradients (`gradient_clip_val`), or train with more digits (precision 'bf16-mixed' or '32-true')."
        ),
    ),
    # The spike-aware reset.
    "spike/seen": AlertRule(
        level="info",
        limits=(Limit("spike/recurrence", above=0.0),),
        advice="Look at these rows. One spike that was skipped needs nothing else.",
    ),
    "spike/returning": AlertRule(
        limits=(Limit("spike/recurrence", above=2.0),),
        advice="Take the rows out that return, lower the learning rate, or lengthen its warm-up.",
    ),
    "spike/update_norm": AlertRule(
        limits=(Limit("spike/update_score", above=6.0),),
        advice="The moments and the gradients disagree: lower beta2 or the learning rate, or clip the gradient norm.",
    ),
    "spike/gradient_norm": AlertRule(
        limits=(Limit("spike/grad_norm", above=100.0),),
        patience=3,
        advice="Set `gradient_clip_val` of the Trainer, and lower the learning rate; 10 is a usual limit with sampled rewards.",
    ),
    "spike/clipped_fraction": AlertRule(
        limits=(Limit("spike/clipped_fraction", above=0.01),),
        patience=3,
        advice="This is no rare spike: raise `threshold` or `guard_steps`, or lower the learning rate.",
    ),
    # The meter of lost updates.
    "lost_updates/too_many": AlertRule(
        limits=(Limit("lost_updates/share", above=0.5), Limit("lost_updates/stuck_share", above=0.5)),
        patience=2,
        advice=(
            "Updates are smaller than the rounding of the weights, which stand still. Keep the weights in float32 and compute in "
            "bfloat16 (`precision: bf16-mixed`, `dtype: float32`); or let the optimiser carry the lost part along (`rounding: "
            "kahan`) or round by chance (`rounding: stochastic`); or raise the learning rate."
        ),
    ),
    # The stability-gap evaluator.
    "stability_gap/dip": AlertRule(
        limits=(Limit("stability_gap/relative_depth", above=3.0),),
        advice=(
            "An old task was lost in part when training moved on. If the trace recovers, only do not stop or judge inside the "
            "dip. For a shallower one mix in old rows (`replay`, `replay_share`), train several epochs on the best part of the "
            "new ones (`keep_rows`, `keep_rows_by`), warm the learning rate up more slowly, or clip gradients harder."
        ),
    ),
    "stability_gap/no_recovery": AlertRule(
        limits=(Limit("stability_gap/lasting_depth", above=3.0),),
        advice=(
            "An old task was lost in part and has not come back: this is forgetting, no passing dip. Mix in old rows (`replay`, "
            "`replay_share`) or more of them, lower the learning rate, train adapters only, or average with the old weights."
        ),
    ),
    "stability_gap/expensive": AlertRule(
        level="info",
        limits=(Limit("stability_gap/time_share", above=0.2),),
        advice="Watching takes much of the time. Raise `every_n_updates` or `growth`, or give fewer examples of each task.",
    ),
}
