"""Arithmetic on tensors that everything above shares: masked reductions, log-probabilities, advantages. Torch only."""

from lightning_pref.functional.advantages import (
    Advantages,
    Scale,
    flat_gae,
    gae,
    grpo_advantages,
    has_equal_group,
    reinforce_pp_advantages,
    returns_to_go,
    rloo_advantages,
)
from lightning_pref.functional.kl_control import AdaptiveKL, FixedKL, KLController
from lightning_pref.functional.logprobs import (
    KLEstimator,
    capped_expm1,
    entropy,
    kl_estimate,
    log1mexp,
    log_collision,
    next_token_logps,
    token_logps,
)
from lightning_pref.functional.masked import Aggregation, aggregate, masked_mean, masked_sum, masked_var, segment_sum, wide
from lightning_pref.functional.moments import Moments, RunningMoments, moment_sums, whiten, whiten_with
from lightning_pref.functional.token_rewards import is_last_token, shape_scores, token_rewards

__all__ = [
    "AdaptiveKL",
    "Advantages",
    "Aggregation",
    "FixedKL",
    "KLController",
    "KLEstimator",
    "Moments",
    "RunningMoments",
    "Scale",
    "aggregate",
    "capped_expm1",
    "entropy",
    "flat_gae",
    "gae",
    "grpo_advantages",
    "has_equal_group",
    "is_last_token",
    "kl_estimate",
    "log1mexp",
    "log_collision",
    "masked_mean",
    "masked_sum",
    "masked_var",
    "moment_sums",
    "next_token_logps",
    "reinforce_pp_advantages",
    "returns_to_go",
    "rloo_advantages",
    "segment_sum",
    "shape_scores",
    "token_logps",
    "token_rewards",
    "whiten",
    "whiten_with",
    "wide",
]
