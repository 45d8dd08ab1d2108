"""The folder of a run: its name, who may write into it, and that nobody else does while the run lives."""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import re
import socket
import sys
from datetime import datetime
from itertools import count
from pathlib import Path
from typing import BinaryIO
from weakref import WeakSet

from lightning_pref.checkpoints import check_whole, newest_whole, read_manifest

# Processes that Lightning starts for further devices inherit it, so that all ranks agree on the folder.
RUN_NAME_VARIABLE = "LIGHTNING_PREF_RUN_NAME"
LOCK_FILE = ".lock"
# All that a run leaves which ended before its first update; the next one may write over it.
START_FILES = ("config.yaml", "hparams.yaml", "events.out.tfevents.*", LOCK_FILE)

logger = logging.getLogger(__name__)


def run_name(asked: str | None, root: Path) -> str:
    """The name of this run: what the user asked for, else date and time, the same in every process of the run.

    Args:
        asked: By the user.
        root: Where the folders of the recipe's runs lie. Of two runs that begin in the same second one takes the next number.
    """
    if asked is not None:
        return asked
    if RUN_NAME_VARIABLE in os.environ:
        return os.environ[RUN_NAME_VARIABLE]
    if (processes := processes_from_outside()) > 1:
        raise ValueError(
            f"This run has {processes} processes that were started from outside (torchrun, SLURM), and each would make up "
            "a run name of its own. Name the run: `--run.name my-run`."
        )
    _refuse_unspeakable(root)
    now = name_by_time()
    for name in (now if number == 1 else f"{now}-{number}" for number in count(1)):
        # Only one of several processes makes a folder.
        with contextlib.suppress(FileExistsError):
            (root / name).mkdir(parents=True)
            break
    os.environ[RUN_NAME_VARIABLE] = name
    return name


def name_by_time() -> str:
    """Date and time as the name of a run."""
    # Digits alone: `%b` and its like would follow the locale.
    return datetime.now().strftime("%Y%m%d-%H%M%S")


def processes_from_outside() -> int:
    """How many processes torchrun, Ray or SLURM started for this run; 1 where Lightning starts them itself."""
    if "WORLD_SIZE" in os.environ:
        by_lightning = "LOCAL_RANK" in os.environ and "RANK" not in os.environ
        return 1 if by_lightning else int(os.environ["WORLD_SIZE"])
    # In a job of such a name Lightning does not take itself for one of its tasks.
    in_shell = os.environ.get("SLURM_JOB_NAME") in ("bash", "interactive")
    return 1 if in_shell else int(os.environ.get("SLURM_NTASKS", "1"))


def warn_of_restarts() -> None:
    """Say it beforehand where torchrun is to start processes again that could not find one another."""
    restarts = int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0"))
    if restarts and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True" and is_first_process():
        logger.warning(
            "torchrun is to start the processes again if one dies (`--max-restarts %d`), but as it was started they would look "
            "for one another at the addresses of the former ones, and fail (pytorch/pytorch#135712). Start torchrun with "
            "`--rdzv-backend=c10d` (or `--standalone`) and TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 in its environment.",
            restarts,
        )


def is_first_process() -> bool:
    """Whether this process is the first of its run, as the launchers tell before there is a trainer."""
    # torchrun knows the rank among all; with other launchers the first process is number 0 of machine 0.
    if "RANK" in os.environ:
        return os.environ["RANK"] == "0"
    return all(os.environ.get(name, "0") == "0" for name in ("NODE_RANK", "LOCAL_RANK", "SLURM_PROCID"))


class RunFolder:
    """The claim of one run on its folder; the first process of the run holds it as long as it lives.

    The kernel takes the lock away when the process ends, however it ends, so that nothing stale can stay behind.

    Args:
        path: The folder; made if it is not there.
        resumes: Whether the run goes on with what the folder holds. If not, a folder that holds another run is refused: its
            metrics and configuration would be overwritten.
    """

    def __init__(self, path: Path, *, resumes: bool) -> None:
        self.path = path
        self._lock: BinaryIO | None = None
        _refuse_unspeakable(path)
        if not is_first_process():
            path.mkdir(parents=True, exist_ok=True)
            return
        is_new = not path.exists()
        path.mkdir(parents=True, exist_ok=True)
        self._lock = _locked(path / LOCK_FILE)
        _claims.add(self)
        if not resumes and not is_new and holds_more_than_a_start(path):
            self.release()
            raise ValueError(_not_empty(path))

    def release(self) -> None:
        """Let another run have the folder."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None


_claims: WeakSet[RunFolder] = WeakSet()


def _let_go_in_child() -> None:
    """A forked worker of a loader shares the lock, and would keep it if it outlived the run."""
    for claim in _claims:
        claim.release()


os.register_at_fork(after_in_child=_let_go_in_child)


def holds_more_than_a_start(folder: Path) -> bool:
    """Whether a folder holds a run that got anywhere."""
    entries = folder.iterdir() if folder.exists() else []
    return any(not any(entry.match(pattern) for pattern in START_FILES) for entry in entries)


def _refuse_unspeakable(path: Path) -> None:
    """Refuse a name whose bytes the encoding of file names has no characters for; TensorBoard would fail on it."""
    try:
        str(path).encode()
    except UnicodeEncodeError as error:
        shown = str(path).encode("ascii", "backslashreplace").decode()
        raise ValueError(
            f"The name of the run folder {shown} has characters that this process cannot tell from its locale (file names are "
            f"taken for {sys.getfilesystemencoding()}). Set the environment to `LC_ALL=C.UTF-8` or `PYTHONUTF8=1`, or choose a "
            "`--run.name` of ASCII letters."
        ) from error


def _not_empty(folder: Path) -> str:
    go_on = f" To go on with the run it holds: `--run.name {folder.name} --run.resume auto`."
    return f"The run folder {folder} is not empty. Choose another `--run.name`, or remove the folder." + (
        go_on if (folder / "checkpoints").exists() else ""
    )


def _locked(path: Path) -> BinaryIO | None:
    """The lock file, locked by this process; `None` where the file system knows no locks."""
    file = path.open("a+b")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        file.seek(0)
        holder = file.read(200).decode("utf-8", "replace").strip() or "an unknown one"
        file.close()
        raise ValueError(
            f"Another process is writing into the run folder {path.parent}: {holder}. Two runs in one folder would mix their "
            "metrics and overwrite each other's checkpoints. Wait until it ends, stop it, or choose another `--run.name`."
        ) from error
    except OSError as error:
        logger.warning(
            "The run folder %s cannot be locked (%s); take care that no second run writes into it.", path.parent, error.strerror
        )
        file.close()
        return None
    file.seek(0)
    file.truncate()
    file.write(f"process {os.getpid()} on {socket.gethostname()}, since {datetime.now():%Y-%m-%d %H:%M:%S}\n".encode())
    file.flush()
    return file


AUTO = "auto"
# What a run writes line by line. One that ended before its first checkpoint begins again, and so do they.
_WRITTEN_BY_LINE = ("metrics.csv", "alerts.jsonl", "events.out.tfevents.*")


def resume_point(asked: str | None, folder: Path, checkpoints: Path) -> Path | None:
    """The checkpoint that a run goes on from, or `None` where it begins.

    Args:
        asked: A checkpoint, or `auto` for the newest whole one of the folder, if there is any.
        folder: Of the run.
        checkpoints: Where its checkpoints lie.
    """
    if asked is None:
        return None
    if asked != AUTO:
        checkpoint = Path(asked)
        if not checkpoint.exists():
            raise FileNotFoundError(
                f"`--run.resume`: there is no checkpoint {checkpoint}. Those of this run lie in {checkpoints}; "
                f"`--run.resume {AUTO}` takes the newest whole one."
            )
        if read_manifest(checkpoint) is not None or _is_ours(checkpoint):
            check_whole(checkpoint)
        return checkpoint
    found, broken = newest_whole(checkpoints)
    for finding in broken:
        logger.warning("Left out, since it is not whole: %s.", finding)
    if found is None and broken:
        raise ValueError(
            f"`--run.resume {AUTO}`: none of the {len(broken)} checkpoint(s) in {checkpoints} is whole ({broken[0]}). "
            "Beginning anew would overwrite what is there; remove the folder, or choose another `--run.name`, to do that."
        )
    if found is None and (folder / "summary.json").exists():
        raise ValueError(
            f"`--run.resume {AUTO}`: {folder} holds a finished run, and there is no checkpoint of it in {checkpoints}. Beginning "
            "anew would overwrite it. Choose another `--run.name`, or name the checkpoint to go on from."
        )
    if found is None:
        logger.info("There is no checkpoint in %s yet: the run begins.", folder)
        if is_first_process():
            for pattern in _WRITTEN_BY_LINE:
                for path in folder.glob(pattern):
                    path.unlink()
    else:
        logger.info("The run goes on from %s.", found)
    return found


def _is_ours(checkpoint: Path) -> bool:
    """Whether a checkpoint has the name that ours have; those of others have no manifest, and are taken as they are."""
    return re.fullmatch(r"step=\d+\.ckpt", checkpoint.name) is not None
