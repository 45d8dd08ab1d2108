"""The rlhf recipe: on a model and rewards of one's own, its presets, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from lightning_pref.cli import CONFIGS, RunResult
from lightning_pref.recipes import rlhf
from lightning_pref.recipes.rlhf import ACCURACY, PRESETS, stage_results, with_preset

NAMES = sorted(path.stem for path in PRESETS.glob("*.yaml"))
OWN = [
    "--data.reward=rewarding:length",
    "--data.num_prompts=8",
    "--data.num_samples=2",
    "--data.sampling.max_new_tokens=4",
    "--trainer.accelerator=cpu",
    "--trainer.log_every_n_steps=1",
]


def run(bench: Any, *more: str) -> RunResult:
    """A few updates on the prompts of the bench, with a reward that lies in the folder of the user."""
    (bench.folder / "rewarding.py").write_text("def length(prompt, response):\n    return float(len(response))\n")
    given = [f"--run.root={bench.runs}", f"--model.model={bench.model}", f"--data.train={bench.pairs}", *OWN, *more]
    return rlhf.main(given)


def test_a_run_of_ones_own_leaves_a_plain_model_and_a_summary(
    bench: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(bench.folder)
    result = run(bench)
    summary = json.loads((result.folder / "summary.json").read_text())
    assert summary["recipe"] == "rlhf"
    assert summary["steps"] == 3
    assert set(summary["digests"]) == {"data", "weights"}
    assert {"reward/mean", "kl", "entropy", "response/length", "reward_variance/within_prompt"} <= set(summary["metrics"])
    assert "gold_reward" not in summary["metrics"]
    assert result.export is not None and (result.export / "config.json").exists()
    assert "reward/mean" in capsys.readouterr().out


@pytest.mark.parametrize("name", NAMES)
def test_every_preset_trains(bench: Any, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(bench.folder)
    result = run(bench, f"--preset={name}", "--trainer.max_steps=2")
    expected = yaml.safe_load((PRESETS / f"{name}.yaml").read_text())
    config = yaml.safe_load((result.folder / "config.yaml").read_text())
    assert config["model"]["algorithm"] == expected["model"]["algorithm"]
    assert json.loads((result.folder / "summary.json").read_text())["steps"] == 2


@pytest.mark.parametrize("name", NAMES)
def test_a_preset_holds_a_method_and_no_settings_of_the_playground(name: str) -> None:
    held = yaml.safe_load((PRESETS / f"{name}.yaml").read_text())
    assert set(held) <= {"model", "data"}
    assert "optimizer" not in held["model"]


@pytest.mark.parametrize("name", NAMES)
def test_every_preset_goes_with_the_playgrounds_defaults(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as raised:
        rlhf.main([f"--preset={name}", "--print_config"])
    assert raised.value.code == 0
    config = yaml.safe_load(capsys.readouterr().out)
    defaults = yaml.safe_load((CONFIGS / "rlhf_playground.yaml").read_text())
    assert config["data"]["gold"] == defaults["data"]["gold"] == "playground:gold"
    assert config["model"]["optimizer"]["learning_rate"] == defaults["model"]["optimizer"]["learning_rate"]
    from lightning_pref.modules.rlhf_settings import KLSettings, SurrogateSettings, resolve

    kl = KLSettings(**config["model"]["kl"])
    assert resolve(config["model"]["algorithm"], SurrogateSettings(), kl).kl_coefficient >= 0


def test_settings_of_the_playground_do_not_leak_into_a_run_of_ones_own(bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(bench.folder)
    config = yaml.safe_load((run(bench, "--trainer.max_steps=1").folder / "config.yaml").read_text())
    assert config["model"]["optimizer"]["learning_rate"] <= 1e-5
    assert config["model"]["kl"]["coefficient"] is None
    assert config["data"]["gold"] is None


def test_a_preset_is_a_configuration_file_before_all_flags() -> None:
    assert with_preset(["--a=1", "--preset", "ppo", "--b"]) == [f"--config={PRESETS / 'ppo'}.yaml", "--a=1", "--b"]
    assert with_preset(["--preset=rloo"]) == [f"--config={PRESETS / 'rloo'}.yaml"]
    with pytest.raises(SystemExit, match="Unknown preset 'pppo'; known: dapo, dr_grpo, "):
        with_preset(["--preset", "pppo"])


def test_help_tells_the_presets(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as raised:
        rlhf.main(["--help"])
    assert raised.value.code == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert f"--preset NAME Set an algorithm up as it was published; all other flags win. Known: {', '.join(NAMES)}." in shown


def test_a_bound_without_effect_is_refused_before_the_first_stage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit):
        rlhf.main(["--model.surrogate.clip_low=0.1"])
    assert "`surrogate.clip_low` bounds how far the policy may move" in capsys.readouterr().err
    assert not (tmp_path / "runs" / "sft").exists()


def test_a_run_without_a_reward_says_how_to_get_one(bench: Any) -> None:
    with pytest.raises(SystemExit, match="error: `reward` is not set: give the folder of a reward model"):
        run(bench, "--data.reward=null")


def test_the_accuracy_of_a_reward_model_is_repeated_where_its_run_is_known(tmp_path: Path) -> None:
    assert stage_results("playground:gold") == []
    assert stage_results(["a", "b"]) == []
    assert stage_results(str(tmp_path / "export")) == []
    metrics = {"val/rewards/accuracies": {"first": 0.5, "last": 0.75}}
    (tmp_path / "summary.json").write_text(json.dumps({"metrics": metrics}))
    (callback,) = stage_results(str(tmp_path / "export"))
    assert callback.results == {ACCURACY: 0.75}  # type: ignore[attr-defined]
