"""One of two processes is killed in the middle of training: the other one stops, and the run goes on where it was."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from launched_runs import check_same_as_alone, die_once, prepare, run_alone, shared, start

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

# The lost connection is seen at once; the rest is for a busy machine, on which a process takes long to end.
MOST_SECONDS = 40
TWO = ["--trainer.accelerator=cpu", "--trainer.strategy=ddp", "--trainer.devices=2"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where one process has done all of it without interruption."""
    folder = tmp_path_factory.mktemp("ranks")
    run_alone(prepare(folder), folder)
    return folder


def dying(folder: Path, name: str) -> list[str]:
    """The flags of a run of two processes whose second one dies before its last update."""
    return [*shared(prepare(folder), folder, name, 2), *die_once(folder, name), *TWO, "--run.resume=auto"]


def test_the_other_process_stops_and_the_same_command_goes_on_to_the_same_weights(folder: Path) -> None:
    command = ["-m", "lightning_pref.recipes.dpo", *dying(folder, "devices")]
    interrupted = start(command, folder, {})
    said, _ = interrupted.communicate(timeout=200)
    seconds = time.time() - (folder / "devices" / "died").stat().st_mtime
    assert interrupted.returncode != 0
    assert seconds < MOST_SECONDS, said[-4000:]
    assert not (folder / "runs" / "dpo" / "devices" / "summary.json").exists()

    resumed = start(command, folder, {})
    said, _ = resumed.communicate(timeout=200)
    assert resumed.returncode == 0, said[-4000:]
    check_same_as_alone(folder, "devices", 2, starts=2)


def test_torchrun_starts_both_again_and_they_go_on_by_themselves(folder: Path) -> None:
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--max-restarts=1"]
    # Without it PyTorch lets the new processes look for the old ones (pytorch/pytorch#135712).
    environment = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    run = start([*torchrun, "-m", "lightning_pref.recipes.dpo", *dying(folder, "torchrun")], folder, environment)
    said, _ = run.communicate(timeout=200)
    assert run.returncode == 0, said[-4000:]
    assert "torchrun is to start the processes again" not in said
    assert (folder / "torchrun" / "died").exists()
    check_same_as_alone(folder, "torchrun", 2, starts=2)
