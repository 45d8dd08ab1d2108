"""Reward models are built from language models and from saved reward models; what cannot be one is refused."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from reward_modules import scores_of
from transformers import GPT2Config, GPT2LMHeadModel, LlamaForCausalLM, LlamaForSequenceClassification

from lightning_pref.data.groups import GroupBatch, PromptGroup
from lightning_pref.models.reward_heads import RewardHead
from lightning_pref.models.reward_models import build_reward_model, response_scores

TinyModel = Callable[..., LlamaForCausalLM]
RandomGroups = Callable[..., list[PromptGroup]]


def test_a_language_model_keeps_its_backbone_and_gets_a_head_outside_of_it(tiny_model: TinyModel) -> None:
    causal_lm = tiny_model()
    backbone, config = causal_lm.model, copy.deepcopy(causal_lm.config)
    model = build_reward_model(causal_lm, num_members=2)
    assert isinstance(model, LlamaForSequenceClassification)
    assert model.model is backbone
    assert model.config.num_labels == 2
    assert causal_lm.config.to_dict() == config.to_dict()
    assert model.training


def test_a_saved_reward_model_keeps_its_head_and_number_of_members(tiny_model: TinyModel, tmp_path: Any) -> None:
    first = build_reward_model(tiny_model(), num_members=3, head_seed=9)
    first.save_pretrained(tmp_path / "model")
    second = build_reward_model(str(tmp_path / "model"))
    assert isinstance(second.score, RewardHead)
    assert torch.equal(second.score.weight, first.score.weight)
    with pytest.raises(ValueError, match="has 3 heads, but `num_members` is 2. Leave `num_members` out"):
        build_reward_model(str(tmp_path / "model"), num_members=2)


def test_a_saved_language_model_gets_the_head_of_its_seed(tiny_model: TinyModel, tmp_path: Any) -> None:
    tiny_model().save_pretrained(tmp_path / "model")
    built = [build_reward_model(str(tmp_path / "model"), head_seed=seed).score.weight for seed in (0, 0, 1)]
    assert torch.equal(built[0], built[1])
    assert not torch.equal(built[0], built[2])


def test_the_preset_is_a_reward_model_too() -> None:
    model = build_reward_model("playground:tiny")
    assert isinstance(model, LlamaForSequenceClassification)
    assert not any(parameter.is_meta for parameter in model.parameters())


def test_gpt2_scores_as_transformers_does(random_groups: RandomGroups) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        causal_lm = GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=16, n_layer=2, n_head=2, n_positions=64))
    model, groups = build_reward_model(causal_lm).eval(), random_groups(3)
    found = response_scores(model, GroupBatch.from_groups(groups)).members
    torch.testing.assert_close(found.double(), torch.tensor(scores_of(model, groups)).flatten(1).double(), atol=1e-5, rtol=1e-5)


def test_what_cannot_be_a_reward_model_is_refused(tiny_model: TinyModel, random_groups: RandomGroups, tmp_path: Any) -> None:
    batch = GroupBatch.from_groups(random_groups())
    with pytest.raises(ValueError, match="`num_members` must be at least 1, got 0"):
        build_reward_model(tiny_model(), num_members=0)
    with pytest.raises(ValueError, match="LlamaForCausalLM has no reward head called `score`. Build a reward model"):
        response_scores(tiny_model(), batch)
    with pytest.raises(ValueError, match="Unknown quantity 'logits' in `want`; known: tokens, hidden"):
        response_scores(build_reward_model(tiny_model()), batch, want={"logits"})  # type: ignore[arg-type]


def test_a_classifier_with_another_head_is_refused(tmp_path: Any) -> None:
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(
        vocab_size=64, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, num_labels=1
    )
    BertForSequenceClassification(config).save_pretrained(tmp_path / "bert")
    with pytest.raises(ValueError, match="that cannot be trained here: its head is not a linear `score`"):
        build_reward_model(str(tmp_path / "bert"))


def test_a_classifier_without_its_weights_is_refused(tiny_model: TinyModel, tmp_path: Any) -> None:
    config = copy.deepcopy(tiny_model().config)
    config.architectures = ["LlamaForSequenceClassification"]
    tiny_model().model.save_pretrained(tmp_path / "model")
    config.save_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match="cannot be trained here: it lacks 'score.weight'"):
        build_reward_model(str(tmp_path / "model"))


def test_a_classifier_that_does_more_than_its_head_is_found_out(tiny_model: TinyModel, random_groups: RandomGroups) -> None:
    class Doubled(LlamaForSequenceClassification):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            out = super().forward(*args, **kwargs)
            out.logits = 2 * out.logits
            return out

    plain = build_reward_model(tiny_model())
    model = Doubled(plain.config)
    model.score = RewardHead.around(model.score.weight, None)
    with pytest.raises(ValueError, match="The scores of Doubled are not those of its head at the last token"):
        response_scores(model, GroupBatch.from_groups(random_groups()))


def test_a_model_without_a_classifier_in_transformers_is_refused() -> None:
    from transformers import MambaConfig, MambaForCausalLM

    model = MambaForCausalLM(MambaConfig(vocab_size=8, hidden_size=8, num_hidden_layers=1, state_size=2))
    with pytest.raises(ValueError, match="transformers has no sequence classifier for MambaForCausalLM"):
        build_reward_model(model)
