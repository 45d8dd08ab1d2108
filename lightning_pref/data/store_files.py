"""The folder of a token store: which files lie in it, and whether they are what was written."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np

# Goes up whenever a file changes its meaning; a cache of another version is built again.
FORMAT_VERSION: Final = 1

MANIFEST: Final = "manifest.json"

# One raw little-endian file a column. Per group: the first block; per response: the second; then the flat step marks.
COLUMNS: Final[dict[str, str]] = {
    "row_ids": "<i8",
    "prompt_lengths": "<i4",
    "prompt_keys": "<u8",
    "num_responses": "<i4",
    "weights": "<f8",
    "margins": "<f8",
    "source_ids": "<i4",
    "present": "|u1",
    "response_lengths": "<i4",
    "ranks": "<i8",
    "scores": "<f8",
    "labels": "|b1",
    "num_step_ends": "<i4",
    "num_step_labels": "<i4",
    "step_ends": "<i4",
    "step_labels": "|b1",
}

# Files up to this size are compared with their digests at every start, which takes some hundredths of a second.
_ALWAYS_READ_BYTES: Final = 32 << 20


def digest_of(value: object) -> str:
    """Of a value of JSON, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def read_manifest(folder: Path) -> dict[str, Any]:  # Any: JSON
    """What the manifest of a store says, if it can be what a writer wrote."""
    path = folder / MANIFEST
    try:
        manifest: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        version = manifest["format_version"]
        is_sound = version != FORMAT_VERSION or _agrees_with_itself(manifest)
    except FileNotFoundError:
        raise FileNotFoundError(f"{folder} is no token store: {path} is missing. {cure(folder)}") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is not a readable manifest ({error}). {cure(folder)}") from error
    if version != FORMAT_VERSION:
        raise ValueError(f"{path} has format version {version!r}, this program reads {FORMAT_VERSION}. {cure(folder)}")
    if not is_sound:
        raise ValueError(f"{path} is not what was written: its parts contradict each other. {cure(folder)}")
    return manifest


def _agrees_with_itself(manifest: Mapping[str, Any]) -> bool:
    """Whether the parts of a manifest belong together; those that are not in its digest follow from the others."""
    files: Mapping[str, Mapping[str, Any]] = manifest["files"]
    dtypes = {name.removesuffix(".bin"): facts["dtype"] for name, facts in files.items()}
    digests = {name: facts["sha256"] for name, facts in files.items()}
    return (
        all(isinstance(facts["bytes"], int) and isinstance(facts["mtime_ns"], int) for facts in files.values())
        and dtypes.pop("tokens", None) in ("<u2", "<u4")
        and dtypes == COLUMNS
        and manifest["digest"] == digest_of([manifest["format_version"], manifest["sources"], digests])
        and files["row_ids.bin"]["bytes"] == manifest["num_groups"] * np.dtype(COLUMNS["row_ids"]).itemsize
        and isinstance(manifest["report"], dict)
    )


def check_file(folder: Path, name: str, facts: Mapping[str, Any]) -> None:  # Any: as above
    """Raise if a file is not the one that the manifest knows these facts of."""
    path = folder / name
    if not path.exists():
        raise ValueError(f"{path} is missing from the token store. {cure(folder)}")
    status = path.stat()
    if status.st_size != facts["bytes"]:
        raise ValueError(f"{path} has {status.st_size} bytes where {facts['bytes']} were written. {cure(folder)}")
    if status.st_mtime_ns != facts["mtime_ns"] or status.st_size <= _ALWAYS_READ_BYTES:
        with path.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if found != facts["sha256"]:
            raise ValueError(f"{path} is not what was written: its sha256 differs from the manifest's. {cure(folder)}")


def cure(folder: Path) -> str:
    """What to do about a damaged store."""
    return f"Delete the folder {folder}; it is built again from the rows at the next start."
