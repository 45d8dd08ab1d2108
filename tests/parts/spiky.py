"""A small regression whose gradients and batches spike where a test says so, and what it leaves behind."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn
from torch.optim import Optimizer
from typing_extensions import override

from lightning_pref.callbacks.spike_reset import SpikeAwareOptimizerReset

# A period that a test can live through several times.
SHORT_SPAM: dict[str, Any] = {"reset_every": 12, "warmup_steps": 5, "guard_steps": 3, "threshold": 20.0}

MakeOptimizer = Callable[[Any], Optimizer]


def adamw(parameters: Any, **options: Any) -> Optimizer:
    return torch.optim.AdamW(parameters, **{"lr": 0.01, "weight_decay": 0.0, **options})


def short_spam(**changes: Any) -> SpikeAwareOptimizerReset:
    return SpikeAwareOptimizerReset(**{**SHORT_SPAM, **changes})


def evidence(**changes: Any) -> SpikeAwareOptimizerReset:
    return SpikeAwareOptimizerReset("evidence", **{"guard_steps": 3, "warmup_steps": 6, **changes})


def actions(callback: SpikeAwareOptimizerReset) -> list[tuple[int, str]]:
    return [(event["update"], event["action"]) for event in callback.events]


class Regression(L.LightningModule):
    """Two layers that learn a linear map; gradients of the updates in `spikes` are multiplied after backward."""

    def __init__(
        self,
        optimizer: MakeOptimizer = adamw,
        *,
        spikes: Sequence[int] = (),
        size: float = 1e4,
        schedule: Callable[[Optimizer], Any] | None = None,
    ) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.layers = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 1))
        self.make_optimizer = optimizer
        self.make_schedule = schedule
        self.spikes = set(spikes)
        self.size = size
        self.losses: list[float] = []

    @override
    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        loss = (self.layers(batch[:, :6]) - batch[:, 6:]).square().mean()
        self.losses.append(float(loss.detach()))
        return loss

    @override
    def on_after_backward(self) -> None:
        if self.trainer.global_step + 1 in self.spikes:
            for parameter in self.parameters():
                assert parameter.grad is not None
                parameter.grad.mul_(self.size)

    @override
    def configure_optimizers(self) -> Any:
        optimizer = self.make_optimizer(self.parameters())
        if self.make_schedule is None:
            return optimizer
        return [optimizer], [{"scheduler": self.make_schedule(optimizer), "interval": "step"}]


class TwoOptimizers(Regression):
    """Manual optimisation: the first layer in every batch, the last one in every third, or every so many."""

    def __init__(self, *, head_every: int = 3) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.head_every = head_every

    @override
    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        body, head = self.optimizers()  # type: ignore[misc]
        self.manual_backward(loss)
        body.step()
        if (batch_idx + 1) % self.head_every == 0:
            head.step()
        body.zero_grad()
        head.zero_grad()
        return loss.detach()

    @override
    def configure_optimizers(self) -> Any:
        return [adamw(self.layers[0].parameters()), adamw(self.layers[2].parameters())]


def batches(num_updates: int, *, rows: int = 8, seed: int = 0) -> list[Tensor]:
    """Inputs and targets of a noisy linear map, [rows, 7] each."""
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(num_updates, rows, 6, generator=generator)
    noise = 0.1 * torch.randn(num_updates, rows, 1, generator=generator)
    targets = inputs.sum(-1, keepdim=True) / 3 + noise
    return list(torch.cat([inputs, targets], -1))


class Resumable:
    """A loader that knows where it is, so that a run can be stopped within an epoch."""

    def __init__(self, data: Sequence[Any]) -> None:
        self.data = data
        self.position = 0

    def __len__(self) -> int:
        return len(self.data)

    def __iter__(self) -> Iterator[Any]:
        while self.position < len(self.data):
            self.position += 1
            yield self.data[self.position - 1]
        self.position = 0

    def state_dict(self) -> dict[str, int]:
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.position = state["position"]


def fit(
    folder: Path,
    module: L.LightningModule,
    callbacks: Sequence[Callback],
    data: Sequence[Any],
    *,
    ckpt_path: str | None = None,
    **settings: Any,
) -> L.Trainer:
    options: dict[str, Any] = {"max_epochs": 1, "log_every_n_steps": 5, "enable_checkpointing": False, **settings}
    trainer = L.Trainer(
        accelerator="cpu",
        devices=1,
        logger=CSVLogger(folder),
        callbacks=list(callbacks),
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        **options,
    )
    trainer.fit(module, Resumable(data), ckpt_path=ckpt_path, weights_only=ckpt_path is not None)
    return trainer


def weights(module: nn.Module) -> Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in module.parameters()])


class Gradients(Callback):
    """Notes the gradients of every update as the callbacks before it left them, and the learning rates."""

    def __init__(self) -> None:
        self.before_step: list[Tensor] = []
        self.rates: list[tuple[float, float]] = []
        self.after_batch: list[tuple[float, float]] = []

    @override
    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Optimizer) -> None:
        grads = [p.grad for p in pl_module.parameters() if p.grad is not None]
        self.before_step.append(torch.cat([g.flatten().clone() for g in grads]) if grads else torch.zeros(0))
        group = optimizer.param_groups[0]
        self.rates.append((float(group["lr"]), float(group.get("weight_decay", 0.0))))

    @override
    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        group = trainer.optimizers[0].param_groups[0]
        self.after_batch.append((float(group["lr"]), float(group.get("weight_decay", 0.0))))


class After(Callback):
    """Weights, moments and step counter after every batch."""

    def __init__(self) -> None:
        self.weights: list[Tensor] = []
        self.first: list[Tensor] = []
        self.second: list[Tensor] = []
        self.steps: list[int] = []

    @override
    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        states = list(trainer.optimizers[0].state.values())
        self.weights.append(weights(pl_module))
        self.first.append(torch.cat([state["exp_avg"].flatten() for state in states]))
        self.second.append(torch.cat([state["exp_avg_sq"].flatten() for state in states]))
        self.steps.append(int(states[0]["step"]))
