"""Ensembles in training: adapters or heads, each on rows of its own drawing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from reward_modules import STEADY, configured, labelled, loader, mean_loss, measured, stepwise, trainer
from transformers import LlamaForCausalLM

from lightning_pref.data.groups import GroupBatch, PromptGroup
from lightning_pref.losses.ensemble import bootstrap_weights
from lightning_pref.losses.reward import bradley_terry
from lightning_pref.models.adapters import LoraSettings
from lightning_pref.models.backbones import load_tokenizer
from lightning_pref.models.reward_members import active_member, member_names
from lightning_pref.models.reward_models import response_scores
from lightning_pref.modules.reward import RewardModule

TinyModel = Callable[..., LlamaForCausalLM]
RandomGroups = Callable[..., list[PromptGroup]]
ADAPTERS: dict[str, Any] = {"ensemble": "adapters", "num_members": 3, "lora": LoraSettings(r=2)}


def test_members_of_adapters_are_trained_apart_and_their_disagreement_is_logged(
    tiny_model: TinyModel, random_groups: RandomGroups, tmp_path: Path
) -> None:
    groups = random_groups(16)
    module = RewardModule(tiny_model(vocab_size=576), optimizer=STEADY, bootstrap=True, **ADAPTERS)
    trainer(tmp_path, max_epochs=2).fit(module, loader(groups, tmp_path / "rows"))
    model = module.reward_model
    assert isinstance(model, PeftModel)
    # Every B began at 0.
    moved = {name: parameter for name, parameter in model.named_parameters() if "lora_B" in name}
    assert {name.split(".member_")[1][0] for name in moved} == {"0", "1", "2"}
    assert all(parameter.abs().max() > 0 for parameter in moved.values())
    found = measured(module, groups)
    batch = GroupBatch.from_groups(groups)
    with torch.no_grad():
        members = []
        for name in member_names(model):
            with active_member(model, name):
                members.append(response_scores(model, batch).members[0])
    scores = torch.stack(members)
    assert found["rewards/mean"] == pytest.approx(scores.mean().item(), abs=1e-5)
    assert found["rewards/uncertainty"] == pytest.approx(scores.std(0).mean().item(), rel=1e-4)
    module.save_pretrained(tmp_path / "export", load_tokenizer("playground:tiny"))
    assert len(list((tmp_path / "export").glob("member_*/config.json"))) == 3


@pytest.mark.parametrize("options", [{"num_members": 3}, ADAPTERS], ids=["heads", "adapters"])
def test_a_bootstrapped_loss_counts_each_row_as_often_as_the_member_drew_it(
    tiny_model: TinyModel, random_groups: RandomGroups, options: dict[str, Any]
) -> None:
    groups = random_groups(6)
    module = configured(tiny_model(), bootstrap=True, head_seed=5, **options)
    batch = GroupBatch.from_groups(groups)
    with torch.no_grad():
        members = module.scores(batch).members
        pairs = batch.pairs()
        losses = torch.stack([bradley_terry(own[pairs.chosen], own[pairs.rejected]) for own in members])
        counts = bootstrap_weights(batch.row_ids, 3, seed=5)
        assert len(counts.unique()) > 2
        expected = (losses * counts[:, pairs.group]).mean(0)
        expected = (expected * pairs.weights).sum() / pairs.weights.sum()
        assert mean_loss(module, groups).item() == pytest.approx(expected.item(), rel=1e-5)
        module.train(False)
        plain = (losses.mean(0) * pairs.weights).sum() / pairs.weights.sum()
        assert mean_loss(module, groups).item() == pytest.approx(plain.item(), rel=1e-5), "validation counts every row once"


KINDS: dict[str, tuple[dict[str, Any], Callable[[list[PromptGroup]], list[PromptGroup]]]] = {
    "plackett_luce": ({"loss": "plackett_luce"}, list),
    "regression": ({"loss": "regression"}, lambda groups: [replace(g, scores=(1.0, 0.0)) for g in groups]),
    "ordinal": ({"loss": "ordinal", "levels": [0.0, 1.0]}, lambda groups: [replace(g, scores=(1.0, 0.0)) for g in groups]),
    "outcome_bce": ({"loss": "outcome_bce"}, labelled),
    "step_bce": ({"loss": "step_bce"}, stepwise),
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_loss_is_bootstrapped_by_rows(tiny_model: TinyModel, random_groups: RandomGroups, kind: str) -> None:
    """One member: the loss of each row alone, times its count, adds up to that of all."""
    options, change = KINDS[kind]
    groups = change(random_groups(6))
    drawn, plain = (configured(tiny_model(), bootstrap=given, **options) for given in (True, False))
    counts = bootstrap_weights(torch.tensor([group.row_id for group in groups]), 1)[0]
    assert 0.0 in counts
    alone = []
    for group in groups:
        terms = plain.terms(GroupBatch.from_groups([group]))
        alone.append((terms.losses * terms.weights).sum())
    terms = drawn.terms(GroupBatch.from_groups(groups))
    torch.testing.assert_close((terms.losses * terms.weights).sum(), (torch.stack(alone) * counts).sum())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ensemble": "adapters", "num_members": 2}, "`ensemble: adapters` trains LoRA adapters, but `lora` is not set"),
        ({"ensemble": "adapters", "lora": LoraSettings(r=2)}, "but `num_members` is None. Set it to two or more"),
        ({**ADAPTERS, "gradient_checkpointing": True}, "`gradient_checkpointing` computes activations again in the backward"),
        ({"ensemble": "towers"}, "Unknown ensemble 'towers' of a reward model; known: heads, adapters"),
        ({"bootstrap": True, "head": "implicit"}, "`bootstrap` acts with the head 'linear' only"),
    ],
)
def test_what_cannot_be_meant_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RewardModule("playground:tiny", **options)
