"""What is lost, and when, while something new is learned: the stability gap, worst-case accuracy, windowed forgetting.

A model that moves on to a new task often loses an old one within a few updates and regains it later. Who evaluates at the ends
of tasks only does not see it; these measures read the whole trace of an old task, one value per evaluation.
De Lange, van de Ven, Tuytelaars: Continual evaluation for lifelong learning: identifying the stability gap (2023,
arXiv 2205.13452).
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

Numbers = Sequence[float] | Tensor

# Tolerance where the noise of the probe is not given: this share of the baseline.
RELATIVE_TOLERANCE = 0.01

# Bootstrap means that a noise floor is read off; the standard deviation of 1000 numbers is known to 2 %.
NUM_DRAWS = 1000

# Entries that are drawn at once, so that a large probe does not need NUM_DRAWS times its memory.
_DRAWN_AT_ONCE = 1 << 20


class ProbeScores(NamedTuple):
    """What a model does on the examples of one batch of a fixed probe."""

    values: Tensor  # [B], mean loss of each example in nats per token, or its correctness in [0, 1]
    weights: Tensor | None = None  # [B], weight of each in the mean of the probe, such as its tokens; all equal if not given


class StabilityGap(NamedTuple):
    """The dip of one old task after a shift, in losses: up is worse."""

    depth: float  # largest rise over the baseline after the shift; below 0 if the task only ever got better
    onset: int | None  # first step beyond the tolerance; None: there is no gap
    worst_step: int  # step of the largest loss
    recovery_step: int | None  # first step, from the worst on, of `window` evaluations within the tolerance; None: none yet
    duration: int | None  # steps from onset to recovery; 0 without a gap; None while it lasts
    area: float  # sum over steps of the rise beyond the tolerance, in loss times steps
    final_change: float  # rise over the baseline at the end


def stability_gap(
    steps: Numbers, losses: Numbers, shift_step: int, tolerance: float | None = None, window: int = 3
) -> StabilityGap:
    """Depth, onset, recovery and area of the dip that an old task takes after a shift.

    For accuracies, give their negatives. The baseline is the mean of the last `window` losses up to the shift (of all there
    are, if fewer). Onset and recovery are known to the distance between evaluations only. A loss that is no number counts as
    infinite.

    Args:
        steps: Optimiser steps of the evaluations, not decreasing; of several with the same step the last one counts, [N].
        losses: Mean loss of the old task at each of them, [N].
        shift_step: Step at which training moved on; the evaluation there still belongs to the time before.
        tolerance: Rise over the baseline that is no dip yet, in the unit of the losses, at least 0: twice the standard error
            of the baseline is a good one. 1 % of the baseline if not given.
        window: Evaluations that make the baseline, and that must be within the tolerance in a row for a recovery.

    >>> stability_gap([0, 1, 2, 3, 4, 5], [1.0, 1.5, 2.0, 1.0, 1.0, 1.0], shift_step=0)
    StabilityGap(depth=1.0, onset=1, worst_step=2, recovery_step=3, duration=2, area=1.48, final_change=0.0)
    """
    if window < 1:
        raise ValueError(f"`window` must be at least 1 evaluation, got {window!r}.")
    if tolerance is not None and not tolerance >= 0:
        raise ValueError(f"`tolerance` must be at least 0, got {tolerance!r}.")
    trace = by_step(steps, losses)
    before = [loss for step, loss in trace if step <= shift_step][-window:]
    after = [(step, loss) for step, loss in trace if step > shift_step]
    if not before or not after:
        side = "up to" if not before else "after"
        raise ValueError(f"There is no evaluation {side} the shift at step {shift_step}; evaluate on both sides of it.")
    baseline = sum(before) / len(before)
    if not math.isfinite(baseline):
        raise ValueError(f"The loss before the shift at step {shift_step} is {baseline!r}: what is broken already cannot dip.")
    allowed = RELATIVE_TOLERANCE * abs(baseline) if tolerance is None else tolerance
    rises = [loss - baseline for _, loss in after]
    worst = max(range(len(rises)), key=rises.__getitem__)
    onset = next((step for (step, _), rise in zip(after, rises, strict=True) if rise > allowed), None)
    recovery = None if onset is None else _recovery(after, rises, worst, allowed, window)
    spans = [step - last for (step, _), last in zip(after, [shift_step, *(step for step, _ in after)], strict=False)]
    return StabilityGap(
        depth=rises[worst],
        onset=onset,
        worst_step=after[worst][0],
        recovery_step=recovery,
        duration=0 if onset is None else None if recovery is None else recovery - onset,
        # Each evaluation stands for the steps since the one before it.
        area=sum(max(0.0, rise - allowed) * span for rise, span in zip(rises, spans, strict=True)),
        final_change=rises[-1],
    )


def _recovery(after: Sequence[tuple[int, float]], rises: Sequence[float], worst: int, allowed: float, window: int) -> int | None:
    for i in range(worst, len(rises) - window + 1):
        if all(rise <= allowed for rise in rises[i : i + window]):
            return after[i][0]
    return None


def by_step(steps: Numbers, losses: Numbers) -> list[tuple[int, float]]:
    """Pairs of step and loss, one per step; a loss that is no number is infinite.

    >>> by_step([0, 1, 1], [2.0, 3.0, 4.0])
    [(0, 2.0), (1, 4.0)]
    """
    numbers = [int(step) for step in _floats(steps)]
    values = _floats(losses)
    if len(numbers) != len(values):
        raise ValueError(f"`steps` and `losses` belong together, got {len(numbers)} and {len(values)} of them.")
    if any(later < step for step, later in pairwise(numbers)):
        raise ValueError("`steps` must not decrease; give the evaluations in the order in which they were made.")
    return list({step: math.inf if math.isnan(value) else value for step, value in zip(numbers, values, strict=True)}.items())


def windowed_forgetting(trace: Numbers, window: int) -> float:
    """Largest fall between two of at most `window` consecutive accuracies of one task: WF of the paper, for one task.

    Args:
        trace: Accuracies of the task in the order of evaluation, [N].
        window: Evaluations of a window, at least 1.

    >>> windowed_forgetting([0.9, 0.1, 0.8], window=3)
    0.8
    """
    return _largest_fall(_floats(trace), window)


def windowed_plasticity(trace: Numbers, window: int) -> float:
    """Largest rise between two of at most `window` consecutive accuracies of one task: WP of the paper, for one task.

    Args:
        trace: Accuracies of the task in the order of evaluation, [N].
        window: Evaluations of a window, at least 1.

    >>> round(windowed_plasticity([0.9, 0.1, 0.8], window=3), 6)
    0.7
    """
    return _largest_fall([-value for value in _floats(trace)], window)


def _largest_fall(values: Sequence[float], window: int) -> float:
    _check_window(window)
    return max((max(values[max(0, n - window + 1) : n + 1]) - value for n, value in enumerate(values)), default=0.0)


def _check_window(window: int) -> None:
    if window < 1:
        raise ValueError(f"`window` must be at least 1 evaluation, got {window!r}.")


class WindowedSwings:
    """Windowed forgetting and plasticity of a trace that is still growing, in the memory of one window.

    Args:
        window: Evaluations of a window, at least 1.

    >>> swings = WindowedSwings(3)
    >>> for accuracy in (0.9, 0.1, 0.8):
    ...     swings.update(accuracy)
    >>> swings.forgetting, round(swings.plasticity, 6)
    (0.8, 0.7)
    """

    def __init__(self, window: int) -> None:
        _check_window(window)
        self.window = window
        self.forgetting = 0.0
        self.plasticity = 0.0
        self._count = 0
        # What may still be the largest (smallest) value of a window to come: falling (rising) from the left.
        self._peaks: deque[tuple[int, float]] = deque()
        self._valleys: deque[tuple[int, float]] = deque()

    def update(self, accuracy: float) -> None:
        """Add the next accuracy."""
        self.forgetting = max(self.forgetting, self._extreme(self._peaks, accuracy) - accuracy)
        # Both are looked at for every value: one that is no new fall may well be a rise.
        self.plasticity = max(self.plasticity, accuracy + self._extreme(self._valleys, -accuracy))
        self._count += 1

    def _extreme(self, kept: deque[tuple[int, float]], value: float) -> float:
        """Largest value of the window that ends with this one."""
        while kept and kept[-1][1] <= value:
            kept.pop()
        kept.append((self._count, value))
        if kept[0][0] <= self._count - self.window:
            kept.popleft()
        return kept[0][1]


def minimum_accuracy(old_traces: Mapping[str, Numbers] | Iterable[Numbers]) -> float:
    """Mean over old tasks of the lowest accuracy since each was left: min-ACC of the paper. `nan` without old tasks.

    Args:
        old_traces: Of every old task, its accuracies from the end of its own training on, that first one included.

    >>> minimum_accuracy([[0.9, 0.5, 0.8], [1.0, 0.7]])
    0.6
    """
    return _mean([min(trace) for trace in _traces(old_traces)])


def worst_case_accuracy(current: float | Tensor, old_traces: Mapping[str, Numbers] | Iterable[Numbers]) -> float:
    """Accuracy of the current task and lowest accuracy of each old one, all tasks weighing the same: WC-ACC of the paper.

    Args:
        current: Accuracy now of the task that is being learned.
        old_traces: As for `minimum_accuracy`.

    >>> round(worst_case_accuracy(0.9, [[0.9, 0.5, 0.8], [1.0, 0.7]]), 6)
    0.7
    """
    return _mean([float(current), *(min(trace) for trace in _traces(old_traces))])


def average_forgetting(old_traces: Mapping[str, Numbers] | Iterable[Numbers]) -> float:
    """Mean over old tasks of the accuracy lost since each was left: FORG of the paper. `nan` without old tasks.

    Args:
        old_traces: As for `minimum_accuracy`.

    >>> round(average_forgetting([[0.9, 0.5, 0.8], [1.0, 0.7]]), 6)
    0.2
    """
    return _mean([trace[0] - trace[-1] for trace in _traces(old_traces)])


def bootstrap_deviations(values: Tensor, weights: Tensor | None = None, *, num_draws: int = NUM_DRAWS, seed: int = 0) -> Tensor:
    """How far the mean of a probe strays if other examples of the same kind had been drawn.

    Args:
        values: Loss or correctness of every example of the probe, before the shift, [B].
        weights: Weight of each in the mean, such as its tokens, [B]; all equal if not given.
        num_draws: Probes that are drawn, with replacement, from this one.
        seed: Of the drawing.

    Returns:
        Mean of each drawn probe less the mean of the probe, sorted, [num_draws], float64 on the CPU. Their standard deviation
        is the standard error of the probe's mean.
    """
    flat = values.detach().double().cpu().flatten()
    weight = torch.ones_like(flat) if weights is None else weights.detach().double().cpu().flatten()
    if not len(flat) or len(flat) != len(weight):
        raise ValueError(f"A probe needs a value and a weight per example, got {len(flat)} and {len(weight)} of them.")
    generator = torch.Generator().manual_seed(seed)
    means = []
    at_once = max(1, _DRAWN_AT_ONCE // len(flat))
    for start in range(0, num_draws, at_once):
        shape = (min(at_once, num_draws - start), len(flat))
        drawn = torch.randint(len(flat), shape, generator=generator)
        means.append((flat * weight)[drawn].sum(1) / weight[drawn].sum(1))
    # A probe of examples without weight has no mean.
    deviations = torch.cat(means) - (flat * weight).sum() / weight.sum()
    return deviations[deviations.isfinite()].sort().values


def noise_floor(deviations: Tensor, num_evaluations: int) -> float:
    """Depth of the dip that sampling noise alone would show: the expected largest of so many deviations, or a standard error.

    The worst of many noisy values is bad even if nothing happens, and the worse the more there are; a dip that is no multiple
    of this says nothing about the task beyond these examples. The probe of a run is fixed, so that its own trace is less noisy
    than this: what the floor measures is how much of a dip may be due to the choice of the examples. It is at least one standard
    error, which the largest of three or four deviations is anyway: the one deviation of a single evaluation is 0 on average.

    Args:
        deviations: What `bootstrap_deviations` gave for losses; for accuracies, of their negatives, [D], sorted.
        num_evaluations: Evaluations that the largest is taken of, at least 1.

    Returns:
        The floor in the unit of the probe's values; `nan` without deviations.

    >>> noise_floor(torch.tensor([-2.0, 0.0, 2.0]), num_evaluations=100)
    2.0
    """
    if num_evaluations < 1:
        raise ValueError(f"`num_evaluations` must be at least 1, got {num_evaluations!r}.")
    if not len(deviations):
        return math.nan
    # All draws of N out of D with replacement at once: the largest is at most the i-th with probability (i / D)^N.
    at_most = (torch.arange(len(deviations) + 1, dtype=torch.float64) / len(deviations)) ** num_evaluations
    return max(standard_error(deviations), float((deviations.double() * at_most.diff()).sum()))


def standard_error(deviations: Tensor) -> float:
    """Standard error of the probe's mean, from `bootstrap_deviations`."""
    return float(deviations.double().std(correction=0)) if len(deviations) else math.nan


def _traces(old_traces: Mapping[str, Numbers] | Iterable[Numbers]) -> list[list[float]]:
    traces = [_floats(trace) for trace in (old_traces.values() if isinstance(old_traces, Mapping) else old_traces)]
    if not all(traces):
        raise ValueError("The trace of an old task is empty; it begins with the accuracy at the end of the task's own training.")
    return traces


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else math.nan


def _floats(values: Numbers) -> list[float]:
    return [float(value) for value in (values.tolist() if isinstance(values, Tensor) else values)]
