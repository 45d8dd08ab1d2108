"""The miniature of over-optimised reward models comes out as its text says."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).parents[2] / "examples" / "overoptimization.py"


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 3, 4])
def test_a_single_reward_model_is_optimised_past_its_peak_and_mistrustful_ensembles_keep_their_gain(
    tmp_path: Path, seed: int
) -> None:
    figure = tmp_path / "figure.png"
    results = runpy.run_path(str(EXAMPLE))["main"](["--out", str(figure), "--seed", str(seed)])
    # Better than chance, and as bad as a quarter of wrong labels lets expect.
    assert 0.6 < results["accuracy"] < 0.85
    for form in ("bon", "rl"):
        single, mean, wco, uwo = (results[form][name] for name in ("single", "mean", "wco", "uwo"))
        for found in (single, mean, wco, uwo):
            # All begin at the initial policy, where the gold reward is 0, and gain at first; each proxy ends at its highest.
            assert found["distance"][0] == pytest.approx(0.0, abs=1e-3)
            assert abs(found["gold"][0]) < 0.02
            assert found["peak"] > 0.1
            assert found["proxy"][-1] > max(found["proxy"]) - 0.05
            assert found["distance"][-1] > 1.5
        assert single["past_peak"] and mean["past_peak"]
        assert 0 < single["peak_distance"] < single["distance"][-1]
        assert single["end"] + 0.05 < mean["end"] < max(wco["end"], uwo["end"]) - 0.2
        assert single["peak"] < mean["peak"] < min(wco["peak"], uwo["peak"])
        # What is left of the gain: less than half against more than half.
        assert single["end"] < single["peak"] / 2 and mean["end"] < mean["peak"] / 2
        assert wco["end"] > wco["peak"] / 2 and uwo["end"] > uwo["peak"] / 2
    # Without a KL penalty the policy that trusts a single model ends up worth less than it was.
    assert results["rl"]["single"]["end"] < -0.1
    assert figure.stat().st_size > 10_000
