"""Folders that appear complete or not at all."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replaced_folder(folder: Path, *, replaces: str) -> Iterator[Path]:
    """Yield an empty folder to write into; it takes the place of `folder` when the block ends without an error.

    A crash in between leaves the old folder, or nothing, under the name.

    Args:
        folder: Final place. What is there may be replaced only if it holds the file `replaces`, or is empty.
        replaces: Name of a file by which an earlier version of the same thing is known.
    """
    if folder.exists() and (not folder.is_dir() or (any(folder.iterdir()) and not (folder / replaces).exists())):
        raise FileExistsError(
            f"{folder} exists and holds something else (no {replaces!r} in it), so it is not overwritten. Give another folder."
        )
    partial = folder.with_name(f".{folder.name}.partial-{os.getpid()}")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        old = folder.with_name(f".{folder.name}.old-{os.getpid()}")
        if folder.exists():
            folder.rename(old)
        partial.rename(folder)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
