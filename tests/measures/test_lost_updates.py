from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_pref.measures import is_lost, lost_share
from lightning_pref.measures.lost_updates import sample_places
from lightning_pref.measures.updates import was_executed


@pytest.mark.parametrize(
    ("dtype", "digits"), [(torch.bfloat16, 8), (torch.float16, 11), (torch.float32, 24), (torch.float64, 53)]
)
def test_O2_a_step_below_half_the_distance_to_the_next_number_is_lost(dtype: torch.dtype, digits: int) -> None:
    """Numbers of p digits between 1 and 2 are 2^(1-p) apart, just below 1 half as far; a tie goes to the even one, which is 1."""
    one, gradient = torch.ones(1, dtype=dtype), torch.ones(1)
    half_up, half_down = 2.0**-digits, 2.0 ** -(digits + 1)
    for step, lost in ((half_up, True), (1.5 * half_up, False), (-half_down, True), (-1.5 * half_down, False)):
        after = (one.double() + step).to(dtype) if dtype != torch.float64 else one + step
        assert is_lost(one, after, gradient).item() is lost


def test_without_a_gradient_nothing_is_lost_and_the_share_of_nothing_is_undefined() -> None:
    weights = torch.ones(3)
    assert math.isnan(lost_share(weights, weights, torch.zeros(3)))
    assert lost_share(weights, weights, torch.tensor([0.0, 1.0, 1.0])) == 1.0


def test_bits_count_and_not_values() -> None:
    zero, other = torch.tensor([0.0, float("nan")]), torch.tensor([-0.0, float("nan")])
    assert is_lost(zero, other, torch.ones(2)).tolist() == [False, True]


@given(st.integers(1, 100_000), st.integers(1, 2000))
def test_places_are_inside_and_spread_over_the_whole_tensor(size: int, most: int) -> None:
    places = sample_places(size, most)
    assert len(places) == min(size, most)
    assert places.min() >= 0 and places.max() < size
    assert torch.equal(places, sample_places(size, most))
    # No gap is wider than three times the mean distance of the places.
    edges = torch.cat([torch.tensor([-1]), places.sort().values, torch.tensor([size])])
    assert edges.diff().max() <= 3 * size / len(places) + 1


def test_places_of_the_largest_tensors_do_not_overflow() -> None:
    for size in (2**31 - 1, 2**31, 2**40):
        places = sample_places(size, 1024)
        assert places.min() >= 0 and places.max() < 2**31 - 1
        assert len(places.unique()) == 1024


def test_O1_a_fused_optimizer_that_was_told_of_an_overflow_has_executed_nothing() -> None:
    heard = []
    for init_scale in (2.0, 2.0**127):
        weight = torch.nn.Parameter(torch.ones(1))
        optimizer, scaler = torch.optim.AdamW([weight], fused=True), torch.amp.GradScaler("cpu", init_scale=init_scale)
        optimizer.register_step_post_hook(lambda stepped, *_: heard.append(was_executed(stepped)))
        scaler.scale((8 * weight).sum()).backward()
        scaler.step(optimizer)
        assert heard[-1] is (weight.item() != 1.0)
    assert heard == [True, False]
