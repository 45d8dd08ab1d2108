"""Scores of fixed sets against the rows one by one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM

from lightning_pref.data.groups import GroupBatch, PromptGroup
from lightning_pref.models.probe_scores import pair_accuracies, response_losses

TinyModel = Callable[..., LlamaForCausalLM]
RandomGroups = Callable[..., list[PromptGroup]]


@torch.no_grad()
def token_logps(model: LlamaForCausalLM, group: PromptGroup) -> list[torch.Tensor]:
    """Oracle: the log-probs of the tokens of each response, alone behind its prompt."""
    found = []
    for response in group.responses:
        ids = torch.tensor([[*group.prompt.tolist(), *response.tolist()]])
        logps = model(ids).logits[0, len(group.prompt) - 1 : -1].double().log_softmax(-1)
        found.append(logps.gather(1, ids[0, len(group.prompt) :, None])[:, 0])
    return found


@pytest.mark.parametrize("layout", ["padded", "packed", "shared"])
@torch.no_grad()
def test_losses_are_those_of_the_responses_one_by_one(tiny_model: TinyModel, random_groups: RandomGroups, layout: Any) -> None:
    model = tiny_model().eval()
    groups = random_groups(5, 3, ranked=False)
    scores = response_losses(model, GroupBatch.from_groups(groups), layout=layout)
    oracle = [logps for group in groups for logps in token_logps(model, group)]
    assert scores.weights is not None
    assert scores.values.tolist() == pytest.approx([-logps.mean().item() for logps in oracle], rel=1e-4)
    assert scores.weights.tolist() == [len(logps) for logps in oracle]
    mean = (scores.values * scores.weights).sum() / scores.weights.sum()
    assert mean.item() == pytest.approx(-torch.cat(oracle).mean().item(), rel=1e-4), "the loss over all tokens"


@torch.no_grad()
def test_only_the_best_responses_and_rows_with_weight_count(tiny_model: TinyModel, random_groups: RandomGroups) -> None:
    first, second, third = random_groups(3, 3)
    groups = [replace(first, ranks=(1, 0, 2)), replace(second, ranks=(0, 0, 1)), replace(third, weight=0.0)]
    scores = response_losses(tiny_model().eval(), GroupBatch.from_groups(groups))
    lengths = [len(response) for group in groups for response in group.responses]
    counts = [0, 1, 0, 1, 1, 0, 0, 0, 0]
    assert scores.weights is not None
    assert scores.weights.tolist() == [length * count for length, count in zip(lengths, counts, strict=True)]


@pytest.mark.parametrize("per_token", [False, True])
@torch.no_grad()
def test_pair_accuracies_are_those_of_the_pairs_one_by_one(
    tiny_model: TinyModel, random_groups: RandomGroups, per_token: bool
) -> None:
    model = tiny_model().eval()
    groups = [*random_groups(6, 2, seed=1), *random_groups(3, 4, seed=2)]
    scores = pair_accuracies(model, GroupBatch.from_groups(groups), per_token=per_token)
    expected = []
    for group in groups:
        logps = [(logp.mean() if per_token else logp.sum()).item() for logp in token_logps(model, group)]
        pairs = [logps[a] > logps[b] for a in range(len(logps)) for b in range(a + 1, len(logps))]
        expected.append(sum(pairs) / len(pairs))
    assert scores.values.tolist() == pytest.approx(expected)
    assert 0 < sum(expected) < len(expected), "some are right and some are not"
    assert scores.weights is not None
    assert scores.weights.tolist() == [1.0] * 9


@torch.no_grad()
def test_a_tie_counts_half(tiny_model: TinyModel, random_groups: RandomGroups) -> None:
    group = random_groups(1)[0]
    tied = replace(group, responses=(group.responses[0], group.responses[0]))
    assert pair_accuracies(tiny_model().eval(), GroupBatch.from_groups([tied])).values.tolist() == [0.5]


def test_summed_and_mean_log_probabilities_may_disagree(tiny_model: TinyModel, random_groups: RandomGroups) -> None:
    """A response and itself repeated: the sum is lower for the longer one, the mean need not be."""
    group = random_groups(1)[0]
    twice = group.responses[0].repeat(20)
    model = tiny_model().eval()
    batch = GroupBatch.from_groups([replace(group, responses=(twice, group.responses[0]))])
    with torch.no_grad():
        assert pair_accuracies(model, batch).values.tolist() == [0.0]
        means = [logps.mean() for logps in token_logps(model, batch.groups()[0])]
        assert pair_accuracies(model, batch, per_token=True).values.tolist() == [float(means[0] > means[1])]
