"""Where rows come from: a file, a folder saved by `datasets`, or a dataset on the Hugging Face hub."""

from __future__ import annotations

import hashlib
import json
import re
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING

import pyarrow as pa
import pyarrow.parquet as pq
from typing_extensions import override

from lightning_pref.data.files import FILE_READERS, RawRow, decode_cells
from lightning_pref.data.rows import Place

if TYPE_CHECKING:
    from datasets import Dataset

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


class RowSource(ABC):
    """Rows that can be read again and again, one after the other.

    Attributes:
        name: What messages and reports call it.
    """

    def __init__(self, name: str, columns: Mapping[str, str] | None = None) -> None:
        self.name = name
        self._columns = dict(columns) if columns is not None else None

    def __iter__(self) -> Iterator[tuple[Place, RawRow]]:
        """Every row with its place; a row that could not be read is a `RowError`, which `parse_row` raises."""
        is_empty = True
        for place, row in self._rows():
            is_empty = False
            yield place, self._chosen(row)
        if is_empty:
            raise ValueError(f"{self.name}: there are no rows in it. Write at least one row, or leave the source out.")

    @property
    @abstractmethod
    def num_rows(self) -> int | None:
        """Number of rows where it can be told without reading them."""

    @abstractmethod
    def digest_parts(self) -> tuple[str, ...]:
        """What the rows are, whatever they are called: equal parts, equal rows."""

    @abstractmethod
    def _rows(self) -> Iterator[tuple[Place, RawRow]]: ...

    def _chosen(self, row: RawRow) -> RawRow:
        if self._columns is None or not isinstance(row, Mapping):
            return row
        return {name: row[theirs] for name, theirs in self._columns.items() if theirs in row}

    def _columns_digest(self) -> str:
        return json.dumps(self._columns, sort_keys=True)


class FileRows(RowSource):
    """The rows of one file; the reader is chosen by the extension."""

    def __init__(self, path: Path, columns: Mapping[str, str] | None = None) -> None:
        super().__init__(path.name, columns)
        self.path = path
        self._suffix = path.suffix.lower()
        if self._suffix not in FILE_READERS:
            known = ", ".join(FILE_READERS)
            hint = " Unpack it first." if self._suffix in (".gz", ".zst", ".bz2", ".zip", ".xz") else ""
            raise ValueError(f"{path}: unknown file type '{path.suffix}'; known: {known}.{hint}")
        if path.stat().st_size == 0:
            raise ValueError(f"{path}: the file is empty. Write at least one row, or leave the source out.")

    @property
    @override
    def num_rows(self) -> int | None:
        if self._suffix != ".parquet":
            return None
        try:
            return int(pq.read_metadata(self.path).num_rows)
        except (pa.ArrowException, OSError):  # the reading says what is wrong with it
            return None

    @override
    def digest_parts(self) -> tuple[str, ...]:
        with self.path.open("rb") as file:
            content = hashlib.file_digest(file, "sha256").hexdigest()
        return (self._suffix, str(self.path.stat().st_size), content, self._columns_digest())

    @override
    def _rows(self) -> Iterator[tuple[Place, RawRow]]:
        return FILE_READERS[self._suffix](self.path)

    @override
    def _chosen(self, row: RawRow) -> RawRow:
        chosen = super()._chosen(row)
        return decode_cells(chosen) if self._suffix == ".csv" and isinstance(chosen, Mapping) else chosen


class DatasetRows(RowSource):
    """The rows of a `datasets.Dataset`, memory-mapped by that library."""

    def __init__(self, dataset: Dataset, name: str, columns: Mapping[str, str] | None = None) -> None:
        super().__init__(name, columns)
        self._dataset = dataset

    @property
    @override
    def num_rows(self) -> int | None:
        return len(self._dataset)

    @override
    def digest_parts(self) -> tuple[str, ...]:
        return ("datasets", str(len(self._dataset)), self._dataset._fingerprint, self._columns_digest())  # noqa: SLF001  no public name for it

    @override
    def _rows(self) -> Iterator[tuple[Place, RawRow]]:
        for number, row in enumerate(self._dataset, start=1):
            yield Place(self.name, number), row


def read_rows(
    source: str | Path,
    *,
    split: str | None = None,
    subset: str | None = None,
    revision: str | None = None,
    columns: Mapping[str, str] | None = None,
) -> RowSource:
    """Opens a source of rows.

    Args:
        source: A file (.jsonl, .json, .csv, .parquet, .arrow), a folder written by `save_to_disk` of the `datasets` library,
            or the id of a dataset on the hub, "owner/name".
        split: Which split of a folder or hub dataset; it may be left out where there is one only.
        subset: Configuration of a hub dataset that has several.
        revision: Branch, tag or commit of a hub dataset.
        columns: The columns to read, {name here: name in the source}; all of them under their own names if not given.

    Raises:
        FileNotFoundError: If there is no such file, folder or hub dataset.
        ValueError: If the source is of no known kind, is damaged or empty, or has no such split.
    """
    path = Path(source)
    is_hub_id = not path.exists() and _is_hub_id(str(source))
    for name, value in (("subset", subset), ("revision", revision)):
        if value is not None and not is_hub_id:
            raise ValueError(f"{source}: `{name}` is for datasets on the hub, this is a file or folder. Leave it out.")
    if is_hub_id:
        name = ":".join(part for part in (str(source), subset, split) if part)
        return DatasetRows(_load_from_hub(str(source), subset, split, revision), name, columns)
    if not path.exists():
        raise FileNotFoundError(_not_found(path))
    if path.is_dir():
        return DatasetRows(_load_folder(path, split), f"{path.name}:{split}" if split else path.name, columns)
    if split is not None:
        raise ValueError(f"{source}: `split` is for `datasets` folders and hub datasets, this is one file. Leave it out.")
    return FileRows(path, columns)


def _is_hub_id(source: str) -> bool:
    """Two names with a slash between, unless that reads as a path: a known extension or an existing folder in front."""
    looks_like_id = _HUB_ID.fullmatch(source) is not None
    return looks_like_id and Path(source).suffix.lower() not in FILE_READERS and not Path(source).parent.exists()


def _load_from_hub(hub_id: str, subset: str | None, split: str | None, revision: str | None) -> Dataset:
    # Costs seconds, and rows in files do not need it.
    from datasets import load_dataset

    try:
        loaded = load_dataset(hub_id, subset, split=split, revision=revision)
    except Exception as error:  # the errors of the HTTP library below are none of this package's business
        kind = FileNotFoundError if isinstance(error, OSError) else ValueError
        raise kind(
            f"{hub_id}: no such file or folder at {Path(hub_id).absolute()}, and as a hub dataset (subset {subset}, split "
            f"{split}, revision {revision}) it cannot be loaded: {error} Without a connection, download it on a machine that has "
            f"one, by `datasets.load_dataset('{hub_id}').save_to_disk(folder)`, and give the folder."
        ) from error
    return _only_split(loaded, hub_id)


def _load_folder(path: Path, split: str | None) -> Dataset:
    if not (path / "state.json").exists() and not (path / "dataset_dict.json").exists():
        raise ValueError(
            f"{path.absolute()}: a folder that was not written by `save_to_disk` of `datasets`; it holds {_listing(path)}. "
            "Name one of the files."
        )
    # Costs seconds, and rows in files do not need it.
    from datasets import DatasetDict, load_from_disk

    try:
        loaded = load_from_disk(str(path))
    except Exception as error:  # Arrow's, JSON's and the library's own: any of them means the same
        raise ValueError(f"{path.absolute()}: the saved dataset is damaged ({error}). Save it again.") from error
    if split is None:
        return _only_split(loaded, str(path))
    if not isinstance(loaded, DatasetDict):
        raise ValueError(f"{path}: `split` is '{split}', but the folder holds one dataset without splits. Leave `split` out.")
    if split not in loaded:
        near = get_close_matches(split, loaded, n=1)
        hint = f" Did you mean '{near[0]}'?" if near else ""
        raise ValueError(f"{path}: there is no split '{split}'; existing: {', '.join(sorted(loaded))}.{hint}")
    return loaded[split]


def _only_split(loaded: object, name: str) -> Dataset:
    from datasets import Dataset, DatasetDict

    if isinstance(loaded, Dataset):
        return loaded
    if not isinstance(loaded, DatasetDict):
        raise TypeError(f"{name}: expected a dataset or splits of one, found {type(loaded).__name__}.")
    if len(loaded) != 1:
        raise ValueError(f"{name}: there are several splits ({', '.join(sorted(loaded))}). Choose one with `split`.")
    return next(iter(loaded.values()))


def _not_found(path: Path) -> str:
    parent = next(folder for folder in path.absolute().parents if folder.exists())
    names = sorted(entry.name for entry in parent.iterdir()) if parent.is_dir() else []
    near = get_close_matches(path.absolute().relative_to(parent).parts[0], names, n=3)
    hint = f"nearest names in {parent}: {', '.join(near)}" if near else f"{parent} holds {_listing(parent)}"
    return f"no such file or folder: {path.absolute()}; {hint}. Correct the path, or give a hub dataset as `owner/name`."


def _listing(folder: Path) -> str:
    names = sorted(entry.name for entry in folder.iterdir())
    return (", ".join(names[:5]) + (", ..." if len(names) > 5 else "")) or "nothing"
