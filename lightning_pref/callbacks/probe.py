"""Measurements on a fixed set, made on purpose, that leave no trace on training."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from typing_extensions import override

from lightning_pref.callbacks.diagnostic import Diagnostic, Key
from lightning_pref.callbacks.hosts import Host
from lightning_pref.models.backbones import evaluating
from lightning_pref.observations import Observation

# Any: a batch of the user's own. The module is the LightningModule, or the transformers model.
Score = Callable[[Any, Any], "Observation | Sequence[Observation]"]


@contextmanager
def undisturbed(module: nn.Module) -> Iterator[None]:
    """Eval mode without gradients; afterwards modes and all random states (Python, NumPy, torch) are as they were."""
    device = next((tensor.device for tensor in (*module.parameters(), *module.buffers())), torch.device("cpu"))
    python_state, numpy_state = random.getstate(), np.random.get_state()  # noqa: NPY002  # the global one is what users draw from
    try:
        # Of this process's own device: with all of them torch warns, and touches the GPUs of others.
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), evaluating(module):
            yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)  # noqa: NPY002


class Budget:
    """How much time measurements may take, as a share of the time spent on training.

    The first measurement is always allowed. Without a share everything is; then what is measured does not depend on a clock.

    Args:
        share: Seconds of measurement per second of training, or `None`.
    """

    def __init__(self, share: float | None) -> None:
        if share is not None and not 0 < share < 1:
            raise ValueError(f"`budget` is a share of the training time in (0, 1), or None for no limit; got {share!r}.")
        self.share = share
        self.spent = 0.0  # seconds of measurement
        self.trained = 0.0  # seconds between measurements
        self.last_cost = 0.0
        self.skipped = 0
        self._since: float | None = None

    def start(self) -> None:
        """Begin, or go on, counting training time."""
        self._since = time.perf_counter()

    def stop(self) -> None:
        """Stop counting training time."""
        self.trained = self._elapsed()
        self._since = None

    def _elapsed(self) -> float:
        return self.trained + (time.perf_counter() - self._since if self._since is not None else 0.0)

    def allows(self, host: Host) -> bool:
        """Whether one more measurement of the last one's cost fits; rank 0's clock decides for all."""
        if self.share is None:
            return True
        fits = self.spent + self.last_cost <= self.share * self._elapsed()
        if host.world_size > 1:
            mine = float(fits) if host.rank == 0 else 0.0
            fits = bool(host.total(torch.tensor(mine, device=host.device)).item())
        self.skipped += int(not fits)
        return fits

    @contextmanager
    def spending(self, device: torch.device) -> Iterator[None]:
        """Count the time inside as measurement."""
        _synchronize(device)  # work of training that is still queued is not the measurement's
        started = time.perf_counter()
        self.trained = self._elapsed()
        try:
            yield
        finally:
            _synchronize(device)
            self._since = time.perf_counter()
            self.last_cost = self._since - started
            self.spent += self.last_cost

    def time_share(self) -> float:
        """Seconds of measurement per second of training so far; `nan` before any training."""
        trained = self._elapsed()
        return self.spent / trained if trained > 0 else float("nan")

    def state(self) -> dict[str, float]:
        """Seconds so far, for a checkpoint."""
        return {"spent": self.spent, "trained": self._elapsed(), "last_cost": self.last_cost, "skipped": self.skipped}

    def load(self, state: Mapping[str, float]) -> None:
        """Take up the seconds of a checkpoint."""
        self.spent, self.trained, self.last_cost = state["spent"], state["trained"], state["last_cost"]
        self.skipped = int(state["skipped"])


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def batches_of_rank(num_batches: int, rank: int, world_size: int) -> list[tuple[int, bool]]:
    """Which batches a rank evaluates, and whether each counts: every batch counts once, and all ranks make as many forwards.

    >>> batches_of_rank(3, rank=1, world_size=2)
    [(1, True), (2, False)]
    """
    rounds = -(-num_batches // world_size)
    mine = range(rank, rounds * world_size, world_size)
    return [(min(index, num_batches - 1), index < num_batches) for index in mine]


class Probe(Diagnostic):
    """Watches a fixed set of batches: scores it every N updates and publishes the result under `probe/<name>`.

    Needs: the batches, and `score(module, batch)` that gives one or several observations.
    Logs: `probe/<name>/time_share`; the monitors that consume the observations log the rest.
    Changes: nothing; scoring is done in eval mode, without gradients, with all random states restored.

    The set is measured before the first update, every N updates within the time budget, and after the last one. With
    several ranks each scores its share; a rank without a batch of its own goes along with another's and throws it away.

    Args:
        name: Part of the keys.
        batches: The fixed set.
        score: What to measure.
        every_n_updates: Updates between two measurements.
        budget: Share of the training time that measuring may take; `None` for no limit, and no dependence on a clock.
    """

    prefix = "probe"
    keys: ClassVar[tuple[Key, ...]] = (
        Key("probe/<name>/time_share", "Seconds of measurement per second of training."),
        Key("probe/<name>/skipped", "Measurements left out so far because of the time budget."),
    )

    def __init__(
        self,
        name: str,
        batches: Sequence[Any],
        score: Score,
        *,
        every_n_updates: int = 50,
        budget: float | None = 0.03,
    ) -> None:
        if not batches:
            raise ValueError(f"The probe {name!r} needs at least one batch, got none.")
        if every_n_updates < 1:
            raise ValueError(f"`every_n_updates` must be at least 1, got {every_n_updates!r}.")
        super().__init__()
        self.name = name
        self.batches = batches
        self.score = score
        self.every_n_updates = every_n_updates
        self.budget = Budget(budget)
        self._measured_at = -1

    @property
    @override
    def state_key(self) -> str:
        return f"{type(self).__qualname__}[{self.name}]"

    @property
    def source(self) -> str:
        """Under which the observations are published."""
        return f"probe/{self.name}"

    @property
    def probing_seconds(self) -> float:
        """Time spent on measuring so far."""
        return self.budget.spent

    @override
    def start(self, host: Host) -> None:
        self.budget.start()
        if self._measured_at < 0:
            self.measure(host)

    @override
    def after_batch(self, host: Host, outputs: Any, batch: Any, updated: bool) -> None:
        if updated and self.is_due(self.every_n_updates) and self.budget.allows(host):
            self.measure(host)

    @override
    def finish(self, host: Host) -> None:
        if self._measured_at != self.updates:
            self.measure(host)
        self.budget.stop()

    def measure(self, host: Host) -> None:
        """Score the set once and publish the result."""
        self._measured_at = self.updates
        with self.budget.spending(host.device), undisturbed(host.module), host.forward_context():
            scored = [
                (self.score(host.module, host.move(self.batches[index])), counts)
                for index, counts in batches_of_rank(len(self.batches), host.rank, host.world_size)
            ]
        for observations, counts in scored:
            if counts:
                for observation in [observations] if isinstance(observations, Observation) else observations:
                    host.publish(observation, self.source)
        host.end_round(self.source)
        values: dict[str, float | Tensor] = {f"{self.source}/time_share": self.budget.time_share()}
        if self.budget.skipped:
            values[f"{self.source}/skipped"] = float(self.budget.skipped)
        host.log({key: value for key, value in values.items() if value == value})

    @override
    def measured_state(self) -> dict[str, Any]:
        return {"measured_at": self._measured_at, "budget": self.budget.state()}

    @override
    def load_measured_state(self, state: Mapping[str, Any]) -> None:
        self._measured_at = state["measured_at"]
        self.budget.load(state["budget"])
