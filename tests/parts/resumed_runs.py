"""Small runs of every recipe's module, whole or resumed, and what of them must be equal bit for bit."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback, LearningRateMonitor
from rollouts import MOVING, rollout_data, speaker

from lightning_pref.callbacks import (
    ExactResume,
    LikelihoodDisplacementTracker,
    RewardVarianceMonitor,
    SpikeAwareOptimizerReset,
)
from lightning_pref.data.datamodule import PreferenceData
from lightning_pref.data.playground_tokenizer import playground_tokenizer
from lightning_pref.models.reference import EmaSettings
from lightning_pref.modules.dpo import DPOModule
from lightning_pref.modules.reward import RewardModule
from lightning_pref.modules.rlhf import RLHFModule
from lightning_pref.modules.rlhf_settings import KLSettings, ScoreSettings
from lightning_pref.modules.sft import SFTModule
from lightning_pref.reports import RunRecord
from lightning_pref.reports.metrics_file import MetricsFile

Parts = tuple[L.LightningModule, L.LightningDataModule, list[Callback]]


def pair_data(folder: Path, **settings: Any) -> PreferenceData:
    path = folder / "pairs.jsonl"
    rows = [
        {"prompt": f"Say {i}{' please' * (i % 4)}.", "chosen": f"It is {i}." + "!" * (i % 3), "rejected": "No" + "." * (i % 5)}
        for i in range(22)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    given: dict[str, Any] = {"batch_size": 3, "val_size": 4, "seed": 5}
    return PreferenceData(str(path), tokenizer=playground_tokenizer(), cache_dir=str(folder / "cache"), **{**given, **settings})


def sft(folder: Path) -> Parts:
    data = pair_data(folder, columns={"prompt": "prompt", "completion": "chosen"})
    return SFTModule(speaker(), optimizer=MOVING), data, [SpikeAwareOptimizerReset(reset_every=4, warmup_steps=2, guard_steps=1)]


def reward(folder: Path) -> Parts:
    return RewardModule(speaker(), optimizer=MOVING), pair_data(folder), [RewardVarianceMonitor(every_n_updates=3)]


def dpo(folder: Path) -> Parts:
    module = DPOModule(speaker(), optimizer=MOVING, ema=EmaSettings(mixing=0.5, every_n_updates=2))
    monitors = [LikelihoodDisplacementTracker(every_n_updates=3), SpikeAwareOptimizerReset(mode="evidence")]
    return module, pair_data(folder), monitors


def grpo(folder: Path) -> Parts:
    module = RLHFModule(
        speaker(),
        optimizer=MOVING,
        kl=KLSettings(coefficient=0.1, target=1.0, horizon=20.0),
        ema=EmaSettings(mixing=0.5, every_n_updates=1),
    )
    data = rollout_data(folder, num_prompts=2, num_minibatches=2, inner_epochs=2)
    return module, data, [RewardVarianceMonitor(every_n_updates=3)]


def ppo(folder: Path) -> Parts:
    module = RLHFModule(speaker(), optimizer=MOVING, algorithm="ppo", scores=ScoreSettings(normalize=True))
    return module, rollout_data(folder, num_prompts=4, num_minibatches=2), []


MAKERS: Mapping[str, Callable[[Path], Parts]] = {"sft": sft, "reward": reward, "dpo": dpo, "grpo": grpo, "ppo": ppo}


def run(
    folder: Path, make: Callable[[Path], Parts], *, resume: Path | None = None, more: Iterable[Callback] = (), **settings: Any
) -> L.Trainer:
    """One run into a folder; a resumed one goes on in the folder of the run it resumes, as recipes do."""
    folder.mkdir(parents=True, exist_ok=True)
    module, data, callbacks = make(folder)
    keeper = ExactResume(str(folder / "checkpoints"), every_n_updates=1, keep_last=-1, every_minutes=None)
    given: dict[str, Any] = {"max_epochs": 2, "log_every_n_steps": 2, "gradient_clip_val": 0.5, "val_check_interval": 2}
    if not data.val_dataloader.__qualname__.startswith("Preference"):
        given.pop("val_check_interval")
    trainer = L.Trainer(
        accelerator="cpu",
        logger=[MetricsFile(folder), RunRecord()],
        callbacks=[*callbacks, LearningRateMonitor("step"), *more, keeper],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        **{**given, **settings},
    )
    trainer.fit(module, data, ckpt_path=None if resume is None else str(resume), weights_only=None if resume is None else True)
    return trainer


def checkpoint(path: Path) -> dict[str, Any]:
    loaded: dict[str, Any] = torch.load(path, weights_only=True)
    return loaded


def checkpoints_by_step(folder: Path) -> dict[int, Path]:
    return {int(path.name.removeprefix("step=").removesuffix(".ckpt")): path for path in (folder / "checkpoints").glob("*.ckpt")}
