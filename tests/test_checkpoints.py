"""A checkpoint is whole or not there, whatever happens while it is written and afterwards."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from lightning_pref import checkpoints
from lightning_pref.checkpoints import (
    BrokenCheckpoint,
    Manifest,
    best_of,
    check_whole,
    checkpoints_of,
    manifest_path,
    newest_whole,
    part_path,
    publish,
    remove,
)


def written(folder: Path, step: int, content: bytes = b"weights", value: float | None = None) -> Path:
    checkpoint = folder / f"step={step}.ckpt"
    part_path(checkpoint).write_bytes(content)
    publish(checkpoint, Manifest(step=step, epoch=0, batch=step, world_size=1, value=value))
    return checkpoint


def sharded(folder: Path, step: int) -> Path:
    checkpoint = folder / f"step={step}.ckpt"
    part = part_path(checkpoint)
    (part / "deep").mkdir(parents=True)
    (part / "meta.pt").write_bytes(b"meta")
    (part / "deep" / "shard").write_bytes(b"shard")
    publish(checkpoint, Manifest(step=step, epoch=0, batch=step, world_size=2))
    return checkpoint


@pytest.mark.parametrize("make", [written, sharded])
def test_C7_what_is_published_is_whole_and_leaves_nothing_beside_it(tmp_path: Path, make: Callable[[Path, int], Path]) -> None:
    checkpoint = make(tmp_path, 3)
    assert check_whole(checkpoint).step == 3
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step=3.ckpt", "step=3.ckpt.json"]
    remove(checkpoint)
    assert not list(tmp_path.iterdir())


def cut(checkpoint: Path) -> None:
    checkpoint.write_bytes(checkpoint.read_bytes()[:-1])


def flip(checkpoint: Path) -> None:
    content = bytearray(checkpoint.read_bytes())
    content[2] ^= 1
    checkpoint.write_bytes(content)


def lose_manifest(checkpoint: Path) -> None:
    manifest_path(checkpoint).unlink()


def cut_manifest(checkpoint: Path) -> None:
    path = manifest_path(checkpoint)
    path.write_text(path.read_text()[:40])


def of_another_release(checkpoint: Path) -> None:
    path = manifest_path(checkpoint)
    path.write_text(json.dumps(json.loads(path.read_text()) | {"version": 99}))


@pytest.mark.parametrize(
    ("damage", "finding"),
    [
        (cut, "has 6 bytes, and 7 were written"),
        (flip, "SHA-256 differs"),
        (lose_manifest, "its manifest .* is missing or cannot be read"),
        (cut_manifest, "its manifest .* is missing or cannot be read"),
        (of_another_release, "its manifest .* is missing or cannot be read"),
        (Path.unlink, "there is no such file"),
    ],
)
def test_a_damaged_checkpoint_is_told_and_the_one_before_it_taken(
    tmp_path: Path, damage: Callable[[Path], None], finding: str
) -> None:
    older, newer = written(tmp_path, 1), written(tmp_path, 2)
    damage(newer)
    with pytest.raises(
        BrokenCheckpoint, match=f"{newer.name} cannot be used: .*{finding}.*newest whole checkpoint here is .*{older.name}"
    ):
        check_whole(newer)
    assert newest_whole(tmp_path)[0] == older


def test_a_missing_shard_is_told(tmp_path: Path) -> None:
    checkpoint = sharded(tmp_path, 1)
    (checkpoint / "deep" / "shard").unlink()
    with pytest.raises(BrokenCheckpoint, match="its file deep/shard is missing. There is no whole one beside it"):
        check_whole(checkpoint)


@pytest.mark.parametrize("at", ["_flush", "file_digest", "write_text_whole"])
def test_C7_an_end_while_it_is_published_leaves_the_former_one_and_no_false_one(
    tmp_path: Path, at: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    former = written(tmp_path, 1)

    class Power(Exception):
        """Goes."""

    def gone(*_: object) -> None:
        raise Power

    with monkeypatch.context() as patch:
        patch.setattr(checkpoints, at, gone)
        with pytest.raises(Power):
            written(tmp_path, 2)
    assert newest_whole(tmp_path)[0] == former
    # The same step once more, as the run that goes on will have it.
    assert newest_whole(tmp_path)[0] != written(tmp_path, 2, b"weights again") == newest_whole(tmp_path)[0]


def test_the_best_are_chosen_by_value_and_the_newer_of_equal_ones(tmp_path: Path) -> None:
    for step, value in enumerate([0.5, 0.2, None, 0.2, 0.9, float("nan")]):
        written(tmp_path, step, value=value)
    there = checkpoints_of(tmp_path)
    assert [path.name for path in there] == [f"step={step}.ckpt" for step in (5, 4, 3, 2, 1, 0)]
    assert {path.name for path in best_of(there, 1, largest=False)} == {"step=3.ckpt"}
    assert {path.name for path in best_of(there, 2, largest=True)} == {"step=4.ckpt", "step=0.ckpt"}
