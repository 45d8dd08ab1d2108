"""Neither a clock that is set back nor the locale changes what a run computes, logs or writes."""

from __future__ import annotations

import csv
import hashlib
import json
import os
import subprocess
import sys
import time
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
from rollouts import speaker
from spiky import Regression, batches, fit, weights

from lightning_pref.callbacks import ExactResume, Throughput
from lightning_pref.callbacks.throughput import Work
from lightning_pref.checkpoints import checkpoints_of, newest_whole
from lightning_pref.data.playground_tokenizer import playground_tokenizer
from lightning_pref.recipes import dpo
from lightning_pref.run_folder import RunFolder

# Python then takes text and file names for ASCII wherever no encoding is given.
ASCII_ONLY = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONIOENCODING": ""}


def test_a_clock_that_runs_backwards_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    alone = Regression()
    fit(tmp_path / "alone", alone, [], batches(12))
    began, asked = time.time(), count()
    monkeypatch.setattr(time, "time", lambda: began - 3600.0 * next(asked))
    module = Regression()
    throughput = Throughput(lambda batch: Work(tokens=batch.numel(), rows=len(batch)))
    resume = ExactResume(str(tmp_path / "checkpoints"), every_n_updates=4, keep_last=-1)
    trainer = fit(tmp_path / "back", module, [throughput, resume], batches(12), enable_checkpointing=True, log_every_n_steps=3)
    assert next(asked) > 3, "nobody asked for the time of day"
    assert torch.equal(weights(module), weights(alone))
    assert trainer.callback_metrics["throughput/tokens_per_second"] > 0
    assert [path.name for path in checkpoints_of(tmp_path / "checkpoints")] == [f"step={n}.ckpt" for n in (12, 8, 4)]


def test_the_newest_checkpoint_is_that_of_most_updates_whatever_the_time_stamps_say(tmp_path: Path) -> None:
    resume = ExactResume(str(tmp_path / "checkpoints"), every_n_updates=4, keep_last=-1)
    fit(tmp_path, Regression(), [resume], batches(12), enable_checkpointing=True)
    for hours, path in enumerate((tmp_path / "checkpoints").glob("step=1*")):
        os.utime(path, (1e9 - 3600 * hours, 1e9 - 3600 * hours))
    newest, _ = newest_whole(tmp_path / "checkpoints")
    assert newest == tmp_path / "checkpoints" / "step=12.ckpt"


def test_a_run_name_that_the_locale_cannot_spell_is_refused_with_the_cure(tmp_path: Path) -> None:
    unspeakable = tmp_path / "l\udcc3\udca4ufe"  # as Python reads the bytes of "läufe" under LC_ALL=C
    with pytest.raises(ValueError, match=r"l\\udcc3\\udca4ufe has characters.*`LC_ALL=C\.UTF-8` or `PYTHONUTF8=1`"):
        RunFolder(unspeakable, resumes=False)
    assert list(tmp_path.iterdir()) == []


def flags(folder: Path, name: str) -> list[str]:
    return [
        f"--run.root={folder / 'runs'}",
        f"--run.name={name}",
        f"--model.model={folder / 'model'}",
        f"--data.train={folder / 'zeilen-ä.jsonl'}",
        f"--data.cache_dir={folder / f'cache-{name}'}",
        "--data.batch_size=4",
        "--data.val_size=0",
        "--model.optimizer.warmup=1",
        "--trainer.accelerator=cpu",
        "--trainer.max_steps=3",
        "--trainer.log_every_n_steps=1",
    ]


def outcome(run: Path) -> dict[str, Any]:
    """What a run leaves, speeds and its own name left out."""
    rows = list(csv.DictReader((run / "metrics.csv").read_text(encoding="utf-8").splitlines()))
    metrics = [{key: value for key, value in row.items() if not key.startswith("throughput/") and value} for row in rows]
    export = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in (run / "export").iterdir()}
    assert "\udcc3" not in (run / "config.yaml").read_text(encoding="utf-8")
    json.loads((run / "summary.json").read_text(encoding="utf-8"))
    return {"metrics": metrics, "export": export}


@pytest.mark.slow
def test_a_run_in_the_plain_locale_is_that_of_any_other_bit_for_bit(tmp_path: Path) -> None:
    speaker().save_pretrained(tmp_path / "model")
    playground_tokenizer().save_pretrained(tmp_path / "model")
    rows = [{"prompt": f"Wie heißt {i}? 中文", "chosen": f"Es heißt {i}.", "rejected": "Nö…"} for i in range(12)]
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    (tmp_path / "zeilen-ä.jsonl").write_text(lines, encoding="utf-8")
    dpo.main(flags(tmp_path, "here"))
    command = [sys.executable, "-m", "lightning_pref.recipes.dpo", *flags(tmp_path, "plain")]
    environment = {**os.environ, **ASCII_ONLY, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, check=False, cwd=tmp_path, env=environment, capture_output=True, timeout=300)
    assert done.returncode == 0, done.stderr.decode(errors="replace")[-3000:]
    assert b"run folder" in done.stdout
    done.stdout.decode("ascii")  # tables are drawn with what the terminal has
    assert outcome(tmp_path / "runs" / "dpo" / "plain") == outcome(tmp_path / "runs" / "dpo" / "here")
