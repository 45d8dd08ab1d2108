"""Reference log-probs of a whole dataset on disk: computed once, told apart by what they depend on, read by index."""

from __future__ import annotations

import hashlib
import json
import zipfile
import zlib
from collections.abc import Callable, Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel
from typing_extensions import override

from lightning_pref.data.groups import GroupBatch
from lightning_pref.models.backbones import evaluating
from lightning_pref.models.digests import ReferenceDigest
from lightning_pref.models.folders import replaced_folder
from lightning_pref.models.reference import Score, check_same_reference, summed_logps

MANIFEST = "manifest.json"
COLUMNS = ("logps", "lengths")


class ReferenceTable(NamedTuple):
    """Reference log-probs by response id, that is `GroupBatch.response_ids`."""

    logps: Tensor  # [num_responses] float32, nats, summed
    lengths: Tensor  # [num_responses] int64, tokens
    key: str  # of the digest they were made under


def compute_reference_cache(
    model: PreTrainedModel | PeftModel,
    batches: Iterable[GroupBatch],
    num_responses: int,
    folder: str | Path,
    digest: ReferenceDigest,
    *,
    score: Score = summed_logps,
) -> None:
    """Score all responses of a dataset in one process; several ranks call `write_part` and then one `merge_parts`.

    Args:
        model: The reference, which is the policy before its first update. Its modes and the random state are kept.
        batches: Every response of the dataset at least once.
        num_responses: Responses in the whole dataset.
        folder: Where the cache shall lie; an earlier cache there is replaced.
        digest: What the log-probs depend on.
        score: How a response is scored, as in training.
    """
    write_part(model, batches, folder, digest, score=score)
    merge_parts(folder, digest, num_responses=num_responses)


def write_part(
    model: PreTrainedModel | PeftModel,
    batches: Iterable[GroupBatch],
    folder: str | Path,
    digest: ReferenceDigest,
    *,
    rank: int = 0,
    num_ranks: int = 1,
    score: Score = summed_logps,
) -> None:
    """Score the batches of one rank into a part file beside the folder; ranks share nothing but that directory."""
    device = next(model.parameters()).device
    found: list[tuple[Tensor, Tensor, Tensor]] = []
    with evaluating(model):
        for batch in batches:
            moved = batch.to(device)
            found.append((moved.response_ids, score(model, moved).float(), moved.response_lengths))
    # A rank of a small dataset may have nothing to do.
    columns = [torch.cat(column) for column in zip(*found, strict=True)] or [torch.empty(0)] * 3
    ids, logps, lengths = (column.cpu().numpy() for column in columns)
    path = _part_path(Path(folder), digest, rank, num_ranks)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    with partial.open("wb") as file:
        np.savez(file, ids=ids.astype(np.int64), logps=logps.astype(np.float32), lengths=lengths.astype(np.int64))
    partial.replace(path)


def merge_parts(folder: str | Path, digest: ReferenceDigest, *, num_responses: int, num_ranks: int = 1) -> None:
    """Put the parts of all ranks together, on one rank after all have written theirs, and remove them."""
    folder = Path(folder)
    logps = np.full(num_responses, np.nan, dtype=np.float32)
    lengths = np.zeros(num_responses, dtype=np.int64)
    paths = [_part_path(folder, digest, rank, num_ranks) for rank in range(num_ranks)]
    for rank, path in enumerate(paths):
        if not path.exists():
            raise FileNotFoundError(
                f"The part of rank {rank} of {num_ranks} of the reference cache is missing ({path}). Every rank must call "
                "`write_part` with the same folder, on a file system that all share, before one merges."
            )
        part = _read_part(path)
        ids = part["ids"]
        if len(ids) and not 0 <= ids.min() <= ids.max() < num_responses:
            raise ValueError(
                f"Rank {rank} scored response ids {ids.min()} to {ids.max()}, but the dataset has {num_responses} "
                "responses: the batches come from another dataset than `num_responses`."
            )
        logps[ids], lengths[ids] = part["logps"], part["lengths"]
    _check_complete(logps)
    _write(folder, digest, {"logps": logps, "lengths": lengths})
    for path in paths:
        path.unlink()
    if not any(paths[0].parent.iterdir()):
        paths[0].parent.rmdir()


def read_reference_cache(folder: str | Path, digest: ReferenceDigest) -> ReferenceTable:
    """Read a cache that was made under exactly this digest.

    Raises:
        FileNotFoundError: If there is none.
        ValueError: If it is stale, and then which part changed; or if a file is damaged.
    """
    folder = Path(folder)
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        made_under, sums, num_responses = (manifest[key] for key in ("digest", "sha256", "num_responses"))
        changed = digest.changed_parts(made_under)
        sums = {name: sums[name] for name in COLUMNS}
    except FileNotFoundError:
        raise FileNotFoundError(f"There is no reference cache in {folder}; it has no {MANIFEST!r}. Compute it first.") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(_damaged(folder / MANIFEST)) from error
    if changed:
        findings = ", ".join(f"`{name}` was {made_under.get(name)!r}, is {getattr(digest, name)!r}" for name in changed)
        raise ValueError(
            f"The reference cache in {folder} is stale: {findings}. Its log-probs belong to other inputs; delete the folder "
            "to have them computed again, or restore what changed."
        )
    columns = {name: _read_column(folder / f"{name}.npy", sums[name]) for name in COLUMNS}
    if any(len(column) != num_responses for column in columns.values()):
        raise ValueError(_damaged(folder / MANIFEST))
    _check_complete(columns["logps"])
    return ReferenceTable(torch.from_numpy(columns["logps"]), torch.from_numpy(columns["lengths"]), digest.key)


class CachedReference(nn.Module):
    """A reference that is looked up; the model it was made from need not be in memory.

    The table lives on the device of the module (12 bytes a response) and is no part of a checkpoint; the key of its
    digest is, so that resuming with another cache raises.
    """

    table_logps: Tensor
    table_lengths: Tensor

    def __init__(self, table: ReferenceTable) -> None:
        super().__init__()
        self.register_buffer("table_logps", table.logps, persistent=False)
        self.register_buffer("table_lengths", table.lengths, persistent=False)
        self.key = table.key
        self._checked = False

    @torch.no_grad()
    def logps(self, batch: GroupBatch) -> Tensor:
        """Summed log-prob of each response in nats, [R] float32.

        Raises:
            ValueError: If ids or lengths show that the batch is not of the cached dataset. Looked at in the first batch
                after each change of mode, to spare the device a stop in every step.
        """
        if not self._checked:
            self._check(batch)
            self._checked = True
        return self.table_logps[batch.response_ids]

    def _check(self, batch: GroupBatch) -> None:
        largest = int(batch.response_ids.max())
        if largest < len(self.table_lengths) and torch.equal(self.table_lengths[batch.response_ids], batch.response_lengths):
            return
        raise ValueError(
            f"The batch does not belong to the dataset of the reference cache: its response ids (up to {largest}) have other "
            f"lengths there, or are not among its {len(self.table_lengths)} responses. Each dataset, training and validation, "
            "needs a cache of its own; or use the reference 'copy', which scores any batch."
        )

    @override
    def train(self, mode: bool = True) -> CachedReference:
        """Change the mode, which also brings other batches."""
        self._checked = False
        return super().train(mode)

    @override
    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> CachedReference:
        """Go along to another device, not to another dtype: `bf16-true` would round a sum of -150 nats by half a nat."""
        super()._apply(lambda tensor: tensor.to(fn(tensor).device), recurse)  # type: ignore[no-untyped-call]
        return self

    @override
    def get_extra_state(self) -> dict[str, str]:
        return {"key": self.key}

    @override
    def set_extra_state(self, state: dict[str, str]) -> None:
        check_same_reference(self.key, state["key"])


def _part_path(folder: Path, digest: ReferenceDigest, rank: int, num_ranks: int) -> Path:
    return folder.with_name(f".{folder.name}.parts") / f"{digest.key}-{rank}-of-{num_ranks}.npz"


def _check_complete(logps: NDArray[np.float32]) -> None:
    """Raise unless every response has a number; a stand-in such as 0 would train on a wrong margin without a word."""
    bad = np.flatnonzero(~np.isfinite(logps))
    if len(bad):
        raise ValueError(
            f"The reference has no finite log-prob for {len(bad)} of {len(logps)} responses, the first being response "
            f"{bad[0]}. Either the pass did not reach them (the batches must cover the whole dataset) or the model gives nan "
            "or inf there (half precision that overflows: try `precision: bf16-mixed` or `32-true`)."
        )


def _write(folder: Path, digest: ReferenceDigest, columns: dict[str, NDArray[Any]]) -> None:  # Any: float32 or int64
    with replaced_folder(folder, replaces=MANIFEST) as partial:
        for name, column in columns.items():
            np.save(partial / f"{name}.npy", column)
        sums = {name: hashlib.sha256((partial / f"{name}.npy").read_bytes()).hexdigest() for name in columns}
        manifest = {"num_responses": len(columns["logps"]), "digest": asdict(digest), "sha256": sums}
        (partial / MANIFEST).write_text(json.dumps(manifest, indent=2), encoding="utf-8")


def _read_part(path: Path) -> dict[str, NDArray[Any]]:  # Any: float32 or int64
    """What one rank found; the archive has a checksum of each column."""
    try:
        with path.open("rb") as file, np.load(file) as part:
            return {name: part[name] for name in ("ids", *COLUMNS)}
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(
            f"A part of the reference cache is damaged: {path} is cut short or altered ({error}). Delete the folder "
            f"{path.parent} and start again."
        ) from error


def _read_column(path: Path, expected: str) -> NDArray[Any]:  # Any: float32 or int64
    if not path.exists() or hashlib.sha256(path.read_bytes()).hexdigest() != expected:
        raise ValueError(_damaged(path))
    column: NDArray[Any] = np.load(path)
    return column


def _damaged(path: Path) -> str:
    return (
        f"The reference cache is damaged: {path} is missing, cut short or altered. Delete the folder {path.parent} to have it "
        "computed again."
    )
