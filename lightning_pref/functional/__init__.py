"""Arithmetic on tensors that everything above shares: masked reductions and log-probabilities. Torch only."""

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
from lightning_pref.functional.masked import (
    Aggregation,
    aggregate,
    masked_mean,
    masked_sum,
    masked_var,
    segment_sum,
    wide,
)

__all__ = [
    "Aggregation",
    "KLEstimator",
    "aggregate",
    "capped_expm1",
    "entropy",
    "kl_estimate",
    "log1mexp",
    "log_collision",
    "masked_mean",
    "masked_sum",
    "masked_var",
    "next_token_logps",
    "segment_sum",
    "token_logps",
    "wide",
]
