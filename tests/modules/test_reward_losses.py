from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from reward_modules import configured, labelled, mean_loss, measured, scores_of, sigmoid, softplus, stepwise
from transformers import LlamaForCausalLM

from lightning_pref.data.groups import GroupBatch, PromptGroup
from lightning_pref.models.adapters import LoraSettings
from lightning_pref.models.reference import AdapterOff, FrozenCopy
from lightning_pref.modules import DPOModule
from lightning_pref.modules.reward_terms import OrdinalThresholds

TinyModel = Callable[..., LlamaForCausalLM]
RandomGroups = Callable[..., list[PromptGroup]]


@pytest.mark.parametrize("num_members", [1, 3])
@pytest.mark.parametrize(
    ("options", "margin"),
    [({}, None), ({}, 0.7), ({"margin_scale": 2.0}, 0.7), ({"center": 0.05}, None), ({"label_smoothing": 0.2}, 0.3)],
)
def test_bradley_terry_is_the_mean_over_members_and_pairs(
    tiny_model: TinyModel, random_groups: RandomGroups, num_members: int, options: dict[str, float], margin: float | None
) -> None:
    groups = [replace(group, margin=margin, weight=1.0 + row) for row, group in enumerate(random_groups(3))]
    module = configured(tiny_model(), num_members=num_members, **options)
    asked = (margin or 0.0) * options.get("margin_scale", 1.0)
    center, flipped = options.get("center", 0.0), options.get("label_smoothing", 0.0)
    total = 0.0
    for member in scores_of(module.reward_model, groups):
        for group, (chosen, rejected) in zip(groups, member, strict=True):
            right, wrong = softplus(asked - (chosen - rejected)), softplus(asked - (rejected - chosen))
            loss = (1 - flipped) * right + flipped * wrong + center * (chosen + rejected) ** 2
            total += group.weight * loss
    expected = total / num_members / sum(group.weight for group in groups)
    assert mean_loss(module, groups).item() == pytest.approx(expected, rel=1e-4)


def test_pairs_of_a_ranked_list_share_its_weight(tiny_model: TinyModel, random_groups: RandomGroups) -> None:
    groups = random_groups(2, num_responses=3)
    for how, wanted in (("all", [(0, 1), (0, 2), (1, 2)]), ("best_worst", [(0, 2)]), ("adjacent", [(0, 1), (1, 2)])):
        module = configured(tiny_model(), pairs=how)
        (scores,) = scores_of(module.reward_model, groups)
        expected = np.mean([np.mean([softplus(own[b] - own[a]) for a, b in wanted]) for own in scores])
        assert mean_loss(module, groups).item() == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("top_k", [None, 1, 2])
def test_plackett_luce_is_minus_the_log_probability_of_the_order(
    tiny_model: TinyModel, random_groups: RandomGroups, top_k: int | None
) -> None:
    groups = random_groups(3, num_responses=4)
    module = configured(tiny_model(), loss="plackett_luce", top_k=top_k)
    (scores,) = scores_of(module.reward_model, groups)
    # Oracle: the share of all orders, each by its own probability, that begin with the right places.
    losses = []
    for own in scores:
        places = 4 if top_k is None else top_k
        chances = 0.0
        for order in itertools.permutations(range(4)):
            if order[:places] == tuple(range(places)):
                rest = [math.exp(own[i]) for i in order]
                chances += math.prod(rest[i] / sum(rest[i:]) for i in range(4))
        losses.append(-math.log(chances))
    assert mean_loss(module, groups).item() == pytest.approx(np.mean(losses), rel=1e-4)


def test_regression_is_the_squared_distance_to_the_annotated_scores(tiny_model: TinyModel, random_groups: RandomGroups) -> None:
    groups = [replace(group, scores=(0.5 * row, -1.0)) for row, group in enumerate(random_groups(3))]
    module = configured(tiny_model(), loss="regression")
    (scores,) = scores_of(module.reward_model, groups)
    distances = [
        own - target
        for row, group in zip(scores, groups, strict=True)
        for own, target in zip(row, group.scores or (), strict=True)
    ]
    assert mean_loss(module, groups).item() == pytest.approx(np.mean(np.square(distances)), rel=1e-4)
    assert measured(module, groups)["rewards/errors"] == pytest.approx(np.mean(np.abs(distances)), rel=1e-4)


def test_ordinal_levels_are_told_apart_by_trained_thresholds(tiny_model: TinyModel, random_groups: RandomGroups) -> None:
    groups = [
        replace(group, scores=scores)
        for group, scores in zip(random_groups(3), [(5.0, 1.0), (3.0, 3.0), (2.0, 1.0)], strict=True)
    ]
    module = configured(tiny_model(), loss="ordinal", levels=[1.0, 2.0, 3.0, 5.0])
    assert module.thresholds is not None
    first, second, third = module.thresholds().tolist()
    assert (first, second, third) == pytest.approx((-1.0, 0.0, 1.0))
    bounds = {1.0: (-math.inf, first), 2.0: (first, second), 3.0: (second, third), 5.0: (third, math.inf)}
    (scores,) = scores_of(module.reward_model, groups)
    losses = []
    for row, group in zip(scores, groups, strict=True):
        for own, level in zip(row, group.scores or (), strict=True):
            low, high = bounds[level]
            above = 1.0 if low == -math.inf else sigmoid(own - low)
            beyond = 0.0 if high == math.inf else sigmoid(own - high)
            losses.append(-math.log(above - beyond))
    loss = mean_loss(module, groups)
    assert loss.item() == pytest.approx(np.mean(losses), rel=1e-4)
    loss.backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in module.thresholds.parameters())


def test_two_ordinal_levels_have_one_threshold() -> None:
    assert OrdinalThresholds(2)().tolist() == [0.0]


def test_outcomes_are_told_apart_by_cross_entropy(tiny_model: TinyModel, random_groups: RandomGroups) -> None:
    groups = labelled(random_groups(3))
    module = configured(tiny_model(), loss="outcome_bce")
    (scores,) = scores_of(module.reward_model, groups)
    flat = [
        (own, label)
        for row, group in zip(scores, groups, strict=True)
        for own, label in zip(row, group.labels or (), strict=True)
    ]
    expected = np.mean([softplus(-own) if label else softplus(own) for own, label in flat])
    assert mean_loss(module, groups).item() == pytest.approx(expected, rel=1e-4)
    found = measured(module, groups)
    assert found["rewards/accuracies"] == pytest.approx(np.mean([(own > 0) == label for own, label in flat]))
    assert found["rewards/chosen"] == pytest.approx(np.mean([own for own, label in flat if label]), rel=1e-4)
    assert found["rewards/rejected"] == pytest.approx(np.mean([own for own, label in flat if not label]), rel=1e-4)


def test_W6_steps_share_the_weight_of_their_response(tiny_model: TinyModel, random_groups: RandomGroups) -> None:
    groups = stepwise(random_groups(5))
    assert {len(ends) for group in groups for ends in group.step_ends or ()} == {1, 2}
    module = configured(tiny_model(), loss="step_bce")
    losses = []
    for group in groups:
        own = []
        for end, label in zip((group.step_ends or ())[0], (group.step_labels or ())[0], strict=True):
            prefix = replace(group, responses=(group.responses[0][: end + 1],), step_ends=None, step_labels=None)
            ((score,),) = scores_of(module.reward_model, [prefix])[0]
            own.append(softplus(-score) if label else softplus(score))
        losses.append(np.mean(own))
    assert mean_loss(module, groups).item() == pytest.approx(np.mean(losses), rel=1e-4)


def test_an_implicit_reward_on_pairs_is_dpo(tiny_model: TinyModel, random_groups: RandomGroups, tmp_path: Path) -> None:
    tiny_model(2).save_pretrained(tmp_path / "reference")
    other = {"reference_model": str(tmp_path / "reference")}
    groups = random_groups(3)
    implicit = configured(tiny_model(), head="implicit", beta=0.3, **other)
    dpo = DPOModule(tiny_model(), beta=0.3, **other)  # type: ignore[arg-type]
    dpo.configure_model()
    assert isinstance(implicit.reference, FrozenCopy)
    found, expected = (module.terms(GroupBatch.from_groups(groups)) for module in (implicit, dpo))
    torch.testing.assert_close(found.losses, expected.losses, rtol=1e-5, atol=1e-6)
    found.losses.sum().backward()
    expected.losses.sum().backward()
    grads = [torch.cat([p.grad.flatten() for p in m.trained.parameters() if p.grad is not None]) for m in (implicit, dpo)]
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-6)


def test_the_cross_entropy_of_an_implicit_reward_is_that_of_its_log_ratio(
    tiny_model: TinyModel, random_groups: RandomGroups
) -> None:
    groups = labelled(random_groups(3))
    module = configured(tiny_model(), head="implicit", loss="implicit_prm", beta=0.3)
    assert mean_loss(module, groups).item() == pytest.approx(math.log(2), rel=1e-5)
    with torch.no_grad():
        module.reward_model.lm_head.weight.mul_(1.5)  # type: ignore[union-attr, operator]
    rewards = module.rewards(GroupBatch.from_groups(groups)).tolist()
    labels = [label for group in groups for label in group.labels or ()]
    expected = np.mean([softplus(-r) if label else softplus(r) for r, label in zip(rewards, labels, strict=True)])
    assert mean_loss(module, groups).item() == pytest.approx(expected, rel=1e-4)


def test_an_implicit_reward_under_lora_is_measured_against_its_base(tiny_model: TinyModel) -> None:
    module = configured(tiny_model(), head="implicit", lora=LoraSettings(r=2))
    assert isinstance(module.reference, AdapterOff)
    copied = configured(tiny_model(), head="implicit", lora=LoraSettings(r=2), reference="copy")
    assert isinstance(copied.reference, FrozenCopy)
