"""Keeps a loss or a gradient that is no number out of the weights."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import lightning as L
import torch
from lightning.pytorch.callbacks import LearningRateMonitor
from torch import Tensor
from torch.optim import Optimizer
from typing_extensions import override

from lightning_pref.callbacks.diagnostic import Diagnostic, Key, PeriodicDiagnostic
from lightning_pref.callbacks.hosts import Host
from lightning_pref.callbacks.optimizer_state import local
from lightning_pref.callbacks.row_ids import Rows, group_rows, rows_as_text, rows_of_all_ranks
from lightning_pref.callbacks.update_parts import drop_gradients, local_gradients

# Names that wrappers put between those of the modules.
WRAPPERS = ("_fsdp_wrapped_module.", "_checkpoint_wrapped_module.", "_orig_mod.")


@dataclass
class _MicroBatch:
    """What is known of one micro-batch of the coming update."""

    rows: Tensor | None
    losses: list[Tensor] = field(default_factory=list)  # on the device

    def is_bad(self) -> bool:
        return not all(bool(loss.isfinite().all()) for loss in self.losses)


class _Finding(NamedTuple):
    """What is not finite in an update, over all processes."""

    bad_losses: int
    losses: int
    bad_parameters: tuple[str, ...]
    parameters: int

    def text(self) -> str:
        parts = []
        if self.bad_losses:
            of = f"in {self.bad_losses} of {self.losses} micro-batches" if self.losses > 1 else "of its only micro-batch"
            parts.append(f"the loss {of} is nan or infinite")
        if self.bad_parameters:
            parts.append(
                f"the gradient of {len(self.bad_parameters)} of {self.parameters} parameters is nan or infinite, the first of "
                f"them {self.bad_parameters[0]}"
            )
        return ", and ".join(parts)


class NonFiniteGuard(PeriodicDiagnostic):
    """Watches every update for a loss or a gradient that is nan or infinite.

    Needs: nothing of the module.
    Logs: `non_finite/...` (see `keys`).
    Changes: skips such an update: weights, moments, counters of the optimiser and learning-rate schedules that follow the
    updates stay as they are, bit for bit, and so does what counts executed updates. The trainer's `global_step` counts it, as
    it counts a step that a loss scaler skips. After `stop_after` such updates in a row the run ends with an error.

    The decision is the same on every process and costs one number from the device per update. It is taken before any other
    diagnostic looks at the gradients, so that no spike detector learns from them. What a loss scaler skips because of an
    overflow of its own is not counted here; the schedules are held all the same. With an optimiser of an engine (DeepSpeed),
    whose gradients nobody sees and whose step nobody can skip, only the loss is judged, and the run ends at the first bad one.

    Args:
        stop_after: Skipped updates in a row that end the run; `None` for never.
        rows: Gives the row ids of a batch, for the message; our own batches need no such function.
        max_events: Latest events that are kept.
        every_n_updates: Updates between two reports; the trainer's own logging interval if not given.
        thresholds: Limits of alerts other than those in `ALERT_RULES`.
    """

    prefix = "non_finite"
    keys = (
        Key("non_finite/skipped", "Updates skipped since the last report, as a loss or gradient was not finite.", "updates"),
        Key("non_finite/in_a_row", "Updates skipped one after the other, up to now.", "updates"),
    )

    def __init__(
        self,
        *,
        stop_after: int | None = 5,
        rows: Rows | None = None,
        max_events: int = 20,
        every_n_updates: int | None = None,
        thresholds: Mapping[str, float] | None = None,
    ) -> None:
        if stop_after is not None and stop_after < 1:
            raise ValueError(f"`stop_after` must be at least 1, or None for never, got {stop_after!r}.")
        super().__init__(every_n_updates=every_n_updates, thresholds=thresholds)
        self.stop_after = stop_after
        self.rows = rows or group_rows
        self.max_events = max_events
        self.in_a_row = 0
        self.events: list[dict[str, Any]] = []  # Any: strings, numbers, lists of row ids
        self._skipped = 0  # since the last report
        self._micro_batches: list[_MicroBatch] = []
        self._is_window_over = False
        self._release: Callable[[], None] | None = None

    # Following the run.

    @override
    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        # Before all others that look at gradients, wherever the user has put it; and schedules go on before they are logged.
        there: list[Any] = trainer.callbacks  # type: ignore[attr-defined]  # Lightning sets it outside __init__
        others = [c for c in there if isinstance(c, (Diagnostic, LearningRateMonitor)) and c is not self]
        first = min((there.index(other) for other in others), default=len(there))
        if there.index(self) > first:  # never back: Lightning is going through this list, and would leave one out
            there.remove(self)
            there.insert(first, self)

    @override
    def batch_begins(self) -> None:
        super().batch_begins()
        self._end_passing()
        if self._is_window_over:
            self._micro_batches, self._is_window_over = [], False

    @override
    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int) -> None:
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
        rows = self.rows(batch)
        self._micro_batches.append(_MicroBatch(None if rows is None else torch.as_tensor(rows).detach()))

    @override
    def before_backward(self, host: Host, loss: Tensor) -> None:
        if not self._micro_batches:  # a trainer that does not show its batches
            self._micro_batches.append(_MicroBatch(None))
        self._micro_batches[-1].losses.append(loss)

    # Judging.

    @override
    def before_update(self, host: Host, optimizer: Optimizer) -> None:
        self._is_window_over = True
        is_engine = not isinstance(optimizer, Optimizer)
        finding = self._judge_update(host, None if is_engine else optimizer)
        if finding is None:
            self.in_a_row = 0
            return
        if host.scaler is not None and not finding.bad_losses:
            self._pass_over(host)  # an overflow, which the scaler answers by itself
            return
        self.in_a_row += 1
        self._skipped += 1
        rows = self._bad_rows(host, finding)
        event = {"update": host.step + 1, "finding": finding.text(), "rows": rows, "in_a_row": self.in_a_row}
        self.events = [*self.events, event][-self.max_events :]
        values = {"non_finite/in_a_row": float(self.in_a_row)}
        self.judge(host, values, evidence=lambda _: _told(event))
        if is_engine or self.in_a_row == self.stop_after:
            raise ValueError(self._farewell(event, is_engine=is_engine))
        self._pass_over(host)
        drop_gradients(optimizer)

    def _judge_update(self, host: Host, optimizer: Optimizer | None) -> _Finding | None:
        """What is not finite; one sum over processes and one wait for the device where nothing is wrong."""
        gradients = [] if optimizer is None else [_dense(gradient.values) for gradient in local_gradients(optimizer)]
        losses = [loss for batch in self._micro_batches for loss in batch.losses]
        sound = [loss.isfinite().all() for loss in losses]
        bad = torch.stack([~flag.to(host.device) for flag in sound]).sum() if sound else torch.zeros(())
        norm = torch.nn.utils.get_total_norm(gradients) if gradients else torch.zeros(())
        numbers = (bad, torch.tensor(float(len(losses))), ~norm.isfinite())
        bad_losses, num_losses, bad_norms = host.total(
            torch.stack([number.reshape(()).to(host.device, torch.float64) for number in numbers])
        ).tolist()
        if not bad_losses and not bad_norms:
            return None
        names, flags = _bad_gradients(host, optimizer)
        bad_names = tuple(name for name, flag in zip(names, flags, strict=True) if flag)
        # The norm of finite gradients may be too large for its type.
        if not bad_losses and not bad_names:
            return None
        return _Finding(int(bad_losses), int(num_losses), bad_names, len(names))

    def _bad_rows(self, host: Host, finding: _Finding) -> list[int]:
        """Rows of the micro-batches whose loss is bad; of all of them where only gradients are."""
        batches = [batch for batch in self._micro_batches if not finding.bad_losses or batch.is_bad()]
        return rows_of_all_ranks(host, [batch.rows for batch in batches if batch.rows is not None])

    def _farewell(self, event: Mapping[str, Any], *, is_engine: bool) -> str:
        many = f"{self.in_a_row} updates in a row were not finite, and each was skipped"
        once = "the update is not finite, and an engine that keeps its gradients to itself cannot be told to skip it"
        executed = self.updates - int(is_engine)
        return (
            f"Training stops at update {event['update']}: {once if is_engine else many}; the weights are those after {executed} "
            f"executed updates. {_told(event)} Look at these rows first; if they are sound, lower the learning rate or lengthen "
            "its warm-up, clip gradients (`--trainer.gradient_clip_val 1.0`), or train with more digits (`--trainer.precision "
            "bf16-mixed` or `32-true`). Then go on from the last checkpoint."
        )

    # What the trainer does after a step.

    def _pass_over(self, host: Host) -> None:
        self._end_passing()
        self._release = host.pass_over()

    def _end_passing(self) -> None:
        if self._release is not None:
            self._release()
            self._release = None

    @override
    def end_epoch(self, host: Host) -> None:
        self._end_passing()

    @override
    def unwatch(self) -> None:
        super().unwatch()
        self._end_passing()
        self._micro_batches, self._is_window_over = [], False

    # Telling.

    @override
    def finish(self, host: Host) -> None:
        self._end_passing()
        super().finish(host)

    @override
    def has_news(self) -> bool:
        return super().has_news() or self._skipped > 0

    @override
    def tell(self, host: Host) -> None:
        values = {"non_finite/skipped": float(self._skipped), "non_finite/in_a_row": float(self.in_a_row)}
        self._skipped = 0
        host.log(values)
        self.judge(host, {"non_finite/in_a_row": float(self.in_a_row)})

    # State.

    @override
    def measured_state(self) -> dict[str, Any]:
        return {"in_a_row": self.in_a_row, "skipped": self._skipped, "events": copy.deepcopy(self.events)}

    @override
    def load_measured_state(self, state: Mapping[str, Any]) -> None:
        self.in_a_row, self._skipped = int(state["in_a_row"]), int(state["skipped"])
        self.events = copy.deepcopy(state["events"])


def _told(event: Mapping[str, Any]) -> str:
    """An event in one sentence or two."""
    rows: Sequence[int] = event["rows"]
    return f"Update {event['update']}: {event['finding']}." + (f" Its rows: {rows_as_text(rows)}." if rows else "")


def _dense(values: Tensor) -> Tensor:
    return values.coalesce().values() if values.is_sparse else values


def _bad_gradients(host: Host, optimizer: Optimizer | None) -> tuple[list[str], list[bool]]:
    """Names of the optimiser's parameters in the order of the module, and which have a gradient that is not finite."""
    owned = set() if optimizer is None else {id(p) for group in optimizer.param_groups for p in group["params"]}
    named = [(name, parameter) for name, parameter in host.module.named_parameters() if id(parameter) in owned]
    if not named:
        return [], []
    here = [parameter.grad is not None and not bool(_dense(local(parameter.grad)).isfinite().all()) for _, parameter in named]
    counts = host.total(torch.tensor(here, dtype=torch.float64, device=host.device)).tolist()
    return [_plain(name) for name, _ in named], [bool(count) for count in counts]


def _plain(name: str) -> str:
    for wrapper in WRAPPERS:
        name = name.replace(wrapper, "")
    return name
