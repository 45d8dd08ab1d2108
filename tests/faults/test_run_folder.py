"""One run at a time writes into a run folder; the claim ends with the process that holds it, however that ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime, tzinfo
from pathlib import Path

import pytest
from typing_extensions import override

from lightning_pref import run_folder
from lightning_pref.run_folder import LOCK_FILE, RUN_NAME_VARIABLE, RunFolder, is_first_process, run_name

LAUNCHERS = ("RANK", "LOCAL_RANK", "NODE_RANK", "SLURM_PROCID", "WORLD_SIZE")

HOLDS = """
import os, sys, time
from pathlib import Path
from lightning_pref.run_folder import RunFolder
claim = RunFolder(Path(sys.argv[1]), resumes=True)
{then}
print("holds", flush=True)
time.sleep(60)
"""
# As a loader's worker that has not noticed yet that its parent is gone.
FORKS = """
child = os.fork()
if not child:
    os.close(1)
    time.sleep(60)
    os._exit(0)
print(child, flush=True)
"""


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in LAUNCHERS:
        monkeypatch.delenv(name, raising=False)


@contextmanager
def holder(folder: Path, then: str = "") -> Iterator[tuple[subprocess.Popen[str], list[str]]]:
    """Another process that holds the folder, and what it said before it did."""
    process = subprocess.Popen([sys.executable, "-c", HOLDS.format(then=then), str(folder)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    said = []
    while (line := process.stdout.readline().strip()) not in ("holds", ""):
        said.append(line)
    try:
        yield process, said
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def test_a_second_run_in_the_folder_is_refused_and_names_the_first(tmp_path: Path) -> None:
    claim = RunFolder(tmp_path / "run", resumes=False)
    with pytest.raises(ValueError, match="Another process is writing into the run folder") as raised:
        RunFolder(tmp_path / "run", resumes=True)
    text = str(raised.value)
    assert f"process {os.getpid()} on " in text
    assert "choose another `--run.name`" in text
    assert "\n" not in text
    claim.release()
    RunFolder(tmp_path / "run", resumes=True).release()


def test_the_lock_alone_is_a_start_and_a_checkpoint_is_more(tmp_path: Path) -> None:
    RunFolder(tmp_path, resumes=False).release()
    assert (tmp_path / LOCK_FILE).exists()
    RunFolder(tmp_path, resumes=False).release()
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(ValueError, match=r"is not empty.*--run\.resume auto"):
        RunFolder(tmp_path, resumes=False)
    RunFolder(tmp_path, resumes=True).release()  # the refused one has let go


@pytest.mark.parametrize(
    ("environment", "is_first"),
    [
        ({}, True),
        ({"LOCAL_RANK": "1"}, False),  # started by Lightning for the second device
        ({"RANK": "0", "LOCAL_RANK": "0", "SLURM_PROCID": "1"}, True),  # torchrun numbers machines as it likes
        ({"RANK": "8", "LOCAL_RANK": "0"}, False),  # torchrun, first of the second machine
        ({"NODE_RANK": "1"}, False),  # Lightning started by hand on the second machine
        ({"SLURM_PROCID": "3", "LOCAL_RANK": "0"}, False),
    ],
)
def test_only_the_first_process_of_a_run_claims(
    environment: dict[str, str], is_first: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert is_first_process() is is_first
    held = RunFolder(tmp_path / "run", resumes=False)
    assert (tmp_path / "run").is_dir()
    assert (tmp_path / "run" / LOCK_FILE).exists() is is_first
    held.release()


@pytest.fixture
def unnamed(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """A process in which no run has a name yet."""
    monkeypatch.setenv(RUN_NAME_VARIABLE, "")  # so that what is set below is taken back
    monkeypatch.delenv(RUN_NAME_VARIABLE)
    return monkeypatch


def test_a_run_name_is_digits_whatever_the_locale(unnamed: pytest.MonkeyPatch, tmp_path: Path) -> None:
    name = run_name(None, tmp_path)
    day, _, second = name.partition("-")
    assert (len(day), len(second)) == (8, 6)
    assert (day + second).isdecimal()
    assert run_name(None, tmp_path) == name  # whatever the clock does meanwhile


def test_runs_that_begin_in_the_same_second_have_a_folder_each(unnamed: pytest.MonkeyPatch, tmp_path: Path) -> None:
    class Noon(datetime):
        @classmethod
        @override
        def now(cls, tz: tzinfo | None = None) -> Noon:
            return cls(2026, 1, 2, 12)

    unnamed.setattr(run_folder, "datetime", Noon)
    names, claims = [], []
    for _ in range(3):
        unnamed.delenv(RUN_NAME_VARIABLE, raising=False)
        names.append(run_name(None, tmp_path / "runs"))
        claims.append(RunFolder(tmp_path / "runs" / names[-1], resumes=False))
    assert names == ["20260102-120000", "20260102-120000-2", "20260102-120000-3"]
    for claim in claims:
        claim.release()


@pytest.mark.slow
def test_the_claim_of_a_killed_process_is_gone_at_once(tmp_path: Path) -> None:
    with holder(tmp_path) as (process, _):
        with pytest.raises(ValueError, match=rf"process {process.pid} on .*since \d{{4}}-"):
            RunFolder(tmp_path, resumes=True)
        process.send_signal(signal.SIGKILL)
        process.wait()
        RunFolder(tmp_path, resumes=True).release()


@pytest.mark.slow
def test_a_forked_worker_does_not_keep_the_claim_of_its_killed_parent(tmp_path: Path) -> None:
    with holder(tmp_path, FORKS) as (process, (child,)):
        process.send_signal(signal.SIGKILL)
        process.wait()
        try:
            os.kill(int(child), 0)  # it lives
            claim = RunFolder(tmp_path, resumes=True)
            with pytest.raises(ValueError, match=f"process {os.getpid()} on "):
                RunFolder(tmp_path, resumes=True)
            claim.release()
        finally:
            os.kill(int(child), signal.SIGKILL)


@pytest.mark.slow
def test_a_forked_worker_that_ends_leaves_the_claim_with_its_parent(tmp_path: Path) -> None:
    ends = "child = os.fork()\nif not child:\n    os._exit(0)\nos.waitpid(child, 0)"
    with holder(tmp_path, ends), pytest.raises(ValueError, match="Another process is writing"):
        RunFolder(tmp_path, resumes=True)
