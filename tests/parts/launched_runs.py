"""A small run of the command line that several processes can share, and what of it must be there exactly once."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from rollouts import speaker
from torch import Tensor
from typing_extensions import override

import lightning_pref
from lightning_pref.data.playground_tokenizer import playground_tokenizer
from lightning_pref.recipes import dpo

ROOT = Path(lightning_pref.__file__).parents[1]
NUM_ROWS = 8
UPDATES = 3


class KeepWeights(Callback):
    """Writes the weights that each process ends with.

    Args:
        folder: Where to.
    """

    def __init__(self, folder: str) -> None:
        self.folder = Path(folder)

    @override
    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        weights = {name: parameter.detach().clone() for name, parameter in pl_module.named_parameters()}
        torch.save(weights, self.folder / f"{trainer.global_rank}.pt")


class DieOnce(Callback):
    """Kills the process of one rank before an update, the first time that it gets there.

    Args:
        folder: Where it is noted.
        rank: Whose process.
        update: Which.
    """

    def __init__(self, folder: str, rank: int, update: int) -> None:
        self.note = Path(folder) / "died"
        self.rank = rank
        self.update = update

    @override
    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int) -> None:
        if (trainer.global_rank, trainer.global_step) == (self.rank, self.update) and not self.note.exists():
            self.note.touch()
            os.kill(os.getpid(), signal.SIGKILL)


def die_once(folder: Path, name: str) -> list[str]:
    """The flags by which the second process of a run dies before its last update."""
    (folder / name).mkdir()
    settings = {"folder": folder / name, "rank": 1, "update": UPDATES - 1}
    return [
        "--trainer.callbacks+=launched_runs.DieOnce",
        *(f"--trainer.callbacks.{setting}={value}" for setting, value in settings.items()),
    ]


def prepare(folder: Path) -> list[str]:
    """A model, pairs, and the flags of a DPO run in which every update sees all rows, however many processes share them."""
    speaker().save_pretrained(folder / "model")
    playground_tokenizer().save_pretrained(folder / "model")
    rows = [
        {"prompt": f"Say {i}{' please' * (i % 4)}.", "chosen": f"It is {i}." + "!" * (i % 3), "rejected": "No" + "." * (i % 5)}
        for i in range(NUM_ROWS)
    ]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return [
        f"--model.model={folder / 'model'}",
        f"--data.train={folder / 'pairs.jsonl'}",
        f"--data.cache_dir={folder / 'cache'}",
        "--data.val_size=0",
        f"--trainer.max_epochs={UPDATES}",
        "--trainer.log_every_n_steps=1",
        # A large eps keeps Adam near the gradient; else a rounding error in a gradient of nearly 0 would decide a whole step.
        "--model.optimizer.eps=0.1",
        "--model.optimizer.learning_rate=0.1",
        "--model.optimizer.warmup=1",
        "--model.beta=1.0",
        f"--run.root={folder / 'runs'}",
    ]


def shared(flags: Sequence[str], folder: Path, name: str, processes: int) -> list[str]:
    """The flags of a run that so many processes share."""
    (folder / f"weights-{name}").mkdir()
    return [
        *flags,
        f"--run.name={name}",
        f"--data.batch_size={NUM_ROWS // processes}",
        "--trainer.callbacks+=launched_runs.KeepWeights",
        f"--trainer.callbacks.folder={folder / f'weights-{name}'}",
    ]


def run_alone(flags: Sequence[str], folder: Path) -> None:
    """The same in this process, without others."""
    dpo.main([*shared(flags, folder, "alone", 1), "--trainer.accelerator=cpu"])


def start(command: Sequence[str], folder: Path, environment: Mapping[str, str]) -> subprocess.Popen[str]:
    """A process as a user starts it, in a folder of its own."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "LIGHTNING_PREF_"))}
    paths = [str(ROOT), str(ROOT / "tests" / "parts"), os.environ.get("PYTHONPATH", "")]
    return subprocess.Popen(
        [sys.executable, *command],
        cwd=folder,
        env={**clean, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def weights(folder: Path, name: str) -> list[dict[str, Tensor]]:
    """The weights that each process of a run ended with, in the order of their ranks."""
    files = sorted((folder / f"weights-{name}").iterdir())
    return [torch.load(file, weights_only=True) for file in files]


def check_same_as_alone(folder: Path, name: str, processes: int, *, starts: int = 1) -> None:
    """All processes ended with the weights of the one that had all rows, and wrote its run folder once.

    Args:
        folder: That everything is in.
        name: Of the run.
        processes: That it had.
        starts: How often it was begun or gone on with.
    """
    (expected,) = weights(folder, "alone")
    found = weights(folder, name)
    assert len(found) == processes
    begun = speaker().state_dict()
    moved = 0.0
    for key, value in expected.items():
        for other in found:
            assert torch.equal(other[key], found[0][key]), key
        assert torch.allclose(found[0][key], value, rtol=1e-4, atol=1e-6), key
        begin = begun.get(key.removeprefix("policy."))
        moved = max(moved, 0.0 if begin is None else float((value - begin).abs().max()))
    assert moved > 1e-3, "there was something to compare"

    run, alone = (folder / "runs" / "dpo" / each for each in (name, "alone"))
    assert len(list(run.glob("events.out.tfevents.*"))) == starts
    assert {path.name for path in (run / "checkpoints").iterdir()} == {path.name for path in (alone / "checkpoints").iterdir()}
    assert {path.name for path in (run / "export").iterdir()} == {path.name for path in (alone / "export").iterdir()}
    assert json.loads((run / "summary.json").read_text())["steps"] == UPDATES
    ours, theirs = (logged(each / "metrics.csv") for each in (run, alone))
    assert [step for step, _ in ours] == [step for step, _ in theirs] == list(range(1, UPDATES + 1))
    for (_, mine), (_, other) in zip(ours, theirs, strict=True):
        assert abs(mine - other) < 1e-5


def logged(path: Path) -> list[tuple[int, float]]:
    """Update and loss of every logged row."""
    with path.open(newline="") as file:
        return [(int(row["step"]), float(row["loss"])) for row in csv.DictReader(file) if row.get("loss")]
