"""Stability gap, worst-case accuracy and windowed forgetting against loops, hand-computed vectors and what must always hold."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_pref.measures.forgetting import (
    StabilityGap,
    WindowedSwings,
    average_forgetting,
    bootstrap_deviations,
    by_step,
    minimum_accuracy,
    noise_floor,
    stability_gap,
    standard_error,
    windowed_forgetting,
    windowed_plasticity,
    worst_case_accuracy,
)

accuracies = st.lists(st.floats(0, 1), min_size=1, max_size=40)
windows = st.integers(1, 45)


def gap_by_loops(steps: Sequence[int], losses: Sequence[float], shift: int, tolerance: float, window: int) -> StabilityGap:
    """Oracle: the definitions, one after the other, in float64."""
    values = np.asarray(losses, dtype=np.float64)
    before = [i for i, step in enumerate(steps) if step <= shift][-window:]
    after = [i for i, step in enumerate(steps) if step > shift]
    baseline = values[before].mean()
    depth, worst = -math.inf, -1
    onset = None
    area = 0.0
    for i in after:
        rise = values[i] - baseline
        if rise > depth:
            depth, worst = rise, i
        if rise > tolerance and onset is None:
            onset = steps[i]
        area += max(0.0, rise - tolerance) * (steps[i] - max(steps[i - 1], shift))
    recovery = None
    for i in range(worst, len(steps)):
        stays = values[i : i + window] <= baseline + tolerance
        if onset is not None and recovery is None and len(stays) == window and stays.all():
            recovery = steps[i]
    duration = 0 if onset is None else None if recovery is None else recovery - onset
    return StabilityGap(depth, onset, steps[worst], recovery, duration, area, values[-1] - baseline)


def swings_by_loops(trace: Sequence[float], window: int) -> tuple[float, float]:
    """Oracle: all ordered pairs inside all windows."""
    fall = rise = 0.0
    for m in range(len(trace)):
        for n in range(m + 1, min(m + window, len(trace))):
            fall, rise = max(fall, trace[m] - trace[n]), max(rise, trace[n] - trace[m])
    return fall, rise


@given(
    st.lists(st.tuples(st.integers(1, 5), st.floats(0, 4)), min_size=4, max_size=40),
    st.floats(0, 0.5),
    st.integers(1, 4),
    st.data(),
)
def test_the_gap_is_that_of_the_definitions(
    trace: list[tuple[int, float]], tolerance: float, window: int, data: st.DataObject
) -> None:
    steps = np.cumsum([distance for distance, _ in trace]).tolist()
    losses = [loss for _, loss in trace]
    shift = data.draw(st.integers(steps[0], steps[-1] - 1))
    found, expected = (
        stability_gap(steps, losses, shift, tolerance, window),
        gap_by_loops(steps, losses, shift, tolerance, window),
    )
    for name, a, b in zip(StabilityGap._fields, found, expected, strict=True):
        assert a == (None if b is None else pytest.approx(b, abs=1e-9)), name


def test_a_planted_dip_is_described_as_it_was_planted() -> None:
    """Baseline (2 + 2 + 2) / 3; rises 1, 3, 1 at steps 6, 7, 8 less the tolerance 0.5 make 0.5 + 2.5 + 0.5 nat-steps."""
    losses = torch.full((20,), 2.0, dtype=torch.float64)
    losses[6:9] += torch.tensor([1.0, 3.0, 1.0])
    gap = stability_gap(torch.arange(20), losses, shift_step=5, tolerance=0.5)
    assert gap == StabilityGap(
        depth=3.0, onset=6, worst_step=7, recovery_step=9, duration=3, area=pytest.approx(3.5), final_change=0.0
    )


def test_a_dip_that_does_not_end_is_censored() -> None:
    gap = stability_gap(range(6), [1.0, 1.0, 2.0, 3.0, 1.0, 1.0], shift_step=1)
    assert (gap.onset, gap.worst_step, gap.recovery_step, gap.duration) == (2, 3, None, None), "two of three quiet evaluations"
    assert stability_gap(range(7), [1.0, 1.0, 2.0, 3.0, 1.0, 1.0, 1.0], shift_step=1).recovery_step == 4


def test_a_return_of_the_dip_is_no_recovery() -> None:
    losses = [1.0, 3.0, 1.0, 1.0, 2.0, 1.0, 1.0, 1.0]
    assert stability_gap(range(8), losses, shift_step=0).recovery_step == 5


def test_without_a_dip_there_is_neither_onset_nor_recovery() -> None:
    gap = stability_gap([0, 1, 2, 3], [1.0, 1.005, 0.9, 0.8], shift_step=0)
    assert (gap.onset, gap.recovery_step, gap.duration, gap.area) == (None, None, 0, 0.0)
    assert gap.depth == pytest.approx(0.005)
    assert stability_gap([0, 1], [1.0, 0.7], shift_step=0).depth == pytest.approx(-0.3)


def test_the_tolerance_is_one_per_cent_of_the_baseline_unless_given() -> None:
    assert stability_gap([0, 1], [2.0, 2.019], shift_step=0).onset is None
    assert stability_gap([0, 1], [2.0, 2.021], shift_step=0).onset == 1
    assert stability_gap([0, 1], [-0.9, -0.895], shift_step=0).onset is None, "accuracies, with a minus"
    assert stability_gap([0, 1], [-0.9, -0.88], shift_step=0).onset == 1
    assert stability_gap([0, 1], [2.0, 2.021], shift_step=0, tolerance=0.1).onset is None


def test_the_baseline_is_the_mean_of_the_last_evaluations_before_the_shift() -> None:
    losses = [9.0, 1.0, 2.0, 3.0, 5.0]
    assert stability_gap(range(5), losses, shift_step=3).depth == 3.0
    assert stability_gap(range(5), losses, shift_step=3, window=1).depth == 2.0
    assert stability_gap(range(5), losses, shift_step=0, window=3).depth == -4.0, "one evaluation is all there is"


def test_sparse_evaluations_stand_for_the_steps_since_the_one_before() -> None:
    """Rises 1 and 2 over 4 and 10 steps, less the tolerance 0: 4 + 20."""
    assert stability_gap([0, 4, 14], [1.0, 2.0, 3.0], shift_step=0, tolerance=0.0).area == 24.0


def test_of_evaluations_at_one_step_the_last_one_counts() -> None:
    assert stability_gap([0, 1, 1, 2], [1.0, 9.0, 2.0, 1.0], shift_step=0).depth == 1.0
    assert by_step(torch.tensor([3, 3, 5]), torch.tensor([1.0, 2.0, 4.0])) == [(3, 2.0), (5, 4.0)]


def test_a_loss_that_is_no_number_is_as_bad_as_can_be() -> None:
    gap = stability_gap([0, 1, 2, 3, 4], [1.0, math.nan, 1.0, 1.0, 1.0], shift_step=0)
    assert (gap.depth, gap.worst_step, gap.recovery_step) == (math.inf, 1, 2)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (([0, 1], [1.0, 2.0], 5), "no evaluation after the shift at step 5; evaluate on both sides"),
        (([3, 4], [1.0, 2.0], 2), "no evaluation up to the shift at step 2"),
        (([0, 1, 2], [1.0, 2.0], 0), "`steps` and `losses` belong together, got 3 and 2"),
        (([1, 0], [1.0, 2.0], 0), "`steps` must not decrease"),
        (([0, 1], [math.inf, 2.0], 0), "The loss before the shift at step 0 is inf"),
        (([0, 1], [1.0, 2.0], 0, -0.1), "`tolerance` must be at least 0, got -0.1"),
        (([0, 1], [1.0, 2.0], 0, 0.1, 0), "`window` must be at least 1 evaluation, got 0"),
    ],
)
def test_a_trace_that_says_nothing_is_refused(given: tuple[object, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        stability_gap(*given)  # type: ignore[arg-type]


@given(accuracies, windows)
def test_windowed_swings_are_those_of_all_pairs_online_and_offline(trace: list[float], window: int) -> None:
    expected = swings_by_loops(trace, window)
    online = WindowedSwings(window)
    for accuracy in trace:
        online.update(accuracy)
    assert (windowed_forgetting(trace, window), windowed_plasticity(trace, window)) == expected
    assert (online.forgetting, online.plasticity) == expected
    assert len(online._peaks) <= window
    assert len(online._valleys) <= window


def test_windowed_swings_of_the_papers_shape() -> None:
    """[.9, .1, .8]: the fall is .9 - .1, the rise .8 - .1; a window of 2 sees the same neighbours, one of 1 nothing."""
    trace = [0.9, 0.1, 0.8]
    assert windowed_forgetting(trace, 3) == pytest.approx(0.8)
    assert windowed_plasticity(trace, 3) == pytest.approx(0.7)
    assert windowed_forgetting(torch.tensor(trace, dtype=torch.float64), 2) == pytest.approx(0.8)
    assert windowed_forgetting(trace, 1) == windowed_plasticity(trace, 1) == 0.0


def test_a_rise_that_starts_at_the_lowest_value_so_far_is_seen() -> None:
    """Skipping values below the best one found is right for falls only: it would make 0 of the rise from .1 to .8."""
    online = WindowedSwings(3)
    for accuracy in (0.9, 0.1, 0.8):
        online.update(accuracy)
    assert online.plasticity == windowed_plasticity([0.9, 0.1, 0.8], 3) == pytest.approx(0.7)
    assert windowed_plasticity([0.1, 0.1, 0.5, 0.2, 0.9], 3) == pytest.approx(0.7)


@given(accuracies, windows)
def test_windowed_forgetting_only_grows_with_time_and_window(trace: list[float], window: int) -> None:
    assert windowed_forgetting(trace[:-1], window) <= windowed_forgetting(trace, window)
    assert windowed_forgetting(trace, window) <= windowed_forgetting(trace, window + 1)
    assert windowed_plasticity(trace, window) <= windowed_plasticity(trace, window + 1)


@given(accuracies)
def test_a_window_over_everything_sees_at_least_the_forgetting(trace: list[float]) -> None:
    assert windowed_forgetting(trace, len(trace)) >= average_forgetting([trace])


@given(accuracies, windows)
def test_a_series_that_only_falls_has_no_plasticity(trace: list[float], window: int) -> None:
    falling = sorted(trace, reverse=True)
    assert windowed_plasticity(falling, window) == 0
    ranges = [falling[i] - falling[min(i + window, len(falling)) - 1] for i in range(len(falling))]
    assert windowed_forgetting(falling, window) == max(ranges)
    assert windowed_forgetting([0.3] * 5, window) == windowed_plasticity([0.3] * 5, window) == 0


@given(st.lists(accuracies, min_size=1, max_size=4), st.floats(0, 1))
def test_worst_cases_are_no_better_than_what_is_there_now(traces: list[list[float]], current: float) -> None:
    now = [trace[-1] for trace in traces]
    minimum, worst = minimum_accuracy(traces), worst_case_accuracy(current, traces)
    k = len(traces) + 1
    assert minimum <= sum(now) / len(now) + 1e-12
    assert worst <= (sum(now) + current) / k + 1e-12
    assert worst == pytest.approx(current / k + (1 - 1 / k) * minimum)
    longer = [[*trace, 0.5] for trace in traces]
    assert minimum_accuracy(longer) <= minimum


def test_worst_case_accuracy_by_hand() -> None:
    """Minima .5 and .7, now .9: (.9 + .5 + .7) / 3 = .7; forgetting (.1 + .3) / 2."""
    traces = {"a": [0.9, 0.5, 0.8], "b": torch.tensor([1.0, 0.7], dtype=torch.float64)}
    assert minimum_accuracy(traces) == pytest.approx(0.6)
    assert worst_case_accuracy(torch.tensor(0.9), traces) == pytest.approx(0.7)
    assert average_forgetting(traces) == pytest.approx(0.2)


def test_with_the_first_task_only_the_worst_case_is_its_accuracy() -> None:
    assert worst_case_accuracy(0.4, []) == 0.4
    assert math.isnan(minimum_accuracy([]))
    assert math.isnan(average_forgetting({}))


def test_an_empty_trace_or_window_is_refused() -> None:
    with pytest.raises(ValueError, match="The trace of an old task is empty; it begins with the accuracy at the end"):
        minimum_accuracy([[0.5], []])
    for function in (windowed_forgetting, windowed_plasticity):
        with pytest.raises(ValueError, match="`window` must be at least 1 evaluation, got 0"):
            function([0.5], 0)
    with pytest.raises(ValueError, match="`window` must be at least 1 evaluation, got -1"):
        WindowedSwings(-1)


def test_the_standard_error_of_a_probe_is_that_of_the_textbook() -> None:
    values = torch.randn(400, generator=torch.Generator().manual_seed(1), dtype=torch.float64) * 3
    deviations = bootstrap_deviations(values, num_draws=4000)
    # 4000 draws know their own standard deviation to about 1 %.
    assert standard_error(deviations) == pytest.approx(values.std(correction=0).item() / 20, rel=0.05)
    assert torch.equal(deviations, deviations.sort().values)
    assert abs(deviations.mean().item()) < 0.01


def test_weights_make_the_bootstrap_that_of_a_mean_over_tokens() -> None:
    generator = np.random.default_rng(0)
    values, weights = generator.normal(size=50), generator.integers(1, 30, size=50).astype(float)
    means = []
    for _ in range(4000):
        rows = generator.integers(0, 50, size=50)
        means.append((values[rows] * weights[rows]).sum() / weights[rows].sum())
    found = bootstrap_deviations(torch.tensor(values), torch.tensor(weights), num_draws=4000)
    # Two estimates of one standard deviation from 4000 draws each.
    assert standard_error(found) == pytest.approx(np.std(means), rel=0.06)


def test_the_noise_floor_is_the_mean_of_the_largest_of_so_many_draws_or_a_standard_error() -> None:
    deviations = bootstrap_deviations(torch.randn(64, generator=torch.Generator().manual_seed(0)))
    generator = np.random.default_rng(0)
    for count in (10, 100):
        largest = generator.choice(deviations.numpy(), size=(20_000, count)).max(1).mean()
        assert noise_floor(deviations, count) == pytest.approx(largest, abs=0.003)
    assert noise_floor(deviations, 1) == noise_floor(deviations, 2) == standard_error(deviations)
    assert noise_floor(deviations, 1) < noise_floor(deviations, 10) < noise_floor(deviations, 100)


@settings(max_examples=20)
@given(st.integers(0, 1000))
def test_fresh_probes_of_a_model_that_stands_still_seldom_dip_beyond_three_noise_floors(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    probe = torch.rand(64, generator=generator, dtype=torch.float64)
    floor = noise_floor(bootstrap_deviations(probe), 50)
    trace = [0.5, *torch.rand(50, 64, generator=generator, dtype=torch.float64).mean(1).tolist()]
    assert stability_gap(range(51), trace, shift_step=0).depth < 3 * floor


def test_the_bootstrap_is_the_same_every_time_and_never_touches_the_global_generator() -> None:
    state = torch.random.get_rng_state()
    values = torch.arange(9.0)
    assert torch.equal(bootstrap_deviations(values), bootstrap_deviations(values))
    assert not torch.equal(bootstrap_deviations(values), bootstrap_deviations(values, seed=1))
    assert torch.equal(state, torch.random.get_rng_state())


def test_a_large_probe_is_drawn_in_pieces() -> None:
    values = torch.rand(300_000, generator=torch.Generator().manual_seed(0))
    assert len(bootstrap_deviations(values, num_draws=10)) == 10


def test_a_probe_without_noise_has_no_floor() -> None:
    deviations = bootstrap_deviations(torch.ones(10))
    assert noise_floor(deviations, 100) == standard_error(deviations) == 0.0
    broken = bootstrap_deviations(torch.tensor([math.nan]))
    assert math.isnan(noise_floor(broken, 3))
    assert math.isnan(standard_error(broken))
    with pytest.raises(ValueError, match="`num_evaluations` must be at least 1, got 0"):
        noise_floor(deviations, 0)
    with pytest.raises(ValueError, match="A probe needs a value and a weight per example, got 2 and 3 of them"):
        bootstrap_deviations(torch.ones(2), torch.ones(3))
