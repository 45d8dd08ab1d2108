from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_pref.data.groups import WindowCounts
from lightning_pref.data.packing import EpochPlan, EpochPlanner, window_counts


@dataclass(frozen=True)
class Case:
    costs: np.ndarray
    num_replicas: int
    max_tokens: int | None
    batch_size: int | None
    shuffle: bool
    seed: int
    length_window: int

    def planner(self) -> EpochPlanner:
        return EpochPlanner(
            self.costs,
            num_replicas=self.num_replicas,
            max_tokens_per_batch=self.max_tokens,
            batch_size=self.batch_size,
            seed=self.seed,
            shuffle=self.shuffle,
            length_window=self.length_window,
        )


@st.composite
def cases(draw: st.DrawFn) -> Case:
    costs = np.array(draw(st.lists(st.integers(1, 40), min_size=1, max_size=80)))
    bounds = draw(st.sampled_from(["tokens", "rows", "both"]))
    return Case(
        costs=costs,
        num_replicas=draw(st.integers(1, 5)),
        max_tokens=None if bounds == "rows" else int(costs.max()) + draw(st.integers(0, 100)),
        batch_size=None if bounds == "tokens" else draw(st.integers(1, 9)),
        shuffle=draw(st.booleans()),
        seed=draw(st.integers(0, 3)),
        length_window=draw(st.integers(1, 4)),
    )


def batches(plan: EpochPlan) -> list[list[tuple[list[int], bool]]]:
    """Per step, per rank: the rows and whether the batch is a filler."""
    found = []
    for step in range(plan.num_steps):
        ranks = [plan.batch(step, rank) for rank in range(plan.num_replicas)]
        found.append([(rows.tolist(), filler) for rows, filler in ranks])
    return found


@settings(deadline=None, max_examples=200)
@given(cases(), st.integers(0, 4))
def test_every_row_is_in_exactly_one_batch(case: Case, epoch: int) -> None:
    plan = case.planner().plan(epoch)
    rows = [row for step in batches(plan) for rows, filler in step if not filler for row in rows]
    assert sorted(rows) == list(range(len(case.costs)))


@settings(deadline=None, max_examples=200)
@given(cases(), st.integers(0, 4))
def test_no_batch_is_empty_or_over_its_budget(case: Case, epoch: int) -> None:
    for step in batches(case.planner().plan(epoch)):
        for rows, _ in step:
            assert rows
            assert case.max_tokens is None or case.costs[rows].sum() <= case.max_tokens
            assert case.batch_size is None or len(rows) <= case.batch_size


@settings(deadline=None, max_examples=200)
@given(cases())
def test_every_epoch_has_the_same_number_of_steps(case: Case) -> None:
    planner = case.planner()
    assert {planner.plan(epoch).num_steps for epoch in range(6)} == {planner.num_steps}


@settings(deadline=None, max_examples=200)
@given(cases(), st.integers(0, 4))
def test_fillers_appear_only_when_a_rank_would_go_without_rows(case: Case, epoch: int) -> None:
    steps = batches(case.planner().plan(epoch))
    fillers = [rows for step in steps for rows, filler in step if filler]
    assert len(fillers) < case.num_replicas
    assert all(len(rows) == 1 for rows in fillers)
    if fillers:
        assert all(len(rows) == 1 for step in steps for rows, _ in step)


@settings(deadline=None, max_examples=100)
@given(cases(), st.integers(0, 4))
def test_the_same_arguments_give_the_same_plan(case: Case, epoch: int) -> None:
    assert batches(case.planner().plan(epoch)) == batches(case.planner().plan(epoch))


def test_another_seed_or_epoch_gives_another_plan() -> None:
    costs = np.arange(1, 200)
    planner = EpochPlanner(costs, batch_size=4, seed=1)
    plans = [planner.plan(0), planner.plan(1), EpochPlanner(costs, batch_size=4, seed=2).plan(0)]
    memberships = [{frozenset(rows) for step in batches(plan) for rows, _ in step} for plan in plans]
    assert len({frozenset(membership) for membership in memberships}) == 3


def test_evaluation_keeps_the_order_of_the_rows() -> None:
    planner = EpochPlanner(np.full(10, 5), num_replicas=2, max_tokens_per_batch=15, shuffle=False)
    assert batches(planner.plan(0)) == batches(planner.plan(3))
    assert [row for step in batches(planner.plan(0)) for rows, _ in step for row in rows] == list(range(10))


@pytest.mark.parametrize("num_replicas", [1, 2, 3])
@pytest.mark.parametrize("shuffle", [True, False])
def test_N5_thirteen_pairs_in_fours_over_ranks_are_each_seen_once(num_replicas: int, shuffle: bool) -> None:
    planner = EpochPlanner(np.arange(1, 14), num_replicas=num_replicas, batch_size=4, shuffle=shuffle)
    steps = batches(planner.plan(0))
    assert all(len(step) == num_replicas for step in steps)
    assert sorted(row for step in steps for rows, _ in step for row in rows) == list(range(13))
    assert not any(filler for step in steps for _, filler in step)


def test_thirteen_pairs_one_by_one_over_two_ranks_need_one_filler_of_weight_zero() -> None:
    plan = EpochPlanner(np.full(13, 5), num_replicas=2, batch_size=1).plan(0)
    counts = window_counts(plan, weights=np.ones(13), num_responses=np.full(13, 2), response_tokens=np.full(13, 3))
    assert plan.filler.sum() == 1
    assert sum(count.groups for count in counts) == 13


def test_rows_of_one_batch_have_similar_lengths() -> None:
    costs = np.random.default_rng(0).integers(10, 1000, size=4000)
    plan = EpochPlanner(costs, max_tokens_per_batch=8000).plan(0)
    spread = [np.ptp(costs[rows]) for step in batches(plan) for rows, _ in step]
    assert np.mean(spread) < 30  # a random dozen of these rows would spread over some 850


def test_the_order_of_lengths_differs_from_step_to_step() -> None:
    costs = np.random.default_rng(0).integers(10, 1000, size=4000)
    plan = EpochPlanner(costs, max_tokens_per_batch=8000).plan(0)
    mean_cost = np.array([costs[step[0][0]].mean() for step in batches(plan)])
    assert abs(np.corrcoef(mean_cost[1:], mean_cost[:-1])[0, 1]) < 0.15


def test_ranks_of_a_step_have_nearly_equal_loads_and_take_turns_at_the_largest() -> None:
    costs = np.random.default_rng(0).integers(10, 1000, size=4000)
    plan = EpochPlanner(costs, num_replicas=4, max_tokens_per_batch=6000).plan(0)
    loads = np.array([[costs[rows].sum() for rows, _ in step] for step in batches(plan)])
    assert (loads.max(1) / loads.mean(1)).mean() < 1.01
    assert set(loads.argmax(1)) == {0, 1, 2, 3}


def test_batches_fill_most_of_the_token_budget() -> None:
    costs = np.random.default_rng(0).integers(10, 500, size=4000)
    plan = EpochPlanner(costs, max_tokens_per_batch=8192).plan(0)
    assert costs.sum() / (plan.num_steps * 8192) > 0.95


def test_an_epoch_that_would_need_more_batches_is_cut_with_larger_windows() -> None:
    """Found by search: with windows of one batch some epochs need more batches than the number that was fixed."""
    costs = np.array([1, 9] * 40)
    planner = EpochPlanner(costs, max_tokens_per_batch=10, length_window=1)
    natural = [len(planner._cut(costs[planner._sorted_in_windows(epoch, planner._window_rows)])) - 1 for epoch in range(30)]
    assert max(natural) > planner.num_steps
    assert {planner.plan(epoch).num_steps for epoch in range(30)} == {planner.num_steps}


def brute_force_windows(
    plan: EpochPlan, weights: np.ndarray, responses: np.ndarray, tokens: np.ndarray, accumulate: int, limit: int | None
) -> list[WindowCounts]:
    """Walk the epoch as a trainer does: gather until the window is full or the epoch ends, then hand everyone the sum."""
    steps = batches(plan)
    found: list[WindowCounts] = []
    open_steps: list[int] = []
    for step in range(len(steps)):
        open_steps.append(step)
        is_last = step + 1 in (limit, len(steps))
        steps_past_limit = step + 1 - (limit if limit is not None and step >= limit else 0)
        if is_last or steps_past_limit % accumulate == 0:
            rows = [row for s in open_steps for rows, filler in steps[s] if not filler for row in rows]
            counts = WindowCounts(
                sum(weights[row] for row in rows),
                sum(weights[row] * responses[row] for row in rows),
                sum(weights[row] * tokens[row] for row in rows),
            )
            found += [counts] * len(open_steps)
            open_steps = []
    return found


@settings(deadline=None, max_examples=200)
@given(cases(), st.integers(1, 5), st.none() | st.integers(0, 30), st.randoms(use_true_random=False))
def test_N3_window_counts_equal_a_walk_over_all_ranks(case: Case, accumulate: int, limit: int | None, rng: object) -> None:
    generator = np.random.default_rng(len(case.costs) + accumulate)
    weights = generator.choice([0.0, 0.5, 1.0, 2.0], size=len(case.costs))
    responses = generator.integers(1, 5, size=len(case.costs))
    tokens = generator.integers(1, 50, size=len(case.costs))
    plan = case.planner().plan(1)
    counts = window_counts(
        plan,
        weights=weights,
        num_responses=responses,
        response_tokens=tokens,
        accumulate=accumulate,
        limit_steps=limit,
    )
    expected = brute_force_windows(plan, weights, responses, tokens, accumulate, limit)
    np.testing.assert_allclose(np.array(counts), np.array(expected), rtol=1e-12)


def test_a_row_over_the_budget_is_named_with_the_setting_to_raise() -> None:
    with pytest.raises(
        ValueError,
        match=r"Row 8 \(counted from 0\) has 90 tokens.*2 of 3 rows are over `max_tokens_per_batch=50`.*to at least 90",
    ):
        EpochPlanner(np.array([10, 90, 60]), max_tokens_per_batch=50, row_ids=np.array([7, 8, 9]))


@pytest.mark.parametrize(
    ("settings_given", "message"),
    [
        ({}, "A batch needs a bound: give `max_tokens_per_batch`, `batch_size` or both"),
        ({"batch_size": 0}, "`batch_size` must be at least 1, got 0"),
        ({"max_tokens_per_batch": -5}, "`max_tokens_per_batch` must be at least 1, got -5"),
        ({"batch_size": 1, "seed": -1}, "`seed` must be at least 0, got -1"),
    ],
)
def test_an_impossible_bound_is_refused(settings_given: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EpochPlanner(np.array([1, 2]), **settings_given)


def test_an_empty_table_is_refused() -> None:
    with pytest.raises(ValueError, match="no rows to make batches of"):
        EpochPlanner(np.array([], dtype=np.int64), batch_size=2)
