"""Losses that measure each response of a pair by itself: its log-ratio has a target, not only its margin."""

from functools import partial

import torch
from torch import Tensor

from lightning_pref.losses import links, rewards, unlearning, unpaired
from lightning_pref.losses.pair import PairLogps


def nca_pair(pair: PairLogps, *, beta: float = 0.01) -> Tensor:
    """NCA: noise contrast of both responses; the chosen reward settles at log 2."""
    chosen, rejected = rewards.log_ratio(pair, beta=beta)
    return links.logistic(chosen) + 0.5 * links.logistic(-chosen) + 0.5 * links.logistic(-rejected)


def bco_pair(pair: PairLogps, *, beta: float = 0.01, delta: float | Tensor = 0.0) -> Tensor:
    """BCO: chosen above and rejected below the reward `delta` (a constant, say a `RunningMean` of all rewards)."""
    chosen, rejected = rewards.log_ratio(pair, beta=beta)
    return links.logistic(chosen - delta) + links.logistic(delta - rejected)


def sppo_hard(pair: PairLogps, *, beta: float = 0.001, preference: float | Tensor = 1.0) -> Tensor:
    """SPPO: both log-ratios regress to (P - 1/2) / beta, P = `preference` for the chosen, 1 - P for the rejected, or [B]."""
    chosen, rejected = pair.log_ratios()
    target = (preference - 0.5) / beta
    return (chosen - target).square() + (rejected + target).square()


def apo_zero(pair: PairLogps, *, beta: float = 0.1) -> Tensor:
    """APO-zero: chosen up, rejected down; for chosen responses better than the model."""
    chosen, rejected = rewards.log_ratio(pair, beta=beta)
    return torch.sigmoid(-chosen) + torch.sigmoid(rejected)


def apo_down(pair: PairLogps, *, beta: float = 0.1) -> Tensor:
    """APO-down: both down, rejected further; for chosen responses worse than the model."""
    chosen, rejected = rewards.log_ratio(pair, beta=beta)
    return torch.sigmoid(chosen) + torch.sigmoid(rejected - chosen)


def kto(
    pair: PairLogps,
    *,
    baseline: float | Tensor = 0.0,
    beta: float = 0.1,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> Tensor:
    """KTO of both responses added, chosen as desirable and rejected as undesirable; `baseline` as in `unpaired.kto`.

    Pairs hold no unrelated responses to measure a baseline on; 0 is what it is at the start, where policy and reference agree.
    """
    assert pair.ref_chosen is not None and pair.ref_rejected is not None, "the loss's LossSpec says `needs_reference`"
    is_chosen = torch.ones_like(pair.chosen, dtype=torch.bool)
    one_side = partial(
        unpaired.kto,
        baseline=baseline,
        beta=beta,
        desirable_weight=desirable_weight,
        undesirable_weight=undesirable_weight,
    )
    return one_side(pair.chosen, pair.ref_chosen, is_chosen) + one_side(pair.rejected, pair.ref_rejected, ~is_chosen)


def npo(pair: PairLogps, *, beta: float = 0.1) -> Tensor:
    """NPO of the rejected response; the chosen one has no part in it."""
    assert pair.ref_rejected is not None, "the loss's LossSpec says `needs_reference`"
    return unlearning.npo(pair.rejected, pair.ref_rejected, beta=beta)


def simnpo(pair: PairLogps, *, beta: float = 2.5, gamma: float = 0.0) -> Tensor:
    """SimNPO of the rejected response; the chosen one has no part in it."""
    assert pair.rejected_lengths is not None, "the loss's LossSpec says `length`"
    return unlearning.simnpo(pair.rejected, pair.rejected_lengths, beta=beta, gamma=gamma)
