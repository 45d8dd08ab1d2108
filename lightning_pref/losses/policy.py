"""Losses of sampled responses under the policy that is trained: PPO's, GRPO's and their kin, one loss per token.

Tensors are element by element, any shape; the flat layout `[N]` is meant. What the papers' names stand for:

| name | ratio | clip_low, clip_high | aggregation | KL in the loss |
|---|---|---|---|---|
| PPO | token | 0.2, 0.2 | `token_mean` | none (in the reward) |
| GRPO, arXiv:2402.03300 | token | 0.2, 0.2 | `sequence_mean` | k3, its own gradient |
| DAPO, arXiv:2503.14476 | token | 0.2, 0.28 | `token_mean` | none |
| Dr. GRPO, arXiv:2503.20783 | token | 0.2, 0.2 | `sequence_sum`, `max_length` | none |
| GSPO, arXiv:2507.18071 | `sequence_log_ratios` | 3e-4, 4e-4 | `sequence_mean` | none |
| RLOO, arXiv:2402.14740 | `sequence_log_ratios(how="sum")` | 0.2, 0.2 | `sequence_mean` | none (in the reward) |
| the same on fresh samples | `reinforce` | - | `sequence_sum` | none (in the reward) |
| CISPO, arXiv:2506.13585 | token, `cispo` | - | `token_mean` | none |

`functional.aggregate` is the aggregation of padded tensors, `aggregation_weights` that of flat ones.
"""

import math
from typing import Literal

import torch
from torch import Tensor

from lightning_pref.functional.logprobs import MAX_LOG_RATIO, KLEstimator, kl_estimate
from lightning_pref.functional.masked import Aggregation, segment_sum, wide


def log_ratios(logps: Tensor, old_logps: Tensor) -> Tensor:
    """log of pi / pi_old, the policy now over the policy that sampled the tokens; gradient through the first only.

    Args:
        logps: Log-probabilities now, any shape.
        old_logps: Those of the same tokens when the experience was collected, by the same forward pass and temperature.

    >>> log_ratios(torch.tensor([-1.0]), torch.tensor([-3.0]))
    tensor([2.])
    """
    if logps.shape != old_logps.shape:
        raise ValueError(f"Log-probabilities differ in shape: {list(logps.shape)} and {list(old_logps.shape)}.")
    return wide(logps) - wide(old_logps.detach())


def sequence_log_ratios(log_ratio: Tensor, response: Tensor, lengths: Tensor, *, how: Literal["mean", "sum"] = "mean") -> Tensor:
    """One log-ratio per response, handed back to each of its tokens: the whole response is kept or clipped.

    `mean` is GSPO's, the geometric mean of the token ratios; `sum` is the ratio of the response's probabilities. In an
    aggregation where every response has the weight w, its tokens need w / length each: `sequence_mean` gives them that.

    Args:
        log_ratio: Of each token, [N].
        response: Index of the response of each token, [N].
        lengths: Tokens of each response, [R], N together.
        how: Mean or sum over the tokens.

    >>> sequence_log_ratios(torch.tensor([1.0, 3.0, 5.0]), torch.tensor([0, 0, 1]), torch.tensor([2, 1]))
    tensor([2., 2., 5.])
    """
    sums = segment_sum(log_ratio, response, len(lengths))
    if how == "mean":
        sums = sums / lengths.clamp(min=1)
    elif how != "sum":
        raise ValueError(f"`how` must be 'mean' or 'sum', got {how!r}.")
    return sums[response]


def probability_ratio(log_ratio: Tensor) -> Tensor:
    """exp(log-ratio), which beyond exp(20) goes on as its tangent: value and gradient stay finite, and neither is lost.

    A clamp instead would leave a token that has run away with no gradient to bring it back.

    >>> probability_ratio(torch.tensor([0.0, float("-inf")]))
    tensor([1., 0.])
    """
    log_ratio = wide(log_ratio)
    return log_ratio.clamp(max=MAX_LOG_RATIO).exp() + math.exp(MAX_LOG_RATIO) * (log_ratio - MAX_LOG_RATIO).clamp(min=0.0)


def ppo_clip(
    log_ratio: Tensor,
    advantages: Tensor,
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    dual_clip: float | None = None,
) -> Tensor:
    """Clipped surrogate (PPO, arXiv:1707.06347, eq. 7): max(-A * ratio, -A * clip(ratio, 1 - clip_low, 1 + clip_high)).

    Args:
        log_ratio: `log_ratios`, or `sequence_log_ratios` of them.
        advantages: Same shape; constants.
        clip_low: How far the ratio may fall before a negative advantage pushes no more, in (0, 1].
        clip_high: How far it may rise before a positive advantage pushes no more, positive. Above `clip_low` it leaves room
            for rare tokens (DAPO).
        dual_clip: Where the advantage is negative the loss is at most `-dual_clip * A`, above 1 (arXiv:1912.09729, there 3);
            `None` lets it grow with the ratio. TRL's `delta` (arXiv:2505.07291).

    Returns:
        Loss, same shape; its gradient at ratio 1 is that of `reinforce`.

    >>> ppo_clip(torch.tensor([0.5, 1.5, 1.5]).log(), torch.tensor([-1.0, 1.0, -1.0]))
    tensor([ 0.8000, -1.2000,  1.5000])
    """
    _check_clips(clip_low, clip_high)
    if dual_clip is not None and not dual_clip > 1:
        raise ValueError(f"`dual_clip` must be above 1, got {dual_clip!r}: at 1 it would stop every negative advantage.")
    advantages = _constants(advantages, log_ratio)
    ratio = probability_ratio(log_ratio)
    losses = torch.maximum(-advantages * ratio, -advantages * ratio.clamp(1.0 - clip_low, 1.0 + clip_high))
    if dual_clip is not None:
        losses = torch.where(advantages < 0, torch.minimum(losses, -dual_clip * advantages), losses)
    return losses


def reinforce(logps: Tensor, advantages: Tensor) -> Tensor:
    """-A * log pi: the policy gradient for tokens the policy itself has just sampled.

    Args:
        logps: Any shape.
        advantages: Same shape; constants.

    >>> reinforce(torch.tensor([-2.0]), torch.tensor([0.5]))
    tensor([1.])
    """
    return -_constants(advantages, logps) * wide(logps)


def cispo(logps: Tensor, log_ratio: Tensor, advantages: Tensor, *, max_weight: float = 5.0) -> Tensor:
    """`reinforce` with a capped importance weight that has no gradient (CISPO, arXiv:2506.13585).

    Unlike in `ppo_clip` no token drops out of the gradient.

    Args:
        logps: Any shape.
        log_ratio: `log_ratios` of the same tokens.
        advantages: Same shape; constants.
        max_weight: Largest weight, at least 1: the paper's 1 + epsilon_high, TRL's `epsilon_high`. ScaleRL
            (arXiv:2510.13786) took 5.

    >>> cispo(torch.tensor([-2.0]), torch.tensor([9.0]), torch.tensor([1.0]), max_weight=1.5)
    tensor([3.])
    """
    if not max_weight >= 1:
        raise ValueError(f"`max_weight` must be at least 1, the weight of a fresh sample; got {max_weight!r}.")
    weight = probability_ratio(log_ratio.detach()).clamp(max=max_weight)
    return weight * reinforce(logps, advantages)


def value_loss(values: Tensor, returns: Tensor, old_values: Tensor | None = None, *, clip: float | None = None) -> Tensor:
    """Half the squared error of the values; with `clip` the larger of it and that of the value clipped around the old one.

    The clipping is symmetric: a value that moves towards its return stops at a distance of `clip`, from below as from above,
    and one that moves away is never clipped free.

    Args:
        values: Any shape.
        returns: Same shape; constants.
        old_values: Values when the experience was collected; needed with `clip`.
        clip: How far a value may move, positive; `None` is any distance.

    >>> value_loss(torch.tensor([2.0]), torch.tensor([1.0]))
    tensor([0.5000])
    >>> value_loss(torch.tensor([1.0]), torch.tensor([1.0]), torch.tensor([0.0]), clip=0.5)
    tensor([0.1250])
    """
    values, returns = wide(values), _constants(returns, values)
    errors = (values - returns).square()
    if clip is None:
        return 0.5 * errors
    if not clip > 0:
        raise ValueError(f"`clip` must be positive, got {clip!r}; `None` is no clipping.")
    if old_values is None:
        raise ValueError("`clip` needs `old_values`, the values when the experience was collected.")
    # A maximum splits the gradient of a tie between both sides; inside the clip they are one and the same number.
    moved = _constants(old_values, values)
    clipped = moved + (values - moved).clamp(-clip, clip)
    return 0.5 * torch.maximum(errors, (clipped - returns).square())


def kl_loss(
    logps: Tensor,
    ref_logps: Tensor,
    *,
    value: KLEstimator = "k3",
    gradient: Literal["kl", "own"] = "kl",
) -> Tensor:
    """KL(policy || reference) as a loss, one estimate per token that the policy sampled.

    With `gradient="kl"` the value is the named estimator's and the gradient that of `k2`, whose expectation under the policy
    is the gradient of the KL. `own` differentiates the estimator itself: for k3, as GRPO does, that is the gradient of
    KL(reference || policy), and for k1 it is zero on average, so that is refused.

    Once the policy has moved away from the one that sampled, the estimate is unbiased again if multiplied by
    `probability_ratio(log_ratio).detach()`.

    Args:
        logps: Log-probabilities under the policy, any shape.
        ref_logps: Same tokens under the reference.
        value: Which estimator; k1 and k3 are unbiased.
        gradient: Whose gradient.

    >>> logps = torch.tensor([-1.0], requires_grad=True)
    >>> kl_loss(logps, torch.tensor([-3.0]), value="k1").backward()
    >>> logps.grad
    tensor([2.])
    """
    estimate = kl_estimate(logps, ref_logps.detach(), value)
    if gradient == "own":
        if value == "k1":
            raise ValueError("The gradient of 'k1' is zero on average: use `gradient='kl'`, or put k1 into the reward.")
        return estimate
    if gradient != "kl":
        raise ValueError(f"`gradient` must be 'kl' or 'own', got {gradient!r}.")
    carrier = kl_estimate(logps, ref_logps.detach(), "k2")
    return estimate.detach() + (carrier - carrier.detach())


def negative_entropy(logps: Tensor) -> Tensor:
    """Minus the entropy of the policy as a loss, estimated from the tokens it sampled; needs no logits.

    The value is log pi. Its own gradient is zero on average, so the gradient is that of (log pi)^2 / 2, whose expectation is
    the gradient of minus the entropy. Where the exact entropy is at hand and carries a gradient, `-entropy` is less noisy.

    Args:
        logps: Log-probabilities of sampled tokens, any shape.

    >>> logps = torch.tensor([-2.0], requires_grad=True)
    >>> negative_entropy(logps).backward()
    >>> logps.grad
    tensor([-2.])
    """
    return kl_loss(logps, torch.zeros_like(logps), value="k1")


def aggregation_weights(response: Tensor, lengths: Tensor, how: Aggregation, *, max_length: int | None = None) -> Tensor:
    """Weight of each token of the flat layout in a mean that is exact over micro-batches and ranks.

    The loss is `(weights * token_losses).sum()` divided by a count over **all** ranks and micro-batches of the update:
    of tokens for `token_mean`, of responses for the two others. Then it is what `functional.aggregate` gives for the
    padded tensors in one piece. (GRPO: `sequence_mean`. DAPO, TRL's default: `token_mean`. Dr. GRPO: `sequence_sum` with
    `max_length`. A token mean of each micro-batch, TRL's `bnpo`, depends on how the batch was cut and is not offered.)

    Args:
        response: Index of the response of each token, [N].
        lengths: Tokens of each response, [R].
        how: As in `functional.aggregate`.
        max_length: For `sequence_sum`: a constant that divides it, such as the token cap, so that the loss is of the size of
            one token's while long responses still count by their length.

    Returns:
        [N], float32.

    >>> response, lengths = torch.tensor([0, 0, 1]), torch.tensor([2, 1])
    >>> aggregation_weights(response, lengths, "sequence_mean")
    tensor([0.5000, 0.5000, 1.0000])
    """
    if max_length is not None and (how != "sequence_sum" or not max_length > 0):
        raise ValueError(f"`max_length` divides 'sequence_sum' and must be positive, got {max_length!r} with {how!r}.")
    ones = torch.ones(response.shape, dtype=torch.float32, device=response.device)
    if how == "sequence_mean":
        return ones / lengths.clamp(min=1)[response]
    if how == "sequence_sum":
        return ones / (max_length or 1)
    if how != "token_mean":
        raise ValueError(f"`how` must be 'token_mean', 'sequence_mean' or 'sequence_sum', got {how!r}.")
    return ones


def _constants(given: Tensor, like: Tensor) -> Tensor:
    """Without gradient, in float32 or better, and of the shape they are paired with: [N, 1] with [N] would become [N, N]."""
    if given.shape != like.shape:
        raise ValueError(f"Advantages, returns and old values have the shape {list(like.shape)}, got {list(given.shape)}.")
    return wide(given.detach())


def _check_clips(clip_low: float, clip_high: float) -> None:
    if not (0.0 < clip_low <= 1.0 and clip_high > 0.0):
        raise ValueError(f"`clip_low` must be in (0, 1] and `clip_high` positive, got {clip_low!r} and {clip_high!r}.")
