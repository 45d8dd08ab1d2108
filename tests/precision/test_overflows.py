"""An update that the loss scaler of float16 skips is none: not for schedules, references, counters, logs, nor monitors."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.plugins.precision import MixedPrecision
from reward_modules import loader, trainer
from rollouts import rollout_data, speaker
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import LlamaForCausalLM
from typing_extensions import override

from lightning_pref.callbacks import LikelihoodDisplacementTracker
from lightning_pref.data.groups import PromptGroup
from lightning_pref.models.reference import EmaReference, EmaSettings
from lightning_pref.modules import DPOModule, RewardModule, RLHFModule, SFTModule
from lightning_pref.modules.group_module import GroupModule
from lightning_pref.modules.optimisation import OptimizerSettings
from lightning_pref.reports import RunRecord

TinyModel = Callable[..., LlamaForCausalLM]
RandomGroups = Callable[..., list[PromptGroup]]

FALLING = OptimizerSettings(learning_rate=1e-3, schedule="linear", warmup=2)
# Each overflow halves it, and 65504 is the largest number of float16.
ENORMOUS = 2.0**40


def half(init_scale: float = ENORMOUS) -> MixedPrecision:
    return MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=init_scale))


def num_skipped(plugin: MixedPrecision, init_scale: float = ENORMOUS) -> int:
    assert plugin.scaler is not None
    return round(math.log2(init_scale / plugin.scaler.get_scale()))


class Log(RunRecord):
    """Keeps the trainer's step of every entry that has a loss."""

    def __init__(self) -> None:
        super().__init__()
        self.steps: list[int] = []

    @override
    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        if "loss" in metrics:
            assert step is not None
            self.steps.append(step)


class Witness(Callback):
    """Keeps, after every batch, the count of updates and the learning rate of the next one."""

    def __init__(self) -> None:
        self.counts: list[int] = []
        self.rates: list[float] = []

    @override
    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.counts.append(pl_module.num_updates)
        self.rates.append(trainer.optimizers[0].param_groups[0]["lr"])


def dpo(model: LlamaForCausalLM, **options: Any) -> DPOModule:
    return DPOModule(model, optimizer=FALLING, ema=EmaSettings(mixing=0.5, every_n_updates=1), **options)


def test_O1_schedule_reference_counters_and_monitors_stand_still_while_updates_are_skipped(
    tiny_model: TinyModel, random_groups: RandomGroups, tmp_path: Path
) -> None:
    data = loader(random_groups(40), tmp_path / "store", batch_size=1)
    plugin, witness, monitor, module = half(), Witness(), LikelihoodDisplacementTracker(), dpo(tiny_model())
    fit = trainer(tmp_path, witness, monitor, plugins=[plugin])
    fit.fit(module, data)
    skipped = num_skipped(plugin)
    assert 5 < skipped < 35
    done = 40 - skipped
    assert fit.global_step == 40, "Lightning counts them all"
    assert module.num_updates == monitor.updates == done
    assert isinstance(module.reference, EmaReference)
    assert module.reference.num_updates == done
    (schedule,) = (config.scheduler for config in fit.lr_scheduler_configs)
    assert schedule.last_epoch == done
    assert {int(state["step"]) for state in fit.optimizers[0].state.values()} == {done}
    factor = FALLING.factor(40)
    assert witness.rates == pytest.approx([1e-3 * factor(count) for count in witness.counts])


def test_O1_the_moving_reference_does_not_move_where_the_policy_does_not(
    tiny_model: TinyModel, random_groups: RandomGroups, tmp_path: Path
) -> None:
    """A reference that starts elsewhere comes nearer with every update it counts, so that a skipped one would show."""
    data = loader(random_groups(3), tmp_path / "store", batch_size=1)
    module = DPOModule(tiny_model(), optimizer=FALLING, ema=EmaSettings(mixing=0.5, every_n_updates=1))
    module.configure_model()
    assert isinstance(module.reference, EmaReference)
    with torch.no_grad():
        module.reference.model.get_input_embeddings().weight.add_(1.0)
    before = {name: value.clone() for name, value in module.reference.model.state_dict().items()}
    trainer(tmp_path, plugins=[half()]).fit(module, data)
    assert all(torch.equal(value, before[name]) for name, value in module.reference.model.state_dict().items())


def test_O1_entries_in_the_log_are_as_many_updates_apart_as_without_overflows(
    tiny_model: TinyModel, random_groups: RandomGroups, tmp_path: Path
) -> None:
    data = loader(random_groups(40), tmp_path / "store", batch_size=1)
    plugin, witness, log, module = half(), Witness(), Log(), dpo(tiny_model())
    trainer(tmp_path, witness, plugins=[plugin], logger=[log], log_every_n_steps=5).fit(module, data)
    done = 40 - num_skipped(plugin)
    assert done % 5, "there is a rest, logged at the end"
    assert len(log.steps) == done // 5 + 1
    due = [witness.counts.index(count) + 1 for count in range(5, done + 1, 5)]
    assert log.steps == [*due, 40]
    assert any(step % 5 for step in due), "the trainer's own cadence would have been another"


def test_O1_a_run_resumed_among_skipped_updates_is_the_uninterrupted_one(
    tiny_model: TinyModel, random_groups: RandomGroups, tmp_path: Path
) -> None:
    data = loader(random_groups(20), tmp_path / "store", batch_size=1)

    def run(name: str, epochs: int, resume: Path | None = None) -> tuple[DPOModule, float]:
        module, plugin = dpo(tiny_model()), half()
        # The schedule is as long as the whole run in both.
        fit = trainer(tmp_path / name, Stop(epochs), plugins=[plugin], max_epochs=3)
        fit.fit(module, data, ckpt_path=resume, weights_only=True if resume else None)
        fit.save_checkpoint(tmp_path / name / "end.ckpt")
        assert plugin.scaler is not None
        return module, plugin.scaler.get_scale()

    whole, scale = run("whole", 3)
    run("first", 1)
    rest, resumed_scale = run("rest", 3, tmp_path / "first" / "end.ckpt")
    assert resumed_scale == scale < ENORMOUS
    assert rest.num_updates == whole.num_updates < 60
    ours, theirs = rest.state_dict(), whole.state_dict()
    assert all(torch.equal(v, theirs[name]) if isinstance(v, Tensor) else v == theirs[name] for name, v in ours.items())


class Stop(Callback):
    """Ends training after so many epochs, whatever the trainer was made for."""

    def __init__(self, epochs: int) -> None:
        self.epochs = epochs

    @override
    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        trainer.should_stop = trainer.current_epoch + 1 >= self.epochs


@pytest.mark.parametrize("kind", ["sft", "reward", "rlhf"])
def test_O1_every_module_counts_executed_updates_alone(
    tiny_model: TinyModel, random_groups: RandomGroups, tmp_path: Path, kind: str
) -> None:
    build: dict[str, Callable[[], GroupModule]] = {
        "sft": lambda: SFTModule(tiny_model(), optimizer=FALLING),
        "reward": lambda: RewardModule(tiny_model(), optimizer=FALLING),
        "rlhf": lambda: RLHFModule(speaker(), optimizer=FALLING),
    }
    module, plugin = build[kind](), half(2.0**30)
    fit = trainer(tmp_path, plugins=[plugin], max_epochs=1)
    if kind == "rlhf":
        fit.fit(module, rollout_data(tmp_path, prompts=24, num_minibatches=4))
    else:
        fit.fit(module, loader(random_groups(24, ranked=kind == "reward"), tmp_path / "store", batch_size=1))
    assert fit.global_step == 24
    assert 0 < module.num_updates == 24 - num_skipped(plugin, 2.0**30) < 24
    assert {int(state["step"]) for state in fit.optimizers[0].state.values()} == {module.num_updates}


def test_O1_our_optimizer_is_not_fused_under_a_loss_scaler(
    tiny_model: TinyModel, random_groups: RandomGroups, tmp_path: Path
) -> None:
    """A fused one unscales gradients within its step: monitors would see scaled ones, and Lightning could not clip them."""
    data = loader(random_groups(4), tmp_path / "store", batch_size=1)
    for plugins, fused in (([half(1.0)], False), ([], True)):
        fit = trainer(tmp_path, plugins=plugins)
        fit.fit(DPOModule(tiny_model(), optimizer=FALLING), data)
        assert fit.optimizers[0].defaults["fused"] is fused


class Foreign(L.LightningModule):
    """Somebody's own module with a fused optimiser, which is called even where the scaler found an overflow."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(4, 1)

    @override
    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self.layer(batch).square().mean() * (math.inf if batch_idx in (2, 3) else 1.0)  # type: ignore[no-any-return]

    @override
    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), fused=True)


def test_O1_a_monitor_does_not_count_what_a_fused_optimizer_is_told_to_skip(tmp_path: Path) -> None:
    monitor = LikelihoodDisplacementTracker(silent_after=100)
    monitor._is_fed = True  # only its count is looked at
    fit = trainer(tmp_path, monitor, plugins=[half(2.0)])
    fit.fit(Foreign(), DataLoader(list(torch.randn(8, 4)), batch_size=1))  # type: ignore[arg-type]
    assert {int(state["step"]) for state in fit.optimizers[0].state.values()} == {6}
    assert monitor.updates == 6
