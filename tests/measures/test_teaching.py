"""What a reward model would teach, against loops over pairs and NumPy."""

from __future__ import annotations

import math
from itertools import combinations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lightning_pref.measures.teaching import (
    SATURATED_DIFFERENCE,
    compare_pairs,
    end_share,
    length_correlation,
    relative_speed,
    score_drift,
    speed_in_words,
)

# Few values, so that ties of both kinds are common.
score = st.sampled_from([-6.0, -1.0, 0.0, 0.5, 2.0])
scored_responses = st.lists(st.tuples(score, score, st.integers(0, 3)), min_size=2, max_size=12)


def columns(rows: list[tuple[float, float, int]]) -> tuple[Tensor, Tensor, Tensor]:
    scores, gold, prompts = zip(*rows, strict=True)
    return torch.tensor(scores), torch.tensor(gold), torch.tensor(prompts)


@given(scored_responses)
def test_pairs_are_counted_as_by_a_loop_over_all_of_them(rows: list[tuple[float, float, int]]) -> None:
    scores, gold, prompts = columns(rows)
    pairs = [(a[0] - b[0], a[1] - b[1]) for a, b in combinations(rows, 2) if a[2] == b[2]]
    with_order = [(s, g) for s, g in pairs if g != 0]
    found = compare_pairs(scores, prompts, gold)
    assert found.pairs == len(pairs)
    assert found.ties == sum(s == 0 for s, _ in pairs)
    assert found.saturated == sum(1 / (1 + math.exp(abs(s))) < 0.01 for s, _ in pairs)
    assert found.gold_pairs == len(with_order)
    assert found.agreements == sum(s * g > 0 for s, g in with_order)
    assert found.gold_ties == sum(s == 0 for s, _ in with_order)
    assert found.both_tied == sum(s == g == 0 for s, g in pairs)
    if with_order:
        agreeing = sum(np.sign(s) == np.sign(g) for s, g in pairs)
        assert found.accuracy_with_ties.item() == pytest.approx(agreeing / len(pairs))


def test_pairs_are_the_same_when_there_are_more_responses_than_are_compared_at_a_time() -> None:
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(1100, generator=generator)
    prompts = torch.arange(1100) % 275
    by_prompt = scores.reshape(4, 275)
    expected = sum(int((by_prompt[i] == by_prompt[j]).sum()) for i, j in combinations(range(4), 2))
    found = compare_pairs(scores, prompts, -scores)
    assert found.pairs == 275 * 6
    assert found.ties == expected
    assert found.accuracy == 0.0


def test_a_teacher_agrees_with_itself_and_its_negative_with_the_rest() -> None:
    generator = torch.Generator().manual_seed(1)
    gold, scores = torch.randn(2, 40, generator=generator)
    prompts = torch.arange(40) // 4
    assert compare_pairs(gold, prompts, gold).accuracy == 1.0
    right, wrong = (compare_pairs(sign * scores, prompts, gold).accuracy.item() for sign in (1, -1))
    assert right + wrong == pytest.approx(1.0)


def test_accuracy_sees_the_order_within_a_prompt_alone() -> None:
    generator = torch.Generator().manual_seed(2)
    gold, scores = torch.randn(2, 40, generator=generator)
    prompts = torch.arange(40) // 4
    offsets, scales = 1.0 + torch.arange(10.0)[prompts], 0.1 + torch.arange(10.0)[prompts]
    changed = compare_pairs((scores * scales + offsets).exp(), prompts, gold)
    assert changed.accuracy == compare_pairs(scores, prompts, gold).accuracy


def test_W3_a_constant_reward_is_never_right_and_always_tied() -> None:
    found = compare_pairs(torch.full((6,), 0.7), torch.arange(6) // 3, torch.arange(6.0))
    assert found.accuracy == 0.0
    assert found.tie_share == 1.0
    assert compare_pairs(torch.full((6,), 0.7), torch.arange(6) // 3).tie_share == 1.0


def test_without_gold_there_is_no_accuracy() -> None:
    found = compare_pairs(torch.tensor([1.0, 2.0]), torch.zeros(2))
    assert found.accuracy.isnan()
    assert found.accuracy_with_ties.isnan()


def test_scores_that_are_not_finite_are_in_no_pair() -> None:
    assert compare_pairs(torch.tensor([1.0, math.nan, 2.0, math.inf]), torch.zeros(4)).pairs == 1


def test_saturation_begins_where_the_slope_of_the_loss_is_a_hundredth() -> None:
    assert torch.sigmoid(torch.tensor(-SATURATED_DIFFERENCE)).item() == pytest.approx(0.01)
    differences = torch.tensor([0.0, SATURATED_DIFFERENCE + 0.01])
    assert compare_pairs(differences, torch.zeros(2)).saturated_share == 1.0
    assert compare_pairs(differences - torch.tensor([0.0, 0.02]), torch.zeros(2)).saturated_share == 0.0


def test_clipped_scores_lie_at_the_ends_and_spread_ones_do_not() -> None:
    spread = torch.linspace(-3, 3, 1001)
    assert end_share(spread.clamp(-1, 1)).item() == pytest.approx(2 / 3, abs=0.02)
    # 1 % of the range at either end.
    assert end_share(spread).item() == pytest.approx(0.02, abs=0.002)
    assert end_share(torch.ones(4)).isnan()
    assert end_share(torch.tensor([0.0, 0.5, 1.0, math.nan])).item() == pytest.approx(2 / 3)


def test_drift_is_shift_spread_and_order_against_the_first_scores() -> None:
    rng = np.random.default_rng(0)
    first = rng.normal(size=50)
    now = np.exp(first)  # the same order
    drift = score_drift(torch.tensor(now), torch.tensor(first))
    assert drift.rank_correlation.item() == pytest.approx(1.0)
    assert drift.shift.item() == pytest.approx((now.mean() - first.mean()) / first.std(ddof=1))
    assert drift.spread.item() == pytest.approx(now.std(ddof=1) / first.std(ddof=1))
    assert score_drift(torch.tensor(-first), torch.tensor(first)).rank_correlation.item() == pytest.approx(-1.0)
    with pytest.raises(
        ValueError, match="Drift compares the same responses: expected 3 scores as in the first measurement, got 2"
    ):
        score_drift(torch.zeros(2), torch.zeros(3))


def test_correlations_are_numpys() -> None:
    rng = np.random.default_rng(1)
    prompts = np.repeat(np.arange(6), 5)
    lengths = rng.integers(3, 90, size=30).astype(float)
    rewards = 0.02 * lengths + rng.normal(size=30) + 3 * prompts
    found = length_correlation(torch.tensor(rewards), torch.tensor(lengths), torch.tensor(prompts))
    centred = [
        np.concatenate([values[prompts == p] - values[prompts == p].mean() for p in range(6)]) for values in (rewards, lengths)
    ]
    assert found.within.item() == pytest.approx(np.corrcoef(*centred)[0, 1])
    assert found.pooled.item() == pytest.approx(np.corrcoef(rewards, lengths)[0, 1])


def test_speed_is_the_cube_root_of_the_variance_relative_to_the_best() -> None:
    assert relative_speed([0.027, 0.216, 0.0]) == pytest.approx([0.5, 1.0, 0.0])
    assert relative_speed([0.0, 0.0]) == [0.0, 0.0]
    known, unknown = relative_speed([0.5, math.nan])
    assert known == 1.0
    assert math.isnan(unknown)


def test_a_speed_is_put_into_words() -> None:
    assert speed_in_words(1.0) == "the fastest of those compared"
    assert speed_in_words(0.97) == "about as fast as the best"
    assert speed_in_words(0.4) == "at best 2.5 times slower than the best"
    assert speed_in_words(0.0) == "teaches nothing: every response gets the same reward"
    assert speed_in_words(math.nan) == "unknown"
