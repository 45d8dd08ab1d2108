"""Checkpoints from which a run goes on as if it had never stopped, bit for bit."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import lightning as L
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.trainer.states import TrainerFn
from typing_extensions import override

from lightning_pref import checkpoints
from lightning_pref.callbacks.departure import Departure
from lightning_pref.callbacks.hosts import ALERTS_FILE, alerts_folder
from lightning_pref.callbacks.loop_place import (
    at_batch_start,
    at_epoch_end,
    begin_again,
    counted_steps,
    hold_schedules,
    inside_epoch,
    load_loaders,
    loader_states,
)
from lightning_pref.callbacks.process_state import (
    Processes,
    check_parts,
    keeps_place,
    load_parts,
    load_random_state,
    own_state,
    state_of_process,
)
from lightning_pref.checkpoints import Manifest
from lightning_pref.data.run_place import RunPlace, place_of

STATE = "exact_resume"  # where it stands in a checkpoint
STATE_VERSION = 2
ADVISORY = "config"  # what may be changed on the way, if one means it

logger = logging.getLogger(__name__)


class Mark(NamedTuple):
    """When the newest checkpoint was written."""

    epoch: int
    update: int


class Plan(NamedTuple):
    """What is to be done before the next batch."""

    signal: int = 0  # to leave on, as `Departure` numbers them; 0 to stay
    saves: bool = False
    loaders: Sequence[Any] = ()  # what the user's own loaders told of their place  # Any: their own format


class ExactResume(Callback):
    """Writes checkpoints between two updates, with all that a run needs to go on bit for bit.

    Needs: nothing. A module, a data module or a logger that keeps something of this process alone (a rollout in hand, partial
    means) hands it over by `rank_state` and takes it back by `load_rank_state`; ours do.
    Logs: nothing.
    Changes: nothing of the training. Takes SIGTERM, and SIGUSR1 under SLURM: the update in progress is finished, a checkpoint
    written, and the run left with the exit code that belongs to the signal.

    A checkpoint holds what Lightning's own do (weights, optimisers, schedules, loss scaler, loops, callbacks) and, of every
    process, the random states of Python, NumPy, torch and the GPU, the metrics that schedules and early stopping go by, the
    place of the user's own loaders, and what the parts handed over. It is taken when the first micro-batch of an update is there
    and not yet begun: everything of the former update has been logged and validated by then, and no gradient is half
    accumulated. Files are written aside, flushed, renamed and vouched for by a manifest.

    Data of one's own goes on inside an epoch where the data module (by `state_dict`) or the loader (as torchdata's
    `StatefulDataLoader`, with a length) tells its place, on each rank its own; otherwise checkpoints are written between epochs
    only, and a warning says so.

    Args:
        dirpath: Folder of the checkpoints; `checkpoints` in the folder of the run if not given.
        every_n_updates: Updates between two checkpoints; `None` for none by number.
        every_n_epochs: Epochs between two checkpoints; `None` for none by epoch.
        every_minutes: Minutes between two checkpoints; `None` for none by the clock.
        at_end: Whether to write one when training ends.
        keep_last: How many of the newest checkpoints are kept; -1 for all.
        monitor: Quantity by which further ones are kept, as it is logged (`val/loss`).
        keep_best: How many of the best by that quantity.
        mode: Whether the best has the smallest or the largest value.
    """

    def __init__(
        self,
        dirpath: str | None = None,
        *,
        every_n_updates: int | None = None,
        every_n_epochs: int | None = 1,
        every_minutes: float | None = 15.0,
        at_end: bool = True,
        keep_last: int = 2,
        monitor: str | None = None,
        keep_best: int = 0,
        mode: Literal["min", "max"] = "min",
    ) -> None:
        for name, value in (("every_n_updates", every_n_updates), ("every_n_epochs", every_n_epochs)):
            if value is not None and value < 1:
                raise ValueError(f"`{name}` must be at least 1, or None for none, got {value!r}.")
        if every_minutes is not None and not every_minutes > 0:
            raise ValueError(f"`every_minutes` must be more than 0, or None for none, got {every_minutes!r}.")
        if keep_last < 1 and keep_last != -1:
            raise ValueError(f"`keep_last` must be at least 1, or -1 for all, got {keep_last!r}.")
        if keep_best < 0 or bool(keep_best) != (monitor is not None):
            raise ValueError(
                f"`keep_best` ({keep_best!r}) and `monitor` ({monitor!r}) go together: how many checkpoints, and by what."
            )
        self.dirpath = dirpath
        self.every_n_updates = every_n_updates
        self.every_n_epochs = every_n_epochs
        self.every_minutes = every_minutes
        self.at_end = at_end
        self.keep_last = keep_last
        self.monitor = monitor
        self.keep_best = keep_best
        self.mode = mode
        # Gives, by name, digests of what the run depends on; a run that resumes must have the same ones.
        self.digests: Callable[[], Mapping[str, str]] | None = None
        self.last_saved: Path | None = None
        self._departure = Departure()
        self._processes: Processes | None = None
        self._loaded: dict[str, Any] | None = None
        self._settle: Callable[[dict[str, Any]], None] | None = None
        self._saved_at = Mark(-1, -1)
        self._plan = Plan()
        self._release: Callable[[], None] | None = None  # of schedules, at the first batch of a resumed run
        self._loaders: list[Any] = []  # of the checkpoint that is being written
        self._keeps_place = True
        self._validated_at = -1
        self._written = time.monotonic()

    # When.

    @override
    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        # First of all: what others do at the start of a batch belongs to that batch, and would be done twice.
        everyone = trainer.callbacks  # type: ignore[attr-defined]  # Lightning sets the list outside __init__
        everyone.remove(self)
        everyone.insert(0, self)

    @override
    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._processes = Processes()
        self._saved_at = Mark(place_of(trainer).epoch, trainer.global_step)
        self._written = time.monotonic()
        self._plan = Plan()
        self._departure.watch(trainer)
        self._keeps_place = keeps_place(trainer)
        check_parts(trainer)
        if trainer.num_training_batches == float("inf"):
            raise ValueError(
                "ExactResume cannot tell where an epoch ends, since the training data has no length. Give it one by "
                "`limit_train_batches=N` of the Trainer, or leave ExactResume out."
            )
        if self._loaded is not None:
            self._hand_back(trainer, self._loaded)
            self._release = hold_schedules(trainer)
            # Lightning takes back that the epoch was ready, and does not count it again.
            trainer.fit_loop.epoch_progress.current.ready += int(trainer.fit_loop.restarted_on_epoch_start)
            # What a callback has ended stays ended.
            trainer.should_stop = self._loaded["stopped"]
            if trainer.is_global_zero:
                self._remove_later(trainer)

    @override
    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int) -> None:
        # Any: a batch of the user's own
        if self._loaded is not None:
            # The batch is there now, as it was when the checkpoint was written.
            load_random_state(self._loaded["own"]["random"], pl_module.device)
            begin_again(trainer, self._loaded["batches_that_stepped"])
            self._let_go()
            return
        plan, self._plan = self._plan, Plan()
        if plan.saves:
            self._save(trainer, partial(at_batch_start, loaders=list(plan.loaders)), plan.loaders)
        if plan.signal:
            self._departure.leave(trainer, plan.signal, self.last_saved)

    @override
    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:  # Any: the user's own
        if (batch_idx + 1) % trainer.accumulate_grad_batches and batch_idx + 1 < trainer.num_training_batches:
            return
        assert self._processes is not None, "training has started"
        signal, is_late = self._processes.largest([self._departure.received, int(self._is_late())])
        is_between = place_of(trainer).batch == 0
        saves = (self._keeps_place or is_between) and bool(signal or is_late or self._is_due(trainer))
        # A loader that tells its place tells it before the next batch is taken from it.
        self._plan = Plan(signal, saves, loader_states(trainer) if saves and not is_between else ())

    @override
    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not trainer.sanity_checking:
            self._validated_at = trainer.global_step

    @override
    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        # Training ends inside an epoch. What others do now, at what they take for its end, a longer run would not do here.
        batch = place_of(trainer).batch
        if batch and self._is_new(trainer) and self._keeps_place and batch % trainer.accumulate_grad_batches == 0:
            self._save(trainer, inside_epoch, loader_states(trainer))

    @override
    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self._is_new(trainer) and place_of(trainer).batch == 0:
            self._save(trainer, at_epoch_end)
        elif self._is_new(trainer):
            logger.warning(
                "Training ended inside an epoch, at a place from which it cannot go on exactly: no checkpoint was written there. "
                "The newest is %s.",
                self.last_saved,
            )
        self._let_go()
        self._departure.forget()

    def _let_go(self) -> None:
        """Forget what was loaded: the run goes on, or has been at its end."""
        self._loaded = None
        if self._release is not None:
            self._release()
            self._release = None

    def _is_new(self, trainer: L.Trainer) -> bool:
        """Whether a checkpoint is to be written at the end, and the newest one is older than that."""
        return self.at_end and self._saved_at.update != trainer.global_step and not _is_trial(trainer)

    @override
    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        self._departure.forget()

    def _is_late(self) -> bool:
        return self.every_minutes is not None and time.monotonic() - self._written > 60 * self.every_minutes

    def _is_due(self, trainer: L.Trainer) -> bool:
        last = self._saved_at
        if trainer.global_step == last.update or _is_trial(trainer):
            return False
        by_updates, by_epochs = self.every_n_updates, self.every_n_epochs
        return bool(
            (by_updates and trainer.global_step // by_updates > last.update // by_updates)
            or (by_epochs and place_of(trainer).epoch // by_epochs > last.epoch // by_epochs)
        )

    # What.

    def _folder(self, trainer: L.Trainer) -> Path:
        return Path(self.dirpath) if self.dirpath is not None else Path(trainer.default_root_dir) / "checkpoints"

    def _save(self, trainer: L.Trainer, settle: Callable[[dict[str, Any]], None], loaders: Sequence[Any] = ()) -> None:
        """Write a checkpoint; every rank must come by.

        Args:
            trainer: Whose run it is.
            settle: Makes Lightning's counters say where the run stands.
            loaders: What the user's own loaders of this process told of their place.
        """
        folder = self._folder(trainer)
        checkpoint = folder / f"step={trainer.global_step}.ckpt"
        if trainer.is_global_zero:
            folder.mkdir(parents=True, exist_ok=True)
            checkpoints.sweep(folder)
        trainer.strategy.barrier("checkpoint folder")
        manifest = self._manifest(trainer)
        self._settle, self._loaders = settle, list(loaders)
        try:
            with checkpoints.explained_failure(checkpoint):
                trainer.save_checkpoint(checkpoints.part_path(checkpoint), weights_only=False)
                if trainer.is_global_zero:
                    checkpoints.publish(checkpoint, manifest)
        finally:
            self._settle = None
        self.last_saved = checkpoint
        if trainer.is_global_zero:
            self._forget_old(folder)
        trainer.strategy.barrier("checkpoint")
        self._saved_at = Mark(place_of(trainer).epoch, trainer.global_step)
        self._written = time.monotonic()

    def _manifest(self, trainer: L.Trainer) -> Manifest:
        place = place_of(trainer)
        # The value of an earlier validation is of other weights.
        is_fresh = self.monitor is not None and (self._validated_at == trainer.global_step or not self.monitor.startswith("val"))
        value = trainer.callback_metrics.get(self.monitor) if self.monitor is not None and is_fresh else None
        return Manifest(
            step=trainer.global_step,
            epoch=place.epoch,
            batch=place.batch,
            world_size=trainer.world_size,
            digests=self._digests(),
            value=None if value is None else float(value),
        )

    def _digests(self) -> dict[str, str]:
        return {} if self.digests is None else dict(self.digests())

    def _remove_later(self, trainer: L.Trainer) -> None:
        """Remove the checkpoints of the part of the run that was left behind by going back to an earlier one."""
        for checkpoint in checkpoints.checkpoints_of(self._folder(trainer)):
            manifest = checkpoints.read_manifest(checkpoint)
            if manifest is not None and manifest.step > trainer.global_step:
                checkpoints.remove(checkpoint)

    def _forget_old(self, folder: Path) -> None:
        if self.keep_last == -1:
            return
        there = checkpoints.checkpoints_of(folder)
        best = checkpoints.best_of(there, self.keep_best, largest=self.mode == "max")
        for checkpoint in there[self.keep_last :]:
            if checkpoint not in best and checkpoint != self.last_saved:
                checkpoints.remove(checkpoint)

    @override
    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        # Any: Lightning's own type. Others' checkpoints get all this too; only their place is where Lightning says.
        own = state_of_process(trainer, self._loaders if self._settle is not None else loader_states(trainer))
        alerts = _alerts_of(trainer)
        checkpoint[STATE] = {
            "version": STATE_VERSION,
            "ranks": (self._processes or Processes()).gathered(own),
            "world_size": trainer.world_size,
            "place": tuple(place_of(trainer)),
            "batches_that_stepped": counted_steps(trainer),
            "alerts_bytes": alerts.stat().st_size if alerts is not None and alerts.exists() else 0,
            "digests": self._digests(),
            "stopped": trainer.should_stop,
        }
        if self._settle is not None:
            self._settle(checkpoint["loops"]["fit_loop"])

    # Back.

    @override
    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        # Any: as above
        if trainer.state.fn != TrainerFn.FITTING:
            return  # testing a checkpoint is no resume
        state = checkpoint.get(STATE)
        if state is None:
            logger.warning(
                "The checkpoint was written without ExactResume: the run goes on with other random numbers, and what was half "
                "counted when it was written is lost."
            )
            return
        if state["version"] != STATE_VERSION:
            raise ValueError(
                f"The checkpoint holds version {state['version']!r} of the state of ExactResume; this release reads version "
                f"{STATE_VERSION}. Resume with the release that wrote it."
            )
        self._check_digests(state["digests"])
        own = own_state(state, RunPlace(*state["place"]), trainer)
        self._loaded = state | {"own": own}
        if own["loaders"]:
            # What Lightning wrote is the place of the first process's loaders.
            checkpoint["loops"]["fit_loop"]["state_dict"]["combined_loader"] = own["loaders"]

    def _check_digests(self, written: Mapping[str, str]) -> None:
        now = self._digests()
        changed = sorted(name for name in written.keys() & now.keys() if written[name] != now[name])
        if ADVISORY in changed:
            changed.remove(ADVISORY)
            logger.warning("The configuration is not the one of the checkpoint; the run goes on with the new one.")
        if changed:
            raise ValueError(
                f"The {' and the '.join(changed)} of this run {'is' if len(changed) == 1 else 'are'} not what the checkpoint was "
                "made with (the digests differ), so that going on would mix two runs. Resume with what it was made with, or "
                "begin a new run from its exported model: `--model.model <run folder>/export`."
            )

    def _hand_back(self, trainer: L.Trainer, loaded: dict[str, Any]) -> None:
        load_loaders(trainer)
        load_parts(trainer, loaded["own"])
        alerts = _alerts_of(trainer)
        if trainer.is_global_zero and alerts is not None and alerts.exists():
            # What was raised after the checkpoint will be raised again.
            os.truncate(alerts, min(alerts.stat().st_size, loaded["alerts_bytes"]))


def _is_trial(trainer: L.Trainer) -> bool:
    """Whether a run is a `fast_dev_run`, which leaves nothing behind."""
    return bool(trainer.fast_dev_run)  # type: ignore[attr-defined]  # Lightning sets it from another file


def _alerts_of(trainer: L.Trainer) -> Path | None:
    folder = alerts_folder(trainer)
    return None if folder is None else folder / ALERTS_FILE
