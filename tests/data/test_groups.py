from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lightning.pytorch.plugins.precision import DoublePrecision, HalfPrecision

from lightning_pref.data.groups import NO_STEP, GroupBatch, PromptGroup, WindowCounts, select_pairs

Groups = Callable[..., list[PromptGroup]]


def small_group(row_id: int = 0, prompt: tuple[int, ...] = (1, 2), *responses: tuple[int, ...]) -> PromptGroup:
    arrays = tuple(np.array(response) for response in responses or ((3, 4, 5), (6,)))
    return PromptGroup(row_id=row_id, prompt=np.array(prompt), responses=arrays)


def test_a_batch_lays_prompt_and_responses_end_to_end() -> None:
    batch = GroupBatch.from_groups([small_group(7), small_group(9, (8,), (1, 2))])
    assert batch.input_ids.tolist() == [1, 2, 3, 4, 5, 6, 8, 1, 2]
    assert batch.group.tolist() == [0, 0, 0, 0, 0, 0, 1, 1, 1]
    assert batch.response.tolist() == [-1, -1, 0, 0, 0, 1, -1, 2, 2]
    assert batch.position_ids.tolist() == [0, 1, 2, 3, 4, 2, 0, 1, 2]
    assert batch.row_ids.tolist() == [7, 9]
    assert batch.group_of_response.tolist() == [0, 0, 1]
    assert (batch.num_groups, batch.num_responses, batch.num_tokens) == (2, 3, 9)


def test_every_response_goes_on_counting_where_its_prompt_ends(random_groups: Groups) -> None:
    groups = random_groups(5, 3)
    batch = GroupBatch.from_groups(groups)
    responses = [(len(group.prompt), response) for group in groups for response in group.responses]
    for number, (prompt_length, response) in enumerate(responses):
        own = batch.response == number
        assert batch.position_ids[own].tolist() == list(range(prompt_length, prompt_length + len(response)))
        assert batch.input_ids[own].tolist() == response.tolist()


def test_token_ids_keep_their_value_whatever_their_width() -> None:
    for dtype in (np.uint16, np.uint32, np.int32, np.int64):
        group = PromptGroup(row_id=0, prompt=np.array([65535], dtype=dtype), responses=(np.array([1], dtype=dtype),))
        assert GroupBatch.from_groups([group]).input_ids.tolist() == [65535, 1]


def test_groups_gives_back_what_from_groups_took(random_groups: Groups) -> None:
    groups = [replace(group, weight=0.5, source="a", scores=(0.5, 0.25), labels=(True, False)) for group in random_groups(3)]
    for found, wanted in zip(GroupBatch.from_groups(groups).groups(), groups, strict=True):
        assert found.prompt.tolist() == wanted.prompt.tolist()
        assert [r.tolist() for r in found.responses] == [r.tolist() for r in wanted.responses]
        for name in ("row_id", "source", "ranks", "scores", "labels", "weight"):
            assert getattr(found, name) == getattr(wanted, name)


def test_response_ids_count_inside_the_batch_unless_given(random_groups: Groups) -> None:
    groups = random_groups(2, 2)
    assert GroupBatch.from_groups(groups).response_ids.tolist() == [0, 1, 2, 3]
    assert GroupBatch.from_groups(groups, response_ids=[8, 9, 2, 3]).response_ids.tolist() == [8, 9, 2, 3]


def test_per_response_values_exist_only_if_every_group_has_them() -> None:
    scored, plain = replace(small_group(), scores=(1.0, 0.0)), small_group(1)
    assert GroupBatch.from_groups([scored, scored]).scores is not None
    assert GroupBatch.from_groups([scored, plain]).scores is None


def test_a_missing_margin_is_zero_beside_others() -> None:
    batch = GroupBatch.from_groups([replace(small_group(), margin=2.0), small_group(1)])
    assert batch.margins is not None
    assert batch.margins.tolist() == [2.0, 0.0]
    assert GroupBatch.from_groups([small_group()]).margins is None


def test_step_labels_lie_on_the_last_token_of_each_step() -> None:
    group = replace(small_group(0, (1,), (2, 3, 4)), step_ends=((0, 2),), step_labels=((True, False),))
    batch = GroupBatch.from_groups([small_group(1), group])
    assert batch.step_labels is not None
    assert batch.step_labels.tolist() == [NO_STEP] * 6 + [NO_STEP, 1, NO_STEP, 0]


@given(st.lists(st.integers(0, 3), min_size=1, max_size=6))
def test_all_pairs_are_those_of_a_double_loop(ranks: list[int]) -> None:
    expected = {(a, b) for a, b in itertools.product(range(len(ranks)), repeat=2) if ranks[a] < ranks[b]}
    pairs = select_pairs(ranks)
    assert set(pairs) == expected
    assert len(pairs) == len(expected)


@given(st.lists(st.integers(0, 3), min_size=1, max_size=6))
def test_selections_are_part_of_all_pairs_and_best_worst_is_the_widest(ranks: list[int]) -> None:
    everything = set(select_pairs(ranks))
    assert set(select_pairs(ranks, "adjacent")) <= everything
    widest = select_pairs(ranks, "best_worst")
    assert len(widest) == (1 if everything else 0)
    assert all((ranks[a], ranks[b]) == (min(ranks), max(ranks)) for a, b in widest)


def test_pairs_of_a_group_share_its_weight() -> None:
    plain = replace(small_group(1), ranks=(0, 1))
    ranked = replace(small_group(0, (1,), (2,), (3,), (4,)), ranks=(2, 0, 1), weight=3.0)
    pairs = GroupBatch.from_groups([plain, ranked]).pairs()
    assert list(zip(pairs.chosen.tolist(), pairs.rejected.tolist(), strict=True)) == [(0, 1), (3, 4), (3, 2), (4, 2)]
    assert pairs.group.tolist() == [0, 1, 1, 1]
    torch.testing.assert_close(pairs.weights, torch.ones(4))


@pytest.mark.parametrize("ranks", [None, (0, 0)])
def test_a_group_without_order_is_named_with_the_loss_to_choose(ranks: tuple[int, int] | None) -> None:
    groups = [replace(small_group(4), ranks=(0, 1)), replace(small_group(7), ranks=ranks)]
    with pytest.raises(ValueError, match="Row 7 has no ordered pair.*choose an unpaired loss such as 'kto'"):
        GroupBatch.from_groups(groups).pairs()


def test_mismatched_gives_each_prompt_the_responses_of_the_group_before() -> None:
    batch = GroupBatch.from_groups([small_group(0, (1,), (2, 3)), small_group(1, (4,), (5,)), small_group(2, (6,), (7,))])
    found = [(group.prompt.tolist(), group.responses[0].tolist()) for group in batch.mismatched().groups()]
    assert found == [([1], [7]), ([4], [2, 3]), ([6], [5])]


def test_neighbours_with_the_same_prompt_count_for_nothing_when_mismatched() -> None:
    batch = GroupBatch.from_groups([small_group(0, (1,), (2,)), small_group(1, (1,), (5,)), small_group(2, (6,), (7,))])
    assert batch.mismatched().weights.tolist() == [1.0, 0.0, 1.0]


def test_pair_weights_keep_their_precision_under_another_default_dtype() -> None:
    batch = GroupBatch.from_groups([replace(small_group(0, (1,), (2,), (3,), (4,)), ranks=(0, 1, 2))])
    torch.set_default_dtype(torch.bfloat16)
    try:
        weights = batch.pairs().weights
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(weights, torch.full((3,), 1.0 / 3.0, dtype=torch.float32))


def test_mismatched_needs_two_groups() -> None:
    with pytest.raises(ValueError, match="at least two groups.*raise the batch size or token budget"):
        GroupBatch.from_groups([small_group()]).mismatched()


def test_to_moves_every_tensor_and_keeps_the_rest() -> None:
    batch = GroupBatch.from_groups([replace(small_group(), scores=(1.0, 2.0))], window=WindowCounts(1.0, 2.0, 4.0)).to("meta")
    assert batch.input_ids.device.type == "meta"
    assert batch.scores is not None
    assert batch.scores.device.type == "meta"
    assert batch.window == WindowCounts(1.0, 2.0, 4.0)


@pytest.mark.parametrize("plugin", [HalfPrecision("bf16-true"), DoublePrecision()])
def test_precision_plugins_leave_a_batch_as_it_is(plugin: HalfPrecision | DoublePrecision) -> None:
    group = replace(small_group(), weight=1.0 / 3.0, scores=(0.1, 0.2))
    batch = GroupBatch.from_groups([group])
    converted = plugin.convert_input(batch)
    assert converted.weights.dtype == torch.float32
    assert torch.equal(converted.weights, batch.weights)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompt": np.array([], dtype=np.int64)}, "Row 3: the prompt is empty; give at least a BOS token"),
        ({"responses": ()}, r"Row 3: every response needs at least one token, got lengths \[\]"),
        ({"responses": (np.array([1]), np.array([], dtype=np.int64))}, r"got lengths \[1, 0\]"),
        ({"ranks": (0,)}, "`ranks` has 1 entries for 2 responses"),
        ({"scores": (0.0, 1.0, 2.0)}, "`scores` has 3 entries for 2 responses"),
        ({"step_ends": ((0,),)}, "`step_ends` has 1 entries for 2 responses"),
    ],
)
def test_an_impossible_group_names_its_row(change: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(small_group(3), **change)


def test_an_empty_batch_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one group"):
        GroupBatch.from_groups([])
