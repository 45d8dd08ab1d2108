"""Keeps spikes out of the optimiser: SPAM's clipping and resets, or answers to spikes that were seen."""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from typing import Any, Literal

import lightning as L
import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle
from typing_extensions import override

from lightning_pref.callbacks.diagnostic import Key, PeriodicDiagnostic
from lightning_pref.callbacks.hosts import Host, LightningHost
from lightning_pref.callbacks.optimizer_state import is_bitsandbytes
from lightning_pref.callbacks.row_ids import Rows, group_rows, rows_as_text, rows_of_all_ranks
from lightning_pref.callbacks.spike_evidence import EvidenceMode, Signal
from lightning_pref.callbacks.spike_ladder import Rung
from lightning_pref.callbacks.spike_modes import Answer, Mode
from lightning_pref.callbacks.spike_settings import refuse_settings
from lightning_pref.callbacks.spike_spam import SpamMode
from lightning_pref.callbacks.spike_track import Measured, Track, UpdateParts
from lightning_pref.callbacks.update_parts import LocalGradient, local_gradients, num_flat_shards, squared_norm


class SpikeAwareOptimizerReset(PeriodicDiagnostic):
    """Watches gradients, and in mode `evidence` the loss and the size of updates, for spikes that spoil Adam's moments.

    Needs: one of the optimisers listed in `callbacks/optimizer_state.py`; nothing of the module.
    Logs: `spike/...` (see `keys`), seven values in mode `spam`, eight in mode `evidence`.
    Changes: gradients, moments and learning rates in mode `spam`, on a schedule and without waiting for the device; in mode
    `evidence` it skips steps, resets moments, ramps the learning rate and may roll back, after one look at numbers on the
    host per update. Learning rates and weight decay are back at the scheduler's values after every step.

    Args:
        mode: `spam`: clip coordinates by their second moment and reset both moments every so many updates (arXiv
            2501.06842). `evidence`: act only on a spike that was seen, the more so the sooner it returns.
        reset_every: Updates between two resets (SPAM's Delta T); `None` or 0 for never. Mode `spam`.
        warmup_steps: Updates in which the learning rate comes back after a reset, or after the rung `ramp` (N).
        threshold: Largest allowed ratio of a squared gradient to its second moment (theta); 0 for no clipping. Mode `spam`.
        guard_steps: Updates after a reset without clipping (the paper's code calls it gradient accumulation), or without
            judging the size of updates.
        bias_correction: `keep` lets Adam's bias correction count on after a reset, as SPAM does; the effective learning rate
            is then 1.6 to 2.7 times the nominal one. `restart` begins it anew and clips by the corrected second moment. If not
            given: `keep` in mode `spam`, `restart` in mode `evidence`.
        strict: Clip coordinates without a second moment to zero, as SPAM's code does, which freezes them. Mode `spam`.
        order: Clip by SPAM before or after the trainer clips the norm of the gradient. Mode `spam`.
        watch: Signals to judge. `update_norm` costs a copy of the weights while the optimiser steps. Mode `evidence`.
        ladder: What is done at a spike, and at its returns: `skip` the step; skip and `reset_first` moment; skip and
            `reset_both`; that and `ramp` the learning rate; `roll_back` to the last snapshot and ramp. Mode `evidence`.
        horizon: Updates after a spike in which the next one counts as its return. Mode `evidence`.
        window: Values a signal is compared with. Mode `evidence`.
        min_history: Values needed before a signal is judged. Mode `evidence`.
        score_limit: Robust standard deviations above the median that make a spike. Mode `evidence`.
        snapshot_every: Updates between snapshots of weights and optimiser state, kept in memory and not in checkpoints; for
            the rung `roll_back`. Mode `evidence`.
        snapshot_on: Where the snapshot is kept. Mode `evidence`.
        rows: Gives the row ids of a batch, for the list of events; our own batches need no such function. Mode `evidence`.
        max_events: Latest events that are kept.
        every_n_updates: Updates between two reports; the trainer's own logging interval if not given.
        thresholds: Limits of alerts other than those in `ALERT_RULES`.
    """

    prefix = "spike"
    keys = (
        Key("spike/clipped_fraction", "Share of coordinates with a second moment that were clipped, since the last report."),
        Key("spike/max_ratio", "Largest ratio of squared gradient to second moment since the last report, before clipping."),
        Key("spike/reset", "Resets of both moments since the last report.", "resets"),
        Key("spike/phi", "Factor of the ramp on the learning rate at the last update; the smallest of all optimisers."),
        Key("spike/effective_lr_multiplier", "The ramp times what a bias correction that was not restarted adds."),
        Key("spike/skipped", "Updates skipped or undone since the last report, overflows of a loss scaler included.", "updates"),
        Key("spike/grad_norm", "Gradient norm before clipping, root mean square since the last report.", "loss / weight"),
        Key("spike/loss_score", "Largest robust score of the loss since the last report.", "deviations"),
        Key("spike/update_score", "Largest robust score of update norm over learning rate since the last report.", "deviations"),
        Key("spike/recurrence", "Spikes in a row, each within the horizon of the one before.", "spikes"),
    )

    def __init__(
        self,
        mode: Literal["spam", "evidence"] = "spam",
        *,
        reset_every: int | None = 500,
        warmup_steps: int = 150,
        threshold: float = 5000.0,
        guard_steps: int = 20,
        bias_correction: Literal["keep", "restart"] | None = None,
        strict: bool = False,
        order: Literal["before_norm_clip", "after_norm_clip"] = "before_norm_clip",
        watch: Collection[Signal] = ("loss", "grad_norm", "update_norm"),
        ladder: Sequence[Rung] = ("skip", "reset_first", "reset_both", "ramp"),
        horizon: int = 30,
        window: int = 128,
        min_history: int = 20,
        score_limit: float = 6.0,
        snapshot_every: int | None = None,
        snapshot_on: Literal["cpu", "device"] = "cpu",
        rows: Rows | None = None,
        max_events: int = 100,
        every_n_updates: int | None = None,
        thresholds: Mapping[str, float] | None = None,
    ) -> None:
        settings = {name: value for name, value in locals().items() if name != "self"}
        refuse_settings(settings, inspect.signature(SpikeAwareOptimizerReset).parameters)
        super().__init__(every_n_updates=every_n_updates, thresholds=thresholds)
        self.mode = mode
        self.order = order
        self.rows = rows or group_rows
        self.max_events = max_events
        restart = bias_correction == "restart" or (bias_correction is None and mode == "evidence")
        self.policy: Mode
        if mode == "spam":
            self.policy = SpamMode(
                reset_every=reset_every or None,
                warmup_steps=warmup_steps,
                threshold=threshold,
                guard_steps=guard_steps,
                restart=restart,
                strict=strict,
            )
        else:
            self.policy = EvidenceMode(
                watch=watch,
                ladder=ladder,
                horizon=horizon,
                window=window,
                min_history=min_history,
                score_limit=score_limit,
                warmup_steps=warmup_steps,
                guard_steps=guard_steps,
                restart=restart,
                snapshot_every=snapshot_every,
                snapshot_on=snapshot_on,
            )
        self.events: list[dict[str, Any]] = []  # Any: strings, numbers, lists of row ids
        self._tracks: list[Track] = []
        self._handles: list[RemovableHandle] = []
        self._loaded: dict[str, Any] | None = None  # from a checkpoint, until training starts
        self._ended: dict[str, Any] | None = None  # of a run that is over
        self._current: Host | None = None
        self._clip_again: Callable[[], None] | None = None
        self._flat_shards = 1
        self._overflows = 0
        self._loss: Tensor | None = None  # of this update so far, on the device
        self._heard_backward = False
        self._rows: list[Tensor] = []
        self._rows_are_done = False

    # Following the optimisers.

    @override
    def watch(self, optimizers: Sequence[object]) -> None:
        super().watch(optimizers)
        for index, optimizer in enumerate(optimizers):
            track = Track(optimizer, index)
            self.policy.attach(track)
            self._tracks.append(track)
            self._handles.append(track.optimizer.register_step_post_hook(partial(self._after_step, track)))
        if self._loaded is not None:
            self._take_up(self._loaded)
            self._loaded = None

    @override
    def unwatch(self) -> None:
        super().unwatch()
        for handle in self._handles:
            handle.remove()
        self._handles = []
        for track in self._tracks:  # after an exception between preparation and step
            self._put_back(track)
        if self._tracks:  # hold on to what was measured, and to no optimiser, snapshot or trainer
            self._ended = self._measured()
            self.policy.detach()
        self._tracks, self._rows, self._loss, self._current = [], [], None, None

    @override
    def start(self, host: Host) -> None:
        trains_in_lightning = isinstance(host, LightningHost)
        model = host.trainer.model if trains_in_lightning else host.module  # type: ignore[attr-defined]
        self._flat_shards = num_flat_shards(model)
        if self._flat_shards > 1 and any(is_bitsandbytes(track.optimizer) for track in self._tracks):
            raise ValueError(
                "SpikeAwareOptimizerReset does not know how FSDP splits the 8-bit state of bitsandbytes. Use torch.optim.AdamW "
                "with FSDP, or bitsandbytes without it."
            )
        clips_norm = trains_in_lightning and host.trainer.gradient_clip_val  # type: ignore[attr-defined]
        if self.order == "after_norm_clip" and not clips_norm:
            raise ValueError(
                "order='after_norm_clip' has nothing to come after: give Lightning's Trainer a `gradient_clip_val`, or leave "
                "`order` out."
            )

    @override
    def batch_begins(self) -> None:
        super().batch_begins()
        self._heard_backward = False

    @override
    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int) -> None:
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
        if not self.policy.measures_on_host:
            return
        if self._rows_are_done:
            self._rows, self._rows_are_done = [], False
        rows = self.rows(batch)
        if rows is not None:
            self._rows.append(torch.as_tensor(rows).detach())

    @override
    def before_backward(self, host: Host, loss: Tensor) -> None:
        self._heard_backward = True
        if self.policy.measures_on_host:
            scaler = host.scaler
            loss = loss.double() / (scaler.get_scale() if scaler is not None else 1.0)
            self._loss = loss if self._loss is None else self._loss + loss

    # Around a step.

    @override
    def before_update(self, host: Host, optimizer: Optimizer) -> None:
        (track,) = (track for track in self._tracks if track.optimizer is optimizer)
        self._put_back(track)
        track.will_count = False
        self._current = host
        self._rows_are_done = True
        try:
            answer = self._prepare(host, track)
        except BaseException:
            track.rates.restore()
            raise
        if answer is not None:  # the gradients are gone
            if isinstance(host, LightningHost):
                self._clip_again = host.leave_unclipped()
            self._record(host, track, answer)

    def _put_back(self, track: Track) -> None:
        """What was changed for one step is as it was."""
        track.rates.restore()
        if self._clip_again is not None:
            self._clip_again()
            self._clip_again = None

    def _prepare(self, host: Host, track: Track) -> Answer | None:
        scaler = host.scaler
        if scaler is not None:
            _refuse_fused(track.optimizer)
            if not self._heard_backward and _is_automatic(host):
                return None  # training_step gave no loss: Lightning does not step then
        gradients = local_gradients(track.optimizer)
        measured = None
        if scaler is not None or self.policy.measures_on_host:
            measured, num_gradients = self._measure(host, gradients)
            if not num_gradients:
                return None
            if scaler is not None and not math.isfinite(measured.squared_norm):
                self._overflows += 1  # the scaler will not step
                return None
        elif not gradients:
            return None
        if self.order == "after_norm_clip":
            self._clip_norm(host, track.optimizer)
        answer = self.policy.prepare(host, track, UpdateParts(gradients, measured, host.world_size, self._flat_shards))
        track.will_count = answer is None
        return answer

    def _measure(self, host: Host, gradients: Sequence[LocalGradient]) -> tuple[Measured, int]:
        """Loss and gradient norm, and how many gradients there are, in one sum over processes and one wait for the device."""
        owned = [(gradient.parameter, gradient.values) for gradient in gradients]
        square = squared_norm(owned, host.world_size, self._flat_shards) if owned else torch.zeros(())
        loss = self._loss if self._loss is not None else torch.zeros(())
        numbers = (loss, torch.tensor(float(self._loss is not None)), square, torch.tensor(float(len(gradients))))
        stacked = torch.stack([number.reshape(()).to(host.device, torch.float64) for number in numbers])
        loss_sum, num_losses, square_sum, num_gradients = host.total(stacked).tolist()
        self._loss = None
        return Measured(loss_sum / num_losses if num_losses else None, square_sum), int(num_gradients)

    @staticmethod
    def _clip_norm(host: Host, optimizer: Optimizer) -> None:
        """What Lightning does next, now; done again after this it finds nothing to cut."""
        assert isinstance(host, LightningHost)
        trainer = host.trainer
        host.module.configure_gradient_clipping(optimizer, trainer.gradient_clip_val, trainer.gradient_clip_algorithm)

    @torch.no_grad()
    def _after_step(self, track: Track, *_: object) -> None:
        largest_lr = track.rates.largest() if self.policy.measures_on_host else math.nan
        self._put_back(track)
        if not track.will_count:
            return
        track.will_count = False
        track.count()
        assert self._current is not None
        answer = self.policy.executed(self._current, track, largest_lr, self._flat_shards)
        if answer is not None:
            self._record(self._current, track, answer)

    # Telling.

    def _record(self, host: Host, track: Track, answer: Answer) -> None:
        self.events.append(
            {
                "step": host.step,
                "update": answer.update,
                "optimizer": track.index,
                "scores": answer.scores,
                "action": answer.action,
                "recurrence": answer.recurrence,
                "rows": rows_of_all_ranks(host, self._rows),
            }
        )
        self.events = self.events[-self.max_events :]
        self.judge(host, {"spike/recurrence": float(answer.recurrence)}, evidence=self._evidence)

    def _evidence(self, rule: str) -> str:
        """The last event, for rules about events."""
        if not self.events or rule not in ("spike/seen", "spike/returning", "spike/update_norm"):
            return ""
        event = self.events[-1]
        scores = ", ".join(f"{name} {score:.3g}" for name, score in event["scores"].items())
        rows = f" with rows {rows_as_text(event['rows'])}" if event["rows"] else ""
        return f"Update {event['update']}{rows}: score of {scores}; done: {event['action']}."

    @override
    def tell(self, host: Host) -> None:
        values = self.policy.report(host)
        values["spike/phi"] = min(track.last_ramp for track in self._tracks)
        values["spike/effective_lr_multiplier"] = max(track.last_multiplier for track in self._tracks)
        values["spike/skipped"] = values.get("spike/skipped", 0.0) + self._overflows
        self._overflows = 0
        host.log(values)
        self.judge(host, values, evidence=self._evidence)

    # State.

    @override
    def measured_state(self) -> dict[str, Any]:
        if self._loaded is not None:  # not taken up yet
            return copy.deepcopy(self._loaded)
        return copy.deepcopy(self._ended) if self._ended is not None and not self._tracks else self._measured()

    def _measured(self) -> dict[str, Any]:
        return {
            "tracks": [track.state() for track in self._tracks],
            self.mode: self.policy.state(),
            "overflows": self._overflows,
            "events": copy.deepcopy(self.events),
        }

    @override
    def load_measured_state(self, state: Mapping[str, Any]) -> None:
        self._loaded = copy.deepcopy(dict(state))
        self.events = copy.deepcopy(state["events"])

    def _take_up(self, state: Mapping[str, Any]) -> None:
        """Give each optimiser what was measured of it; what the other mode learnt is of no use to this one."""
        if len(state["tracks"]) not in (0, len(self._tracks)):
            raise ValueError(
                f"The checkpoint holds spike states of {len(state['tracks'])} optimisers, and training has {len(self._tracks)}. "
                "Resume with the optimisers it was written with, or without this callback's state."
            )
        for track, saved in zip(self._tracks, state["tracks"], strict=False):
            track.load(saved)
        if state["tracks"] and self.mode in state:
            self.policy.load(state[self.mode])
        self._overflows = int(state["overflows"])


def _is_automatic(host: Host) -> bool:
    return isinstance(host, LightningHost) and host.module.automatic_optimization


def _refuse_fused(optimizer: Optimizer) -> None:
    if getattr(optimizer, "_step_supports_amp_scaling", False):
        raise ValueError(
            f"A fused {type(optimizer).__name__} takes the loss scale out of the gradients by itself, within the step, so that "
            "they cannot be judged or clipped before it (Lightning refuses to clip them, too). Build it with `fused=False`, or "
            "train with precision 'bf16-mixed'."
        )
