"""Experience cut into micro-batches: everything once per pass, aligned, and divided by the counts of the whole update."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lightning_pref.data.groups import PromptGroup
from lightning_pref.rollouts.experience import Experience, ExperienceBatch, TokenRecord, UpdatePlan, micro_batches


def experience(sizes: list[list[int]], *, fillers: int = 0, temperature: float = 1.0) -> Experience:
    """Every token knows the group, response and place it comes from, in its id and in its advantage."""
    groups = []
    tokens = []
    for g, lengths in enumerate(sizes):
        responses = []
        for r, length in enumerate(lengths):
            ids = 10_000 * (g + 1) + 100 * (r + 1) + np.arange(length)
            responses.append(ids)
            tokens.append(ids)
        weight = 0.0 if g >= len(sizes) - fillers else 1.0
        groups.append(PromptGroup(row_id=g, prompt=np.array([g + 1, 7]), responses=tuple(responses), weight=weight))
    flat = torch.tensor(np.concatenate(tokens), dtype=torch.float64)
    weights = torch.tensor([group.weight for group in groups for _ in group.responses])
    record = TokenRecord(sampled_logps=-flat, advantages=2 * flat)
    return Experience(groups=groups, tokens=record, weights=weights, temperature=temperature)


def cut(found: Experience, plan: UpdatePlan, *, seed: int = 0, ranks: int = 1) -> list[ExperienceBatch]:
    return list(micro_batches(found, plan, seed=seed, total=lambda values: values * ranks))


SIZES = st.lists(st.lists(st.integers(1, 4), min_size=2, max_size=4), min_size=1, max_size=7)
PLANS = st.builds(UpdatePlan, inner_epochs=st.integers(1, 2), num_minibatches=st.integers(1, 3), accumulate=st.integers(1, 2))


@settings(max_examples=60, deadline=None)
@given(sizes=SIZES, plan=PLANS, seed=st.integers(0, 5))
def test_P5_every_pass_has_every_token_once_with_what_is_known_of_it(sizes: list[list[int]], plan: UpdatePlan, seed: int) -> None:
    found = experience(sizes)
    if sum(map(len, sizes)) < plan.num_parts:
        return
    batches = cut(found, plan, seed=seed)
    assert len(batches) == plan.num_batches
    everything = Counter(int(i) for group in found.groups for response in group.responses for i in response)
    for epoch in range(plan.inner_epochs):
        own = batches[epoch * plan.num_parts : (epoch + 1) * plan.num_parts]
        seen: Counter[int] = Counter()
        for batch in own:
            ids = batch.groups.input_ids[batch.groups.response >= 0]
            assert torch.equal(batch.tokens.sampled_logps, -ids.double())
            assert batch.tokens.advantages is not None
            assert torch.equal(batch.tokens.advantages, 2 * ids.double())
            assert batch.tokens.old_logps is None
            assert len(batch.weights) == batch.groups.num_responses
            seen.update(ids.tolist())
        assert seen == everything


@settings(max_examples=40, deadline=None)
@given(sizes=SIZES, plan=PLANS)
def test_N1_the_divisors_of_an_update_are_the_sums_of_its_micro_batches(sizes: list[list[int]], plan: UpdatePlan) -> None:
    found = experience(sizes, fillers=1)
    if sum(map(len, sizes)) < plan.num_parts:
        return
    batches = cut(found, plan, ranks=3)
    for start in range(0, len(batches), plan.accumulate):
        update = batches[start : start + plan.accumulate]
        assert len({batch.window for batch in update}) == 1
        window = update[0].window
        assert window is not None
        responses = 3 * sum(float(batch.weights.sum()) for batch in update)
        tokens = 3 * sum(float((batch.weights * batch.groups.response_lengths).sum()) for batch in update)
        assert window.responses == (responses or 1.0)
        assert window.response_tokens == (tokens or 1.0)


def test_prompts_stay_whole_while_there_are_enough_of_them() -> None:
    found = experience([[2, 3, 1]] * 5)
    for batch in cut(found, UpdatePlan(num_minibatches=2, accumulate=2)):
        assert set(batch.groups.group_sizes) == {3}


def test_P7_a_prompt_that_is_cut_keeps_the_advantages_of_the_whole() -> None:
    found = experience([[2, 3, 1, 2]])
    batches = cut(found, UpdatePlan(num_minibatches=4))
    assert [batch.groups.num_responses for batch in batches] == [1, 1, 1, 1]
    advantages = torch.cat([batch.tokens.advantages for batch in batches if batch.tokens.advantages is not None])
    assert found.tokens.advantages is not None
    assert advantages.tolist() == found.tokens.advantages.tolist()
    assert sum(batch.window.groups for batch in batches if batch.window is not None) == 1.0


def test_every_pass_and_seed_has_an_order_of_its_own() -> None:
    found = experience([[2, 3]] * 12)
    orders = [
        [
            row
            for batch in cut(found, UpdatePlan(inner_epochs=2, num_minibatches=3), seed=seed)
            for row in batch.groups.row_ids.tolist()
        ]
        for seed in (0, 1, 0)
    ]
    assert orders[0] == orders[2] != orders[1]
    assert orders[0][:12] != orders[0][12:]


def test_the_sum_over_ranks_is_taken_once_and_before_the_first_batch() -> None:
    calls: list[Tensor] = []

    def total(values: Tensor) -> Tensor:
        calls.append(values)
        return values

    plan = UpdatePlan(inner_epochs=2, num_minibatches=2)
    batches = micro_batches(experience([[1, 2]] * 4), plan, seed=0, total=total)
    next(batches)
    assert [values.shape for values in calls] == [(4, 3)]
    list(batches)
    assert len(calls) == 1


def test_a_batch_is_one_thing_to_precision_plugins_and_moves_whole() -> None:
    (batch,) = cut(experience([[1, 2]], temperature=0.7), UpdatePlan())
    assert not hasattr(batch, "__dataclass_fields__")
    moved = batch.to("meta")
    assert moved.groups.input_ids.device.type == moved.weights.device.type == "meta"
    assert moved.tokens.sampled_logps.device.type == "meta"
    assert moved.tokens.advantages is not None
    assert moved.tokens.advantages.device.type == "meta"
    assert moved.tokens.values is None
    assert moved.temperature == 0.7
    assert (batch.num_tokens, batch.num_groups) == (5, 1)


@pytest.mark.parametrize(("prompts", "parts", "sizes"), [(7, 3, [2, 2, 3]), (4, 4, [1, 1, 1, 1])])
def test_parts_are_as_even_as_can_be(prompts: int, parts: int, sizes: list[int]) -> None:
    batches = cut(experience([[1, 1]] * prompts), UpdatePlan(num_minibatches=parts))
    assert sorted(batch.num_groups for batch in batches) == sizes
    assert all(abs(a - b) <= 1 for a, b in pairwise(sorted(sizes)))
