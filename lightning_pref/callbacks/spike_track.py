"""Where one optimiser stands between resets of its moments."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from torch.optim import Optimizer

from lightning_pref.callbacks.optimizer_state import momentum_state
from lightning_pref.callbacks.update_parts import LocalGradient, ScaledRates
from lightning_pref.measures.spikes import effective_lr_multiplier, spam_ramp


class Measured(NamedTuple):
    """What is known on the host of an update, summed over all processes."""

    loss: float | None  # mean over processes; None where the trainer does not say
    squared_norm: float  # of the gradient; not finite where an entry is not


class UpdateParts(NamedTuple):
    """What a mode works with before an update."""

    gradients: list[LocalGradient]
    measured: Measured | None  # None where nothing was fetched from the device
    world_size: int
    flat_shards: int


class Track:
    """One optimiser: its moments, its learning rates, and the updates since its moments were reset.

    Args:
        optimizer: The optimiser; one whose moments are not known is refused.
        index: Its place among the optimisers of the run.
    """

    def __init__(self, optimizer: object, index: int) -> None:
        self.index = index
        self.moments = momentum_state(optimizer)
        self.rates = ScaledRates(self.moments)
        self.updates = 0  # executed (k)
        # Of the coming update: 0 right after a reset. The run itself begins at 1, since no reset precedes it.
        self.since_reset = 1
        self.is_ramping = False
        self.is_partial = False  # the moments hold fewer gradients than the bias correction assumes
        self.will_count = False  # the coming step is one that was prepared
        self.last_ramp = 1.0
        self.last_multiplier = 1.0

    @property
    def optimizer(self) -> Optimizer:
        """The optimiser."""
        return self.moments.optimizer

    def reset(self, *, restart: bool) -> None:
        """Throw both moments away.

        Args:
            restart: Let the bias correction begin anew, too.
        """
        self.moments.reset(first=True, second=True, restart=restart)
        self.since_reset = 0
        self.is_partial = not restart

    def scale_rates(self, warmup_steps: int) -> None:
        """Lower the learning rates for the coming step, if a ramp is on."""
        self.is_ramping = self.is_ramping and self.since_reset < warmup_steps
        ramp = spam_ramp(self.since_reset, warmup_steps) if self.is_ramping else 1.0
        self.rates.scale(ramp)
        self.last_ramp = ramp
        self.last_multiplier = self._multiplier(ramp)

    def _multiplier(self, ramp: float) -> float:
        if not self.is_partial:
            return ramp
        betas = self.moments.betas(self.optimizer.param_groups[0])
        corrected = self.updates + 1 if self.moments.corrects_bias else math.inf
        return effective_lr_multiplier(ramp, self.since_reset + 1, betas, num_corrected=corrected)

    def count(self) -> None:
        """Note that the step was executed."""
        self.updates += 1
        self.since_reset += 1

    def state(self) -> dict[str, Any]:  # Any: integers and booleans
        """Where the optimiser stands, as plain data."""
        return {
            "updates": self.updates,
            "since_reset": self.since_reset,
            "is_ramping": self.is_ramping,
            "is_partial": self.is_partial,
            "last_ramp": self.last_ramp,
            "last_multiplier": self.last_multiplier,
        }

    def load(self, state: Mapping[str, Any]) -> None:
        """Take up where another run stood."""
        self.updates = int(state["updates"])
        self.since_reset = int(state["since_reset"])
        self.is_ramping = bool(state["is_ramping"])
        self.is_partial = bool(state["is_partial"])
        self.last_ramp = float(state["last_ramp"])
        self.last_multiplier = float(state["last_multiplier"])
