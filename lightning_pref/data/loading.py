"""From sources of rows to a token store: tokenised once, found again by what the tokens depend on."""

from __future__ import annotations

import json
import logging
import shutil
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, Final, Literal

from filelock import FileLock

from lightning_pref import __version__
from lightning_pref.data.formats import parse_row
from lightning_pref.data.groups import PromptGroup
from lightning_pref.data.rows import DroppedRowError, Row, RowError
from lightning_pref.data.sources import RowSource, read_rows
from lightning_pref.data.store import GroupStore, GroupStoreWriter
from lightning_pref.data.store_files import FORMAT_VERSION, digest_of
from lightning_pref.data.templates import EVENTS, Tokenization

OnBadRow = Literal["error", "skip"]

log = logging.getLogger(__name__)

# Row numbers that are listed for each reason.
_ROWS_LISTED: Final = 5

_SECONDS_BETWEEN_LINES: Final = 15.0

# A file written this short a time ago may change again within the same tick of its time stamp.
_SETTLED_AFTER_NS: Final = 2 * 10**9


def load_groups(
    sources: Sequence[str | Path | RowSource],
    tokenization: Tokenization,
    *,
    vocab_size: int,
    cache_dir: str | Path,
    split: str | None = None,
    subset: str | None = None,
    revision: str | None = None,
    columns: Mapping[str, str] | None = None,
    limit_rows: int | None = None,
    on_bad_row: OnBadRow = "error",
    announce: bool = True,
) -> GroupStore:
    """Tokenise rows into a memory-mapped store, or open the store where this was done before.

    The store's folder is named by a digest of the rows' content, the tokenisation, the settings here and the versions, so
    a change of any of them builds a new one. Processes that start together on one machine build it once.

    Args:
        sources: What `read_rows` takes, or sources that are open already. Row numbers run on from one to the next.
        tokenization: Makes a group of a row.
        vocab_size: Number of token ids of the tokenizer, with its added tokens.
        cache_dir: Folder of all stores.
        split: Of the sources given by name.
        subset: Of the hub datasets.
        revision: Of the hub datasets.
        columns: Of the sources given by name: {name here: name in the source}.
        limit_rows: Read this many rows at most, over all sources.
        on_bad_row: Raise at the first bad row, or skip bad rows and count them by reason.
        announce: Log what was skipped and dropped, also if it was when the store was built.

    Raises:
        RowError: At the first bad row, with `on_bad_row="error"`.
        ValueError: If no row is left.
    """
    cache_dir = Path(cache_dir)
    opened = [
        source
        if isinstance(source, RowSource)
        else read_rows(source, split=split, subset=subset, revision=revision, columns=columns)
        for source in sources
    ]
    contents = [
        source.digest_parts() if isinstance(given, RowSource) else _remembered_parts(Path(given), source, columns, cache_dir)
        for given, source in zip(sources, opened, strict=True)
    ]
    names = [source.name for source in opened]
    digest = digest_of(
        [FORMAT_VERSION, __version__, names, contents, tokenization.digest(), {"limit": limit_rows, "on_bad_row": on_bad_row}]
    )
    folder = cache_dir / digest[:32]
    if not folder.exists():
        cache_dir.mkdir(parents=True, exist_ok=True)
        with FileLock(cache_dir / f"{folder.name}.lock"):
            if not folder.exists():
                # Whoever wrote these held this lock and is gone.
                for remains in cache_dir.glob(f".{folder.name}.*"):
                    shutil.rmtree(remains)
                with GroupStoreWriter(folder, vocab_size=vocab_size) as writer:
                    _build(writer, opened, tokenization, limit_rows, on_bad_row)
    store = GroupStore(folder)
    if announce:
        for line in report_lines(store.report):
            log.warning(line)
        log.info("%d rows of %s from the token store %s", len(store), ", ".join(names), folder)
    return store


@dataclass
class _Tally:
    """How the rows of one source fared."""

    name: str
    num_rows: int = 0
    skipped: dict[str, list[int]] = field(default_factory=dict)  # reason -> [count, first rows...]
    dropped: dict[str, list[int]] = field(default_factory=dict)
    events: dict[str, int] = field(default_factory=dict)
    first_error: str = ""

    def count(self, error: RowError) -> None:
        reasons = self.dropped if isinstance(error, DroppedRowError) else self.skipped
        entry = reasons.setdefault(error.reason, [0])
        entry[0] += 1
        if len(entry) <= _ROWS_LISTED:
            entry.append(error.place.row)
        self.first_error = self.first_error or str(error)


def report_lines(report: Mapping[str, Any]) -> list[str]:  # Any: JSON, as `_build` wrote it
    """What happened to the rows of each source: skipped (bad), dropped (left out by a setting), or kept but changed."""
    lines = []
    for source in report["sources"]:
        for done in ("skipped", "dropped"):
            if reasons := source[done]:
                total = sum(entry[0] for entry in reasons.values())
                by_count = sorted(reasons.items(), key=lambda item: (-item[1][0], item[0]))
                details = ", ".join(_reason(reason, *entry) for reason, entry in by_count)
                lines.append(f"{done} {total} of {source['num_rows']} rows of {source['name']}: {details}")
        for event, count in source["events"].items():
            lines.append(f"{event} in {count} of {source['num_rows']} rows of {source['name']}: {EVENTS[event]}")
    return lines


def _reason(reason: str, count: int, *rows: int) -> str:
    noun = "row" if count == 1 else "rows"
    more = ", ..." if count > len(rows) else ""
    return f"{count} {reason} ({noun} {', '.join(map(str, rows))}{more})"


def _build(
    writer: GroupStoreWriter,
    sources: Iterable[RowSource],
    tokenization: Tokenization,
    limit_rows: int | None,
    on_bad_row: OnBadRow,
) -> None:
    tallies: list[_Tally] = []
    num_read, last_line = 0, time.monotonic()
    for source in sources:
        if num_read == limit_rows:
            break
        tally = _Tally(source.name)
        tallies.append(tally)
        known_events = Counter(tokenization.events)
        rows = _Parsed(source, tally, num_read, limit_rows, stop_at_error=on_bad_row == "error")
        for result in tokenization.tokenize_rows(rows):
            if isinstance(result, PromptGroup):
                writer.append(result)
            elif on_bad_row == "error" and not isinstance(result, DroppedRowError):
                raise result
            else:
                tally.count(result)
            if time.monotonic() - last_line > _SECONDS_BETWEEN_LINES:
                last_line = time.monotonic()
                log.info("tokenised %d rows, now in %s", len(writer), source.name)
        if rows.error is not None:
            raise rows.error
        num_read += tally.num_rows
        tally.events = dict(tokenization.events - known_events)
    writer.report = {"sources": [vars(tally) for tally in tallies]}
    if not len(writer):
        lines = "; ".join(report_lines(writer.report))
        raise ValueError(f"No row is left: {lines}. The first of them: {tallies[0].first_error}")


class _Parsed:
    """The rows of a source with their numbers; bad ones are counted, or end the reading and are kept in `error`.

    The reading runs ahead of the tokenisation, so raising here would hide a bad row that stands before this one.
    """

    def __init__(self, source: RowSource, tally: _Tally, first_id: int, limit: int | None, *, stop_at_error: bool) -> None:
        self.error: RowError | None = None
        self._source, self._tally = source, tally
        self._first_id, self._limit, self._stop_at_error = first_id, limit, stop_at_error

    def __iter__(self) -> Iterator[tuple[int, Row]]:
        most = None if self._limit is None else self._limit - self._first_id
        for row_id, (place, raw) in enumerate(islice(self._source, most), start=self._first_id):
            self._tally.num_rows += 1
            try:
                row = parse_row(raw, place)
            except RowError as error:
                if self._stop_at_error:
                    self.error = error
                    return
                self._tally.count(error)
            else:
                yield row_id, row


def _remembered_parts(
    path: Path, source: RowSource, columns: Mapping[str, str] | None, cache_dir: Path
) -> tuple[str, ...] | list[str]:
    """The source's digest, without reading the file again if its size and time stamp are those of last time."""
    if not path.is_file():
        return source.digest_parts()
    status, index = path.stat(), cache_dir / "contents.json"
    key = json.dumps([str(path.resolve()), status.st_size, status.st_mtime_ns, columns], sort_keys=True)
    known = _read_index(index)
    if key in known:
        return known[key]
    parts = source.digest_parts()
    if time.time_ns() - status.st_mtime_ns > _SETTLED_AFTER_NS:
        cache_dir.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{index}.lock"):
            updated = index.with_suffix(".new")
            updated.write_text(json.dumps({**_read_index(index), key: parts}, indent=1), encoding="utf-8")
            updated.replace(index)
    return parts


def _read_index(path: Path) -> dict[str, list[str]]:
    try:
        known: dict[str, list[str]] = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):  # not there yet, or cut off: it only saves time
        return {}
    return known
