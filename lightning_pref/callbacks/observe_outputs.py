"""Observations from what a step returns, for modules that may not be edited."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback
from torch import Tensor
from typing_extensions import override

from lightning_pref.observations import Observation, PairObservation, RewardObservation, observe

PAIR_KEYS = (
    "chosen_logps",
    "rejected_logps",
    "row_ids",
    "chosen_lengths",
    "rejected_lengths",
    "ref_chosen_logps",
    "ref_rejected_logps",
)
# Any: outputs and batches are the user's own.
Extract = Callable[[Any, Any], Observation | None]


def well_known_keys(outputs: Any, batch: Any) -> Observation | None:
    """Read the keys that preference trainers commonly return.

    `chosen_logps`, `rejected_logps` (with `ref_chosen_logps`, `ref_rejected_logps`, `chosen_lengths`, `rejected_lengths`) and
    `row_ids`, or `rewards` with `group` (which prompt each reward belongs to; with `lengths`, `gold`, `uncertainty`,
    `kl`). What says where something belongs may also stand in the batch.
    """
    if not isinstance(outputs, Mapping):
        return None
    given = {**(batch if isinstance(batch, Mapping) else {}), **outputs}
    if "chosen_logps" in outputs and "rejected_logps" in outputs:
        if "row_ids" not in given:
            raise ValueError(
                "The step returns `chosen_logps` and `rejected_logps`, but neither it nor the batch has `row_ids`, by which "
                "pairs are followed. Return them too, or give ObserveOutputs a function: "
                "ObserveOutputs(lambda outputs, batch: PairObservation(...))."
            )
        return PairObservation(**{key: given[key] for key in PAIR_KEYS if isinstance(given.get(key), Tensor)})
    if "rewards" in outputs and "group" in given:
        optional = {key: given[key] for key in ("lengths", "gold", "uncertainty", "kl") if isinstance(given.get(key), Tensor)}
        return RewardObservation(rewards=outputs["rewards"], prompt_ids=given["group"], **optional)
    return None


class ObserveOutputs(Callback):
    """Watches nothing itself: turns what `training_step` and `validation_step` return into observations.

    Needs: outputs with the evidence in them, and a function that finds it. Logs: nothing. Changes: nothing.

    What it publishes comes after the update of the same batch, while `observe` inside the step comes before it.

    Args:
        extract: `extract(outputs, batch)` gives an observation, or `None` for a step without one. If not given,
            well-known keys of the outputs are read, see `well_known_keys`.
    """

    def __init__(self, extract: Extract = well_known_keys) -> None:
        self.extract = extract

    @override
    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        # First in line, so that monitors which report at the end of the batch have its evidence by then.
        trainer.callbacks = [self, *(c for c in trainer.callbacks if c is not self)]  # type: ignore[attr-defined]

    @override
    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._publish(pl_module, outputs, batch)

    @override
    def on_validation_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        self._publish(pl_module, outputs, batch)

    def _publish(self, pl_module: L.LightningModule, outputs: Any, batch: Any) -> None:
        observation = self.extract(outputs, batch)
        if observation is not None:
            observe(pl_module, observation)
