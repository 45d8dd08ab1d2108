"""The diagnostics themselves, on the same training by either trainer."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import CSVLogger
from speakers import quiet_trainer
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import LlamaForCausalLM, Trainer
from transformers_runs import PairTrainer, collate, logged, logps, pair_observation, pair_rows, run, weights
from typing_extensions import override

from lightning_pref.callbacks.displacement import LikelihoodDisplacementTracker
from lightning_pref.callbacks.probe import Probe
from lightning_pref.callbacks.reward_variance import RewardVarianceMonitor
from lightning_pref.callbacks.spike_reset import SpikeAwareOptimizerReset
from lightning_pref.callbacks.stability_gap import StabilityGapEvaluator
from lightning_pref.integrations import transformers as attached
from lightning_pref.observations import RewardObservation, TaskSwitch, observe

TinyModel = Callable[..., LlamaForCausalLM]

NUM_ROWS, SWITCH_AT = 24, 5
# Alike on both sides: one order of rows, a constant rate, no decay.
SETTINGS: dict[str, Any] = {
    "num_rows": NUM_ROWS,
    "train_sampling_strategy": "sequential",
    "lr_scheduler_type": "constant",
    "learning_rate": 1e-3,
    "optim": "adamw_torch",
    "logging_steps": 4,
}
OLD = [collate(pair_rows(3, seed=5)), collate(pair_rows(2, seed=6))]


def rewards_of(pair: Any, batch: Any) -> RewardObservation:
    """The margin's two sides, as rewards of one prompt each."""
    rewards = torch.stack([pair.chosen_logps, pair.rejected_logps], 1).flatten()
    return RewardObservation(rewards=rewards, prompt_ids=batch["row_ids"].repeat_interleave(2))


class InLightning(L.LightningModule):
    """The loss of `PairTrainer`, and what it publishes."""

    def __init__(self, model: LlamaForCausalLM) -> None:
        super().__init__()
        self.model = model

    @override
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        if batch_idx == SWITCH_AT:
            observe(self, TaskSwitch(task="new"))
        pair = pair_observation(self.model, batch)
        observe(self, pair)
        observe(self, rewards_of(pair, batch))
        return -torch.nn.functional.logsigmoid(pair.chosen_logps - pair.rejected_logps).mean()

    @override
    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-3, weight_decay=0.0)


class InTransformers(PairTrainer):
    """The same."""

    @override
    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None) -> Tensor:
        if self.state.global_step == SWITCH_AT:
            attached.observe(self, TaskSwitch(task="new"))
        pair = pair_observation(model, inputs)
        attached.observe(self, pair)
        attached.observe(self, rewards_of(pair, inputs))
        return -torch.nn.functional.logsigmoid(pair.chosen_logps - pair.rejected_logps).mean()


def by_lightning(model: LlamaForCausalLM, folder: Path, callback: Callback) -> dict[str, dict[int, float]]:
    """Everything that was logged, by key and step."""
    entries: dict[str, dict[int, float]] = {}

    class Notebook(CSVLogger):
        @override
        def log_metrics(self, metrics: Any, step: int | None = None) -> None:
            for key, value in metrics.items():
                entries.setdefault(key, {})[step or 0] = value

    trainer = quiet_trainer(
        gradient_clip_val=1.0, callbacks=[callback], logger=Notebook(folder), log_every_n_steps=4, default_root_dir=folder
    )
    loader: DataLoader[Any] = DataLoader(pair_rows(NUM_ROWS), batch_size=2, collate_fn=collate)  # type: ignore[arg-type]
    model.train()
    trainer.fit(InLightning(model), loader)
    return entries


def old_losses(module: Any, batch: Any) -> Tensor:
    return -logps(module.model if isinstance(module, InLightning) else module, batch["chosen"]) / 5


def old_pairs(module: Any, batch: Any) -> Any:
    return pair_observation(module.model if isinstance(module, InLightning) else module, batch)


DIAGNOSTICS: dict[str, Callable[[], Callback]] = {
    "displacement": lambda: LikelihoodDisplacementTracker(details=True),
    "reward_variance": lambda: RewardVarianceMonitor(details=True),
    "stability_gap": lambda: StabilityGapEvaluator({"old": OLD}, old_losses, dense_updates=3, growth=1.5, budget=None),
    "spam": lambda: SpikeAwareOptimizerReset("spam", reset_every=5, warmup_steps=2, guard_steps=2, threshold=2.0),
    "evidence": lambda: SpikeAwareOptimizerReset("evidence", min_history=4, score_limit=2.0),
}
# Seconds differ from run to run.
CLOCKS = ("stability_gap/time_share",)


@pytest.mark.parametrize("name", DIAGNOSTICS)
def test_a_diagnostic_says_and_does_the_same_under_both_trainers(tiny_model: TinyModel, tmp_path: Path, name: str) -> None:
    ours, theirs = tiny_model(), tiny_model()
    here = DIAGNOSTICS[name]()
    expected = by_lightning(ours, tmp_path, here)
    there = DIAGNOSTICS[name]()
    trainer = run(theirs, tmp_path, there, trainer_class=InTransformers, **SETTINGS)
    prefix = tuple({key.split("/")[0] for key in expected})
    found = {key for entry in trainer.state.log_history for key in entry if key.startswith(prefix)}
    assert found == set(expected) and len(found) >= 4
    for key in found - set(CLOCKS):
        assert logged(trainer, key) == {
            step: pytest.approx(value, rel=1e-3, abs=1e-4, nan_ok=True) for step, value in expected[key].items()
        }, key
    assert there.updates == here.updates
    assert [(alert.name, alert.step) for alert in there.alerts] == [(alert.name, alert.step) for alert in here.alerts]
    for weight, value in weights(ours).items():
        assert torch.allclose(theirs.state_dict()[weight], value, atol=1e-5), weight


def reports(trainer: Trainer) -> list[list[str]]:
    """All that diagnostics logged, in order, without what a clock says."""
    entries = [entry for entry in trainer.state.log_history if "loss" not in entry and "train_runtime" not in entry]
    return [sorted(f"{key} {value!r}" for key, value in entry.items() if "time_share" not in key) for entry in entries]


def measuring() -> list[Callback]:
    return [
        LikelihoodDisplacementTracker(every_n_updates=1),
        RewardVarianceMonitor(),
        StabilityGapEvaluator({"old": OLD}, old_losses, budget=None),
        Probe("fixed", OLD, old_pairs, every_n_updates=3, budget=None),
    ]


def test_measuring_diagnostics_change_no_weight_of_a_transformers_run(tiny_model: TinyModel, tmp_path: Path) -> None:
    finals = []
    for parts in ([], measuring()):
        model = tiny_model(attention_dropout=0.3)
        run(model, tmp_path, *parts, trainer_class=InTransformers, **SETTINGS)
        finals.append(weights(model))
    assert all(torch.equal(value, finals[1][name]) for name, value in finals[0].items())


@pytest.mark.parametrize("mode", ["spam", "evidence"])
def test_a_resumed_run_with_resets_and_monitors_equals_one_without_interruption(
    tiny_model: TinyModel, tmp_path: Path, mode: str
) -> None:
    settings = {**SETTINGS, "save_strategy": "steps", "save_steps": 4}
    whole = run(tiny_model(), tmp_path, *measuring(), DIAGNOSTICS[mode](), trainer_class=InTransformers, **settings)
    for step in (8, 12):
        (tmp_path / f"checkpoint-{step}").rename(tmp_path / f"gone-{step}")
    parts = [*measuring(), DIAGNOSTICS[mode]()]
    resumed = run(tiny_model(3), tmp_path, *parts, trainer_class=InTransformers, resume=True, **settings)
    for weight, value in weights(whole.model).items():
        assert torch.equal(resumed.model.state_dict()[weight], value), weight
    assert reports(resumed) == reports(whole)
