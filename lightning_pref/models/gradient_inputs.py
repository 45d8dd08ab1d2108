"""What the head of a causal language model sees of the pairs of a batch: enough for the gradients of its own matrix."""

from __future__ import annotations

from itertools import accumulate
from typing import NamedTuple

import torch
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel

from lightning_pref.data.groups import GroupBatch, PairSelection
from lightning_pref.measures.entanglement import Head, Scored
from lightning_pref.models.forward import Layout, response_logps
from lightning_pref.models.heads import head_of
from lightning_pref.models.pair_scores import counted_pairs, logps_of_pairs
from lightning_pref.models.parity import verified_head
from lightning_pref.models.sharding import whole_head
from lightning_pref.observations import PairObservation


class HeadInputs(NamedTuple):
    """The responses of B pairs as the head sees them, and their log-probabilities."""

    logps: PairObservation
    chosen: list[Scored]  # B entries
    rejected: list[Scored]
    head: Head


@torch.no_grad()
def head_inputs(
    model: PreTrainedModel | PeftModel,
    batch: GroupBatch,
    layout: Layout = "auto",
    *,
    selection: PairSelection = "all",
    reference: Tensor | None = None,
) -> HeadInputs:
    """Hidden states and tokens of the pairs of a batch, and the head as it stands now.

    Args:
        model: A causal language model, as `response_logps` takes it; its mode and adapters are as the caller has set them.
        batch: Groups with an order, on the model's device; those of weight 0 are left out.
        layout: How the batch goes through the backbone.
        selection: Which pairs are made of more than two ranked responses.
        reference: Summed log-probabilities under a reference, [R], nats.
    """
    out = response_logps(model, batch, layout=layout, want={"hidden"})
    assert out.hidden is not None
    pairs = counted_pairs(batch.pairs(selection))
    found = whole_head(verified_head(model, head_of(model)))
    low_rank = None if found.low_rank is None else (found.low_rank.down, found.low_rank.up)
    tokens = batch.input_ids[batch.response >= 0]
    ends = list(accumulate(batch.response_sizes))
    spans = [slice(end - size, end) for end, size in zip(ends, batch.response_sizes, strict=True)]
    responses = [Scored(out.hidden[span], tokens[span]) for span in spans]
    return HeadInputs(
        logps=logps_of_pairs(out, pairs, batch, reference),
        chosen=[responses[r] for r in pairs.chosen.tolist()],
        rejected=[responses[r] for r in pairs.rejected.tolist()],
        head=Head(found.weight, found.bias, low_rank, found.scale, found.softcap),
    )
