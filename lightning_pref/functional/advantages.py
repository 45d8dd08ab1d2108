"""How much better than expected: advantages of tokens (GAE, REINFORCE++) and of responses (RLOO, GRPO).

Advantages are constants: no gradient flows through any of them. Token functions take the flat layout, N response tokens one
response after the other with the `response` index of each; `gae` is the same for padded tensors. Response functions take
rewards `[R]` with the `prompt_ids` of their prompts, in any order, or `[P, n]`, where a row is a prompt. A group must be
complete: its members cannot be spread over ranks.
"""

from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_pref.functional.masked import wide
from lightning_pref.functional.moments import Moments, moment_sums, whiten_with, widest
from lightning_pref.functional.token_rewards import is_last_token

Scale = Literal["group", "batch", "none"]

# Added to a standard deviation of rewards, TRL's value: where samples of a prompt differ by less, the difference is noise.
SCALE_EPS = 1e-4


class Advantages(NamedTuple):
    """Advantages, and the returns a value function is trained towards (advantage + value, before any whitening)."""

    advantages: Tensor
    returns: Tensor


def flat_gae(
    rewards: Tensor, values: Tensor, response: Tensor, *, gamma: float, lam: float, bootstrap: Tensor | None = None
) -> Advantages:
    """Generalised advantage estimation (arXiv:1506.02438, eq. 16) of every token, without padding.

        delta_t = r_t + gamma * V_{t+1} - V_t;    A_t = delta_t + gamma * lam * A_{t+1}

    The recursion is unrolled by doubling: about log2(N) passes over the tokens instead of one step per position.

    Args:
        rewards: [N].
        values: Value of the state each token was chosen in, [N].
        response: Index of the response of each token, [N], ascending.
        gamma: Discount, in [0, 1].
        lam: lambda, in [0, 1]: 0 trusts the values, 1 the rewards.
        bootstrap: Value of the state after the last token, [R]. It must be 0 where the response ended by itself (nothing can
            follow an end), and is V where it was cut off. `None` is 0 for all: the episode is over at the token cap, too.

    >>> rewards, values = torch.tensor([0.0, 1.0, 2.0]), torch.tensor([0.5, 0.5, 1.0])
    >>> flat_gae(rewards, values, torch.tensor([0, 0, 1]), gamma=1.0, lam=1.0).advantages
    tensor([0.5000, 0.5000, 1.0000])
    """
    _check_rates(gamma, lam)
    _check_flat(rewards, response)
    rewards, values = wide(rewards.detach()), wide(values.detach())
    after = torch.zeros_like(values) if bootstrap is None else wide(bootstrap.detach())[response]
    following = torch.where(is_last_token(response), after, values.roll(-1))
    advantages = _suffix_sums(rewards + gamma * following - values, response, gamma * lam)
    return Advantages(advantages, advantages + values)


def gae(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float, bootstrap: Tensor | None = None) -> Advantages:
    """`flat_gae` of padded tensors, step by step; 0 where nothing is counted.

    A token that is not counted is skipped: the successor of a counted token is the next counted one, wherever it stands.

    Args:
        rewards: [B, T].
        values: [B, T].
        mask: Response tokens, [B, T], bool; padding may be on either side, and in between.
        gamma: Discount, in [0, 1].
        lam: lambda, in [0, 1].
        bootstrap: Value of the state after the last token, [B]; see `flat_gae`.

    >>> rewards, mask = torch.tensor([[0.0, 1.0, 9.0]]), torch.tensor([[True, True, False]])
    >>> gae(rewards, torch.full((1, 3), 0.5), mask, gamma=1.0, lam=1.0).advantages
    tensor([[0.5000, 0.5000, 0.0000]])
    """
    _check_rates(gamma, lam)
    if mask.dtype != torch.bool or not rewards.shape == values.shape == mask.shape or mask.ndim != 2:
        raise ValueError(
            "`rewards`, `values` and a bool `mask` must all be [B, T], got "
            f"{list(rewards.shape)}, {list(values.shape)} and {mask.dtype} {list(mask.shape)}."
        )
    rewards, values = wide(rewards.detach()), wide(values.detach())
    advantage = torch.zeros_like(values[:, 0])
    following = torch.zeros_like(advantage) if bootstrap is None else wide(bootstrap.detach())
    columns = []
    for t in reversed(range(mask.shape[1])):
        here = mask[:, t]
        delta = rewards[:, t] + gamma * following - values[:, t]
        advantage = torch.where(here, delta + gamma * lam * advantage, advantage)
        following = torch.where(here, values[:, t], following)
        columns.append(torch.where(here, advantage, 0.0))
    advantages = torch.stack(columns[::-1], 1)
    return Advantages(advantages, torch.where(mask, advantages + values, 0.0))


def returns_to_go(rewards: Tensor, response: Tensor, *, gamma: float = 1.0) -> Tensor:
    """Discounted sum of the rewards from each token to the end of its response, [N] -> [N].

    >>> returns_to_go(torch.tensor([1.0, 2.0, 4.0, 8.0]), torch.tensor([0, 0, 0, 1]), gamma=0.5)
    tensor([3., 4., 4., 8.])
    """
    _check_rates(gamma, 1.0)
    _check_flat(rewards, response)
    return _suffix_sums(wide(rewards.detach()), response, gamma)


def reinforce_pp_advantages(rewards: Tensor, response: Tensor, *, gamma: float = 1.0, sums: Moments | None = None) -> Tensor:
    """REINFORCE++ (arXiv:2501.03262): returns-to-go of the token rewards, whitened over all tokens of the whole batch.

    The KL is inside the rewards (`token_rewards`). For the variant with a group baseline give `token_rewards` the scores
    `grpo_advantages(scores, prompt_ids, scale="none")`. The variance is the biased one, as in OpenRLHF.

    Args:
        rewards: Rewards of the tokens, [N].
        response: Index of the response of each token, [N], ascending.
        gamma: Discount, in [0, 1].
        sums: Moments of `returns_to_go(rewards, response, gamma=gamma)` over all ranks; `None`: of this batch alone.

    >>> reinforce_pp_advantages(torch.tensor([0.0, 1.0, -1.0, 0.0]), torch.tensor([0, 0, 1, 2]))
    tensor([ 0.9045,  0.9045, -1.5076, -0.3015])
    """
    returns = returns_to_go(rewards, response, gamma=gamma)
    return whiten_with(returns, moment_sums(returns) if sums is None else sums, correction=0)


def rloo_advantages(rewards: Tensor, prompt_ids: Tensor | None = None) -> Tensor:
    """Reward less the mean reward of the **other** responses to the prompt (RLOO, arXiv:2402.14740).

    A response without a sibling has no baseline and gets 0, and so does one whose reward is not finite, which counts nowhere.
    The KL is part of the reward: `score - coefficient * (KL summed over the response)`.

    Args:
        rewards: [R], or [P, n] without `prompt_ids`.
        prompt_ids: Equal for the responses of one prompt, [R], int64.

    Returns:
        Shape of `rewards`. The advantages of a prompt add up to 0.

    >>> rloo_advantages(torch.tensor([[1.0, 2.0, 6.0]]))
    tensor([[-3.0000, -1.5000,  4.5000]])
    """
    groups = _grouped(rewards, prompt_ids)
    others = (groups.num_counted - 1).clamp(min=1)[groups.prompt]
    baseline = (groups.totals[groups.prompt] - groups.rewards) / others
    return groups.spread_out(groups.rewards - baseline, like=rewards)


def grpo_advantages(
    rewards: Tensor, prompt_ids: Tensor | None = None, *, scale: Scale = "group", sums: Moments | None = None
) -> Tensor:
    """Reward less the mean of its prompt, divided by a standard deviation (GRPO, arXiv:2402.03300, section 4.1.2).

    Where all rewards of a prompt are equal, or there is only one, the advantage is exactly 0; likewise for a reward that is
    not finite, which counts nowhere. Standard deviations are unbiased, and 1e-4 is added to them.

    Args:
        rewards: [R], or [P, n] without `prompt_ids`.
        prompt_ids: Equal for the responses of one prompt, [R], int64.
        scale: `group` divides by the standard deviation within the prompt, `batch` by that of all rewards, `none` by nothing
            (Dr. GRPO, arXiv:2503.20783: the first weighs prompts that are nearly solved or nearly hopeless most).
        sums: For `batch`: moments of the finite rewards of all ranks. `None` takes those given.

    Returns:
        Shape of `rewards`.

    >>> grpo_advantages(torch.tensor([1.0, 7.0, 3.0, 7.0]), torch.tensor([4, 9, 4, 9]), scale="none")
    tensor([-1.,  0.,  1.,  0.])
    """
    groups = _grouped(rewards, prompt_ids)
    deviations = groups.rewards - (groups.totals / groups.num_counted.clamp(min=1))[groups.prompt]
    if scale == "group":
        squares = torch.where(groups.counted, deviations.square(), 0.0)
        variances = _sums_of(squares, groups.prompt, groups.num_counted) / (groups.num_counted - 1).clamp(min=1)
        deviations = deviations / (variances.sqrt()[groups.prompt] + SCALE_EPS)
    elif scale == "batch":
        sums = moment_sums(groups.rewards, groups.counted) if sums is None else sums
        deviations = deviations / (sums.var().nan_to_num(nan=0.0).sqrt() + SCALE_EPS)
    elif scale != "none":
        raise ValueError(f"`scale` must be 'group', 'batch' or 'none', got {scale!r}.")
    return groups.spread_out(deviations, like=rewards)


def has_equal_group(rewards: Tensor, prompt_ids: Tensor | None = None) -> Tensor:
    """Whether all finite rewards of a response's prompt are equal: it teaches nothing, and its advantage is 0.

    Shapes as in `grpo_advantages`; bool. Its mean is the share of samples that were paid for and not used.

    >>> has_equal_group(torch.tensor([[1.0, 1.0], [1.0, 0.0]]))
    tensor([[ True,  True],
            [False, False]])
    """
    groups = _grouped(rewards, prompt_ids)
    return ~groups.differs[groups.prompt].reshape(rewards.shape)


class _Groups(NamedTuple):
    """Flat rewards of responses, and the sums of their prompts."""

    rewards: Tensor  # [R] float64, 0 where not counted
    counted: Tensor  # [R] bool
    prompt: Tensor  # [R] number of each response's prompt
    num_counted: Tensor  # [P] float64, responses that count
    totals: Tensor  # [P] float64
    differs: Tensor  # [P] bool, not all counted rewards are equal

    def spread_out(self, advantages: Tensor, like: Tensor) -> Tensor:
        """Advantages in the shape and type of the rewards given; exactly 0 where there is nothing to compare.

        By the equality of the rewards, not by a small variance: the mean of equal numbers is a rounding error off, and
        divided by their deviation, another rounding error, that would be a number of any size.
        """
        compared = self.counted & self.differs[self.prompt]
        return torch.where(compared, advantages, 0.0).to(wide(like).dtype).reshape(like.shape)


def _grouped(rewards: Tensor, prompt_ids: Tensor | None) -> _Groups:
    if prompt_ids is None:
        if rewards.ndim != 2:
            raise ValueError(f"Without `prompt_ids` the rewards must be [P, n], a row per prompt; got {list(rewards.shape)}.")
        index = torch.arange(len(rewards), device=rewards.device).repeat_interleave(rewards.shape[1])
        num_groups = len(rewards)
    else:
        if rewards.ndim != 1 or rewards.shape != prompt_ids.shape:
            raise ValueError(
                f"`rewards` and `prompt_ids` must both be [R], got {list(rewards.shape)} and {list(prompt_ids.shape)}."
            )
        index, num_groups = _numbered(prompt_ids), len(rewards)
    flat = widest(rewards.detach()).flatten()
    counted = flat.isfinite()
    flat = torch.where(counted, flat, 0.0)
    zeros = flat.new_zeros(num_groups)
    highest = torch.full_like(zeros, -torch.inf).scatter_reduce(0, index, torch.where(counted, flat, -torch.inf), "amax")
    lowest = torch.full_like(zeros, torch.inf).scatter_reduce(0, index, torch.where(counted, flat, torch.inf), "amin")
    return _Groups(
        rewards=flat,
        counted=counted,
        prompt=index,
        num_counted=_sums_of(counted.to(flat.dtype), index, zeros),
        totals=_sums_of(flat, index, zeros),
        differs=highest > lowest,
    )


def _numbered(prompt_ids: Tensor) -> Tensor:
    """Prompts numbered from 0, [R]; unlike `torch.unique` it does not ask the device how many there are."""
    ordered, order = prompt_ids.sort()
    is_next = torch.ones_like(ordered)
    is_next[1:] = ordered[1:] != ordered[:-1]
    return torch.zeros_like(order).scatter(0, order, is_next.long().cumsum(0) - 1)


def _sums_of(values: Tensor, index: Tensor, like: Tensor) -> Tensor:
    return torch.zeros_like(like).index_add(0, index, values)


def _suffix_sums(values: Tensor, response: Tensor, factor: float) -> Tensor:
    """S_t = v_t + factor * S_{t+1} within each response, [N] -> [N].

    After k passes S_t covers the 2^k tokens from t on, and the next window of that size begins at t + 2^k.
    """
    sums, window = values, 1
    while window < len(values):
        goes_on = response[window:] == response[:-window]
        following = torch.where(goes_on, sums[window:], 0.0)
        sums = sums + F.pad(factor**window * following, (0, window))
        window *= 2
    return sums


def _check_rates(gamma: float, lam: float) -> None:
    if not (0.0 <= gamma <= 1.0 and 0.0 <= lam <= 1.0):
        raise ValueError(f"`gamma` and `lam` must be in [0, 1], got {gamma!r} and {lam!r}.")


def _check_flat(rewards: Tensor, response: Tensor) -> None:
    if rewards.ndim != 1 or rewards.shape != response.shape:
        raise ValueError(
            f"`rewards` and `response` must both be [N], the flat layout; got {list(rewards.shape)} and {list(response.shape)}."
        )
