"""The miniature shows what it says: orderings only, over several seeds."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]

pytestmark = [
    pytest.mark.slow,
    # The example keeps checkpointing and bars off and uses Lightning's own settings otherwise.
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
]


@pytest.fixture(scope="module")
def example() -> ModuleType:
    spec = importlib.util.spec_from_file_location("likelihood_displacement", ROOT / "examples" / "likelihood_displacement.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("seed", range(5))
def test_a_similar_pair_displaces_the_preferred_token_and_a_dissimilar_one_does_not(example: ModuleType, seed: int) -> None:
    similar, dissimilar = (example.one_token(seed, similar=flag) for flag in (True, False))
    for curves in (similar, dissimilar):
        assert (curves.loss.diff() < 0).all()
        assert curves.probabilities.sum(-1).allclose(curves.probabilities.new_ones(()))
    p = similar.probabilities
    assert p[-1, example.NO] < 0.5 * p[0, example.NO]
    assert p[-1, example.YES] > 0.5 > p[0, example.YES]
    # It takes its time: after 20 updates the preferred token has not fallen yet.
    assert p[20, example.NO] >= p[0, example.NO]
    q = dissimilar.probabilities
    assert q[-1, example.NO] > q[0, example.NO] + 0.1
    assert q[-1, example.YES] < q[0, example.YES]


def test_displacement_falls_when_the_pairs_of_highest_ches_are_dropped(example: ModuleType, tmp_path: Path) -> None:
    found = example.main(["--out", str(tmp_path), "--seeds", "3"])
    assert Path(found["figure"]).stat().st_size > 10_000
    for run in found["tiny_model"]:
        assert min(run["scores"]["No over Never"]) > max(run["scores"]["No over Yes"]) + 2.0
        kept, everything, top = (run["runs"][name] for name in ("kept", "all", "top"))
        assert kept["change"] > 0.0
        assert kept["change"] > everything["change"] + 0.1
        assert everything["change"] > top["change"] + 0.1
        assert top["change"] < -1.0
        # Nothing pushes agreement down where every pair is a refusal over a refusal.
        assert kept["agreement"] < 0.02 < top["agreement"]
        assert not any(name.startswith("displacement/chosen_falls") for name in kept["alerts"])
        assert any(name.startswith("displacement/chosen_falls") for name in top["alerts"])
