"""Held-out prompts on two processes: each is answered once, and the means are those of one process."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any, NamedTuple

import lightning as L
import pytest
import torch
import torch.multiprocessing as mp
from rollouts import STILL, rollout_data, speaker

from lightning_pref.modules.rlhf import RLHFModule
from lightning_pref.rollouts.validation import HeldOutSampling

pytestmark = pytest.mark.slow

RANKS = 2


class Job(NamedTuple):
    folder: Path
    port: int


def run(folder: Path, ranks: int) -> dict[str, float]:
    """Seven prompts in steps of three to a rank, so that a filler keeps one rank busy."""
    parallel: dict[str, Any] = {"devices": ranks, "strategy": "ddp"} if ranks > 1 else {"devices": 1}
    trainer = L.Trainer(
        accelerator="cpu",
        max_epochs=1,
        default_root_dir=folder,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **parallel,
    )
    data = rollout_data(
        folder,
        num_prompts=3,
        gold="rollouts:likes_vowels",
        val=str(folder / "val.jsonl"),
        val_sampling=HeldOutSampling(temperature=0.0),
    )
    trainer.fit(RLHFModule(speaker(), optimizer=STILL), data)
    return {name: value.item() for name, value in trainer.callback_metrics.items() if name.startswith("val/")}


def run_rank(rank: int, job: Job) -> None:
    place = {"MASTER_PORT": job.port, "WORLD_SIZE": RANKS, "LOCAL_RANK": rank, "RANK": rank, "NODE_RANK": 0}
    os.environ.update(MASTER_ADDR="127.0.0.1", **{name: str(value) for name, value in place.items()})
    torch.set_num_threads(1)
    torch.save(run(job.folder, RANKS), job.folder / f"{rank}.pt")


def test_ranks_answer_every_held_out_prompt_once_between_them(tmp_path: Path) -> None:
    (tmp_path / "val.jsonl").write_text("".join(json.dumps({"prompt": f"Say {i}{'!' * i}"}) + "\n" for i in range(7)))
    rollout_data(tmp_path)  # writes the prompts once
    mp.spawn(run_rank, args=(Job(tmp_path, 20_000 + time.time_ns() // 1000 % 20_000),), nprocs=RANKS)
    alone = run(tmp_path, 1)
    assert {"val/reward/mean", "val/reward/gold", "val/response/length"} <= set(alone)
    for rank in range(RANKS):
        assert torch.load(tmp_path / f"{rank}.pt") == pytest.approx(alone, rel=1e-6)
