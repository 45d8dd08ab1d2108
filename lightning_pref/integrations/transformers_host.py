"""A transformers `Trainer`, as a diagnostic sees it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate.utils import send_to_device  # type: ignore[import-untyped]
from torch import Tensor, nn
from transformers import PrinterCallback, ProgressCallback, Trainer
from transformers.integrations.integration_utils import TensorBoardCallback
from transformers.trainer_utils import IntervalStrategy

from lightning_pref.alerts import Alert
from lightning_pref.callbacks.hosts import as_floats, markdown, record_alert
from lightning_pref.observations import Observation, PairObservation, RewardObservation, required_fields

VAL_PREFIX = "val/"
# They would print a line for every report of every diagnostic.
CONSOLE_CALLBACKS = (PrinterCallback, ProgressCallback)
# Trainers of TRL for which `lightning_pref.integrations.trl` has a reader. By name: TRL need not be installed.
READERS: dict[str, tuple[str, type[Observation]]] = {
    "DPOTrainer": ("ObserveDPO", PairObservation),
    "RewardTrainer": ("ObserveRewards", RewardObservation),
}


class Audience(Protocol):
    """The diagnostics of one trainer, as those who have evidence for them see them."""

    def deliver(self, observation: Observation, source: str) -> None:
        """Hand an observation to every diagnostic that consumes its class."""

    def end_round(self, source: str) -> None:
        """Tell every diagnostic that one measurement under this source is complete."""

    def published(self) -> list[str]:
        """Names of the kinds of observation seen so far."""


class TransformersHost:
    """A transformers `Trainer`: implements `Host`.

    Numbers go to `state.log_history` and to the callbacks that report to loggers, at `global_step`, but not to the console;
    keys of validation are spelt as transformers spells them (`eval_displacement/share`).

    Args:
        trainer: What trains.
        audience: Where observations go.
    """

    def __init__(self, trainer: Trainer, audience: Audience) -> None:
        self.trainer = trainer
        self.audience = audience
        self.folder = Path(str(trainer.args.output_dir))
        self.eval_prefix = "eval"  # of the evaluation that ended last; one of several sets has its own

    @property
    def module(self) -> nn.Module:
        assert self.trainer.model is not None  # its constructor sees to that
        return self.trainer.model

    @property
    def step(self) -> int:
        return int(self.trainer.state.global_step)

    @property
    def log_every(self) -> int:
        state, strategy = self.trainer.state, self.trainer.args.logging_strategy
        if strategy == IntervalStrategy.STEPS:
            return int(state.logging_steps)
        if strategy == IntervalStrategy.EPOCH:
            return max(1, math.ceil(state.max_steps / max(1, state.num_train_epochs)))
        return 0

    @property
    def scaler(self) -> torch.amp.GradScaler | None:
        scaler: torch.amp.GradScaler | None = self.trainer.accelerator.scaler
        return scaler if scaler is not None and scaler.is_enabled() else None

    @property
    def device(self) -> torch.device:
        device: torch.device = self.trainer.args.device
        return device

    @property
    def rank(self) -> int:
        return int(self.trainer.accelerator.process_index)

    @property
    def world_size(self) -> int:
        return int(self.trainer.accelerator.num_processes)

    def log(self, values: Mapping[str, float | Tensor]) -> None:
        entry = {self._spelt(key): value for key, value in as_floats(values).items()}
        state, handler = self.trainer.state, self.trainer.callback_handler
        state.log_history.append({**entry, "epoch": state.epoch, "step": state.global_step})
        # Not by `trainer.log`: TRL's adds its own averages to the entry and starts them anew; not by the handler's event
        # either, which takes back the order to log that the trainer is about to carry out.
        for callback in handler.callbacks:
            if not isinstance(callback, CONSOLE_CALLBACKS):
                callback.on_log(
                    self.trainer.args,
                    state,
                    self.trainer.control,
                    logs=dict(entry),
                    model=handler.model,
                    processing_class=handler.processing_class,
                    optimizer=handler.optimizer,
                    lr_scheduler=handler.lr_scheduler,
                    train_dataloader=handler.train_dataloader,
                    eval_dataloader=handler.eval_dataloader,
                )

    def _spelt(self, key: str) -> str:
        return f"{self.eval_prefix}_{key.removeprefix(VAL_PREFIX)}" if key.startswith(VAL_PREFIX) else key

    def log_text(self, tag: str, text: str) -> None:
        for callback in self.trainer.callback_handler.callbacks:
            if isinstance(callback, TensorBoardCallback) and callback.tb_writer is not None:  # None on ranks other than 0
                callback.tb_writer.add_text(tag, text, self.step)

    def say(self, alert: Alert) -> None:
        self.log_text(f"alerts/{alert.name}", markdown(alert))
        if self.rank == 0:
            record_alert(alert, self.folder)

    def move(self, batch: Any) -> Any:  # Any: a batch of the user's own
        return send_to_device(batch, self.device)

    def forward_context(self) -> AbstractContextManager[Any]:
        context: AbstractContextManager[Any] = self.trainer.accelerator.autocast()
        return context

    def total(self, values: Tensor) -> Tensor:
        if self.world_size == 1:
            return values
        reduced = self.trainer.accelerator.reduce(values.to(self.device), reduction="sum")
        assert isinstance(reduced, Tensor)
        return reduced

    def pass_over(self) -> Callable[[], None]:
        scheduler = self.trainer.lr_scheduler
        if scheduler is None:
            return lambda: None
        vars(scheduler)["step"] = lambda *_, **__: None

        def release() -> None:
            vars(scheduler).pop("step", None)

        return release

    def publish(self, observation: Observation, source: str) -> None:
        self.audience.deliver(observation, source)

    def end_round(self, source: str) -> None:
        self.audience.end_round(source)

    def published(self) -> list[str]:
        return self.audience.published()

    def wiring(self, diagnostic: str, kinds: Sequence[type[Observation]]) -> str:
        call = f"{kinds[0].__name__}({', '.join(f'{name}=...' for name in required_fields(kinds[0]))})"
        reader = reader_of(self.trainer, kinds)
        if reader:
            return (
                f"Let it be read from TRL's trainer:   attach(trainer, {diagnostic}(...), {reader}())\n"
                f"with:                                from lightning_pref.integrations.trl import {reader}"
            )
        attached = f"attach(trainer, {diagnostic}(...), ObserveOutputs(lambda out, batch: {call}))"
        return (
            f"Publish one from your compute_loss:  observe(self, {call})\n"
            f"or, without editing the trainer:     {attached}\n"
            "with:                                from lightning_pref.integrations.transformers import attach, observe"
        )


def reader_of(trainer: Trainer, kinds: Sequence[type[Observation]]) -> str | None:
    """Name of the reader made for this trainer that finds one of these kinds, or `None` where there is none."""
    names = (cls.__name__ for cls in type(trainer).__mro__ if cls.__module__.split(".")[0] == "trl")
    found = (READERS[name] for name in names if name in READERS)
    return next((reader for reader, kind in found if kind in kinds), None)
