"""Leaving a run on a signal: the update in progress is finished and a checkpoint written first."""

from __future__ import annotations

import logging
import os
import shutil
import signal
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import lightning as L
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.pytorch.utilities.exceptions import SIGTERMException

logger = logging.getLogger(__name__)

# What `signal.signal` gives and takes.
Handler = Callable[[int, FrameType | None], Any] | int | None


class Departure:
    """Waits for the signals that ask a run to leave.

    Lightning's own handlers leave after any micro-batch, write (under SLURM) in the middle of whatever is going on, and talk to
    the other processes from inside a signal handler. These only take note; the run asks between two updates, and goes by the
    largest `received` of all processes, since a signal may reach one of them alone.
    """

    def __init__(self) -> None:
        # Which of `_signals` came, counted from 1; 0 for none. A later one outweighs an earlier one: a job that SLURM asks to
        # requeue is ended by it soon after, and is still to be requeued.
        self.received = 0
        self._signals: list[int] = [signal.SIGTERM]
        self._former: dict[int, Handler] = {}
        self._requeues = False

    def watch(self, trainer: L.Trainer) -> None:
        """Take the signals over; they are given back by `forget`."""
        self.received, self._signals, self._requeues = 0, [signal.SIGTERM], False
        environment = trainer._accelerator_connector.cluster_environment  # noqa: SLF001  # no public way
        if isinstance(environment, SLURMEnvironment):
            self._signals.append(environment.requeue_signal or signal.SIGUSR1)
            self._requeues = environment.auto_requeue
        if threading.current_thread() is not threading.main_thread():
            return  # Python lets only the main thread take signals; whoever runs a trainer elsewhere stops it otherwise
        for number in self._signals:
            self._former[number] = signal.signal(number, self._note)

    def forget(self) -> None:
        """Give the signals back to whom they belonged."""
        for number, handler in self._former.items():
            signal.signal(number, handler)
        self._former = {}

    def _note(self, number: int, _: FrameType | None) -> None:
        self.received = max(self.received, 1 + self._signals.index(number))

    def leave(self, trainer: L.Trainer, received: int, checkpoint: Path | None) -> None:
        """End the run; all processes come here together, the one that got the signal among them.

        Args:
            trainer: Whose run it is.
            received: The largest that any process received.
            checkpoint: What was saved.
        """
        number = self._signals[received - 1]
        self.forget()
        trainer.strategy.barrier("departure")
        if trainer.is_global_zero:
            logger.warning(
                "Leaving on %s after update %d; everything is in %s. Go on with `--run.resume auto` and the same `--run.name`.",
                signal.Signals(number).name,
                trainer.global_step,
                checkpoint,
            )
            if self._requeues and number != signal.SIGTERM:
                _requeue()
        raise SIGTERMException(128 + number)


def _requeue() -> None:
    """Ask SLURM to start this job again."""
    array, task = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_ARRAY_TASK_ID")
    job = f"{array}_{task}" if array and task else os.environ.get("SLURM_JOB_ID")
    scontrol = shutil.which("scontrol")
    if job is None or scontrol is None:
        logger.warning("The job cannot be put back into SLURM's queue: there is no `scontrol` here. Submit it again.")
        return
    result = subprocess.run([scontrol, "requeue", job], check=False)  # noqa: S603  # SLURM's own command and its own number
    if result.returncode:
        logger.warning("SLURM refused to requeue job %s (exit code %d). Submit it again.", job, result.returncode)
