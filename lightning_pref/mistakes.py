"""A user's mistake ends in one paragraph and exit code 2; a fault of the program ends in its traceback and exit code 1."""

from __future__ import annotations

import contextlib
import dis
import errno
import os
import sys
import traceback
from argparse import ArgumentError
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from types import CodeType, TracebackType
from typing import Final, NoReturn

import lightning as L
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException

from lightning_pref.advice import advice_of
from lightning_pref.checkpoints import checkpoints_of
from lightning_pref.escaping import on_terminal

PACKAGE: Final = Path(__file__).parent

MISTAKE: Final = 2
# As shells say it: 128 + SIGINT.
INTERRUPTED: Final = 130

# What shows the traceback of a mistake too; not a setting, so that no configuration is saved with it.
DEBUG: Final = "--debug"

# What a file or folder that was given can be at fault for, with the cure.
FILE_FAULTS: Final = {
    errno.ENOENT: "Correct the path.",
    errno.EACCES: "Allow this user to use it, or give another place.",
    errno.EPERM: "Allow this user to use it, or give another place.",
    errno.EROFS: "Give a place that can be written to.",
    errno.EISDIR: "Give a file in it.",
    errno.ENOTDIR: "Correct the path: a part of it is a file.",
    errno.ENAMETOOLONG: "Give a shorter name.",
    errno.ELOOP: "Correct the path: its links lead in a circle.",
    errno.ENOSPC: "Free some space, or give a place on another disk.",
    errno.EDQUOT: "Free some space, or give a place on another disk.",
}

# Where whole errors are a user's: by function and file, with the words before what was found.
_TRAINER: Final = Path(L.__file__).parent / "pytorch" / "trainer" / "trainer.py"
_LOOPS: Final = Path(L.__file__).parent / "pytorch" / "loops"
_TORCH_LOAD: Final = Path(torch.__file__).parent / "serialization.py"

_shows_tracebacks: ContextVar[bool] = ContextVar("shows_tracebacks", default=False)


class Ended(SystemExit):
    """The end of the process, already explained to the user.

    Args:
        text: What was said.
        code: Exit code.
    """

    def __init__(self, text: str, code: int = MISTAKE) -> None:
        super().__init__(text)
        self.code = code


@dataclass
class Progress:
    """How far a run has come, for what is said when it ends early.

    Attributes:
        folder: Of the run, once it is known.
    """

    folder: Path | None = None


@contextmanager
def mistakes_in_one_paragraph(*, debug: bool = False) -> Iterator[Progress]:
    """End in one paragraph without a traceback where the user is at fault, or has stopped the run.

    Args:
        debug: Show the traceback as well; also inside, for the first stages of a run.
    """
    progress, token = Progress(), _shows_tracebacks.set(debug or _shows_tracebacks.get())
    try:
        with outlives_its_reader():
            yield progress
    except Ended:
        raise
    except KeyboardInterrupt as error:
        end(_where_it_stopped(progress), error, INTERRUPTED)
    except SystemExit as error:
        # Lightning has caught the interrupt, has put the devices in order, and leaves with its own code.
        if not isinstance(error.__context__, KeyboardInterrupt):
            raise
        end(_where_it_stopped(progress), error, INTERRUPTED)
    except Exception as error:
        text = explanation(error)
        if text is None:
            raise
        end(text, error)
    finally:
        _shows_tracebacks.reset(token)


def end(text: str, error: BaseException | None = None, code: int = MISTAKE) -> NoReturn:
    """Say why it ends, as one paragraph, and leave.

    Args:
        text: What is wrong and what to do.
        error: Whose traceback is shown with `--debug`.
        code: Exit code.
    """
    if error is not None and _shows_tracebacks.get():
        traceback.print_exception(error)
    said = f"error: {one_paragraph(text)}" if code == MISTAKE else one_paragraph(text)
    # The reader of the messages may be gone.
    with contextlib.suppress(OSError):
        sys.stderr.write(said + "\n")
        sys.stderr.flush()
    raise Ended(said, code) from error


def without_debug(args: Sequence[str]) -> tuple[list[str], bool]:
    """The command line without `--debug`, and whether that was there.

    >>> without_debug(["--run.name=a", "--debug"])
    (['--run.name=a'], True)
    """
    rest = [arg for arg in args if arg != DEBUG]
    return rest, len(rest) < len(args)


def one_paragraph(text: str) -> str:
    r"""The text on one line, with the control characters in it spelled out: a terminal would obey them.

    >>> one_paragraph("two\n  lines \x1b[31m")
    'two lines \\x1b[31m'
    """
    return on_terminal(" ".join(text.split()))


def explanation(error: Exception) -> str | None:
    """What to tell the user, or `None` if this is no mistake of theirs."""
    return next((text for explain in _EXPLANATIONS if (text := explain(error)) is not None), None)


@contextmanager
def outlives_its_reader() -> Iterator[None]:
    """Go on where the program that reads the output ends first, as in `... | head`: hours of training are worth more."""
    kept = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = _Outliving(sys.stdout), _Outliving(sys.stderr)
    try:
        yield
    finally:
        # What is in the buffers would fail after everything else, when Python ends.
        sys.stdout.flush()
        sys.stderr.flush()
        sys.stdout, sys.stderr = kept


class _Outliving:
    """A text stream that writes into nothing once its reader is gone."""

    def __init__(self, stream: object) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> object:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        return self._guarded(lambda: self._stream.write(text), len(text))  # type: ignore[attr-defined]

    def writelines(self, lines: Sequence[str]) -> None:
        self.write("".join(lines))

    def flush(self) -> None:
        self._guarded(lambda: self._stream.flush() or 0, 0)  # type: ignore[attr-defined]

    def _guarded(self, action: Callable[[], int], otherwise: int) -> int:
        try:
            return action()
        except BrokenPipeError:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._stream.fileno())  # type: ignore[attr-defined]
            os.close(nowhere)
            return otherwise


def _where_it_stopped(progress: Progress) -> str:
    checkpoints = [] if progress.folder is None else checkpoints_of(progress.folder / "checkpoints")
    if progress.folder is None or not checkpoints:
        return "Stopped (Ctrl-C); no checkpoint was written yet."
    return (
        f"Stopped (Ctrl-C); the last checkpoint is {checkpoints[0]}. Go on with `--run.name {progress.folder.name} "
        "--run.resume auto`, and the other settings as they were."
    )


def _frames(error: BaseException) -> list[TracebackType]:
    """From the call that this process began with to the line that raised."""
    frames, frame = [], error.__traceback__
    while frame is not None:
        frames.append(frame)
        frame = frame.tb_next
    return frames


def _said_by_us(error: Exception) -> str | None:
    """What this package raises on purpose is written for the user; what Python raises at a line of it is a fault of ours."""
    if not isinstance(error, ValueError | TypeError | OSError | ImportError):
        return None
    code = _raised_in(error)
    return str(error) if code is not None and Path(code.co_filename).is_relative_to(PACKAGE) else None


def _raised_in(error: Exception) -> CodeType | None:
    """The function with the `raise` that an error comes from; `None` for what Python raises by itself."""
    frames = _frames(error)
    if not frames:
        return None
    code, instruction = frames[-1].tb_frame.f_code, frames[-1].tb_lasti
    return code if dis.opname[code.co_code[instruction]] in ("RAISE_VARARGS", "RERAISE") else None


def _argument(error: Exception) -> str | None:
    """The parser's own words; `lightning_pref.arguments` has made them plain."""
    return str(error) if isinstance(error, ArgumentError) else None


def _trainer_setting(error: Exception) -> str | None:
    """Lightning refuses a setting of the Trainer, by itself or beside the data of the run."""
    building = any(
        frame.tb_frame.f_code.co_name == "__init__" and Path(frame.tb_frame.f_code.co_filename) == _TRAINER
        for frame in _frames(error)
    )
    code = _raised_in(error)
    meeting_data = code is not None and code.co_name == "setup_data" and Path(code.co_filename).is_relative_to(_LOOPS)
    refuses = (building and isinstance(error, ValueError | TypeError | ImportError)) or (
        meeting_data and isinstance(error, ValueError)
    )
    if isinstance(error, MisconfigurationException) or refuses:
        return f"The Trainer cannot be set up so: {error} Change the `--trainer.*` setting it speaks of, or leave it out."
    return None


def _checkpoint(error: Exception) -> str | None:
    """Torch cannot read a file as a checkpoint."""
    for frame in _frames(error):
        code = frame.tb_frame.f_code
        if code.co_name == "load" and Path(code.co_filename) == _TORCH_LOAD:
            first_sentence = " ".join(str(error).split()).partition(". ")[0].rstrip(".") or type(error).__name__
            given = frame.tb_frame.f_locals.get("f")
            name = given if isinstance(given, str | Path) else getattr(given, "name", "the file")
            return (
                f"{name}: this is no whole checkpoint ({first_sentence}). Give a file that a run wrote below `checkpoints/`; "
                "if this one is cut off, an earlier one."
            )
    return None


def _file(error: Exception) -> str | None:
    """The operating system refuses a file or folder."""
    if not isinstance(error, OSError) or error.errno not in FILE_FAULTS or error.filename is None:
        return None
    path = os.fsdecode(error.filename) if isinstance(error.filename, str | bytes) else str(error.filename)
    # A file that came with the program is no business of the user's.
    if Path(path).is_relative_to(PACKAGE) or "site-packages" in Path(path).parts:
        return None
    return f"{path}: {(error.strerror or type(error).__name__).lower()}. {FILE_FAULTS[error.errno]}"


# In this order; each knows its own.
_EXPLANATIONS: Final[tuple[Callable[[Exception], str | None], ...]] = (
    _said_by_us,
    advice_of,
    _argument,
    _trainer_setting,
    _checkpoint,
    _file,
)
