"""Spikes in gradients and in training curves: SPAM's rules, scores of a spike, and a detector that the spike cannot poison.

SPAM is "Spike-Aware Adam with Momentum Reset" (2025, arXiv 2501.06842); its symbols are named where they appear.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from statistics import median
from typing import Any, NamedTuple

import torch
from torch import Tensor

# Of a normal distribution, so that scores count standard deviations.
MAD_TO_DEVIATION = 1.4826
# A curve can stand still, and then any step is infinitely many deviations: what moves less than 1 % of the median is none.
RELATIVE_FLOOR = 0.01
# Where the median is 0 as well.
ABSOLUTE_FLOOR = 1e-12


def spam_ramp(since_reset: int, warmup_steps: int) -> float:
    """Factor on the learning rate after a reset of the moments (phi): a cosine from 0.01 to 1.

    Args:
        since_reset: Updates between the reset and this one; 0 for the update that resets (c).
        warmup_steps: Length of the ramp in updates (N); 0 for none.

    >>> [round(spam_ramp(c, 150), 4) for c in (0, 20, 75, 150)]
    [0.01, 0.0522, 0.4999, 1.0]
    """
    if since_reset >= warmup_steps:
        return 1.0
    return 1.0 - 0.495 * (1.0 + math.cos(math.pi * since_reset / (warmup_steps + 1)))


def effective_lr_multiplier(ramp: float, num_averaged: int, betas: tuple[float, float], num_corrected: float = math.inf) -> float:
    """Size of Adam's update under a constant gradient, relative to that of an undisturbed run.

    After a reset both moments are under-estimates. Where the bias correction goes on counting from the beginning of the run,
    it no longer makes up for that, and as the first moment recovers sooner, updates come out larger: at Adam's betas up to
    6.6 times, still 2.7 times after 150 updates, and 1.6 times after 500.

    Args:
        ramp: Factor on the learning rate.
        num_averaged: Gradients in the moments, this update's included; at least 1.
        betas: Decay rates of the two moments; 0 for a moment the optimiser does not keep.
        num_corrected: Updates the bias correction assumes; `inf` where it has died down, or there is none.

    >>> [round(effective_lr_multiplier(1.0, n, (0.9, 0.999)), 2) for n in (1, 12, 150, 500)]
    [3.16, 6.57, 2.68, 1.59]
    >>> effective_lr_multiplier(0.5, 12, (0.9, 0.999), num_corrected=12)
    0.5
    """

    def size(updates: float) -> float:
        return (1.0 - math.pow(betas[0], updates)) / math.sqrt(1.0 - math.pow(betas[1], updates))

    return ramp * size(num_averaged) / size(num_corrected)


class SpikeClip(NamedTuple):
    """What clipping did to one tensor."""

    gradient: Tensor  # clipped, same shape and dtype
    num_clipped: Tensor  # [] integer
    num_active: Tensor  # [] integer, coordinates that the rule applied to
    max_ratio: Tensor  # [], largest squared gradient over second moment where there is one, before clipping


def spike_clip(gradient: Tensor, second_moment: Tensor, *, threshold: float, strict: bool = False) -> SpikeClip:
    """Cut every coordinate of a gradient whose square exceeds a multiple of its second moment (SPAM, section 3).

    `|g| > sqrt(threshold v)` becomes `sign(g) sqrt(threshold v)`. Deviation from the paper's code: a coordinate without a
    second moment, such as the row of a token not yet seen, is left alone; the code cuts it to zero, where it stays. Entries
    that are not finite are left alone, so that an overflow stays visible.

    Args:
        gradient: Any shape.
        second_moment: Running mean of squared gradients before this update, same shape.
        threshold: Largest allowed ratio of square to second moment (theta).
        strict: Cut where the second moment is 0, as the paper's code does.

    >>> clip = spike_clip(torch.tensor([3.0, -50.0, 7.0]), torch.tensor([1.0, 1.0, 0.0]), threshold=100.0)
    >>> clip.gradient.tolist(), clip.num_clipped.item(), clip.num_active.item(), clip.max_ratio.item()
    ([3.0, -10.0, 7.0], 1, 2, 2500.0)
    """
    dtype = torch.promote_types(torch.promote_types(gradient.dtype, second_moment.dtype), torch.float32)
    exact, moment = gradient.to(dtype), second_moment.to(dtype)
    size, finite, known = exact.abs(), torch.isfinite(exact), moment > 0
    active = finite if strict else finite & known
    # Roots are compared, not squares: the square of a spike may overflow, and what was cut once must not be cut again.
    bound = (threshold * moment).sqrt()
    cut = active & (size > bound)
    ratio = torch.where(finite & known, size / moment.sqrt(), 0.0)
    return SpikeClip(
        gradient=torch.where(cut, exact.sign() * bound, exact).to(gradient.dtype),
        num_clipped=cut.sum(),
        num_active=active.sum(),
        max_ratio=ratio.max().square() if ratio.numel() else ratio.new_zeros(()),
    )


def peak_ratio(gradient: Tensor, second_moment: Tensor, *, all_positive: bool = False) -> Tensor:
    """Largest squared gradient over second moment, [], in a third of the time that `spike_clip` takes.

    A coordinate without a second moment has a ratio of 0 if it has no gradient, and a huge one if it has. Not finite where a
    gradient is not. What is at most a threshold here has nothing for `spike_clip` to cut at that threshold.

    Args:
        gradient: Any shape.
        second_moment: Same shape.
        all_positive: Says that no second moment is 0, which saves a look.

    >>> peak_ratio(torch.tensor([3.0, -50.0, 0.0]), torch.tensor([1.0, 1.0, 0.0])).item()
    2500.0
    """
    divisor = second_moment if all_positive else second_moment.clamp(min=torch.finfo(second_moment.dtype).tiny)
    return gradient.square().div_(divisor).amax()


def gradient_spike_score(gradients: Tensor) -> Tensor:
    """How many times its own mean size each coordinate's gradient is (GSS); SPAM calls more than 50 a spike.

    Args:
        gradients: One coordinate or many over a window of updates, [T, ...].

    Returns:
        Score of every update and coordinate, [T, ...]; `nan` for a coordinate that is always 0.

    >>> gradient_spike_score(torch.tensor([1.0, -1.0, 1.0, 5.0])).tolist()
    [0.5, 0.5, 0.5, 2.5]
    """
    size = gradients.abs()
    return size / size.mean(0)


def spike_share(series: Tensor, *, window: int = 1000, num_deviations: float = 7.0, min_history: int = 100) -> Tensor:
    """Share of a curve's values that lie far from the rolling mean of the values before them (the OLMo 2 spike score).

    OLMo 2 quotes it in per cent, for the loss and the gradient norm. A value is judged once enough values precede it.

    Args:
        series: Values in order, [T].
        window: How many preceding values make up mean and standard deviation.
        num_deviations: Standard deviations that count as far.
        min_history: Preceding values a value needs to be judged, at least 2.

    Returns:
        Share in [0, 1], []; `nan` where no value could be judged.

    >>> curve = torch.tensor([1.0, 2.0] * 100 + [100.0] + [1.0, 2.0] * 50)
    >>> round(1 / spike_share(curve).item())  # one of the 201 values with 100 before them
    201
    """
    values = series.double()
    far = []
    for t in range(max(min_history, 2), len(values)):
        history = values[max(0, t - window) : t]
        # A curve that stands still has no deviation, only the rounding of its mean.
        deviation = history.std().clamp(min=1e-9 * history.mean().abs())
        distance = (values[t] - history.mean()).abs()
        far.append((distance > 0) & (distance >= num_deviations * deviation))
    return torch.stack(far).double().mean() if far else values.new_full((), math.nan)


class Verdict(NamedTuple):
    """What a detector thinks of a value."""

    score: float  # deviations above the median; nan while there is too little history, inf for what is not finite
    is_spike: bool


class RobustDetector:
    """Tells spikes in a curve by median and median absolute deviation over the last values that were none.

    A running mean is dragged along by the first spike and then lets the next ones pass; here a spike never enters the
    window. Only what is too high counts. A curve that stays high has changed its level: after some spikes in a row these
    become the history, and the detector learns anew.

    Args:
        window: Values that make up the history.
        min_history: Values needed before one is called a spike.
        limit: Score above which a value is a spike, in (robust) standard deviations.
        adapt_after: Spikes in a row that are taken for the new level.
        logarithmic: Judge the logarithm while all values are positive: norms spread by factors, not by differences.

    >>> detector = RobustDetector(min_history=4)
    >>> verdicts = [detector.judge(value) for value in (1.0, 1.2, 0.9, 1.1, 1.0, 50.0, 1.0)]
    >>> [verdict.is_spike for verdict in verdicts]
    [False, False, False, False, False, True, False]
    """

    def __init__(
        self,
        *,
        window: int = 128,
        min_history: int = 20,
        limit: float = 6.0,
        adapt_after: int = 10,
        logarithmic: bool = False,
    ) -> None:
        if not 2 <= min_history <= window:
            raise ValueError(f"`min_history` must be between 2 and `window`, got {min_history!r} with a window of {window!r}.")
        if not limit > 0:
            raise ValueError(f"`limit` must be positive, got {limit!r}.")
        if adapt_after < 2:
            raise ValueError(f"`adapt_after` must be at least 2, or no spike would ever be one; got {adapt_after!r}.")
        self.window = window
        self.min_history = min_history
        self.limit = limit
        self.adapt_after = adapt_after
        self.logarithmic = logarithmic
        self._history: list[float] = []
        self._streak: list[float] = []

    def score(self, value: float) -> float:
        """Deviations of a value above the median of the history, without learning from it."""
        if not math.isfinite(value):
            return math.inf
        if len(self._history) < self.min_history:
            return math.nan
        history, point = self._history, value
        in_logs = self.logarithmic and value > 0 and min(history) > 0
        if in_logs:
            history, point = [math.log(v) for v in history], math.log(value)
        middle = median(history)
        spread = MAD_TO_DEVIATION * median(abs(v - middle) for v in history)
        floor = RELATIVE_FLOOR if in_logs else max(RELATIVE_FLOOR * abs(middle), ABSOLUTE_FLOOR)
        return (point - middle) / max(spread, floor)

    def judge(self, value: float) -> Verdict:
        """Score a value and learn from it, unless it is a spike."""
        score = self.score(value)
        if not math.isfinite(value):
            return Verdict(score, True)
        if not score > self.limit:
            self._streak = []
            self._history = [*self._history, value][-self.window :]
            return Verdict(score, False)
        self._streak.append(value)
        if len(self._streak) < self.adapt_after:
            return Verdict(score, True)
        self._history, self._streak = self._streak[-self.window :], []
        return Verdict(score, False)

    def state(self) -> dict[str, Any]:  # Any: lists of floats
        """What was learnt, as plain data."""
        return {"history": list(self._history), "streak": list(self._streak)}

    def load(self, state: Mapping[str, Any]) -> None:
        """Take up what another detector learnt."""
        self._history = [float(value) for value in state["history"]][-self.window :]
        self._streak = [float(value) for value in state["streak"]]


class RobustTrace(NamedTuple):
    """What a detector thinks of a whole curve."""

    scores: Tensor  # [T]
    is_spike: Tensor  # [T] bool


def robust_spikes(
    series: Tensor | Iterable[float],
    *,
    window: int = 128,
    min_history: int = 20,
    limit: float = 6.0,
    adapt_after: int = 10,
    logarithmic: bool = False,
) -> RobustTrace:
    """Judge a whole curve as `RobustDetector` would have done value by value.

    Args:
        series: Values in order, [T].
        window: Values that make up the history.
        min_history: Values needed before one is called a spike.
        limit: Score above which a value is a spike.
        adapt_after: Spikes in a row that are taken for the new level.
        logarithmic: Judge logarithms while all values are positive.

    >>> robust_spikes([1.0, 1.2, 0.9, 1.1, 50.0, 1.0], min_history=4).is_spike.tolist()
    [False, False, False, False, True, False]
    """
    detector = RobustDetector(
        window=window, min_history=min_history, limit=limit, adapt_after=adapt_after, logarithmic=logarithmic
    )
    values = series.double().tolist() if isinstance(series, Tensor) else list(series)
    verdicts = [detector.judge(value) for value in values]
    return RobustTrace(
        scores=torch.tensor([verdict.score for verdict in verdicts], dtype=torch.float64),
        is_spike=torch.tensor([verdict.is_spike for verdict in verdicts], dtype=torch.bool),
    )
