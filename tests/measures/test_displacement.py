"""Displacement of a set of pairs against loops over its rows."""

from __future__ import annotations

import copy
import math
from itertools import combinations_with_replacement
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_pref.measures.displacement import (
    Displacement,
    displacement,
    is_displaced,
    max_drawdown,
)
from lightning_pref.measures.pair_history import PairChanges


def random_changes(size: int, seed: int = 0, *, unknown: bool = True) -> PairChanges:
    rng = np.random.default_rng(seed)
    columns: dict[str, Any] = {name: rng.normal(-1, 3, size) for name in ("chosen", "rejected", "chosen_step", "rejected_step")}
    if unknown:
        columns["chosen"][rng.random(size) < 0.2] = math.nan
    for side in ("chosen", "rejected"):
        columns[f"{side}_lengths"] = np.where(rng.random(size) < 0.2, math.nan, rng.integers(0, 9, size))
    columns["normalized_ches"] = np.where(rng.random(size) < 0.2, math.nan, rng.normal(size=size))
    tensors = {name: torch.tensor(values) for name, values in columns.items()}
    late = torch.tensor(rng.random(size) < 0.3)
    return PairChanges(row_ids=torch.arange(size), is_late=late, num_left_out=int(rng.integers(0, 3)), **tensors)


def by_hand(parts: list[PairChanges]) -> dict[str, float]:
    """Oracle: one row after the other, in Python floats."""
    rows = [row for part in parts for row in zip(*(c.tolist() for c in part[1:3] + part[5:7]), strict=True)]
    rows = [row for row in rows if math.isfinite(row[0]) and math.isfinite(row[1])]
    sized = [row for row in rows if row[2] > 0 and row[3] > 0]

    def mean(values: list[float]) -> float:
        return math.fsum(values) / len(values) if values else math.nan

    num_sights = sum(len(part.row_ids) + part.num_left_out for part in parts)
    return {
        "chosen_logp_change": mean([row[0] for row in rows]),
        "rejected_logp_change": mean([row[1] for row in rows]),
        "margin_change": mean([row[0] - row[1] for row in rows]),
        "share": mean([float(row[0] < 0) for row in rows]),
        "both_fell": mean([float(row[0] < 0 and row[1] < 0) for row in rows]),
        "chosen_logp_change_per_token": mean([row[0] / row[2] for row in sized]),
        "rejected_logp_change_per_token": mean([row[1] / row[3] for row in sized]),
        "late_anchors": sum(int(part.is_late.sum()) for part in parts) / num_sights,
        "left_out": sum(part.num_left_out for part in parts) / num_sights,
    }


@pytest.mark.parametrize("size", [1, 7, 40])
def test_displacement_is_what_a_loop_over_rows_gives(size: int) -> None:
    changes = random_changes(size)
    expected = by_hand([changes])
    found = displacement(changes.chosen, changes.rejected, changes.chosen_lengths, changes.rejected_lengths)._asdict()
    assert {name: value.item() for name, value in found.items()} == pytest.approx(
        {name: expected[name] for name in found}, rel=1e-12, nan_ok=True
    )


def test_without_lengths_there_is_nothing_per_token() -> None:
    found = displacement(torch.tensor([-1.0, -2.0]), torch.tensor([0.0, -1.0]))
    assert found.chosen_logp_change_per_token.isnan()
    assert found.share.item() == 1.0
    assert found.both_fell.item() == 0.5


def test_no_row_at_all_is_nan_and_not_zero() -> None:
    assert all(value.isnan() for value in displacement(torch.tensor([math.nan]), torch.tensor([0.0])))


@pytest.mark.parametrize("details", [False, True])
def test_accumulated_batches_and_merged_ranks_equal_all_rows_at_once(details: bool) -> None:
    parts = [random_changes(size, seed) for seed, size in enumerate((5, 0, 11, 2))]
    ranks = [Displacement(details=details), Displacement(details=details)]
    for index, part in enumerate(parts):
        ranks[index % 2].update(part)
    merged = copy.deepcopy(ranks[0])
    # What torchmetrics does at a synchronisation: sums are added, rows put one behind the other.
    merged.sums, merged.sights = ranks[0].sums + ranks[1].sums, ranks[0].sights + ranks[1].sights
    merged.rows = [*ranks[0].rows, *ranks[1].rows]
    found = {name: value.item() for name, value in merged.compute().items()}
    expected = by_hand(parts)
    assert {name: found[name] for name in expected} == pytest.approx(expected, rel=1e-12)
    more = {"chosen_logp_change_q05", "chosen_logp_change_median", "chosen_logp_change_q95", "ches_correlation"}
    assert set(found) - set(expected) == (more if details else set())
    if details:
        rows = [
            (row[0], row[2])
            for part in parts
            for row in zip(part.chosen.tolist(), part.rejected.tolist(), part.normalized_ches.tolist(), strict=True)
            if math.isfinite(row[0]) and math.isfinite(row[1])
        ]
        changes = np.array([change for change, _ in rows])
        for name, level in (("q05", 0.05), ("median", 0.5), ("q95", 0.95)):
            assert found[f"chosen_logp_change_{name}"] == pytest.approx(np.quantile(changes, level))
        scored = [(change, score) for change, score in rows if math.isfinite(score)]
        ranked = [np.argsort(np.argsort(values)) for values in zip(*scored, strict=True)]
        assert found["ches_correlation"] == pytest.approx(np.corrcoef(*ranked)[0, 1])


def test_details_of_no_rows_are_nan() -> None:
    metric = Displacement(details=True)
    metric.update(random_changes(0))
    assert metric.compute()["ches_correlation"].isnan()
    assert metric.compute()["chosen_logp_change_median"].isnan()


@settings(deadline=None, max_examples=40)
@given(st.lists(st.floats(-100, 100), min_size=1, max_size=12))
def test_max_drawdown_is_the_largest_fall_over_all_pairs_of_times(series: list[float]) -> None:
    expected = max(series[i] - series[j] for i, j in combinations_with_replacement(range(len(series)), 2))
    assert max_drawdown(torch.tensor(series, dtype=torch.float64)).item() == expected


def test_drawdown_of_nothing_is_nan() -> None:
    assert max_drawdown(torch.empty(0)).isnan()


@pytest.mark.parametrize(("loss", "chosen", "expected"), [(0.5, -9.0, True), (0.5, -3.0, False), (0.8, -9.0, False)])
def test_a_set_is_displaced_if_loss_and_chosen_log_prob_both_fell(loss: float, chosen: float, expected: bool) -> None:
    first = torch.full((4,), -5.0)
    found = is_displaced(torch.tensor(loss), torch.tensor(0.7), torch.tensor([chosen, -5.0, -5.0, -5.0]), first)
    assert found.item() is expected
