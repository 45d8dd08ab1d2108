from __future__ import annotations

import json
import os
import pickle
from collections.abc import Iterable
from dataclasses import fields, replace
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_pref.data import store as store_module
from lightning_pref.data.groups import PromptGroup
from lightning_pref.data.store import GroupStore, GroupStoreWriter, GroupSubset
from lightning_pref.data.store_files import FORMAT_VERSION, MANIFEST


def write(folder: Path, groups: Iterable[PromptGroup], vocab_size: int = 300) -> GroupStore:
    with GroupStoreWriter(folder, vocab_size=vocab_size) as writer:
        for group in groups:
            writer.append(group)
    return GroupStore(folder)


def same(a: PromptGroup, b: PromptGroup) -> bool:
    """Field by field, arrays by their values, types of the scalars too."""
    plain = [f.name for f in fields(PromptGroup) if f.name not in ("prompt", "responses")]
    return (
        a.prompt.tolist() == b.prompt.tolist()
        and [r.tolist() for r in a.responses] == [r.tolist() for r in b.responses]
        and all(repr(getattr(a, name)) == repr(getattr(b, name)) for name in plain)
    )


tokens = st.lists(st.integers(0, 299), min_size=1, max_size=6).map(np.array)


@st.composite
def prompt_groups(draw: st.DrawFn) -> PromptGroup:
    responses = draw(st.lists(tokens, min_size=1, max_size=4))

    def each(entry: st.SearchStrategy[object]) -> st.SearchStrategy[object]:
        return st.none() | st.tuples(*[entry] * len(responses))

    def marks(entry: st.SearchStrategy[object]) -> st.SearchStrategy[object]:
        return each(st.lists(entry, max_size=3).map(tuple))

    number = st.floats(allow_nan=True)
    return PromptGroup(
        row_id=draw(st.integers(0, 2**40)),
        prompt=draw(tokens),
        responses=tuple(responses),
        source=draw(st.sampled_from(["", "kitchen", "a/b.jsonl", "\u00e9"])),
        ranks=draw(each(st.integers(-(2**40), 2**40))),
        scores=draw(each(number)),
        labels=draw(each(st.booleans())),
        margin=draw(st.none() | number),
        weight=draw(st.floats(0, 10)),
        step_ends=draw(marks(st.integers(0, 1000))),
        step_labels=draw(marks(st.booleans())),
    )


@settings(deadline=None, max_examples=60)
@given(st.lists(prompt_groups(), min_size=1, max_size=8))
def test_a_store_gives_back_every_group_to_the_last_bit(groups: list[PromptGroup]) -> None:
    with TemporaryDirectory() as folder:
        store = write(Path(folder) / "store", groups)
        assert len(store) == len(groups)
        assert all(same(store[i], group) for i, group in enumerate(groups))
        assert same(store[-1], groups[-1])


@settings(deadline=None, max_examples=30)
@given(st.lists(prompt_groups(), min_size=1, max_size=8))
def test_the_size_vectors_equal_a_loop_over_the_groups(groups: list[PromptGroup]) -> None:
    with TemporaryDirectory() as folder:
        store = write(Path(folder) / "store", groups)
        assert store.prompt_lengths.tolist() == [len(g.prompt) for g in groups]
        assert store.num_responses.tolist() == [len(g.responses) for g in groups]
        assert store.response_tokens.tolist() == [sum(map(len, g.responses)) for g in groups]
        assert store.response_offsets.tolist() == [sum(len(g.responses) for g in groups[:i]) for i in range(len(groups) + 1)]
        assert store.weights.tolist() == [g.weight for g in groups]
        assert store.row_ids.tolist() == [g.row_id for g in groups]


def simple_groups(count: int = 5) -> list[PromptGroup]:
    return [
        PromptGroup(row_id=i, prompt=np.arange(1 + i % 3), responses=(np.arange(3), np.arange(2)), ranks=(0, 1))
        for i in range(count)
    ]


def test_flushes_in_the_middle_change_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = write(tmp_path / "whole", simple_groups(20))
    monkeypatch.setattr(store_module, "_TOKENS_PER_FLUSH", 10)
    pieces = write(tmp_path / "pieces", simple_groups(20))
    assert pieces.digest == whole.digest
    assert all(same(pieces[i], whole[i]) for i in range(20))


def test_a_closed_store_keeps_no_file_open_and_its_groups_stay_readable(tmp_path: Path) -> None:
    groups = simple_groups(5)
    store = write(tmp_path / "store", groups)
    tokens = store._tokens
    held = [store[i] for i in range(5)]
    del store
    assert all(same(a, b) for a, b in zip(held, groups, strict=True))
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(tokens)


def test_token_ids_take_two_bytes_for_small_and_four_for_large_vocabularies(tmp_path: Path) -> None:
    group = PromptGroup(row_id=0, prompt=np.array([65535]), responses=(np.array([1]),))
    assert write(tmp_path / "small", [group], vocab_size=65536)[0].prompt.dtype == np.uint16
    large = replace(group, prompt=np.array([151_000]))
    found = write(tmp_path / "large", [large], vocab_size=152_000)[0]
    assert found.prompt.dtype == np.uint32
    assert found.prompt.tolist() == [151_000]


@pytest.mark.parametrize("token", [-1, 300])
def test_a_token_outside_the_vocabulary_is_refused(tmp_path: Path, token: int) -> None:
    group = PromptGroup(row_id=0, prompt=np.array([token]), responses=(np.array([1]),))
    with pytest.raises(ValueError, match=r"must be in \[0, 300\).*the size of the tokenizer with its added tokens"):
        write(tmp_path / "store", [group])


def test_the_digest_follows_the_content(tmp_path: Path) -> None:
    base = write(tmp_path / "a", simple_groups())
    assert write(tmp_path / "b", simple_groups()).digest == base.digest
    changed = [*simple_groups()[:-1], replace(simple_groups()[-1], weight=0.5)]
    renamed = [replace(group, source="other") for group in simple_groups()]
    assert len({base.digest, write(tmp_path / "c", changed).digest, write(tmp_path / "d", renamed).digest}) == 3


def test_a_crash_while_writing_leaves_nothing_behind(tmp_path: Path) -> None:
    def failing() -> Iterable[PromptGroup]:
        yield from simple_groups()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / "store", failing())
    assert list(tmp_path.iterdir()) == []


def test_an_empty_store_is_refused_and_leaves_nothing_behind(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="Nothing was appended"):
        write(tmp_path / "store", [])
    assert list(tmp_path.iterdir()) == []


def test_a_store_is_not_written_over_another(tmp_path: Path) -> None:
    write(tmp_path / "store", simple_groups())
    with pytest.raises(FileExistsError, match="exists already"):
        write(tmp_path / "store", simple_groups())


@pytest.mark.parametrize("name", ["tokens.bin", "ranks.bin", "row_ids.bin"])
def test_a_truncated_file_is_named_with_the_cure(tmp_path: Path, name: str) -> None:
    path = write(tmp_path / "store", simple_groups()).folder / name
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match=rf"{name} has \d+ bytes where \d+ were written. Delete the folder .*store"):
        GroupStore(tmp_path / "store")


def test_a_changed_byte_is_found_by_its_digest(tmp_path: Path) -> None:
    path = write(tmp_path / "store", simple_groups()).folder / "tokens.bin"
    data = bytearray(path.read_bytes())
    data[3] ^= 1
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"tokens.bin is not what was written.*Delete the folder"):
        GroupStore(tmp_path / "store")


def test_a_copied_store_with_other_time_stamps_opens(tmp_path: Path) -> None:
    store = write(tmp_path / "store", simple_groups())
    for path in store.folder.iterdir():
        os.utime(path, ns=(1, 1))
    assert GroupStore(store.folder).digest == store.digest


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    (write(tmp_path / "store", simple_groups()).folder / "scores.bin").unlink()
    with pytest.raises(ValueError, match=r"scores.bin is missing.*Delete the folder"):
        GroupStore(tmp_path / "store")


def test_a_broken_or_foreign_manifest_is_named(tmp_path: Path) -> None:
    path = write(tmp_path / "store", simple_groups()).folder / MANIFEST
    manifest = json.loads(path.read_text())
    path.write_text(path.read_text()[:50])
    with pytest.raises(ValueError, match=r"not a readable manifest.*Delete the folder"):
        GroupStore(tmp_path / "store")
    path.write_text(json.dumps({**manifest, "format_version": FORMAT_VERSION + 1}))
    with pytest.raises(ValueError, match=rf"has format version {FORMAT_VERSION + 1}, this program reads {FORMAT_VERSION}"):
        GroupStore(tmp_path / "store")


def test_a_folder_that_is_no_store_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="is no token store"):
        GroupStore(tmp_path)


def test_an_index_out_of_range_raises(tmp_path: Path) -> None:
    store = write(tmp_path / "store", simple_groups())
    with pytest.raises(IndexError, match="Group 5 was asked of a store of 5"):
        store[5]


def test_a_store_travels_to_a_worker_as_a_path(tmp_path: Path) -> None:
    store = write(tmp_path / "store", simple_groups(200))
    data = pickle.dumps(store)
    assert len(data) < 1000
    assert same(pickle.loads(data)[7], store[7])


def test_a_subset_is_a_table_of_its_own(tmp_path: Path) -> None:
    store = write(tmp_path / "store", [*simple_groups(4), *simple_groups(3)])
    subset = GroupSubset(store, np.array([5, 0, 2]))
    assert len(subset) == 3
    assert same(subset[0], store[5])
    assert subset.row_ids.tolist() == [1, 0, 2]
    assert subset.response_offsets.tolist() == [0, 2, 4, 6]
    assert subset.prompt_lengths.tolist() == [2, 1, 3]
    assert subset.digest != GroupSubset(store, np.array([0, 5, 2])).digest != store.digest


def test_equal_prompts_have_equal_keys_whatever_the_width_of_their_ids(tmp_path: Path) -> None:
    group = PromptGroup(row_id=0, prompt=np.array([1, 2], dtype=np.int64), responses=(np.array([1]),))
    narrow = replace(group, prompt=np.array([1, 2], dtype=np.int32))
    other = replace(group, prompt=np.array([2, 1]))
    keys = write(tmp_path / "store", [group, narrow, other]).prompt_keys.tolist()
    assert keys[0] == keys[1] != keys[2]
