"""Ranking measures against NumPy, and the theorem that ties them to the DPO loss."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lightning_pref.losses import PairLogps, preference_loss
from lightning_pref.measures.ranking import flip_threshold, idealized_ranking_accuracy, implicit_accuracy, ranking_accuracy

SEEDS = st.integers(min_value=0, max_value=2**31 - 1)
BETAS = st.floats(min_value=0.01, max_value=10.0)


def random_pairs(seed: int, num_pairs: int = 40) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Log-probabilities under policy and reference, and lengths; some pairs are ties."""
    generator = np.random.default_rng(seed)
    logps = [-generator.uniform(1.0, 60.0, num_pairs) for _ in range(4)]
    lengths = [generator.integers(1, 20, num_pairs) for _ in range(2)]
    logps[1][::7], logps[3][::7], lengths[1][::7] = logps[0][::7], logps[2][::7], lengths[0][::7]
    chosen, rejected, ref_chosen, ref_rejected, *counts = (torch.from_numpy(values) for values in (*logps, *lengths))
    return chosen, rejected, ref_chosen, ref_rejected, counts[0], counts[1]


def share(found: Any) -> float:  # Any: a NumPy array of bool
    return float(np.mean(found))


@given(SEEDS)
def test_ranking_accuracy_counts_ties_as_right(seed: int) -> None:
    chosen, rejected, _, _, chosen_lengths, rejected_lengths = random_pairs(seed)
    c, r = chosen.numpy(), rejected.numpy()
    assert ranking_accuracy(chosen, rejected).item() == pytest.approx(share(c >= r))
    per_token = share(c / chosen_lengths.numpy() >= r / rejected_lengths.numpy())
    assert ranking_accuracy(chosen, rejected, chosen_lengths, rejected_lengths).item() == pytest.approx(per_token)


@given(SEEDS)
def test_implicit_accuracy_counts_ties_as_wrong(seed: int) -> None:
    chosen, rejected, ref_chosen, ref_rejected, _, _ = random_pairs(seed)
    gains = (chosen - ref_chosen).numpy() > (rejected - ref_rejected).numpy()
    ties = ((chosen == rejected) & (ref_chosen == ref_rejected)).numpy()
    assert implicit_accuracy(chosen, rejected, ref_chosen, ref_rejected).item() == pytest.approx(share(gains & ~ties))


def test_a_policy_that_is_the_reference_has_gained_nothing() -> None:
    _, _, ref_chosen, ref_rejected, _, _ = random_pairs(seed=0)
    assert implicit_accuracy(ref_chosen, ref_rejected, ref_chosen, ref_rejected).item() == 0.0


def test_log_probabilities_of_one_prompt_may_be_shifted_together() -> None:
    chosen, rejected, _, _, _, _ = random_pairs(seed=0)
    shift = torch.linspace(-5.0, 5.0, len(chosen), dtype=torch.float64).round()
    assert ranking_accuracy(chosen + shift, rejected + shift) == ranking_accuracy(chosen, rejected)


def test_equal_lengths_change_no_ranking() -> None:
    chosen, rejected, _, _, lengths, _ = random_pairs(seed=3)
    assert ranking_accuracy(chosen, rejected, lengths, lengths) == ranking_accuracy(chosen, rejected)


@given(SEEDS, BETAS)
def test_the_dpo_loss_is_at_most_the_threshold_exactly_where_a_pair_is_ranked_rightly(seed: int, beta: float) -> None:
    chosen, rejected, ref_chosen, ref_rejected, _, _ = random_pairs(seed)
    # Some pairs close to the tie, where a wrong sign or factor in the threshold would show.
    rejected[1::7] = chosen[1::7] + 1e-3
    rejected[2::7] = chosen[2::7] - 1e-3
    loss = preference_loss("sigmoid", PairLogps(chosen, rejected, ref_chosen, ref_rejected), beta=beta)
    threshold = flip_threshold(ref_chosen, ref_rejected, beta)
    is_tie = chosen == rejected
    assert torch.equal((loss <= threshold)[~is_tie], (chosen > rejected)[~is_tie])
    torch.testing.assert_close(loss[is_tie], threshold[is_tie], rtol=1e-9, atol=0.0)


def test_thresholds_are_those_of_the_paper_examples() -> None:
    difficulty = torch.tensor([5.0, 30.0, 0.0])
    thresholds = flip_threshold(-difficulty, torch.zeros(3), beta=0.1)
    assert thresholds.tolist() == pytest.approx([0.474, 0.049, math.log(2)], abs=5e-4)


@pytest.mark.parametrize("beta", [0.01, 0.1, 1.0])
def test_a_pair_that_the_reference_ranks_rightly_stays_right_below_log_2(beta: float) -> None:
    _, _, ref_chosen, ref_rejected, _, _ = random_pairs(seed=0)
    is_right = ref_chosen >= ref_rejected
    assert (flip_threshold(ref_chosen, ref_rejected, beta)[is_right] >= math.log(2)).all()
    assert (flip_threshold(ref_chosen, ref_rejected, beta)[~is_right] < math.log(2)).all()


@given(SEEDS, BETAS, st.floats(min_value=0.05, max_value=0.95))
def test_idealized_accuracy_is_that_of_the_closed_form_policy(seed: int, beta: float, preference: float) -> None:
    _, _, ref_chosen, ref_rejected, chosen_lengths, rejected_lengths = random_pairs(seed)
    for lengths in ((), (chosen_lengths, rejected_lengths)):
        divisors = [values.numpy() for values in lengths] or [1.0, 1.0]
        odds = ref_chosen.numpy() / divisors[0] - ref_rejected.numpy() / divisors[1]
        expected = share(odds + math.log(preference / (1 - preference)) / beta > 0)
        found = idealized_ranking_accuracy(ref_chosen, ref_rejected, preference, beta, *lengths)
        assert found.item() == pytest.approx(expected)


def test_unanimous_raters_make_every_pair_right_and_undecided_ones_leave_the_reference() -> None:
    _, _, ref_chosen, ref_rejected, _, _ = random_pairs(seed=1)
    assert idealized_ranking_accuracy(ref_chosen, ref_rejected, 1.0, beta=10.0).item() == 1.0
    assert idealized_ranking_accuracy(ref_chosen, ref_rejected, 0.0, beta=10.0).item() == 0.0
    strictly = (ref_chosen > ref_rejected).double().mean()
    assert idealized_ranking_accuracy(ref_chosen, ref_rejected, 0.5, beta=0.1) == strictly
    assert strictly < ranking_accuracy(ref_chosen, ref_rejected)


def test_a_stronger_tie_to_the_reference_never_helps_a_majority() -> None:
    _, _, ref_chosen, ref_rejected, _, _ = random_pairs(seed=1)
    found = [idealized_ranking_accuracy(ref_chosen, ref_rejected, 0.75, beta).item() for beta in (1e-3, 0.05, 0.5, 1e6)]
    assert found == sorted(found, reverse=True)
    assert found[0] == 1.0
    # A tie of the reference is broken by the majority, however strong the tie.
    assert found[-1] == ranking_accuracy(ref_chosen, ref_rejected).item()


def test_every_pair_may_have_raters_of_its_own() -> None:
    ref_chosen, ref_rejected = torch.tensor([-20.0, -20.0]), torch.tensor([-10.0, -10.0])
    preference = torch.tensor([0.75, 0.6])  # log-odds 1.1 and 0.4 against 10 nats
    assert idealized_ranking_accuracy(ref_chosen, ref_rejected, preference, beta=0.1).item() == 0.5


def test_what_is_undefined_is_nan() -> None:
    nothing, one = torch.empty(0), torch.tensor([-1.0])
    unknown = torch.tensor([float("nan")])
    assert ranking_accuracy(nothing, nothing).isnan()
    assert ranking_accuracy(unknown, one).isnan()
    assert ranking_accuracy(torch.zeros(1), one, torch.tensor([0]), torch.tensor([1])).isnan()
    assert implicit_accuracy(one, one, unknown, one).isnan()
    assert idealized_ranking_accuracy(one, one, torch.tensor([1.5]), 0.1).isnan()


def test_half_precision_is_compared_in_float32() -> None:
    chosen, rejected = torch.tensor([-100.0], dtype=torch.bfloat16), torch.tensor([-100.5], dtype=torch.bfloat16)
    found = ranking_accuracy(chosen, rejected, torch.tensor([200]), torch.tensor([200]))
    assert found.dtype == torch.float32
    assert found.item() == 1.0


def test_mistakes_are_named() -> None:
    one = torch.tensor([-1.0])
    with pytest.raises(ValueError, match="Only `chosen_lengths` is given; a comparison per token needs the lengths of both"):
        ranking_accuracy(one, one, torch.tensor([1]))
    with pytest.raises(ValueError, match=r"one number per pair, \[B\]; `rejected` has shape \[1, 1\], `chosen` \[1\]"):
        ranking_accuracy(one, one[:, None])
    with pytest.raises(ValueError, match="`beta` must be above 0, got 0.0"):
        flip_threshold(one, one, 0.0)
    with pytest.raises(
        ValueError, match=r"`preference` is the proportion of raters for the chosen response, in \[0, 1\], got 75"
    ):
        idealized_ranking_accuracy(one, one, 75, 0.1)
    with pytest.raises(ValueError, match=r"`preference` is one number or one per pair, \[1\], got \[2\]"):
        idealized_ranking_accuracy(one, one, torch.tensor([0.5, 0.6]), 0.1)
