from __future__ import annotations

import json
import runpy
from pathlib import Path
from typing import Any

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"


def run_example(name: str, folder: Path, *options: str) -> dict[str, Any]:
    found: dict[str, Any] = runpy.run_path(str(EXAMPLES / f"{name}.py"))["main"](["--out", str(folder), *options])
    return found


def alerts(folder: Path) -> set[str]:
    return {json.loads(line)["name"] for line in (folder / "alerts.jsonl").read_text().splitlines()}


def test_a_classifier_is_guarded_and_its_old_task_watched(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = run_example("attach_own_classifier", tmp_path)
    # Batches 45 and 105 are broken; updates count from 1.
    assert [event["update"] for event in found["spikes"]] == [46, 106]
    assert found["spikes"][0]["action"] == "skip"
    assert found["values"]["stability_gap/old/depth"] > 1.0
    assert {"spike/seen", "stability_gap/no_recovery"} <= alerts(tmp_path)
    assert f"tensorboard --logdir {tmp_path}" in capsys.readouterr().out
    assert list(tmp_path.glob("events.out.tfevents.*"))


def test_one_line_and_no_edit_tell_the_same_of_ones_own_dpo(tmp_path: Path) -> None:
    found = run_example("attach_own_dpo", tmp_path)
    assert found["one_line"] == found["unedited"]
    assert found["one_line"]["displacement/chosen_logp_change"] < -1.0
    assert found["one_line"]["displacement/margin_change"] > 1.0
    assert "displacement/chosen_falls" in alerts(tmp_path / "one_line") == alerts(tmp_path / "unedited")


def test_the_monitors_run_on_trl(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("trl")
    monkeypatch.setenv("CI", "1")  # keeps TRL from reporting its use
    found = run_example("attach_trl", tmp_path, "--steps", "12")
    assert found["dpo"]["displacement/left_out"] == 0.0
    assert found["dpo"]["spike/phi"] == 1.0
    assert found["reward"]["reward_variance/within_prompt"] > 0.0
    assert len(list(tmp_path.glob("*/runs/*/events.out.tfevents.*"))) == 2
