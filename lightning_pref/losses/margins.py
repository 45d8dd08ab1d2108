"""Losses of the margin between two rewards measured against a reference. Each is one link on one kind of reward."""

from torch import Tensor

from lightning_pref.losses import links, rewards
from lightning_pref.losses.absolute import bco_pair
from lightning_pref.losses.pair import PairLogps
from lightning_pref.losses.reference_free import sft
from lightning_pref.losses.rewards import FDivergence


def sigmoid(pair: PairLogps, *, beta: float = 0.1, f_divergence: FDivergence = "reverse_kl") -> Tensor:
    """DPO."""
    chosen, rejected = rewards.log_ratio(pair, beta=beta, f_divergence=f_divergence)
    return links.logistic(chosen - rejected)


def cdpo(pair: PairLogps, *, beta: float = 0.1, label_smoothing: float = 0.1, f_divergence: FDivergence = "reverse_kl") -> Tensor:
    """Conservative DPO: smoothed labels."""
    chosen, rejected = rewards.log_ratio(pair, beta=beta, f_divergence=f_divergence)
    return links.smoothed(chosen - rejected, label_smoothing)


def robust(
    pair: PairLogps, *, beta: float = 0.1, label_smoothing: float = 0.1, f_divergence: FDivergence = "reverse_kl"
) -> Tensor:
    """Robust DPO: unbiased under flipped labels, and unbounded below."""
    chosen, rejected = rewards.log_ratio(pair, beta=beta, f_divergence=f_divergence)
    return links.debiased(chosen - rejected, label_smoothing)


def hinge(pair: PairLogps, *, beta: float = 0.1, f_divergence: FDivergence = "reverse_kl") -> Tensor:
    """SLiC with a reference, RSO's hinge-norm."""
    chosen, rejected = rewards.log_ratio(pair, beta=beta, f_divergence=f_divergence)
    return links.hinge(chosen - rejected)


def ipo(pair: PairLogps, *, beta: float = 0.1, length_normalize: bool = True, f_divergence: FDivergence = "reverse_kl") -> Tensor:
    """IPO: the margin is drawn to 1 / (2 beta) from both sides, per token unless told otherwise."""
    chosen, rejected = rewards.ipo_log_ratio(pair, beta=beta, length_normalize=length_normalize, f_divergence=f_divergence)
    return links.square(chosen - rejected) / beta**2


def exo_pair(
    pair: PairLogps, *, beta: float = 0.1, label_smoothing: float = 1e-3, f_divergence: FDivergence = "reverse_kl"
) -> Tensor:
    """EXO: reverse KL to the labels, mode-seeking; a pair that is very wrong gets hardly any gradient."""
    chosen, rejected = rewards.log_ratio(pair, beta=beta, f_divergence=f_divergence)
    return links.reverse_kl(chosen - rejected, label_smoothing)


def discopop(pair: PairLogps, *, beta: float = 0.05, tau: float = 0.05, f_divergence: FDivergence = "reverse_kl") -> Tensor:
    """DiscoPOP, the discovered blend. Not convex: at z = 0 its gradient makes the margin smaller."""
    chosen, rejected = rewards.log_ratio(pair, beta=beta, f_divergence=f_divergence)
    return links.log_ratio_modulated(chosen - rejected, tau)


def sigmoid_norm(pair: PairLogps, *, beta: float = 5.0, f_divergence: FDivergence = "reverse_kl") -> Tensor:
    """Length-normalised DPO."""
    chosen, rejected = rewards.mean_log_ratio(pair, beta=beta, f_divergence=f_divergence)
    return links.logistic(chosen - rejected)


def aot(pair: PairLogps, *, beta: float = 0.01, label_smoothing: float = 0.0) -> Tensor:
    """AOT, paired: sorted margins of the policy against sorted margins of the reference. Entries are slots, not pairs."""
    assert pair.ref_chosen is not None and pair.ref_rejected is not None, "the loss's LossSpec says `needs_reference`"
    policy = (pair.chosen - pair.rejected).sort().values
    reference = (pair.ref_chosen - pair.ref_rejected).sort().values
    return links.smoothed(beta * (policy - reference), label_smoothing)


def aot_unpaired(pair: PairLogps, *, beta: float = 0.01, label_smoothing: float = 0.0) -> Tensor:
    """AOT, unpaired: sorted chosen against sorted rejected log-ratios. Entries are slots, not pairs."""
    chosen, rejected = rewards.log_ratio(pair, beta=beta)
    return links.smoothed(chosen.sort().values - rejected.sort().values, label_smoothing)


def dpop(pair: PairLogps, *, beta: float = 0.3, penalty: float = 50.0) -> Tensor:
    """DPO-positive (Smaug): a chosen response below its reference counts against the pair."""
    chosen, rejected = rewards.displacement_penalized(pair, beta=beta, penalty=penalty)
    return links.logistic(chosen - rejected)


def rdpo(pair: PairLogps, *, beta: float = 0.1, alpha: float = 0.01) -> Tensor:
    """Length-regularised DPO."""
    chosen, rejected = rewards.length_penalized(pair, beta=beta, alpha=alpha)
    return links.logistic(chosen - rejected)


def rpo(pair: PairLogps, *, beta: float = 0.1, alpha: float = 1.0) -> Tensor:
    """DPO and `alpha` times the chosen response's mean NLL."""
    return sigmoid(pair, beta=beta) + alpha * sft(pair)


def mpo(pair: PairLogps, *, beta: float = 0.1) -> Tensor:
    """0.8 DPO + 0.2 BCO + the chosen response's mean NLL. Other mixes: `LossMix`."""
    return 0.8 * sigmoid(pair, beta=beta) + 0.2 * bco_pair(pair, beta=beta) + sft(pair)


def flex(pair: PairLogps, *, beta_chosen: float = 0.1, beta_rejected: float = 0.08) -> Tensor:
    """DPO that pushes the rejected response down more gently than it pulls the chosen one up."""
    chosen, rejected = rewards.split_beta(pair, beta_chosen=beta_chosen, beta_rejected=beta_rejected)
    return links.logistic(chosen - rejected)


def inpo(pair: PairLogps, *, previous_chosen: Tensor, previous_rejected: Tensor, eta: float, tau: float) -> Tensor:
    """INPO: one step of no-regret play against the previous policy, whose sums `previous_*` are, [B] each."""
    chosen, rejected = rewards.against_two(
        pair, previous_chosen=previous_chosen, previous_rejected=previous_rejected, eta=eta, tau=tau
    )
    return (chosen - rejected - 0.5 / eta).square()
