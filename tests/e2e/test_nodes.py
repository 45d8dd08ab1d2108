"""A run over two machines, each played by processes of this one: torchrun's agents, and the tasks of a SLURM job."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, NoReturn

import pytest
from gloo_ranks import free_port
from jsonargparse import Namespace
from launched_runs import check_same_as_alone, prepare, run_alone, shared, start

from lightning_pref.recipes import dpo
from lightning_pref.recipes.playground import earlier_stage
from lightning_pref.run_folder import run_name, warn_of_restarts

LAUNCHERS = ("RANK", "LOCAL_RANK", "NODE_RANK", "WORLD_SIZE", "SLURM_NTASKS", "SLURM_JOB_NAME", "LIGHTNING_PREF_RUN_NAME")
TORCHRUN = ("TORCHELASTIC_MAX_RESTARTS", "TORCHELASTIC_USE_AGENT_STORE")
TWO_NODES = ["--trainer.accelerator=cpu", "--trainer.strategy=ddp", "--trainer.devices=1", "--trainer.num_nodes=2"]


class Alone(NamedTuple):
    folder: Path
    flags: list[str]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Alone:
    """One process with all rows."""
    folder = tmp_path_factory.mktemp("nodes")
    flags = prepare(folder)
    run_alone(flags, folder)
    return Alone(folder, flags)


@pytest.fixture
def launched_by(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """The environment of a process that nothing has started."""
    for name in (*LAUNCHERS, *TORCHRUN):
        monkeypatch.setenv(name, "")  # what a test sets is taken back at its end, also where nothing stood before
        monkeypatch.delenv(name)
    return monkeypatch


def run_all(commands: Sequence[Sequence[str]], folder: Path, environments: Sequence[Mapping[str, str]]) -> list[str]:
    """Start all of them, wait for all, and want no error of any."""
    processes = [start(command, folder, environment) for command, environment in zip(commands, environments, strict=True)]
    ended = [(process.communicate(timeout=200)[0], process.returncode) for process in processes]
    for said, code in ended:
        assert code == 0, said[-4000:]
    return [said for said, _ in ended]


def slurm_task(task: int, port: int) -> dict[str, str]:
    """What srun tells a task, of a job of two machines with a task each."""
    return {
        "SLURM_JOB_ID": "4711",
        "SLURM_JOB_NAME": "train",
        "SLURM_NNODES": "2",
        "SLURM_NTASKS": "2",
        "SLURM_NTASKS_PER_NODE": "1",
        "SLURM_NODEID": str(task),
        "SLURM_PROCID": str(task),
        "SLURM_LOCALID": "0",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_N2_two_machines_under_torchrun_do_what_one_process_does(alone: Alone) -> None:
    rendezvous = ["--rdzv-backend=c10d", f"--rdzv-endpoint=127.0.0.1:{free_port()}", "--rdzv-id=nodes"]
    torchrun = ["-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=1", *rendezvous]
    flags = shared(alone.flags, alone.folder, "torchrun", 2)
    said = run_all([[*torchrun, "-m", "lightning_pref.recipes.dpo", *flags, *TWO_NODES]] * 2, alone.folder, [{}] * 2)
    check_same_as_alone(alone.folder, "torchrun", 2)
    assert "".join(said).count("run folder   ") == 1, "one of them says where everything lies"


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_N2_two_tasks_of_slurm_do_what_one_process_does(alone: Alone) -> None:
    flags, port = shared(alone.flags, alone.folder, "slurm", 2), free_port()
    command = ["-m", "lightning_pref.recipes.dpo", *flags, *TWO_NODES]
    said = run_all([command] * 2, alone.folder, [slurm_task(task, port) for task in range(2)])
    check_same_as_alone(alone.folder, "slurm", 2)
    assert "".join(said).count("run folder   ") == 1


def test_tasks_of_slurm_need_a_name_for_the_run_and_an_interactive_shell_does_not(
    launched_by: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    launched_by.setenv("SLURM_NTASKS", "4")
    launched_by.setenv("SLURM_JOB_NAME", "train")
    with pytest.raises(ValueError, match=r"This run has 4 processes .*\(torchrun, SLURM\).* `--run\.name my-run`"):
        run_name(None, tmp_path)
    assert run_name("mine", tmp_path) == "mine"
    launched_by.setenv("SLURM_JOB_NAME", "bash")
    assert run_name(None, tmp_path).replace("-", "").isdigit()


def test_restarts_that_would_fail_are_warned_of_once(launched_by: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    for restarts, shares_store, rank, warns in [("3", "True", "0", True), ("0", "True", "0", False), ("3", "False", "0", False)]:
        for name, value in zip((*TORCHRUN, "RANK"), (restarts, shares_store, rank), strict=True):
            launched_by.setenv(name, value)
        caplog.clear()
        warn_of_restarts()
        assert ("TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1" in caplog.text) == warns
    launched_by.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    launched_by.setenv("RANK", "1")
    caplog.clear()
    warn_of_restarts()
    assert not caplog.text, "the first process has said it"


def test_many_processes_are_told_to_leave_the_first_stage_to_one(
    tmp_path: Path, launched_by: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    launched_by.setenv("RANK", "1")
    launched_by.setenv("WORLD_SIZE", "2")
    with pytest.raises(SystemExit):
        dpo.main([f"--run.root={tmp_path}", "--run.name=here", "--trainer.accelerator=cpu"])
    said = capsys.readouterr().err
    assert "the work of one process, and this run was started as 2. Run `python -m lightning_pref.recipes.dpo` once" in said
    assert "`--model.model` is `sft/<run>/export`" in said
    assert not (tmp_path / "sft").exists()


def test_a_process_for_a_further_device_takes_the_first_stage_as_the_first_left_it(
    tmp_path: Path, launched_by: pytest.MonkeyPatch
) -> None:
    def trained_again(args: list[str]) -> NoReturn:
        raise AssertionError(args)

    for name, value in {"LOCAL_RANK": "1", "NODE_RANK": "0", "WORLD_SIZE": "2"}.items():
        launched_by.setenv(name, value)
    config = Namespace(run=Namespace(root=str(tmp_path), resume=None), seed_everything=0)
    model = earlier_stage(trained_again, "sft", config, tmp_path / "dpo" / "mine", [])
    assert model == str(tmp_path / "sft" / "for-dpo-mine" / "export")
