import math
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lightning_pref.measures.calibration import (
    LengthBias,
    PairCalibration,
    SourceAccuracy,
    calibration,
    length_balanced_accuracy,
    pair_confidence,
)
from lightning_pref.measures.teaching import length_correlation

GENERATOR = torch.Generator().manual_seed(0)
CHOSEN, REJECTED = torch.randn(2, 60, generator=GENERATOR, dtype=torch.float64)
CHOSEN_LENGTHS, REJECTED_LENGTHS = torch.randint(1, 20, (2, 60), generator=GENERATOR)
NUM_BINS = 7


def reference_error(chosen: list[float], rejected: list[float], num_bins: int) -> float:
    bins: list[list[tuple[float, float]]] = [[] for _ in range(num_bins)]
    for c, r in zip(chosen, rejected, strict=True):
        probability = 1 / (1 + math.exp(-(c - r)))
        confidence = max(probability, 1 - probability)
        right = 0.5 if c == r else float(c > r)
        bins[min(int((confidence - 0.5) / (0.5 / num_bins)), num_bins - 1)].append((confidence, right))
    return sum(len(b) / len(chosen) * abs(np.mean([x for x, _ in b]) - np.mean([y for _, y in b])) for b in bins if b)


def test_F1_the_error_is_that_of_the_loop() -> None:
    found = calibration(CHOSEN, REJECTED, num_bins=NUM_BINS)
    assert found.error.item() == pytest.approx(reference_error(CHOSEN.tolist(), REJECTED.tolist(), NUM_BINS), rel=1e-12)
    assert found.num_pairs.sum().item() == 60


def test_labels_drawn_from_the_models_own_probabilities_are_calibrated_and_a_bolder_model_is_not() -> None:
    generator = torch.Generator().manual_seed(1)
    difference = 3 * torch.randn(40_000, generator=generator, dtype=torch.float64)
    is_first = torch.rand(40_000, generator=generator, dtype=torch.float64) < torch.sigmoid(difference)
    chosen = torch.where(is_first, difference, -difference)
    zero = torch.zeros_like(chosen)
    assert calibration(chosen, zero).error < 0.01
    assert calibration(3 * chosen, zero).error > 0.05
    assert calibration(chosen / 3, zero).error > 0.05


def test_the_error_does_not_depend_on_the_offset_and_swapping_all_pairs_swaps_right_and_wrong() -> None:
    found = calibration(CHOSEN, REJECTED, num_bins=NUM_BINS)
    torch.testing.assert_close(calibration(CHOSEN + 9.0, REJECTED + 9.0, num_bins=NUM_BINS), found, equal_nan=True)
    swapped = calibration(REJECTED, CHOSEN, num_bins=NUM_BINS)
    torch.testing.assert_close(swapped.accuracy, 1 - found.accuracy, equal_nan=True)
    torch.testing.assert_close(swapped.confidence, found.confidence, equal_nan=True)


def test_W3_a_constant_reward_is_calibrated_and_never_right() -> None:
    constant = torch.ones(5)
    assert calibration(constant, constant).error.item() == 0.0
    metric = SourceAccuracy(["all"])
    metric.update(constant, constant, torch.zeros(5, dtype=torch.int64))
    assert {name: value.item() for name, value in metric.compute().items()} == {"all/accuracy": 0.0, "all/ties": 1.0}


def test_certainty_is_in_the_last_bin_and_empty_bins_are_undefined() -> None:
    found = calibration(torch.tensor([1e4, 0.0]), torch.tensor([-1e4, 1e4]), num_bins=4)
    assert found.num_pairs.tolist() == [0.0, 0.0, 0.0, 2.0]
    assert found.accuracy.isnan().tolist() == [True, True, True, False]
    assert found.error.item() == 0.5
    assert calibration(torch.zeros(0), torch.zeros(0)).error.isnan()


@given(st.integers(1, 60))
def test_N5_how_pairs_are_batched_over_ranks_does_not_matter(size: int) -> None:
    source = torch.arange(60) % 3
    metrics = [(PairCalibration(NUM_BINS), SourceAccuracy("abc"), LengthBias()) for _ in range(2)]
    for i, (c, r, cl, rl, s) in enumerate(
        zip(*(x.split(size) for x in (CHOSEN, REJECTED, CHOSEN_LENGTHS, REJECTED_LENGTHS, source)), strict=True)
    ):
        rank = metrics[i % 2]
        rank[0].update(c, r)
        rank[1].update(c, r, s)
        rank[2].update(c, r, cl, rl)
    for first, second in zip(*metrics, strict=True):
        for name in first.metric_state:
            getattr(first, name).add_(getattr(second, name))  # what the synchronisation does
    merged = metrics[0]
    torch.testing.assert_close(merged[0].compute(), calibration(CHOSEN, REJECTED, num_bins=NUM_BINS), equal_nan=True)
    for i, name in enumerate("abc"):
        own = source == i
        expected = (CHOSEN > REJECTED)[own].double().mean()
        torch.testing.assert_close(merged[1].compute()[f"{name}/accuracy"], expected)
    whole = LengthBias()
    whole.update(CHOSEN, REJECTED, CHOSEN_LENGTHS, REJECTED_LENGTHS)
    torch.testing.assert_close(merged[2].compute(), whole.compute())


def test_a_source_without_pairs_is_undefined_and_ties_are_not_right() -> None:
    metric = SourceAccuracy(["x", "y", "z"])
    metric.update(torch.tensor([1.0, 0.0, 0.0, 2.0]), torch.tensor([0.0, 0.0, 1.0, 1.0]), torch.tensor([0, 0, 0, 1]))
    found = metric.compute()
    assert found["x/accuracy"].item() == pytest.approx(1 / 3)
    assert found["x/ties"].item() == pytest.approx(1 / 3)
    assert found["y/accuracy"].item() == 1.0
    assert found["z/accuracy"].isnan()


def test_the_correlation_is_the_within_prompt_one_of_the_teaching_report_and_knows_no_order() -> None:
    metric, swapped = LengthBias(), LengthBias()
    metric.update(CHOSEN, REJECTED, CHOSEN_LENGTHS, REJECTED_LENGTHS)
    swapped.update(REJECTED, CHOSEN, REJECTED_LENGTHS, CHOSEN_LENGTHS)
    rewards, lengths = torch.cat([CHOSEN, REJECTED]), torch.cat([CHOSEN_LENGTHS, REJECTED_LENGTHS])
    expected = length_correlation(rewards, lengths, torch.arange(60).repeat(2)).within
    torch.testing.assert_close(metric.compute()["correlation"], expected)
    torch.testing.assert_close(swapped.compute()["correlation"], expected)


def balanced(scores: tuple[Tensor, Tensor], lengths: tuple[Tensor, Tensor]) -> float:
    return length_balanced_accuracy(*scores, *lengths).item()


def test_a_model_that_only_counts_tokens_is_right_half_the_time_on_balanced_pairs_however_often_longer_is_better() -> None:
    lengths = torch.tensor([9, 8, 7, 6, 2, 4]), torch.tensor([3, 3, 3, 3, 5, 4])
    by_length = lengths[0].float(), lengths[1].float()
    assert (by_length[0] > by_length[1]).float().mean().item() == pytest.approx(4 / 6)
    assert balanced(by_length, lengths) == 0.5
    assert balanced((by_length[1], by_length[0]), lengths) == 0.5
    assert balanced((torch.ones(6), torch.zeros(6)), lengths) == 1.0


def test_balanced_accuracy_is_the_mean_of_the_two_kinds_by_a_loop() -> None:
    kinds: dict[bool, list[bool]] = {True: [], False: []}
    for c, r, cl, rl in zip(CHOSEN, REJECTED, CHOSEN_LENGTHS, REJECTED_LENGTHS, strict=True):
        if cl != rl:
            kinds[bool(cl > rl)].append(bool(c > r))
    expected = (np.mean(kinds[True]) + np.mean(kinds[False])) / 2
    assert balanced((CHOSEN, REJECTED), (CHOSEN_LENGTHS, REJECTED_LENGTHS)) == pytest.approx(expected)


def test_bias_without_pairs_of_one_kind_or_without_differences_is_undefined() -> None:
    metric = LengthBias()
    metric.update(torch.ones(2), torch.zeros(2), torch.tensor([3, 4]), torch.tensor([1, 1]))
    found = metric.compute()
    assert found["accuracy_longer"].item() == 1.0
    assert found["accuracy_shorter"].isnan()
    assert found["balanced_accuracy"].isnan()
    metric.reset()
    metric.update(torch.ones(2), torch.ones(2), torch.tensor([3, 1]), torch.tensor([1, 3]))
    assert metric.compute()["correlation"].isnan()


def test_a_score_that_is_nan_does_not_pass_for_a_wrong_one() -> None:
    bad = torch.tensor([float("nan"), 1.0])
    source, bias = SourceAccuracy(["x", "y"]), LengthBias()
    source.update(bad, torch.zeros(2), torch.tensor([0, 1]))
    bias.update(bad, torch.zeros(2), torch.tensor([1, 3]), torch.tensor([2, 2]))
    assert source.compute()["x/accuracy"].isnan()
    assert source.compute()["y/accuracy"].item() == 1.0
    assert bias.compute()["accuracy_shorter"].isnan()
    assert bias.compute()["accuracy_longer"].item() == 1.0
    assert calibration(bad, torch.zeros(2)).error.isnan()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_scores_are_compared_in_float32_and_sums_stay_in_float64(dtype: torch.dtype) -> None:
    confidence, _ = pair_confidence(torch.tensor([3.0], dtype=dtype), torch.tensor([1.0], dtype=dtype))
    assert confidence.item() == pytest.approx(1 / (1 + math.exp(-2.0)))
    metric = PairCalibration().to(dtype)
    assert metric.num_pairs.dtype == torch.float64


def test_the_state_survives_pickling_and_a_reset_forgets() -> None:
    metric = PairCalibration()
    metric.update(CHOSEN, REJECTED)
    twin = pickle.loads(pickle.dumps(metric))  # our own bytes
    torch.testing.assert_close(twin.compute(), metric.compute(), equal_nan=True)
    metric.reset()
    metric.update(CHOSEN[:1], REJECTED[:1])
    assert metric.compute().num_pairs.sum() == 1


def test_no_bins_raise() -> None:
    with pytest.raises(ValueError, match="`num_bins` must be at least 1, got 0"):
        PairCalibration(0)
