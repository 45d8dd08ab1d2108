"""A loss or gradient that is no number leaves nothing behind: the run goes on as one that never saw its batch."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import Callback, LearningRateMonitor
from lightning.pytorch.plugins import MixedPrecision
from resumed_runs import grpo
from speakers import quiet_trainer
from spiky import Regression, adamw, batches, fit, weights
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LinearLR
from torch.utils.data import DataLoader
from transformers import LlamaForCausalLM
from transformers_runs import PairTrainer, run, tiny_llama
from typing_extensions import override

from lightning_pref.callbacks import NonFiniteGuard, SpikeAwareOptimizerReset
from lightning_pref.data.groups import GroupBatch, PromptGroup
from lightning_pref.modules import RLHFModule, SFTModule

UPDATES = 10
BAD = 4  # its number among the batches, from 0


class Scheduled(Regression):
    """Counts the steps of its schedule, and may scale the gradients of one batch."""

    def __init__(self, optimizer: Callable[[Any], Optimizer] = adamw, scale_gradients: float | None = None) -> None:
        super().__init__(optimizer, schedule=lambda made: LinearLR(made, total_iters=UPDATES))
        self.scale_gradients = scale_gradients

    @override
    def on_after_backward(self) -> None:
        if self.scale_gradients is not None and self.trainer.global_step == BAD:
            for parameter in list(self.parameters())[2:]:
                assert parameter.grad is not None
                parameter.grad.mul_(self.scale_gradients)


def decaying_adamw(parameters: Any) -> Optimizer:
    return adamw(parameters, weight_decay=0.1, amsgrad=True)


def sgd(parameters: Any) -> Optimizer:
    return torch.optim.SGD(parameters, lr=0.01, momentum=0.9, dampening=0.5, weight_decay=0.1)


def eight_bit(parameters: Any) -> Optimizer:
    bnb = pytest.importorskip("bitsandbytes")
    made: Optimizer = bnb.optim.AdamW8bit(parameters, lr=0.01, min_8bit_size=8)
    return made


def ruined(data: list[Tensor], place: int = BAD, value: float = math.nan) -> list[Tensor]:
    """The same batches with one label of one of them spoilt."""
    spoilt = [batch.clone() for batch in data]
    spoilt[place][3, 6] = value
    return spoilt


def optimizer_state(trainer: L.Trainer) -> list[Tensor | float]:
    """All that the optimiser and the schedule know."""
    optimizer = trainer.optimizers[0]
    group = optimizer.param_groups[0]
    moments = [value for state in optimizer.state.values() for value in state.values()]
    return [*moments, group["lr"], trainer.lr_scheduler_configs[0].scheduler.last_epoch]


def assert_same(found: L.Trainer, expected: L.Trainer) -> None:
    assert torch.equal(weights(found.lightning_module), weights(expected.lightning_module))
    pairs = list(zip(optimizer_state(found), optimizer_state(expected), strict=True))
    assert len(pairs) == len(optimizer_state(expected)) >= 6
    assert all(torch.equal(a, b) if isinstance(a, Tensor) and isinstance(b, Tensor) else a == b for a, b in pairs)


@pytest.mark.parametrize("value", [math.nan, math.inf], ids=["nan", "inf"])
@pytest.mark.parametrize("optimizer", [decaying_adamw, sgd, eight_bit])
def test_a_skipped_update_is_as_if_its_batch_had_never_been_there(
    optimizer: Callable[[Any], Optimizer], value: float, tmp_path: Path
) -> None:
    data = batches(UPDATES)
    guard = NonFiniteGuard()
    trainer = fit(tmp_path, Scheduled(optimizer), [guard], ruined(data, value=value))
    without = fit(tmp_path, Scheduled(optimizer), [NonFiniteGuard()], data[:BAD] + data[BAD + 1 :])
    assert_same(trainer, without)
    assert guard.updates == UPDATES - 1
    assert trainer.global_step == UPDATES  # as with a step that a loss scaler skips


@pytest.mark.parametrize(
    "settings",
    [{"gradient_clip_val": 0.1}, {"precision": "bf16-mixed"}, {"gradient_clip_val": 0.01, "gradient_clip_algorithm": "value"}],
    ids=["clipped", "bf16", "clipped_by_value"],
)
def test_the_same_holds_when_gradients_are_clipped_and_under_bf16(settings: dict[str, Any], tmp_path: Path) -> None:
    data = batches(UPDATES)
    found = fit(tmp_path, Scheduled(), [NonFiniteGuard()], ruined(data), **settings)
    assert_same(found, fit(tmp_path, Scheduled(), [NonFiniteGuard()], data[:BAD] + data[BAD + 1 :], **settings))


def test_one_bad_micro_batch_takes_its_whole_update_with_it_and_no_other(tmp_path: Path) -> None:
    data = batches(3 * UPDATES)
    guard = NonFiniteGuard(rows=lambda batch: [int(1000 * batch[0, 0])])
    window = slice(3 * BAD, 3 * BAD + 3)
    found = fit(tmp_path, Scheduled(), [guard], ruined(data, 3 * BAD + 1), accumulate_grad_batches=3)
    rest = data[: window.start] + data[window.stop :]
    assert_same(found, fit(tmp_path, Scheduled(), [NonFiniteGuard()], rest, accumulate_grad_batches=3))
    (event,) = guard.events
    assert event["finding"].startswith("the loss in 1 of 3 micro-batches is nan or infinite")
    assert event["rows"] == [int(1000 * data[3 * BAD + 1][0, 0])]  # and not those of its neighbours


def test_a_bad_gradient_below_a_sound_loss_is_found_and_its_parameter_named(tmp_path: Path) -> None:
    data = batches(UPDATES)
    guard = NonFiniteGuard()
    found = fit(tmp_path, Scheduled(scale_gradients=math.inf), [guard], data)
    assert_same(found, fit(tmp_path, Scheduled(), [NonFiniteGuard()], data[:BAD] + data[BAD + 1 :]))
    assert guard.events[0]["finding"] == "the gradient of 2 of 4 parameters is nan or infinite, the first of them layers.2.weight"


def test_finite_gradients_whose_norm_overflows_are_none_of_its_business(tmp_path: Path) -> None:
    guard = NonFiniteGuard()
    fit(tmp_path, Scheduled(scale_gradients=1e30), [guard], batches(UPDATES))
    assert guard.updates == UPDATES
    assert guard.events == []


def test_without_the_guard_the_weights_are_lost(tmp_path: Path) -> None:
    module = Scheduled()
    fit(tmp_path, module, [], ruined(batches(UPDATES)))
    assert weights(module).isnan().all()


def test_it_stops_after_so_many_in_a_row_and_says_where_to_look(tmp_path: Path) -> None:
    data = batches(UPDATES)
    bad = [torch.full_like(batch, math.nan) if i >= BAD else batch for i, batch in enumerate(data)]
    module, guard = Scheduled(), NonFiniteGuard(stop_after=3, rows=lambda batch: [7, 8])
    with pytest.raises(ValueError, match="Training stops at update 7: 3 updates in a row were not finite") as raised:
        fit(tmp_path, module, [guard], bad)
    text = str(raised.value)
    assert "\n" not in text
    assert "the weights are those after 4 executed updates" in text
    assert "Update 7: the loss of its only micro-batch is nan or infinite" in text
    assert "the gradient of 4 of 4 parameters is nan or infinite, the first of them layers.0.weight. Its rows: 7, 8." in text
    assert "lower the learning rate" in text
    before = Scheduled()
    fit(tmp_path, before, [], data[:BAD])
    assert torch.equal(weights(module), weights(before))


@pytest.mark.parametrize("name", ["stop_after", "every_n_updates"])
def test_a_number_of_updates_below_one_is_refused(name: str) -> None:
    settings: Any = {name: 0}
    with pytest.raises(ValueError, match=f"`{name}` must be at least 1.*, got 0"):
        NonFiniteGuard(**settings)


def test_bad_updates_that_are_not_in_a_row_do_not_stop_the_run(tmp_path: Path) -> None:
    data = batches(UPDATES)
    guard = NonFiniteGuard(stop_after=2)
    fit(tmp_path, Scheduled(), [guard], ruined(ruined(ruined(data, 2), 4), 6))
    assert guard.updates == UPDATES - 3
    assert len(guard.events) == 3


def test_it_is_said_once_and_counted_in_every_report(tmp_path: Path) -> None:
    guard = NonFiniteGuard(every_n_updates=3)
    data = ruined(ruined(batches(UPDATES)), 5)
    trainer = fit(tmp_path, Scheduled(), [guard], data)
    assert [alert.name for alert in guard.alerts] == ["non_finite/seen"]
    assert "Update 5: the loss of its only micro-batch is nan or infinite" in guard.alerts[0].evidence
    log_dir = trainer.log_dir
    assert log_dir is not None
    said = [json.loads(line) for line in (Path(log_dir) / "alerts.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [alert["name"] for alert in said] == ["non_finite/seen"]
    metrics = (Path(log_dir) / "metrics.csv").read_text(encoding="utf-8").splitlines()
    column = metrics[0].split(",").index("non_finite/skipped")
    assert [line.split(",")[column] for line in metrics[1:] if line.split(",")[column]] == ["0.0", "2.0", "0.0"]


@pytest.mark.parametrize("guard_first", [True, False])
def test_a_spike_detector_learns_nothing_from_it_wherever_it_stands(guard_first: bool, tmp_path: Path) -> None:
    def spikes() -> SpikeAwareOptimizerReset:
        return SpikeAwareOptimizerReset("evidence", min_history=2, guard_steps=1)

    data, detector, guard = batches(UPDATES), spikes(), NonFiniteGuard()
    found = fit(tmp_path, Scheduled(), [guard, detector] if guard_first else [detector, guard], ruined(data))
    calm = spikes()
    assert_same(found, fit(tmp_path, Scheduled(), [calm], data[:BAD] + data[BAD + 1 :]))
    assert detector.measured_state() == calm.measured_state()
    assert guard.updates == detector.updates == UPDATES - 1
    assert len(guard.events) == 1


def test_O1_what_a_loss_scaler_skips_is_not_counted_again_and_does_not_move_the_schedule(tmp_path: Path) -> None:
    # Scaled by 2^30 the first gradients overflow, until the scaler has halved its factor often enough.
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**30, growth_interval=1000)
    guard = NonFiniteGuard(stop_after=1)
    half = MixedPrecision("16-mixed", "cpu", scaler)
    trainer = fit(tmp_path, Scheduled(), [guard], batches(40), plugins=[half])
    halvings = round(math.log2(2.0**30 / scaler.get_scale()))
    assert 0 < halvings < 40
    assert guard.events == []
    assert guard.updates == 40 - halvings
    assert trainer.lr_scheduler_configs[0].scheduler.last_epoch == 40 - halvings


def test_a_bad_loss_under_a_loss_scaler_is_counted_once(tmp_path: Path) -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    guard, data = NonFiniteGuard(), batches(UPDATES)
    half = MixedPrecision("16-mixed", "cpu", scaler)
    trainer = fit(tmp_path, Scheduled(), [guard], ruined(data), plugins=[half])
    assert [event["update"] for event in guard.events] == [BAD + 1]
    assert guard.updates == trainer.lr_scheduler_configs[0].scheduler.last_epoch == UPDATES - 1


def test_the_learning_rate_goes_on_being_logged(tmp_path: Path) -> None:
    rates = LearningRateMonitor(logging_interval="step")
    trainer = fit(tmp_path, Scheduled(), [rates, NonFiniteGuard()], ruined(batches(UPDATES)), log_every_n_steps=1)
    log_dir = trainer.log_dir
    assert log_dir is not None
    metrics = (Path(log_dir) / "metrics.csv").read_text(encoding="utf-8").splitlines()
    column = next(i for i, name in enumerate(metrics[0].split(",")) if name.startswith("lr-"))
    logged = [line.split(",")[column] for line in metrics[1:] if line.split(",")[column]]
    assert len(logged) == UPDATES
    assert len(set(logged)) == UPDATES - 1  # the batch after the bad one is given the same rate again
    assert logged[BAD] == logged[BAD + 1]


class TwoOptimizers(L.LightningModule):
    """Manual optimisation of two layers; the loss of the second one is spoilt at times."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.layers = nn.ModuleList([nn.Linear(6, 1), nn.Linear(6, 1)])

    @override
    def training_step(self, batch: Tensor, batch_idx: int) -> None:
        optimizers: Any = self.optimizers()
        for layer, optimizer in zip(self.layers, optimizers, strict=True):
            optimizer.zero_grad()
            self.manual_backward((layer(batch[:, :6]) - batch[:, 6:]).square().mean())
            optimizer.step()

    @override
    def configure_optimizers(self) -> Any:
        return [adamw(layer.parameters()) for layer in self.layers]


def test_under_manual_optimisation_every_step_of_a_bad_batch_is_skipped(tmp_path: Path) -> None:
    data, module, without = batches(UPDATES), TwoOptimizers(), TwoOptimizers()
    guard = NonFiniteGuard()
    fit(tmp_path, module, [guard], ruined(data))
    fit(tmp_path, without, [], data[:BAD] + data[BAD + 1 :])
    assert torch.equal(weights(module), weights(without))
    assert guard.updates == UPDATES - 1


@pytest.mark.filterwarnings("ignore:The 'train_dataloader' does not have many workers")
def test_on_a_module_of_ours_the_rows_are_named_and_the_metrics_go_on(
    tiny_model: Callable[..., LlamaForCausalLM], random_groups: Callable[..., list[PromptGroup]], tmp_path: Path
) -> None:
    groups = random_groups(12, 1, ranked=False)
    made = [GroupBatch.from_groups(groups[i : i + 3]) for i in range(0, 12, 3)]
    made[1].weights[1] = math.nan
    module, guard = SFTModule(tiny_model()), NonFiniteGuard()
    trainer = quiet_trainer(max_epochs=2, callbacks=[guard], log_every_n_steps=1, default_root_dir=tmp_path)
    trainer.fit(module, DataLoader(made, batch_size=None))  # type: ignore[arg-type]
    assert [event["rows"] for event in guard.events] == [[3, 4, 5], [3, 4, 5]]
    assert guard.updates == 6
    assert trainer.lr_scheduler_configs[0].scheduler.last_epoch == 6
    assert torch.cat([p.flatten() for p in module.parameters()]).isfinite().all()
    assert trainer.callback_metrics["loss"].isfinite()


class SpoiltTrainer(PairTrainer):
    """The loss of its third update is nan."""

    @override
    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        self.seen = [*getattr(self, "seen", []), parameters(model)]  # before each update
        return super().compute_loss(model, inputs, *args, **kwargs) * (math.nan if self.state.global_step == 2 else 1.0)


def parameters(model: nn.Module) -> Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


def test_under_transformers_the_update_and_the_schedule_are_skipped_too(tmp_path: Path) -> None:
    guard, model = NonFiniteGuard(), tiny_llama()
    trainer = run(model, tmp_path, guard, trainer_class=SpoiltTrainer, num_rows=12)
    assert isinstance(trainer, SpoiltTrainer)
    moved = [not torch.equal(a, b) for a, b in pairwise([*trainer.seen, parameters(model)])]
    assert moved == [True, True, False, True, True, True]
    assert parameters(model).isfinite().all()
    assert guard.updates == 5
    assert trainer.lr_scheduler is not None
    assert trainer.lr_scheduler.last_epoch == 5
    assert {int(state["step"]) for state in trainer.optimizer.state.values()} == {5}
    assert trainer.state.global_step == 6


class SpoilsGradients(Callback):
    """Makes the gradients of one update nan, and notes whether anything of the module changed with it."""

    def __init__(self, at: int) -> None:
        self.at = at
        self.before: dict[str, Tensor] = {}
        self.changed: list[bool] = []

    @override
    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int) -> None:
        self.before = {name: value.clone() for name, value in pl_module.state_dict().items() if isinstance(value, Tensor)}

    @override
    def on_after_backward(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.global_step == self.at:
            for parameter in pl_module.parameters():
                if parameter.grad is not None:
                    parameter.grad.mul_(math.nan)

    @override
    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        after = pl_module.state_dict()
        self.changed.append(any(not torch.equal(value, after[name]) for name, value in self.before.items()))


def test_in_rlhf_the_prompts_are_named_and_the_moving_reference_stays(tmp_path: Path) -> None:
    module, data, _ = grpo(tmp_path)
    assert isinstance(module, RLHFModule)
    guard, spoils = NonFiniteGuard(), SpoilsGradients(2)
    trainer = quiet_trainer(max_steps=6, callbacks=[spoils, guard], default_root_dir=tmp_path, max_epochs=-1)
    trainer.fit(module, data)
    assert spoils.changed == [True, True, False, True, True, True]
    assert module.num_updates == guard.updates == 5
    (event,) = guard.events
    assert event["update"] == 3
    assert event["rows"]
