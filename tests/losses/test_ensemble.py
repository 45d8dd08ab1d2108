import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lightning_pref.functional.advantages import grpo_advantages
from lightning_pref.losses.ensemble import (
    How,
    bootstrap_weights,
    ensemble_reward,
    ensemble_variance,
    standardized_members,
    uncertainty_discounted,
)

REWARDS = torch.randn(5, 3, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
HOWS: list[How] = ["mean", "wco", "uwo"]


@pytest.mark.parametrize("ddof", [0, 1])
@pytest.mark.parametrize("how", HOWS)
def test_F1_aggregates_are_their_formulas_entry_by_entry(how: How, ddof: int) -> None:
    found = ensemble_reward(REWARDS, how, coefficient=0.7, ddof=ddof)
    assert found.shape == (3, 4)
    for place in np.ndindex(3, 4):
        members = [REWARDS[(k, *place)].item() for k in range(5)]
        mean = sum(members) / 5
        variance = sum((m - mean) ** 2 for m in members) / (5 - ddof)
        expected = {"mean": mean, "wco": min(members), "uwo": mean - 0.7 * variance}[how]
        assert found[place].item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("rewards", [REWARDS[:1], REWARDS[:1].expand(5, 3, 4)])
@pytest.mark.parametrize("how", HOWS)
def test_one_member_or_five_alike_are_that_member(rewards: Tensor, how: How) -> None:
    torch.testing.assert_close(ensemble_reward(rewards, how), REWARDS[0])


@pytest.mark.parametrize("how", HOWS)
def test_members_may_come_in_any_order_and_a_shift_of_a_prompt_shifts_its_reward(how: How) -> None:
    shift = torch.tensor([[1.0], [-5.0], [100.0]])
    torch.testing.assert_close(ensemble_reward(REWARDS.flip(0), how), ensemble_reward(REWARDS, how))
    torch.testing.assert_close(ensemble_reward(REWARDS + shift, how), ensemble_reward(REWARDS, how) + shift)


@given(st.floats(0, 10), st.floats(0, 10))
def test_conservative_rewards_are_at_most_the_mean_and_fall_with_the_coefficient(first: float, second: float) -> None:
    low, high = sorted((first, second))
    mean = ensemble_reward(REWARDS, "mean")
    assert (ensemble_reward(REWARDS, "wco") <= mean).all()
    assert (ensemble_reward(REWARDS, "uwo", coefficient=high) <= ensemble_reward(REWARDS, "uwo", coefficient=low)).all()
    torch.testing.assert_close(ensemble_reward(REWARDS, "uwo", coefficient=0.0), mean)


def test_the_divisor_of_the_variance_is_a_factor_of_a_quarter_for_five_members() -> None:
    torch.testing.assert_close(ensemble_variance(REWARDS, ddof=1), 1.25 * ensemble_variance(REWARDS, ddof=0))


def test_a_nan_of_one_member_is_no_opinion_and_ends_as_a_zero_advantage() -> None:
    rewards = REWARDS.clone()
    rewards[2, 1, 0] = torch.nan
    for how in HOWS:
        total = ensemble_reward(rewards, how)
        assert total.isnan().nonzero().tolist() == [[1, 0]]
        assert grpo_advantages(total)[1, 0] == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_F3_the_variance_is_taken_in_float32_and_finite(dtype: torch.dtype) -> None:
    rewards = torch.tensor([[1e4, 100.0], [-1e4, 101.0]], dtype=dtype)
    torch.testing.assert_close(ensemble_variance(rewards), rewards.double().var(0).float())
    assert ensemble_reward(rewards, "uwo").isfinite().all()


def test_standardised_members_speak_one_language() -> None:
    scale, offset = torch.tensor([1.0, 10.0, 0.1, 3.0, 7.0]), torch.tensor([0.0, -50.0, 4.0, 1.0, 2.0])
    spoken = REWARDS[:1] * scale[:, None, None] + offset[:, None, None]
    mean, std = spoken.flatten(1).mean(1), spoken.flatten(1).std(1)
    members = standardized_members(spoken, mean, std)
    torch.testing.assert_close(members, members[:1].expand(5, 3, 4))
    torch.testing.assert_close(ensemble_reward(members, "wco"), ensemble_reward(members, "mean"))


@pytest.mark.parametrize("loss", [0.5, 1.0, 3.0, 20.0])
def test_the_best_uncertainty_is_the_logarithm_of_the_loss(loss: float) -> None:
    u = torch.linspace(0, 5, 5001, dtype=torch.float64)
    best = u[uncertainty_discounted(torch.full_like(u, loss), u).argmin()].item()
    assert best == pytest.approx(max(0.0, np.log(loss)), abs=1e-3)


def test_mistakes_raise() -> None:
    with pytest.raises(ValueError, match="`how` must be 'mean', 'wco' or 'uwo', got 'min'"):
        ensemble_reward(REWARDS, "min")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="`coefficient` must not be negative, got -0.5"):
        ensemble_reward(REWARDS, "uwo", coefficient=-0.5)
    with pytest.raises(ValueError, match="`ddof` must be 0 or 1, got 2"):
        ensemble_reward(REWARDS, "uwo", ddof=2)
    with pytest.raises(ValueError, match=r"must be \[K, ...\] with a member or more, got \[0, 3\]"):
        ensemble_variance(torch.zeros(0, 3))
    with pytest.raises(ValueError, match=r"must be \[K\] for rewards of shape \[5, 3, 4\], got \[3\] and \[5\]"):
        standardized_members(REWARDS, torch.zeros(3), torch.ones(5))
    with pytest.raises(ValueError, match=r"`losses` and `uncertainty` differ in shape: \[2\] and \[1\]"):
        uncertainty_discounted(torch.zeros(2), torch.zeros(1))


def test_bootstrap_counts_are_poisson_and_independent_of_each_other() -> None:
    rows = torch.arange(20_000)
    weights = bootstrap_weights(rows, 3)
    for member in weights:
        shares = [(member == count).double().mean().item() for count in range(5)]
        assert shares == pytest.approx([math.exp(-1) / math.factorial(count) for count in range(5)], abs=0.01)
    correlations = torch.corrcoef(torch.cat([weights, weights.roll(1, 1), bootstrap_weights(rows, 3, seed=1)]).double())
    assert (correlations - torch.eye(9, dtype=torch.float64)).abs().max() < 0.03


def test_a_row_counts_alike_in_every_batch_and_for_any_number_of_members() -> None:
    rows = torch.tensor([5, 2**40 + 5, 7, 123_456_789_012])
    whole = bootstrap_weights(rows, 4, seed=3)
    torch.testing.assert_close(bootstrap_weights(rows.flip(0), 4, seed=3), whole.flip(1))
    torch.testing.assert_close(bootstrap_weights(rows, 2, seed=3), whole[:2])
    many = torch.arange(1000)
    assert not torch.equal(bootstrap_weights(many, 1), bootstrap_weights(many + 2**32, 1)), "all bits of a number count"
