"""Readers for TRL's trainers: what `DPOTrainer` and `RewardTrainer` compute, as observations.

They look at what the models return inside `compute_loss`, and so depend on how these trainers are written inside; they refuse
versions of TRL that they were not tested with. This module imports without TRL.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.metadata import version
from typing import Any

import torch
from packaging.specifiers import SpecifierSet
from torch import Tensor, nn
from transformers import Trainer
from typing_extensions import override

from lightning_pref.integrations.transformers import ObserveForwards
from lightning_pref.observations import PairObservation, RewardObservation

TESTED = SpecifierSet(">=1.16,<1.17")

# Constants of the splitmix64 generator, as signed 64-bit integers.
_GOLDEN = 0x9E3779B97F4A7C15 - 2**64
_FIRST = 0xBF58476D1CE4E5B9 - 2**64
_SECOND = 0x94D049BB133111EB - 2**64


class ObserveDPO(ObserveForwards):
    """Reads TRL's `DPOTrainer`: log-probabilities of policy and reference, lengths, row ids.

    Log-probabilities are plain sums over response tokens, also where `ld_alpha` has the loss weigh some of them. TRL's batches
    do not say which rows they hold; a row's id is `pair_ids` of its tokens, the same in every epoch, run and process.
    """

    @override
    def check(self, trainer: Trainer) -> None:
        check_trainer(trainer, "DPOTrainer", type(self).__name__)

    @override
    def models(self, trainer: Trainer) -> Sequence[nn.Module]:
        reference: nn.Module | None = trainer.ref_model  # type: ignore[attr-defined]  # of TRL's subclass
        # With adapters there is none: the policy is called a second time without them.
        return [model for model in (trainer.model, reference) if model is not None]

    @override
    def read(self, trainer: Trainer, outputs: Sequence[Any], batch: Mapping[str, Any]) -> PairObservation:
        scored = batch["completion_mask"][:, 1:].bool()
        token_logps = [out.log_probs[:, -scored.shape[1] :] for out in outputs if getattr(out, "log_probs", None) is not None]
        if "ref_chosen_logps" in batch:
            ref_chosen, ref_rejected = batch["ref_chosen_logps"], batch["ref_rejected_logps"]
        else:
            ref_chosen, ref_rejected = token_logps[1].sum(1).chunk(2)
        chosen, rejected = token_logps[0].sum(1).chunk(2)
        chosen_lengths, rejected_lengths = scored.sum(1).chunk(2)
        return PairObservation(
            chosen_logps=chosen,
            rejected_logps=rejected,
            row_ids=pair_ids(batch["input_ids"], batch["attention_mask"]),
            chosen_lengths=chosen_lengths,
            rejected_lengths=rejected_lengths,
            ref_chosen_logps=ref_chosen,
            ref_rejected_logps=ref_rejected,
        )


class ObserveRewards(ObserveForwards):
    """Reads TRL's `RewardTrainer`: the rewards of chosen and rejected responses.

    Its batches do not say where a prompt ends, so that the two responses of a row are one prompt's, and rows stay apart even
    where they share a prompt; the prompt id is `pair_ids` of the row.
    """

    @override
    def check(self, trainer: Trainer) -> None:
        check_trainer(trainer, "RewardTrainer", type(self).__name__)

    @override
    def models(self, trainer: Trainer) -> Sequence[nn.Module]:
        return [] if trainer.model is None else [trainer.model]

    @override
    def read(self, trainer: Trainer, outputs: Sequence[Any], batch: Mapping[str, Any]) -> RewardObservation:
        rewards: Tensor = outputs[0].logits.squeeze(-1)
        return RewardObservation(rewards=rewards, prompt_ids=pair_ids(batch["input_ids"], batch["attention_mask"]).repeat(2))


def rows_by_id(trainer: Trainer, batch_size: int = 256) -> dict[int, int]:
    """Number in `trainer.train_dataset` of every pair, by the row id that the readers give it: what an alert's rows are.

    Args:
        trainer: TRL's `DPOTrainer` or `RewardTrainer`.
        batch_size: Rows at a time.
    """
    rows: Any = trainer.train_dataset  # Any: of the datasets library, which has no types
    found: dict[int, int] = {}
    for start in range(0, len(rows), batch_size):
        batch = trainer.data_collator([rows[i] for i in range(start, min(start + batch_size, len(rows)))])
        ids = pair_ids(batch["input_ids"], batch["attention_mask"]).tolist()
        for offset, row_id in enumerate(ids):
            found.setdefault(row_id, start + offset)  # of twins the first
    return found


def check_trainer(trainer: Trainer, name: str, reader: str) -> None:
    """Raise if this is not that trainer of TRL, or not of a version in `TESTED`."""
    if not any(cls.__name__ == name and cls.__module__.split(".")[0] == "trl" for cls in type(trainer).__mro__):
        raise TypeError(f"{reader} reads TRL's {name}, got a {type(trainer).__name__}; see `ObserveOutputs` for other trainers.")
    if trainer.args.torch_compile:
        raise ValueError(
            f"{reader} cannot look inside a compiled model. Train without `torch_compile`, or measure with a Probe instead."
        )
    check_version(version("trl"), reader)


def check_version(found: str, reader: str) -> None:
    """Raise if a version of TRL is not in `TESTED`."""
    if not TESTED.contains(found, prereleases=True):
        raise RuntimeError(
            f"{reader} knows the inside of TRL {TESTED}, found {found}. Install a version of that range; or override "
            "`compute_loss` and publish from it with `observe`, or measure with a Probe, which any version allows."
        )


def pair_ids(input_ids: Tensor, attention_mask: Tensor) -> Tensor:
    """A number for each pair that depends on its tokens alone: not on padding, place in the batch, epoch or process.

    Args:
        input_ids: Token ids, the chosen rows followed by the rejected ones, [2B, T].
        attention_mask: True or 1 at tokens, [2B, T].

    Returns:
        Integers in [0, 2^63), [B]. Two different pairs among a million get the same one with a probability below 1e-7.

    >>> ids = torch.tensor([[5, 6, 0], [5, 7, 8]])
    >>> wider = torch.tensor([[0, 5, 6, 0], [5, 7, 8, 0]])
    >>> torch.equal(pair_ids(ids, ids > 0), pair_ids(wider, wider > 0))
    True
    """
    mask = attention_mask.bool()
    places = mask.long().cumsum(1)
    texts = torch.where(mask, _mixed(input_ids.long() + places * _GOLDEN), 0).sum(1)
    chosen, rejected = _mixed(texts).chunk(2)
    return _mixed(chosen * 3 + rejected) & 0x7FFFFFFFFFFFFFFF


def _mixed(values: Tensor) -> Tensor:
    """The finaliser of splitmix64, on 64-bit integers that wrap around: equal in, equal out, else unrelated."""
    values = (values ^ _shifted(values, 30)) * _FIRST
    values = (values ^ _shifted(values, 27)) * _SECOND
    return values ^ _shifted(values, 31)


def _shifted(values: Tensor, bits: int) -> Tensor:
    """To the right, filling with zeros: torch fills with the sign."""
    return (values >> bits) & ((1 << (64 - bits)) - 1)
