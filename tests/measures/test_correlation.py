from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_pref.measures.correlation import average_ranks, pearson, rank_correlation

values = st.lists(st.integers(-3, 3), min_size=2, max_size=10)


@settings(deadline=None, max_examples=40)
@given(values)
def test_tied_values_share_their_mean_rank(values: list[int]) -> None:
    expected = [sum(b < a for b in values) + (sum(b == a for b in values) - 1) / 2 for a in values]
    assert average_ranks(torch.tensor(values, dtype=torch.float64)).tolist() == expected


@settings(deadline=None, max_examples=40)
@given(values, st.integers(0, 1000))
def test_spearman_is_numpys_pearson_of_the_ranks(values: list[int], seed: int) -> None:
    other = np.random.default_rng(seed).permutation(values)
    ranks = [[sum(b < a for b in x) + (sum(b == a for b in x) - 1) / 2 for a in x] for x in (values, other.tolist())]
    found = rank_correlation(torch.tensor(values), torch.tensor(other)).item()
    if len(set(values)) == 1:
        assert math.isnan(found)
    else:
        assert found == pytest.approx(np.corrcoef(*ranks)[0, 1])


def test_a_constant_series_has_no_correlation_and_what_is_not_finite_is_left_out() -> None:
    assert pearson(torch.ones(4), torch.arange(4.0)).isnan()
    assert rank_correlation(torch.zeros(3), torch.arange(3.0)).isnan()
    assert rank_correlation(torch.tensor([1.0, math.nan]), torch.arange(2.0)).isnan()
    assert rank_correlation(torch.tensor([1.0, math.nan, 2.0, 4.0]), torch.tensor([5.0, 0.0, 6.0, 7.0])) == 1.0
