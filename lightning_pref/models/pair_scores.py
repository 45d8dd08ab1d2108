"""From a model and a batch to the evidence about its pairs that monitors and commands work on."""

from __future__ import annotations

from typing import NamedTuple

from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel

from lightning_pref.data.groups import GroupBatch, Pairs, PairSelection
from lightning_pref.functional.masked import wide
from lightning_pref.models.backbones import evaluating
from lightning_pref.models.forward import Layout, Quantity, ResponseLogps, response_logps
from lightning_pref.observations import PairHiddenObservation, PairObservation


class PairEvidence(NamedTuple):
    """What one forward pass says about the B pairs of a batch."""

    logps: PairObservation
    hidden: PairHiddenObservation
    pairs: Pairs  # which responses of the batch they are


def pair_observation(
    model: PreTrainedModel | PeftModel,
    batch: GroupBatch,
    layout: Layout = "auto",
    *,
    selection: PairSelection = "all",
    reference: Tensor | None = None,
) -> PairObservation:
    """Log-probabilities of the pairs of a batch, in evaluation mode and without gradient; modes are left as they were.

    Args:
        model: A causal language model, as `response_logps` takes it.
        batch: Groups with an order, on the model's device. Those of weight 0 only fill the batch and are left out.
        layout: How the batch goes through the backbone; all agree up to rounding.
        selection: Which pairs are made of more than two ranked responses.
        reference: Log-probabilities under a reference, [R] in nats, summed over the tokens of each response of the batch.
    """
    out, pairs = _scored(model, batch, layout, selection, set())
    return logps_of_pairs(out, pairs, batch, reference)


def pair_hidden_observation(
    model: PreTrainedModel | PeftModel,
    batch: GroupBatch,
    layout: Layout = "auto",
    *,
    selection: PairSelection = "all",
) -> PairHiddenObservation:
    """Summed hidden states of the pairs of a batch, enough for CHES; arguments as in `pair_observation`."""
    out, pairs = _scored(model, batch, layout, selection, {"hidden"})
    return hidden_of_pairs(out, pairs, batch)


def pair_evidence(
    model: PreTrainedModel | PeftModel,
    batch: GroupBatch,
    layout: Layout = "auto",
    *,
    selection: PairSelection = "all",
) -> PairEvidence:
    """Both observations from one forward pass; arguments as in `pair_observation`."""
    out, pairs = _scored(model, batch, layout, selection, {"hidden"})
    return PairEvidence(logps_of_pairs(out, pairs, batch), hidden_of_pairs(out, pairs, batch), pairs)


def counted_pairs(pairs: Pairs) -> Pairs:
    """The pairs without those of rows that only fill a batch (weight 0), which are copies of rows seen elsewhere."""
    counts = pairs.weights > 0
    return Pairs(*(column[counts] for column in pairs))


def logps_of_pairs(out: ResponseLogps, pairs: Pairs, batch: GroupBatch, reference: Tensor | None = None) -> PairObservation:
    """The observation of pairs whose responses are scored already.

    Args:
        out: Of the batch.
        pairs: Pairs of the batch.
        batch: Gives the row numbers.
        reference: Summed log-probabilities under a reference, [R], nats.
    """
    return PairObservation(
        chosen_logps=out.logps[pairs.chosen],
        rejected_logps=out.logps[pairs.rejected],
        row_ids=batch.row_ids[pairs.group],
        chosen_lengths=out.lengths[pairs.chosen],
        rejected_lengths=out.lengths[pairs.rejected],
        ref_chosen_logps=None if reference is None else reference[pairs.chosen],
        ref_rejected_logps=None if reference is None else reference[pairs.rejected],
    )


def hidden_of_pairs(out: ResponseLogps, pairs: Pairs, batch: GroupBatch) -> PairHiddenObservation:
    """The summed hidden states of pairs whose responses were scored with `want={"hidden"}`; arguments as in `logps_of_pairs`."""
    if out.hidden is None:
        raise ValueError(
            'The responses were scored without their hidden states; ask for them: `response_logps(..., want={"hidden"})`.'
        )
    sums = pair_hidden_sums(out.hidden, out.response, batch.num_responses)
    return PairHiddenObservation(
        chosen_hidden=sums[pairs.chosen],
        rejected_hidden=sums[pairs.rejected],
        chosen_lengths=out.lengths[pairs.chosen],
        rejected_lengths=out.lengths[pairs.rejected],
        row_ids=batch.row_ids[pairs.group],
    )


def pair_hidden_sums(hidden: Tensor, response: Tensor, num_responses: int) -> Tensor:
    """Hidden states summed over each response, without gradient.

    In float32, since the states of bf16 weights are bf16, in which a sum over a response loses its digits.

    Args:
        hidden: State that predicts each response token, [N, D].
        response: Index of the response each token belongs to, [N].
        num_responses: Responses of the batch.

    Returns:
        [R, D], float32 (float64 for float64 states).
    """
    states = wide(hidden.detach())
    return states.new_zeros(num_responses, states.shape[1]).index_add_(0, response, states)


def _scored(
    model: PreTrainedModel | PeftModel, batch: GroupBatch, layout: Layout, selection: PairSelection, want: set[Quantity]
) -> tuple[ResponseLogps, Pairs]:
    pairs = counted_pairs(batch.pairs(selection))
    with evaluating(model):
        return response_logps(model, batch, layout=layout, want=want), pairs
