"""Files that are cut or altered after they were written are refused with a cure; none is read as if it were whole."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from transformers import LlamaForCausalLM

from lightning_pref.checkpoints import BrokenCheckpoint, Manifest, check_whole, manifest_path, newest_whole, part_path, publish
from lightning_pref.data.files import FILE_READERS, read_arrow
from lightning_pref.data.groups import GroupBatch, PromptGroup
from lightning_pref.data.rows import RowError
from lightning_pref.data.store import GroupStore, GroupStoreWriter
from lightning_pref.models.digests import ReferenceDigest
from lightning_pref.models.reference_cache import merge_parts, read_reference_cache, write_part

Build = Callable[..., LlamaForCausalLM]
Groups = Callable[..., list[PromptGroup]]
DIGEST = ReferenceDigest(weights="w", config="c", tokenizer="t", data="d", precision="32-true", attention="sdpa")


def damages(content: bytes, how_many: int, seed: int) -> Iterator[bytes]:
    """The content cut at places all over it, and with one bit flipped at others."""
    generator = np.random.default_rng(seed)
    for _ in range(how_many):
        yield content[: generator.integers(len(content))]
        place, bit = int(generator.integers(len(content))), 1 << int(generator.integers(8))
        yield content[:place] + bytes([content[place] ^ bit]) + content[place + 1 :]


def ends_of(path: Path, how_many: int, look: Callable[[], Any], expected: Any) -> dict[str, int]:
    """What becomes of each damage to a file: an error with a cure, or the very content that was written."""
    content, ends = path.read_bytes(), {"refused": 0, "no difference": 0}
    for damaged in damages(content, how_many, seed=len(content)):
        path.write_bytes(damaged)
        try:
            found = look()
        except (ValueError, FileNotFoundError) as error:
            said = str(error)
            cured = any(word in said for word in ("elete the folder", "esume from", "There is no whole one"))
            end = "refused" if cured and "\n" not in said else said
            ends[end] = ends.get(end, 0) + 1
        else:
            assert found == expected, f"{path.name} was read as something else"
            ends["no difference"] += 1
    path.write_bytes(content)
    assert set(ends) == {"refused", "no difference"}, "an error without a cure"
    return ends


def plain(group: PromptGroup) -> list[object]:
    values = [getattr(group, field.name) for field in fields(PromptGroup)]
    return [repr([np.asarray(v).tolist() for v in value] if isinstance(value, tuple) else np.asarray(value)) for value in values]


@pytest.fixture
def store(tmp_path: Path, random_groups: Groups) -> Path:
    with GroupStoreWriter(tmp_path / "store", vocab_size=64) as writer:
        for group in random_groups(12):
            writer.append(group)
        writer.report = {"sources": []}
    return tmp_path / "store"


def test_a_damaged_token_store_is_never_read_as_another_one(store: Path) -> None:
    def look() -> list[list[object]]:
        found = GroupStore(store)
        return [plain(found[i]) for i in range(len(found))]

    expected = look()
    tally = {}
    for path in sorted(store.iterdir()):
        if path.stat().st_size:
            how_many = 80 if path.name == "manifest.json" else 3
            tally[path.name] = ends_of(path, how_many, look, expected)
    assert all(ends["no difference"] == 0 for name, ends in tally.items() if name != "manifest.json")
    # Of the manifest only what is not needed to read, such as time stamps, may change unseen.
    assert tally["manifest.json"]["refused"] > 100


def test_a_flipped_bit_is_found_though_size_and_time_stamp_are_those_of_the_writing(store: Path) -> None:
    path = store / "tokens.bin"
    status, content = path.stat(), bytearray(path.read_bytes())
    content[7] ^= 4
    path.write_bytes(content)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    with pytest.raises(ValueError, match=r"tokens\.bin is not what was written.*Delete the folder"):
        GroupStore(store)


@pytest.fixture
def cache(tmp_path: Path, tiny_model: Build, random_groups: Groups) -> Path:
    groups = random_groups(6)
    batches = [GroupBatch.from_groups(groups)]
    write_part(tiny_model(), batches, tmp_path / "cache", DIGEST)
    merge_parts(tmp_path / "cache", DIGEST, num_responses=12)
    return tmp_path / "cache"


def test_a_damaged_reference_cache_is_never_read_as_another_one(cache: Path) -> None:
    def look() -> tuple[list[float], list[int], str]:
        table = read_reference_cache(cache, DIGEST)
        return table.logps.tolist(), table.lengths.tolist(), table.key

    expected = look()
    tally = {path.name: ends_of(path, 20, look, expected) for path in sorted(cache.iterdir())}
    assert {name: ends["no difference"] for name, ends in tally.items() if name != "manifest.json"} == {
        "logps.npy": 0,
        "lengths.npy": 0,
    }
    assert tally["manifest.json"]["refused"] > 30


def test_a_damaged_part_of_a_reference_cache_is_named(tmp_path: Path, tiny_model: Build, random_groups: Groups) -> None:
    write_part(tiny_model(), [GroupBatch.from_groups(random_groups(6))], tmp_path / "cache", DIGEST)
    (part,) = (tmp_path / ".cache.parts").iterdir()
    content = part.read_bytes()
    for damaged in (content[: len(content) // 2], b"", content[:60] + b"x" * 40 + content[100:]):
        part.write_bytes(damaged)
        with pytest.raises(ValueError, match="part of the reference cache is damaged.*Delete the folder"):
            merge_parts(tmp_path / "cache", DIGEST, num_responses=12)


def written(folder: Path, step: int) -> Path:
    checkpoint = folder / f"step={step}.ckpt"
    torch.save({"weights": torch.arange(1000.0) * step}, part_path(checkpoint))
    publish(checkpoint, Manifest(step=step, epoch=0, batch=0, world_size=1))
    return checkpoint


def test_a_damaged_checkpoint_is_refused_and_the_one_before_it_named(tmp_path: Path) -> None:
    first, second = written(tmp_path, 1), written(tmp_path, 2)
    tally = ends_of(second, 25, lambda: check_whole(second), None)
    assert tally == {"refused": 50, "no difference": 0}
    second.write_bytes(second.read_bytes()[:-1])
    with pytest.raises(BrokenCheckpoint, match=f"The newest whole checkpoint here is {first}"):
        check_whole(second)
    assert newest_whole(tmp_path)[0] == first


def test_a_damaged_manifest_never_vouches_for_other_content(tmp_path: Path) -> None:
    checkpoint = written(tmp_path, 1)
    expected = check_whole(checkpoint).files

    # Numbers that a bit made others (the step) are not protected: of the content every byte is.
    tally = ends_of(manifest_path(checkpoint), 60, lambda: check_whole(checkpoint).files, expected)
    assert tally["refused"] > 80


ROWS = [{"prompt": f"Question {i}?", "chosen": f"Yes, {i}.", "rejected": f"No, {i}."} for i in range(200)]


def write_parquet(path: Path) -> None:
    pq.write_table(pa.Table.from_pylist(ROWS), path, row_group_size=50)


def write_arrow_file(path: Path) -> None:
    table = pa.Table.from_pylist(ROWS)
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=50)


def write_arrow_stream(path: Path) -> None:
    table = pa.Table.from_pylist(ROWS)
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=50)


def write_jsonl(path: Path) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS), encoding="utf-8")


def write_json(path: Path) -> None:
    path.write_text(json.dumps(ROWS), encoding="utf-8")


@pytest.mark.parametrize(
    ("suffix", "write"),
    [(".parquet", write_parquet), (".arrow", write_arrow_file), (".arrow", write_arrow_stream), (".json", write_json)],
)
def test_a_dataset_file_that_is_cut_anywhere_is_refused_by_name(
    suffix: str, write: Callable[[Path], None], tmp_path: Path
) -> None:
    path = tmp_path / f"rows{suffix}"
    write(path)
    content = path.read_bytes()
    assert len(list(FILE_READERS[suffix](path))) == len(ROWS)
    for length in sorted({*range(0, len(content), len(content) // 25), *range(len(content) - 12, len(content))}):
        path.write_bytes(content[:length])
        with pytest.raises(ValueError, match=f"{path}: "):
            list(FILE_READERS[suffix](path))


def test_jsonl_that_is_cut_within_a_line_names_the_line(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    write_jsonl(path)
    content = path.read_bytes()
    path.write_bytes(content[: content.index(b"Yes, 120")])
    *whole, (place, last) = FILE_READERS[".jsonl"](path)
    assert len(whole) == 120
    assert place.row == 121
    assert isinstance(last, RowError)
    assert "rows.jsonl, row 121: found broken JSON" in str(last)


def test_text_that_lies_outside_its_arrow_file_is_refused_before_it_is_read(tmp_path: Path) -> None:
    ends = pa.py_buffer(np.array([0, -5, 4], np.int32).tobytes())
    text = pa.Array.from_buffers(pa.string(), 2, [None, ends, pa.py_buffer(b"abcd")])
    path = tmp_path / "rows.arrow"
    with pa.ipc.new_file(str(path), pa.schema([("prompt", pa.string())])) as file:
        file.write_batch(pa.record_batch([text], names=["prompt"]))
    with pytest.raises(ValueError, match=r"rows\.arrow: not a whole Arrow file \(.*offset"):
        list(read_arrow(path))
