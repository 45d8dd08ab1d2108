"""`kill -9` at random moments, as often as it takes: what is left at the end has the bits of a run that nobody disturbed."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import NamedTuple

import pytest
from gloo_ranks import free_port
from rollouts import speaker, write_prompts
from tallies import KILLS

from lightning_pref.checkpoints import checkpoints_of
from lightning_pref.commands.differences import first_difference, metrics_difference, whole_state
from lightning_pref.data.playground_tokenizer import playground_tokenizer

# Everything is imported once, in a process that is forked for each start: a start then costs a second instead of ten.
STARTER = multiprocessing.get_context("forkserver")
STARTER.set_forkserver_preload([f"lightning_pref.recipes.{name}" for name in ("sft", "reward", "dpo", "rlhf")])


COMMON = (
    "--trainer.accelerator=cpu",
    "--trainer.max_epochs=3",
    "--trainer.log_every_n_steps=2",
    "--model.optimizer.schedule=cosine",
    "--model.optimizer.warmup=2",
    "--model.optimizer.learning_rate=1e-2",
    "--checkpoint.every_n_updates=2",
    "--run.name=run",
    "--run.resume=auto",
)
PAIRS = ("--data.batch_size=3", "--data.val_size=4", "--trainer.val_check_interval=2")
FLAGS: Mapping[str, Sequence[str]] = {
    "sft": ("--data.columns.prompt=prompt", "--data.columns.completion=chosen", *PAIRS),
    "reward": (*PAIRS, "--trainer.accumulate_grad_batches=2"),
    "dpo": (*PAIRS, "--model.ema.mixing=0.5", "--model.ema.every_n_updates=3"),
    "rlhf": (
        "--data.reward=rollouts:count_of_letters",
        "--data.num_prompts=4",
        "--data.num_samples=3",
        "--data.num_minibatches=2",
        "--data.inner_epochs=2",
        "--data.sampling.max_new_tokens=6",
        "--model.kl.target=1.0",
        "--model.kl.coefficient=0.1",
    ),
}


class Case(NamedTuple):
    """What is run, and on how many processes."""

    recipe: str
    ranks: int = 1

    def __str__(self) -> str:
        return self.recipe if self.ranks == 1 else f"{self.recipe}-{self.ranks}-ranks"


CASES = (Case("sft"), Case("reward"), Case("dpo"), Case("rlhf"), Case("dpo", 2))


def child(recipe: str, flags: Sequence[str], environment: Mapping[str, str], log: str) -> None:
    """One process of one start."""
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    sys.stdout = sys.stderr = os.fdopen(output, "w", buffering=1)
    os.environ.update(environment)
    import torch

    torch.set_num_threads(1)
    sys.argv = [f"lightning_pref/recipes/{recipe}.py", *flags]
    import_module(f"lightning_pref.recipes.{recipe}").main()


class Bench:
    """A model, data and a folder for the runs of one case."""

    def __init__(self, folder: Path, case: Case) -> None:
        self.folder, self.case = folder, case
        folder.mkdir()
        self.model = folder / "model"
        speaker().save_pretrained(self.model)
        playground_tokenizer().save_pretrained(self.model)
        if case.recipe == "rlhf":
            self.data = write_prompts(folder, 8)
        else:
            self.data = folder / "pairs.jsonl"
            rows = [
                {
                    "prompt": f"Say {i}{' please' * (i % 4)}.",
                    "chosen": f"It is {i}." + "!" * (i % 3),
                    "rejected": "No" + "." * (i % 5),
                }
                for i in range(22)
            ]
            self.data.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def run_folder(self, root: str) -> Path:
        return self.folder / root / self.case.recipe / "run"

    def start(self, root: str) -> list[BaseProcess]:
        """Start all processes of a run."""
        flags = [*COMMON, *FLAGS[self.case.recipe], f"--model.model={self.model}", f"--data.train={self.data}"]
        flags += [f"--run.root={self.folder / root}"]
        if self.case.recipe != "rlhf":
            flags += [f"--data.cache_dir={self.folder / root / 'cache'}"]
        port = free_port()
        started = []
        for rank in range(self.case.ranks):
            environment = {}
            if self.case.ranks > 1:
                flags += ["--trainer.strategy=ddp", f"--trainer.devices={self.case.ranks}"] * (rank == 0)
                environment = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port), "LOCAL_RANK": str(rank), "NODE_RANK": "0"}
            log = str(self.folder / f"{root}-{rank}.log")
            process = STARTER.Process(target=child, args=(self.case.recipe, tuple(flags), environment, log))
            process.start()
            started.append(process)
        return started

    def said(self, root: str) -> str:
        return "\n".join(path.read_text()[-3000:] for path in sorted(self.folder.glob(f"{root}-*.log")))


def ended(processes: Sequence[BaseProcess], within: float) -> bool:
    """Whether all of them ended within so many seconds."""
    until = time.monotonic() + within
    for process in processes:
        process.join(max(0.0, until - time.monotonic()))
    return all(process.exitcode is not None for process in processes)


def kill(processes: Sequence[BaseProcess], chance: random.Random) -> None:
    """Kill all of them, in any order, as a machine that goes down does."""
    for process in chance.sample(list(processes), len(processes)):
        assert process.pid is not None
        if process.is_alive():
            os.kill(process.pid, signal.SIGKILL)
    for process in processes:
        process.join()


def killed_until_done(bench: Bench, root: str, seconds: float, kills: int, chance: random.Random) -> tuple[int, int]:
    """Start a run again and again; kills of it, and how many of them fell on a run that had a checkpoint."""
    killed = late = 0
    while True:
        processes = bench.start(root)
        patience = chance.uniform(0.0, 1.1 * seconds) if killed < kills else 60.0
        if ended(processes, patience):
            codes = [process.exitcode for process in processes]
            assert not any(codes), f"{bench.case} ended with {codes} after {killed} kills:\n{bench.said(root)}"
            return killed, late
        assert killed < kills, f"{bench.case} hangs after {killed} kills:\n{bench.said(root)}"
        late += bool(checkpoints_of(bench.run_folder(root) / "checkpoints"))
        kill(processes, chance)
        killed += 1


def check(folder: Path, case: Case, kills: int, seed: int) -> str:
    """Run a case whole, then killed so many times, over as many runs as that takes; a line for the tally."""
    bench, chance = Bench(folder, case), random.Random(seed)
    # The first start pays for starting the starter, and for caches that are not the run's.
    for root in ("warm-up", "whole"):
        began = time.monotonic()
        processes = bench.start(root)
        assert ended(processes, 120.0), f"{case} hangs without any kill:\n{bench.said(root)}"
        seconds = time.monotonic() - began
        assert not any(process.exitcode for process in processes), bench.said(root)
    whole = bench.run_folder("whole")
    last = checkpoints_of(whole / "checkpoints")[0]
    expected = whole_state(last)
    killed = late = runs = 0
    while killed < kills:
        runs += 1
        root = f"killed-{runs}"
        more, more_late = killed_until_done(bench, root, seconds, kills - killed, chance)
        killed, late = killed + more, late + more_late
        run = bench.run_folder(root)
        newest = checkpoints_of(run / "checkpoints")[0]
        assert newest.name == last.name
        assert first_difference(expected, whole_state(newest)) is None, f"{case}, after {more} kills of one run"
        assert metrics_difference(whole, run) is None, f"{case}, after {more} kills of one run"
        alerts = [path.read_text() if (path := each / "alerts.jsonl").exists() else "" for each in (whole, run)]
        assert alerts[0] == alerts[1]
        assert not list(run.rglob("*.part")), "nothing half written is left"
    return f"{case!s:14} {killed:3} kills, {late:3} of them after a checkpoint, over {runs} runs: all bits equal"


Note = Callable[[str, object], None]


@pytest.mark.timeout(300)
@pytest.mark.parametrize(("recipe", "kills"), [("sft", 2), ("reward", 2), ("dpo", 3), ("rlhf", 3)])
def test_C1_ten_kills_leave_no_trace(tmp_path: Path, record_property: Note, recipe: str, kills: int) -> None:
    record_property(KILLS, check(tmp_path / "bench", Case(recipe), kills, seed=1))


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_C1_a_hundred_kills_leave_no_trace(tmp_path: Path, case: Case, record_property: Note) -> None:
    record_property(KILLS, check(tmp_path / "bench", case, 20, seed=2))
