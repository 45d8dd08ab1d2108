"""Two processes go on exactly: from the places of their own loaders, after a signal to one of them, with weights in shares."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import lightning as L
import pytest
import torch
from gloo_ranks import launched
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.pytorch.callbacks import Callback
from placed_loaders import RowLoader
from resumed_runs import dpo, pair_data, sft
from rollouts import MOVING, speaker
from shared_runs import FlatStrategy, complaint, weights
from torch import Tensor, nn
from torch.distributed.fsdp import FullOptimStateDictConfig, FullStateDictConfig, OptimStateKeyType, StateDictType
from torch.distributed.fsdp import FullyShardedDataParallel as Flat
from typing_extensions import override

from lightning_pref.callbacks import ExactResume
from lightning_pref.checkpoints import check_whole, checkpoints_of
from lightning_pref.commands.differences import first_difference
from lightning_pref.modules.dpo import DPOModule
from lightning_pref.modules.sft import SFTModule

# The launch happens in the set-up of whichever test comes first.
pytestmark = [pytest.mark.slow, pytest.mark.timeout(240)]

NUM_BATCHES = 4
JOB = "4711"
Kind = Literal["full", "sharded"]
KINDS: tuple[Kind, ...] = ("full", "sharded")


def everything(folder: Path, rank: int, _ranks: int) -> dict[str, Any]:
    """All that these processes do one after the other, since starting them takes longer than most of it."""
    return {
        "loaders": read_apart(folder / "loaders", rank),
        "SIGTERM": told(folder / "told", rank),
        "SIGUSR1": told_by_slurm(folder / "slurm", rank),
        **{kind: split(folder / kind, rank, kind) for kind in KINDS},
        "refused": refusal(folder / "refused", rank),
    }


def trainer_of(*callbacks: Callback, **settings: Any) -> L.Trainer:
    return L.Trainer(
        accelerator="cpu",
        devices=2,
        logger=False,
        callbacks=list(callbacks),
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        **{"strategy": "ddp", "max_epochs": 2, **settings},
    )


def keeper(folder: Path) -> ExactResume:
    return ExactResume(str(folder), every_n_updates=1, keep_last=-1)


def place(folder: Path, step: int) -> str:
    return str(folder / f"step={step}.ckpt")


class Reader(L.LightningModule):
    """Keeps the rows that each update of this process was made of; its schedule asks how long the run is, as many do."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Linear(1, 1)
        self.read: dict[int, list[float]] = {}

    @override
    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        self.read[self.global_step] = batch.flatten().tolist()
        loss: Tensor = self.body(batch).square().mean()
        return loss

    @override
    def configure_optimizers(self) -> Any:  # Any: Lightning's own type
        optimizer = torch.optim.AdamW(self.parameters(), lr=0.01)
        schedule = torch.optim.lr_scheduler.LinearLR(optimizer, total_iters=int(self.trainer.estimated_stepping_batches))
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]


def read_apart(folder: Path, rank: int) -> dict[str, Any]:
    """Loaders whose processes stand at other rows: a whole run, and runs from all of its checkpoints."""
    size = 2 + rank

    def run(checkpoints: Path, step: int = 0) -> dict[str, Any]:
        module, rows = Reader(), 100.0 * rank + torch.arange(float(NUM_BATCHES * size)).unsqueeze(1)
        resume: dict[str, Any] = {"ckpt_path": place(folder / "whole", step), "weights_only": True} if step else {}
        trainer_of(keeper(checkpoints)).fit(module, RowLoader(rows, size), **resume)
        return {"read": module.read, "weights": module.state_dict()}

    whole = run(folder / "whole")
    return {"whole": whole, "parts": {step: run(folder / f"from-{step}", step) for step in range(1, 2 * NUM_BATCHES)}}


class Tells(Callback):
    """Sends one process a signal in the middle of an update."""

    def __init__(self, number: int, rank: int) -> None:
        self.number, self.rank = number, rank

    @override
    def on_before_backward(self, trainer: L.Trainer, pl_module: L.LightningModule, loss: Tensor) -> None:
        if (trainer.global_rank, trainer.global_step) == (self.rank, 1):
            os.kill(os.getpid(), self.number)


def code_of(trainer: L.Trainer, module: L.LightningModule, *data: Any) -> Any:
    """What a process leaves a run with."""
    try:
        trainer.fit(module, *data)
    except SystemExit as left:
        return left.code
    return "did not leave"


def told(folder: Path, rank: int) -> dict[str, Any]:
    """A run of which the second process alone is told to end, what becomes of it, and the same run when nobody is told."""
    (own := folder / f"{rank}").mkdir(parents=True)
    module, data, _ = dpo(own)
    code = code_of(trainer_of(Tells(signal.SIGTERM, rank=1), keeper(folder / "parts")), module, data)
    left_at = checkpoints_of(folder / "parts")[0].name
    torch.distributed.barrier()  # the next part of the run adds checkpoints
    resumed, data, _ = dpo(own)
    trainer_of(keeper(folder / "parts")).fit(resumed, data, ckpt_path=place(folder / "parts", 2), weights_only=True)
    whole, data, _ = dpo(own)
    trainer_of(keeper(folder / "whole")).fit(whole, data)
    return {"code": code, "left at": left_at, "whole": whole.state_dict(), "parts": resumed.state_dict()}


def told_by_slurm(folder: Path, rank: int) -> dict[str, Any]:
    """A job of two tasks of which the second alone gets the signal that asks for requeueing, with a `scontrol` that writes."""
    folder.mkdir(exist_ok=True)
    task = {"JOB_ID": JOB, "JOB_NAME": "train", "NTASKS": 2, "NTASKS_PER_NODE": 2, "NODEID": 0, "PROCID": rank, "LOCALID": rank}
    own = {"PATH": f"{folder}:{os.environ['PATH']}", **{f"SLURM_{name}": str(value) for name, value in task.items()}}
    if rank == 0:
        (folder / "scontrol").write_text(f'#!/bin/sh\necho "$@" >> {folder}/asked\n')
        (folder / "scontrol").chmod(0o755)
    former = {name: os.environ.get(name) for name in own}
    os.environ.update(own)
    try:
        trainer = trainer_of(Tells(signal.SIGUSR1, rank=1), keeper(folder / "checkpoints"), plugins=[SLURMEnvironment()])
        return {"code": code_of(trainer, Reader(), RowLoader(torch.ones(8, 1), 2))}
    finally:
        for name, value in former.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})


class OnCPU(FlatStrategy):
    """Asks torch for whole states without moving them to the CPU, where they are: it takes the move for a copy.

    Weights would be freed while they are written, and of the moments of a parameter all would be the last one.
    """

    @contextmanager
    def whole(self) -> Iterator[Flat]:
        assert isinstance(self.model, Flat)
        stays = FullStateDictConfig(offload_to_cpu=False, rank0_only=True)
        moments_stay = FullOptimStateDictConfig(offload_to_cpu=False, rank0_only=True)
        with Flat.state_dict_type(self.model, StateDictType.FULL_STATE_DICT, stays, moments_stay):
            yield self.model

    @override
    def lightning_module_state_dict(self) -> dict[str, Any]:  # Any: Lightning's own type
        if self._state_dict_type == "sharded":
            return super().lightning_module_state_dict()
        with self.whole() as model:
            return model.state_dict()

    @override
    def optimizer_state(self, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
        if self._state_dict_type == "sharded":
            return super().optimizer_state(optimizer)
        with self.whole() as model:
            state = Flat.optim_state_dict(model, getattr(optimizer, "optimizer", optimizer))
            return Flat.rekey_optim_state_dict(state, OptimStateKeyType.PARAM_ID, model) if self.is_global_zero else state


def split(folder: Path, rank: int, kind: Kind) -> dict[str, Any]:
    """Weights that FSDP splits, in a checkpoint of one file or of parts: a whole run, and runs from two of its checkpoints."""
    (own := folder / f"{rank}").mkdir(parents=True)

    def run(name: str, step: int = 0) -> dict[str, Any]:
        strategy = OnCPU(state_dict_type=kind)
        trainer = trainer_of(keeper(folder / name), strategy=strategy, gradient_clip_val=0.5, accumulate_grad_batches=2)
        module, data = parts(kind, own)
        resume: dict[str, Any] = {"ckpt_path": place(folder / "whole", step), "weights_only": True} if step else {}
        trainer.fit(module, data, **resume)
        moments = [state for _, state in sorted(trainer.optimizers[0].state_dict()["state"].items())]
        return {"weights": weights(trainer, module), "moments": moments, "steps": trainer.global_step}

    return {"whole": run("whole"), "parts": {step: run(f"from-{step}", step) for step in (1, 3)}}


def parts(kind: Kind, folder: Path) -> tuple[L.LightningModule, L.LightningDataModule]:
    """A module and its data; torch reads a checkpoint in parts only where all is tensors, and a reference adds a digest."""
    if kind == "full":
        return DPOModule(speaker(), optimizer=MOVING), pair_data(folder, batch_size=2)
    return SFTModule(speaker(), optimizer=MOVING), sft(folder)[1]


def refusal(folder: Path, rank: int) -> str:
    """What is said where a checkpoint could not be read again."""
    (own := folder / f"{rank}").mkdir(parents=True)
    strategy = OnCPU(state_dict_type="sharded")
    module, data = parts("full", own)
    return complaint(lambda: trainer_of(keeper(folder / "checkpoints"), strategy=strategy).fit(module, data))


class Runs:
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.ranks = launched(everything, folder, 2)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(tmp_path_factory.mktemp("shares"))


def test_C1_every_process_goes_on_from_the_place_of_its_own_loader(runs: Runs) -> None:
    for rank, found in enumerate(runs.ranks):
        whole, parts = found["loaders"]["whole"], found["loaders"]["parts"]
        size = 2 + rank
        assert whole["read"][1] == [100.0 * rank + row for row in range(size, 2 * size)]
        for step, part in parts.items():
            assert part["read"] == {update: rows for update, rows in whole["read"].items() if update >= step}
            assert first_difference(whole["weights"], part["weights"]) is None, f"process {rank}, after update {step}"


def test_a_signal_to_one_process_saves_and_ends_all(runs: Runs) -> None:
    for found in runs.ranks:
        told = found["SIGTERM"]
        assert (told["code"], told["left at"]) == (128 + signal.SIGTERM, "step=2.ckpt")
        assert first_difference(told["whole"], told["parts"]) is None


def test_a_task_that_slurm_asks_to_requeue_requeues_the_job_once(runs: Runs) -> None:
    assert [found["SIGUSR1"]["code"] for found in runs.ranks] == [128 + signal.SIGUSR1] * 2
    assert (runs.folder / "slurm" / "asked").read_text().splitlines() == [f"requeue {JOB}"]
    assert checkpoints_of(runs.folder / "slurm" / "checkpoints")[0].name == "step=2.ckpt"


@pytest.mark.parametrize("kind", KINDS)
def test_C1_weights_that_fsdp_splits_resume_identically(runs: Runs, kind: str) -> None:
    checkpoint = Path(place(runs.folder / kind / "whole", 3))
    assert checkpoint.is_dir() == (kind == "sharded")
    assert check_whole(checkpoint).step == 3
    for rank, found in enumerate(runs.ranks):
        whole, parts = found[kind]["whole"], found[kind]["parts"]
        assert whole["steps"] >= 4 and float(whole["moments"][0]["exp_avg"].abs().sum()) > 0
        for step, part in parts.items():
            assert first_difference(whole, part) is None, f"process {rank}, after update {step}"


def test_a_checkpoint_in_parts_that_could_not_be_read_is_refused_before_the_first_update(runs: Runs) -> None:
    for found in runs.ranks:
        assert "FSDP is to write checkpoints in parts (`state_dict_type: sharded`)" in found["refused"]
        assert "of DPOModule adds something else. Set `state_dict_type: full`, or use FSDP2" in found["refused"]
    assert not (runs.folder / "refused" / "checkpoints").exists()
