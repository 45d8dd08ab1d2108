"""Curves of gold reward over distance: forms, fits, peaks and the growth of disagreement."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from lightning_pref.measures.overoptimization import (
    Form,
    GaoFit,
    best_of_n,
    best_of_n_curve,
    ensemble_growth,
    fit_gao,
    kl_of_best_of_n,
    past_peak,
)

DISTANCES = np.linspace(0.0, 3.0, 13)


def by_hand(form: Form, alpha: float, beta: float, d: float) -> float:
    if d == 0:
        return 0.0
    return d * (alpha - beta * (d if form == "bon" else math.log(d)))


@pytest.mark.parametrize("n", [1, 2, 7, 100])
def test_the_kl_of_best_of_n_is_that_of_its_ranks(n: int) -> None:
    # The percentile u of the best of n has the density n u^(n-1); KL to the uniform one by the midpoint rule.
    u = (np.arange(400_000) + 0.5) / 400_000
    density = n * u ** (n - 1)
    expected = np.mean(density * np.log(np.maximum(density, 1e-300)))
    assert kl_of_best_of_n(n) == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("form", ["bon", "rl"])
def test_a_fit_recovers_the_coefficients_of_its_own_form_and_the_optimum_is_the_highest_point(form: Form) -> None:
    alpha, beta = 1.3, 0.6
    gains = torch.tensor([by_hand(form, alpha, beta, d) for d in DISTANCES], dtype=torch.float64)
    fit = fit_gao(torch.tensor(DISTANCES), gains, form)
    assert (fit.alpha, fit.beta) == pytest.approx((alpha, beta), rel=1e-9)
    assert torch.allclose(fit.reward(torch.tensor(DISTANCES)), gains, atol=1e-12, rtol=0)
    grid = np.linspace(1e-4, 6.0, 60_001)
    values = [by_hand(form, alpha, beta, d) for d in grid]
    assert fit.optimum() == pytest.approx((grid[int(np.argmax(values))], max(values)), abs=2e-4)


@pytest.mark.parametrize("form", ["bon", "rl"])
def test_a_fit_of_noisy_points_is_the_least_squares_one(form: Form) -> None:
    d = DISTANCES[1:]
    gains = np.array([by_hand(form, 1.0, 0.4, x) for x in d]) + 0.1 * np.random.default_rng(0).normal(size=len(d))
    a, b = d, -d * (d if form == "bon" else np.log(d))
    expected = np.linalg.solve([[a @ a, a @ b], [a @ b, b @ b]], [a @ gains, b @ gains])
    fit = fit_gao(torch.tensor(d), torch.tensor(gains), form)
    assert (fit.alpha, fit.beta) == pytest.approx(tuple(expected), rel=1e-8)


def test_a_curve_that_never_turns_has_no_optimum_and_one_that_only_falls_has_it_at_the_start() -> None:
    assert GaoFit("bon", 1.0, 0.0).optimum() == GaoFit("rl", 1.0, -0.1).optimum() == (math.inf, math.inf)
    assert GaoFit("bon", -1.0, 0.5).optimum() == (0.0, 0.0)


def test_a_curve_is_best_of_n_at_each_n() -> None:
    proxy, gold = torch.tensor([3.0, 1.0, 2.0, 5.0]), torch.tensor([1.0, 0.0, 4.0, -1.0])
    assert best_of_n_curve(proxy, gold, [1, 3, 4]).tolist() == [best_of_n(proxy, gold, n).item() for n in (1, 3, 4)]


RISING = torch.arange(8.0)


@pytest.mark.parametrize(
    ("proxy", "gold", "expected"),
    [
        (RISING, torch.tensor([0.0, 1, 2, 3, 3, 2, 1, 0]), True),
        (RISING, RISING, False),
        (RISING, torch.tensor([0.0, 1, 2, 3, 3, 3, 2.9, 2.9]), False),  # within the tolerance
        (torch.tensor([0.0, 1, 2, 3, 3, 2, 1, 0]), torch.tensor([0.0, 1, 2, 3, 3, 2, 1, 0]), False),  # both fall: no proxy gaming
        (RISING, torch.tensor([0.0, 0, 0, 9, 0, 0, 0, 0]), True),
        (RISING[:2], torch.tensor([5.0, 0.0]), False),  # too few to smooth
    ],
)
def test_a_peak_is_passed_where_gold_falls_and_the_proxy_rises(proxy: torch.Tensor, gold: torch.Tensor, expected: bool) -> None:
    assert past_peak(proxy, gold, tolerance=0.5) is expected


def test_disagreement_grows_relative_to_the_start_and_not_from_none() -> None:
    assert ensemble_growth(torch.tensor([3.0, 6.0]), torch.tensor([1.0, 2.0])).item() == 3.0
    assert ensemble_growth(torch.tensor([3.0]), torch.tensor([0.0])).isnan()


def test_mistakes_are_named() -> None:
    two = torch.tensor([1.0, 2.0])
    with pytest.raises(ValueError, match="`n` must be at least 1 sample, got 0"):
        kl_of_best_of_n(0)
    with pytest.raises(ValueError, match=r"`distance` and `gain` are both \[M\], got \[2\] and \[1\]"):
        fit_gao(two, two[:1], "bon")
    with pytest.raises(ValueError, match="needs two different distances above 0"):
        fit_gao(torch.tensor([0.0, 1.0]), two, "bon")
    with pytest.raises(ValueError, match="must be finite, and `distance` not negative"):
        fit_gao(torch.tensor([-1.0, 1.0, 2.0]), torch.ones(3), "rl")
    with pytest.raises(ValueError, match="`form` must be 'bon' or 'rl', got 'ppo'"):
        fit_gao(two, two, "ppo")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"`proxy` and `gold` are both \[M\], got \[2\] and \[1\]"):
        past_peak(two, two[:1], tolerance=0.0)
    with pytest.raises(ValueError, match="`tolerance` must not be negative and `window` at least 1, got -1.0 and 3"):
        past_peak(two, two, tolerance=-1.0)
