"""Stages 1 and 2: the reward a loss gives each response of a pair, before a link turns the two rewards into a loss.

A reward function takes the pair and some of the options of its loss, and returns the chosen and the rejected rewards, [B]
each. What a run logs as `rewards/*` is this number, so that `rewards/accuracies` judges what the loss really compares.
"""

import math
from typing import Literal

from torch import Tensor
from torch.nn import functional as F

from lightning_pref.functional import capped_expm1, log1mexp
from lightning_pref.losses.pair import PairLogps

# A number is the order of the alpha-divergence: 1 is the reverse KL, 0 the forward KL.
FDivergence = Literal["reverse_kl", "forward_kl", "js_divergence"] | float
Rewards = tuple[Tensor, Tensor]

# A response the model is certain of has infinite odds; a mean token this likely, 1 - 1e-6, still has finite ones in float32.
MAX_MEAN_LOGP = -1e-6


def log_ratio(pair: PairLogps, *, beta: float, f_divergence: FDivergence = "reverse_kl") -> Rewards:
    """beta * phi(h): DPO's implicit reward (arXiv:2305.18290), or that of another divergence (arXiv:2309.16240)."""
    chosen, rejected = pair.log_ratios()
    return beta * f_shape(chosen, f_divergence), beta * f_shape(rejected, f_divergence)


def mean_log_ratio(pair: PairLogps, *, beta: float, f_divergence: FDivergence = "reverse_kl") -> Rewards:
    """beta * phi(h) / n."""
    return pair.per_token(*log_ratio(pair, beta=beta, f_divergence=f_divergence))


def ipo_log_ratio(pair: PairLogps, *, beta: float, length_normalize: bool, f_divergence: FDivergence) -> Rewards:
    """beta * phi(h) / n, or without the division."""
    return (mean_log_ratio if length_normalize else log_ratio)(pair, beta=beta, f_divergence=f_divergence)


def summed(pair: PairLogps, *, beta: float = 1.0) -> Rewards:
    """beta * S."""
    return beta * pair.chosen, beta * pair.rejected


def mean(pair: PairLogps, *, beta: float = 1.0) -> Rewards:
    """beta * s."""
    chosen, rejected = pair.mean_logps()
    return beta * chosen, beta * rejected


def inverse_power(pair: PairLogps, *, beta: float, alpha: float) -> Rewards:
    """beta * (1 - exp(-alpha * s)) / alpha: AlphaPO's reward (arXiv:2501.03884); beta * s in the limit alpha = 0."""
    chosen, rejected = pair.mean_logps()
    if alpha == 0.0:
        return beta * chosen, beta * rejected
    return (
        -beta * capped_expm1(-alpha * chosen) / alpha,
        -beta * capped_expm1(-alpha * rejected) / alpha,
    )


def log_odds(pair: PairLogps) -> Rewards:
    """s - log(1 - exp(s)), the log-odds of the mean token (ORPO, arXiv:2403.07691)."""
    chosen, rejected = (score.clamp(max=MAX_MEAN_LOGP) for score in pair.mean_logps())
    return chosen - log1mexp(chosen), rejected - log1mexp(rejected)


def length_penalized(pair: PairLogps, *, beta: float, alpha: float) -> Rewards:
    """beta * h + alpha * n (R-DPO, arXiv:2403.19159): credit for length, so that the log-ratio need not carry it."""
    chosen, rejected = log_ratio(pair, beta=beta)
    assert pair.chosen_lengths is not None and pair.rejected_lengths is not None, "the loss's LossSpec says `length`"
    return chosen + alpha * pair.chosen_lengths, rejected + alpha * pair.rejected_lengths


def displacement_penalized(pair: PairLogps, *, beta: float, penalty: float) -> Rewards:
    """beta * h, less `penalty` times what the chosen response has lost against the reference (DPOP, arXiv:2402.13228)."""
    chosen, rejected = pair.log_ratios()
    return beta * (chosen - penalty * (-chosen).clamp(min=0.0)), beta * rejected


def split_beta(pair: PairLogps, *, beta_chosen: float, beta_rejected: float) -> Rewards:
    """A beta for each side (Flex-DPO, arXiv:2406.07327)."""
    chosen, rejected = pair.log_ratios()
    return beta_chosen * chosen, beta_rejected * rejected


def against_two(pair: PairLogps, *, previous_chosen: Tensor, previous_rejected: Tensor, eta: float, tau: float) -> Rewards:
    """S - (tau/eta) * R - (1 - tau/eta) * P, against the reference and the previous policy (INPO, arXiv:2407.00617)."""
    assert pair.ref_chosen is not None and pair.ref_rejected is not None, "the loss's LossSpec says `needs_reference`"
    share = tau / eta
    return (
        pair.chosen - share * pair.ref_chosen - (1.0 - share) * previous_chosen.detach(),
        pair.rejected - share * pair.ref_rejected - (1.0 - share) * previous_rejected.detach(),
    )


def f_shape(log_ratio: Tensor, f_divergence: FDivergence) -> Tensor:
    """phi(h) = f'(exp(h)) up to a constant, the reward a divergence f gives a log-ratio (f-DPO, arXiv:2309.16240).

    Args:
        log_ratio: h, any shape.
        f_divergence: `reverse_kl` h, `forward_kl` 1 - exp(-h), `js_divergence` log 2 + log sigmoid(h), or the order `a` of
            the alpha-divergence, (exp((a - 1) h) - 1) / (a - 1). The exponential goes on as its tangent beyond exp(30).

    >>> import torch
    >>> f_shape(torch.tensor([0.0, 2.0]), "reverse_kl")
    tensor([0., 2.])
    >>> f_shape(torch.tensor([0.0]), 2.0)
    tensor([0.])
    """
    if isinstance(f_divergence, float | int):
        power = f_divergence - 1.0
        # Below this the quotient is all rounding error, and its limit is the reverse KL.
        return log_ratio if abs(power) < 1e-6 else capped_expm1(power * log_ratio) / power
    if f_divergence == "reverse_kl":
        return log_ratio
    if f_divergence == "js_divergence":
        return math.log(2.0) + F.logsigmoid(log_ratio)
    if f_divergence == "forward_kl":
        return -capped_expm1(-log_ratio)
    raise ValueError(
        "`f_divergence` must be 'reverse_kl', 'forward_kl', 'js_divergence' or a number (the order of the alpha-divergence), "
        f"got {f_divergence!r}."
    )
