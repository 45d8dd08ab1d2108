"""What every diagnostic shares: events of whatever trains, executed updates, alerts, state."""

from __future__ import annotations

import logging
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import lightning as L
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import Callback
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle
from typing_extensions import override

from lightning_pref.alerts import Alert
from lightning_pref.callbacks.hosts import Host, LightningHost
from lightning_pref.judge import Judge, alert_rules
from lightning_pref.measures.updates import was_executed

STATE_VERSION = 1
# Updates between two reports where nobody says how many, and the trainer logs no metrics of its own.
FALLBACK_CADENCE = 50

logger = logging.getLogger(__name__)


class Key(NamedTuple):
    """A logged quantity."""

    name: str
    text: str
    unit: str = ""


class Diagnostic(Callback):
    """A callback that looks at training, under Lightning's Trainer or, by way of a `Host`, under another one.

    A diagnostic overrides the events below. Lightning's hooks are mapped onto them here; other trainers call them directly.
    Events are called on every rank.

    Args:
        thresholds: Limits of alerts other than those in `ALERT_RULES`, by rule name; `nan` turns a rule off.
    """

    prefix: ClassVar[str]
    keys: ClassVar[tuple[Key, ...]] = ()

    def __init__(self, *, thresholds: Mapping[str, float] | None = None) -> None:
        self.updates = 0  # executed; a step that a loss scaler skips is none
        self.alerts: list[Alert] = []  # of this process's run
        self._judge = Judge(alert_rules(self.prefix, thresholds))
        self._host: LightningHost | None = None
        self._handle: RemovableHandle | None = None
        self._counts_calls = False
        self._updates_before_batch = 0

    # Events.

    def start(self, host: Host) -> None:
        """Before the first batch, or the first after a resume."""

    def before_backward(self, host: Host, loss: Tensor) -> None:
        """The loss of a micro-batch is known, as the trainer divides it for accumulation."""

    def before_update(self, host: Host, optimizer: Optimizer) -> None:
        """Gradients of an update are complete and unscaled; they are not clipped yet, where the trainer can tell."""

    def after_batch(self, host: Host, outputs: Any, batch: Any, updated: bool) -> None:  # Any: the user's own
        """A micro-batch is done; `updated` says whether an update was executed with it."""

    def end_epoch(self, host: Host) -> None:
        """All training batches of an epoch are done."""

    def end_validation(self, host: Host) -> None:
        """All validation batches are done."""

    def finish(self, host: Host) -> None:
        """Training has ended."""

    # For subclasses.

    def judge(
        self,
        host: Host,
        values: Mapping[str, float],
        *,
        source: str = "train",
        evidence: Callable[[str], str] | None = None,
    ) -> None:
        """Raise the alerts that these values give reason for.

        Args:
            host: What trains.
            values: Measurements by key; equal on every rank.
            source: Where they come from.
            evidence: Gives, for a rule's name, more than the numbers.
        """
        for alert in self._judge.alerts(values, step=host.step, source=source, evidence=evidence):
            self.raise_alert(host, alert)

    def raise_alert(self, host: Host, alert: Alert) -> None:
        """Keep an alert and bring it to where people look."""
        self.alerts.append(alert)
        host.say(alert)

    def measured_state(self) -> dict[str, Any]:  # Any: plain data for a checkpoint
        """What was measured, as plain data and CPU tensors; never a constructor argument."""
        return {}

    def load_measured_state(self, state: Mapping[str, Any]) -> None:
        """Take up what `measured_state` gave."""

    def is_due(self, every: int) -> bool:
        """Whether the count of updates reached a multiple of `every` with this micro-batch, in which several may be made."""
        return self.updates // every > self._updates_before_batch // every

    def cadence(self, host: Host, every_n_updates: int | None = None) -> int:
        """Updates between two reports: so many if given, else the trainer's own logging interval."""
        return every_n_updates or host.log_every or FALLBACK_CADENCE

    # Counting of updates.

    def watch(self, optimizers: Sequence[object]) -> None:
        """Count the updates that the first optimiser really executes."""
        self.unwatch()
        first = optimizers[0] if optimizers else None
        if isinstance(first, Optimizer):
            self._handle = first.register_step_post_hook(self._count)
        else:  # an engine's own, which tells nobody: count what it is asked for
            self._counts_calls = first is not None

    def unwatch(self) -> None:
        """Let go of the optimiser."""
        if self._handle is not None:
            self._handle.remove()
        self._handle, self._counts_calls = None, False

    def _count(self, optimizer: Optimizer, *_: object) -> None:
        self.updates += int(was_executed(optimizer))

    def batch_begins(self) -> None:
        """Note where the count of updates stands; a trainer's adapter calls it before each micro-batch."""
        self._updates_before_batch = self.updates

    def batch_ends(self, host: Host, outputs: Any, batch: Any) -> None:  # Any: the user's own
        """Pass `after_batch` on with what the count of updates says."""
        self.after_batch(host, outputs, batch, self.updates > self._updates_before_batch)

    def update_begins(self, host: Host, optimizer: Optimizer) -> None:
        """Pass `before_update` on."""
        self.updates += int(self._counts_calls)
        self.before_update(host, optimizer)

    # Lightning.

    def _lightning(self, trainer: L.Trainer, pl_module: L.LightningModule) -> LightningHost:
        if self._host is None or self._host.trainer is not trainer:
            self._host = LightningHost(trainer, pl_module)
        return self._host

    @override
    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.watch(trainer.optimizers)
        with torch.no_grad():
            self.start(self._lightning(trainer, pl_module))

    @override
    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int) -> None:
        self.batch_begins()

    @override
    def on_before_backward(self, trainer: L.Trainer, pl_module: L.LightningModule, loss: Tensor) -> None:
        with torch.no_grad():
            self.before_backward(self._lightning(trainer, pl_module), loss.detach())

    @override
    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Optimizer) -> None:
        with torch.no_grad():
            self.update_begins(self._lightning(trainer, pl_module), optimizer)

    @override
    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        with torch.no_grad():
            self.batch_ends(self._lightning(trainer, pl_module), outputs, batch)

    @override
    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        with torch.no_grad():
            self.end_epoch(self._lightning(trainer, pl_module))

    @override
    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not trainer.sanity_checking:
            with torch.no_grad():
                self.end_validation(self._lightning(trainer, pl_module))

    @override
    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        with torch.no_grad():
            self.finish(self._lightning(trainer, pl_module))

    @override
    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self._let_go()

    @override
    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        self._let_go()

    def _let_go(self) -> None:
        self.unwatch()
        self._host = None

    # State.

    @override
    def state_dict(self) -> dict[str, Any]:
        return {
            "version": STATE_VERSION,
            "updates": self.updates,
            "judge": self._judge.state(),
            "measured": self.measured_state(),
        }

    def state_of_ranks(self) -> dict[str, Any]:
        """`state_dict` with what each process measured, for a checkpoint that one of them writes; every rank must come by."""
        state = self.state_dict()
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            ranks: list[Any] = [None] * dist.get_world_size()
            dist.all_gather_object(ranks, state["measured"])
            state["ranks"] = ranks
        return state

    @override
    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        # Lightning keeps the state of the first process alone, and each has measured rows of its own.
        if trainer.world_size > 1 and self.state_key in checkpoint.get("callbacks", {}):
            checkpoint["callbacks"][self.state_key] = self.state_of_ranks()

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if state_dict.get("version") != STATE_VERSION:
            raise ValueError(
                f"The checkpoint holds state of version {state_dict.get('version')!r} of {type(self).__name__}; this release "
                f"reads version {STATE_VERSION}. Resume with the release that wrote it, or without this callback."
            )
        self.updates = state_dict["updates"]
        self._judge.load(state_dict["judge"])
        self.load_measured_state(self._own_part(state_dict))

    def _own_part(self, state_dict: Mapping[str, Any]) -> Mapping[str, Any]:
        """What this process measured itself, where the run goes on with as many processes."""
        ranks = state_dict.get("ranks", [state_dict["measured"]])
        together = dist.is_available() and dist.is_initialized()
        rank, world_size = (dist.get_rank(), dist.get_world_size()) if together else (0, 1)
        if len(ranks) == world_size:
            own: Mapping[str, Any] = ranks[rank]
            return own
        logger.warning(
            "The checkpoint holds what %s measured in %d process(es), and the run goes on with %d: all go on from what the first "
            "one measured, so that its next report is inexact, and pairs that only others saw begin anew.",
            type(self).__name__,
            len(ranks),
            world_size,
        )
        first: Mapping[str, Any] = state_dict["measured"]
        return first


class PeriodicDiagnostic(Diagnostic):
    """A diagnostic that reports every so many updates, and on what is left when training ends.

    Args:
        every_n_updates: Updates between two reports; the trainer's own logging interval if not given.
        thresholds: Limits of alerts other than those in `ALERT_RULES`.
    """

    def __init__(self, *, every_n_updates: int | None = None, thresholds: Mapping[str, float] | None = None) -> None:
        if every_n_updates is not None and every_n_updates < 1:
            raise ValueError(f"`every_n_updates` must be at least 1, got {every_n_updates!r}.")
        super().__init__(thresholds=thresholds)
        self.every_n_updates = every_n_updates
        self._reported_at = 0

    @abstractmethod
    def tell(self, host: Host) -> None:
        """Log what was measured since the last report, and raise the alerts it gives reason for."""

    def has_news(self) -> bool:
        """Whether the end of training finds something that no report has told yet."""
        return self.updates > self._reported_at

    @override
    def watch(self, optimizers: Sequence[object]) -> None:
        super().watch(optimizers)
        self._reported_at = self.updates

    @override
    def after_batch(self, host: Host, outputs: Any, batch: Any, updated: bool) -> None:
        if updated and self.is_due(self.cadence(host, self.every_n_updates)):
            self._report(host)

    @override
    def finish(self, host: Host) -> None:
        if self.has_news():
            self._report(host)

    def _report(self, host: Host) -> None:
        self._reported_at = self.updates
        self.tell(host)
