from __future__ import annotations

import json
import pickle
import re
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lightning_pref.data.formats import parse_row
from lightning_pref.data.rows import Place, RowError
from lightning_pref.data.sources import read_rows

ROWS: list[dict[str, object]] = [
    {"prompt": "The sky is", "chosen": " blue.", "rejected": " green.", "margin": 0.5},
    {"prompt": "The sea,\nit is", "chosen": ' "blue".', "rejected": " caf\u00e9.", "margin": None},
    {"prompt": "x", "chosen": "y", "rejected": "z", "margin": 2.0},
]


def write(path: Path, rows: list[dict[str, object]] = ROWS) -> Path:
    """The rows as a file of the kind that the extension of `path` names."""
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    elif path.suffix == ".json":
        path.write_text(json.dumps({"data": rows} if "data" in path.stem else rows), encoding="utf-8")
    elif path.suffix == ".csv":
        datasets.Dataset.from_list(rows).to_csv(str(path), index=False)
    elif path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=2)
    elif "stream" in path.stem:
        table = pa.Table.from_pylist(rows)
        with pa.ipc.new_stream(path, table.schema) as sink:
            sink.write_table(table, max_chunksize=2)
    else:
        table = pa.Table.from_pylist(rows)
        with pa.ipc.new_file(path, table.schema) as sink:
            sink.write_table(table, max_chunksize=2)
    return path


FILES = ["pairs.jsonl", "pairs.json", "pairs_data.json", "pairs.csv", "pairs.parquet", "pairs.arrow", "pairs_stream.arrow"]


@pytest.mark.parametrize("name", FILES)
def test_every_file_format_gives_the_same_rows(tmp_path: Path, name: str) -> None:
    source = read_rows(write(tmp_path / name))
    found = list(source)
    assert [row for _, row in found] == ROWS
    assert [place.file for place, _ in found] == [name] * 3
    assert [parse_row(row, place).margin for place, row in found] == [0.5, None, 2.0]
    assert list(source) == found, "a source can be read again"
    assert list(pickle.loads(pickle.dumps(source))) == found, "a source can be sent to another process"


@pytest.mark.parametrize("name", FILES)
def test_rows_are_counted_as_an_editor_counts(tmp_path: Path, name: str) -> None:
    numbers = [place.row for place, _ in read_rows(write(tmp_path / name))]
    # The header of the CSV is line 1, and its second record has a line break inside.
    assert numbers == ([2, 3, 5] if name.endswith(".csv") else [1, 2, 3])


@pytest.mark.parametrize("name", FILES)
def test_columns_choose_and_rename(tmp_path: Path, name: str) -> None:
    columns = {"prompt": "prompt", "completion": "chosen", "label": "absent"}
    _, row = next(iter(read_rows(write(tmp_path / name), columns=columns)))
    assert row == {"prompt": "The sky is", "completion": " blue."}


def test_many_rows_are_numbered_across_chunks_and_row_groups(tmp_path: Path) -> None:
    many: list[dict[str, object]] = [{"text": str(i)} for i in range(3000)]
    for path in (tmp_path / "many.parquet", tmp_path / "many.arrow"):
        assert [(place.row, row) for place, row in read_rows(write(path, many))] == [(i + 1, r) for i, r in enumerate(many)]


def test_the_number_of_rows_is_told_where_it_costs_nothing(tmp_path: Path) -> None:
    assert read_rows(write(tmp_path / "pairs.parquet")).num_rows == 3
    assert read_rows(write(tmp_path / "pairs.jsonl")).num_rows is None


def test_blank_lines_and_a_byte_order_mark_are_no_rows(tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"text": "a"}\r\n\n  \n{"text": "b"}')
    assert list(read_rows(path)) == [(Place("pairs.jsonl", 1), {"text": "a"}), (Place("pairs.jsonl", 4), {"text": "b"})]


@pytest.mark.parametrize(
    ("line", "reason", "message"),
    [
        (b'{"text": "\xc3\xa9" "b"}', "broken_json", 'found broken JSON at byte 14 of the line, near \'{"text": "\u00e9" "b"}\''),
        (b'{"text": "\xff"}', "broken_text", "found bytes that are no UTF-8 at byte 10 of the line"),
        (b"[1, 2]", "not_an_object", "found the JSON value [1, 2]; expected one JSON object a line"),
        (b'{"text": ' + b"9" * 5000 + b"}", "broken_json", "found JSON that cannot be read (Exceeds the limit"),
        (b"[" * 100_000, "broken_json", "found JSON that cannot be read"),
    ],
)
def test_a_broken_line_is_named_and_does_not_end_the_reading(tmp_path: Path, line: bytes, reason: str, message: str) -> None:
    path = tmp_path / "pairs.jsonl"
    path.write_bytes(b'{"text": "a"}\n' + line + b'\n{"text": "b"}\n')
    (_, first), (place, broken), (_, last) = read_rows(path)
    assert (first, last) == ({"text": "a"}, {"text": "b"})
    with pytest.raises(RowError, match=re.escape(message)) as caught:
        parse_row(broken, place)
    assert (caught.value.reason, caught.value.place) == (reason, Place("pairs.jsonl", 2))


def test_a_json_value_under_the_name_of_json_lines_gets_a_hint(tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl"
    path.write_text(json.dumps(ROWS, indent=1))
    place, broken = next(iter(read_rows(path)))
    with pytest.raises(RowError, match=re.escape("If the file is one JSON value over many lines, name it `.json`.")):
        parse_row(broken, place)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            '{"a": 1}\n{"a": 2}\n',
            "broken JSON in line 2, column 1 (Extra data). If each line is an object of its own, name the file",
        ),
        ('[{"a": 1},\n{"a" 2}]', "broken JSON in line 2, column 6 (Expecting ':' delimiter). Repair the file."),
        ('{"rows": []}', "expected a list of objects or {\"data\": [...]}, found {'rows': []}"),
        ("[" * 100_000, "cannot be read as JSON"),
        ("[]", "pairs.json: there are no rows in it"),
    ],
)
def test_broken_json_files_are_explained(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "pairs.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=re.escape(message)):
        list(read_rows(path))


def test_csv_cells_get_the_types_of_their_columns(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text(
        "q,answer,good\n"
        '"[{""role"": ""user"", ""content"": ""hi""}]",yes,True\n'
        '[1] is a note,"[{""not"": ""a message""}]",false\n'
    )
    rows = [row for _, row in read_rows(path, columns={"prompt": "q", "completion": "answer", "label": "good"})]
    assert rows == [
        {"prompt": [{"role": "user", "content": "hi"}], "completion": "yes", "label": True},
        {"prompt": "[1] is a note", "completion": '[{"not": "a message"}]', "label": False},
    ]


def test_csv_records_that_do_not_fit_the_header_are_row_errors(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text("prompt,completion\na,b,c\n\nd,e\n")
    (place, broken), (_, last) = read_rows(path)
    assert last == {"prompt": "d", "completion": "e"}
    with pytest.raises(RowError, match="rows.csv, row 2: found 3 cells; expected 2, one for each column of the header"):
        parse_row(broken, place)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("a,a\n1,2\n", "the header names a column twice: a, a"),
        ('a,b\n1,2\n3,"4\n', "broken CSV in the record that begins at line 3"),
        ("a,b\n", "there are no rows in it"),
    ],
)
def test_broken_csv_files_are_explained(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "rows.csv"
    path.write_text(content)
    with pytest.raises(ValueError, match=re.escape(message)):
        list(read_rows(path))


def test_csv_cells_may_be_long(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text("text\n" + "word " * 50_000)
    assert [len(str(row["text"])) for _, row in read_rows(path) if not isinstance(row, RowError)] == [250_000]


@pytest.mark.parametrize(
    ("name", "kind"), [("pairs.parquet", "Parquet"), ("pairs.arrow", "Arrow"), ("pairs_stream.arrow", "Arrow")]
)
@pytest.mark.parametrize("kept", [0.3, 0.9])
def test_a_file_cut_off_while_copied_is_recognised(tmp_path: Path, name: str, kind: str, kept: float) -> None:
    path = write(tmp_path / name)
    path.write_bytes(path.read_bytes()[: int(kept * path.stat().st_size)])
    with pytest.raises(ValueError, match=f"{name}: not a whole {kind} file .* copy it again"):
        list(read_rows(path))


def test_an_empty_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl"
    path.touch()
    with pytest.raises(ValueError, match="the file is empty. Write at least one row"):
        read_rows(path)


@pytest.mark.parametrize(("name", "hint"), [("pairs.txt", "known: .jsonl, .json"), ("pairs.jsonl.gz", "Unpack it first")])
def test_an_unknown_extension_lists_the_known_ones(tmp_path: Path, name: str, hint: str) -> None:
    (tmp_path / name).write_text("x")
    with pytest.raises(ValueError, match=f"unknown file type '{Path(name).suffix}'.*{hint}"):
        read_rows(tmp_path / name)


def test_a_missing_file_names_the_path_and_its_neighbours(tmp_path: Path) -> None:
    write(tmp_path / "pairs.jsonl")
    with pytest.raises(FileNotFoundError, match=re.escape(f"{tmp_path}/pair.jsonl; nearest names in {tmp_path}: pairs.jsonl")):
        read_rows(tmp_path / "pair.jsonl")
    with pytest.raises(FileNotFoundError, match=re.escape(f"{tmp_path} holds pairs.jsonl")):
        read_rows(tmp_path / "other" / "deep.parquet")


def test_what_belongs_to_hub_datasets_is_refused_for_a_file(tmp_path: Path) -> None:
    path = write(tmp_path / "pairs.jsonl")
    with pytest.raises(ValueError, match="`split` is for `datasets` folders"):
        read_rows(path, split="train")
    with pytest.raises(ValueError, match="`revision` is for datasets on the hub"):
        read_rows(path, revision="main")
    with pytest.raises(ValueError, match="`subset` is for datasets on the hub"):
        read_rows(path, subset="helpful")


def test_a_saved_dataset_is_read(tmp_path: Path) -> None:
    datasets.Dataset.from_list(ROWS).save_to_disk(tmp_path / "saved")
    source = read_rows(tmp_path / "saved")
    assert list(source) == [(Place("saved", i + 1), row) for i, row in enumerate(ROWS)]
    assert source.num_rows == 3
    with pytest.raises(ValueError, match="the folder holds one dataset without splits"):
        read_rows(tmp_path / "saved", split="train")


def test_a_split_of_saved_datasets_is_chosen_by_name(tmp_path: Path) -> None:
    splits = {"train": datasets.Dataset.from_list(ROWS), "test": datasets.Dataset.from_list(ROWS[:1])}
    datasets.DatasetDict(splits).save_to_disk(tmp_path / "saved")
    assert list(read_rows(tmp_path / "saved", split="test")) == [(Place("saved:test", 1), ROWS[0])]
    with pytest.raises(ValueError, match=r"there are several splits \(test, train\). Choose one with `split`"):
        read_rows(tmp_path / "saved")
    with pytest.raises(ValueError, match="no split 'tset'; existing: test, train. Did you mean 'test'"):
        read_rows(tmp_path / "saved", split="tset")


def test_the_only_split_needs_no_name(tmp_path: Path) -> None:
    datasets.DatasetDict({"train": datasets.Dataset.from_list(ROWS)}).save_to_disk(tmp_path / "saved")
    assert read_rows(tmp_path / "saved").num_rows == 3


def test_a_damaged_saved_dataset_is_explained(tmp_path: Path) -> None:
    datasets.Dataset.from_list(ROWS).save_to_disk(tmp_path / "saved")
    next((tmp_path / "saved").glob("*.arrow")).write_bytes(b"")
    with pytest.raises(ValueError, match="the saved dataset is damaged"):
        read_rows(tmp_path / "saved")


def test_a_folder_of_other_files_lists_them(tmp_path: Path) -> None:
    write(tmp_path / "pairs.jsonl")
    with pytest.raises(
        ValueError, match="not written by `save_to_disk` of `datasets`; it holds pairs.jsonl. Name one of the files"
    ):
        read_rows(tmp_path)


def test_a_hub_dataset_out_of_reach_says_what_to_do(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises((FileNotFoundError, ValueError), match="owner/pairs: no such file or folder at .*save_to_disk"):
        read_rows("owner/pairs")


def test_a_hub_dataset_is_loaded_with_subset_split_and_revision(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: list[tuple[str | None, ...]] = []

    def load_dataset(name: str, subset: str | None, *, split: str | None, revision: str | None) -> datasets.Dataset:
        asked.append((name, subset, split, revision))
        return datasets.Dataset.from_list(ROWS)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    place, row = next(iter(read_rows("owner/pairs", subset="helpful", split="train", revision="v1")))
    assert asked == [("owner/pairs", "helpful", "train", "v1")]
    assert (place, row) == (Place("owner/pairs:helpful:train", 1), ROWS[0])


def test_a_path_into_an_existing_folder_is_no_hub_id(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match="/data holds nothing"):
        read_rows("data/pairs")


def test_digest_knows_the_content_and_the_columns_but_not_the_name(tmp_path: Path) -> None:
    first, same = write(tmp_path / "a.jsonl"), write(tmp_path / "b.jsonl")
    other = write(tmp_path / "c.jsonl", ROWS[:2])
    assert read_rows(first).digest_parts() == read_rows(same).digest_parts()
    assert read_rows(first).digest_parts() != read_rows(other).digest_parts()
    assert read_rows(first).digest_parts() != read_rows(first, columns={"text": "chosen"}).digest_parts()


def test_digest_of_a_saved_dataset_is_stable_and_knows_its_rows(tmp_path: Path) -> None:
    for name, rows in (("a", ROWS), ("b", ROWS[:2])):
        datasets.Dataset.from_list(rows).save_to_disk(tmp_path / name)
    assert read_rows(tmp_path / "a").digest_parts() == read_rows(tmp_path / "a").digest_parts()
    assert read_rows(tmp_path / "a").digest_parts() != read_rows(tmp_path / "b").digest_parts()
