"""Losses of a pair that ask no reference model."""

from torch import Tensor

from lightning_pref.losses import links, rewards
from lightning_pref.losses.pair import PairLogps


def sft(pair: PairLogps) -> Tensor:
    """The chosen response's mean negative log-likelihood; the rejected one has no part in it."""
    chosen, _ = pair.mean_logps()
    return -chosen


def simpo(pair: PairLogps, *, beta: float = 2.0, gamma: float = 0.5) -> Tensor:
    """SimPO: a margin of `gamma` between beta times the mean log-probs."""
    chosen, rejected = rewards.mean(pair, beta=beta)
    return links.logistic(chosen - rejected - gamma)


def alphapo(pair: PairLogps, *, beta: float = 2.5, gamma: float = 0.1, alpha: float = 0.25) -> Tensor:
    """AlphaPO: SimPO with a bent reward."""
    chosen, rejected = rewards.inverse_power(pair, beta=beta, alpha=alpha)
    return links.logistic(chosen - rejected - gamma)


def orpo(pair: PairLogps, *, beta: float = 0.1) -> Tensor:
    """ORPO: the chosen response's mean NLL and `beta` times the logistic loss of the log odds ratio."""
    chosen, rejected = rewards.log_odds(pair)
    return sft(pair) + beta * links.logistic(chosen - rejected)


def cpo(pair: PairLogps, *, beta: float = 0.1, alpha: float = 1.0) -> Tensor:
    """CPO: DPO without a reference and `alpha` times the chosen response's summed NLL."""
    chosen, rejected = rewards.summed(pair, beta=beta)
    return links.logistic(chosen - rejected) - alpha * pair.chosen


def slic_hf(pair: PairLogps, *, delta: float = 1.0, alpha: float = 0.1) -> Tensor:
    """SLiC-HF: a margin of `delta` nats and `alpha` times the chosen response's summed NLL."""
    return (delta - pair.chosen + pair.rejected).clamp(min=0.0) - alpha * pair.chosen


def rrhf(pair: PairLogps, *, alpha: float = 1.0) -> Tensor:
    """RRHF of two responses: the mean log-probs in order, and `alpha` times the chosen response's mean NLL."""
    chosen, rejected = rewards.mean(pair)
    return (rejected - chosen).clamp(min=0.0) + alpha * sft(pair)
