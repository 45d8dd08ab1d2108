"""Tokenised prompt groups on disk: written as a stream, read by number, the same group back to the last bit."""

from __future__ import annotations

import hashlib
import json
import mmap
import operator
import os
import shutil
import tempfile
from collections.abc import Iterable, Mapping
from itertools import accumulate, pairwise
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Final, Protocol, Self
from weakref import finalize

import numpy as np
from numpy.typing import NDArray
from typing_extensions import override

from lightning_pref.data.groups import PromptGroup
from lightning_pref.data.store_files import COLUMNS, FORMAT_VERSION, MANIFEST, check_file, cure, digest_of, read_manifest

# Bits of the column "present": which of the optional fields a group has.
_RANKS, _SCORES, _LABELS, _MARGIN, _STEP_ENDS, _STEP_LABELS = (1 << bit for bit in range(6))

# Tokens the writer holds before it writes them out: 4 MiB of uint32.
_TOKENS_PER_FLUSH: Final = 1 << 20


class GroupTable(Protocol):
    """Groups by index, with the sizes of all of them as vectors: what batch planning and reference caches need."""

    @property
    def digest(self) -> str: ...
    @property
    def row_ids(self) -> NDArray[np.int64]: ...
    @property
    def prompt_lengths(self) -> NDArray[np.int64]: ...
    @property
    def num_responses(self) -> NDArray[np.int64]: ...
    @property
    def response_tokens(self) -> NDArray[np.int64]: ...
    @property
    def response_offsets(self) -> NDArray[np.int64]: ...
    @property
    def weights(self) -> NDArray[np.float64]: ...
    @property
    def prompt_keys(self) -> NDArray[np.uint64]: ...
    def __len__(self) -> int: ...
    def __getitem__(self, index: int, /) -> PromptGroup: ...


class GroupStoreWriter:
    """Writes groups one by one into a new folder, in bounded memory.

    Everything goes into a temporary folder beside the final one, which appears by one rename when all is written: a crash
    leaves no half store. Use it as a context manager; an exception inside discards what was written.

    Args:
        folder: Where the store shall lie; must not exist yet.
        vocab_size: Number of token ids; decides whether an id takes two or four bytes.
    """

    def __init__(self, folder: str | Path, *, vocab_size: int) -> None:
        self.folder = Path(folder)
        self.report: Mapping[str, object] = {}
        if self.folder.exists():
            raise FileExistsError(f"{self.folder} exists already; a store is written once, into a folder of its own.")
        self.folder.parent.mkdir(parents=True, exist_ok=True)
        self._staging = Path(tempfile.mkdtemp(prefix=f".{self.folder.name}.", dir=self.folder.parent))
        self._vocab_size = vocab_size
        dtypes = {"tokens": "<u2" if vocab_size <= 1 << 16 else "<u4", **COLUMNS}
        self._columns = {name: _ColumnFile(self._staging / f"{name}.bin", dtype) for name, dtype in dtypes.items()}
        self._tokens: list[NDArray[Any]] = []  # any integer type, as the tokenizer gave it
        self._num_tokens_held = 0
        self._sources: dict[str, int] = {}
        self._num_groups = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if kind is None:
            self._finish()
        else:
            self._discard()

    def __len__(self) -> int:
        return self._num_groups

    def append(self, group: PromptGroup) -> None:
        """Add one group; its token ids must be smaller than the vocabulary."""
        add, num_responses = self._add, len(group.responses)
        key = hashlib.blake2b(np.asarray(group.prompt, dtype="<i8").tobytes(), digest_size=8).digest()
        present = sum(
            bit
            for bit, value in (
                (_RANKS, group.ranks),
                (_SCORES, group.scores),
                (_LABELS, group.labels),
                (_MARGIN, group.margin),
                (_STEP_ENDS, group.step_ends),
                (_STEP_LABELS, group.step_labels),
            )
            if value is not None
        )
        add("row_ids", (group.row_id,))
        add("prompt_lengths", (len(group.prompt),))
        add("prompt_keys", (int.from_bytes(key, "little"),))
        add("num_responses", (num_responses,))
        add("weights", (group.weight,))
        add("margins", (0.0 if group.margin is None else group.margin,))
        add("source_ids", (self._sources.setdefault(group.source, len(self._sources)),))
        add("present", (present,))
        add("response_lengths", [len(response) for response in group.responses])
        add("ranks", group.ranks or (0,) * num_responses)
        add("scores", group.scores or (0.0,) * num_responses)
        add("labels", group.labels or (False,) * num_responses)
        for name, marks in (("step_ends", group.step_ends), ("step_labels", group.step_labels)):
            add(f"num_{name}", [len(entry) for entry in marks or ((),) * num_responses])
            add(name, [mark for entry in marks or () for mark in entry])
        self._tokens += [group.prompt, *group.responses]
        self._num_tokens_held += group.num_tokens
        self._num_groups += 1
        if self._num_tokens_held >= _TOKENS_PER_FLUSH:
            self._flush()

    def _add(self, name: str, values: Iterable[Any]) -> None:  # Any: integers, floats or booleans by column
        self._columns[name].held.extend(values)

    def _flush(self) -> None:
        if self._tokens:
            tokens = np.concatenate(self._tokens)
            if tokens.min() < 0 or tokens.max() >= self._vocab_size:
                raise ValueError(
                    f"Token ids must be in [0, {self._vocab_size}), the vocabulary given to the store, but ids from "
                    f"{tokens.min()} to {tokens.max()} were appended; give the size of the tokenizer with its added tokens."
                )
            self._columns["tokens"].write(tokens)
            self._tokens, self._num_tokens_held = [], 0
        for column in self._columns.values():
            column.flush()

    def _finish(self) -> None:
        try:
            self._flush()
            if not self._num_groups:
                raise ValueError(f"Nothing was appended to the store {self.folder}; a store needs at least one group.")
            files = {path.name: facts for path, facts in (column.close() for column in self._columns.values())}
            manifest = {
                "format_version": FORMAT_VERSION,
                "digest": digest_of([FORMAT_VERSION, list(self._sources), {k: v["sha256"] for k, v in files.items()}]),
                "num_groups": self._num_groups,
                "sources": list(self._sources),
                "files": files,
                "report": dict(self.report),
            }
            with (self._staging / MANIFEST).open("w", encoding="utf-8") as file:
                json.dump(manifest, file, indent=1)
                file.flush()
                os.fsync(file.fileno())
            self._staging.replace(self.folder)
        except BaseException:
            self._discard()
            raise

    def _discard(self) -> None:
        for column in self._columns.values():
            column.file.close()
        shutil.rmtree(self._staging, ignore_errors=True)


class _ColumnFile:
    """One column on its way to disk, with the digest of what was written so far."""

    def __init__(self, path: Path, dtype: str) -> None:
        self.path, self.dtype = path, dtype
        self.file: BinaryIO = path.open("wb")
        self.held: list[Any] = []  # Any: integers, floats or booleans by column
        self._sha256 = hashlib.sha256()

    def write(self, values: NDArray[Any]) -> None:
        data = values.astype(self.dtype, copy=False).tobytes()
        self._sha256.update(data)
        self.file.write(data)

    def flush(self) -> None:
        if self.held:
            self.write(np.array(self.held, dtype=self.dtype))
            self.held = []

    def close(self) -> tuple[Path, dict[str, object]]:
        self.file.flush()
        os.fsync(self.file.fileno())
        self.file.close()
        status = self.path.stat()
        return self.path, {
            "dtype": self.dtype,
            "bytes": status.st_size,
            "mtime_ns": status.st_mtime_ns,
            "sha256": self._sha256.hexdigest(),
        }


class GroupStore:
    """A folder of tokenised groups: `store[i]` is the group that was appended as number i.

    What there is of each row and response besides tokens is memory-mapped. Tokens are read by position instead, because an
    epoch touches all of them, and a kernel that maps two megabytes at each touch would soon have the whole file resident.

    Opening checks the manifest and the size of every file. A file of up to 32 MiB, and a larger one that was touched since it
    was written (another time stamp), is read through and compared with its digest.

    Args:
        folder: What a `GroupStoreWriter` wrote.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.manifest = read_manifest(self.folder)
        self.digest: str = self.manifest["digest"]
        self._num_groups: int = self.manifest["num_groups"]
        self._sources: list[str] = self.manifest["sources"]
        for name, facts in self.manifest["files"].items():
            check_file(self.folder, name, facts)
        dtypes = {name.removesuffix(".bin"): np.dtype(facts["dtype"]) for name, facts in self.manifest["files"].items()}
        self._token_type = dtypes.pop("tokens")
        self._tokens = os.open(self.folder / "tokens.bin", os.O_RDONLY)
        finalize(self, os.close, self._tokens)
        self._columns = {name: _mapped(self.folder / f"{name}.bin", dtype) for name, dtype in dtypes.items()}
        self.row_ids: NDArray[np.int64] = self._columns["row_ids"]
        self.prompt_keys: NDArray[np.uint64] = self._columns["prompt_keys"]
        self.weights: NDArray[np.float64] = self._columns["weights"]
        self.prompt_lengths: NDArray[np.int64] = self._columns["prompt_lengths"].astype(np.int64)
        self.num_responses: NDArray[np.int64] = self._columns["num_responses"].astype(np.int64)
        self.response_offsets = _offsets(self.num_responses)
        lengths = self._columns["response_lengths"]
        self.response_tokens: NDArray[np.int64] = np.add.reduceat(lengths, self.response_offsets[:-1], dtype=np.int64)
        self._token_offsets = _offsets(self.prompt_lengths + self.response_tokens)
        if self._token_offsets[-1] * self._token_type.itemsize != self.manifest["files"]["tokens.bin"]["bytes"]:
            raise ValueError(
                f"{self.folder / MANIFEST} is not what was written: its parts contradict each other. {cure(self.folder)}"
            )
        self._step_offsets = {
            name: _offsets(self._columns[f"num_{name}"]) for name in ("step_ends", "step_labels") if self._columns[name].size
        }

    def __len__(self) -> int:
        return self._num_groups

    def __getitem__(self, index: int, /) -> PromptGroup:
        """The group of this number; its token ids are read-only."""
        i = operator.index(index)
        if not -self._num_groups <= i < self._num_groups:
            raise IndexError(f"Group {i} was asked of a store of {self._num_groups}.")
        i %= self._num_groups
        columns, present = self._columns, int(self._columns["present"][i])
        span = slice(int(self.response_offsets[i]), int(self.response_offsets[i + 1]))
        stops = list(accumulate(columns["response_lengths"][span].tolist(), initial=int(self.prompt_lengths[i])))
        tokens = self._read_tokens(int(self._token_offsets[i]), stops[-1])
        return PromptGroup(
            row_id=int(self.row_ids[i]),
            prompt=tokens[: stops[0]],
            responses=tuple(tokens[a:b] for a, b in pairwise(stops)),
            source=self._sources[columns["source_ids"][i]],
            ranks=tuple(columns["ranks"][span].tolist()) if present & _RANKS else None,
            scores=tuple(columns["scores"][span].tolist()) if present & _SCORES else None,
            labels=tuple(columns["labels"][span].tolist()) if present & _LABELS else None,
            margin=float(columns["margins"][i]) if present & _MARGIN else None,
            weight=float(self.weights[i]),
            step_ends=self._marks("step_ends", span) if present & _STEP_ENDS else None,
            step_labels=self._marks("step_labels", span) if present & _STEP_LABELS else None,
        )

    @override
    def __reduce__(self) -> tuple[type[GroupStore], tuple[Path]]:
        """Travel to a loader's worker as a path: the worker maps the same files itself."""
        return GroupStore, (self.folder,)

    @property
    def report(self) -> Mapping[str, Any]:
        """What the writer noted about how the rows were read (JSON)."""
        report: Mapping[str, Any] = self.manifest["report"]
        return report

    def _read_tokens(self, start: int, count: int) -> NDArray[Any]:
        size = self._token_type.itemsize
        return np.frombuffer(os.pread(self._tokens, count * size, start * size), dtype=self._token_type, count=count)

    def _marks(self, name: str, span: slice) -> tuple[tuple[Any, ...], ...]:  # Any: int or bool by column
        if name not in self._step_offsets:
            return ((),) * int(span.stop - span.start)
        offsets: list[int] = self._step_offsets[name][span.start : span.stop + 1].tolist()
        marks = self._columns[name]
        return tuple(tuple(marks[a:b].tolist()) for a, b in pairwise(offsets))


class GroupSubset:
    """Some groups of a table, in the order of `indices`; itself a table, with response numbers of its own from 0."""

    def __init__(self, table: GroupTable, indices: NDArray[np.int64]) -> None:
        self.table = table
        self.indices = indices
        self.digest = digest_of([table.digest, hashlib.sha256(indices.astype("<i8").tobytes()).hexdigest()])
        self.row_ids = table.row_ids[indices]
        self.prompt_keys = table.prompt_keys[indices]
        self.weights = table.weights[indices]
        self.prompt_lengths = table.prompt_lengths[indices]
        self.num_responses = table.num_responses[indices]
        self.response_tokens = table.response_tokens[indices]
        self.response_offsets = _offsets(self.num_responses)

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int, /) -> PromptGroup:
        return self.table[int(self.indices[index])]


def _mapped(path: Path, dtype: np.dtype[Any]) -> NDArray[Any]:
    """A file of numbers as an array that is read when it is looked at."""
    if not path.stat().st_size:  # an empty file cannot be mapped
        return np.empty(0, dtype=dtype)
    with path.open("rb") as file:
        return np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), dtype=dtype)


def _offsets(counts: NDArray[Any]) -> NDArray[np.int64]:
    """Where each entry starts in the flat array, and where the last one ends: [0, 3, 5] of [3, 2]."""
    return np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(counts, dtype=np.int64)])
