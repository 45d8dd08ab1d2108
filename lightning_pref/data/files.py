"""One reader for each file format: from a path to places and raw rows, in bounded memory (`.json` excepted)."""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from lightning_pref.data.rows import FIX_OR_SKIP, Place, RowError, shorten
from lightning_pref.escaping import on_terminal

RawRow = Mapping[str, object] | RowError

# Rows turned into Python objects at a time.
_ROWS_PER_CHUNK = 1024

# Characters of a header that a message shows.
_SHOWN_HEADER = 200

# Columns that are no text; a CSV cell of theirs is read as JSON.
_JSON_COLUMNS = frozenset({"label", "labels", "margin", "ranks", "scores", "responses", "completions", "messages"})


# What an Arrow stream ends with.
_END_OF_STREAM = b"\xff\xff\xff\xff\0\0\0\0"

# Of a columnar file: its structure, text that is no UTF-8, and dates beyond those of Python.
_UNREADABLE = (pa.ArrowException, OSError, ValueError, OverflowError)


def read_jsonl(path: Path) -> Iterator[tuple[Place, RawRow]]:
    """One JSON object a line; blank lines count as lines but are no rows. A broken line does not end the reading."""
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            content = line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
            if content.strip():
                place = Place(path.name, number)
                yield place, _decode_line(content, place)


def read_json(path: Path) -> Iterator[tuple[Place, RawRow]]:
    """A list of objects, or {"data": [...]}; rows are counted from 1 in the order of the list."""
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except json.JSONDecodeError as error:
        cure = (
            "If each line is an object of its own, name the file `.jsonl`." if error.msg == "Extra data" else "Repair the file."
        )
        raise ValueError(f"{path}: broken JSON in line {error.lineno}, column {error.colno} ({error.msg}). {cure}") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: cannot be read as JSON ({error}). Write it as JSON in UTF-8.") from error
    rows = content.get("data") if isinstance(content, Mapping) else content
    if not isinstance(rows, list):
        raise ValueError(f'{path}: expected a list of objects or {{"data": [...]}}, found {shorten(content)}.')
    for number, row in enumerate(rows, start=1):
        yield Place(path.name, number), row


def read_csv(path: Path) -> Iterator[tuple[Place, RawRow]]:
    """A header and a row per record, all cells as text; an empty cell is null. A row is named by its first line."""
    # The limit is the process's: a document of 200 kB in one cell is no mistake here.
    csv.field_size_limit(sys.maxsize)
    # Bytes that are no UTF-8 become lone surrogates, which the tokenisation reports with the row they stand in.
    with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        reader = csv.reader(file, strict=True)
        line = 1
        try:
            header = next(reader, [])
            if len(set(header)) < len(header):
                names = on_terminal(", ".join(header)[:_SHOWN_HEADER])
                raise ValueError(f"{path}: the header names a column twice: {names}. Rename one of them.")
            line = reader.line_num + 1
            for cells in reader:
                if cells:
                    yield Place(path.name, line), _named_cells(header, cells, Place(path.name, line))
                line = reader.line_num + 1
        except csv.Error as error:
            raise ValueError(
                f"{path}: broken CSV in the record that begins at line {line} ({error}). Check its quotes."
            ) from error


def read_parquet(path: Path) -> Iterator[tuple[Place, RawRow]]:
    """Row group by row group; rows are counted from 1."""
    try:
        with pq.ParquetFile(path) as file:
            yield from _numbered(file.iter_batches(batch_size=_ROWS_PER_CHUNK), path)
    except _UNREADABLE as error:
        raise _damaged(path, "Parquet", error) from error


def read_arrow(path: Path) -> Iterator[tuple[Place, RawRow]]:
    """An Arrow IPC file or stream; rows are counted from 1."""
    try:
        with pa.memory_map(str(path)) as file:
            is_file = file.read(6) == b"ARROW1"
            file.seek(0)
            if is_file:
                reader = pa.ipc.open_file(file)
                yield from _numbered((reader.get_batch(i) for i in range(reader.num_record_batches)), path)
            else:
                _check_stream_end(file)
                yield from _numbered(iter(pa.ipc.open_stream(file)), path)
    except _UNREADABLE as error:
        raise _damaged(path, "Arrow", error) from error


FILE_READERS: dict[str, Callable[[Path], Iterator[tuple[Place, RawRow]]]] = {
    ".jsonl": read_jsonl,
    ".json": read_json,
    ".csv": read_csv,
    ".parquet": read_parquet,
    ".arrow": read_arrow,
}


def decode_cells(row: Mapping[str, object]) -> dict[str, object]:
    """Gives the text cells of a CSV row the types of their columns; what cannot be read is left for the row's checks."""
    return {name: _decode_cell(name, cell) if isinstance(cell, str) else cell for name, cell in row.items()}


def _decode_line(line: bytes, place: Place) -> RawRow:
    text = ""
    try:
        text = line.decode()
        row = json.loads(text)
    except UnicodeDecodeError as error:
        finding = f"bytes that are no UTF-8 at byte {error.start} of the line"
        return RowError("broken_text", place, "", finding, "UTF-8 text")
    except json.JSONDecodeError as error:
        position = len(text[: error.pos].encode())
        piece = shorten(text[max(0, error.pos - 20) : error.pos + 20].rstrip("\n"))
        finding = f"broken JSON at byte {position} of the line, near {piece} ({error.msg})"
        whole_file = place.row == 1 and text.strip() in ("[", "{")
        cure = "If the file is one JSON value over many lines, name it `.json`." if whole_file else FIX_OR_SKIP
        return RowError("broken_json", place, "", finding, "one JSON object a line", cure)
    except (ValueError, RecursionError) as error:
        return RowError("broken_json", place, "", f"JSON that cannot be read ({error})", "one JSON object a line")
    if isinstance(row, Mapping):
        return row
    return RowError("not_an_object", place, "", f"the JSON value {shorten(row)}", "one JSON object a line")


def _named_cells(header: list[str], cells: list[str], place: Place) -> RawRow:
    if len(cells) != len(header):
        return RowError("cell_count", place, "", f"{len(cells)} cells", f"{len(header)}, one for each column of the header")
    return {name: cell or None for name, cell in zip(header, cells, strict=True)}


def _decode_cell(name: str, cell: str) -> object:
    messages = cell.startswith("[{")
    if name not in _JSON_COLUMNS and not messages:
        return cell
    # pandas and spreadsheets write their booleans with a capital.
    text = cell.lower() if name == "label" else cell
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return cell
    is_conversation = isinstance(value, list) and all(isinstance(item, Mapping) and "role" in item for item in value)
    return value if name in _JSON_COLUMNS or is_conversation else cell


def _numbered(batches: Iterator[pa.RecordBatch], path: Path) -> Iterator[tuple[Place, RawRow]]:
    number = 0
    for batch in batches:
        # What stands in a damaged file is else taken for places in memory.
        batch.validate(full=True)
        for start in range(0, batch.num_rows, _ROWS_PER_CHUNK):
            for row in batch.slice(start, _ROWS_PER_CHUNK).to_pylist():
                number += 1
                yield Place(path.name, number), row


def _check_stream_end(file: pa.MemoryMappedFile) -> None:
    """A stream that is cut between two of its parts would be read as a shorter one; the mark at its end is then missing."""
    file.seek(max(0, file.size() - len(_END_OF_STREAM)))
    found = file.read()
    file.seek(0)
    if found != _END_OF_STREAM:
        raise pa.ArrowInvalid("the mark at its end is missing")


def _damaged(path: Path, kind: str, error: Exception) -> ValueError:
    if isinstance(error, UnicodeDecodeError) or "UTF8" in str(error):
        return ValueError(f"{path}: text in this {kind} file is no UTF-8 ({error}). Write its names and text as UTF-8.")
    return ValueError(f"{path}: not a whole {kind} file ({error}). It may have been cut off while it was copied; copy it again.")
