"""Which rows make up which batch of an epoch: every row once, a budget for each batch, the same number of batches on every rank.

The plan is a pure function of the row costs, the settings, the seed and the epoch, so every rank computes the whole of it and
takes its share; nothing is communicated, and the divisors of exact means over ranks and accumulation are known beforehand.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import isqrt
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from lightning_pref.data.groups import WindowCounts

# Batches' worth of shuffled rows that are sorted by length together. More makes batches of more even lengths,
# fewer makes the rows that meet in a batch more random.
LENGTH_WINDOW = 32

# Short epochs have smaller windows, or the same rows would meet in every epoch.
_MIN_WINDOWS = 4


class PlannedBatch(NamedTuple):
    """The rows of one batch of one rank."""

    rows: NDArray[np.int64]  # [G] indices into the table
    window: WindowCounts  # what the optimiser update of this batch sees, over all ranks
    filler: bool  # the row is here only so that every rank has a batch: it weighs 0


@dataclass(frozen=True)
class EpochPlan:
    """All batches of one epoch over all ranks; batch `step * num_replicas + rank` belongs to that step of that rank.

    Attributes:
        rows: Row indices, batch after batch.
        offsets: Where each batch starts in `rows`, and the end of the last, [num_batches + 1].
        filler: Whether a batch is a filler, [num_batches].
        num_replicas: Number of ranks.
    """

    rows: NDArray[np.int64]
    offsets: NDArray[np.int64]
    filler: NDArray[np.bool_]
    num_replicas: int

    @property
    def num_steps(self) -> int:
        """Batches of each rank."""
        return len(self.filler) // self.num_replicas

    def batch(self, step: int, rank: int) -> tuple[NDArray[np.int64], bool]:
        """Row indices of one batch, and whether it is a filler."""
        b = step * self.num_replicas + rank
        return self.rows[self.offsets[b] : self.offsets[b + 1]], bool(self.filler[b])


class EpochPlanner:
    """Plans the epochs of one table: equally many batches in every epoch and on every rank.

    With shuffling, rows are permuted, sorted by cost inside windows of some batches, cut greedily where a budget is full, and
    batches of similar load go to the ranks of one step, in random order. Without, rows are cut in their own order. Where the
    number of batches has to grow, the largest batches are split; no row is dropped or repeated. Only where a rank would go
    without any row, it gets a repeated one marked as filler.

    The number of batches that greedy cutting needs varies a little with the shuffling. It is fixed beforehand with a little
    slack; an epoch that would need more is cut again with larger sort windows, in the end with one, for which the number
    does not depend on the shuffling.

    Args:
        costs: Tokens of each row, [num_rows].
        num_replicas: Number of ranks.
        max_tokens_per_batch: Most tokens of a batch.
        batch_size: Most rows of a batch.
        seed: Seed of the shuffling, at least 0.
        shuffle: Whether rows are shuffled, differently in every epoch.
        length_window: Batches' worth of rows that are sorted by cost together.
        row_ids: What messages call the rows, [num_rows]; their index if not given.
    """

    def __init__(
        self,
        costs: NDArray[np.int64],
        *,
        num_replicas: int = 1,
        max_tokens_per_batch: int | None = None,
        batch_size: int | None = None,
        seed: int = 0,
        shuffle: bool = True,
        length_window: int = LENGTH_WINDOW,
        row_ids: NDArray[np.int64] | None = None,
    ) -> None:
        _check_budgets(costs, max_tokens_per_batch, batch_size, row_ids)
        if seed < 0:
            raise ValueError(f"`seed` must be at least 0, got {seed!r}.")
        self.num_replicas = num_replicas
        self.seed = seed
        self.shuffle = shuffle
        self._costs = costs
        self._budgets = (max_tokens_per_batch, batch_size)
        natural = self._cut(np.sort(costs, kind="stable") if shuffle else costs)
        rows_per_batch = -(-len(costs) // (len(natural) - 1))
        self._window_rows = min(length_window * rows_per_batch, -(-len(costs) // _MIN_WINDOWS))
        num_batches = len(natural) - 1
        if shuffle and self._window_rows < len(costs):
            first = len(self._cut(costs[self._sorted_in_windows(0, self._window_rows)])) - 1
            # The room left in each batch is random, so the number of batches strays like a sum of that many numbers.
            slack = 0 if max_tokens_per_batch is None else isqrt(first) // 8
            num_batches = max(num_batches, first + slack)
        self.num_steps = -(-num_batches // num_replicas)

    def plan(self, epoch: int) -> EpochPlan:
        """The plan of an epoch; the same for the same arguments, on every rank."""
        num_batches = self.num_steps * self.num_replicas
        rows, offsets = self._greedy(epoch, num_batches)
        offsets = _split_largest(offsets, self._costs[rows], num_batches)
        num_fillers = num_batches - (len(offsets) - 1)
        rows = np.concatenate([rows, np.full(num_fillers, self._costs.argmin())])
        offsets = np.concatenate([offsets, offsets[-1] + np.arange(1, num_fillers + 1)])
        filler = np.arange(num_batches) >= num_batches - num_fillers
        if self.shuffle:
            loads = np.add.reduceat(self._costs[rows], offsets[:-1])
            order = _arrange(loads, self.num_replicas, np.random.default_rng([self.seed, epoch, 1]))
            rows, offsets = _reorder(rows, offsets, order)
            filler = filler[order]
        return EpochPlan(rows, offsets, filler, self.num_replicas)

    def _greedy(self, epoch: int, num_batches: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Rows in their order and where batches start in them, at most `num_batches` of them."""
        if not self.shuffle:
            return np.arange(len(self._costs)), self._cut(self._costs)
        window_rows = self._window_rows
        while True:
            rows = self._sorted_in_windows(epoch, window_rows)
            offsets = self._cut(self._costs[rows])
            if len(offsets) - 1 <= num_batches:
                return rows, offsets
            assert window_rows < len(rows), "one window needs no more batches in any epoch"
            window_rows *= 4

    def _sorted_in_windows(self, epoch: int, window_rows: int) -> NDArray[np.int64]:
        """Rows shuffled, then sorted by cost inside windows: upwards, downwards, ..., so that windows join smoothly."""
        rows = np.random.default_rng([self.seed, epoch, 0]).permutation(len(self._costs))
        window = np.arange(len(rows)) // window_rows
        costs = self._costs[rows]
        return rows[np.lexsort((np.where(window % 2, -costs, costs), window))]

    def _cut(self, costs: NDArray[np.int64]) -> NDArray[np.int64]:
        """Offsets of batches that take one row after the other until a budget is full."""
        max_tokens, batch_size = self._budgets
        num_rows = len(costs)
        if max_tokens is None:
            assert batch_size is not None, "_check_budgets wants one of the two"
            return np.append(np.arange(0, num_rows, batch_size), num_rows)
        ends = np.concatenate([[0], np.cumsum(costs)])
        reach = np.searchsorted(ends, ends[:-1] + max_tokens, side="right") - 1
        if batch_size is not None:
            reach = np.minimum(reach, np.arange(batch_size, num_rows + batch_size))
        # Following the jumps is the one step that is sequential by nature; on a list it costs 50 ns a batch.
        next_start = reach.tolist()
        offsets, start = [0], 0
        while start < num_rows:
            start = next_start[start]
            offsets.append(start)
        return np.array(offsets)


def window_counts(
    plan: EpochPlan,
    *,
    weights: NDArray[np.float64],
    num_responses: NDArray[np.int64],
    response_tokens: NDArray[np.int64],
    accumulate: int = 1,
    limit_steps: int | None = None,
) -> list[WindowCounts]:
    """What the optimiser update of each step sees: sums over all ranks and over the `accumulate` steps of its window.

    All three counts are weighted by the rows' weights, so that a row of weight 0 counts nowhere.

    Args:
        plan: The epoch.
        weights: Weight of every row of the table, [num_rows].
        num_responses: Responses of every row, [num_rows].
        response_tokens: Response tokens of every row, [num_rows].
        accumulate: Steps an update gathers; the last window of an epoch may hold fewer.
        limit_steps: Steps after which the epoch ends; the window that is open then is closed.

    Returns:
        One entry a step, [num_steps].
    """
    weight = np.where(np.repeat(plan.filler, np.diff(plan.offsets)), 0.0, weights[plan.rows])
    step_starts = plan.offsets[: -1 : plan.num_replicas]
    limit = plan.num_steps if limit_steps is None else min(limit_steps, plan.num_steps)
    window_starts = np.concatenate([np.arange(0, limit, accumulate), np.arange(limit, plan.num_steps, accumulate)])
    row_starts = step_starts[window_starts]
    columns = (weight, weight * num_responses[plan.rows], weight * response_tokens[plan.rows])
    sums = np.stack([np.add.reduceat(column, row_starts) for column in columns], axis=1).tolist()
    window_sizes = np.diff(np.append(window_starts, plan.num_steps)).tolist()
    return [WindowCounts(*counts) for counts, size in zip(sums, window_sizes, strict=True) for _ in range(size)]


def _check_budgets(
    costs: NDArray[np.int64], max_tokens: int | None, batch_size: int | None, row_ids: NDArray[np.int64] | None
) -> None:
    if not len(costs):
        raise ValueError("There are no rows to make batches of.")
    if max_tokens is None and batch_size is None:
        raise ValueError("A batch needs a bound: give `max_tokens_per_batch`, `batch_size` or both.")
    for name, value in (("max_tokens_per_batch", max_tokens), ("batch_size", batch_size)):
        if value is not None and value < 1:
            raise ValueError(f"`{name}` must be at least 1, got {value!r}.")
    if max_tokens is not None and costs.max() > max_tokens:
        longest = costs.argmax() if row_ids is None else row_ids[costs.argmax()]
        raise ValueError(
            f"Row {longest} (counted from 0) has {costs.max()} tokens with all its responses, more than a batch may hold; "
            f"{(costs > max_tokens).sum()} of {len(costs)} rows are over `max_tokens_per_batch={max_tokens}`. Raise "
            f"`max_tokens_per_batch` to at least {costs.max()}, or shorten the rows with `max_length`."
        )


def _split_largest(offsets: NDArray[np.int64], costs: NDArray[np.int64], num_batches: int) -> NDArray[np.int64]:
    """Halve the batches of most tokens until there are `num_batches`, or none has two rows."""
    while (missing := num_batches - (len(offsets) - 1)) > 0:
        sizes = np.diff(offsets)
        loads = np.where(sizes > 1, np.add.reduceat(costs, offsets[:-1]), 0)
        largest = np.argsort(-loads, kind="stable")[: min(missing, (sizes > 1).sum())]
        if not len(largest):
            break
        offsets = np.sort(np.concatenate([offsets, offsets[largest] + sizes[largest] // 2]))
    return offsets


def _arrange(loads: NDArray[np.int64], num_replicas: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """Order of the batches in which the ranks of a step have similar loads and steps come at random."""
    steps = np.argsort(-loads, kind="stable").reshape(-1, num_replicas)
    return rng.permuted(rng.permutation(steps), axis=1).ravel()


def _reorder(
    rows: NDArray[np.int64], offsets: NDArray[np.int64], order: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Rows and offsets with the batches in another order."""
    sizes = np.diff(offsets)[order]
    moved = np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(sizes)])
    positions = np.arange(len(rows)) + np.repeat(offsets[:-1][order] - moved[:-1], sizes)
    return rows[positions], moved
