"""What trains, seen by a diagnostic: the little it needs to know, so that it runs under any trainer."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol

import lightning as L
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor, nn

from lightning_pref.alerts import Alert, Level
from lightning_pref.escaping import in_html, in_markdown, on_terminal
from lightning_pref.observations import Observation, end_round, observe, published_kinds, required_fields

ALERTS_FILE = "alerts.jsonl"
# Interval of a schedule that is not to be stepped; no loop has it.
HELD = "held"

logger = logging.getLogger("lightning_pref.alerts")

_LOG_LEVELS: dict[Level, int] = {"info": logging.INFO, "warning": logging.WARNING, "critical": logging.CRITICAL}


class Host(Protocol):
    """Lightning's Trainer, or transformers', as a diagnostic sees it."""

    @property
    def module(self) -> nn.Module:
        """What score functions get: the LightningModule, or the transformers model."""

    @property
    def step(self) -> int:
        """The x axis of this trainer's loggers."""

    @property
    def log_every(self) -> int:
        """Updates between two entries of this trainer's own metrics; 0 where it logs none."""

    @property
    def device(self) -> torch.device:
        """Where batches and statistics live."""

    @property
    def rank(self) -> int:
        """Of this process, 0 is first."""

    @property
    def world_size(self) -> int:
        """Number of processes."""

    @property
    def scaler(self) -> torch.amp.GradScaler | None:
        """What guards against overflows of float16 by scaling the loss, where something does."""

    def log(self, values: Mapping[str, float | Tensor]) -> None:
        """Hand values to every logger, at `step`. Tensors are fetched from the device together, once."""

    def log_text(self, tag: str, text: str) -> None:
        """Hand a Markdown text to the loggers that show text."""

    def say(self, alert: Alert) -> None:
        """Bring an alert to the console, to loggers that show text, and to `alerts.jsonl`."""

    def move(self, batch: Any) -> Any:  # Any: a batch of the user's own
        """The batch on this process's device."""

    def forward_context(self) -> AbstractContextManager[Any]:
        """The precision context that training's forward passes run in."""

    def total(self, values: Tensor) -> Tensor:
        """The sum over all processes, on every one of them; every process must come by."""

    def pass_over(self) -> Callable[[], None]:
        """Have the trainer make nothing of the coming update, whose gradients are gone; gives what ends that.

        Schedules of the learning rate that follow the updates do not count it.
        """

    def publish(self, observation: Observation, source: str) -> None:
        """Hand an observation to every diagnostic attached to the same trainer that consumes its class."""

    def end_round(self, source: str) -> None:
        """Tell every diagnostic that all evidence of one measurement has been published under this source."""

    def published(self) -> list[str]:
        """Names of the kinds of observation that were published so far, for the error on silence."""

    def wiring(self, diagnostic: str, kinds: Sequence[type[Observation]]) -> str:
        """How observations of these kinds are fed to a diagnostic under this trainer, for the error on silence."""


class LightningHost:
    """A Lightning Trainer and its module."""

    def __init__(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self.trainer = trainer
        self._module = module
        self.folder = alerts_folder(trainer)

    @property
    def module(self) -> L.LightningModule:
        return self._module

    @property
    def step(self) -> int:
        return self.trainer.global_step

    @property
    def log_every(self) -> int:
        every: int = self.trainer.log_every_n_steps  # type: ignore[attr-defined]  # Lightning sets it outside __init__
        return every

    @property
    def device(self) -> torch.device:
        return self._module.device

    @property
    def rank(self) -> int:
        return self.trainer.global_rank

    @property
    def world_size(self) -> int:
        return self.trainer.world_size

    @property
    def scaler(self) -> torch.amp.GradScaler | None:
        scaler: torch.amp.GradScaler | None = getattr(self.trainer.precision_plugin, "scaler", None)
        return scaler if scaler is not None and scaler.is_enabled() else None

    def log(self, values: Mapping[str, float | Tensor]) -> None:
        numbers = as_floats(values)
        # Straight to the loggers: `log` keeps only what falls on a logging step, and is not allowed in every hook.
        for sink in self.trainer.loggers:
            sink.log_metrics(numbers, step=self.step)
        # Beside it for those who watch `callback_metrics`: early stopping, checkpoints by a monitored value.
        self.trainer.callback_metrics.update({key: torch.tensor(value) for key, value in numbers.items()})

    def log_text(self, tag: str, text: str) -> None:
        for sink in self.trainer.loggers:
            if isinstance(sink, TensorBoardLogger) and self.rank == 0:
                sink.experiment.add_text(tag, text, self.step)

    def say(self, alert: Alert) -> None:
        self.log_text(f"alerts/{alert.name}", markdown(alert))
        if self.rank == 0:
            record_alert(alert, self.folder)

    def move(self, batch: Any) -> Any:  # Any: a batch of the user's own
        return self.trainer.strategy.batch_to_device(batch)

    def forward_context(self) -> AbstractContextManager[Any]:
        return self.trainer.precision_plugin.forward_context()

    def total(self, values: Tensor) -> Tensor:
        if self.world_size == 1:
            return values
        reduced = self.trainer.strategy.reduce(values.to(self.device), reduce_op="sum")
        assert isinstance(reduced, Tensor)
        return reduced

    def pass_over(self) -> Callable[[], None]:
        trainer = self.trainer
        # The loop steps the schedules whose interval is the word for what has just ended.
        held = [config for config in trainer.lr_scheduler_configs if config.interval == "step"]
        for config in held:
            config.interval = HELD
        clip_again = self.leave_unclipped()

        def release() -> None:
            for config in held:
                config.interval = "step"
            clip_again()

        return release

    def leave_unclipped(self) -> Callable[[], None]:
        """Have Lightning clip nothing in the coming update, whose gradients are gone; gives what ends that.

        Of gradients that are not there torch can take the norm, but it cannot clip them by value.
        """
        trainer = self.trainer
        clip_value = trainer.gradient_clip_val
        trainer.gradient_clip_val = None

        def clip_again() -> None:
            trainer.gradient_clip_val = clip_value

        return clip_again

    def publish(self, observation: Observation, source: str) -> None:
        observe(self._module, observation, source=source)

    def end_round(self, source: str) -> None:
        end_round(self._module, source=source)

    def published(self) -> list[str]:
        return published_kinds(self.trainer)

    def wiring(self, diagnostic: str, kinds: Sequence[type[Observation]]) -> str:
        call = f"{kinds[0].__name__}({', '.join(f'{name}=...' for name in required_fields(kinds[0]))})"
        return (
            f"Publish one from your step:      observe(self, {call})\n"
            f"or, without editing the module:  Trainer(callbacks=[{diagnostic}(...), ObserveOutputs(lambda out, batch: {call})])"
        )


def alerts_folder(trainer: L.Trainer) -> Path | None:
    """Where a run's `alerts.jsonl` lies, `None` where it has none; every rank must come by."""
    # The trainer's own property asks rank 0 for the folder. Without loggers nothing is written.
    folder = trainer.log_dir or trainer.default_root_dir
    return Path(folder) if trainer.loggers else None


def as_floats(values: Mapping[str, float | Tensor]) -> dict[str, float]:
    """Numbers of the host, the tensors among them fetched in one copy."""
    tensors = {key: value.detach().reshape(()) for key, value in values.items() if isinstance(value, Tensor)}
    # MPS has no float64; elsewhere a step number or a large sum keeps all its digits.
    wide = [value.float() if value.device.type == "mps" else value.double() for value in tensors.values()]
    fetched = torch.stack([value.to(wide[0].device) for value in wide]).tolist() if wide else []
    on_host = dict(zip(tensors, fetched, strict=True))
    return {key: on_host[key] if key in on_host else float(value) for key, value in values.items()}


def markdown(alert: Alert) -> str:
    """An alert as TensorBoard shows it."""
    return (
        f"**{alert.level}: {in_markdown(alert.name)}** ({in_markdown(alert.source)}), since step {alert.since_step}\n\n"
        f"{in_html(alert.evidence)}\n\n*What to change:* {in_html(alert.advice)}"
    )


def record_alert(alert: Alert, folder: Path | None) -> None:
    """Say it on the console, and add it to the run's `alerts.jsonl` where the run has a folder."""
    logger.log(_LOG_LEVELS[alert.level], "%s", "\n".join(map(on_terminal, alert.text().split("\n"))))
    if folder is None:
        return
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ALERTS_FILE).open("a", encoding="utf-8") as file:
        file.write(json.dumps(alert.as_dict()) + "\n")
