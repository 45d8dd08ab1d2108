from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_pref.measures.overoptimization import best_of_n

# Few levels, so that ties are common.
REWARDS = st.lists(st.tuples(st.integers(0, 4), st.floats(-10, 10)), min_size=1, max_size=8)


def by_enumeration(proxy: list[float], gold: list[float], n: int) -> float:
    """Oracle: the mean over all subsets of n samples of the mean gold reward of those with the highest proxy reward."""
    found = []
    for subset in combinations(range(len(proxy)), n):
        highest = max(proxy[i] for i in subset)
        found.append(np.mean([gold[i] for i in subset if proxy[i] == highest]))
    return float(np.mean(found))


@given(REWARDS)
def test_the_estimate_is_the_mean_over_all_subsets(samples: list[tuple[int, float]]) -> None:
    proxy, gold = [float(p) for p, _ in samples], [g for _, g in samples]
    for n in range(1, len(samples) + 1):
        found = best_of_n(torch.tensor(proxy, dtype=torch.float64), torch.tensor(gold, dtype=torch.float64), n)
        assert found.item() == pytest.approx(by_enumeration(proxy, gold, n), rel=1e-9, abs=1e-9)


def test_one_sample_is_the_mean_and_all_samples_are_the_best() -> None:
    generator = torch.Generator().manual_seed(0)
    proxy, gold = torch.randn(100, generator=generator), torch.randn(100, generator=generator)
    assert best_of_n(proxy, gold, 1).item() == pytest.approx(gold.mean().item(), rel=1e-5)
    assert best_of_n(proxy, gold, 100) == gold[proxy.argmax()]
    assert best_of_n(proxy, gold, 7).dtype == torch.float32


def test_a_proxy_rises_with_n_and_does_not_care_about_the_order_of_the_samples() -> None:
    generator = torch.Generator().manual_seed(0)
    proxy = torch.randn(200, generator=generator, dtype=torch.float64)
    values = [best_of_n(proxy, proxy, n).item() for n in (1, 2, 4, 8, 64, 200)]
    assert values == sorted(values)
    order = torch.randperm(200, generator=generator)
    assert best_of_n(proxy[order], proxy[order] ** 2, 5).item() == pytest.approx(best_of_n(proxy, proxy**2, 5).item())


@pytest.mark.parametrize("n", [1, 2, 1000, 12_000, 12_600])
def test_many_samples_lose_no_digits(n: int) -> None:
    # With the ranks 1 ... N as rewards the best of n is n (N + 1) / (n + 1) on average.
    ranks = torch.arange(1, 12_601, dtype=torch.float64)
    assert best_of_n(ranks, ranks, n).item() == pytest.approx(n * 12_601 / (n + 1), rel=1e-10)


def test_a_reward_that_is_not_a_number_is_not_passed_over() -> None:
    good, bad = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([1.0, float("nan"), 3.0])
    assert best_of_n(bad, good, 2).isnan()
    assert best_of_n(good, bad, 2).isnan()


def test_mistakes_are_named() -> None:
    rewards = torch.zeros(3)
    with pytest.raises(ValueError, match=r"`n` must be in 1 ... 3, the number of scored samples, got 4"):
        best_of_n(rewards, rewards, 4)
    with pytest.raises(ValueError, match=r"rewards of the same samples, \[N\], got \[3\] and \[3, 1\]"):
        best_of_n(rewards, rewards[:, None], 1)
