"""Where a run stands, as the loaders count."""

from __future__ import annotations

from typing import Any, NamedTuple


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
