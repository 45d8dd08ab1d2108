"""The CHES score against a NumPy loop, and the invariants of its definition."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lightning_pref.measures.ches import ches, ches_from_sums

Rows = list[tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]]

SEEDS = st.integers(min_value=0, max_value=2**31 - 1)


def random_rows(seed: int, num_rows: int = 5, width: int = 6) -> Rows:
    """Pairs of ragged [n, D] states, with the positive mean that states of a language model have."""
    generator = np.random.default_rng(seed)

    def states() -> np.ndarray[Any, Any]:
        return generator.normal(0.5, 1.0, size=(generator.integers(1, 9), width))

    return [(states(), states()) for _ in range(num_rows)]


def ches_of(chosen: np.ndarray[Any, Any], rejected: np.ndarray[Any, Any], *, length_normalized: bool) -> float:
    """Oracle: definition 2 of the paper with plain loops, in float64."""
    scale_chosen, scale_rejected = (len(chosen), len(rejected)) if length_normalized else (1, 1)
    across = sum(float(np.dot(h, g)) for h in chosen for g in rejected) / (scale_chosen * scale_rejected)
    within = sum(float(np.dot(h, g)) for h in chosen for g in chosen) / scale_chosen**2
    return across - within


def laid_out(pieces: list[np.ndarray[Any, Any]], side: str, padding: float, extra: int = 3) -> tuple[Tensor, Tensor]:
    """[B, L, D] states with padding on one side, or on both, and the mask of what is no padding."""
    length = max(map(len, pieces)) + extra
    hidden = torch.full((len(pieces), length, pieces[0].shape[1]), padding, dtype=torch.float64)
    mask = torch.zeros(len(pieces), length, dtype=torch.bool)
    for row, piece in enumerate(pieces):
        start = {"left": length - len(piece), "right": 0, "both": row % (length - len(piece) + 1)}[side]
        hidden[row, start : start + len(piece)] = torch.from_numpy(piece)
        mask[row, start : start + len(piece)] = True
    return hidden, mask


@pytest.mark.parametrize("side", ["left", "right", "both"])
@pytest.mark.parametrize("padding", [0.0, 7.0, float("nan")])
@pytest.mark.parametrize("length_normalized", [False, True])
def test_M1_batched_ches_equals_one_by_one(side: str, padding: float, length_normalized: bool) -> None:
    rows = random_rows(seed=1)
    chosen, chosen_mask = laid_out([pair[0] for pair in rows], side, padding)
    rejected, rejected_mask = laid_out([pair[1] for pair in rows], side, padding, extra=1)
    batched = ches(chosen, chosen_mask, rejected, rejected_mask, length_normalized=length_normalized)
    expected = [ches_of(*pair, length_normalized=length_normalized) for pair in rows]
    assert batched.dtype == torch.float64
    assert batched.tolist() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("length_normalized", [False, True])
def test_sums_with_and_without_lengths_give_the_two_scores(length_normalized: bool) -> None:
    rows = random_rows(seed=2)
    sums = [torch.from_numpy(np.stack([pair[side].sum(0) for pair in rows])) for side in (0, 1)]
    lengths = [torch.tensor([len(pair[side]) for pair in rows]) for side in (0, 1)] if length_normalized else []
    expected = [ches_of(*pair, length_normalized=length_normalized) for pair in rows]
    assert ches_from_sums(*sums, *lengths).tolist() == pytest.approx(expected, rel=1e-12)


@given(SEEDS)
def test_equal_responses_score_exactly_zero(seed: int) -> None:
    hidden, mask = laid_out([pair[0] for pair in random_rows(seed)], "right", 0.0)
    for length_normalized in (False, True):
        assert ches(hidden, mask, hidden, mask, length_normalized=length_normalized).tolist() == [0.0] * len(hidden)


@given(SEEDS, st.floats(min_value=0.1, max_value=10.0))
def test_scores_scale_with_the_square_of_the_states_and_ignore_a_rotation(seed: int, scale: float) -> None:
    rows = random_rows(seed)
    rotation = np.linalg.qr(np.random.default_rng(seed).normal(size=(6, 6)))[0]
    for length_normalized in (False, True):
        found = []
        for matrix in (np.eye(6), scale * np.eye(6), rotation):
            chosen, rejected = (laid_out([pair[side] @ matrix for pair in rows], "right", 0.0) for side in (0, 1))
            found.append(ches(*chosen, *rejected, length_normalized=length_normalized))
        torch.testing.assert_close(found[1], found[0] * scale**2, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(found[2], found[0], rtol=1e-9, atol=1e-9)


@given(SEEDS)
def test_the_two_orders_of_a_pair_add_up_to_minus_the_squared_distance(seed: int) -> None:
    rows = random_rows(seed)
    chosen, rejected = (torch.from_numpy(np.stack([pair[side].sum(0) for pair in rows])) for side in (0, 1))
    both = ches_from_sums(chosen, rejected) + ches_from_sums(rejected, chosen)
    torch.testing.assert_close(both, -(chosen - rejected).square().sum(-1), rtol=1e-9, atol=1e-9)


@given(SEEDS)
def test_the_normalised_score_is_bounded_by_the_norms_of_the_mean_states(seed: int) -> None:
    rows = random_rows(seed)
    chosen, rejected = (laid_out([pair[side] for pair in rows], "left", 0.0) for side in (0, 1))
    norms = [np.array([np.linalg.norm(pair[side].mean(0)) for pair in rows]) for side in (0, 1)]
    bound = torch.from_numpy(norms[0] * norms[1] - norms[0] ** 2)
    assert (ches(*chosen, *rejected, length_normalized=True) <= bound + 1e-9).all()


def test_single_tokens_after_one_prompt_share_their_state_and_score_zero() -> None:
    state = torch.randn(3, 1, 4, generator=torch.Generator().manual_seed(0))
    mask = torch.ones(3, 1, dtype=torch.bool)
    assert ches(state, mask, state, mask).tolist() == ches(state, mask, state, mask, length_normalized=True).tolist() == [0.0] * 3


def test_an_empty_response_has_no_score() -> None:
    hidden = torch.ones(3, 2, 4)
    full = torch.ones(3, 2, dtype=torch.bool)
    chosen_mask, rejected_mask = full.clone(), full.clone()
    chosen_mask[0] = False
    rejected_mask[1] = False
    for length_normalized in (False, True):
        scores = ches(hidden, chosen_mask, hidden, rejected_mask, length_normalized=length_normalized)
        assert scores.isnan().tolist() == [True, True, False]
    from_sums = ches_from_sums(torch.ones(1, 4), torch.zeros(1, 4), torch.tensor([2]), torch.tensor([0]))
    assert from_sums.isnan().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_states_are_added_up_in_float32(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    chosen, rejected = (torch.randn(4, 600, 8, generator=generator).add(0.5).to(dtype) for _ in range(2))
    mask = torch.ones(4, 600, dtype=torch.bool)
    found = ches(chosen, mask, rejected, mask, length_normalized=True)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), ches(chosen.double(), mask, rejected.double(), mask, True), rtol=1e-4, atol=1e-5)


def test_half_precision_sums_are_multiplied_in_float32() -> None:
    chosen, rejected = torch.full((1, 4), 300.0, dtype=torch.float16), torch.full((1, 4), 400.0, dtype=torch.float16)
    assert ches_from_sums(chosen, rejected).tolist() == [4 * 300.0 * 100.0]  # beyond what float16 can hold


def test_lengths_come_together() -> None:
    sums, lengths = torch.ones(2, 3), torch.ones(2)
    with pytest.raises(ValueError, match="Only `chosen_lengths` is given; normalising needs the lengths of both responses"):
        ches_from_sums(sums, sums, lengths)
    with pytest.raises(ValueError, match="Only `rejected_lengths` is given"):
        ches_from_sums(sums, sums, rejected_lengths=lengths)


def test_shapes_are_checked() -> None:
    with pytest.raises(ValueError, match=r"Sums of hidden states are \[B, D\] .* got \[2, 3\] for the chosen and \[2, 4\]"):
        ches_from_sums(torch.ones(2, 3), torch.ones(2, 4))
    mask = torch.ones(2, 5, dtype=torch.bool)
    with pytest.raises(
        ValueError, match=r"`rejected_hidden` is \[B, L, D\] and `rejected_mask` \[B, L\], got \[2, 4, 3\] and \[2, 5\]"
    ):
        ches(torch.ones(2, 5, 3), mask, torch.ones(2, 4, 3), mask)
