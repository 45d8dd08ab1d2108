"""What `SpikeAwareOptimizerReset` asks of a mode, and what a mode answers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, NamedTuple

from lightning_pref.callbacks.hosts import Host
from lightning_pref.callbacks.spike_ladder import Rung
from lightning_pref.callbacks.spike_track import Track, UpdateParts


class Answer(NamedTuple):
    """A spike and what was done about it."""

    scores: dict[str, float]  # of the signals that spiked
    action: Rung
    recurrence: int
    update: int  # of the optimiser, skipped ones counted


class Mode(ABC):
    """What `SpikeAwareOptimizerReset` does around an update."""

    measures_on_host: bool  # needs the loss and the gradient norm as numbers before each update

    @abstractmethod
    def attach(self, track: Track) -> None:
        """Take charge of an optimiser."""

    def detach(self) -> None:  # noqa: B027  # most have nothing to let go
        """Let go of all optimisers."""

    @abstractmethod
    def prepare(self, host: Host, track: Track, parts: UpdateParts) -> Answer | None:
        """Before a step that will be executed. Gradients, state and rates may be changed; rates are put back afterwards."""

    def executed(self, host: Host, track: Track, largest_lr: float, flat_shards: int) -> Answer | None:  # noqa: ARG002
        """After a step that was prepared, with rates put back; `largest_lr` is what the step used."""
        return None

    @abstractmethod
    def report(self, host: Host) -> dict[str, float]:
        """Measurements since the last report, equal on every process; they begin anew."""

    @abstractmethod
    def state(self) -> dict[str, Any]:  # Any: plain data
        """What was learnt, and what was measured and not reported yet."""

    @abstractmethod
    def load(self, state: Mapping[str, Any]) -> None:
        """Take up what another run learnt and measured; every optimiser is attached."""
