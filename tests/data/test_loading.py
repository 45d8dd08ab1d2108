from __future__ import annotations

import json
import logging
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from lightning_pref.data import loading
from lightning_pref.data.loading import load_groups
from lightning_pref.data.playground_tokenizer import playground_tokenizer
from lightning_pref.data.rows import RowError
from lightning_pref.data.sources import FileRows
from lightning_pref.data.store import GroupStore
from lightning_pref.data.templates import Tokenization

TOKENIZER = playground_tokenizer()
VOCAB_SIZE = len(TOKENIZER)


def pair(number: int) -> dict[str, str]:
    return {"prompt": f"Question {number}?", "chosen": f" Yes, {number}.", "rejected": " No."}


def write_jsonl(path: Path, rows: list[dict[str, object] | str]) -> Path:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    os.utime(path, (1_000_000_000, 1_000_000_000))  # long ago, so that its digest may be remembered
    return path


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    return write_jsonl(tmp_path / "pairs.jsonl", [pair(i) for i in range(6)])


@pytest.fixture
def load(tmp_path: Path) -> Callable[..., GroupStore]:
    """`load_groups` of one file into a cache of this test."""

    def loaded(
        path: Path, *more: Path, max_length: int | None = None, template: str | None = None, **settings: object
    ) -> GroupStore:
        tokenization = Tokenization(TOKENIZER, max_length=max_length, chat_template=template)
        return load_groups([path, *more], tokenization, vocab_size=VOCAB_SIZE, cache_dir=tmp_path / "cache", **settings)

    return loaded


@pytest.fixture
def num_tokenised(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One entry for every row that is tokenised."""
    seen: list[int] = []
    whole = Tokenization.tokenize_rows

    def counted(self: Tokenization, rows: Iterator[tuple[int, object]]) -> Iterator[object]:
        for result in whole(self, rows):
            seen.append(1)
            yield result

    monkeypatch.setattr(Tokenization, "tokenize_rows", counted)
    return seen


BAD: list[dict[str, object] | str] = [
    pair(0),
    {"prompt": "Why?", "chosen": "", "rejected": " No."},
    pair(1),
    "{broken",
    {"prompt": "How?", "chosen": " So.", "rejected": ""},
    pair(2),
]


def test_rows_become_groups_with_their_number_as_id(pairs: Path, load: Callable[..., GroupStore]) -> None:
    store = load(pairs)
    assert store.row_ids.tolist() == list(range(6))
    assert [TOKENIZER.decode(response) for response in store[3].responses] == [" Yes, 3.<|eos|>", " No.<|eos|>"]
    assert store[3].ranks == (0, 1)


def test_a_warm_start_tokenises_nothing(pairs: Path, load: Callable[..., GroupStore], num_tokenised: list[int]) -> None:
    cold = load(pairs)
    assert len(num_tokenised) == 6
    warm = load(pairs)
    assert len(num_tokenised) == 6
    assert warm.digest == cold.digest


def test_what_the_tokens_depend_on_makes_a_new_store(
    tmp_path: Path, pairs: Path, load: Callable[..., GroupStore], num_tokenised: list[int]
) -> None:
    folders = {load(pairs).folder}
    folders.add(load(pairs, max_length=16).folder)
    folders.add(load(pairs, template="{{ bos_token }}{% for m in messages %}{{ m['content'] }}{% endfor %}").folder)
    folders.add(load(pairs, limit_rows=3).folder)
    folders.add(load(pairs, on_bad_row="skip").folder)
    folders.add(load(pairs, columns={"prompt": "prompt", "chosen": "rejected", "rejected": "chosen"}).folder)
    write_jsonl(pairs, [pair(i + 1) for i in range(6)])
    os.utime(pairs, (1_000_000_001, 1_000_000_001))
    folders.add(load(pairs).folder)
    assert len(folders) == 7
    assert len(num_tokenised) == 6 * 6 + 3


def test_a_file_that_only_moved_is_not_tokenised_again(
    tmp_path: Path, pairs: Path, load: Callable[..., GroupStore], num_tokenised: list[int]
) -> None:
    first = load(pairs)
    (tmp_path / "elsewhere").mkdir()
    moved = Path(shutil.copy(pairs, tmp_path / "elsewhere"))
    assert load(moved).folder == first.folder
    assert len(num_tokenised) == 6


def test_an_unchanged_file_is_hashed_once(pairs: Path, load: Callable[..., GroupStore], monkeypatch: pytest.MonkeyPatch) -> None:
    hashed: list[Path] = []
    whole = FileRows.digest_parts
    monkeypatch.setattr(FileRows, "digest_parts", lambda self: hashed.append(self.path) or whole(self))
    load(pairs)
    load(pairs)
    assert len(hashed) == 1
    os.utime(pairs, (1_000_000_005, 1_000_000_005))
    load(pairs)
    assert len(hashed) == 2


def test_a_file_written_just_now_is_not_trusted_to_stay(pairs: Path, load: Callable[..., GroupStore]) -> None:
    os.utime(pairs)
    before = load(pairs)
    status = pairs.stat()
    pairs.write_text(pairs.read_text().replace("Question 0", "Question 9"))
    os.utime(pairs, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert load(pairs).folder != before.folder


def test_a_broken_index_of_digests_only_costs_time(tmp_path: Path, pairs: Path, load: Callable[..., GroupStore]) -> None:
    before = load(pairs)
    (tmp_path / "cache" / "contents.json").write_text("{")
    assert load(pairs).digest == before.digest


def test_skipped_rows_are_counted_by_reason_and_reported_at_every_start(
    tmp_path: Path, load: Callable[..., GroupStore], caplog: pytest.LogCaptureFixture
) -> None:
    path = write_jsonl(tmp_path / "pairs.jsonl", BAD)
    for _ in range(2):
        caplog.clear()
        store = load(path, on_bad_row="skip")
        assert caplog.messages == ["skipped 3 of 6 rows of pairs.jsonl: 2 empty_response (rows 2, 5), 1 broken_json (row 4)"]
        assert store.row_ids.tolist() == [0, 2, 5]


def test_a_long_list_of_bad_rows_is_shortened(
    tmp_path: Path, load: Callable[..., GroupStore], caplog: pytest.LogCaptureFixture
) -> None:
    path = write_jsonl(tmp_path / "pairs.jsonl", [pair(0), *["{"] * 8])
    load(path, on_bad_row="skip")
    assert "skipped 8 of 9 rows of pairs.jsonl: 8 broken_json (rows 2, 3, 4, 5, 6, ...)" in caplog.messages


def test_the_first_bad_row_is_the_error(tmp_path: Path, load: Callable[..., GroupStore]) -> None:
    path = write_jsonl(tmp_path / "pairs.jsonl", BAD)
    with pytest.raises(RowError, match=r"pairs.jsonl, row 2"):
        load(path)
    assert [entry for entry in (tmp_path / "cache").iterdir() if entry.is_dir()] == []


def test_a_row_that_cannot_be_tokenised_is_reported_before_a_later_one_that_cannot_be_read(
    tmp_path: Path, load: Callable[..., GroupStore]
) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl", [pair(0), {"prompt": "Only asked."}, "{broken"])
    with pytest.raises(RowError, match=r"rows.jsonl, row 2"):
        load(path)


def test_a_cache_of_skipped_rows_does_not_hide_the_error(tmp_path: Path, load: Callable[..., GroupStore]) -> None:
    path = write_jsonl(tmp_path / "pairs.jsonl", BAD)
    load(path, on_bad_row="skip")
    with pytest.raises(RowError):
        load(path)


def test_rows_that_a_setting_drops_are_counted_and_are_no_error(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = write_jsonl(tmp_path / "pairs.jsonl", [pair(0), {**pair(1), "chosen": " " + "long " * 50}])
    tokenization = Tokenization(TOKENIZER, max_length=60, truncation="drop")
    store = load_groups([path], tokenization, vocab_size=VOCAB_SIZE, cache_dir=tmp_path / "cache")
    assert store.row_ids.tolist() == [0]
    assert any(message.startswith("dropped 1 of 2 rows of pairs.jsonl: 1 ") for message in caplog.messages)


def test_truncated_rows_are_reported(pairs: Path, load: Callable[..., GroupStore], caplog: pytest.LogCaptureFixture) -> None:
    for _ in range(2):
        caplog.clear()
        load(pairs, max_length=16)
        assert any(message.startswith("truncated_response in 6 of 6 rows of pairs.jsonl") for message in caplog.messages)


def test_nothing_is_announced_where_it_is_not_wanted(
    tmp_path: Path, load: Callable[..., GroupStore], caplog: pytest.LogCaptureFixture
) -> None:
    load(write_jsonl(tmp_path / "pairs.jsonl", BAD), on_bad_row="skip", announce=False)
    assert caplog.messages == []


def test_a_source_without_a_good_row_raises_with_the_first_finding(tmp_path: Path, load: Callable[..., GroupStore]) -> None:
    path = write_jsonl(tmp_path / "pairs.jsonl", ["{", "["])
    with pytest.raises(ValueError, match=r"No row is left: skipped 2 of 2 rows.*The first of them: pairs.jsonl, row 1"):
        load(path, on_bad_row="skip")


def test_row_numbers_run_on_from_one_source_to_the_next(tmp_path: Path, pairs: Path, load: Callable[..., GroupStore]) -> None:
    more = write_jsonl(tmp_path / "more.jsonl", [pair(9), "{", pair(10)])
    store = load(pairs, more, on_bad_row="skip")
    assert store.row_ids.tolist() == [0, 1, 2, 3, 4, 5, 6, 8]
    assert [source["num_rows"] for source in store.report["sources"]] == [6, 3]


@pytest.mark.parametrize(("limit", "expected"), [(4, [0, 1, 2, 3]), (7, list(range(7))), (6, list(range(6)))])
def test_limit_rows_counts_over_all_sources(
    tmp_path: Path, pairs: Path, load: Callable[..., GroupStore], limit: int, expected: list[int]
) -> None:
    more = write_jsonl(tmp_path / "more.jsonl", [pair(9), pair(10)])
    assert load(pairs, more, limit_rows=limit).row_ids.tolist() == expected


def test_processes_that_start_together_build_once(pairs: Path, load: Callable[..., GroupStore], num_tokenised: list[int]) -> None:
    stores: list[GroupStore] = []
    threads = [threading.Thread(target=lambda: stores.append(load(pairs))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(num_tokenised) == 6
    assert len({store.digest for store in stores}) == 1


def test_what_a_killed_process_left_is_swept_away(tmp_path: Path, pairs: Path, load: Callable[..., GroupStore]) -> None:
    name = load(pairs).folder.name
    shutil.rmtree(tmp_path / "cache" / name)
    remains = tmp_path / "cache" / f".{name}.abc"
    remains.mkdir()
    (remains / "tokens.bin").write_bytes(b"half")
    load(pairs)
    assert not remains.exists()


def test_a_damaged_store_says_what_to_delete_and_that_helps(pairs: Path, load: Callable[..., GroupStore]) -> None:
    folder = load(pairs).folder
    (folder / "tokens.bin").write_bytes(b"")
    with pytest.raises(ValueError, match=f"Delete the folder {folder}; it is built again"):
        load(pairs)
    shutil.rmtree(folder)
    assert len(load(pairs)) == 6


def test_progress_is_logged_while_a_long_build_runs(
    pairs: Path, load: Callable[..., GroupStore], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loading, "_SECONDS_BETWEEN_LINES", 0.0)
    with caplog.at_level(logging.INFO):
        load(pairs)
    assert "tokenised 6 rows, now in pairs.jsonl" in caplog.messages
