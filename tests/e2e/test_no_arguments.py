"""The embedded run with nothing said: what a newcomer does first."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

import lightning_pref
from lightning_pref.cli import RunResult
from lightning_pref.recipes import dpo

ROOT = Path(lightning_pref.__file__).parents[1]


def run_alone(recipe: str, folder: Path, *args: str) -> subprocess.CompletedProcess[str]:
    """A recipe as a newcomer calls it: in an empty folder, with an empty cache, offline."""
    environment = {
        **os.environ,
        "XDG_CACHE_HOME": str(folder / "cache"),
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
    }
    environment.pop("LIGHTNING_PREF_RUN_NAME", None)
    command = [sys.executable, "-m", f"lightning_pref.recipes.{recipe}", *args]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    assert "Traceback" not in done.stderr
    return done


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_dpo_without_arguments_raises_the_margin_and_the_gold_reward(tmp_path: Path) -> None:
    run = run_alone("dpo", tmp_path)
    assert {entry.name for entry in tmp_path.iterdir()} == {"cache", "runs"}
    (folder,) = (tmp_path / "runs" / "dpo").iterdir()
    metrics = json.loads((folder / "summary.json").read_text())["metrics"]
    assert metrics["gold_reward"]["last"] - metrics["gold_reward"]["first"] >= 0.05
    assert metrics["rewards/margins"]["last"] - metrics["rewards/margins"]["first"] >= 0.5

    events = EventAccumulator(str(folder))
    events.Reload()
    assert {"gold_reward", "rewards/margins", "val/rewards/margins"} <= set(events.Tags()["scalars"])
    prompt = AutoTokenizer.from_pretrained(folder / "export")("Hello", return_tensors="pt")
    assert AutoModelForCausalLM.from_pretrained(folder / "export")(prompt["input_ids"]).logits.isfinite().all()

    last_table = run.stdout[run.stdout.rindex("dpo: ") :]
    for shown in (
        "gold_reward",
        "rewards/margins",
        f"runs/dpo/{folder.name}/export",
        f"tensorboard --logdir runs/dpo/{folder.name}",
    ):
        assert shown in last_table
    assert "Traceback" not in run.stderr
    assert "Warning" not in run.stderr


SMALL = [
    "--data.cache_dir=cache",
    "--data.playground.num_rows=64",
    "--data.playground.num_val_rows=16",
    "--data.batch_size=8",
    "--trainer.max_steps=4",
    "--trainer.log_every_n_steps=1",
    "--trainer.val_check_interval=4",
    "--model.optimizer.warmup=1",
]


def summary_of(run: RunResult) -> dict[str, Any]:
    summary: dict[str, Any] = json.loads((run.folder / "summary.json").read_text())
    return summary


@pytest.fixture(scope="module")
def folder_with_a_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A few steps of DPO after the whole first stage, in `runs/dpo/start`."""
    folder = tmp_path_factory.mktemp("user")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        dpo.main(["--run.name=start", *SMALL])
    return folder


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_the_same_seed_gives_the_same_metrics_and_weights(folder_with_a_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder_with_a_run)
    model = "--model.model=runs/sft/for-dpo-start/export"
    first, second = (summary_of(dpo.main([f"--run.name={name}", *SMALL, model])) for name in ("first", "second"))
    for summary in (first, second):
        summary["metrics"] = {key: value for key, value in summary["metrics"].items() if not key.startswith("throughput/")}
    assert first["metrics"] == second["metrics"]
    assert first["digests"] == second["digests"]
    assert "gold_reward" in first["metrics"]


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_resumed_run_does_not_repeat_its_first_stage(folder_with_a_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder_with_a_run)
    stage = Path("runs/sft/for-dpo-start/summary.json")
    written = stage.stat().st_mtime_ns
    resumed = dpo.main(["--run.name=start", *SMALL, "--run.resume=auto"])
    assert summary_of(resumed)["steps"] == 4
    assert stage.stat().st_mtime_ns == written


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_reward_without_arguments_learns_what_the_gold_reward_prefers(tmp_path: Path) -> None:

    def run(*args: str) -> Path:
        run_alone("reward", tmp_path, *args)
        (folder,) = (tmp_path / args[0].partition("=")[2] if args else tmp_path / "runs").glob("reward/*")
        return folder

    folder = run()
    metrics = json.loads((folder / "summary.json").read_text())["metrics"]
    probe = "probe/policy/reward_variance"
    assert metrics["val/rewards/accuracies"]["last"] >= 0.65
    assert metrics[f"{probe}/accuracy"]["last"] - metrics[f"{probe}/accuracy"]["first"] >= 0.1
    assert abs(metrics[f"{probe}/length_correlation"]["last"]) < 0.3
    assert metrics["val/rewards/calibration_error"]["last"] < 0.15

    model = AutoModelForSequenceClassification.from_pretrained(folder / "export")
    tokenizer = AutoTokenizer.from_pretrained(folder / "export")
    prompt = [
        {"role": "user", "content": "Hello, I am Anna. Please book a table for four at 7 pm. No nuts. A few words will do."}
    ]
    answers = ["Gladly, Anna. A table for four is set at 7 pm. Try the ramen.", "What now? A table for six at 9 pm."]
    texts = [tokenizer.apply_chat_template([*prompt, {"role": "assistant", "content": a}], tokenize=False) for a in answers]
    rows = tokenizer(texts, padding=True, return_tensors="pt", add_special_tokens=False, return_token_type_ids=False)
    good, bad = model(**rows).logits[:, 0].tolist()
    assert good > bad

    # The same start, and labels of a judge that takes many words for effort.
    start = next((tmp_path / "runs" / "sft").glob("*/export"))
    config = ROOT / "lightning_pref" / "recipes" / "configs" / "reward_playground.yaml"
    flawed = run("--run.root=flawed", f"--config={config}", f"--model.model={start}", "--data.playground.flaw=length")
    biased = json.loads((flawed / "summary.json").read_text())
    for key in (f"{probe}/length_correlation", "val/rewards/length_correlation"):
        assert biased["metrics"][key]["last"] > 0.25
        assert biased["metrics"][key]["last"] - metrics[key]["last"] > 0.4
    assert '"reward_variance/pays_length"' in (flawed / "alerts.jsonl").read_text()


@pytest.mark.slow
@pytest.mark.timeout(1100)
def test_rlhf_without_arguments_raises_the_gold_reward_from_a_reward_model_it_trained(tmp_path: Path) -> None:
    done = run_alone("rlhf", tmp_path)
    assert {entry.name for entry in (tmp_path / "runs").iterdir()} == {"sft", "reward", "rlhf"}
    (folder,) = (tmp_path / "runs" / "rlhf").iterdir()
    metrics = json.loads((folder / "summary.json").read_text())["metrics"]
    # Nine tenths of what the same rollouts attain on the gold reward itself, 0.92 by `benchmarks/rlhf_ceiling.py`.
    assert metrics["gold_reward"]["last"] >= 0.83
    assert metrics["gold_reward"]["last"] - metrics["gold_reward"]["first"] >= 0.15
    assert metrics["reward_model/accuracy"]["last"] >= 0.85
    # A policy that runs away from its start to please the reward model has tens of nats.
    assert metrics["kl"]["last"] < 5
    assert "reward_variance/within_prompt" in metrics
    last_table = done.stdout[done.stdout.rindex("rlhf: ") :]
    for shown in ("gold_reward", "reward_model/accuracy", "kl", f"runs/rlhf/{folder.name}/export"):
        assert shown in last_table
    prompt = AutoTokenizer.from_pretrained(folder / "export")("Hello", return_tensors="pt")
    assert AutoModelForCausalLM.from_pretrained(folder / "export")(prompt["input_ids"]).logits.isfinite().all()
