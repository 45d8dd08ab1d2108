"""What is done about a spike, and how that rises when spikes return."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

Rung = Literal["skip", "reset_first", "reset_both", "ramp", "roll_back"]
RUNGS: tuple[Rung, ...] = get_args(Rung)


class Ladder:
    """Rises by one rung with every spike that follows another within the horizon, and begins at the bottom otherwise.

    Args:
        rungs: What is done at the first spike, the second, ...; the last one also at all further ones.
        horizon: Updates after a spike in which the next one counts as its return.

    >>> ladder = Ladder(("skip", "reset_both"), horizon=10)
    >>> [ladder.climb(now) for now in (5, 12, 21, 40)]
    ['skip', 'reset_both', 'reset_both', 'skip']
    """

    def __init__(self, rungs: Sequence[Rung], horizon: int) -> None:
        known = [rung for rung in RUNGS if rung in rungs]
        if not rungs or list(rungs) != known:
            raise ValueError(
                f"`ladder` names some of {', '.join(map(repr, RUNGS))}, each once and in this order, got {list(rungs)!r}."
            )
        if horizon < 1:
            raise ValueError(f"`horizon` must be at least 1 update, got {horizon!r}.")
        self.rungs = tuple(rungs)
        self.horizon = horizon
        self._spikes = 0  # in a row, each within the horizon of the one before
        self._last = 0

    def recurrence(self, now: int) -> int:
        """Spikes in a row, each within the horizon of the one before; 0 where the last one is farther away.

        Args:
            now: Number of the update, counted as the calls of `climb` are.
        """
        return self._spikes if self._spikes and now - self._last <= self.horizon else 0

    def climb(self, now: int) -> Rung:
        """Note a spike and say what to do about it.

        Args:
            now: Number of the update, skipped ones counted.
        """
        self._spikes = self.recurrence(now) + 1
        self._last = now
        return self.rungs[min(self._spikes, len(self.rungs)) - 1]

    def state(self) -> dict[str, Any]:  # Any: integers
        """What happened so far, as plain data."""
        return {"spikes": self._spikes, "last": self._last}

    def load(self, state: Mapping[str, Any]) -> None:
        """Take up what happened to another ladder."""
        self._spikes, self._last = int(state["spikes"]), int(state["last"])
