"""The evidence about pairs against the model alone, one sequence at a time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel, LlamaForCausalLM, PreTrainedModel

from lightning_pref.data.groups import GroupBatch, PromptGroup
from lightning_pref.measures.ches import ches, ches_from_sums
from lightning_pref.models.forward import response_logps
from lightning_pref.models.pair_scores import (
    hidden_of_pairs,
    pair_evidence,
    pair_hidden_observation,
    pair_hidden_sums,
    pair_observation,
)

TinyModel = Callable[..., LlamaForCausalLM]
RandomGroups = Callable[..., list[PromptGroup]]


class Alone(NamedTuple):
    """A response behind its prompt, with nothing else in the batch."""

    logp: float
    hidden: Tensor  # [n, D], states that predict its tokens


@torch.no_grad()
def alone(model: PreTrainedModel, group: PromptGroup, response: int) -> Alone:
    """Oracle: transformers' own forward of one sequence."""
    tokens = torch.tensor(group.responses[response].tolist())
    start = len(group.prompt)
    ids = torch.cat([torch.tensor(group.prompt.tolist()), tokens])[None]
    out = model.eval()(ids, output_hidden_states=True)
    logps = out.logits[0, start - 1 : -1].double().log_softmax(-1)
    return Alone(logps.gather(1, tokens[:, None]).sum().item(), out.hidden_states[-1][0, start - 1 : -1])


def small_gpt2() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=64, initializer_range=0.2))


@pytest.mark.parametrize("layout", ["padded", "packed", "shared", "auto"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_every_layout_gives_what_the_model_gives_one_sequence_at_a_time(
    tiny_model: TinyModel, random_groups: RandomGroups, layout: Any, family: str
) -> None:
    model: PreTrainedModel = tiny_model() if family == "llama" else small_gpt2()
    groups = random_groups(5, seed=3)
    logps, hidden, pairs = pair_evidence(model, GroupBatch.from_groups(groups), layout)
    expected = [[alone(model, group, response) for response in (0, 1)] for group in groups]
    assert logps.row_ids.tolist() == hidden.row_ids.tolist() == [0, 1, 2, 3, 4]
    assert pairs.chosen.tolist() == [0, 2, 4, 6, 8]
    for place, side in enumerate(("chosen", "rejected")):
        assert getattr(logps, f"{side}_logps").tolist() == pytest.approx([row[place].logp for row in expected], rel=1e-4)
        lengths = [len(group.responses[place]) for group in groups]
        assert getattr(logps, f"{side}_lengths").tolist() == getattr(hidden, f"{side}_lengths").tolist() == lengths
        sums = torch.stack([row[place].hidden.sum(0) for row in expected])
        torch.testing.assert_close(getattr(hidden, f"{side}_hidden"), sums, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("layout", ["padded", "packed", "shared"])
@pytest.mark.parametrize("length_normalized", [False, True])
def test_M1_batched_ches_equals_one_by_one(
    tiny_model: TinyModel, random_groups: RandomGroups, layout: Any, length_normalized: bool
) -> None:
    model = tiny_model()
    groups = random_groups(6, seed=1)
    hidden = pair_hidden_observation(model, GroupBatch.from_groups(groups), layout)
    lengths = (hidden.chosen_lengths, hidden.rejected_lengths) if length_normalized else ()
    batched = ches_from_sums(hidden.chosen_hidden, hidden.rejected_hidden, *lengths)
    expected = []
    for group in groups:
        sides = [alone(model, group, response).hidden[None] for response in (0, 1)]
        masks = [torch.ones(side.shape[:2], dtype=torch.bool) for side in sides]
        expected.append(ches(sides[0], masks[0], sides[1], masks[1], length_normalized=length_normalized))
    torch.testing.assert_close(batched, torch.cat(expected), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("length_normalized", [False, True])
def test_M1_ches_of_a_padded_transformers_batch_equals_that_of_each_row(
    tiny_model: TinyModel, random_groups: RandomGroups, side: str, length_normalized: bool
) -> None:
    """The measure on what anyone's own forward pass returns, padded on either side."""
    model = tiny_model().eval()
    groups = random_groups(6, seed=1)
    states, masks = zip(*(padded_states(model, groups, response, side) for response in (0, 1)), strict=True)
    found = ches(states[0], masks[0], states[1], masks[1], length_normalized=length_normalized)
    hidden = pair_hidden_observation(model, GroupBatch.from_groups(groups), "padded")
    lengths = (hidden.chosen_lengths, hidden.rejected_lengths) if length_normalized else ()
    torch.testing.assert_close(
        found, ches_from_sums(hidden.chosen_hidden, hidden.rejected_hidden, *lengths), rtol=1e-3, atol=1e-3
    )


@torch.no_grad()
def padded_states(model: PreTrainedModel, groups: list[PromptGroup], response: int, side: str) -> tuple[Tensor, Tensor]:
    """One transformers call on all rows with padding, and which of its positions predict a token of the response."""
    rows = [[*group.prompt.tolist(), *group.responses[response].tolist()] for group in groups]
    length = max(map(len, rows)) + 2
    ids, seen = torch.zeros(len(rows), length, dtype=torch.int64), torch.zeros(len(rows), length, dtype=torch.int64)
    predicts = torch.zeros(len(rows), length, dtype=torch.bool)
    for i, (row, group) in enumerate(zip(rows, groups, strict=True)):
        start = length - len(row) if side == "left" else 0
        ids[i, start : start + len(row)] = torch.tensor(row)
        seen[i, start : start + len(row)] = 1
        predicts[i, start + len(group.prompt) - 1 : start + len(row) - 1] = True
    out = model(ids, attention_mask=seen, output_hidden_states=True)
    return out.hidden_states[-1], predicts


def test_hidden_states_are_those_behind_the_head(tiny_model: TinyModel, random_groups: RandomGroups) -> None:
    """Past the final norm: multiplied by the unembedding matrix they are the model's logits."""
    model = tiny_model()
    (group,) = random_groups(1)
    short = PromptGroup(row_id=0, prompt=group.prompt, responses=tuple(r[:1] for r in group.responses), ranks=(0, 1))
    hidden = pair_hidden_observation(model, GroupBatch.from_groups([short])).chosen_hidden
    with torch.no_grad():
        logits = model(torch.tensor([group.prompt.tolist()])).logits[:, -1]
        torch.testing.assert_close(model.lm_head(hidden), logits, rtol=1e-4, atol=1e-4)


def test_both_observations_of_one_pass_are_those_of_two(tiny_model: TinyModel, random_groups: RandomGroups) -> None:
    batch, model = GroupBatch.from_groups(random_groups()), tiny_model()
    evidence = pair_evidence(model, batch)
    assert torch.equal(evidence.logps.chosen_logps, pair_observation(model, batch).chosen_logps)
    assert torch.equal(evidence.hidden.rejected_hidden, pair_hidden_observation(model, batch).rejected_hidden)


def test_rows_that_only_fill_a_batch_are_left_out(tiny_model: TinyModel, random_groups: RandomGroups) -> None:
    groups = random_groups(3)
    filler = PromptGroup(row_id=0, prompt=groups[0].prompt, responses=groups[0].responses, ranks=(0, 1), weight=0.0)
    found = pair_observation(tiny_model(), GroupBatch.from_groups([filler, *groups]))
    assert found.row_ids.tolist() == [0, 1, 2]
    torch.testing.assert_close(found.chosen_logps, pair_observation(tiny_model(), GroupBatch.from_groups(groups)).chosen_logps)


@pytest.mark.parametrize(("selection", "rows"), [("all", [0, 0, 0, 1, 1, 1]), ("best_worst", [0, 1]), ("adjacent", [0, 0, 1, 1])])
def test_pairs_of_ranked_lists_are_selected_as_in_training(
    tiny_model: TinyModel, random_groups: RandomGroups, selection: Any, rows: list[int]
) -> None:
    batch = GroupBatch.from_groups(random_groups(2, 3))
    assert pair_observation(tiny_model(), batch, selection=selection).row_ids.tolist() == rows
    assert pair_hidden_observation(tiny_model(), batch, selection=selection).row_ids.tolist() == rows
    assert len(pair_evidence(tiny_model(), batch, selection=selection).pairs.chosen) == len(rows)


def test_the_reference_is_given_by_response(tiny_model: TinyModel, random_groups: RandomGroups) -> None:
    batch = GroupBatch.from_groups(random_groups(2))
    found = pair_observation(tiny_model(), batch, reference=torch.tensor([-1.0, -2.0, -3.0, -4.0]))
    assert found.ref_chosen_logps is not None and found.ref_chosen_logps.tolist() == [-1.0, -3.0]
    assert found.ref_rejected_logps is not None and found.ref_rejected_logps.tolist() == [-2.0, -4.0]
    assert pair_observation(tiny_model(), batch).ref_chosen_logps is None


def test_dropout_is_off_inside_and_the_mode_as_before_outside(random_groups: RandomGroups) -> None:
    model = small_gpt2().train()  # GPT-2 comes with dropout
    model.transformer.h[0].eval()
    batch = GroupBatch.from_groups(random_groups())
    state = torch.get_rng_state()
    first, second = (pair_evidence(model, batch) for _ in range(2))
    assert torch.equal(first.logps.chosen_logps, second.logps.chosen_logps)
    assert not first.hidden.chosen_hidden.requires_grad
    assert model.training and not model.transformer.h[0].training
    assert torch.equal(torch.get_rng_state(), state)


def test_sums_of_half_precision_states_are_float32_and_of_float64_states_float64() -> None:
    states = torch.full((3000, 1), 0.1, dtype=torch.bfloat16, requires_grad=True)
    sums = pair_hidden_sums(states, torch.zeros(3000, dtype=torch.int64), 2)
    assert sums.dtype == torch.float32 and not sums.requires_grad
    assert sums.tolist() == [[pytest.approx(3000 * states[0].item(), rel=1e-4)], [0.0]]
    assert pair_hidden_sums(states.double(), torch.zeros(3000, dtype=torch.int64), 2).dtype == torch.float64


def test_scoring_without_hidden_states_says_how_to_ask_for_them(tiny_model: TinyModel, random_groups: RandomGroups) -> None:
    batch = GroupBatch.from_groups(random_groups(1))
    out = response_logps(tiny_model(), batch)
    with pytest.raises(ValueError, match='scored without their hidden states; ask for them: .*want={"hidden"}'):
        hidden_of_pairs(out, batch.pairs(), batch)
