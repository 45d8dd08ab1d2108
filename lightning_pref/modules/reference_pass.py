"""The one pass over a data set that a cached reference is made in."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import lightning as L
from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel

from lightning_pref.data.datamodule import PreferenceData
from lightning_pref.data.store import GroupTable
from lightning_pref.models.digests import ReferenceDigest, reference_digest
from lightning_pref.models.reference import Reference, Score
from lightning_pref.models.reference_cache import CachedReference, merge_parts, read_reference_cache, write_part


def cached_references(
    trainer: L.Trainer, model: PreTrainedModel | PeftModel, *, folder: str | None, score: Score
) -> tuple[Reference, Reference | None]:
    """References read from disk for training and validation; what is not there yet is computed first, by all ranks.

    Args:
        trainer: With `PreferenceData` as its data module.
        model: The reference. It is moved to the rank's device for the pass, whole.
        folder: Where the caches lie; below the data's cache folder if not given.
        score: How a response is scored, as in training.
    """
    data = getattr(trainer, "datamodule", None)
    if not isinstance(data, PreferenceData):
        raise TypeError(
            "The reference 'cache' is made from the data set of a PreferenceData, but the trainer has "
            f"{type(data).__name__}. Fit with `datamodule=PreferenceData(...)`, or use the reference 'copy'."
        )

    # The weights are read once for both data sets; of a large model that takes its time.
    shared = reference_digest(model, tokenizer=data.tokenizer_digest, data=data.train_table.digest, precision=trainer.precision)

    def cached(table: GroupTable, name: str) -> CachedReference:
        digest = replace(shared, data=table.digest)
        # A folder of the user's own is theirs to look after: what is stale there raises. Ours are named by their digest.
        place = Path(folder) / name if folder is not None else data.cache_folder / "reference" / digest.key[:16]
        _fill(trainer, model, data, table, place, digest, score)
        return CachedReference(read_reference_cache(place, digest))

    return cached(data.train_table, "train"), None if data.val_table is None else cached(data.val_table, "val")


def _fill(
    trainer: L.Trainer,
    model: PreTrainedModel | PeftModel,
    data: PreferenceData,
    table: GroupTable,
    place: Path,
    digest: ReferenceDigest,
    score: Score,
) -> None:
    """Compute the cache unless it is there."""
    # All ranks look before any of them writes, so all go the same way.
    if trainer.strategy.broadcast(place.exists()):
        return
    nn.Module.to(model, trainer.strategy.root_device)
    with trainer.precision_plugin.forward_context():
        write_part(
            model,
            data.every_batch(table, trainer.global_rank, trainer.world_size),
            place,
            digest,
            rank=trainer.global_rank,
            num_ranks=trainer.world_size,
            score=score,
        )
    trainer.strategy.barrier()
    if trainer.is_global_zero:
        merge_parts(place, digest, num_responses=int(table.response_offsets[-1]), num_ranks=trainer.world_size)
    trainer.strategy.barrier()
