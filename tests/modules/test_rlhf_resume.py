"""A run that is interrupted and goes on ends where one without interruption ends."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from rollouts import MOVING, rollout_data, speaker

from lightning_pref.data.run_place import RunPlace
from lightning_pref.models.reference import EmaSettings
from lightning_pref.modules.rlhf import RLHFModule
from lightning_pref.modules.rlhf_settings import KLSettings, ScoreSettings
from lightning_pref.rollouts.experience import ExperienceLoader

# The resumed run has a folder of its own.
pytestmark = pytest.mark.filterwarnings("ignore:The dirpath has changed:UserWarning")

OPTIONS: dict[str, dict[str, Any]] = {
    "grpo": {"kl": KLSettings(coefficient=0.1, target=1.0, horizon=20.0), "ema": EmaSettings(mixing=0.5, every_n_updates=1)},
    "ppo": {"algorithm": "ppo", "scores": ScoreSettings(normalize=True)},
}


def run(folder: Path, name: str, *, max_steps: int, resume: Path | None = None) -> RLHFModule:
    module = RLHFModule(speaker(), optimizer=MOVING, **OPTIONS[name])
    trainer = L.Trainer(
        accelerator="cpu",
        max_steps=max_steps,
        max_epochs=5,
        logger=False,
        callbacks=[ModelCheckpoint(dirpath=folder / "checkpoints", every_n_train_steps=2, save_top_k=-1, filename="{step}")],
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
    )
    folder.mkdir()
    data = rollout_data(folder, num_prompts=2, num_minibatches=2)
    trainer.fit(module, data, ckpt_path=None if resume is None else str(resume), weights_only=None if resume is None else True)
    return module


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("at", [2, 6, 8, 10])
def test_C1_between_rollouts_a_resumed_run_goes_on_bit_for_bit(tmp_path: Path, name: str, at: int) -> None:
    whole = run(tmp_path / "whole", name, max_steps=12)
    checkpoint = tmp_path / "whole" / "checkpoints" / f"step={at}.ckpt"
    resumed = run(tmp_path / "resumed", name, max_steps=12, resume=checkpoint)
    for key, value in whole.state_dict().items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(value, resumed.state_dict()[key]), key


def test_inside_a_rollout_it_is_collected_again_and_the_rest_of_it_trained_on(tmp_path: Path) -> None:
    data = rollout_data(tmp_path, num_prompts=2, num_minibatches=2)
    data.setup("fit")
    loader = data.train_dataloader()
    assert isinstance(loader, ExperienceLoader)
    collected: list[int] = []

    class Collector:
        def collect(self, task: Any) -> Any:
            collected.append(task.number)
            raise StopIteration

    loader.collector = Collector  # type: ignore[assignment]
    loader.instruments = lambda: None  # type: ignore[assignment,return-value]
    loader.resume(RunPlace(0, 3))
    with pytest.raises(RuntimeError, match="StopIteration"):
        next(iter(loader))
    assert collected == [1], "the second of four rollouts of two updates each"
