"""All monitors that only watch, together, in one run: the weights are those of a run without them, also across a stop."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from paired_vectors import PairedVectors, ResumableRows, random_pairs
from speakers import quiet_trainer
from torch import Tensor
from typing_extensions import override

from lightning_pref import PairObservation, RewardObservation, observe
from lightning_pref.callbacks import (
    LikelihoodDisplacementTracker,
    OveroptimizationMonitor,
    Probe,
    RewardVarianceMonitor,
    SpikeAwareOptimizerReset,
    StabilityGapEvaluator,
)
from lightning_pref.callbacks.diagnostic import Diagnostic

ROWS, STOP = 24, 9  # 6 batches an epoch, so that the stop is in the middle of the second


class Rewarding(PairedVectors):
    """Pairs whose margins are also rewards, under Adam."""

    @override
    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        seen = self.pair(batch)
        rewards = torch.cat([seen.chosen_logps, seen.rejected_logps])
        observe(self, RewardObservation(rewards=rewards, prompt_ids=seen.row_ids.repeat(2)))
        return super().training_step(batch, batch_idx)

    @override
    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=0.05)


def score(module: Rewarding, rows: Tensor) -> PairObservation:
    torch.rand(3)
    return module.pair(rows)


def losses(module: Rewarding, rows: Tensor) -> Tensor:
    torch.rand(3)
    return -module.pair(rows).chosen_logps


def all_monitors() -> list[Diagnostic]:
    return [
        LikelihoodDisplacementTracker(ches=True, details=True, every_n_updates=4),
        RewardVarianceMonitor(details=True, every_n_updates=4),
        OveroptimizationMonitor(every_n_updates=4),
        SpikeAwareOptimizerReset(reset_every=None, threshold=0.0, every_n_updates=4),  # neither clips nor resets
        StabilityGapEvaluator({"old": [torch.arange(8)]}, losses, dense_updates=5, budget=None),
        Probe("fixed", [torch.arange(4)], score, every_n_updates=5, budget=None),
    ]


def run(callbacks: list[Any], *, max_steps: int = -1, resume: Path | None = None) -> tuple[Tensor, L.Trainer]:
    L.seed_everything(3, verbose=False)
    module = Rewarding(random_pairs(ROWS))
    trainer = quiet_trainer(
        callbacks=callbacks, max_epochs=3, max_steps=max_steps, limit_val_batches=0, enable_checkpointing=max_steps > 0
    )
    loader: Any = ResumableRows(ROWS)
    if resume is None:
        trainer.fit(module, loader)
    else:
        trainer.fit(module, loader, ckpt_path=resume, weights_only=True)
    return module.weight.detach().clone(), trainer


def without_clocks(state: Any) -> Any:
    """Plain state as text can be compared: seconds aside, nan equal to nan."""
    if isinstance(state, dict):
        return {key: without_clocks(value) for key, value in state.items() if key not in ("spent", "trained", "last_cost")}
    if isinstance(state, (list, tuple)):
        return [without_clocks(value) for value in state]
    return torch.nan_to_num(state, nan=-1e30).tolist() if isinstance(state, Tensor) else repr(state)


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
def test_M4_weights_are_bit_identical_with_every_monitor_and_across_a_stop_in_the_middle_of_an_epoch(tmp_path: Path) -> None:
    alone, _ = run([])
    whole = all_monitors()
    watched, _ = run(whole)
    assert torch.equal(alone, watched)

    saving = ModelCheckpoint(dirpath=tmp_path, filename="middle", every_n_train_steps=STOP)
    _, stopped = run([*all_monitors(), saving], max_steps=STOP)
    assert stopped.global_step == STOP
    second = all_monitors()
    resumed, trainer = run(second, resume=tmp_path / "middle.ckpt")
    assert trainer.global_step == 18
    assert torch.equal(resumed, alone)
    for mine, theirs in zip(second, whole, strict=True):
        assert mine.updates == 18
        if isinstance(mine, LikelihoodDisplacementTracker):  # what was measured when it was stopped is measured once more
            for column in ("row_ids", "anchor_chosen", "last_chosen", "num_sights"):
                assert torch.equal(mine.history().column(column), theirs.history().column(column))  # type: ignore[attr-defined]
        if isinstance(mine, RewardVarianceMonitor):
            assert without_clocks(mine.measured_state()) == without_clocks(theirs.measured_state())
