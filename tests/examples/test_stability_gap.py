"""The miniature shows what it says it shows."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

EXAMPLE = Path(__file__).parents[2] / "examples" / "stability_gap.py"


def test_replay_makes_the_gap_shallower_and_without_it_nothing_comes_back(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("matplotlib")
    monkeypatch.chdir(tmp_path)
    found = runpy.run_path(str(EXAMPLE))["main"](["--seeds", "2", "--out", str(tmp_path / "gap.png")])
    alone, replay, slow = found["new data only"], found["replay"], found["replay and warm-up"]
    for way in found.values():
        assert way["before"] > 0.95
        assert way["new_task"] > 0.95, "the second task is learned in every way"
        assert way["depth"] > 0.15
    assert replay["depth"] < alone["depth"]
    assert slow["depth"] < replay["depth"]
    assert alone["recovery_step"] is None
    assert replay["recovery_step"] > replay["worst_step"]
    assert slow["worst_step"] > replay["worst_step"]
    # Who looks at the end only sees a tenth of the dip.
    assert replay["before"] - replay["end"] < 0.1 * replay["depth"]
    assert (tmp_path / "gap.png").stat().st_size > 10_000
    printed = capsys.readouterr().out
    assert "never" in printed
    assert "WARNING stability_gap/no_recovery since step 300" in printed
    assert "stability_gap/expensive" not in printed
    assert [path.name for path in tmp_path.iterdir()] == ["gap.png"], "nothing else is left behind"
