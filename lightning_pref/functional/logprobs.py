"""Log-probabilities of tokens, and what is estimated from them. Everything is in nats and reduced in float32 or better."""

import math
from typing import Literal

import torch
from torch import Tensor

from lightning_pref.functional.masked import wide

KLEstimator = Literal["k1", "k2", "k3"]

# exp(20) ~ 5e8: a probability ratio beyond it is a sign of trouble, not a number to be exact about, and float32 still
# has room to square it.
MAX_LOG_RATIO = 20.0
# exp(30) ~ 1e13, carried on by a slope of the same size over 1e4 nats, can still be squared in float32.
MAX_EXPONENT = 30.0


def token_logps(logits: Tensor, labels: Tensor) -> Tensor:
    """Log-probability of each label under the logits of the same position. No shift: see `next_token_logps`.

    The log-softmax over the vocabulary is never built, only its value at the label.

    Args:
        logits: [..., V]; may hold -inf for banned tokens.
        labels: Token ids, [...], int64, each in [0, V).

    Returns:
        [...], float32 (float64 for float64 logits).

    >>> token_logps(torch.tensor([[0.25, 0.75]]).log(), torch.tensor([1])).exp()
    tensor([0.7500])
    """
    if logits.shape[:-1] != labels.shape:
        raise ValueError(
            f"Logits of shape {list(logits.shape)} need labels of shape {list(logits.shape[:-1])}, got {list(labels.shape)}."
        )
    at_label = wide(logits.gather(-1, labels.unsqueeze(-1)).squeeze(-1))
    return at_label - wide(logits).logsumexp(-1)


def next_token_logps(logits: Tensor, input_ids: Tensor) -> Tensor:
    """Log-probability of every token but the first, given those before it: logits at position t score token t + 1.

    Args:
        logits: Output of a causal language model, [B, T, V].
        input_ids: What it was fed, [B, T], int64.

    Returns:
        [B, T - 1]; entry t belongs to token t + 1. Masks made for `input_ids` are shifted alike: `mask[:, 1:]`.

    >>> after_any = torch.tensor([0.25, 0.75]).log().expand(1, 3, 2)
    >>> next_token_logps(after_any, torch.tensor([[0, 0, 1]])).exp()
    tensor([[0.2500, 0.7500]])
    """
    return token_logps(logits[:, :-1], input_ids[:, 1:])


def entropy(logits: Tensor) -> Tensor:
    """Shannon entropy of each position's distribution, [..., V] -> [...], in [0, log V].

    >>> entropy(torch.tensor([[0.0, 0.0], [0.0, float("-inf")]]))
    tensor([0.6931, 0.0000])
    """
    logits = wide(logits)
    # A banned token has probability 0 and logit -inf; their product is meant to be 0, not nan.
    finite = logits.masked_fill(logits == -torch.inf, 0.0)
    return logits.logsumexp(-1) - (logits.softmax(-1) * finite).sum(-1)


def log_collision(logits: Tensor) -> Tensor:
    """Log of the probability that two tokens drawn from a position agree, log sum_v p(v)^2, [..., V] -> [...].

    >>> log_collision(torch.tensor([[0.0, 0.0]])).exp()
    tensor([0.5000])
    """
    logits = wide(logits)
    return (2 * logits).logsumexp(-1) - 2 * logits.logsumexp(-1)


def kl_estimate(logps: Tensor, ref_logps: Tensor, kind: KLEstimator) -> Tensor:
    """Estimate of KL(policy || reference) from tokens sampled from the policy, one value per token.

    With r = ref_logps - logps (names of "Approximating KL Divergence", joschu.net/blog/kl-approx.html):

    - `k1` = -r: unbiased, noisy, either sign. For a penalty inside the reward. As a loss its expected gradient is zero.
    - `k2` = r^2 / 2: biased, but on samples of the policy its gradient is that of the KL. For a loss.
    - `k3` = exp(r) - 1 - r: unbiased, never negative. For reporting. Its gradient is that of KL(reference || policy).

    Beyond r = 20 the exponential of `k3` goes on as its tangent, so that value and gradient stay finite.

    Args:
        logps: Log-probabilities under the policy, any shape.
        ref_logps: Same tokens under the reference.
        kind: Which estimator.

    >>> kl_estimate(torch.tensor([-1.0]), torch.tensor([-3.0]), "k1")
    tensor([2.])
    >>> kl_estimate(torch.tensor([-1.0]), torch.tensor([-3.0]), "k2")
    tensor([2.])
    """
    if logps.shape != ref_logps.shape:
        raise ValueError(f"Log-probabilities differ in shape: {list(logps.shape)} and {list(ref_logps.shape)}.")
    log_ratio = wide(ref_logps) - wide(logps)
    if kind == "k1":
        return -log_ratio
    if kind == "k2":
        return log_ratio.square() / 2
    if kind == "k3":
        return capped_expm1(log_ratio, MAX_LOG_RATIO) - log_ratio
    raise ValueError(f"`kind` must be 'k1', 'k2' or 'k3', got {kind!r}.")


def capped_expm1(x: Tensor, cap: float = MAX_EXPONENT) -> Tensor:
    """exp(x) - 1 up to `cap`, and its tangent from there on: never overflows, nor loses its gradient as a clamp does.

    >>> capped_expm1(torch.tensor([0.0, 3.0]), cap=0.0)
    tensor([0., 3.])
    """
    return x.clamp(max=cap).expm1() + math.exp(cap) * (x - cap).clamp(min=0.0)


def log1mexp(x: Tensor) -> Tensor:
    """log(1 - exp(x)) for x <= 0: the log-probability of "not that", from the log-probability of "that".

    >>> log1mexp(torch.tensor([0.25]).log()).exp()
    tensor([0.7500])
    """
    # Each branch keeps its digits on its side of -log 2. The clamp keeps the unused branch's gradient finite.
    near_one = torch.log(-torch.expm1(x))
    far_below = torch.log1p(-torch.exp(x.clamp(max=-math.log(2))))
    return torch.where(x > -math.log(2), near_one, far_below)
