"""Ensembles of adapters: each member as it would be alone, gradients included, and folders that load plainly."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from exported_rewards import TOKENIZER, assert_scores_alike, texts
from peft import PeftModel
from rollouts import answers_of
from transformers import LlamaForCausalLM

from lightning_pref.data.groups import GroupBatch, PromptGroup
from lightning_pref.data.templates import Tokenization
from lightning_pref.models.adapters import LoraSettings
from lightning_pref.models.reward_exports import export_reward_model
from lightning_pref.models.reward_members import active_member, add_members, member_folders, member_names, member_scores
from lightning_pref.models.reward_models import ScoreScale, build_reward_model, response_scores
from lightning_pref.rollouts.rewards import judged, load_reward

TinyModel = Callable[..., LlamaForCausalLM]


def ensemble(model: LlamaForCausalLM, members: int = 3, *, head_seed: int = 0) -> PeftModel:
    """Members with adapters that do something."""
    torch.manual_seed(4)
    adapted = add_members(build_reward_model(model), LoraSettings(r=2), members, head_seed=head_seed)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.3)
    return adapted.eval()


def batch() -> GroupBatch:
    return GroupBatch.from_groups(texts(count=4))


def test_members_differ_in_adapter_and_head_and_share_the_frozen_backbone(tiny_model: TinyModel) -> None:
    adapted = ensemble(tiny_model(vocab_size=576))
    assert member_names(adapted) == ["member_0", "member_1", "member_2"]
    trained = {name for name, parameter in adapted.named_parameters() if parameter.requires_grad}
    assert trained
    assert all(("lora_" in name or "score" in name) and ".member_" in name for name in trained)
    heads = [parameter for name, parameter in adapted.named_parameters() if "score.modules_to_save" in name]
    assert len(heads) == 3
    assert len({tuple(head.flatten().tolist()) for head in heads}) == 3
    again = ensemble(tiny_model(vocab_size=576), head_seed=1)
    others = [parameter for name, parameter in again.named_parameters() if "score.modules_to_save" in name]
    assert not any(torch.equal(head, other) for head, other in zip(heads, others, strict=True))


def test_members_scores_are_those_of_each_alone(tiny_model: TinyModel) -> None:
    adapted = ensemble(tiny_model(vocab_size=576))
    found = member_scores(adapted, batch(), want=("tokens",))
    assert found.members.shape == (3, 4)
    for k, name in enumerate(member_names(adapted)):
        with active_member(adapted, name):
            alone = response_scores(adapted, batch(), want=("tokens",))
        torch.testing.assert_close(found.members[k], alone.members[0])
        assert found.token_members is not None and alone.token_members is not None
        torch.testing.assert_close(found.token_members[k], alone.token_members[0])
    assert (found.uncertainty > 0.01).all()


def test_every_member_gets_the_gradient_it_would_get_alone(tiny_model: TinyModel) -> None:
    adapted = ensemble(tiny_model(vocab_size=576))
    members = member_scores(adapted, batch()).members
    members.square().sum().backward()  # type: ignore[no-untyped-call]
    together = {name: parameter.grad.clone() for name, parameter in adapted.named_parameters() if parameter.grad is not None}
    trained = {name for name, parameter in adapted.named_parameters() if parameter.requires_grad}
    assert set(together) == trained
    for name in member_names(adapted):
        adapted.zero_grad()
        with active_member(adapted, name):
            response_scores(adapted, batch()).members.square().sum().backward()  # type: ignore[no-untyped-call]
        alone = {key: parameter.grad for key, parameter in adapted.named_parameters() if parameter.grad is not None}
        assert alone
        assert all(f".{name}." in key for key in alone)
        for key, gradient in alone.items():
            torch.testing.assert_close(together[key], gradient)


def test_each_member_is_exported_to_a_plain_folder_and_all_of_them_are_one_reward(tiny_model: TinyModel, tmp_path: Path) -> None:
    adapted = ensemble(tiny_model(vocab_size=576, max_position_embeddings=128))
    scale = ScoreScale(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([1.0, 1.0, 2.0]))
    scale.remember(adapted.get_base_model().config)
    flags = {name: parameter.requires_grad for name, parameter in adapted.named_parameters()}
    for _ in range(2):  # an earlier export is replaced
        export_reward_model(adapted, TOKENIZER, tmp_path / "export")
    assert flags == {name: parameter.requires_grad for name, parameter in adapted.named_parameters()}
    assert sorted(path.name for path in (tmp_path / "export").iterdir()) == ["member_0", "member_1", "member_2"]
    for k, name in enumerate(member_names(adapted)):
        with active_member(adapted, name):
            assert_scores_alike(adapted, tmp_path / "export" / name, texts())
        kept = ScoreScale.recall(build_reward_model(str(tmp_path / "export" / name)).config)
        assert kept is not None
        assert kept.mean.item() == scale.mean[k].item()
    export_reward_model(adapted, TOKENIZER, tmp_path / "second", member=1)
    with active_member(adapted, "member_1"):
        assert_scores_alike(adapted, tmp_path / "second", texts())

    reward = load_reward(str(tmp_path / "export"), Tokenization(TOKENIZER), how="wco")
    answers = answers_of([["Gladly, Anna.", "No."], ["A table is set.", "At 7 pm."]])
    groups = GroupBatch.from_groups(answers.groups)
    with torch.no_grad():
        raw = member_scores(adapted, groups).members
    # Standardised by what each knows of its scale, then in their mean unit.
    expected = (raw - scale.mean[:, None]) / scale.std[:, None] * scale.std.mean() + scale.mean.mean()
    found = judged(reward, answers)
    torch.testing.assert_close(found.rewards, expected.amin(0), atol=1e-5, rtol=1e-5)
    assert found.uncertainty is not None
    torch.testing.assert_close(found.uncertainty, expected.std(0), atol=1e-5, rtol=1e-5)


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing")  # asked by peft itself
def test_adapters_alone_are_written_for_peft(tiny_model: TinyModel, tmp_path: Path) -> None:
    adapted = ensemble(tiny_model(vocab_size=576))
    for _ in range(2):
        export_reward_model(adapted, TOKENIZER, tmp_path / "adapters", merge_adapter=False)
    base = build_reward_model(tiny_model(vocab_size=576)).eval()
    loaded = PeftModel.from_pretrained(base, str(tmp_path / "adapters" / "member_2")).eval()
    with torch.no_grad(), active_member(adapted, "member_2"):
        torch.testing.assert_close(response_scores(loaded, batch()).members, response_scores(adapted, batch()).members)


def test_a_folder_of_members_is_told_from_other_folders(tmp_path: Path) -> None:
    for k in (10, 2, 0):
        (tmp_path / "many" / f"member_{k}").mkdir(parents=True)
        (tmp_path / "many" / f"member_{k}" / "config.json").write_text("{}")
    assert [Path(name).name for name in member_folders(str(tmp_path / "many"))] == ["member_0", "member_2", "member_10"]
    (tmp_path / "many" / "config.json").write_text("{}")
    assert member_folders(str(tmp_path / "many")) == [str(tmp_path / "many")]
    assert member_folders("someone/reward-model") == ["someone/reward-model"]


def test_what_cannot_be_written_is_refused(tiny_model: TinyModel, tmp_path: Path) -> None:
    adapted = ensemble(tiny_model(vocab_size=576), 2)
    with pytest.raises(ValueError, match="The mean of adapters is no single model"):
        export_reward_model(adapted, TOKENIZER, tmp_path / "x", member="mean")
    with pytest.raises(ValueError, match="`member` must be below the number of members, 2, got 2"):
        export_reward_model(adapted, TOKENIZER, tmp_path / "x", member=2)
    with pytest.raises(ValueError, match="Adapters alone are written together; `member=1` needs `merge_adapter=True`"):
        export_reward_model(adapted, TOKENIZER, tmp_path / "x", member=1, merge_adapter=False)
    with pytest.raises(ValueError, match="needs two members or more, got 1; a single one is plain LoRA"):
        add_members(build_reward_model(tiny_model(vocab_size=576)), LoraSettings(r=2), 1, head_seed=0)


def test_a_group_of_several_responses_is_scored_by_all_members(tiny_model: TinyModel) -> None:
    group = PromptGroup(row_id=0, prompt=np.array([7, 8]), responses=(np.array([9, 10]), np.array([11])))
    found = member_scores(ensemble(tiny_model(vocab_size=576), 2), GroupBatch.from_groups([group]))
    assert found.members.shape == (2, 2)
