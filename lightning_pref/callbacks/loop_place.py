"""Lightning's loops, made to tell and to take up a place between two micro-batches.

Lightning resumes from where its own checkpoints are written, in hooks that run before a batch, a validation or an epoch has been
finished. What is here makes its counters in a checkpoint say what they would say if there were a hook between two batches.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lightning as L

from lightning_pref.callbacks.hosts import HELD

# Any: the state of Lightning's fit loop, and of loaders of the user's own.


def loader_states(trainer: L.Trainer) -> list[Any]:
    """What the user's own loaders of this process tell of their place; those that tell nothing are left out."""
    combined = trainer.fit_loop._combined_loader  # noqa: SLF001  # no public way
    return [] if combined is None else combined._state_dicts()  # noqa: SLF001  # as above


def load_loaders(trainer: L.Trainer) -> None:
    """Hand the loaders their place where Lightning did not: it made them before it read the checkpoint, to tell a length."""
    loop = trainer.fit_loop
    states, combined, fetcher = loop._combined_loader_states_to_load, loop._combined_loader, loop._data_fetcher  # noqa: SLF001
    if states and combined is not None and fetcher is not None:
        combined._load_state_dicts(states)  # noqa: SLF001  # as above
        iter(fetcher)
        loop._combined_loader_states_to_load = []  # noqa: SLF001  # as above


def counted_steps(trainer: L.Trainer) -> int:
    """How often Lightning has stepped, as loggers count."""
    return trainer.fit_loop.epoch_loop._batches_that_stepped  # noqa: SLF001  # no public way


def hold_schedules(trainer: L.Trainer) -> Callable[[], None]:
    """Keep the schedules that go by a metric as they are; gives what ends that.

    Lightning goes through the end of the batch that a checkpoint was written after once more, and steps them there.
    """
    held = [config for config in trainer.lr_scheduler_configs if config.interval == "step" and config.reduce_on_plateau]
    for config in held:
        config.interval = HELD

    def release() -> None:
        for config in held:
            config.interval = "step"

    return release


def begin_again(trainer: L.Trainer, steps: int) -> None:
    """The loops of a resumed run, at its first batch, as those of a run that was never interrupted.

    Args:
        trainer: Of the resumed run.
        steps: What `counted_steps` gave.
    """
    loop = trainer.fit_loop
    loop.epoch_loop._batches_that_stepped = steps  # noqa: SLF001  # no public way
    # An epoch that was resumed ends without a step of the schedules that go by a metric: Lightning has not kept the metric.
    loop._restarting = False  # noqa: SLF001  # the public setter makes it true again where `max_steps` is set


def at_batch_start(loop: dict[str, Any], loaders: list[Any]) -> None:
    """A batch is there, and not begun: it will be fetched again."""
    loop["state_dict"].pop("combined_loader", None)
    if loaders:
        loop["state_dict"]["combined_loader"] = loaders
    progress = loop["epoch_loop.batch_progress"]
    progress["is_last_batch"] = False
    for count in (progress["total"], progress["current"]):
        count["ready"] -= 1


def inside_epoch(loop: dict[str, Any]) -> None:
    """Training ends inside an epoch, whose end has been counted."""
    for count in (loop["epoch_progress"]["total"], loop["epoch_progress"]["current"]):
        count["processed"] -= 1
    loop["epoch_loop.batch_progress"]["is_last_batch"] = False


def at_epoch_end(loop: dict[str, Any]) -> None:
    """Training ended with an epoch: a longer run begins the next one, and counts its batches from 0."""
    for count in (loop["epoch_progress"]["total"], loop["epoch_progress"]["current"]):
        count["ready"] += 1
    loop["epoch_loop.batch_progress"]["is_last_batch"] = False
    for name in ("batch_progress", "scheduler_progress", "automatic_optimization.optim_progress"):
        _zero(loop[f"epoch_loop.{name}"], "current")
    _zero(loop["epoch_loop.val_loop.batch_progress"], "total")


def _zero(progress: dict[str, Any], which: str) -> None:
    for name, value in progress.items():
        if name == which:
            progress[name] = dict.fromkeys(value, 0)
        elif isinstance(value, dict):
            _zero(value, which)
