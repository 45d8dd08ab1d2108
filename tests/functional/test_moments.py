import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_pref.functional.moments import Moments, RunningMoments, moment_sums, whiten, whiten_with

GENERATOR = np.random.default_rng(0)
VALUES = torch.from_numpy(GENERATOR.normal(3.0, 2.0, size=(3, 7)))
MASK = torch.from_numpy(GENERATOR.random((3, 7)) < 0.6)


def reference_whiten(values: np.ndarray, *, ddof: int, shift_mean: bool) -> np.ndarray:
    mean = sum(values) / len(values)
    variance = sum((v - mean) ** 2 for v in values) / (len(values) - ddof)
    return np.array([(v - mean) / np.sqrt(variance + 1e-8) + (0 if shift_mean else mean) for v in values])


@pytest.mark.parametrize("ddof", [0, 1])
@pytest.mark.parametrize("shift_mean", [True, False])
def test_whitening_is_the_textbook_formula_over_the_counted_values(ddof: int, shift_mean: bool) -> None:
    white = whiten(VALUES, MASK, shift_mean=shift_mean, correction=ddof)
    expected = reference_whiten(VALUES[MASK].numpy(), ddof=ddof, shift_mean=shift_mean)
    np.testing.assert_allclose(white[MASK].numpy(), expected, rtol=1e-12)
    assert (white[~MASK] == 0).all()


def test_whitened_values_have_mean_zero_and_variance_one() -> None:
    white = whiten(VALUES, MASK)[MASK]
    assert white.mean().item() == pytest.approx(0.0, abs=1e-12)
    assert white.var().item() == pytest.approx(1.0, rel=1e-6)


@given(st.integers(1, 4), st.floats(-1e3, 1e3))
def test_N4_whitening_with_merged_sums_of_ranks_is_that_of_one_process(num_ranks: int, offset: float) -> None:
    values = torch.arange(10.0, dtype=torch.float64).square() + offset
    ranks = values.tensor_split(num_ranks)
    # What an all-reduce of the stacked sums gives.
    sums = Moments(*torch.stack([torch.stack(moment_sums(rank)) for rank in ranks]).sum(0))
    apart = torch.cat([whiten_with(rank, sums) for rank in ranks])
    torch.testing.assert_close(apart, whiten(values), rtol=1e-9, atol=1e-9)
    if num_ranks > 1:
        assert not torch.allclose(torch.cat([whiten(rank) for rank in ranks]), whiten(values))


@pytest.mark.parametrize("values", [[5.0], [0.1] * 7, [1e4] * 3])
@pytest.mark.parametrize("correction", [0, 1])
def test_N4_a_single_value_and_equal_values_whiten_to_zero(values: list[float], correction: int) -> None:
    white = whiten(torch.tensor(values), correction=correction)
    torch.testing.assert_close(white, torch.zeros(len(values)), atol=1e-6, rtol=0)


def test_N4_whitening_nothing_is_nothing() -> None:
    white = whiten(torch.tensor([1.0, float("nan")]), torch.tensor([False, False]))
    assert white.tolist() == [0.0, 0.0]


def test_N4_one_vote_per_response_undoes_the_copies_over_its_tokens() -> None:
    scores, lengths = torch.tensor([1.0, -2.0, 4.0], dtype=torch.float64), torch.tensor([1, 5, 2])
    copies = scores.repeat_interleave(lengths)
    votes = (1.0 / lengths.double()).repeat_interleave(lengths)
    # Three votes, so the unbiased divisor is two, as for the scores themselves.
    by_response = whiten(copies, weights=votes)
    torch.testing.assert_close(by_response, whiten(scores).repeat_interleave(lengths))
    assert not torch.allclose(by_response, whiten(copies))


def test_whitening_keeps_its_digits_far_from_zero() -> None:
    values = torch.tensor([1e4, 1e4 + 1, 1e4 + 2])
    torch.testing.assert_close(whiten(values), torch.tensor([-1.0, 0.0, 1.0]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_F3_whitening_extreme_values_is_finite(dtype: torch.dtype) -> None:
    white = whiten(torch.tensor([1e4, -1e4, 0.0], dtype=dtype))
    assert white.dtype == torch.float32
    torch.testing.assert_close(white, torch.tensor([1.0, -1.0, 0.0]), atol=1e-3, rtol=0)


def test_running_moments_of_chunks_are_those_of_all_values() -> None:
    running = RunningMoments.empty()
    for chunk in VALUES.flatten().split(4):
        running = running.updated(moment_sums(chunk))
    assert running.mean.item() == pytest.approx(VALUES.mean().item(), rel=1e-12)
    assert running.std.item() == pytest.approx(VALUES.std().item(), rel=1e-12)
    assert running.num_seen.item() == VALUES.numel()
    torch.testing.assert_close(running.normalized(VALUES), (VALUES - VALUES.mean()) / VALUES.std())


def test_running_moments_of_nothing_or_one_or_equal_values_scale_by_one() -> None:
    values = torch.tensor([7.0, 8.0])
    torch.testing.assert_close(RunningMoments.empty().normalized(values), values)
    one = RunningMoments.empty().updated(moment_sums(torch.tensor([7.0])))
    torch.testing.assert_close(one.normalized(values), torch.tensor([0.0, 1.0]))
    equal = one.updated(moment_sums(torch.tensor([7.0, 7.0])))
    torch.testing.assert_close(equal.normalized(values), torch.tensor([0.0, 1.0]))
    torch.testing.assert_close(equal.normalized(values, shift_mean=False), values)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_running_moments_keep_nothing_of_an_update_that_is_not_finite(bad: float) -> None:
    seen = RunningMoments.empty().updated(moment_sums(torch.tensor([1.0, 3.0])))
    after = seen.updated(moment_sums(torch.tensor([bad, 1.0]))).updated(moment_sums(torch.tensor([])))
    assert all(torch.equal(new, old) for new, old in zip(after, seen, strict=True))


def test_sums_and_weights_together_and_wrong_shapes_raise() -> None:
    with pytest.raises(ValueError, match="Give `sums` or `weights`, not both"):
        whiten(VALUES, sums=moment_sums(VALUES), weights=VALUES)
    with pytest.raises(ValueError, match=r"`mask` must have the shape of the values, \[3, 7\]; got \[3\]"):
        moment_sums(VALUES, MASK[:, 0])
    with pytest.raises(ValueError, match=r"`weights` must have the shape of the values, \[3, 7\]; got \[7\]"):
        moment_sums(VALUES, weights=VALUES[0])


def test_N4_less_than_two_votes_have_no_spread_to_divide_by() -> None:
    """One response of two tokens: one vote, no unbiased variance. Divided by the guard alone the two would become 1e4."""
    white = whiten(torch.tensor([1.0, 3.0]), weights=torch.tensor([0.5, 0.5]))
    assert white.tolist() == [-1.0, 1.0]
