import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_pref.functional import kl_estimate, segment_sum
from lightning_pref.functional.moments import RunningMoments, moment_sums
from lightning_pref.functional.token_rewards import is_last_token, shape_scores, token_rewards

EOS = PAD = 2


def flat(lengths: torch.Tensor) -> torch.Tensor:
    return torch.arange(len(lengths)).repeat_interleave(lengths)


def test_P2_the_score_lands_on_the_last_real_token_where_the_end_token_is_the_padding_token() -> None:
    ids = torch.tensor([[5, EOS, PAD, PAD], [5, 6, 7, EOS], [EOS, PAD, PAD, PAD], [5, 6, 7, 8]])  # the last was cut off
    lengths = torch.tensor([2, 4, 1, 4])
    mask = torch.arange(4) < lengths.unsqueeze(1)
    rewards = torch.zeros(4, 4)
    rewards[mask] = token_rewards(torch.tensor([10.0, 20.0, 30.0, 40.0]), torch.zeros(11), flat(lengths), kl_coefficient=0.1)
    expected = torch.tensor([[0.0, 10.0, 0.0, 0.0], [0.0, 0.0, 0.0, 20.0], [30.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 40.0]])
    assert torch.equal(rewards, expected)
    # The three that ended carry it on their first end token, and no reward is ever on padding.
    assert (ids[expected > 0] == EOS).tolist() == [True, True, True, False]
    assert (rewards[~mask] == 0).all()


@given(st.lists(st.integers(0, 6), min_size=1, max_size=8), st.floats(0, 2))
def test_P2_rewards_of_a_response_add_up_to_its_score_less_its_kl(lengths: list[int], coefficient: float) -> None:
    response = flat(torch.tensor(lengths))
    kl = torch.linspace(-1, 2, len(response), dtype=torch.float64)
    scores = torch.linspace(5, -5, len(lengths), dtype=torch.float64)
    rewards = token_rewards(scores, kl, response, kl_coefficient=coefficient)
    not_empty = torch.tensor(lengths) > 0
    expected = torch.where(not_empty, scores, 0.0) - coefficient * segment_sum(kl, response, len(lengths))
    torch.testing.assert_close(segment_sum(rewards, response, len(lengths)), expected)


def test_the_reward_of_each_token_by_hand_with_a_controllers_tensor() -> None:
    logps, ref = torch.tensor([-1.0, -2.0, -0.5]), torch.tensor([-2.0, -1.0, -0.5])
    kl = kl_estimate(logps, ref, "k1")
    rewards = token_rewards(torch.tensor([3.0, 4.0]), kl, torch.tensor([0, 0, 1]), kl_coefficient=torch.tensor(0.5))
    assert rewards.tolist() == [-0.5, 3.5, 4.0]


def test_rewards_carry_no_gradient_into_the_policy() -> None:
    kl = torch.ones(2, requires_grad=True)
    assert not token_rewards(torch.ones(1), kl, torch.tensor([0, 0]), kl_coefficient=0.1).requires_grad


def test_last_tokens_of_no_tokens_are_none() -> None:
    assert is_last_token(torch.zeros(0, dtype=torch.int64)).tolist() == []


def test_P3_scores_are_normalised_then_clipped_then_punished_for_a_missing_end() -> None:
    running = RunningMoments.empty().updated(moment_sums(torch.tensor([10.0, 30.0, 20.0])))  # mean 20, deviation 10
    scores, ended = torch.tensor([20.0, 70.0, -40.0, 10.0]), torch.tensor([True, True, False, False])
    shaped = shape_scores(scores, ended, running=running, clip=3.0, missing_eos_penalty=0.5)
    torch.testing.assert_close(shaped, torch.tensor([0.0, 3.0, -3.5, -1.5]))
    # Any other order gives another number for one of the four.
    clipped_first = shape_scores(scores.clamp(-3, 3), ended, running=running, missing_eos_penalty=0.5)
    punished_before_clipping = shape_scores(scores - 0.5 * 10 * (~ended).float(), ended, running=running, clip=3.0)
    assert not torch.allclose(shaped, clipped_first)
    assert not torch.allclose(shaped, punished_before_clipping)


def test_P3_a_missing_end_replaces_the_score_whatever_it_was() -> None:
    shaped = shape_scores(torch.tensor([50.0, -50.0]), torch.tensor([False, False]), clip=10.0, missing_eos_score=-1.0)
    assert shaped.tolist() == [-1.0, -1.0]


def test_P3_a_response_at_the_token_cap_that_ended_is_not_punished() -> None:
    shaped = shape_scores(torch.tensor([1.0, 1.0]), torch.tensor([True, False]), missing_eos_penalty=2.0)
    assert shaped.tolist() == [1.0, -1.0]


def test_P3_the_scale_alone_can_be_normalised() -> None:
    running = RunningMoments.empty().updated(moment_sums(torch.tensor([10.0, 30.0, 20.0])))
    assert shape_scores(torch.tensor([20.0]), torch.tensor([True]), running=running, shift_mean=False).tolist() == [2.0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_F3_extreme_scores_stay_finite(dtype: torch.dtype) -> None:
    scores = torch.tensor([1e4, -1e4], dtype=dtype)
    rewards = token_rewards(scores, torch.tensor([1e4, -1e4], dtype=dtype), torch.tensor([0, 1]), kl_coefficient=10.0)
    assert rewards.dtype == torch.float32
    assert rewards.isfinite().all()


def test_mistakes_in_shaping_raise() -> None:
    one, yes = torch.ones(1), torch.tensor([True])
    with pytest.raises(ValueError, match=r"`ended` bool \[R\], got \[1\] and torch.float32 \[1\]"):
        shape_scores(one, one)
    with pytest.raises(ValueError, match="`clip` is a bound on the magnitude and must be positive, got 0.0"):
        shape_scores(one, yes, clip=0.0)
    with pytest.raises(ValueError, match="which replaces, or `missing_eos_penalty`, which is subtracted, not both"):
        shape_scores(one, yes, missing_eos_score=-1.0, missing_eos_penalty=1.0)
    with pytest.raises(ValueError, match="is subtracted and must not be negative, got -1.0"):
        shape_scores(one, yes, missing_eos_penalty=-1.0)
    with pytest.raises(ValueError, match=r"the flat layout; got \[1, 1\], \[1\] and \[1\]"):
        token_rewards(one, torch.ones(1, 1), torch.zeros(1, dtype=torch.int64), kl_coefficient=0.1)
