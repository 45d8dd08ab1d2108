"""The diagnostics under a transformers `Trainer`, or any subclass of it.

`attach(trainer, LikelihoodDisplacementTracker())` before `trainer.train()` is all; the diagnostics are the same objects that
Lightning's Trainer takes as callbacks. Evidence comes by one of three doors: `observe(self, PairObservation(...))` in one's own
`compute_loss`; `ObserveOutputs(extract)` attached beside the diagnostics, which reads what `compute_loss` returns; or `Probe`.
"""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, ClassVar, Protocol, runtime_checkable

import torch
from accelerate.optimizer import AcceleratedOptimizer  # type: ignore[import-untyped]
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, get_last_checkpoint
from typing_extensions import override

from lightning_pref.callbacks.diagnostic import Diagnostic
from lightning_pref.callbacks.monitor import TRAIN, VAL, Monitor
from lightning_pref.callbacks.observe_outputs import ObserveOutputs
from lightning_pref.integrations.looking_in import forwards_of, replaced
from lightning_pref.integrations.transformers_host import TransformersHost
from lightning_pref.observations import Observation, Observer, detached

STATE_FILE = "diagnostics.pt"

logger = logging.getLogger(__name__)


def attach(trainer: Trainer, *parts: Callback | ObserveForwards) -> DiagnosticsCallback:
    """Let diagnostics watch a transformers `Trainer`.

    While `trainer.train()` runs, `compute_loss` of this trainer and `backward` and `unscale_gradients` of its accelerator are
    looked in on; afterwards they are as they were. State is kept in the trainer's own checkpoints, as `diagnostics.pt`.

    Args:
        trainer: A transformers `Trainer` or a subclass, before `train()`.
        parts: Diagnostics, and what feeds them: `ObserveOutputs(extract)`, or a reader made for one trainer.

    Returns:
        The callback that drives them; `detach()` takes it off.
    """
    if _attached(trainer) is not None:
        raise ValueError(
            f"Diagnostics are attached to this {type(trainer).__name__} already. Give all of them to one call of `attach`, "
            "or take the others off first: `attach` returned what has `detach()`."
        )
    return DiagnosticsCallback(trainer, parts)


def observe(trainer: Trainer, observation: Observation, *, source: str | None = None) -> None:
    """Publish an observation to every diagnostic attached to a trainer; the line for one's own `compute_loss`.

    Does nothing with no diagnostic attached, and outside of `train()`.

    Args:
        trainer: The trainer, `self` in `compute_loss`.
        observation: The evidence.
        source: Where it comes from; `train` or `val` if not given.
    """
    attached = _attached(trainer)
    if attached is not None and attached.is_running:
        attached.deliver(observation, source or attached.stage)


def wants(trainer: Trainer, kind: type[Observation]) -> bool:
    """Whether any attached diagnostic consumes this kind, so that a loss can skip evidence nobody asked for."""
    attached = _attached(trainer)
    return attached is not None and attached.is_running and bool(attached.listeners(kind))


def _attached(trainer: Trainer) -> DiagnosticsCallback | None:
    return next((c for c in trainer.callback_handler.callbacks if isinstance(c, DiagnosticsCallback)), None)


@runtime_checkable
class Hearing(Protocol):
    """A diagnostic that takes observations from any trainer."""

    consumes: ClassVar[tuple[type[Observation], ...]]

    def receive(self, observation: Observation, source: str) -> None:
        """Take an observation."""


class ObserveForwards(ABC):
    """Turns what models return inside `compute_loss` into observations, where the loss itself hands nothing out.

    Such a reader knows the inside of one trainer, and is written for versions of it that it was tested with.
    """

    @abstractmethod
    def check(self, trainer: Trainer) -> None:
        """Raise if this is not a trainer, or not a version of it, that the reader knows."""

    @abstractmethod
    def models(self, trainer: Trainer) -> Sequence[nn.Module]:
        """Whose forward passes to look in on: models themselves, inside of what wraps them for several processes."""

    @abstractmethod
    def read(self, trainer: Trainer, outputs: Sequence[Any], batch: Mapping[str, Any]) -> Observation | None:
        """Find the evidence.

        Args:
            trainer: What trains.
            outputs: What the models returned during one call of `compute_loss`, in order.
            batch: What the call was given.
        """


class DiagnosticsCallback(TrainerCallback):
    """Drives diagnostics by the events of a transformers `Trainer`; made by `attach`.

    Args:
        trainer: What trains.
        parts: Diagnostics and what feeds them.
    """

    def __init__(self, trainer: Trainer, parts: Sequence[Callback | ObserveForwards]) -> None:
        self.trainer = trainer
        self.diagnostics = [_runnable(part) for part in parts if not isinstance(part, ObserveOutputs | ObserveForwards)]
        self.readers = [part for part in parts if isinstance(part, ObserveOutputs | ObserveForwards)]
        keys = [diagnostic.state_key for diagnostic in self.diagnostics]
        twice = sorted({key for key in keys if keys.count(key) > 1})
        if twice:
            raise ValueError(f"Two diagnostics share the name {twice[0]!r}, under which state is kept; give each its own.")
        for reader in self.readers:
            if isinstance(reader, ObserveForwards):
                reader.check(trainer)
        self.is_running = False
        self._host = TransformersHost(trainer, self)
        self._published: set[str] = set()
        self._batch: Any = None
        self._outputs: dict[str, Tensor] | None = None
        self._told_update = False
        self._checkpoint: Path | None = None  # that training resumes from
        self._hooks = ExitStack()
        # First in line: the loggers' callbacks, which come later, must be open still when the last values are logged.
        trainer.callback_handler.callbacks.insert(0, self)
        # `train` is the one place that knows which checkpoint is resumed, and where everything ends, errors included.
        self._train = replaced(trainer, "train", self._training)
        self._train.__enter__()

    def detach(self) -> None:
        """Take the diagnostics off the trainer."""
        self.trainer.remove_callback(self)
        self._train.__exit__(None, None, None)

    # Evidence in.

    @property
    def stage(self) -> str:
        """Source of what `compute_loss` computes now."""
        return TRAIN if self._host.module.training else VAL

    def listeners(self, kind: type[Observation]) -> list[Hearing]:
        """The diagnostics that consume a kind."""
        return [d for d in self.diagnostics if isinstance(d, Hearing) and issubclass(kind, d.consumes)]

    def deliver(self, observation: Observation, source: str) -> None:
        """Hand a detached observation to every diagnostic that consumes its class."""
        self._published.add(type(observation).__name__)
        evidence = detached(observation)
        with torch.no_grad():
            for listener in self.listeners(type(observation)):
                listener.receive(evidence, source)

    def end_round(self, source: str) -> None:
        """Tell every diagnostic that one measurement under this source is complete."""
        with torch.no_grad():
            for diagnostic in self.diagnostics:
                if isinstance(diagnostic, Monitor):
                    diagnostic.end_round(self._host, source)

    def published(self) -> list[str]:
        """Names of the kinds of observation seen so far."""
        return sorted(self._published)

    # Looking in.

    def _training(self, train: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:  # Any: transformers' own arguments
        resumed = args[0] if args else kwargs.get("resume_from_checkpoint")
        folder = get_last_checkpoint(self._host.folder) if resumed is True else resumed  # type: ignore[no-untyped-call]
        self._checkpoint = Path(folder) if folder else None
        with self._hooks:
            self._hooks.callback(self._end)
            return train(*args, **kwargs)

    def _begin(self) -> None:
        if self.trainer.state.is_hyper_param_search:
            raise ValueError("Diagnostics follow one run; a hyper-parameter search is many. Attach them to its best run instead.")
        optimizer = torch_optimizer(self.trainer.optimizer)
        self._restore()
        self._hooks.enter_context(replaced(self.trainer, "compute_loss", self._computing_loss))
        self._hooks.enter_context(replaced(self.trainer.accelerator, "backward", self._going_backward))
        self._hooks.enter_context(replaced(self.trainer.accelerator, "unscale_gradients", self._unscaling))
        self.is_running = True
        with torch.no_grad():
            for diagnostic in self.diagnostics:
                diagnostic.watch([optimizer])
                diagnostic.start(self._host)
                diagnostic.batch_begins()

    def _end(self) -> None:
        self.is_running = False
        self._batch, self._outputs, self._told_update = None, None, False
        for diagnostic in self.diagnostics:
            diagnostic.unwatch()

    def _computing_loss(self, compute_loss: Callable[..., Any], model: nn.Module, batch: Any, *args: Any, **kwargs: Any) -> Any:
        # A copy: losses add to their batch and take from it.
        seen = dict(batch) if isinstance(batch, Mapping) else batch
        asked_for_outputs = bool(args[0] if args else kwargs.get("return_outputs", False))
        reads_outputs = any(isinstance(reader, ObserveOutputs) for reader in self.readers)
        if reads_outputs and args:
            args = (True, *args[1:])
        elif reads_outputs:
            kwargs["return_outputs"] = True
        with forwards_of(self._watched()) as forwards:
            result = compute_loss(model, batch, *args, **kwargs)
        if reads_outputs and not isinstance(result, tuple):
            raise TypeError(
                f"ObserveOutputs reads what `compute_loss` returns for `return_outputs=True`; that of "
                f"{type(self.trainer).__name__} should return `(loss, outputs)`, and returned a {type(result).__name__}. "
                "Return both, or publish from inside: observe(self, PairObservation(...))."
            )
        loss, outputs = result if isinstance(result, tuple) else (result, None)
        with torch.no_grad():
            for reader in self.readers:
                observation = (
                    reader.extract(outputs, seen)
                    if isinstance(reader, ObserveOutputs)
                    else reader.read(self.trainer, forwards, seen)
                )
                if observation is not None:
                    self.deliver(observation, self.stage)
        if self.stage == TRAIN:
            self._batch, self._outputs = seen, {"loss": loss.detach()}
        return result if asked_for_outputs else loss

    def _watched(self) -> list[nn.Module]:
        deep = [reader for reader in self.readers if isinstance(reader, ObserveForwards)]
        return [model for reader in deep for model in reader.models(self.trainer)]

    def _going_backward(self, backward: Callable[..., Any], loss: Tensor, *args: Any, **kwargs: Any) -> Any:
        with torch.no_grad():
            for diagnostic in self.diagnostics:
                diagnostic.before_backward(self._host, loss.detach())
        return backward(loss, *args, **kwargs)

    def _unscaling(self, unscale_gradients: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        # Accelerate's first act in clipping, so that right after it gradients are complete, unscaled and not clipped.
        result = unscale_gradients(*args, **kwargs)
        self._before_update()
        return result

    def _before_update(self) -> None:
        if self._told_update:
            return
        self._told_update = True
        optimizer = torch_optimizer(self.trainer.optimizer)
        if self._overflowed(optimizer):
            return
        with torch.no_grad():
            for diagnostic in self.diagnostics:
                diagnostic.update_begins(self._host, optimizer)

    def _overflowed(self, optimizer: Any) -> bool:
        """Whether a loss scaler will skip this update. It asks the device itself; without one nothing is asked here."""
        if self.trainer.accelerator.scaler is None:
            return False
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        finite = torch.nn.utils.get_total_norm(gradients).isfinite().to(self._host.device)
        return bool(self._host.total((~finite).double()).item())

    def _after_batch(self) -> None:
        with torch.no_grad():
            for diagnostic in self.diagnostics:
                diagnostic.batch_ends(self._host, self._outputs, self._batch)
                diagnostic.batch_begins()
        self._batch, self._outputs = None, None

    # Events of the trainer.

    @override
    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.is_running:  # begun anew with smaller batches (`auto_find_batch_size`), and so with another optimiser
            for diagnostic in self.diagnostics:
                diagnostic.watch([torch_optimizer(self.trainer.optimizer)])
                diagnostic.batch_begins()

    @override
    def on_epoch_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if not self.is_running:  # not at `on_train_begin`, where the loggers' callbacks are not set up yet
            self._begin()

    @override
    def on_pre_optimizer_step(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        # For engines that clip by themselves, and tell accelerate nothing.
        self._before_update()

    @override
    def on_optimizer_step(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._told_update = False

    @override
    def on_substep_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._after_batch()

    @override
    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._after_batch()

    @override
    def on_epoch_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        with torch.no_grad():
            for diagnostic in self.diagnostics:
                diagnostic.end_epoch(self._host)

    @override
    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: Mapping[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        if not self.is_running:
            return
        # `eval_runtime`, or `eval_<set>_runtime` where several sets are evaluated one after the other.
        timed = next((key for key in metrics or {} if key.endswith("_runtime")), "eval_runtime")
        self._host.eval_prefix = timed.removesuffix("_runtime")
        with torch.no_grad():
            for diagnostic in self.diagnostics:
                diagnostic.end_validation(self._host)

    @override
    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        measured = {diagnostic.state_key: diagnostic.state_of_ranks() for diagnostic in self.diagnostics}
        if args.should_save:
            torch.save(measured, self._host.folder / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}" / STATE_FILE)

    @override
    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        with torch.no_grad():
            for diagnostic in self.diagnostics:
                diagnostic.finish(self._host)

    def _restore(self) -> None:
        folder, self._checkpoint = self._checkpoint, None
        if folder is None:
            return
        if not (folder / STATE_FILE).exists():
            logger.warning("%s holds no %s; the diagnostics begin anew at the step it resumes from.", folder, STATE_FILE)
            return
        saved = torch.load(folder / STATE_FILE, weights_only=True)
        for diagnostic in self.diagnostics:
            if diagnostic.state_key in saved:
                diagnostic.load_state_dict(saved[diagnostic.state_key])


def torch_optimizer(optimizer: Any) -> Any:  # Any: an engine's own optimiser may be of no class of torch
    """The optimiser inside accelerate's wrappers."""
    while isinstance(optimizer, AcceleratedOptimizer):
        optimizer = optimizer.optimizer
    return optimizer


def _runnable(part: object) -> Diagnostic:
    """A diagnostic that runs here, or an error that says what does."""
    name = type(part).__name__
    if not isinstance(part, Diagnostic):
        raise TypeError(
            f"`attach` takes diagnostics (RewardVarianceMonitor, SpikeAwareOptimizerReset, Probe, ...), ObserveOutputs and "
            f"readers, got a {name}, which needs Lightning's Trainer."
        )
    if isinstance(part, Observer) and not isinstance(part, Hearing):
        raise TypeError(f"{name} hears observations from Lightning's Trainer only; give it a `receive`, or make it a Monitor.")
    return part
