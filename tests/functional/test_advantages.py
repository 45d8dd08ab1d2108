from random import Random
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lightning_pref.functional.advantages import (
    Scale,
    flat_gae,
    gae,
    grpo_advantages,
    has_equal_group,
    reinforce_pp_advantages,
    returns_to_go,
    rloo_advantages,
)
from lightning_pref.functional.moments import Moments, moment_sums
from lightning_pref.functional.token_rewards import token_rewards


def reference_gae(rewards: list[float], values: list[float], gamma: float, lam: float, bootstrap: float) -> list[float]:
    """The definition: a discounted sum of TD residuals, each advantage by itself."""
    following = [*values, bootstrap][1:]
    deltas = [r + gamma * after - v for r, v, after in zip(rewards, values, following, strict=True)]
    return [sum((gamma * lam) ** (k - t) * deltas[k] for k in range(t, len(deltas))) for t in range(len(deltas))]


def ragged(lengths: list[int], seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Rewards and values of flat tokens, their responses, and a value after each response."""
    generator = np.random.default_rng(seed)
    response = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
    rewards, values = (torch.from_numpy(generator.normal(size=len(response))) for _ in range(2))
    return rewards, values, response, torch.from_numpy(generator.normal(size=len(lengths)))


@given(
    st.lists(st.integers(0, 9), min_size=1, max_size=5),
    st.sampled_from([0.0, 0.5, 0.99, 1.0]),
    st.sampled_from([0.0, 0.95, 1.0]),
    st.booleans(),
)
def test_P1_flat_gae_is_the_definition_response_by_response(
    lengths: list[int], gamma: float, lam: float, is_cut_off: bool
) -> None:
    rewards, values, response, after = ragged(lengths)
    found = flat_gae(rewards, values, response, gamma=gamma, lam=lam, bootstrap=after if is_cut_off else None)
    expected: list[float] = []
    for r in range(len(lengths)):
        own = response == r
        last = after[r].item() if is_cut_off else 0.0
        expected += reference_gae(rewards[own].tolist(), values[own].tolist(), gamma, lam, last)
    np.testing.assert_allclose(found.advantages.numpy(), expected, atol=1e-12)
    torch.testing.assert_close(found.returns, found.advantages + values)


@pytest.mark.parametrize("side", ["right", "left", "holes"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_P1_padded_gae_equals_the_flat_one_whatever_the_padding_holds(side: str, dtype: torch.dtype) -> None:
    lengths = [3, 7, 1, 0, 5]
    rewards, values, response, after = (x.to(dtype) if x.is_floating_point() else x for x in ragged(lengths))
    if side == "right":
        mask = torch.arange(7) < torch.tensor(lengths).unsqueeze(1)
    elif side == "left":
        mask = torch.arange(7) >= 7 - torch.tensor(lengths).unsqueeze(1)
    else:  # tokens of a tool in between belong to no one
        mask = torch.zeros(5, 9, dtype=torch.bool)
        for row, length in enumerate(lengths):
            mask[row, torch.from_numpy(np.random.default_rng(row).permutation(9)[:length])] = True
    padded = [torch.full(mask.shape, torch.nan, dtype=dtype).masked_scatter(mask, x) for x in (rewards, values)]
    found = gae(padded[0], padded[1], mask, 0.97, 0.9, after)
    expected = flat_gae(rewards, values, response, gamma=0.97, lam=0.9, bootstrap=after)
    torch.testing.assert_close(found.advantages[mask], expected.advantages)
    torch.testing.assert_close(found.returns[mask], expected.returns)
    assert (found.advantages[~mask] == 0).all()
    assert (found.returns[~mask] == 0).all()


def test_P1_nothing_follows_an_end_and_a_cut_off_response_goes_on_at_its_value() -> None:
    """Two responses alike but for their end; by hand with gamma = lambda = 1: A_1 = r_1 (+ V_after) - V_1."""
    rewards, values = torch.tensor([0.0, 1.0] * 2), torch.tensor([0.3, 0.6] * 2)
    ended = torch.tensor([True, False])
    bootstrap = torch.where(ended, 0.0, torch.tensor([5.0, 5.0]))
    found = flat_gae(rewards, values, torch.tensor([0, 0, 1, 1]), gamma=1.0, lam=1.0, bootstrap=bootstrap)
    torch.testing.assert_close(found.advantages, torch.tensor([0.7, 0.4, 5.7, 5.4]))
    torch.testing.assert_close(found.returns, torch.tensor([1.0, 1.0, 6.0, 6.0]))


def test_P1_with_lambda_one_the_advantage_is_the_return_less_the_value_and_with_zero_the_td_residual() -> None:
    rewards, values, response, _ = ragged([4, 6])
    all_rewards = flat_gae(rewards, values, response, gamma=1.0, lam=1.0)
    torch.testing.assert_close(all_rewards.advantages, returns_to_go(rewards, response) - values)
    residuals = flat_gae(rewards, values, response, gamma=0.9, lam=0.0).advantages
    expected = rewards + 0.9 * torch.cat([values[1:4], torch.zeros(1), values[5:], torch.zeros(1)]) - values
    torch.testing.assert_close(residuals, expected)


def test_L9_advantages_of_a_response_do_not_depend_on_its_neighbours() -> None:
    rewards, values, response, after = ragged([5, 3, 8])
    together = flat_gae(rewards, values, response, gamma=0.99, lam=0.95, bootstrap=after).advantages
    own = response == 1
    alone = flat_gae(rewards[own], values[own], response[own] - 1, gamma=0.99, lam=0.95, bootstrap=after[1:2]).advantages
    torch.testing.assert_close(together[own], alone)


def test_long_responses_sum_exactly_in_float32() -> None:
    ones = torch.ones(5000)
    assert torch.equal(returns_to_go(ones, torch.zeros(5000, dtype=torch.int64)), torch.arange(5000.0, 0.0, -1.0))


def test_advantages_are_constants() -> None:
    rewards, values, response, _ = ragged([2, 2])
    values.requires_grad_()
    assert not any(x.requires_grad for x in flat_gae(rewards, values, response, gamma=1.0, lam=1.0))
    assert not any(x.requires_grad for x in gae(rewards[None], values[None], response[None] >= 0, 1.0, 1.0))
    assert not grpo_advantages(values.reshape(2, 2)).requires_grad


def reference_groups(rewards: list[float], ids: list[int], how: str) -> list[float]:
    advantages = []
    for i, (reward, own) in enumerate(zip(rewards, ids, strict=True)):
        group = [r for r, other in zip(rewards, ids, strict=True) if other == own]
        others = [r for j, (r, other) in enumerate(zip(rewards, ids, strict=True)) if other == own and j != i]
        if not others or len(set(group)) == 1:
            advantages.append(0.0)
        elif how == "rloo":
            advantages.append(reward - np.mean(others))
        else:
            scale = {"group": np.std(group, ddof=1) + 1e-4, "batch": np.std(rewards, ddof=1) + 1e-4, "none": 1.0}[how]
            advantages.append((reward - np.mean(group)) / scale)
    return advantages


GROUP_SIZES = st.lists(st.integers(1, 5), min_size=1, max_size=5)


@given(GROUP_SIZES, st.randoms(use_true_random=False), st.sampled_from(["rloo", "group", "batch", "none"]))
def test_group_advantages_are_their_formulas_for_groups_of_any_size_in_any_order(
    sizes: list[int], random: Random, how: Any
) -> None:
    ids = [7 * g - 3 for g, size in enumerate(sizes) for _ in range(size)]
    random.shuffle(ids)
    rewards = [float(random.choice([0.0, 0.25, 1.0, 3.0])) for _ in ids]
    given_rewards, given_ids = torch.tensor(rewards, dtype=torch.float64), torch.tensor(ids)
    rloo = how == "rloo"
    found = rloo_advantages(given_rewards, given_ids) if rloo else grpo_advantages(given_rewards, given_ids, scale=how)
    np.testing.assert_allclose(found.numpy(), reference_groups(rewards, ids, how), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_rows_of_a_matrix_are_groups(scale: Scale) -> None:
    rewards = torch.tensor([[1.0, 4.0, 2.0], [0.0, 0.0, 3.0]])
    ids = torch.tensor([0, 0, 0, 1, 1, 1])
    torch.testing.assert_close(
        grpo_advantages(rewards, scale=scale), grpo_advantages(rewards.flatten(), ids, scale=scale).reshape(2, 3)
    )
    torch.testing.assert_close(rloo_advantages(rewards), rloo_advantages(rewards.flatten(), ids).reshape(2, 3))


def test_two_samples_of_rloo_are_each_others_baseline() -> None:
    assert rloo_advantages(torch.tensor([[3.0, 1.0]])).tolist() == [[2.0, -2.0]]


def test_group_advantages_add_up_to_zero_and_do_not_see_an_offset_of_the_prompt() -> None:
    rewards = torch.rand(4, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    shifted = rewards + torch.tensor([[0.0], [10.0], [-3.0], [1e3]])
    for advantages in (rloo_advantages, grpo_advantages):
        torch.testing.assert_close(advantages(rewards).sum(1), torch.zeros(4, dtype=torch.float64), atol=1e-9, rtol=0)
        torch.testing.assert_close(advantages(shifted), advantages(rewards), atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
@pytest.mark.parametrize("value", [0.1, 1e4, -3.3333])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_N4_a_group_of_equal_rewards_has_exactly_zero_advantage_and_is_counted(
    scale: Scale, value: float, dtype: torch.dtype
) -> None:
    rewards = torch.tensor([[value] * 3, [1.0, 2.0, 4.0]], dtype=dtype)
    for advantages in (grpo_advantages(rewards, scale=scale), rloo_advantages(rewards)):
        assert (advantages[0] == 0).all()
        assert (advantages[1] != 0).all()
        assert advantages.isfinite().all()
    assert has_equal_group(rewards).tolist() == [[True] * 3, [False] * 3]


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_N4_a_group_of_one_has_zero_advantage(scale: Scale) -> None:
    rewards, ids = torch.tensor([5.0, 1.0, 2.0]), torch.tensor([0, 1, 1])
    assert grpo_advantages(rewards, ids, scale=scale)[0] == 0
    assert rloo_advantages(rewards, ids)[0] == 0
    assert has_equal_group(rewards, ids).tolist() == [True, False, False]
    assert grpo_advantages(torch.tensor([[5.0]]), scale=scale).tolist() == [[0.0]]


def test_N4_leave_one_out_stays_in_proportion_where_the_others_agree() -> None:
    """The baseline leaves one out, never the deviation: that of the others is zero here, and would blow the odd one up."""
    rewards = torch.tensor([[1.0] * 7 + [0.0]])
    assert rloo_advantages(rewards)[0, -1].item() == pytest.approx(-1.0)
    assert grpo_advantages(rewards).abs().max().item() == pytest.approx(7 / 8**0.5, rel=1e-3)


def test_N4_a_spread_below_the_guard_is_not_blown_up_to_unit_size() -> None:
    tiny = torch.tensor([[0.0, 1e-6]], dtype=torch.float64)
    assert grpo_advantages(tiny).abs().max() < 0.01


def test_N4_batch_scale_over_ranks_is_that_of_one_process() -> None:
    rewards, ids = torch.tensor([1.0, 3.0, 0.0, 8.0, 5.0, 5.5]), torch.tensor([0, 0, 1, 1, 2, 2])
    ranks = [slice(0, 2), slice(2, 6)]
    sums = Moments(*torch.stack([torch.stack(moment_sums(rewards[rank])) for rank in ranks]).sum(0))
    apart = torch.cat([grpo_advantages(rewards[rank], ids[rank], scale="batch", sums=sums) for rank in ranks])
    torch.testing.assert_close(apart, grpo_advantages(rewards, ids, scale="batch"))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_N4_a_reward_that_is_not_finite_gets_zero_and_counts_nowhere(bad: float) -> None:
    rewards = torch.tensor([[1.0, bad, 3.0], [bad, bad, 2.0]])
    for scale in ("group", "batch", "none"):
        advantages = grpo_advantages(rewards, scale=scale)
        assert advantages[0, 1] == 0
        assert (advantages[1] == 0).all()
        if scale != "batch":
            torch.testing.assert_close(advantages[0, ::2], grpo_advantages(torch.tensor([[1.0, 3.0]]), scale=scale)[0])
    assert rloo_advantages(rewards).tolist() == [[-2.0, 0.0, 2.0], [0.0, 0.0, 0.0]]


def reference_reinforce_pp(scores: list[float], kl: list[list[float]], coefficient: float) -> list[float]:
    returns = []
    for score, own in zip(scores, kl, strict=True):
        rewards = [-coefficient * k for k in own]
        rewards[-1] += score
        returns += [sum(rewards[t:]) for t in range(len(rewards))]
    mean = np.mean(returns)
    return [(g - mean) / np.sqrt(np.mean((np.array(returns) - mean) ** 2) + 1e-8) for g in returns]


@pytest.mark.parametrize("has_group_baseline", [False, True])
def test_reinforce_pp_is_whitened_returns_of_penalised_rewards(has_group_baseline: bool) -> None:
    kl = [[0.1, -0.2], [0.3], [0.0, 0.5, 0.4], [1.0, 2.0]]
    scores, ids = torch.tensor([1.0, 2.0, -1.0, 0.5], dtype=torch.float64), torch.tensor([0, 0, 1, 1])
    if has_group_baseline:
        scores = grpo_advantages(scores, ids, scale="none")
        assert scores.tolist() == [-0.5, 0.5, -0.75, 0.75]
    response = torch.tensor([0, 0, 1, 2, 2, 2, 3, 3])
    flat_kl = torch.tensor([k for own in kl for k in own], dtype=torch.float64)
    rewards = token_rewards(scores, flat_kl, response, kl_coefficient=0.2)
    found = reinforce_pp_advantages(rewards, response)
    np.testing.assert_allclose(found.numpy(), reference_reinforce_pp(scores.tolist(), kl, 0.2), rtol=1e-9)


def test_N4_reinforce_pp_over_ranks_is_that_of_one_process() -> None:
    rewards, _, response, _ = ragged([3, 2, 4])
    ranks = [response == 0, response > 0]
    sums = [moment_sums(returns_to_go(rewards[rank], response[rank], gamma=0.9)) for rank in ranks]
    apart = [reinforce_pp_advantages(rewards[r], response[r], gamma=0.9, sums=sums[0].merged(sums[1])) for r in ranks]
    torch.testing.assert_close(torch.cat(apart), reinforce_pp_advantages(rewards, response, gamma=0.9))


def test_N4_reinforce_pp_of_equal_returns_is_zero() -> None:
    rewards = torch.tensor([0.0, 3.0, 3.0])
    torch.testing.assert_close(reinforce_pp_advantages(rewards, torch.tensor([0, 0, 1])), torch.zeros(3), atol=1e-6, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_F3_advantages_of_extreme_rewards_are_finite(dtype: torch.dtype) -> None:
    rewards, response = torch.tensor([1e4, -1e4, 1e4, -1e4], dtype=dtype), torch.tensor([0, 0, 1, 1])
    outcomes = [
        *flat_gae(rewards, -rewards, response, gamma=1.0, lam=1.0),
        *gae(rewards[None], -rewards[None], response[None] >= 0, 1.0, 1.0),
        grpo_advantages(rewards, response),
        rloo_advantages(rewards, response),
        reinforce_pp_advantages(rewards, response),
    ]
    assert all(x.isfinite().all() and x.dtype == torch.float32 for x in outcomes)


def test_mistakes_raise() -> None:
    one, index = torch.ones(1), torch.zeros(1, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"`gamma` and `lam` must be in \[0, 1\], got 1.5 and 1.0"):
        flat_gae(one, one, index, gamma=1.5, lam=1.0)
    with pytest.raises(ValueError, match=r"must both be \[N\], the flat layout; got \[1, 1\] and \[1\]"):
        returns_to_go(one[None], index)
    with pytest.raises(ValueError, match=r"must all be \[B, T\], got \[1, 1\], \[1\] and torch.bool \[1, 1\]"):
        gae(one[None], one, one[None] > 0, 1.0, 1.0)
    with pytest.raises(ValueError, match=r"Without `prompt_ids` the rewards must be \[P, n\], a row per prompt; got \[1\]"):
        rloo_advantages(one)
    with pytest.raises(ValueError, match=r"`rewards` and `prompt_ids` must both be \[R\], got \[1, 1\] and \[1\]"):
        grpo_advantages(one[None], index)
    with pytest.raises(ValueError, match="`scale` must be 'group', 'batch' or 'none', got 'std'"):
        grpo_advantages(one[None], scale="std")  # type: ignore[arg-type]
