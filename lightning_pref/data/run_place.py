"""Where a run stands, as the loaders count."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

STATE_VERSION = 2


class RunPlace(NamedTuple):
    """Between two micro-batches of a run."""

    epoch: int  # epochs that are done
    batch: int  # micro-batches of the next one that are done


def place_of(trainer: Any) -> RunPlace:  # Any: Lightning's Trainer, of which data is to know nothing
    """Where a run stands in any hook that begins a batch, or ends a batch, a validation, an epoch or the training.

    `processed` rather than `ready` or `completed`: it is the one of Lightning's counts that says the same in all of them.
    """
    epochs, batches = trainer.fit_loop.epoch_progress.current, trainer.fit_loop.epoch_loop.batch_progress.current
    epoch = max(0, epochs.started - 1)
    is_over = batches.processed >= trainer.num_training_batches
    return RunPlace(epoch + 1, 0) if is_over else RunPlace(epoch, batches.processed)


class KeepsPlace:
    """Half of a data module: puts the place of the run into checkpoints, and lets the training data go on from there."""

    def __init__(self) -> None:
        super().__init__()
        self._place: RunPlace | None = None  # where a resumed run goes on
        self._resume: Callable[[RunPlace], None] | None = None

    @property
    def _run(self) -> Any:  # Any: as above
        return self.trainer  # type: ignore[attr-defined]  # Lightning's half of the data module has it

    def _goes_on_by(self, resume: Callable[[RunPlace], None]) -> None:
        """Name what lets the training data begin at a place, as soon as there is such data.

        The checkpoint may have been read by then, or not yet: strategies that split weights read it after the loaders are made.
        """
        self._resume = resume
        self._go_on()

    def _go_on(self) -> None:
        if self._place is not None and self._resume is not None:
            self._resume(self._place)
            self._place = None

    def state_dict(self) -> dict[str, Any]:  # Any: Lightning's own type
        """Where the run stands."""
        place = RunPlace(0, 0) if self._run is None else place_of(self._run)
        return {"version": STATE_VERSION, "place": tuple(place)}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:  # Any: as above
        """Go on from where `state_dict` was asked for."""
        if self._run is not None and self._run.state.fn != "fit":
            return  # testing a checkpoint is no resume
        if state_dict.get("version") != STATE_VERSION:
            raise ValueError(
                f"The checkpoint holds version {state_dict.get('version')!r} of the state of the data; this release reads "
                f"version {STATE_VERSION}. Resume with the release that wrote it."
            )
        # Lightning asks this of the loader; here the data module keeps the place.
        warnings.filterwarnings("ignore", message="You're resuming from a checkpoint that ended", category=UserWarning)
        self._place = RunPlace(*state_dict["place"])
        self._go_on()
