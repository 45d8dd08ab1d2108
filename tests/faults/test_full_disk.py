"""A full disk costs no checkpoint that was whole, and is told in one paragraph; limits of the kernel stand for the disk."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from spiky import Regression, batches, fit
from torch import Tensor
from typing_extensions import override

from lightning_pref.advice import advice_of
from lightning_pref.callbacks import FaultAdvice
from lightning_pref.checkpoints import check_whole, newest_whole

RUN = """
import resource, sys
import torch
from lightning.pytorch.callbacks import Callback
from lightning_pref.recipes import sft

class FullDisk(Callback):
    def __init__(self, at: int, size: int) -> None:
        self.at, self.size = at, size

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        if batch_idx == self.at:
            # No file may grow beyond it; Python has the signal ignored, so that writing fails as it does on a full disk.
            resource.setrlimit(resource.RLIMIT_FSIZE, (self.size, resource.RLIM_INFINITY))

torch.set_num_threads(1)
sft.main(sys.argv[1:])
"""


def run(folder: Path, *args: str) -> subprocess.CompletedProcess[str]:
    script = folder / "run.py"
    script.write_text(RUN, encoding="utf-8")
    common = [
        "--run.name=full",
        f"--data.cache_dir={folder / 'cache'}",
        "--trainer.accelerator=cpu",
        "--trainer.max_steps=12",
        "--trainer.log_every_n_steps=1",
        "--model.optimizer.warmup=2",
        "--data.playground.num_rows=400",
        "--data.playground.num_val_rows=20",
        "--run.export=false",
    ]
    command = [sys.executable, str(script), *common, *args]
    return subprocess.run(command, check=False, cwd=folder, capture_output=True, text=True, timeout=300)


def full(at: int, size: int) -> list[str]:
    name = "--trainer.callbacks"
    return [
        f"{name}+=lightning_pref.callbacks.FaultAdvice",
        f"{name}+=__main__.FullDisk",
        f"{name}.at={at}",
        f"{name}.size={size}",
    ]


def error_of(done: subprocess.CompletedProcess[str]) -> str:
    assert done.returncode == 2, done.stderr[-3000:]
    assert "Traceback" not in done.stderr
    (said,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    return said


@pytest.mark.slow
def test_C7_a_checkpoint_that_finds_no_room_leaves_the_former_one_whole(tmp_path: Path) -> None:
    text = error_of(run(tmp_path, "--checkpoint.every_n_updates=4", *full(6, 1_000_000)))
    checkpoints = tmp_path / "runs" / "sft" / "full" / "checkpoints"
    assert re.search(r"The checkpoint \S+step=8\.ckpt could not be written: .*File too large", text)
    assert re.search(r"\d+\.\d MiB are free", text)
    assert re.search(r"The former checkpoint \S+step=4\.ckpt is whole\. Free space", text)
    assert newest_whole(checkpoints) == (checkpoints / "step=4.ckpt", [])
    assert check_whole(checkpoints / "step=4.ckpt").step == 4
    assert sorted(path.name for path in checkpoints.iterdir()) == ["step=4.ckpt", "step=4.ckpt.json"]


@pytest.mark.slow
def test_metrics_and_events_that_find_no_room_end_the_run_in_one_paragraph(tmp_path: Path) -> None:
    text = error_of(run(tmp_path, *full(2, 1_000)))
    assert "The run folder runs/sft/full could not be written to (File too large)" in text
    assert "MiB are free there" in text
    assert "No checkpoint was written yet" in text
    assert "`--run.resume auto`" in text


class WritesToAFullDevice(Regression):
    """What the kernel answers on a full disk, at once; wrapped as Lightning wraps it where TensorBoard's events are meant."""

    def __init__(self, *, wrapped: bool) -> None:
        super().__init__()
        self.wrapped = wrapped

    @override
    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        try:
            with Path("/dev/full").open("w", encoding="utf-8") as file:
                file.write("metrics")
        except OSError as error:
            if self.wrapped:
                raise ValueError("you tried to log 1.0 which is currently not supported.") from error
            raise
        return super().training_step(batch, batch_idx)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs the kernel's full device")
@pytest.mark.parametrize("wrapped", [False, True])
def test_somebodys_module_gets_the_advice_below_the_error(wrapped: bool, tmp_path: Path) -> None:
    with pytest.raises(ValueError if wrapped else OSError) as raised:
        fit(tmp_path, WritesToAFullDevice(wrapped=wrapped), [FaultAdvice()], batches(2))
    text = advice_of(raised.value)
    assert text is not None
    assert text.startswith(f"The run folder {tmp_path} could not be written to (No space left on device); ")
    assert "`--run.root`" in text
