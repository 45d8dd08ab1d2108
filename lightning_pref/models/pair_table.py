"""What a model and the tokens say about every preference pair of a data set, as columns of a table."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel

from lightning_pref.data.groups import GroupBatch, PairSelection
from lightning_pref.measures.ches import ches_from_sums
from lightning_pref.measures.edits import edit_distance, shared_prefix_length
from lightning_pref.measures.ranking import flip_threshold
from lightning_pref.models.forward import Layout
from lightning_pref.models.pair_scores import PairEvidence, pair_evidence

PairTable = dict[str, NDArray[Any]]  # Any: integers, floats, booleans or texts by column

# Every column, in the order of the file.
PAIR_COLUMNS: dict[str, str] = {
    "row_id": "number of the row in the data, from 0",
    "chosen": "number of the chosen response in its row, from 0",
    "rejected": "number of the rejected response in its row",
    "source": "where the row came from, if the data says so",
    "ches": "CHES, squared hidden norm",
    "length_normalized_ches": "CHES of the mean states, squared hidden norm; the one to filter by",
    "edit_distance": "token insertions, deletions and substitutions between the responses",
    "normalized_edit_distance": "the same over the tokens of the longer response, 0 to 1",
    "shared_prefix": "tokens with which both responses begin",
    "prompt_length": "tokens",
    "chosen_length": "tokens",
    "rejected_length": "tokens",
    "ref_chosen_logps": "log-probability of the chosen response under this model, nats",
    "ref_rejected_logps": "of the rejected response",
    "ranked_rightly": "whether the chosen response is at least as likely",
    "ranked_rightly_per_token": "whether it is so by log-probability per token",
    "difficulty": "nats by which the rejected response is likelier; below 0 where ranked rightly",
    "flip_threshold": "DPO loss that the pair must reach to be ranked rightly, nats",
}

_FROM_TEXT = ("chosen", "rejected", "source", "edit_distance", "normalized_edit_distance", "shared_prefix", "prompt_length")


def score_pairs(
    model: PreTrainedModel,
    batches: Iterable[GroupBatch],
    *,
    beta: float,
    layout: Layout = "auto",
    selection: PairSelection = "all",
) -> PairTable:
    """One forward pass over all batches, in evaluation mode: `PAIR_COLUMNS`, one entry a pair, in the order of the batches.

    Args:
        model: A causal language model, usually the one that training starts from.
        batches: Of groups that have an order, at least one.
        beta: Of the DPO loss, for the flip thresholds.
        layout: How prompts and responses are laid out for the forward pass.
        selection: Which pairs are made of more than two ranked responses.
    """
    device = next(model.parameters()).device
    found = []
    for batch in batches:
        moved = batch.to(device)
        found.append(_columns_of(pair_evidence(model, moved, layout, selection=selection), moved, beta))
    return {name: np.concatenate([columns[name] for columns in found]) for name in PAIR_COLUMNS}


def _columns_of(evidence: PairEvidence, batch: GroupBatch, beta: float) -> PairTable:
    logps, hidden = evidence.logps, evidence.hidden
    lengths = (hidden.chosen_lengths, hidden.rejected_lengths)
    margin = logps.chosen_logps - logps.rejected_logps
    measured: dict[str, Tensor] = {
        "row_id": logps.row_ids,
        "ches": ches_from_sums(hidden.chosen_hidden, hidden.rejected_hidden),
        "length_normalized_ches": ches_from_sums(hidden.chosen_hidden, hidden.rejected_hidden, *lengths),
        "chosen_length": hidden.chosen_lengths,
        "rejected_length": hidden.rejected_lengths,
        "ref_chosen_logps": logps.chosen_logps,
        "ref_rejected_logps": logps.rejected_logps,
        "ranked_rightly": margin >= 0,
        "ranked_rightly_per_token": logps.chosen_logps / lengths[0] >= logps.rejected_logps / lengths[1],
        "difficulty": -margin,
        "flip_threshold": flip_threshold(logps.chosen_logps, logps.rejected_logps, beta),
    }
    return {name: values.cpu().numpy() for name, values in measured.items()} | _text_columns(evidence, batch)


def _text_columns(evidence: PairEvidence, batch: GroupBatch) -> PairTable:
    """What is told by the tokens alone."""
    groups = batch.groups()
    responses = [(place, tokens.tolist()) for group in groups for place, tokens in enumerate(group.responses)]
    columns: dict[str, list[Any]] = {name: [] for name in _FROM_TEXT}  # Any: by column
    pairs = torch.stack(evidence.pairs[:3]).T.tolist()
    for chosen_index, rejected_index, g in pairs:
        (place, chosen), (other_place, rejected) = responses[chosen_index], responses[rejected_index]
        distance = edit_distance(chosen, rejected)
        columns["chosen"].append(place)
        columns["rejected"].append(other_place)
        columns["source"].append(groups[g].source)
        columns["edit_distance"].append(distance)
        columns["normalized_edit_distance"].append(distance / max(len(chosen), len(rejected)))
        columns["shared_prefix"].append(shared_prefix_length(chosen, rejected))
        columns["prompt_length"].append(len(groups[g].prompt))
    return {name: np.array(values) for name, values in columns.items()}
