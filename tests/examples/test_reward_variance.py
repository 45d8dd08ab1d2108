"""The miniature of equally accurate teachers comes out as its text says."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).parents[2] / "examples" / "reward_variance.py"


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1])
def test_the_flat_teacher_is_as_accurate_teaches_less_and_is_told_apart_at_once(tmp_path: Path, seed: int) -> None:
    figure = tmp_path / "figure.png"
    results = runpy.run_path(str(EXAMPLE))["main"](["--out", str(figure), "--updates", "150", "--seed", str(seed)])
    flat, spread, noisy = (results[name] for name in ("flat", "spread", "noisy"))
    assert flat["accuracy"] == spread["accuracy"] == 1.0
    assert flat["gold_at_start"] == spread["gold_at_start"]
    assert noisy["accuracy"] < 0.85
    flat_gain, spread_gain, noisy_gain = (found["gold_at_end"] - found["gold_at_start"] for found in (flat, spread, noisy))
    assert flat_gain < spread_gain / 3
    assert flat_gain < noisy_gain
    assert flat["whitened_at_start"] < 0.05 < spread["whitened_at_start"]
    assert results["flat_speed_bound"] < 0.5
    # Said within the first updates, while the policy is still where it began.
    assert flat["alerts"]["reward_variance/flat"] <= 5
    assert "reward_variance/flat" not in spread["alerts"]
    assert figure.stat().st_size > 10_000
