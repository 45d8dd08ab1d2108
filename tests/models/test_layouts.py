from typing import get_args

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_pref.data.groups import GroupBatch, PromptGroup
from lightning_pref.models.layouts import (
    PADDING,
    LayoutPlan,
    PlacedLayout,
    TokenCosts,
    choose_layout,
    fold,
    layout_cost,
    layout_rows,
    plan_layout,
)

LAYOUTS: tuple[PlacedLayout, ...] = get_args(PlacedLayout)
Shape = tuple[int, list[int]]  # prompt tokens, tokens of each response


def batch_of(shapes: list[Shape]) -> GroupBatch:
    """Groups of these sizes; every token id is different."""
    total = sum(prompt + sum(responses) for prompt, responses in shapes)
    ids = iter(np.split(np.arange(total), np.cumsum([n for prompt, responses in shapes for n in (prompt, *responses)])))
    return GroupBatch.from_groups(
        [
            PromptGroup(row_id=g, prompt=next(ids), responses=tuple(next(ids) for _ in responses))
            for g, (_, responses) in enumerate(shapes)
        ]
    )


def seen_by(plan: LayoutPlan, batch: GroupBatch, slot: int) -> list[int]:
    """Token ids that a slot may look back on, itself included, read off the plan in plain Python."""
    row, column = divmod(slot, plan.source.shape[1])
    found = []
    for place in range(column + 1):
        same_unit = plan.unit[row, place] == plan.unit[row, column]
        own_branch = plan.branch[row, place] in (-1, plan.branch[row, column])
        if same_unit and own_branch:
            found.append(int(batch.input_ids[plan.source[row, place]]))
    return found


groups = st.lists(st.tuples(st.integers(1, 9), st.lists(st.integers(1, 9), min_size=1, max_size=4)), min_size=1, max_size=5)


@given(groups)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_each_response_token_is_predicted_from_prompt_and_earlier_response(layout: PlacedLayout, shapes: list[Shape]) -> None:
    batch = batch_of(shapes)
    plan = plan_layout(batch, layout)
    contexts, tokens = [], []
    for item in batch.groups():
        for response in item.responses:
            for t, token in enumerate(response):
                contexts.append([*item.prompt.tolist(), *response[:t].tolist()])
                tokens.append(int(token))
    assert batch.input_ids[plan.predicted].tolist() == tokens
    assert (batch.response[plan.predicted] >= 0).all()
    for slot, context in zip(plan.predictor.tolist(), contexts, strict=True):
        assert seen_by(plan, batch, slot) == context
    # The token itself sits where its context ends with it.
    for slot, context, token in zip(plan.place.tolist(), contexts, tokens, strict=True):
        assert seen_by(plan, batch, slot) == [*context, token]


@given(groups)
def test_shared_holds_every_token_once_and_the_others_every_prompt_once_per_response(shapes: list[Shape]) -> None:
    batch = batch_of(shapes)
    copies = {"shared": batch.num_tokens}
    copies["packed"] = copies["padded"] = sum(prompt * len(responses) + sum(responses) for prompt, responses in shapes)
    for layout in LAYOUTS:
        plan = plan_layout(batch, layout)
        used = plan.unit != PADDING
        assert int(used.sum()) == copies[layout]
        assert (plan.branch[~used] == -1).all()
        assert layout_rows(batch, layout) == tuple(plan.source.shape)


def test_padded_rows_are_one_response_each_with_padding_on_the_right() -> None:
    plan = plan_layout(batch_of([(2, [1, 3])]), "padded")
    assert plan.source.tolist() == [[0, 1, 2, 0, 0], [0, 1, 3, 4, 5]]
    assert plan.unit.tolist() == [[0, 0, 0, PADDING, PADDING], [1, 1, 1, 1, 1]]


def test_packed_rows_hold_several_sequences() -> None:
    plan = plan_layout(batch_of([(2, [1, 4]), (1, [1])]), "packed")
    assert plan.source.tolist() == [[0, 1, 3, 4, 5, 6], [0, 1, 2, 7, 8, 0]]
    assert plan.unit.tolist() == [[1, 1, 1, 1, 1, 1], [0, 0, 0, 2, 2, PADDING]]


def test_shared_rows_hold_a_prompt_once() -> None:
    plan = plan_layout(batch_of([(2, [1, 2])]), "shared")
    assert plan.source.tolist() == [[0, 1, 2, 3, 4]]
    assert plan.branch.tolist() == [[-1, -1, 0, 1, 1]]
    assert plan.predictor.tolist() == [1, 1, 3]


@given(st.lists(st.integers(1, 20), min_size=1, max_size=30))
def test_folding_places_every_item_and_overfills_no_bin(sizes: list[int]) -> None:
    capacity = max(sizes)
    bins = fold(sizes, capacity)
    assert sorted(item for members in bins for item in members) == list(range(len(sizes)))
    filled = [sum(sizes[item] for item in members) for members in bins]
    assert max(filled) <= capacity
    # Two bins that would fit into one would have been one.
    assert len(filled) < 2 or min(a + b for i, a in enumerate(filled) for b in filled[i + 1 :]) > capacity


def test_cost_counts_slots_and_scores() -> None:
    rows = layout_rows(batch_of([(2, [1, 3])]), "padded")
    assert layout_cost(rows, TokenCosts(slot=10.0, score=1.0)) == 2 * 5 * 10 + 2 * 25


@pytest.mark.parametrize(
    ("shapes", "expected"),
    [
        ([(64, [8, 8])], "shared"),  # a long prompt: computing it once pays
        ([(1, [30]), (1, [5]), (1, [5]), (1, [5])], "packed"),  # single responses of ragged lengths: no padding pays
        ([(4, [8]), (4, [8])], "padded"),  # nothing to save: the plain call
    ],
)
def test_the_cheapest_layout_is_chosen(shapes: list[Shape], expected: str) -> None:
    assert choose_layout(batch_of(shapes), TokenCosts(slot=1000.0, score=10.0)) == expected


def test_attention_that_outweighs_the_layers_speaks_against_long_shared_rows() -> None:
    """Eight responses after one token of prompt: sharing saves seven tokens and makes a row eight times as long."""
    batch = batch_of([(1, [20] * 8)])
    assert choose_layout(batch, TokenCosts(slot=100.0, score=10.0)) == "padded"
    assert choose_layout(batch, TokenCosts(slot=100.0, score=0.0)) == "shared"


def test_plans_move_to_a_device_as_a_whole() -> None:
    plan = plan_layout(batch_of([(2, [1])]), "packed").to(torch.device("meta"))
    tensors = (plan.source, plan.unit, plan.branch, plan.predictor, plan.predicted, plan.place)
    assert {tensor.device.type for tensor in tensors} == {"meta"}
