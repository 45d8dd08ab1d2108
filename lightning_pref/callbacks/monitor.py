"""What every monitor shares that eats observations: accumulators, flush points, silence."""

from __future__ import annotations

import math
import warnings
from abc import abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar, Generic, TypeVar

import lightning as L
import torch
from torch import Tensor
from torchmetrics import Metric
from typing_extensions import override

from lightning_pref.callbacks.diagnostic import PeriodicDiagnostic
from lightning_pref.callbacks.hosts import Host, as_floats
from lightning_pref.observations import Observation, Observer

TRAIN, VAL, TEST = "train", "val", "test"
# Its outputs go to their caller, who has them all; nothing marks the end of a report.
UNHEARD = ("predict",)

A = TypeVar("A", bound=Metric)


class Monitor(PeriodicDiagnostic, Observer, Generic[A]):
    """A diagnostic that accumulates observations and reports on them.

    A concrete monitor says what it consumes and how, by `new_accumulator`, `update` and `summarize`. There is one accumulator
    per source, so that training, validation and probes never mix. Training is flushed every N updates, what is left at the
    end of the epoch; validation at its end; a probe after each round. Nothing is fetched from the device in between.

    Args:
        every_n_updates: Updates between two reports; the trainer's own logging interval if not given.
        silent_after: Raise if nothing was heard within this many training batches, or within the first epoch.
        thresholds: Limits of alerts other than the defaults.
    """

    def __init__(
        self,
        *,
        every_n_updates: int | None = None,
        silent_after: int = 200,
        thresholds: Mapping[str, float] | None = None,
    ) -> None:
        if silent_after < 1:
            raise ValueError(f"`silent_after` must be at least 1 batch, got {silent_after!r}.")
        super().__init__(every_n_updates=every_n_updates, thresholds=thresholds)
        self.silent_after = silent_after
        self._accumulators: dict[str, A] = {}
        self._heard: dict[str, int] = {}  # observations since the last flush, by source
        self._has_heard = False
        self._is_fed = False  # some rank has heard something, and all know
        self._batches = 0

    # To write.

    @abstractmethod
    def new_accumulator(self) -> A:
        """An empty accumulator, for one source."""

    @abstractmethod
    def update(self, accumulator: A, observation: Observation) -> None:
        """Add an observation; on the device, without asking it for a value."""

    @abstractmethod
    def summarize(self, accumulator: A) -> Mapping[str, Tensor]:
        """The report by key, equal on every rank; `nan` where there is nothing to say."""

    def evidence(self, rule: str, source: str) -> str:  # noqa: ARG002  # for monitors that have any
        """What an alert says beyond its numbers: rows, tokens."""
        return ""

    # Observations in.

    @override
    def on_observation(self, trainer: L.Trainer, pl_module: L.LightningModule, observation: Observation, source: str) -> None:
        self.receive(observation, source)

    @override
    def on_round_end(self, trainer: L.Trainer, pl_module: L.LightningModule, source: str) -> None:
        self.end_round(self._lightning(trainer, pl_module), source)

    def receive(self, observation: Observation, source: str) -> None:
        """Add an observation to the accumulator of its source."""
        if source in UNHEARD:
            return
        self.update(self._accumulator(source, device_of(observation)), observation)
        self._heard[source] = self._heard.get(source, 0) + 1
        self._has_heard = True

    def end_round(self, host: Host, source: str) -> None:
        """Report on a probe."""
        self.flush(host, source)

    def _accumulator(self, source: str, device: torch.device) -> A:
        if source not in self._accumulators:
            accumulator = self.new_accumulator()
            accumulator.persistent(True)
            self._accumulators[source] = accumulator
        return self._accumulators[source].to(device)

    # Reports out.

    @override
    def after_batch(self, host: Host, outputs: Any, batch: Any, updated: bool) -> None:
        self._batches += 1
        if self._batches == self.silent_after:
            self._refuse_silence(host, f"first {self._batches} training batches")
        super().after_batch(host, outputs, batch, updated)

    @override
    def end_epoch(self, host: Host) -> None:
        self._refuse_silence(host, "first epoch of training")
        self.flush(host, TRAIN)

    @override
    def end_validation(self, host: Host) -> None:
        self.flush(host, VAL)

    @override
    def on_test_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        with torch.no_grad():
            self.flush(self._lightning(trainer, pl_module), TEST)

    @override
    def has_news(self) -> bool:
        return True  # batches without an update, too; a flush without any says nothing

    @override
    def tell(self, host: Host) -> None:
        self.flush(host, TRAIN)

    def flush(self, host: Host, source: str) -> None:
        """Log the report on what was heard from a source since the last time, raise alerts, and begin anew."""
        # Which rank heard something is not known here, so that with several all take part.
        if host.world_size == 1 and not self._heard.get(source):
            return
        accumulator = self._accumulator(source, host.device)
        with warnings.catch_warnings():
            # A rank may well have nothing to add.
            warnings.filterwarnings("ignore", message=r"The ``compute`` method of metric")
            values = as_floats(self.summarize(accumulator))
        accumulator.reset()
        self._heard[source] = 0
        if all(math.isnan(value) for value in values.values()):
            return
        prefix = "" if source == TRAIN else f"{source}/"
        host.log({prefix + key: value for key, value in values.items()})
        self.judge(host, values, source=source, evidence=lambda rule: self.evidence(rule, source))

    def wanted(self) -> str:
        """What this monitor cannot do without, for the error on silence."""
        return " or ".join(kind.__name__ for kind in self.consumes)

    def wiring(self, host: Host) -> str:
        """The lines that feed this monitor, for the error on silence."""
        return host.wiring(type(self).__name__, self.consumes)

    def _refuse_silence(self, host: Host, when: str) -> None:
        if self._is_fed:
            return
        # Decided together: a rank that raised alone would leave the others waiting for it.
        heard = torch.tensor(float(self._has_heard), device=host.device)
        self._is_fed = bool(host.total(heard).item()) if host.world_size > 1 else self._has_heard
        if self._is_fed:
            return
        raise ValueError(
            f"{type(self).__name__} received no {self.wanted()} in the {when} of {type(host.module).__name__}.\n"
            f"{self.wiring(host)}\n"
            f"It did receive: {', '.join(host.published()) or 'nothing'}."
        )

    # State.

    @override
    def measured_state(self) -> dict[str, Any]:
        return {
            "accumulators": {source: on_cpu(metric.state_dict()) for source, metric in self._accumulators.items()},
            "heard": dict(self._heard),
            "has_heard": self._has_heard,
            "is_fed": self._is_fed,
            "batches": self._batches,
        }

    @override
    def load_measured_state(self, state: Mapping[str, Any]) -> None:
        self._accumulators = {}
        for source, saved in state["accumulators"].items():
            self._accumulator(source, torch.device("cpu")).load_state_dict(on_cpu(saved))
        self._heard = dict(state["heard"])
        self._has_heard = state["has_heard"]
        self._is_fed = state["is_fed"]
        self._batches = state["batches"]


class ProbedMonitor(Monitor[A]):
    """A monitor of a fixed set of pairs, which hears of nothing else than a `Probe` beside it."""

    scored_by: ClassVar[str]  # what the probe calls, as a user writes it

    @override
    def wanted(self) -> str:
        return "observation of a probe"

    @override
    def wiring(self, host: Host) -> str:
        return f"It watches a fixed set of pairs; attach one beside it: Probe('pairs', batches, {self.scored_by})."


def device_of(observation: Observation) -> torch.device:
    """Where the tensors of an observation live; the CPU for an event without tensors."""
    return next((value.device for value in vars(observation).values() if isinstance(value, Tensor)), torch.device("cpu"))


def on_cpu(state: Mapping[str, Any]) -> dict[str, Any]:  # Any: tensors, or lists of them
    """A copy of a metric's state on the CPU."""
    return {
        name: [v.cpu().clone() for v in value] if isinstance(value, list) else value.cpu().clone()
        for name, value in state.items()
    }
