"""Distributions where responses part, against plain calls of the model on one row after the other."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaForCausalLM

from lightning_pref.data.groups import GroupBatch, PromptGroup
from lightning_pref.measures.mass_shift import mass_shift, probability_change
from lightning_pref.models.first_difference import NO_TOKEN, first_differences, with_candidates

TinyModel = Callable[..., LlamaForCausalLM]

PROMPT = (5, 6, 7)
# Chosen, rejected: differ at once, after two tokens, one the beginning of the other (both ways), equal.
PAIRS = [((1, 2, 3), (4, 2, 3, 8)), ((1, 2, 3), (1, 2, 9, 9)), ((1, 2), (1, 2, 3)), ((1, 2, 3, 4), (1,)), ((1, 2), (1, 2))]
POSITIONS = [0, 2, 2, 1]


def groups_of(pairs: list[tuple[tuple[int, ...], tuple[int, ...]]], *, weight: float = 1.0) -> list[PromptGroup]:
    return [
        PromptGroup(
            row_id=100 + row,
            prompt=np.array(PROMPT[: 1 + row % 3]),
            responses=(np.array(chosen), np.array(rejected)),
            ranks=(0, 1),
            weight=weight,
        )
        for row, (chosen, rejected) in enumerate(pairs)
    ]


@torch.no_grad()
def next_token_logps(model: LlamaForCausalLM, ids: list[int]) -> torch.Tensor:
    return model(torch.tensor([ids])).logits[0, -1].float().log_softmax(-1)


@torch.no_grad()
def summed(model: LlamaForCausalLM, prompt: list[int], response: list[int]) -> float:
    logps = model(torch.tensor([[*prompt, *response]])).logits[0].float().log_softmax(-1)
    return sum(float(logps[len(prompt) - 1 + t, token]) for t, token in enumerate(response))


@pytest.mark.parametrize("layout", ["padded", "packed", "shared"])
def test_distributions_are_those_of_the_plain_model_one_by_one(tiny_model: TinyModel, layout: Any) -> None:
    model, groups = tiny_model().eval(), groups_of(PAIRS)
    (found,) = first_differences(model, GroupBatch.from_groups(groups), layout=layout)
    # The pair of equal responses has no such place.
    assert found.row_ids.tolist() == [100, 101, 102, 103]
    assert found.position.tolist() == POSITIONS
    assert found.chosen_tokens.tolist() == [1, 3, NO_TOKEN, 2]
    assert found.rejected_tokens.tolist() == [4, 9, 3, NO_TOKEN]
    for i, (group, position) in enumerate(zip(groups, POSITIONS, strict=False)):
        prompt, responses = group.prompt.tolist(), [response.tolist() for response in group.responses]
        expected = next_token_logps(model, [*prompt, *max(responses, key=len)[:position]])
        assert torch.allclose(found.token_logps[i], expected, atol=1e-4)
        own = [summed(model, prompt, response) for response in responses]
        assert found.candidate_logps[i].tolist() == pytest.approx(own, rel=1e-4)


def test_company_in_the_batch_changes_nothing(tiny_model: TinyModel) -> None:
    model, groups = tiny_model().eval(), groups_of(PAIRS)
    (together,) = first_differences(model, GroupBatch.from_groups(groups))
    for i, group in enumerate(groups[:4]):
        (alone,) = first_differences(model, GroupBatch.from_groups([group]))
        for name in ("position", "chosen_tokens", "rejected_tokens"):
            assert getattr(alone, name).item() == getattr(together, name)[i].item()
        assert torch.allclose(alone.token_logps[0], together.token_logps[i], atol=1e-4)


def test_candidates_stand_behind_chosen_and_rejected(tiny_model: TinyModel) -> None:
    model, groups = tiny_model().eval(), groups_of(PAIRS[:2])
    reversed_pair = PromptGroup(row_id=100, prompt=groups[0].prompt, responses=tuple(reversed(groups[0].responses)), ranks=(1, 0))
    for first in (groups[0], reversed_pair):
        rows = [with_candidates(first, [[11], [12, 13]]), groups[1]]
        (found,) = first_differences(model, GroupBatch.from_groups(rows))
        assert (found.chosen_tokens[0].item(), found.rejected_tokens[0].item()) == (1, 4)
        prompt = groups[0].prompt.tolist()
        expected = [summed(model, prompt, list(response)) for response in (*PAIRS[0], (11,), (12, 13))]
        assert found.candidate_logps[0].tolist() == pytest.approx(expected, rel=1e-4)
        assert found.candidate_logps[1].isnan().tolist() == [False, False, True, True]


def test_candidates_are_added_to_pairs_only(tiny_model: TinyModel) -> None:
    tied = PromptGroup(row_id=3, prompt=np.array([1]), responses=(np.array([2]), np.array([3])), ranks=(0, 0))
    with pytest.raises(ValueError, match=r"Row 3: candidates are added to a chosen and a rejected response, got 2 responses"):
        with_candidates(tied, [[4]])


def test_equal_responses_and_rows_that_fill_a_batch_leave_nothing(tiny_model: TinyModel) -> None:
    model = tiny_model().eval()
    assert first_differences(model, GroupBatch.from_groups(groups_of([PAIRS[-1]]))) == []
    assert first_differences(model, GroupBatch.from_groups(groups_of(PAIRS, weight=0.0))) == []


def test_the_changes_over_the_vocabulary_add_up_to_zero(tiny_model: TinyModel) -> None:
    batch = GroupBatch.from_groups(groups_of(PAIRS))
    before, after = (first_differences(tiny_model(seed).eval(), batch)[0] for seed in (0, 1))
    change = probability_change(after.token_logps, before.token_logps)
    assert change.abs().max() > 0.01
    assert change.sum(-1).abs().max() < 1e-12
    shift = mass_shift(change, after.chosen_tokens, after.rejected_tokens)
    for i, (chosen, rejected) in enumerate(zip(after.chosen_tokens.tolist(), after.rejected_tokens.tolist(), strict=True)):
        others = [value for token, value in enumerate(change[i].tolist()) if token not in (chosen, rejected)]
        assert shift.chosen_token[i].item() == (change[i, chosen].item() if chosen >= 0 else 0.0)
        assert shift.rejected_token[i].item() == (change[i, rejected].item() if rejected >= 0 else 0.0)
        assert shift.other_tokens[i].item() == pytest.approx(sum(others), abs=1e-12)
        assert shift.largest_gain[i].item() == max(others)
