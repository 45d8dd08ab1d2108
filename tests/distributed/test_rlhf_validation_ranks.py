"""Held-out prompts on two processes: each is answered once, and the means are those of one process."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import lightning as L
import pytest
from gloo_ranks import launched
from rollouts import STILL, rollout_data, speaker

from lightning_pref.modules.rlhf import RLHFModule
from lightning_pref.rollouts.validation import HeldOutSampling

pytestmark = pytest.mark.slow

RANKS = 2


# Hardly a chance is left, so that ranks, which draw apart, draw what one process draws; and yet they are samples.
ALMOST_GREEDY = HeldOutSampling(num_samples=2, temperature=1e-5)


def run(folder: Path, ranks: int, sampling: HeldOutSampling) -> dict[str, float]:
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
        val_sampling=sampling,
    )
    trainer.fit(RLHFModule(speaker(), reference_model=str(folder / "reference"), optimizer=STILL), data)
    return {name: value.item() for name, value in trainer.callback_metrics.items() if name.startswith("val/")}


def run_both(folder: Path, _rank: int, ranks: int) -> list[dict[str, float]]:
    return [run(folder, ranks, sampling) for sampling in (HeldOutSampling(temperature=0.0), ALMOST_GREEDY)]


def test_ranks_answer_every_held_out_prompt_once_between_them(tmp_path: Path) -> None:
    (tmp_path / "val.jsonl").write_text("".join(json.dumps({"prompt": f"Say {i}{'!' * i}"}) + "\n" for i in range(7)))
    rollout_data(tmp_path)  # writes the prompts once
    speaker(1).save_pretrained(tmp_path / "reference")
    shared = launched(run_both, tmp_path, RANKS)
    greedy, sampled = run_both(tmp_path, 0, 1)
    assert {"val/reward/mean", "val/reward/gold", "val/response/length"} <= set(greedy)
    assert "val/kl" not in greedy
    assert sampled["val/kl"] > 1.0, "there is something to compare"
    for found in shared:
        assert found == [pytest.approx(greedy, rel=1e-6), pytest.approx(sampled, rel=1e-5)]
