from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lightning_pref.functional import aggregate, masked_mean, masked_sum, masked_var, segment_sum
from lightning_pref.functional.masked import Aggregation

VALUES = torch.tensor([[1.0, 2.0, 4.0], [-3.0, 5.0, 0.5]])
MASK = torch.tensor([[True, True, False], [False, True, True]])
REDUCTIONS: list[Callable[..., Tensor]] = [masked_sum, masked_mean, masked_var]


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("dim", [None, 0, 1])
def test_reduction_over_a_full_mask_is_torchs(reduction: Callable[..., Tensor], dim: int | None) -> None:
    plain = {masked_sum: torch.sum, masked_mean: torch.mean, masked_var: torch.var}[reduction]
    torch.testing.assert_close(reduction(VALUES, torch.ones_like(MASK), dim), plain(VALUES, dim=dim))


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("junk", [float("nan"), float("inf"), -float("inf"), 1e30])
def test_what_is_not_counted_has_no_influence_and_a_zero_gradient(reduction: Callable[..., Tensor], junk: float) -> None:
    dirty = VALUES.masked_fill(~MASK, junk).requires_grad_()
    result = reduction(dirty, MASK)
    torch.testing.assert_close(result, reduction(VALUES, MASK))
    result.backward()
    assert dirty.grad is not None
    assert (dirty.grad[~MASK] == 0).all()
    assert dirty.grad.isfinite().all()


def test_mean_and_variance_of_a_row_are_those_of_its_counted_elements() -> None:
    torch.testing.assert_close(masked_mean(VALUES, MASK, 1), torch.tensor([1.5, 2.75]))
    torch.testing.assert_close(masked_var(VALUES, MASK, 1), torch.stack([VALUES[0, :2].var(), VALUES[1, 1:].var()]))
    torch.testing.assert_close(masked_var(VALUES, MASK, 1, correction=0), masked_var(VALUES, MASK, 1) / 2)


def test_sum_of_nothing_is_zero_and_its_mean_undefined() -> None:
    nothing = torch.zeros_like(MASK)
    assert masked_sum(VALUES, nothing).item() == 0.0
    assert masked_mean(VALUES, nothing).isnan()


def test_variance_of_a_single_element_is_undefined_rather_than_zero() -> None:
    one = torch.tensor([[True, False, False], [True, True, False]])
    assert masked_var(VALUES, one, 1).isnan().tolist() == [True, False]
    assert masked_var(VALUES, one, 1, correction=0).tolist() == [0.0, 16.0]


@pytest.mark.parametrize("mask", [MASK.float(), MASK[0], MASK[:, :1]])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_mask_must_be_bool_and_of_the_shape_it_masks(reduction: Callable[..., Tensor], mask: Tensor) -> None:
    with pytest.raises(ValueError, match=r"`mask` must be bool and have the shape of what it masks, \[2, 3\]; got "):
        reduction(VALUES, mask)


@pytest.mark.parametrize(
    ("how", "expected"),
    [("token_mean", (1 + 2 + 5 + 0.5) / 4), ("sequence_mean", (1.5 + 2.75) / 2), ("sequence_sum", (3 + 5.5) / 2)],
)
def test_aggregate_by_hand(how: Aggregation, expected: float) -> None:
    assert aggregate(VALUES, MASK, how).item() == pytest.approx(expected)


@pytest.mark.parametrize("how", ["token_mean", "sequence_mean", "sequence_sum"])
def test_T9_a_sequence_without_tokens_is_left_out_and_nothing_at_all_is_zero(how: Aggregation) -> None:
    empty_row = torch.cat([VALUES, torch.full((1, 3), torch.nan)])
    longer = torch.cat([MASK, torch.zeros(1, 3, dtype=torch.bool)])
    torch.testing.assert_close(aggregate(empty_row, longer, how), aggregate(VALUES, MASK, how))
    values = VALUES.clone().requires_grad_()
    nothing = aggregate(values, torch.zeros_like(MASK), how)
    nothing.backward()
    assert nothing.item() == 0.0
    assert values.grad is not None
    assert (values.grad == 0).all()


@pytest.mark.parametrize("how", ["token_mean", "sequence_mean", "sequence_sum"])
def test_L13_aggregate_ignores_extra_padding(how: Aggregation) -> None:
    padded = torch.nn.functional.pad(VALUES, (2, 3), value=7.0)
    mask = torch.nn.functional.pad(MASK, (2, 3), value=False)
    torch.testing.assert_close(aggregate(padded, mask, how), aggregate(VALUES, MASK, how))


def test_unknown_aggregation_names_the_known_ones() -> None:
    with pytest.raises(ValueError, match="`how` must be 'token_mean', 'sequence_mean' or 'sequence_sum', got 'mean'"):
        aggregate(VALUES, MASK, "mean")  # type: ignore[arg-type]


def test_L3_long_sums_of_bfloat16_log_probs_keep_their_digits() -> None:
    logps = -torch.rand(4096, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    exact = logps.double().sum().item()
    everything = torch.ones(4096, dtype=torch.bool)
    assert masked_sum(logps, everything).item() == pytest.approx(exact, rel=1e-6)
    assert segment_sum(logps, torch.zeros(4096, dtype=torch.int64), 1).item() == pytest.approx(exact, rel=1e-6)
    # One after the other in bfloat16, the sum stops growing long before the end.
    one_by_one = torch.zeros((), dtype=torch.bfloat16)
    for logp in logps:
        one_by_one += logp
    assert abs(one_by_one.item() / exact - 1) > 0.1


@given(st.lists(st.tuples(st.integers(0, 4), st.floats(-100, 100, width=32)), max_size=30))
def test_segment_sum_is_the_loop_over_segments(entries: list[tuple[int, float]]) -> None:
    segment = torch.tensor([s for s, _ in entries], dtype=torch.int64)
    values = torch.tensor([v for _, v in entries], dtype=torch.float32)
    expected = torch.tensor([sum(v for s, v in entries if s == target) for target in range(5)], dtype=torch.float32)
    torch.testing.assert_close(segment_sum(values, segment, 5), expected, rtol=1e-6, atol=1e-6)


def test_segment_sum_does_not_depend_on_the_order_of_its_terms() -> None:
    generator = torch.Generator().manual_seed(0)
    values, segment = torch.randn(5000, generator=generator), torch.randint(0, 3, (5000,), generator=generator)
    order = torch.randperm(5000, generator=generator)
    assert torch.equal(segment_sum(values, segment, 3), segment_sum(values[order], segment[order], 3))


def test_gradient_of_segment_sum_is_that_of_its_segment() -> None:
    values = torch.zeros(4, requires_grad=True)
    (segment_sum(values, torch.tensor([1, 0, 1, 2]), 3) * torch.tensor([1.0, 2.0, 5.0])).sum().backward()
    torch.testing.assert_close(values.grad, torch.tensor([2.0, 1.0, 2.0, 5.0]))


def test_float64_stays_float64() -> None:
    assert masked_sum(VALUES.double(), MASK).dtype == torch.float64
    assert segment_sum(VALUES[0].double(), torch.tensor([0, 0, 0]), 1).dtype == torch.float64


def test_segment_sum_of_another_shape_raises() -> None:
    with pytest.raises(ValueError, match=r"must both be \[N\], got \[2, 3\] and \[3\]"):
        segment_sum(VALUES, torch.tensor([0, 1, 2]), 3)
