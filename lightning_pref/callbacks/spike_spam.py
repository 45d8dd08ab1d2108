"""Mode `spam` of `SpikeAwareOptimizerReset`: clipping and resets on a schedule, without a look at numbers on the host."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from lightning_pref.callbacks.hosts import Host
from lightning_pref.callbacks.optimizer_state import Group
from lightning_pref.callbacks.spike_modes import Answer, Mode
from lightning_pref.callbacks.spike_track import Track, UpdateParts
from lightning_pref.callbacks.update_parts import LocalGradient, reads_are_free, squared_norm
from lightning_pref.measures.spikes import peak_ratio, spike_clip


class SpamMode(Mode):
    """SPAM (arXiv 2501.06842): clip coordinates by their second moment, reset both moments every so many updates, ramp."""

    measures_on_host = False

    def __init__(
        self,
        *,
        reset_every: int | None,
        warmup_steps: int,
        threshold: float,
        guard_steps: int,
        restart: bool,
        strict: bool,
    ) -> None:
        self.reset_every = reset_every
        self.warmup_steps = warmup_steps
        self.threshold = threshold
        self.guard_steps = guard_steps
        self.restart = restart
        self.strict = strict
        self._known: set[int] = set()  # ids of parameters whose every coordinate has a second moment
        self._clear()

    def _clear(self) -> None:
        self._resets = 0
        self._prepared = 0
        # On the device: clipped coordinates, active ones, sum over updates of the squared gradient norm, largest ratio.
        self._sums = torch.zeros(3, dtype=torch.float64)
        self._max_ratio = torch.zeros((), dtype=torch.float64)

    @override
    def attach(self, track: Track) -> None:
        """Refuse what cannot be clipped or restarted."""
        self._known.clear()  # ids of another run's parameters may be given again
        name = type(track.optimizer).__name__
        if self.threshold and not track.moments.keeps_squares:
            raise ValueError(
                f"SPAM clips by the running mean of squared gradients, and {name} keeps none. Set `threshold=0` for resets "
                "without clipping, use mode='evidence', or train with AdamW."
            )
        if self.restart and not track.moments.corrects_bias:
            raise ValueError(f"{name} has no bias correction to restart; set `bias_correction='keep'`.")

    @override
    def prepare(self, host: Host, track: Track, parts: UpdateParts) -> Answer | None:
        """Reset if it is time, clip outside the guard window, ramp."""
        if self.reset_every and (track.updates + 1) % self.reset_every == 0:
            track.reset(restart=self.restart)
            track.is_ramping = True
            self._known.clear()
            self._resets += 1
        self._prepared += 1
        self._sums = self._sums.to(host.device)
        owned = ((gradient.parameter, gradient.values) for gradient in parts.gradients)
        self._sums[2] += squared_norm(owned, parts.world_size, parts.flat_shards).to(self._sums)
        if self.threshold and track.since_reset >= self.guard_steps:
            moments = [(g, self._squares(track, g.parameter, g.group)) for g in parts.gradients]
            for gradient, squares in self._suspects([(g, s) for g, s in moments if s is not None and s.numel()]):
                self._clip(gradient, squares)
        track.scale_rates(self.warmup_steps)
        return None

    def _suspects(self, held: list[tuple[LocalGradient, Tensor]]) -> list[tuple[LocalGradient, Tensor]]:
        """The gradients that may have something to cut; counts the others, where a look at numbers costs no wait."""
        if not held or not all(reads_are_free(squares) and gradient.values.dtype == squares.dtype for gradient, squares in held):
            return held
        # One look at all tensors together. Nearly always there is nothing to cut.
        ratios = [peak_ratio(g.values, squares, all_positive=id(g.parameter) in self._known) for g, squares in held]
        peaks = torch.stack([ratio.double() for ratio in ratios]).tolist()
        suspects, active, largest = [], 0, 0.0
        for (gradient, squares), peak in zip(held, peaks, strict=True):
            if not peak <= self.threshold:  # nan, too
                suspects.append((gradient, squares))
                continue
            known = self._all_known(gradient.parameter, squares)
            active += squares.numel() if known else int(squares.count_nonzero())
            largest = max(largest, peak)
        self._sums[1] += active
        self._max_ratio = self._max_ratio.clamp(min=largest)
        return suspects

    def _clip(self, gradient: LocalGradient, squares: Tensor) -> None:
        clip = spike_clip(gradient.values, squares, threshold=self.threshold, strict=self.strict)
        gradient.values.copy_(clip.gradient)
        self._sums[0] += clip.num_clipped
        self._sums[1] += clip.num_active
        self._max_ratio = torch.maximum(self._max_ratio.to(clip.max_ratio.device), clip.max_ratio.double())

    def _all_known(self, parameter: Tensor, squares: Tensor) -> bool:
        """Whether every coordinate counts as active; once each has a second moment, that stays so until a reset."""
        if not self.strict and id(parameter) not in self._known and squares.count_nonzero() == squares.numel():
            self._known.add(id(parameter))
        return self.strict or id(parameter) in self._known

    def _squares(self, track: Track, parameter: Tensor, group: Group) -> Tensor | None:
        squares = track.moments.squares(parameter)
        if squares is not None and squares.dtype in (torch.bfloat16, torch.float16):
            raise ValueError(
                f"SPAM clips by the second moment, which {type(track.optimizer).__name__} keeps in {squares.dtype} here: in that "
                "precision a decay of 0.999 rounds back to 1, and the threshold would never come down. Keep weights in float32 "
                "(precision 'bf16-mixed'), use an 8-bit Adam, or set `threshold=0` for resets without clipping."
            )
        return track.moments.corrected_squares(parameter, group) if self.restart else squares

    @override
    def report(self, host: Host) -> dict[str, float]:
        """Sums over processes, in one call."""
        # A sum carries the maximum, too, when each process writes into a place of its own.
        places = torch.zeros(host.world_size, dtype=torch.float64, device=host.device)
        places[host.rank] = self._max_ratio
        clipped, active, squares, *ratios = host.total(torch.cat([self._sums.to(host.device), places])).tolist()
        values = {
            "spike/clipped_fraction": clipped / active if active else math.nan,
            "spike/max_ratio": max(ratios) if active else math.nan,
            "spike/reset": float(self._resets),
            "spike/grad_norm": math.sqrt(squares / self._prepared) if self._prepared else math.nan,
        }
        self._clear()
        return values

    @override
    def state(self) -> dict[str, Any]:
        """What was counted since the last report."""
        return {
            "resets": self._resets,
            "prepared": self._prepared,
            "sums": self._sums.tolist(),
            "max_ratio": self._max_ratio.item(),
        }

    @override
    def load(self, state: Mapping[str, Any]) -> None:
        """Go on counting."""
        self._resets, self._prepared = int(state["resets"]), int(state["prepared"])
        self._sums = torch.tensor(state["sums"], dtype=torch.float64)
        self._max_ratio = torch.tensor(state["max_ratio"], dtype=torch.float64)
