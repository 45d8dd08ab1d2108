"""The command that shows, on a configuration of one's own, that an interrupted run is the uninterrupted one."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import pytest
import torch
import yaml
from rollouts import speaker

from lightning_pref.__main__ import main
from lightning_pref.commands.differences import first_difference, metrics_difference, whole_state
from lightning_pref.data.playground_tokenizer import playground_tokenizer


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A configuration of one's own, in a folder of one's own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[1] / "parts"))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    speaker().save_pretrained("model")
    playground_tokenizer().save_pretrained("model")
    rows = [{"prompt": f"Say {i}.", "chosen": f"It is {i}.", "rejected": "No." + "." * (i % 3)} for i in range(12)]
    Path("pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = {
        "model": {"model": "model", "optimizer": {"learning_rate": 1e-2, "warmup": 1}},
        "data": {"train": "pairs.jsonl", "batch_size": 2, "val_size": 2, "cache_dir": "cache"},
        "trainer": {"accelerator": "cpu", "max_epochs": 3},
    }
    Path("my.yaml").write_text(yaml.safe_dump(settings))
    return Path("my.yaml")


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_C1_it_says_identical(config: Path, capfd: pytest.CaptureFixture[str]) -> None:
    main(["verify-resume", "--recipe", "dpo", "--updates", "2", "--config", str(config), "--", "--trainer.log_every_n_steps=1"])
    said = capfd.readouterr().out.splitlines()
    assert said[-1] == "identical"
    assert "dpo: the same, killed after 3 updates" in said


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("in_parts", [False, True], ids=["one-file", "parts"])
def test_C1_two_processes_that_split_the_weights_resume_identically(
    config: Path, capfd: pytest.CaptureFixture[str], in_parts: bool
) -> None:
    strategy = {
        "class_path": "lightning_pref.modules.splitting.FSDP2Strategy",
        "init_args": {"save_distributed_checkpoint": in_parts},
    }
    main(["verify-resume", "--recipe=dpo", "--updates=2", f"--config={config}", "--keep=kept", "--", "--trainer.devices=2",
          f"--trainer.strategy={json.dumps(strategy)}"])  # fmt: skip
    assert capfd.readouterr().out.splitlines()[-1] == "identical"
    assert Path("kept/dpo/whole/checkpoints/step=4.ckpt").is_dir() == in_parts


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_C1_it_names_the_first_tensor_that_differs(config: Path, capfd: pytest.CaptureFixture[str]) -> None:
    restless = '--trainer.callbacks+={"class_path": "restless.Restless"}'
    with pytest.raises(SystemExit) as left:
        main(["verify-resume", "--recipe=sft", "--updates=2", f"--config={config}", "--keep=kept", "--", restless,
              "--data.columns.prompt=prompt", "--data.columns.completion=chosen"])  # fmt: skip
    assert left.value.code == 2
    said = capfd.readouterr().err
    assert re.search(r"the first difference: /state_dict/policy\.\S+: \d+ of \d+ entries, first \S+ against \S+", said), said
    assert Path("kept/sft/whole/metrics.csv").exists()


def test_it_wants_to_know_the_recipe(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["verify-resume", "--config", str(config)])
    assert "Which recipe is meant? Give `--recipe sft|reward|dpo|rlhf`" in capsys.readouterr().err


def test_states_are_compared_bit_for_bit() -> None:
    def state(value: float) -> dict[str, object]:
        return {"w": torch.tensor([0.0, value]), "steps": [1, (2, "a")], "nan": math.nan, "throughput/rows": value}

    assert first_difference(state(0.5), state(0.5)) is None
    assert first_difference({"w": torch.tensor([0.0])}, {"w": torch.tensor([-0.0])}) is not None
    assert first_difference(state(0.5), state(0.25)) == "/w: 1 of 2 entries, first 0.5 against 0.25"
    assert first_difference({"a": 1}, {"a": 1.0}) == "/a: 1 against 1.0"
    assert first_difference({"a": 1}, {"b": 1}) == "/a, /b: in one of the two only"
    assert first_difference([1, 2], [1]) == ": 2 entries against 1"
    assert first_difference(torch.zeros(2), torch.zeros(2).double()) == ": torch.float32 [2] against torch.float64 [2]"


def test_metrics_are_compared_but_for_what_a_clock_decides(tmp_path: Path) -> None:
    for name, loss, speed in (("a", 1.5, 10), ("b", 1.5, 20), ("c", 2.5, 10)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "metrics.csv").write_text(f"step,loss,throughput/rows_per_second\n1,{loss},\n1,,{speed}\n")
    assert metrics_difference(tmp_path / "a", tmp_path / "b") is None
    assert metrics_difference(tmp_path / "a", tmp_path / "c") == "metrics.csv, row [0]/loss: '1.5' against '2.5'"


def test_a_folder_in_nobodys_format_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "checkpoint").mkdir()
    with pytest.raises(ValueError, match=r"checkpoint is a folder, .* \(it has no `\.metadata`; DeepSpeed writes such\)"):
        whole_state(tmp_path / "checkpoint")
