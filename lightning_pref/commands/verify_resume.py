"""`python -m lightning_pref verify-resume`: whether a run that is interrupted and resumed is the run that never was."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, Literal, get_args

import lightning as L
from lightning.pytorch.callbacks import Callback
from typing_extensions import override

from lightning_pref.checkpoints import checkpoints_of
from lightning_pref.commands.differences import first_difference, metrics_difference, whole_state

RecipeName = Literal["sft", "reward", "dpo", "rlhf"]


class KillAt(Callback):
    """Ends all processes of this run at once, without a chance to save anything, as `kill -9` does.

    Needs: to be started as the leader of its own process group.
    Logs: nothing.
    Changes: everything.

    Args:
        update: After how many updates.
    """

    def __init__(self, update: int) -> None:
        self.update = update

    @override
    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int) -> None:
        # Any: a batch of the user's own
        if trainer.global_step >= self.update and trainer.is_global_zero:
            os.killpg(os.getpgrp(), signal.SIGKILL)


def verify_resume(
    recipe: RecipeName | None = None,
    updates: int = 4,
    *,
    keep: str | None = None,
    timeout: float = 3600.0,
    flags: list[str] = [],  # noqa: B006  # read only, and a list is what may be given several times
) -> None:
    """Run a recipe for 2N updates; again, killed after N and resumed; and compare all that is left, bit for bit.

    Give the configuration by `--config` as to the recipe, and further flags of the recipe behind `--`.

    Args:
        recipe: Which recipe; if not given, that of the run folder in which the configuration lies.
        updates: N. The second run is killed after 1.5 N updates and goes on from its checkpoint at N.
        keep: Folder for the two runs, to look at them afterwards; they are removed if not given.
        timeout: Seconds that each run may take.
        flags: Of the recipe, as on its own command line.
    """
    if updates < 2:
        raise ValueError(f"`updates` must be at least 2, so that a run can be killed between two checkpoints, got {updates!r}.")
    name = recipe or _recipe_of(flags)
    root = Path(keep) if keep is not None else Path(tempfile.mkdtemp(prefix="verify-resume-"))
    common = [
        *flags,
        f"--run.root={root}",
        f"--trainer.max_steps={2 * updates}",
        f"--checkpoint.every_n_updates={updates}",
        "--checkpoint.every_n_epochs=null",
        "--checkpoint.every_minutes=null",
        "--checkpoint.keep_last=-1",
        "--checkpoint.at_end=true",
        "--checkpoint.dirpath=null",
        "--trainer.enable_checkpointing=null",
        "--run.export=false",
        "--run.resume=null",
    ]
    try:
        _say(f"{name}: {2 * updates} updates without interruption")
        _run(name, [*common, "--run.name=whole"], timeout)
        at = updates + updates // 2
        _say(f"{name}: the same, killed after {at} updates")
        killer = f'--trainer.callbacks+={{"class_path":"{__name__}.KillAt","init_args":{{"update":{at}}}}}'
        _run(name, [*common, "--run.name=parts", killer], timeout, killed=True)
        _say(f"{name}: resumed from its checkpoint after {updates} updates")
        _run(name, [*common, "--run.name=parts", "--run.resume=auto"], timeout)
        found = _difference(root / name / "whole", root / name / "parts")
    finally:
        if keep is None:
            shutil.rmtree(root, ignore_errors=True)
    if found is not None:
        raise ValueError(
            f"The resumed run is not the uninterrupted one; the first difference: {found}. Look for what draws on a clock, on "
            "the environment or on numbers of its own (a probe's time `budget`, a loader without a place, kernels that are not "
            "deterministic: `--trainer.deterministic true`)."
        )
    _say("identical")


def _recipe_of(flags: list[str]) -> str:
    """The recipe of `runs/<recipe>/<name>/config.yaml`."""
    configs = [flag.partition("=")[2] for flag in flags if flag.startswith("--config=")]
    names = [Path(config).absolute().parent.parent.name for config in configs]
    for name in names:
        if name in get_args(RecipeName):
            return name
    known = "|".join(get_args(RecipeName))
    raise ValueError(f"Which recipe is meant? Give `--recipe {known}`, or the `config.yaml` of a run folder by `--config`.")


def _run(recipe: str, flags: list[str], timeout: float, *, killed: bool = False) -> None:
    command = [sys.executable, "-m", f"lightning_pref.recipes.{recipe}", *flags]
    # A session of its own: `KillAt` ends the process group, and that must not be ours.
    done = subprocess.run(  # noqa: S603  # this package, with the user's own flags
        command, timeout=timeout, start_new_session=True, check=False, capture_output=True, text=True
    )
    wanted = -signal.SIGKILL if killed else 0
    if done.returncode != wanted:
        ending = "\n".join((done.stdout + done.stderr).strip().splitlines()[-20:])
        raise ValueError(
            f"The run ended with exit code {done.returncode}, {wanted} was expected: {' '.join(command)}\n{ending}\n"
            "Repair the run first; a data set or `max_epochs` that ends it early needs a smaller `--updates`."
        )


def _difference(whole: Path, parts: Path) -> str | None:
    """The first thing in which two finished runs differ."""
    ends = [checkpoints_of(folder / "checkpoints")[0] for folder in (whole, parts)]
    if ends[0].name != ends[1].name:
        return f"the last checkpoint is {ends[0].name} in the whole run and {ends[1].name} in the resumed one"
    return first_difference(whole_state(ends[0]), whole_state(ends[1])) or metrics_difference(whole, parts)


def _say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()
