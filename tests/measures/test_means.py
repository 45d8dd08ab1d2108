from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_pref.measures import WeightedMeans


def test_a_mean_over_ragged_batches_is_the_mean_of_all_rows() -> None:
    rows = torch.arange(13.0)
    means = WeightedMeans(["x", "y"])
    for chunk in rows.split(4):
        means.update({"x": chunk, "y": -chunk}, torch.ones_like(chunk))
    assert means.compute()["x"].item() == 6.0
    assert means.compute()["y"].item() == -6.0


@given(st.lists(st.tuples(st.floats(-1e6, 1e6), st.floats(0, 10)), min_size=1, max_size=20), st.integers(1, 5))
def test_how_rows_are_batched_does_not_matter(rows: list[tuple[float, float]], size: int) -> None:
    values = torch.tensor([v for v, _ in rows], dtype=torch.float64)
    weights = torch.tensor([w for _, w in rows], dtype=torch.float64)
    means = WeightedMeans(["x"])
    for v, w in zip(values.split(size), weights.split(size), strict=True):
        means.update({"x": v}, w)
    found = means.compute()["x"].item()
    if weights.sum() == 0:
        assert np.isnan(found)
    else:
        assert found == pytest.approx(np.average(values.numpy(), weights=weights.numpy()), rel=1e-9, abs=1e-6)


def test_a_row_of_weight_zero_counts_nowhere_even_if_it_is_nan() -> None:
    means = WeightedMeans(["x"])
    means.update({"x": torch.tensor([1.0, float("nan")])}, torch.tensor([1.0, 0.0]))
    assert means.compute()["x"].item() == 1.0


def test_the_sum_of_two_states_is_the_mean_over_two_ranks() -> None:
    first, second = WeightedMeans(["x"]), WeightedMeans(["x"])
    first.update({"x": torch.tensor([1.0, 2.0, 3.0])}, torch.ones(3))
    second.update({"x": torch.tensor([10.0])}, torch.ones(1))
    first.sums += second.sums
    first.weights += second.weights
    assert first.compute()["x"].item() == 4.0
