"""Any file is either refused with its place and a cure, or read to its last row."""

from __future__ import annotations

import csv
import io
import json
import logging
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fuzzing import NASTY_TEXTS, TEXTS, VALUES, Tally, changed, declared, many
from hypothesis import given, seed
from hypothesis import strategies as st
from tallies import TALLY

from lightning_pref.data.files import FILE_READERS
from lightning_pref.data.formats import parse_row
from lightning_pref.data.loading import load_groups
from lightning_pref.data.playground_tokenizer import playground_tokenizer
from lightning_pref.data.rows import Row, RowError
from lightning_pref.data.sources import read_rows
from lightning_pref.data.templates import Tokenization

PAIRS: list[dict[str, Any]] = [
    {"prompt": f"Question {i}?", "chosen": f" Answer {i}.", "rejected": f" No, {i}.", "margin": i / 2} for i in range(4)
]
RANKED: list[dict[str, Any]] = [{"prompt": "Say.", "completions": [" a", " b"], "scores": [0.5, float(i)]} for i in range(1, 4)]
TOKENIZATION = Tokenization(playground_tokenizer(), max_length=64)

CELLS = TEXTS | st.sampled_from(['"', '""', "a,b", "a\nb", "'", '"unclosed', "1.5", "NaN", "[", "[1, 2]", "TRUE"])
MESSAGE = pa.struct([("role", pa.string()), ("content", pa.string())])
ARROW_TYPES = (
    pa.string(), pa.large_string(), pa.binary(), pa.int8(), pa.uint64(), pa.float16(), pa.float64(), pa.bool_(), pa.null(),
    pa.date32(), pa.timestamp("ns", tz="UTC"), pa.duration("s"), pa.decimal128(20, 3), pa.list_(pa.string()), MESSAGE,
    pa.list_(pa.float32()), pa.map_(pa.string(), pa.string()), pa.list_(MESSAGE), pa.dictionary(pa.int8(), pa.string()),
)  # fmt: skip
COLUMNS = ("prompt", "chosen", "rejected", "completion", "label", "messages", "text", "scores", "completions", "other")


def json_lines(rows: list[Any]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def csv_file(rows: list[list[str]]) -> bytes:
    sink = io.StringIO(newline="")
    csv.writer(sink).writerows(rows)
    return sink.getvalue().encode("utf-8", "surrogatepass")


def arrow_file(table: pa.Table, kind: str) -> bytes:
    sink = io.BytesIO()
    if kind == ".parquet":
        pq.write_table(table, sink)
    else:
        with pa.ipc.new_file(sink, table.schema) as writer:
            writer.write_table(table)
    return sink.getvalue()


def _arrow_value(kind: pa.DataType) -> Any:
    """A value of the type, as Python has it."""
    samples = ("a", b"a", 1, 1.5, True, None, ["a", ""], [0.5], [("a", "b")], {"role": "user", "content": "Is it?"})
    for sample in (*samples, [{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}]):
        try:
            array = pa.array([sample], kind)
        except (pa.ArrowException, TypeError, ValueError):
            continue
        if sample is not None or kind == pa.null():
            return array
    return pa.nulls(1, kind)


ARROW_VALUES = {kind: _arrow_value(kind) for kind in ARROW_TYPES}


@st.composite
def odd_tables(draw: st.DrawFn) -> pa.Table:
    names = draw(st.lists(st.sampled_from(COLUMNS), min_size=1, max_size=4, unique=draw(st.booleans())))
    size = draw(st.integers(0, 2))
    arrays = [ARROW_VALUES[draw(st.sampled_from(ARROW_TYPES))] for _ in names]
    return pa.Table.from_arrays([pa.concat_arrays([array] * size) if size else array[:0] for array in arrays], names=names)


@st.composite
def whole_files(draw: st.DrawFn) -> tuple[str, bytes]:
    """A file that is no worse than what is written in it."""
    kind = draw(st.sampled_from(sorted(FILE_READERS)))
    rows = draw(st.lists(changed(st.sampled_from(PAIRS + RANKED)) | st.sampled_from(PAIRS), max_size=4))
    if kind == ".jsonl":
        return kind, json_lines(rows)
    if kind == ".json":
        content = draw(st.sampled_from([rows, {"data": rows}, {"rows": rows}]) | VALUES)
        return kind, json.dumps(content).encode()
    if kind == ".csv":
        header = draw(st.sampled_from([list(PAIRS[0]), ["prompt", "completion", "label"]]) | st.lists(CELLS, max_size=4))
        cells = st.lists(CELLS, min_size=len(header), max_size=len(header)) | st.lists(CELLS, max_size=5)
        return kind, csv_file([header, *draw(st.lists(cells, max_size=4))])
    table = pa.Table.from_pylist(PAIRS) if draw(st.booleans()) else draw(odd_tables())
    return kind, arrow_file(table, kind)


@st.composite
def files(draw: st.DrawFn) -> tuple[str, bytes]:
    """A file by its extension and content: cut off, with bytes changed or put in, of another kind than it says, or whole."""
    kind, content = draw(whole_files())
    for _ in range(draw(st.integers(0, 2))):
        at = draw(st.integers(0, len(content)))
        how = draw(st.sampled_from(("cut", "put in", "replace", "front", "twice", "random", "other kind", "utf-16")))
        piece = draw(
            st.binary(max_size=6) | st.sampled_from([b"\x00", b"\xff\xfe", b"\xef\xbb\xbf", b'"', b"\r", b"\n\n", b"{", b"]"])
        )
        if how == "cut":
            content = content[:at]
        elif how == "put in":
            content = content[:at] + piece + content[at:]
        elif how == "replace":
            content = content[:at] + piece + content[at + len(piece) :]
        elif how == "front":
            content = piece + content
        elif how == "twice":
            content += content
        elif how == "random":
            content = draw(st.binary(max_size=60))
        elif how == "other kind":
            kind = draw(st.sampled_from([*sorted(FILE_READERS), ".txt", ".gz", "", ".JSONL"]))
        else:
            content = content.decode("utf-8", "replace").encode("utf-16")
    return kind, content


def try_file(file: tuple[str, bytes], folder: Path, tally: Tally) -> None:
    kind, content = file
    path = folder / f"rows{kind}"
    path.write_bytes(content)

    def reason(error: Exception) -> str | None:
        if declared(error) is None and not isinstance(error, RowError):
            return None
        text = str(error)
        assert path.name in text, "it names the file"
        assert len(text) < 2000
        return f"{kind or 'no extension'}, {error.reason if isinstance(error, RowError) else type(error).__name__}"

    with tally.case(reason):
        source = read_rows(path)
        rows = [row if isinstance(row, RowError) else parse_row_or_error(row, place) for place, row in source]
        assert rows and all(isinstance(row, Row | RowError) for row in rows)
        errors = [row for row in rows if isinstance(row, RowError)]
        if errors:
            raise errors[0]
        # What one path takes, the other must take as well.
        usable = [row for row in rows if isinstance(row, Row) and (row.responses or row.steps)]
        store = load_groups([path], TOKENIZATION, vocab_size=20_000, cache_dir=folder / "cache", on_bad_row="skip")
        assert len(store) <= len(usable)
        assert all(len(store[i].prompt) for i in range(len(store)))


def parse_row_or_error(raw: object, place: Any) -> Row | RowError:
    try:
        return parse_row(raw, place)
    except RowError as error:
        return error


def fuzz(num_cases: int, number: int, folder: Path) -> Tally:
    tally = Tally()
    many(num_cases)(seed(number)(given(file=files())(lambda file: try_file(file, folder, tally))))()
    return tally


@pytest.fixture(autouse=True)
def quiet(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.ERROR, "lightning_pref")


def test_a_sample_of_files_is_refused_in_words_or_read_whole(tmp_path: Path, record_property: Any) -> None:
    tally = fuzz(80, 1, tmp_path)
    record_property(TALLY, str(tally))
    assert tally.num_cases >= 80


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_thousands_of_files_are_refused_in_words_or_read_whole(tmp_path: Path, record_property: Any) -> None:
    tally = fuzz(2500, 2, tmp_path)
    record_property(TALLY, str(tally))
    assert tally.num_cases >= 2400
    assert tally.outcomes["accepted"] > 50


@pytest.mark.parametrize("kind", sorted(FILE_READERS))
def test_a_file_of_nothing_but_a_nasty_text_is_refused(kind: str, tmp_path: Path) -> None:
    tally = Tally()
    contents = (b"\x00" * 40, b"\xff" * 40, *(text.encode("utf-8", "surrogatepass") for text in NASTY_TEXTS))
    for content in contents:
        try_file((kind, content), tmp_path, tally)
    assert tally.num_cases == len(contents)
    assert not tally.outcomes["accepted"]
