"""Ready-made scores of fixed sets: what a causal language model does on the examples of a `GroupBatch`."""

from __future__ import annotations

import torch
from peft import PeftModel
from transformers import PreTrainedModel

from lightning_pref.data.groups import GroupBatch
from lightning_pref.measures.forgetting import ProbeScores
from lightning_pref.models.forward import Layout, response_logps


def response_losses(model: PreTrainedModel | PeftModel, batch: GroupBatch, *, layout: Layout = "auto") -> ProbeScores:
    """Mean negative log-likelihood of each response, weighing as many tokens as it has.

    The weighted mean is the loss of language modelling on responses: exp of it is their perplexity. Of ordered responses only
    the best of each row count; that a worse one becomes unlikely is nothing lost.

    Args:
        model: What `response_logps` takes; for our modules `module.policy`.
        batch: Groups, on the model's device.
        layout: How the batch goes through the model.

    Returns:
        Values in nats per token and weights in tokens times the row's weight, each [R].
    """
    scored = response_logps(model, batch, layout=layout)
    best = [
        ranks is None or rank == min(ranks)
        for ranks, size in zip(batch.ranks, batch.group_sizes, strict=True)
        for rank in (ranks or (0,) * size)
    ]
    weights = scored.lengths * batch.weights[batch.group_of_response] * torch.tensor(best, device=scored.lengths.device)
    return ProbeScores(-scored.logps / scored.lengths, weights)


def pair_accuracies(
    model: PreTrainedModel | PeftModel, batch: GroupBatch, *, per_token: bool = False, layout: Layout = "auto"
) -> ProbeScores:
    """Share of each row's ordered pairs whose better response the model finds likelier; a tie counts half.

    Args:
        model: What `response_logps` takes; for our modules `module.policy`.
        batch: Groups of ordered responses, on the model's device.
        per_token: Compare mean log-probabilities per token instead of sums.
        layout: How the batch goes through the model.

    Returns:
        Values in [0, 1] and the rows' weights, each [G].
    """
    scored = response_logps(model, batch, layout=layout)
    logps = scored.logps / scored.lengths if per_token else scored.logps
    pairs = batch.pairs()
    difference = logps[pairs.chosen] - logps[pairs.rejected]
    right = (difference > 0).float() + 0.5 * (difference == 0).float()
    counts = torch.zeros_like(batch.weights)
    return ProbeScores(
        torch.zeros_like(counts).index_add_(0, pairs.group, right) / counts.index_add_(0, pairs.group, torch.ones_like(right)),
        batch.weights,
    )
