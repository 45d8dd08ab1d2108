from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.plugins.precision import MixedPrecision
from lightning.pytorch.strategies import DDPStrategy
from reward_modules import loader
from speakers import quiet_trainer
from torch import Tensor, nn
from torch.optim import SGD, AdamW
from torch.utils.data import DataLoader
from transformers import LlamaForCausalLM, TrainingArguments
from transformers_runs import PairTrainer, collate, pair_rows, tiny_llama
from typing_extensions import override

from lightning_pref.callbacks import LostUpdateMeter
from lightning_pref.callbacks.lost_updates import meter_for
from lightning_pref.data.groups import PromptGroup
from lightning_pref.integrations.transformers import attach
from lightning_pref.modules import DPOModule, RewardModule
from lightning_pref.modules.optimisation import OptimizerSettings

SHARE, STUCK = "lost_updates/share", "lost_updates/stuck_share"
TinyModel = Callable[..., LlamaForCausalLM]
RandomGroups = Callable[..., list[PromptGroup]]


class History(Callback):
    """Keeps what the meter said last, after every batch."""

    def __init__(self) -> None:
        self.shares: list[float] = []
        self.stuck: list[float] = []

    @override
    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any) -> None:
        if SHARE in trainer.callback_metrics:
            self.shares.append(trainer.callback_metrics[SHARE].item())
            self.stuck.append(trainer.callback_metrics[STUCK].item())


class Weights(L.LightningModule):
    """Somebody's own module: weights whose gradient is what the test says."""

    def __init__(self, *tensors: Tensor, gradients: list[Tensor] | None = None, make: Callable[[Any], Any] | None = None) -> None:
        super().__init__()
        self.tensors = nn.ParameterList(tensors)
        self.gradients = gradients or [torch.ones_like(tensor) for tensor in tensors]
        self.make = make or (lambda parameters: SGD(parameters, lr=1e-3))

    @override
    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return torch.stack([(w.float() * g.float()).sum() for w, g in zip(self.tensors, self.gradients, strict=True)]).sum()

    @override
    def configure_optimizers(self) -> Any:
        return self.make(self.parameters())


def run(module: L.LightningModule, meter: LostUpdateMeter, *, updates: int = 1, **settings: Any) -> History:
    history = History()
    trainer = quiet_trainer(callbacks=[meter, history], max_epochs=1, limit_val_batches=0, **settings)
    trainer.fit(module, DataLoader(list(torch.zeros(updates, 1)), batch_size=1))  # type: ignore[arg-type]
    return history


def bfloat16(values: np.ndarray) -> np.ndarray:
    """Rounded to bfloat16, to nearest and to even in a tie, by the bits."""
    bits = values.astype(np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000).view(np.float32)


def test_O2_the_share_is_that_of_rounding_by_hand() -> None:
    generator = np.random.default_rng(0)
    weights = [bfloat16(10.0 ** generator.uniform(-4, 1, size) * generator.choice([-1, 1], size)) for size in (300, 400)]
    gradients = [bfloat16(generator.normal(size=weight.shape)) * (generator.random(weight.shape) < 0.8) for weight in weights]
    rate = 2.0**-9
    with_gradient = sum((gradient != 0).sum() for gradient in gradients)
    lost = sum(
        ((bfloat16(weight - rate * gradient) == weight) & (gradient != 0)).sum()
        for weight, gradient in zip(weights, gradients, strict=True)
    )
    module = Weights(
        *(torch.tensor(weight, dtype=torch.bfloat16) for weight in weights),
        gradients=[torch.tensor(gradient) for gradient in gradients],
        make=lambda parameters: SGD(parameters, lr=rate),
    )
    history = run(module, LostUpdateMeter(every_n_updates=1))
    assert 0.2 < lost / with_gradient < 0.8
    assert history.shares == [pytest.approx(lost / with_gradient)]


def test_a_sample_of_a_large_tensor_speaks_for_all_of_it_and_tensors_count_by_their_size() -> None:
    """A matrix whose columns differ, so that a sample with the period of its rows would see some of them only."""
    matrix = torch.ones(512, 256, dtype=torch.bfloat16)
    matrix[:, ::4] = 0.0  # a quarter moves
    small = torch.zeros(100, dtype=torch.bfloat16)  # all of it moves
    history = run(Weights(matrix, small), LostUpdateMeter(every_n_updates=1, elements_per_tensor=1000))
    assert history.shares == [pytest.approx(0.75 * matrix.numel() / (matrix.numel() + 100), abs=0.02)]


def test_what_has_no_gradient_and_what_has_no_learning_rate_is_not_lost() -> None:
    weights = [torch.ones(8), torch.ones(8), torch.zeros(8)]
    gradients = [torch.zeros(8), torch.ones(8), torch.ones(8)]
    make = lambda p: SGD([{"params": p[:1] + p[2:]}, {"params": p[1:2], "lr": 0.0}], lr=1e-3)  # noqa: E731
    module = Weights(*weights, gradients=gradients, make=lambda parameters: make(list(parameters)))
    history = run(module, LostUpdateMeter(every_n_updates=1))
    assert history.shares == [0.0]


def test_stuck_are_those_that_stand_where_they_stood_at_the_measurement_before() -> None:
    """Momentum of SGD grows: what one step loses at first, a later one moves."""
    module = Weights(torch.tensor([1.0, 64.0], dtype=torch.bfloat16), make=lambda p: SGD(p, lr=2.0**-9, momentum=0.5))
    history = run(module, LostUpdateMeter(every_n_updates=1), updates=3)
    # 1 - 1/512 rounds to 1; 1 - 1.5/512 moves by 1/256; 64 never moves.
    assert history.shares == [1.0, 0.5, 0.5]
    assert np.isnan(history.stuck[0])
    assert history.stuck[1:] == [0.5, 0.5]


@pytest.mark.parametrize("precision", ["bf16-true", "bf16-mixed", "32-true"])
def test_O2_pure_bfloat16_at_a_small_rate_raises_an_alert_and_float32_weights_do_not(
    tiny_model: TinyModel, random_groups: RandomGroups, tmp_path: Path, caplog: pytest.LogCaptureFixture, precision: Any
) -> None:
    meter = LostUpdateMeter(every_n_updates=2)
    settings = OptimizerSettings(learning_rate=1e-6, schedule="constant", warmup=0)
    trainer = quiet_trainer(callbacks=[meter], max_epochs=2, precision=precision, default_root_dir=tmp_path, limit_val_batches=0)
    with caplog.at_level(logging.WARNING, logger="lightning_pref.alerts"):
        trainer.fit(DPOModule(tiny_model(), optimizer=settings), loader(random_groups(12), tmp_path / "store", batch_size=2))
    share = trainer.callback_metrics[SHARE]
    if precision != "bf16-true":
        assert share < 0.05
        assert meter.alerts == []
        return
    assert share > 0.95
    (alert,) = meter.alerts
    assert alert.name == "lost_updates/too_many"
    assert "The weights are in bfloat16, the learning rate is 1e-06." in alert.evidence
    assert "precision: bf16-mixed" in alert.advice
    assert "lost_updates/too_many" in caplog.text


def test_dtypes_are_told_apart_where_there_are_several(
    tiny_model: TinyModel, random_groups: RandomGroups, tmp_path: Path
) -> None:
    """The head of a reward model is in float32, whatever the body is in, and feels what the body loses."""
    settings = OptimizerSettings(learning_rate=1e-6, schedule="constant", warmup=0)
    trainer = quiet_trainer(callbacks=[LostUpdateMeter(every_n_updates=1)], max_epochs=1, precision="bf16-true")
    trainer.fit(RewardModule(tiny_model(), optimizer=settings), loader(random_groups(4), tmp_path / "store"))
    found = trainer.callback_metrics
    assert found["lost_updates/float32_share"] < 0.1
    assert found["lost_updates/bfloat16_share"] > 0.9
    assert found["lost_updates/float32_share"] < found[SHARE] < found["lost_updates/bfloat16_share"]


@pytest.mark.parametrize("fused", [False, True])
def test_O1_an_update_that_the_loss_scaler_skips_is_not_measured(fused: bool) -> None:
    class Overflows(Weights):
        @override
        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            return super().training_step(batch, batch_idx) * (torch.inf if batch_idx in (1, 2) else 1.0)

    module = Overflows(torch.zeros(8), make=lambda p: AdamW(p, lr=1e-3, fused=fused))
    meter = LostUpdateMeter(every_n_updates=2)
    half = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=2.0))
    history = run(module, meter, updates=6, plugins=[half])
    assert meter.updates == 4
    # Updates 2 and 4 are measured, in the fourth and in the sixth batch.
    assert history.shares == [0.0, 0.0, 0.0]
    assert np.isnan(history.stuck[0])
    assert history.stuck[2] == 0.0


def test_several_optimizers_are_measured_each_at_its_own_steps() -> None:
    class Two(Weights):
        def __init__(self) -> None:
            super().__init__(torch.zeros(8), 1024 * torch.ones(24, dtype=torch.bfloat16))
            self.automatic_optimization = False

        @override
        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            loss = super().training_step(batch, batch_idx)
            first, second = self.optimizers()  # type: ignore[misc]
            self.manual_backward(loss)
            first.step()
            if batch_idx % 2:
                second.step()
            return loss.detach()

        @override
        def configure_optimizers(self) -> Any:
            return [SGD([tensor], lr=1e-3) for tensor in self.tensors]

    history = run(Two(), LostUpdateMeter(every_n_updates=2), updates=4)
    # Each optimiser is seen at its second step: the first in batches 2 and 4, the other, all of whose updates are lost, in 4.
    assert history.shares == [0.0, 0.0, 24 / 32]


def test_it_reads_a_transformers_trainer(tmp_path: Path) -> None:
    meter = LostUpdateMeter(every_n_updates=2)
    args = TrainingArguments(
        str(tmp_path), report_to="none", use_cpu=True, disable_tqdm=True, save_strategy="no", learning_rate=1e-6,
        per_device_train_batch_size=2, num_train_epochs=1, logging_strategy="no", remove_unused_columns=False, bf16=False,
    )  # fmt: skip
    rows: Any = pair_rows(8)
    trainer = PairTrainer(model=tiny_llama().bfloat16(), args=args, train_dataset=rows, data_collator=collate)
    attach(trainer, meter)
    trainer.train()
    found = [entry[SHARE] for entry in trainer.state.log_history if SHARE in entry]
    assert len(found) == 2
    assert min(found) > 0.95


class Wasteful(SGD):
    """Works in the memory of the gradients, as some optimisers do."""

    @override
    def step(self, closure: Any = None) -> Any:
        out = super().step(closure)
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.grad.zero_()
        return out


def test_gradients_that_the_optimizer_uses_up_are_looked_at_before_the_step() -> None:
    history = run(
        Weights(1024 * torch.ones(8).bfloat16(), make=lambda p: Wasteful(p, lr=1e-3)), LostUpdateMeter(every_n_updates=1)
    )
    assert history.shares == [1.0]


@pytest.mark.slow
@pytest.mark.parametrize("rounding", ["kahan", "stochastic"])
def test_O2_rounding_that_keeps_updates_leaves_fewer_weights_stuck(
    tiny_model: TinyModel, random_groups: RandomGroups, tmp_path: Path, rounding: Any
) -> None:
    pytest.importorskip("optimi" if rounding == "kahan" else "torchao")
    name: Any = "adamw" if rounding == "kahan" else "torchao_adamw_8bit"

    def stuck(**how: Any) -> float:
        settings = OptimizerSettings(name=name, learning_rate=3e-5, betas=(0.9, 0.99), schedule="constant", warmup=0, **how)
        meter = LostUpdateMeter(every_n_updates=20)
        trainer = quiet_trainer(callbacks=[meter], max_epochs=20, precision="bf16-true", limit_val_batches=0)
        trainer.fit(DPOModule(tiny_model(), optimizer=settings), loader(random_groups(8), tmp_path / "store", batch_size=2))
        return trainer.callback_metrics[STUCK].item()

    plain, kept = stuck(), stuck(rounding=rounding)
    assert plain > 0.9
    assert kept < 0.75 * plain


def test_mistakes_are_refused() -> None:
    with pytest.raises(ValueError, match="`elements_per_tensor` must be at least 1, got 0"):
        LostUpdateMeter(elements_per_tensor=0)
    with pytest.raises(ValueError, match="a ZeroOptimizer does not tell when it makes one. Leave the meter out: engines"):
        LostUpdateMeter().watch([type("ZeroOptimizer", (), {})()])


@pytest.mark.parametrize(
    ("precision", "dtype", "strategy", "watched"),
    [
        ("bf16-true", "float32", "auto", True),
        ("16-true", "float32", DDPStrategy(), True),
        (None, "bfloat16", "fsdp", True),
        ("bf16-mixed", "float32", "auto", False),
        (32, "auto", "auto", False),
        ("bf16-true", "float32", "deepspeed_stage_2", False),
    ],
)
def test_the_meter_of_lost_updates_is_there_where_weights_are_in_16_bit(
    precision: object, dtype: str, strategy: object, watched: bool
) -> None:
    assert bool(meter_for(precision, dtype, strategy)) is watched
