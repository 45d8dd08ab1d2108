"""The settings of reinforcement learning from rewards: what each algorithm takes by default, and what it has no use for."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal, NamedTuple, get_args

from lightning_pref.domains import check_range
from lightning_pref.functional.advantages import Scale
from lightning_pref.functional.kl_control import AdaptiveKL, FixedKL, KLController
from lightning_pref.functional.logprobs import KLEstimator
from lightning_pref.functional.masked import Aggregation
from lightning_pref.rollouts.experience import Task

Algorithm = Literal["ppo", "rloo", "grpo", "reinforce_pp", "online_dpo"]
Ratio = Literal["token", "sequence_mean", "sequence_sum"]


@dataclass(frozen=True, kw_only=True)
class SurrogateSettings:
    """What is made of advantages: the loss of the policy.

    Args:
        form: `clip`: PPO's clipped ratio. `cispo`: REINFORCE with a capped, constant ratio. `reinforce`: no ratio at all, for one
            update per rollout.
        ratio: Of each token, or of the whole response: `sequence_mean` (GSPO), `sequence_sum` (the ratio of its probabilities).
            By default `sequence_sum` for `rloo`, else `token`.
        clip_low: How far the ratio may fall before a negative advantage pushes no more, in (0, 1].
        clip_high: How far it may rise before a positive one pushes no more.
        dual_clip: Bound on the loss of negative advantages, in multiples of the advantage, above 1; none if not given.
        max_weight: Largest ratio that `cispo` weighs with.
        aggregation: `token_mean`: every token alike. `sequence_mean`: every response alike. `sequence_sum`: long responses
            count by their length. By default `sequence_mean` for `grpo` and `rloo`, else `token_mean`; `rloo` with `reinforce`
            sums.
        max_length: Constant that divides `sequence_sum` (Dr. GRPO), such as `max_new_tokens`.
    """

    form: Literal["clip", "cispo", "reinforce"] = "clip"
    ratio: Ratio | None = None
    clip_low: float = 0.2
    clip_high: float = 0.2
    dual_clip: float | None = None
    max_weight: float = 5.0
    aggregation: Aggregation | None = None
    max_length: int | None = None


@dataclass(frozen=True, kw_only=True)
class KLSettings:
    """The tie to the reference.

    Args:
        coefficient: Reward per nat, or its first value where `target` is given; 0 is no tie. By default 0.05 for `ppo` and
            `rloo`, 0.04 for `grpo`, 0.01 for `reinforce_pp`.
        place: `reward`: subtracted from the reward, as a constant. `loss`: added to the loss. By default `loss` for `grpo`, else
            `reward`.
        estimator: Value of the KL in the loss, by token.
        gradient: Of the KL in the loss: that of the KL, or the estimator's `own`, as GRPO's authors take it of `k3`.
        target: KL per response in nats that the coefficient is steered to; a fixed coefficient if not given.
        horizon: Responses over which an error of 100 % would double the coefficient.
    """

    coefficient: float | None = None
    place: Literal["reward", "loss"] | None = None
    estimator: KLEstimator = "k3"
    gradient: Literal["kl", "own"] = "kl"
    target: float | None = None
    horizon: float = 10_000.0

    def controller(self, coefficient: float) -> KLController:
        """What moves the coefficient."""
        if self.target is None:
            return FixedKL(coefficient=coefficient)
        return AdaptiveKL(initial=coefficient, target=self.target, horizon=self.horizon)


@dataclass(frozen=True, kw_only=True)
class AdvantageSettings:
    """How much better than expected.

    Args:
        scale: What `grpo` divides by: the standard deviation of the `group`, of the `batch` (the whole rollout over all ranks),
            or `none`.
        gamma: Discount of `ppo` and `reinforce_pp`, in [0, 1].
        lam: lambda of generalised advantage estimation, for `ppo`.
        whiten: Give the advantages of `ppo` mean 0 and variance 1 over all tokens of the rollout and all ranks.
        group_baseline: Let `reinforce_pp` subtract the mean score of the prompt first.
    """

    scale: Scale = "group"
    gamma: float = 1.0
    lam: float = 0.95
    whiten: bool = True
    group_baseline: bool = False

    def __post_init__(self) -> None:
        check_range("advantage.gamma", self.gamma, at_least=0, at_most=1)
        check_range("advantage.lam", self.lam, at_least=0, at_most=1)


@dataclass(frozen=True, kw_only=True)
class ValueSettings:
    """The value function of `ppo`.

    Args:
        trunk: `own`: a model of its own. `shared`: a head on the states of the policy.
        model: What a trunk of its own starts from, a reward model or a language model; the policy if not given.
        coefficient: Weight of its loss.
        clip: How far a value may move in one rollout before its loss stops pulling; `None` is any distance.
        rate_factor: Learning rate of the value model or head, in multiples of the policy's.
    """

    trunk: Literal["own", "shared"] = "own"
    model: str | None = None
    coefficient: float = 0.1
    clip: float | None = 0.2
    rate_factor: float = 1.0


@dataclass(frozen=True, kw_only=True)
class ScoreSettings:
    """What happens to the scores of a reward before they are trained on, in this order.

    Args:
        normalize: Divide by the standard deviation of all scores seen so far, and subtract their mean.
        shift_mean: Whether normalising subtracts the mean.
        clip: Bound on the magnitude.
        missing_eos_score: Score that replaces that of a response without an end.
        missing_eos_penalty: Positive number that is subtracted from it.
        skip_unfinished: Leave responses without an end out of the loss (DAPO's overlong filter), not out of the statistics.
    """

    normalize: bool = False
    shift_mean: bool = True
    clip: float | None = None
    missing_eos_score: float | None = None
    missing_eos_penalty: float | None = None
    skip_unfinished: bool = False


class Resolved(NamedTuple):
    """Settings whose default depends on the algorithm."""

    ratio: Ratio
    aggregation: Aggregation
    kl_coefficient: float
    kl_place: Literal["reward", "loss"]


KL_COEFFICIENTS: Mapping[Algorithm, float] = {"ppo": 0.05, "rloo": 0.05, "grpo": 0.04, "reinforce_pp": 0.01, "online_dpo": 0.0}
AGGREGATIONS: Mapping[Algorithm, Aggregation] = {
    "ppo": "token_mean",
    "rloo": "sequence_mean",
    "grpo": "sequence_mean",
    "reinforce_pp": "token_mean",
    "online_dpo": "token_mean",
}
GRADIENTS: tuple[Algorithm, ...] = ("ppo", "rloo", "grpo", "reinforce_pp")

# Settings that act on a policy, or a value, that has moved since it sampled.
OF_RATIOS = ("surrogate.clip_low", "surrogate.clip_high", "surrogate.dual_clip", "surrogate.max_weight", "value.clip")

# Settings that act under some algorithms only, by group and name.
OF_ALGORITHMS: Mapping[str, tuple[Algorithm, ...]] = {
    "advantage.scale": ("grpo",),
    "advantage.gamma": ("ppo", "reinforce_pp"),
    "advantage.lam": ("ppo",),
    "advantage.whiten": ("ppo",),
    "advantage.group_baseline": ("reinforce_pp",),
    **{f"surrogate.{field.name}": GRADIENTS for field in fields(SurrogateSettings)},
    **{f"kl.{field.name}": GRADIENTS for field in fields(KLSettings)},
    **{f"value.{field.name}": ("ppo",) for field in fields(ValueSettings)},
    "entropy_bonus": GRADIENTS,
    "pair_loss": ("online_dpo",),
    "beta": ("online_dpo",),
    "loss_options": ("online_dpo",),
}


def changed_settings(groups: Mapping[str, Any]) -> list[str]:  # Any: a settings class, or a value beside its default
    """Names of the settings that are not at their defaults, `group.name` for those of a settings class.

    Args:
        groups: By name: an instance of a settings class, or a pair (value, default).
    """
    changed = []
    for name, given in groups.items():
        if isinstance(given, tuple):
            value, default = given
            changed += [name] if value != default else []
        else:
            changed += [f"{name}.{field.name}" for field in fields(given) if getattr(given, field.name) != field.default]
    return changed


def resolve(algorithm: Algorithm, surrogate: SurrogateSettings, kl: KLSettings) -> Resolved:
    """The settings that an algorithm decides where nothing is said."""
    sums = algorithm == "rloo" and surrogate.form == "reinforce"
    return Resolved(
        ratio=surrogate.ratio or ("sequence_sum" if algorithm == "rloo" else "token"),
        aggregation=surrogate.aggregation or ("sequence_sum" if sums else AGGREGATIONS[algorithm]),
        kl_coefficient=KL_COEFFICIENTS[algorithm] if kl.coefficient is None else kl.coefficient,
        kl_place=kl.place or ("loss" if algorithm == "grpo" else "reward"),
    )


def check_settings(
    algorithm: Algorithm,
    changed: list[str],
    surrogate: SurrogateSettings,
    kl: KLSettings,
    scores: ScoreSettings,
    value: ValueSettings,
) -> None:
    """Raise for a setting that would have no effect, and for a value out of range.

    Args:
        algorithm: Its name.
        changed: The settings that are not at their defaults, see `changed_settings`.
        surrogate: Loss of the policy.
        kl: Tie to the reference.
        scores: What happens to scores.
        value: Value function.
    """
    if algorithm not in get_args(Algorithm):
        raise ValueError(f"Unknown algorithm {algorithm!r}; known: {', '.join(get_args(Algorithm))}.")
    for name in changed:
        users = OF_ALGORITHMS.get(name, (algorithm,))
        if algorithm not in users:
            raise ValueError(
                f"`{name}` acts under {_or(users)} only; with the algorithm {algorithm!r} it has no effect. Leave it out, or "
                "choose such an algorithm."
            )
    _check_surrogate(algorithm, changed, surrogate, kl)
    _check_kl(algorithm, changed, surrogate, kl)
    if not scores.normalize and not scores.shift_mean:
        raise ValueError("`scores.shift_mean` acts on `scores.normalize` only, which is off; leave it out.")
    if scores.missing_eos_score is not None and scores.missing_eos_penalty is not None:
        raise ValueError("Give `missing_eos_score`, which replaces, or `missing_eos_penalty`, which is subtracted, not both.")
    check_range("scores.clip", scores.clip, above=0)
    check_range("scores.missing_eos_score", scores.missing_eos_score)
    check_range("scores.missing_eos_penalty", scores.missing_eos_penalty, above=0)
    check_range("value.clip", value.clip, above=0)
    if value.trunk == "shared" and value.model is not None:
        raise ValueError("`value.model` starts a trunk of the value model's own, but `value.trunk` is 'shared'; leave one out.")
    if not 0 < value.rate_factor < math.inf or not 0 < value.coefficient < math.inf:
        raise ValueError(
            f"`value.coefficient` and `value.rate_factor` must be positive, got {value.coefficient!r} and {value.rate_factor!r}."
        )


def _check_surrogate(algorithm: Algorithm, changed: list[str], surrogate: SurrogateSettings, kl: KLSettings) -> None:
    of_form = {"clip_low": "clip", "clip_high": "clip", "dual_clip": "clip", "max_weight": "cispo"}
    for name, form in of_form.items():
        if f"surrogate.{name}" in changed and surrogate.form != form:
            raise ValueError(f"`surrogate.{name}` acts on the form {form!r} only; with {surrogate.form!r} it has no effect.")
    if surrogate.form == "reinforce" and "surrogate.ratio" in changed:
        raise ValueError("`surrogate.ratio` has no effect on the form 'reinforce', which uses none; leave it out.")
    resolved = resolve(algorithm, surrogate, kl)
    if surrogate.max_length is not None and (resolved.aggregation != "sequence_sum" or surrogate.max_length < 1):
        raise ValueError(
            f"`surrogate.max_length` divides the aggregation 'sequence_sum' and must be positive, got {surrogate.max_length!r} "
            f"with {resolved.aggregation!r}."
        )
    if not 0.0 < surrogate.clip_low <= 1.0 or not surrogate.clip_high > 0.0:
        raise ValueError(
            f"`surrogate.clip_low` must be in (0, 1] and `surrogate.clip_high` positive, got {surrogate.clip_low!r} and "
            f"{surrogate.clip_high!r}."
        )
    if surrogate.dual_clip is not None and not 1 < surrogate.dual_clip < math.inf:
        raise ValueError(f"`surrogate.dual_clip` must be above 1, got {surrogate.dual_clip!r}.")
    if not surrogate.max_weight >= 1:
        raise ValueError(f"`surrogate.max_weight` must be at least 1, got {surrogate.max_weight!r}.")


def _check_kl(algorithm: Algorithm, changed: list[str], surrogate: SurrogateSettings, kl: KLSettings) -> None:
    resolved = resolve(algorithm, surrogate, kl)
    if resolved.kl_coefficient < 0:
        raise ValueError(f"`kl.coefficient` must not be negative, got {resolved.kl_coefficient!r}.")
    check_range("kl.coefficient", resolved.kl_coefficient)
    check_range("kl.target", kl.target, above=0)
    check_range("kl.horizon", kl.horizon, above=0)
    for name in ("kl.estimator", "kl.gradient"):
        if name in changed and resolved.kl_place != "loss":
            raise ValueError(
                f"`{name}` acts on `kl.place: loss` only; inside the reward k1 alone gives the policy gradient of the KL."
            )
    if "kl.horizon" in changed and kl.target is None:
        raise ValueError("`kl.horizon` acts with `kl.target` only; leave it out, or give a target.")
    if algorithm == "online_dpo":
        return
    if resolved.kl_coefficient == 0 and (
        useless := [name for name in changed if name.startswith("kl.") and name != "kl.coefficient"]
    ):
        raise ValueError(f"`{useless[0]}` has no effect with `kl.coefficient: 0`; leave one of them out.")
    if kl.gradient == "own" and kl.estimator == "k1":
        raise ValueError("The gradient of 'k1' is zero on average: use `kl.gradient: kl`, or put the KL into the reward.")


def check_task(algorithm: Algorithm, advantage: AdvantageSettings, changed: list[str], task: Task) -> None:
    """Raise for a rollout that an algorithm cannot be trained on, or that leaves a setting without effect.

    Args:
        algorithm: Its name.
        advantage: How much better than expected.
        changed: The settings that are not at their defaults.
        task: What is to be collected.
    """
    if algorithm in ("rloo", "grpo", "online_dpo") and task.num_samples < 2:
        raise ValueError(
            f"{algorithm!r} compares the responses to one prompt, but `num_samples` is {task.num_samples}. Sample two "
            "or more, or choose 'ppo' or 'reinforce_pp'."
        )
    if advantage.group_baseline and task.num_samples < 2:
        raise ValueError("`advantage.group_baseline` is a mean over a prompt's responses, but `num_samples` is 1; sample more.")
    if algorithm == "online_dpo" and len(task.prompts) < task.plan.num_parts:
        raise ValueError(
            f"A rollout of {len(task.prompts)} prompts on each rank makes as many pairs, which cannot be cut into "
            f"{task.plan.num_parts} micro-batches. Raise `num_prompts`, or lower `num_minibatches` or "
            "`accumulate_grad_batches`."
        )
    check_clipping(changed, task.plan.num_updates)


def check_clipping(changed: list[str], num_updates: int) -> None:
    """Raise for a bound on ratios that are always 1.

    Args:
        changed: The settings that are not at their defaults.
        num_updates: Updates that are made on one rollout.
    """
    useless = [name for name in changed if name in OF_RATIOS]
    if useless and num_updates == 1:
        raise ValueError(
            f"`{useless[0]}` bounds how far the policy may move while it is trained on one rollout, but a rollout makes one "
            "update, before which the ratio is 1: it has no effect. Raise `data.inner_epochs` or `data.num_minibatches`, or "
            "leave it out."
        )


def _or(names: tuple[str, ...]) -> str:
    return " or ".join(map(repr, names))
