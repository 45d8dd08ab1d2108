"""Where two runs differ: in their checkpoints, bit for bit, and in what they logged."""

from __future__ import annotations

import csv
import math
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

# What a clock decides, by the beginning or the end of its name.
_TIMED_STARTS = ("throughput/", "time/")
_TIMED_ENDS = ("/time_share",)
_TIMED_STATE = ("budget",)


def is_timed(name: str) -> bool:
    """Whether a quantity is a matter of the clock, and differs from run to run."""
    # A probe leaves measurements out by the clock; others skip by what they see.
    skips = name.startswith("probe/") and name.endswith("/skipped")
    return skips or name.startswith(_TIMED_STARTS) or name.endswith(_TIMED_ENDS) or name in _TIMED_STATE


def whole_state(checkpoint: Path) -> dict[str, Any]:  # Any: what a checkpoint holds
    """All that a checkpoint holds; the shards of a folder are put together."""
    if not checkpoint.is_dir():
        loaded: dict[str, Any] = torch.load(checkpoint, weights_only=True, map_location="cpu")
        return loaded
    if not (checkpoint / ".metadata").exists():
        raise ValueError(
            f"The checkpoint {checkpoint} is a folder, but none of torch's distributed checkpoints (it has no `.metadata`; "
            "DeepSpeed writes such); expected a file, or torch's format. Compare the weights that both runs export."
        )
    from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

    with tempfile.TemporaryDirectory() as folder:
        dcp_to_torch_save(checkpoint, Path(folder) / "whole.pt")
        shards = torch.load(Path(folder) / "whole.pt", weights_only=True, map_location="cpu")
    return {"shards": shards, "rest": torch.load(checkpoint / "meta.pt", weights_only=True, map_location="cpu")}


def first_difference(one: Any, other: Any, place: str = "") -> str | None:  # Any: what a checkpoint holds
    """Where two states differ first, or `None`; numbers and tensors are compared bit for bit, and nan equals nan.

    >>> first_difference({"lr": [0.1, 0.2]}, {"lr": [0.1, 0.3]})
    '/lr[1]: 0.2 against 0.3'
    """
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return _tensor_difference(one, other, place)
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        return _mapping_difference(one, other, place)
    if isinstance(one, list | tuple) and isinstance(other, list | tuple):
        if len(one) != len(other):
            return f"{place}: {len(one)} entries against {len(other)}"
        return _first(first_difference(a, b, f"{place}[{i}]") for i, (a, b) in enumerate(zip(one, other, strict=True)))
    both_nan = isinstance(one, float) and isinstance(other, float) and math.isnan(one) and math.isnan(other)
    return None if both_nan or (type(one) is type(other) and one == other) else f"{place}: {one!r} against {other!r}"


def _tensor_difference(one: Tensor, other: Tensor, place: str) -> str | None:
    if one.dtype != other.dtype or one.shape != other.shape:
        return f"{place}: {one.dtype} {list(one.shape)} against {other.dtype} {list(other.shape)}"
    bytes_of = (
        one.detach().contiguous().reshape(-1).view(torch.uint8),
        other.detach().contiguous().reshape(-1).view(torch.uint8),
    )
    if torch.equal(*bytes_of):
        return None
    differing = (one != other).reshape(-1)
    at = int(differing.int().argmax())
    return (
        f"{place}: {int(differing.sum())} of {one.numel()} entries, first {one.reshape(-1)[at]} against {other.reshape(-1)[at]}"
    )


def _mapping_difference(one: Mapping[Any, Any], other: Mapping[Any, Any], place: str) -> str | None:
    alone = sorted(f"{place}/{key}" for key in one.keys() ^ other.keys() if not is_timed(str(key)))
    if alone:
        return f"{', '.join(alone)}: in one of the two only"
    return _first(
        first_difference(one[key], other[key], f"{place}/{key}") for key in one if key in other and not is_timed(str(key))
    )


def _first(found: Iterable[str | None]) -> str | None:
    return next((place for place in found if place is not None), None)


def metrics_rows(folder: Path) -> list[dict[str, str]]:
    """The rows of a run's `metrics.csv`, without what is a matter of the clock; rows of nothing else are left out."""
    with (folder / "metrics.csv").open(encoding="utf-8", newline="") as file:
        rows = [{k: v for k, v in row.items() if v and not is_timed(k)} for row in csv.DictReader(file)]
    return [row for row in rows if row.keys() - {"step", "epoch"}]


def metrics_difference(one: Path, other: Path) -> str | None:
    """Where the metrics of two runs differ first, or `None`."""
    if not (one / "metrics.csv").exists() and not (other / "metrics.csv").exists():
        return None
    return first_difference(metrics_rows(one), metrics_rows(other), "metrics.csv, row ")
