"""Mode `evidence` of `SpikeAwareOptimizerReset`: a ladder of answers to spikes that were seen."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any, Literal, get_args

from typing_extensions import override

from lightning_pref.callbacks.hosts import Host
from lightning_pref.callbacks.spike_ladder import Ladder, Rung
from lightning_pref.callbacks.spike_modes import Answer, Mode
from lightning_pref.callbacks.spike_track import Track, UpdateParts
from lightning_pref.callbacks.update_parts import Snapshot, WeightCopy, drop_gradients, squared_norm
from lightning_pref.measures.spikes import RobustDetector

Signal = Literal["loss", "grad_norm", "update_norm"]
SIGNALS: tuple[Signal, ...] = get_args(Signal)


class Watch:
    """What is known of one optimiser's signals."""

    def __init__(self, ladder: Ladder, detectors: dict[Signal, RobustDetector], snapshot: Snapshot | None) -> None:
        self.ladder = ladder
        self.detectors = detectors
        self.snapshot = snapshot
        self.attempts = 0  # updates, skipped ones counted
        self.weights: WeightCopy | None = None

    def state(self) -> dict[str, Any]:
        """What was learnt, as plain data; not the snapshot."""
        detectors = {name: detector.state() for name, detector in self.detectors.items()}
        return {"attempts": self.attempts, "ladder": self.ladder.state(), "detectors": detectors}

    def load(self, state: Mapping[str, Any]) -> None:
        """Take up what another run learnt; a signal it did not watch begins anew."""
        self.attempts = int(state["attempts"])
        self.ladder.load(state["ladder"])
        for name, detector in self.detectors.items():
            if name in state["detectors"]:
                detector.load(state["detectors"][name])


class EvidenceMode(Mode):
    """Judge loss, gradient norm and size of the update by what they were before, and answer a spike by a ladder."""

    measures_on_host = True

    def __init__(
        self,
        *,
        watch: Collection[Signal],
        ladder: Sequence[Rung],
        horizon: int,
        window: int,
        min_history: int,
        score_limit: float,
        warmup_steps: int,
        guard_steps: int,
        restart: bool,
        snapshot_every: int | None,
        snapshot_on: Literal["cpu", "device"],
    ) -> None:
        unknown = [name for name in watch if name not in SIGNALS]
        if unknown or not watch:
            raise ValueError(f"`watch` names some of {', '.join(map(repr, SIGNALS))}, got {list(watch)!r}.")
        if ("roll_back" in ladder) != (snapshot_every is not None):
            raise ValueError(
                "'roll_back' in `ladder` and `snapshot_every` need each other: the one goes back to what the other keeps; "
                f"got ladder={list(ladder)!r} and snapshot_every={snapshot_every!r}."
            )
        self.watch = tuple(watch)
        self.ladder = tuple(ladder)
        self.horizon = horizon
        self.window = window
        self.min_history = min_history
        self.score_limit = score_limit
        self.warmup_steps = warmup_steps
        self.guard_steps = guard_steps
        self.restart = restart
        self.snapshot_every = snapshot_every
        self.snapshot_on = snapshot_on
        self._watches: list[Watch] = []
        self._new_watch(None)  # say now what is wrong with the numbers
        self._clear()

    def _clear(self) -> None:
        self._resets = 0
        self._skipped = 0
        self._squares = 0.0
        self._judged = 0
        self._scores: dict[str, float] = {}

    @override
    def attach(self, track: Track) -> None:
        """Learn the optimiser's signals from now on."""
        snapshot = Snapshot(track.optimizer, self.snapshot_on) if self.snapshot_every is not None else None
        self._watches.append(self._new_watch(snapshot))

    @override
    def detach(self) -> None:
        self._watches = []

    def _new_watch(self, snapshot: Snapshot | None) -> Watch:
        detectors = {
            name: RobustDetector(window=self.window, min_history=self.min_history, limit=self.score_limit, logarithmic=True)
            for name in SIGNALS
        }
        return Watch(Ladder(self.ladder, self.horizon), detectors, snapshot)

    @override
    def prepare(self, host: Host, track: Track, parts: UpdateParts) -> Answer | None:
        """Skip the step if loss or gradient norm spike; else ramp, and keep the weights if the update is to be measured."""
        assert parts.measured is not None
        watch = self._watches[track.index]
        watch.attempts += 1
        norm = math.sqrt(parts.measured.squared_norm) if math.isfinite(parts.measured.squared_norm) else math.inf
        values: dict[Signal, float] = {}
        if "loss" in self.watch and parts.measured.loss is not None:
            values["loss"] = parts.measured.loss
        # A gradient that is no number would make the weights none, whether its norm is watched or not.
        if "grad_norm" in self.watch or not math.isfinite(norm):
            values["grad_norm"] = norm
        if math.isfinite(norm):
            self._squares += norm**2
            self._judged += 1
        spikes = self._judge(watch, values)
        if spikes:
            drop_gradients(track.optimizer)
            return self._answer(track, watch, spikes)
        track.scale_rates(self.warmup_steps)
        if "update_norm" in self.watch:
            watch.weights = WeightCopy(gradient.parameter for gradient in parts.gradients)
        return None

    def _judge(self, watch: Watch, values: Mapping[Signal, float]) -> dict[str, float]:
        """Scores of the signals that spike."""
        spikes = {}
        for name, value in values.items():
            verdict = watch.detectors[name].judge(value)
            if not math.isnan(verdict.score):
                self._scores[name] = max(verdict.score, self._scores.get(name, -math.inf))
            if verdict.is_spike:
                spikes[str(name)] = verdict.score
        return spikes

    @override
    def executed(self, host: Host, track: Track, largest_lr: float, flat_shards: int) -> Answer | None:
        """Undo a step that moved the weights too far for its learning rate, and keep a snapshot where all is calm."""
        watch = self._watches[track.index]
        weights, watch.weights = watch.weights, None
        answer = None
        # The first steps after a reset are sign steps, larger than those from full moments.
        if weights is not None and largest_lr > 0 and track.since_reset > self.guard_steps:
            share = squared_norm(weights.differences(), host.world_size, flat_shards)
            squares = host.total(share.to(host.device)).item()
            spikes = self._judge(watch, {"update_norm": math.sqrt(squares) / largest_lr if math.isfinite(squares) else math.inf})
            if spikes:
                weights.restore()
                answer = self._answer(track, watch, spikes)
        is_due = self.snapshot_every is not None and track.updates % self.snapshot_every == 0
        if watch.snapshot is not None and is_due and not watch.ladder.recurrence(watch.attempts):
            watch.snapshot.take()
        return answer

    def _answer(self, track: Track, watch: Watch, spikes: dict[str, float]) -> Answer:
        self._skipped += 1
        action = watch.ladder.climb(watch.attempts)
        if action == "roll_back" and (watch.snapshot is None or watch.snapshot.is_empty):
            action = "ramp"  # nothing to go back to yet
        if action == "reset_first":
            track.moments.reset(first=True, second=False, restart=False)
        elif action in ("reset_both", "ramp"):
            track.reset(restart=self.restart and track.moments.corrects_bias)
            self._resets += 1
        elif action == "roll_back":
            assert watch.snapshot is not None
            watch.snapshot.restore()
            track.since_reset, track.is_partial = 0, False
        track.is_ramping = track.is_ramping or action in ("ramp", "roll_back")
        return Answer(spikes, action, watch.ladder.recurrence(watch.attempts), watch.attempts)

    @override
    def report(self, host: Host) -> dict[str, float]:
        """Numbers that every process has already."""
        values = {
            "spike/reset": float(self._resets),
            "spike/skipped": float(self._skipped),
            "spike/grad_norm": math.sqrt(self._squares / self._judged) if self._judged else math.nan,
            "spike/loss_score": self._scores.get("loss", math.nan),
            "spike/update_score": self._scores.get("update_norm", math.nan),
            "spike/recurrence": float(max((watch.ladder.recurrence(watch.attempts) for watch in self._watches), default=0)),
        }
        self._clear()
        return values

    @override
    def state(self) -> dict[str, Any]:
        """What was learnt, and what was counted since the last report."""
        return {
            "watches": [watch.state() for watch in self._watches],
            "resets": self._resets,
            "skipped": self._skipped,
            "squares": self._squares,
            "judged": self._judged,
            "scores": dict(self._scores),
        }

    @override
    def load(self, state: Mapping[str, Any]) -> None:
        """Take up what another run learnt, and go on counting."""
        for watch, saved in zip(self._watches, state["watches"], strict=True):
            watch.load(saved)
        self._resets, self._skipped = int(state["resets"]), int(state["skipped"])
        self._squares, self._judged = float(state["squares"]), int(state["judged"])
        self._scores = {str(name): float(score) for name, score in state["scores"].items()}
