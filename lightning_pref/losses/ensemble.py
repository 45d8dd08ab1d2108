"""One reward out of several reward models', and how far they disagree. The members are the first dimension, [K, ...].

Standardise the members first: each has a zero and a scale of its own, and the minimum belongs to whichever has the lowest
offset. Clip after aggregating, not before. A `nan` of one member makes the aggregate `nan`, whose advantage is then 0
(`functional.grpo_advantages`): a broken member must not pass as an opinion.
"""

import math
from typing import Literal

import torch
from torch import Tensor

from lightning_pref.functional.masked import wide

How = Literal["mean", "wco", "uwo"]

_BITS = 0xFFFFFFFF
# Cumulative probabilities of a Poisson count of mean 1: at least j + 1 beyond the j-th. The last is 1 - 1e-8.
_POISSON = tuple(math.exp(-1) * sum(1 / math.factorial(i) for i in range(j + 1)) for j in range(11))


def ensemble_reward(rewards: Tensor, how: How = "mean", coefficient: float = 0.5, ddof: int = 1) -> Tensor:
    """Aggregate of the members' rewards (Coste et al., arXiv:2310.02743, section 3).

    Args:
        rewards: [K, ...], one entry per member.
        how: `mean`; `wco` the minimum (worst case); `uwo` the mean less `coefficient` times the variance.
        coefficient: lambda of `uwo`, not negative: 0.5 for best-of-n and 0.1 for PPO in the paper.
        ddof: Subtracted from K in the divisor of the variance. The authors' PPO code takes 1, their best-of-n code 0: with
            five members the same lambda weighs 1.25 times as much under 1.

    Returns:
        [...], float32 or better.

    >>> [ensemble_reward(torch.tensor([[1.0], [3.0]]), how).item() for how in ("mean", "wco", "uwo")]
    [2.0, 1.0, 1.0]
    """
    if how == "mean":
        return wide(rewards).mean(0)
    if how == "wco":
        return wide(rewards).amin(0)
    if how == "uwo":
        if coefficient < 0:
            raise ValueError(f"`coefficient` must not be negative, got {coefficient!r}: it would reward disagreement.")
        return wide(rewards).mean(0) - coefficient * ensemble_variance(rewards, ddof=ddof)
    raise ValueError(f"`how` must be 'mean', 'wco' or 'uwo', got {how!r}.")


def ensemble_variance(rewards: Tensor, *, ddof: int = 1) -> Tensor:
    """Variance over the members, [K, ...] -> [...]: how far they disagree. One member does not disagree with itself: 0.

    >>> ensemble_variance(torch.tensor([[1.0], [3.0]])), ensemble_variance(torch.tensor([[1.0], [3.0]]), ddof=0)
    (tensor([2.]), tensor([1.]))
    """
    if rewards.ndim == 0 or len(rewards) == 0:
        raise ValueError(f"`rewards` must be [K, ...] with a member or more, got {list(rewards.shape)}.")
    if ddof not in (0, 1):
        raise ValueError(f"`ddof` must be 0 or 1, got {ddof!r}.")
    if len(rewards) == 1:
        return wide(rewards[0]) * 0.0
    return wide(rewards).var(0, correction=ddof)


def standardized_members(rewards: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Rewards in standard deviations of each member on a reference set, such as answers of the initial policy.

    Args:
        rewards: [K, ...].
        mean: Of each member on the reference set, [K].
        std: Likewise, [K], positive.

    >>> standardized_members(torch.tensor([[3.0], [5.0]]), torch.tensor([1.0, 5.0]), torch.tensor([2.0, 1.0]))
    tensor([[1.],
            [0.]])
    """
    if not mean.shape == std.shape == rewards.shape[:1]:
        raise ValueError(
            f"`mean` and `std` must be [K] for rewards of shape {list(rewards.shape)}, "
            f"got {list(mean.shape)} and {list(std.shape)}."
        )
    per_member = (-1, *[1] * (rewards.ndim - 1))
    return (wide(rewards) - mean.reshape(per_member)) / std.reshape(per_member)


def bootstrap_weights(row_ids: Tensor, num_members: int, *, seed: int = 0) -> Tensor:
    """How often each row counts for each member, as if every member had drawn its rows with replacement, [K, G] float32.

    Poisson counts of mean 1 (the limit of the multinomial's for many rows), a pure function of row, member and seed: a row
    counts alike in every epoch, batch and rank.

    Args:
        row_ids: Numbers of the rows, integer [G].
        num_members: K.
        seed: Another one draws other rows.

    >>> weights = bootstrap_weights(torch.arange(10_000), 2)
    >>> [round(value, 1) for value in (*weights.mean(1).tolist(), *weights.var(1).tolist())]
    [1.0, 1.0, 1.0, 1.0]
    """
    members = torch.arange(num_members, device=row_ids.device)[:, None]
    ids = row_ids.long()
    keys = _mixed(_mixed(_mixed(members + _mixed(torch.full_like(members, seed))) ^ (ids & _BITS)) ^ (ids >> 32 & _BITS))
    uniform = (keys.double() + 0.5) / 2**32
    return sum((uniform > bound).float() for bound in _POISSON) + torch.zeros_like(uniform, dtype=torch.float32)


def _mixed(values: Tensor) -> Tensor:
    """A hash of the lower 32 bits, each bit of which depends on all of them (an xorshift-multiply mixer)."""
    mixed = values & _BITS
    mixed = ((mixed ^ (mixed >> 16)) * 0x7FEB352D) & _BITS
    mixed = ((mixed ^ (mixed >> 15)) * 0x846CA68B) & _BITS
    return mixed ^ (mixed >> 16)


def uncertainty_discounted(losses: Tensor, uncertainty: Tensor) -> Tensor:
    """loss * exp(-u) + u: an uncertain reward counts less, and being uncertain costs (after Ctrl-U, arXiv:2410.11236).

    Over a free u >= 0 the least is at u = log(loss), or at 0 where the loss is below 1; a detached u only discounts.

    Args:
        losses: Not negative, any shape.
        uncertainty: Same shape, not negative: standard deviation of an ensemble or of dropout samples.

    >>> uncertainty_discounted(torch.tensor([4.0]), torch.tensor([0.0]))
    tensor([4.])
    """
    if losses.shape != uncertainty.shape:
        raise ValueError(f"`losses` and `uncertainty` differ in shape: {list(losses.shape)} and {list(uncertainty.shape)}.")
    uncertainty = wide(uncertainty)
    return wide(losses) * torch.exp(-uncertainty) + uncertainty
