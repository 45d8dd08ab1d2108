"""Checkpoint files that are whole or not there: written aside, flushed to disk, renamed, and vouched for by a manifest.

A checkpoint is a file, or the folder that a sharding strategy writes. Beside `step=120.ckpt` lies `step=120.ckpt.json`, written
last: the size and digest of every file, and what the checkpoint belongs to. Without it, a checkpoint is not taken for whole.
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import shutil
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

MANIFEST_VERSION = 1
_MANIFEST = ".json"
_PART = ".part"
_CHUNK = 1 << 22


class BrokenCheckpoint(ValueError):
    """A checkpoint that is not what was written."""


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What a checkpoint is, and what it was made of.

    Attributes:
        step: Updates of the run so far.
        epoch: Epochs that are done.
        batch: Micro-batches of the present epoch that are done; 0 between epochs.
        world_size: Processes of the run.
        digests: Of the data, the tokenizer, the reference and the configuration, by name.
        files: Size in bytes and SHA-256 of each file, by its place in the checkpoint.
        value: Of the quantity by which the best checkpoints are kept, if there is one.
    """

    step: int
    epoch: int
    batch: int
    world_size: int
    digests: Mapping[str, str] = field(default_factory=dict)
    files: Mapping[str, tuple[int, str]] = field(default_factory=dict)
    value: float | None = None


def manifest_path(checkpoint: Path) -> Path:
    """Where the manifest of a checkpoint lies."""
    return checkpoint.with_name(checkpoint.name + _MANIFEST)


def part_path(checkpoint: Path) -> Path:
    """Where a checkpoint is written before it is whole."""
    return checkpoint.with_name(f".{checkpoint.name}{_PART}")


def publish(checkpoint: Path, manifest: Manifest) -> None:
    """Make what was written at `part_path` the checkpoint, with its manifest; from then on it is whole.

    Args:
        checkpoint: Its final place. What was there goes at the same moment.
        manifest: Without the files, which are measured here.
    """
    part = part_path(checkpoint)
    files = {}
    for name, path in _files_of(part):
        _flush(path)
        files[name] = (path.stat().st_size, file_digest(path))
    # Should the process end between the two renames, the new file must not stand beside the manifest of the old one.
    manifest_path(checkpoint).unlink(missing_ok=True)
    if checkpoint.is_dir():
        shutil.rmtree(checkpoint)
    part.replace(checkpoint)
    write_text_whole(manifest_path(checkpoint), json.dumps(_as_json(manifest, files), indent=2) + "\n")


def _as_json(manifest: Manifest, files: Mapping[str, tuple[int, str]]) -> dict[str, object]:
    listed = {name: {"bytes": size, "sha256": digest} for name, (size, digest) in files.items()}
    return {"version": MANIFEST_VERSION, **asdict(manifest), "files": listed}


def write_text_whole(path: Path, text: str) -> None:
    """Replace a text file at once: whoever reads it sees the old text or the new one, also after a power cut."""
    part = part_path(path)
    with part.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)
    _flush(path.parent)


def remove(checkpoint: Path) -> None:
    """Remove a checkpoint, its manifest first, so that it is never taken for whole on the way."""
    manifest_path(checkpoint).unlink(missing_ok=True)
    if checkpoint.is_dir():
        shutil.rmtree(checkpoint)
    else:
        checkpoint.unlink(missing_ok=True)


def sweep(folder: Path) -> None:
    """Remove what interrupted writing left behind."""
    for part in folder.glob(f".*{_PART}"):
        if part.is_dir():
            shutil.rmtree(part)
        else:
            part.unlink()


def read_manifest(checkpoint: Path) -> Manifest | None:
    """The manifest of a checkpoint; `None` if it has none that can be read."""
    try:
        found = json.loads(manifest_path(checkpoint).read_text(encoding="utf-8"))
        if found.pop("version") != MANIFEST_VERSION:
            return None
        files = {name: (entry["bytes"], entry["sha256"]) for name, entry in found.pop("files").items()}
        return Manifest(**found, files=files)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def check_whole(checkpoint: Path) -> Manifest:
    """The manifest of a checkpoint, after every byte was compared with it.

    Raises:
        BrokenCheckpoint: If the checkpoint is not what was written; the message names the newest one that is.
    """
    finding = _finding(checkpoint)
    if finding is None:
        manifest = read_manifest(checkpoint)
        assert manifest is not None, "`_finding` has read it"
        return manifest
    others = [path for path in checkpoints_of(checkpoint.parent) if path != checkpoint and _finding(path) is None]
    cure = f"The newest whole checkpoint here is {others[0]}; resume from it." if others else "There is no whole one beside it."
    raise BrokenCheckpoint(f"The checkpoint {checkpoint} cannot be used: {finding}. {cure}")


def _finding(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint, or `None`."""
    if not checkpoint.exists():
        return "there is no such file"
    manifest = read_manifest(checkpoint)
    if manifest is None:
        return (
            f"its manifest {manifest_path(checkpoint).name} is missing or cannot be read, so that it was not written to its end"
        )
    there = dict(_files_of(checkpoint))
    for name, (size, digest) in manifest.files.items():
        path = there.get(name)
        shown = name or checkpoint.name
        if path is None:
            return f"its file {shown} is missing"
        if path.stat().st_size != size:
            return f"{shown} has {path.stat().st_size} bytes, and {size} were written"
        if file_digest(path) != digest:
            return f"the content of {shown} is not what was written (its SHA-256 differs)"
    return None


def checkpoints_of(folder: Path) -> list[Path]:
    """The checkpoints in a folder that have a manifest, newest first; their content is not looked at."""
    found = []
    for path in folder.glob(f"*{_MANIFEST}"):
        checkpoint = path.with_name(path.name.removesuffix(_MANIFEST))
        manifest = read_manifest(checkpoint)  # `None` also where the run has just removed it
        if manifest is not None and checkpoint.exists():
            found.append((manifest.step, manifest.epoch, checkpoint))
    return [checkpoint for *_, checkpoint in sorted(found, reverse=True)]


def newest_whole(folder: Path) -> tuple[Path | None, list[str]]:
    """The newest checkpoint of a folder that is whole, and what is wrong with those that are newer."""
    findings: list[str] = []
    for checkpoint in checkpoints_of(folder):
        finding = _finding(checkpoint)
        if finding is None:
            return checkpoint, findings
        findings.append(f"{checkpoint}: {finding}")
    return None, findings


def best_of(checkpoints: Sequence[Path], count: int, *, largest: bool) -> set[Path]:
    """The checkpoints of the best values, of equal ones the newer; those without a value are not among them."""
    valued = []
    for age, checkpoint in enumerate(checkpoints):
        manifest = read_manifest(checkpoint)
        if manifest is not None and manifest.value is not None and math.isfinite(manifest.value):
            valued.append((-manifest.value if largest else manifest.value, age, checkpoint))
    return {checkpoint for *_, checkpoint in sorted(valued)[:count]}


def check_same_weights(found: Collection[str], wanted: Collection[str]) -> None:
    """Raise unless a checkpoint has the weights of a model, neither fewer nor others.

    Args:
        found: Names in the checkpoint.
        wanted: Names in the model.
    """
    lacking, foreign = sorted(set(wanted) - set(found)), sorted(set(found) - set(wanted))
    if not lacking and not foreign:
        return
    parts = [f"{len(names)} that {what} (first {names[0]})" for names, what in (
        (lacking, "the model has and it has not"), (foreign, "it has and the model has not"),
    ) if names]  # fmt: skip
    raise ValueError(
        f"The checkpoint is of another model: of its {len(found)} tensors and the {len(wanted)} of this model there are "
        f"{' and '.join(parts)}. Resume with the settings the run was started with (`model`, `lora`, `reference`, `algorithm`)."
    )


@contextmanager
def explained_failure(checkpoint: Path) -> Iterator[None]:
    """Turn a failure to write into an error that says what is still there and what to do."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        if not is_write_failure(error):
            raise
        part = part_path(checkpoint)
        written = sum(path.stat().st_size for _, path in _files_of(part)) if part.exists() else 0
        sweep(checkpoint.parent)
        whole, _ = newest_whole(checkpoint.parent)
        kept = f"The former checkpoint {whole} is whole." if whole else "There is no earlier checkpoint of this run."
        free = shutil.disk_usage(checkpoint.parent).free
        raise OSError(
            f"The checkpoint {checkpoint} could not be written: {error}. {written / 2**20:.1f} MiB of it were written, and "
            f"{free / 2**20:.1f} MiB are free in that folder. {kept} Free space, or keep fewer checkpoints "
            "(`--checkpoint.keep_last`), then go on with `--run.resume auto`."
        ) from error


def is_write_failure(error: BaseException) -> bool:
    """Whether an error means that a file could not be written; torch's own writer does not say why."""
    if isinstance(error, OSError):
        return error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO)
    return isinstance(error, RuntimeError) and any(
        text in str(error) for text in ("PytorchStreamWriter failed", "unexpected pos", "file write failed")
    )


def file_digest(path: Path) -> str:
    """SHA-256 of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def _files_of(checkpoint: Path) -> list[tuple[str, Path]]:
    """The files of a checkpoint by their place in it; a checkpoint of one file has it at the empty place."""
    if not checkpoint.is_dir():
        return [("", checkpoint)] if checkpoint.exists() else []
    return [(path.relative_to(checkpoint).as_posix(), path) for path in sorted(checkpoint.rglob("*")) if path.is_file()]


def _flush(path: Path) -> None:
    """Have the disk hold what was written, so that a rename that survives a power cut has its content."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
