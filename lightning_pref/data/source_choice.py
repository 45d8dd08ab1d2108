"""Whether sources of rows and the settings that say how they are read go together."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from lightning_pref.data.playground_source import PlaygroundSettings, is_playground


def check_sources(
    train: Sequence[str],
    others: Sequence[str],
    of_files: Mapping[str, object],
    playground: PlaygroundSettings,
    *,
    limit_rows: int | None,
) -> None:
    """Raise for a source that is missing, and for a setting that none of the sources has a use for.

    Args:
        train: Sources of training rows.
        others: Further sources, such as those of validation.
        of_files: Settings of files, folders and hub data sets, by name; `None` where nothing is asked.
        playground: Settings of the playground.
        limit_rows: Training rows to read at most.
    """
    if not train:
        raise ValueError("`train` names no data; give a file, a folder, a hub id or `playground`.")
    sources = [*train, *others]
    files = [source for source in sources if not is_playground(source)]
    for name, value in of_files.items():
        if value is not None and not files:
            raise ValueError(f"`{name}` is for files, folders and hub data sets, and all data is {sources}; leave it out.")
    if len(files) == len(sources) and playground != PlaygroundSettings():
        raise ValueError(f"`playground` is set, but the data is {sources}; leave it out, or train on `playground`.")
    if limit_rows is not None and limit_rows < 1:
        raise ValueError(f"`limit_rows` must be at least 1, got {limit_rows!r}.")


def check_held_out(train: Sequence[str], val: Sequence[str] | None, val_split: str | None, val_size: float | None) -> None:
    """Raise for a `val_size` that is out of range, or that holds nothing out.

    Args:
        train: Sources of training rows.
        val: Sources of validation rows.
        val_split: Split of the validation data.
        val_size: What is to be held out of the training rows.
    """
    if val_size is not None and (not 0 <= val_size < math.inf or (val_size >= 1 and val_size != int(val_size))):
        raise ValueError(f"`val_size` is a share below 1 or a number of rows, got {val_size!r}.")
    if val_size is not None and not holds_out(train, val, val_split):
        own = "`playground.num_val_rows`" if val is None and all(map(is_playground, train)) else "`val` or `val_split`"
        raise ValueError(f"`val_size` holds out training rows, but the validation data comes from {own}; leave one of them out.")


def holds_out(train: Sequence[str], val: Sequence[str] | None, val_split: str | None) -> bool:
    """Whether validation rows can only be held out of the training rows; the playground writes its own."""
    return val is None and val_split is None and not all(map(is_playground, train))
