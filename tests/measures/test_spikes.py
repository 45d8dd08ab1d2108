from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from torch import Tensor

from lightning_pref.measures.spikes import (
    RobustDetector,
    effective_lr_multiplier,
    gradient_spike_score,
    robust_spikes,
    spam_ramp,
    spike_clip,
    spike_share,
)

# Sizes a gradient may have: from far below to far above what a square of float32 can hold.
SIZES = st.one_of(st.just(0.0), st.floats(1e-15, 1e25), st.floats(-1e25, -1e-15))
VECTORS = hnp.arrays(np.float32, (12,), elements=st.floats(-100, 100, width=32, allow_subnormal=False))
MOMENTS = hnp.arrays(np.float32, (12,), elements=st.one_of(st.just(0.0), st.floats(0.0009765625, 1024, width=32)))


# The ramp.


@given(length=st.integers(0, 300))
def test_the_ramp_rises_from_one_hundredth_to_one_and_stays(length: int) -> None:
    ramp = [spam_ramp(c, length) for c in range(length + 3)]
    assert all(0.01 <= value <= 1.0 for value in ramp)
    assert ramp == sorted(ramp)
    assert ramp[length:] == [1.0, 1.0, 1.0]
    assert ramp[0] == pytest.approx(0.01, abs=1e-15) if length else ramp[0] == 1.0


def test_the_ramp_of_the_paper_has_the_values_of_its_code() -> None:
    """phi = 1 - 0.99 * (1 + cos(pi c / 151)) / 2, evaluated by hand to five digits."""
    expected = {0: 0.01, 1: 0.01011, 20: 0.05224, 75: 0.49985, 149: 0.99957, 150: 1.0}
    assert {c: round(spam_ramp(c, 150), 5) for c in expected} == expected


# The effective learning rate.


def adam_update(num_averaged: int, num_corrected: int, betas: tuple[float, float]) -> float:
    """Oracle: Adam's moments under a constant gradient of 1, one update after the other."""
    first = second = 0.0
    for _ in range(num_averaged):
        first = betas[0] * first + (1 - betas[0])
        second = betas[1] * second + (1 - betas[1])
    return first / (1 - betas[0] ** num_corrected) / math.sqrt(second / (1 - betas[1] ** num_corrected))


@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.9, 0.95), (0.0, 0.99)])
@pytest.mark.parametrize(("averaged", "corrected"), [(1, 500), (21, 520), (12, 12), (300, 2300)])
def test_the_multiplier_is_the_size_of_adams_update(betas: tuple[float, float], averaged: int, corrected: int) -> None:
    expected = 0.3 * adam_update(averaged, corrected, betas)
    assert effective_lr_multiplier(0.3, averaged, betas, num_corrected=corrected) == pytest.approx(expected, rel=1e-9)


def test_a_bias_correction_that_is_kept_raises_the_learning_rate_for_hundreds_of_updates() -> None:
    products = [effective_lr_multiplier(spam_ramp(c, 150), c + 1, (0.9, 0.999)) for c in range(500)]
    assert products[0] == pytest.approx(0.0316, abs=1e-4)
    assert max(products) == pytest.approx(2.73, abs=0.01)
    assert sum(product > 1.5 for product in products) > 400
    assert products[499] == pytest.approx(1.59, abs=0.01)


# Clipping.


def clipped_one_by_one(gradient: Any, moment: Any, threshold: float, strict: bool) -> tuple[list[float], int, int, float]:
    """Oracle: the rule in words, in float64, coordinate by coordinate."""
    out, clipped, active, ratio = [], 0, 0, 0.0
    for g, v in zip(gradient.astype(np.float64), moment.astype(np.float64), strict=True):
        value = float(g)
        if v > 0:
            ratio = max(ratio, value**2 / v)
        if v > 0 or strict:
            active += 1
            if value**2 > threshold * v:
                value = math.copysign(math.sqrt(threshold * v), value)
                clipped += 1
        out.append(value)
    return out, clipped, active, ratio


@pytest.mark.parametrize("strict", [False, True])
@given(gradient=VECTORS, moment=MOMENTS, threshold=st.sampled_from([0.5, 10.0, 5000.0]))
@settings(deadline=None)
def test_clipping_is_the_rule_applied_to_each_coordinate(strict: bool, gradient: Any, moment: Any, threshold: float) -> None:
    clip = spike_clip(torch.tensor(gradient).double(), torch.tensor(moment).double(), threshold=threshold, strict=strict)
    values, clipped, active, ratio = clipped_one_by_one(gradient, moment, threshold, strict)
    assert clip.gradient.tolist() == pytest.approx(values, rel=1e-12)
    # A square can lie on the limit, where roots and squares round apart.
    assert abs(clip.num_clipped.item() - clipped) <= sum(
        np.isclose(gradient.astype(float) ** 2, threshold * moment.astype(float))
    )
    assert clip.num_active.item() == active
    assert clip.max_ratio.item() == pytest.approx(ratio, rel=1e-9)


@given(gradient=hnp.arrays(np.float64, (9,), elements=SIZES), moment=MOMENTS.map(lambda v: v[:9]))
@settings(deadline=None)
def test_clipping_keeps_signs_never_lengthens_and_does_nothing_a_second_time(gradient: Any, moment: Any) -> None:
    g, v = torch.tensor(gradient, dtype=torch.float32), torch.tensor(moment)
    once = spike_clip(g, v, threshold=50.0)
    assert (once.gradient.abs() <= g.abs()).all()
    assert torch.equal(once.gradient.sign(), g.sign())
    known = v > 0
    assert (once.gradient.double().square() <= 50.0 * v.double() * (1 + 1e-6))[known].all()
    untouched = ~known | (g.double().square() <= 50.0 * v.double() * (1 - 1e-6))
    assert torch.equal(once.gradient[untouched], g[untouched])
    twice = spike_clip(once.gradient, v, threshold=50.0)
    assert torch.equal(twice.gradient, once.gradient)
    assert twice.num_clipped == 0


@given(gradient=VECTORS, moment=MOMENTS, scale=st.sampled_from([2.0**-10, 0.5, 4.0, 2.0**10]))
@settings(deadline=None)
def test_clipping_does_not_depend_on_the_scale_of_the_loss(gradient: Any, moment: Any, scale: float) -> None:
    plain = spike_clip(torch.tensor(gradient), torch.tensor(moment), threshold=10.0)
    # A power of two, so that nothing rounds differently.
    scaled = spike_clip(torch.tensor(gradient) * scale, torch.tensor(moment) * scale**2, threshold=10.0)
    assert torch.equal(scaled.gradient, plain.gradient * scale)
    assert scaled.num_clipped == plain.num_clipped


def test_what_is_not_finite_is_left_for_the_loss_scaler_to_see() -> None:
    gradient = torch.tensor([math.inf, -math.inf, math.nan, 100.0])
    for strict in (False, True):
        clip = spike_clip(gradient, torch.ones(4), threshold=4.0, strict=strict)
        assert clip.gradient.isfinite().tolist() == [False, False, False, True]
        assert clip.gradient[3] == 2.0
        assert (clip.num_clipped, clip.num_active, clip.max_ratio) == (1, 1, 10000.0)


def test_a_spike_whose_square_is_no_float32_is_cut_all_the_same() -> None:
    clip = spike_clip(torch.tensor([-1e30]), torch.tensor([1.0]), threshold=100.0)
    assert clip.gradient.tolist() == [-10.0]


def test_strict_clipping_freezes_what_has_no_second_moment() -> None:
    gradient, moment = torch.tensor([3.0, 1.0]), torch.tensor([0.0, 1.0])
    assert spike_clip(gradient, moment, threshold=4.0, strict=True).gradient.tolist() == [0.0, 1.0]
    assert spike_clip(gradient, moment, threshold=4.0).gradient.tolist() == [3.0, 1.0]


def test_half_precision_gradients_are_compared_in_float32_and_keep_their_type() -> None:
    clip = spike_clip(torch.tensor([300.0, 1.0], dtype=torch.bfloat16), torch.tensor([1.0, 1.0]), threshold=4.0)
    assert clip.gradient.dtype == torch.bfloat16
    assert clip.gradient.tolist() == [2.0, 1.0]


def test_an_empty_shard_has_nothing_to_clip() -> None:
    clip = spike_clip(torch.zeros(0), torch.zeros(0), threshold=4.0)
    assert (clip.num_clipped, clip.num_active, clip.max_ratio) == (0, 0, 0.0)


def test_the_arguments_are_not_changed() -> None:
    gradient, moment = torch.tensor([100.0]), torch.tensor([1.0])
    spike_clip(gradient, moment, threshold=4.0)
    assert (gradient.item(), moment.item()) == (100.0, 1.0)


# Scores.


def test_the_gradient_spike_score_is_size_over_mean_size_of_each_coordinate() -> None:
    generator = np.random.default_rng(0)
    gradients = generator.normal(size=(50, 3))
    gradients[7, 1] = 400.0
    expected = [[abs(g) / np.mean(np.abs(gradients[:, i])) for i, g in enumerate(row)] for row in gradients]
    score = gradient_spike_score(torch.tensor(gradients))
    assert score.tolist() == [pytest.approx(row) for row in expected]
    assert (score > 45).nonzero().tolist() == [[7, 1]]


def olmo_share(series: Any, window: int, deviations: float, history: int) -> float:
    far = []
    for t in range(history, len(series)):
        past = series[max(0, t - window) : t]
        far.append(abs(series[t] - np.mean(past)) >= deviations * np.std(past, ddof=1))
    return float(np.mean(far))


@pytest.mark.parametrize(("window", "history"), [(1000, 100), (40, 40), (64, 20)])
def test_the_share_of_spikes_leaves_the_value_itself_out_of_its_history(window: int, history: int) -> None:
    generator = np.random.default_rng(1)
    series = generator.normal(2.0, 0.1, size=400)
    series[[150, 151, 300]] = [9.0, 9.0, -5.0]
    found = spike_share(torch.tensor(series), window=window, min_history=history)
    assert found.item() == pytest.approx(olmo_share(series, window, 7.0, history))
    assert found > 0


def test_a_curve_that_stands_still_spikes_only_when_it_moves() -> None:
    still = torch.full((300,), 0.1)
    assert spike_share(still) == 0
    moved = torch.cat([still, torch.tensor([5.0])])
    assert spike_share(moved).item() == pytest.approx(1 / 201)


def test_a_curve_shorter_than_the_history_has_no_share() -> None:
    assert spike_share(torch.ones(100)).isnan()


# The detector.


def judged_one_by_one(series: list[float], window: int, history: int, limit: float, adapt: int, logs: bool) -> list[bool]:
    """Oracle: NumPy's median over the accepted values."""
    accepted: list[float] = []
    streak: list[float] = []
    flags = []
    for value in series:
        past = np.array(accepted[-window:])
        point = value
        if not np.isfinite(value):
            flags.append(True)
            continue
        high = False
        if len(past) >= history:
            takes_logs = logs and past.min() > 0 and value > 0
            floor = 0.01 if takes_logs else max(0.01 * abs(np.median(past)), 1e-12)
            if takes_logs:
                past, point = np.log(past), np.log(value)
            spread = 1.4826 * np.median(np.abs(past - np.median(past)))
            high = point > np.median(past) + limit * max(spread, floor)
        if not high:
            streak = []
            accepted.append(value)
            flags.append(False)
            continue
        streak.append(value)
        if len(streak) == adapt:
            accepted, streak = list(streak), []
            flags.append(False)
        else:
            flags.append(True)
    return flags


@pytest.mark.parametrize("logs", [False, True])
@pytest.mark.parametrize("seed", range(4))
def test_the_detector_agrees_with_numpy_on_a_rough_curve(logs: bool, seed: int) -> None:
    generator = np.random.default_rng(seed)
    series = np.exp(generator.normal(0, 0.5, size=300)) + np.linspace(2, 0, 300)
    series[generator.choice(300, 20, replace=False)] *= 30
    series[200:230] += 40  # a new level, and back
    series[120] = math.nan
    found = robust_spikes(torch.tensor(series), window=64, min_history=10, limit=5.0, adapt_after=6, logarithmic=logs)
    assert found.is_spike.tolist() == judged_one_by_one(series.tolist(), 64, 10, 5.0, 6, logs)
    assert found.is_spike.sum() > 10


def spiky_trace(seed: int) -> tuple[Tensor, Tensor]:
    """A falling loss with noise, and twelve spikes, some of them in a row."""
    generator = torch.Generator().manual_seed(seed)
    steps = torch.arange(1500)
    curve = 2.0 + 2.0 * torch.exp(-steps / 300) + 0.05 * torch.randn(1500, generator=generator)
    truth = torch.zeros(1500, dtype=torch.bool)
    truth[torch.tensor([60, 200, 201, 202, 203, 204, 500, 777, 900, 901, 1200, 1450])] = True
    return torch.where(truth, curve + 1.5 + 3.0 * torch.rand(1500, generator=generator), curve), truth


@pytest.mark.parametrize("logarithmic", [False, True])
@pytest.mark.parametrize("seed", range(5))
def test_O7_every_spike_is_found_and_nothing_else(seed: int, logarithmic: bool) -> None:
    trace, truth = spiky_trace(seed)
    found = robust_spikes(trace, logarithmic=logarithmic).is_spike
    recall = (found & truth).sum() / truth.sum()
    false_alarms = (found & ~truth).sum()
    assert recall == 1.0
    assert false_alarms <= 1


def test_O7_a_large_spike_does_not_hide_smaller_ones_after_it() -> None:
    """The reason for medians: mean and standard deviation of the last 128 values miss all but the first."""
    trace = 1.0 + 0.05 * torch.randn(200, generator=torch.Generator().manual_seed(0))
    places = [60, 75, 110, 150]
    trace[places] += torch.tensor([100.0, 3.0, 3.0, 3.0])
    assert robust_spikes(trace).is_spike.nonzero().flatten().tolist() == places
    moments = [(past.mean(), past.std()) for past in (trace[max(0, t - 128) : t] for t in range(20, 200))]
    flagged = [t for t, (mean, deviation) in enumerate(moments, 20) if trace[t] > mean + 6 * deviation]
    assert flagged == [60]


def test_O7_a_spike_leaves_the_scores_after_it_as_they_were() -> None:
    calm = 1.0 + 0.1 * torch.rand(100, generator=torch.Generator().manual_seed(0))
    spiked = torch.cat([calm[:50], torch.tensor([1e6]), calm[50:]])
    scores = robust_spikes(calm).scores
    found = robust_spikes(spiked).scores
    assert torch.equal(torch.cat([found[:50], found[51:]])[20:], scores[20:])


def test_O7_a_curve_that_stands_still_has_no_spread_and_still_a_score() -> None:
    still = [0.7] * 30
    assert robust_spikes([*still, 0.7]).scores[-1] == 0
    assert not robust_spikes([*still, 0.72]).is_spike[-1], "less than 6 % of the median"
    assert robust_spikes([*still, 0.8]).is_spike[-1]
    assert robust_spikes([0.0] * 30 + [1e-3]).is_spike[-1]


def test_nothing_is_judged_before_there_is_a_history() -> None:
    trace = robust_spikes([1.0, 50.0, 1.0, 1.1, 90.0], min_history=4)
    assert trace.scores[:4].isnan().all()
    assert trace.is_spike.tolist() == [False, False, False, False, True]


def test_what_is_no_number_is_a_spike_from_the_first_value_on_and_is_never_learnt() -> None:
    trace = robust_spikes([math.nan, math.inf, *[1.0] * 30, math.nan, 1.0])
    assert trace.is_spike.nonzero().flatten().tolist() == [0, 1, 32]
    assert trace.scores[32] == math.inf
    assert trace.scores[33] == 0


def test_a_curve_that_stays_high_is_a_new_level() -> None:
    trace = robust_spikes([1.0] * 40 + [3.0] * 40, adapt_after=10)
    assert trace.is_spike.nonzero().flatten().tolist() == list(range(40, 49))


def test_a_curve_may_fall_as_far_as_it_likes() -> None:
    assert not robust_spikes([5.0] * 40 + [0.1] * 40 + [0.2] * 2, limit=1e9).is_spike.any()
    assert not robust_spikes([5.0] * 40 + [-90.0]).is_spike.any()


def test_logarithms_forgive_the_long_tail_of_norms() -> None:
    norms = torch.exp(torch.randn(2000, generator=torch.Generator().manual_seed(0)))
    assert robust_spikes(norms).is_spike.float().mean() > 0.01
    assert not robust_spikes(norms, logarithmic=True).is_spike.any()
    assert robust_spikes(torch.cat([norms, torch.tensor([1e5])]), logarithmic=True).is_spike[-1]


def test_a_window_with_a_value_that_is_not_positive_is_judged_as_it_is() -> None:
    series = [-1.0, *[1.0, 1.1] * 20, 9.0]
    assert robust_spikes(series, logarithmic=True).scores[-1] == robust_spikes(series).scores[-1]


@given(cut=st.integers(0, 300))
@settings(deadline=None, max_examples=15)
def test_a_detector_goes_on_after_a_checkpoint_as_if_nothing_had_happened(cut: int) -> None:
    trace = spiky_trace(3)[0][:300].tolist()
    whole = robust_spikes(trace, window=40)
    first = RobustDetector(window=40)
    begun = [first.judge(value) for value in trace[:cut]]
    second = RobustDetector(window=40)
    second.load(json.loads(json.dumps(first.state())))
    verdicts = begun + [second.judge(value) for value in trace[cut:]]
    assert [verdict.is_spike for verdict in verdicts] == whole.is_spike.tolist()
    assert torch.tensor([verdict.score for verdict in verdicts]).double().nan_to_num().tolist() == pytest.approx(
        whole.scores.nan_to_num().tolist()
    )


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"min_history": 1}, r"`min_history` must be between 2 and `window`, got 1 with a window of 128"),
        ({"min_history": 20, "window": 10}, r"`min_history` must be between 2 and `window`, got 20 with a window of 10"),
        ({"limit": 0.0}, r"`limit` must be positive, got 0.0"),
        ({"adapt_after": 1}, r"`adapt_after` must be at least 2, or no spike would ever be one; got 1"),
    ],
)
def test_settings_that_make_no_sense_are_refused(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RobustDetector(**wrong)
