"""DeepSpeed's ZeRO on two CPU processes: what is not refused is exact. Needs the package and a compiler."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest
from launched_runs import check_same_as_alone, prepare, run_alone, shared, start

pytestmark = [
    pytest.mark.slow,
    # The first time DeepSpeed builds an operation.
    pytest.mark.timeout(600),
    pytest.mark.skipif(find_spec("deepspeed") is None, reason="DeepSpeed is not installed"),
]

ON_CPU = {"DS_ACCELERATOR": "cpu"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One process with all rows."""
    folder = tmp_path_factory.mktemp("deepspeed")
    run_alone(prepare(folder), folder)
    return folder


def flags(folder: Path, name: str, stage: int) -> list[str]:
    strategy = f'{{"class_path": "deepspeed_on_cpu.DeepSpeedOnCPU", "init_args": {{"stage": {stage}}}}}'
    place = ["--trainer.accelerator=cpu", "--trainer.devices=2", f"--trainer.strategy={strategy}"]
    return [*shared(prepare(folder), folder, name, 2), *place]


@pytest.mark.parametrize("stage", [1, 2])
def test_N2_two_processes_of_zero_do_what_one_process_does(folder: Path, stage: int) -> None:
    name = f"stage-{stage}"
    run = start(["-m", "lightning_pref.recipes.dpo", *flags(folder, name, stage)], folder, ON_CPU)
    said, _ = run.communicate(timeout=500)
    assert run.returncode == 0, said[-4000:]
    check_same_as_alone(folder, name, 2)


def test_N7_accumulation_that_would_not_be_exact_ends_in_one_paragraph(folder: Path) -> None:
    asked = [*flags(folder, "refused", 2), "--trainer.accumulate_grad_batches=2"]
    run = start(["-m", "lightning_pref.recipes.dpo", *asked], folder, ON_CPU)
    said, _ = run.communicate(timeout=500)
    assert run.returncode != 0
    assert "under DeepSpeed accumulation is not exact" in said
    assert "Traceback" not in said
