from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from exported_rewards import EOS, PAD, TOKENIZER, assert_scores_alike, plain_scores, texts
from peft import PeftModel
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    Gemma2Config,
    Gemma2ForCausalLM,
    LlamaForCausalLM,
    PhiConfig,
    PhiForCausalLM,
    PreTrainedTokenizerBase,
)

from lightning_pref.data.groups import GroupBatch, PromptGroup
from lightning_pref.models.adapters import LoraSettings, add_lora
from lightning_pref.models.backbones import load_tokenizer
from lightning_pref.models.reward_exports import export_reward_model
from lightning_pref.models.reward_heads import VerbalizerRewardHead
from lightning_pref.models.reward_models import build_reward_model, response_scores

TinyModel = Callable[..., LlamaForCausalLM]


@pytest.mark.parametrize("num_members", [1, 3])
def test_W5_an_export_scores_alike_in_plain_transformers_in_a_batch_and_alone(
    tiny_model: TinyModel, tmp_path: Path, num_members: int
) -> None:
    model = build_reward_model(tiny_model(vocab_size=576), num_members=num_members)
    export_reward_model(model, TOKENIZER, tmp_path / "export")
    assert_scores_alike(model, tmp_path / "export", texts())
    assert AutoModelForSequenceClassification.from_pretrained(tmp_path / "export").config.num_labels == num_members


def test_L8_an_export_scores_alike_padded_on_the_left_and_on_the_right(tiny_model: TinyModel, tmp_path: Path) -> None:
    export_reward_model(build_reward_model(tiny_model(vocab_size=576)), TOKENIZER, tmp_path / "export")
    left, right = (plain_scores(tmp_path / "export", texts(count=9), side=side) for side in ("left", "right"))
    torch.testing.assert_close(left, right, atol=2e-5, rtol=1e-5)
    assert right.std() > 0.1, "there was something to compare"


def without_padding(tokenizer: PreTrainedTokenizerBase, pad: str | None) -> PreTrainedTokenizerBase:
    tokenizer.pad_token = pad
    return tokenizer


@pytest.mark.parametrize("pad", ["<|eos|>", None], ids=["pad-is-eos", "no-pad"])
@pytest.mark.parametrize("spare_rows", [0, 8])
def test_W1_an_export_never_pads_with_what_ends_a_response(
    tiny_model: TinyModel, tmp_path: Path, pad: str | None, spare_rows: int
) -> None:
    tokenizer = without_padding(load_tokenizer("playground:tiny"), pad)
    model = build_reward_model(tiny_model(vocab_size=576 + spare_rows))
    model.config.pad_token_id = model.config.eos_token_id = EOS
    export_reward_model(model, tokenizer, tmp_path / "export")
    loaded = AutoTokenizer.from_pretrained(tmp_path / "export")
    assert loaded.pad_token_id != EOS
    assert_scores_alike(model, tmp_path / "export", texts())
    assert tokenizer.pad_token == pad, "the tokenizer in use is left alone"
    assert model.config.pad_token_id == EOS


def test_W1_a_padding_token_that_was_seen_to_end_responses_is_replaced(tiny_model: TinyModel, tmp_path: Path) -> None:
    model = build_reward_model(tiny_model(vocab_size=576))
    final_ids = torch.zeros(576, dtype=torch.bool)
    final_ids[PAD] = True
    groups = [PromptGroup(row_id=0, prompt=np.array([8, 9]), responses=(np.array([10, PAD]),)), *texts()]
    # Without what is known of the ends, transformers scores the token before.
    export_reward_model(model, TOKENIZER, tmp_path / "naive")
    export_reward_model(model, TOKENIZER, tmp_path / "export", final_ids=final_ids)
    assert_scores_alike(model, tmp_path / "export", groups)
    with torch.no_grad():
        ours = response_scores(model, GroupBatch.from_groups(groups)).members
    assert not torch.allclose(plain_scores(tmp_path / "naive", groups, side="right")[:, 0], ours[:, 0], atol=1e-3)


@pytest.mark.parametrize("num_members", [1, 2])
def test_W5_a_merged_adapter_scores_alike(tiny_model: TinyModel, tmp_path: Path, num_members: int) -> None:
    model = build_reward_model(tiny_model(vocab_size=576), num_members=num_members)
    adapted = moved(add_lora(model, LoraSettings(r=2), task="SEQ_CLS"))
    export_reward_model(adapted, TOKENIZER, tmp_path / "export")
    # Merging adds B A to the weights, which rounds once more.
    assert_scores_alike(adapted, tmp_path / "export", texts(), atol=2e-4)
    assert not (tmp_path / "export" / "adapter_config.json").exists()


# What peft says of its own accord, 0.21 about transformers 5.23.
@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing", "ignore:.*tie_word_embeddings")
def test_an_adapter_alone_holds_the_head(tiny_model: TinyModel, tmp_path: Path) -> None:
    adapted = moved(add_lora(build_reward_model(tiny_model(vocab_size=576)), LoraSettings(r=2), task="SEQ_CLS"))
    export_reward_model(adapted, TOKENIZER, tmp_path / "adapter", merge_adapter=False)
    base = build_reward_model(tiny_model(vocab_size=576), head_seed=7)
    loaded = PeftModel.from_pretrained(base, str(tmp_path / "adapter")).eval()
    batch = GroupBatch.from_groups(texts())
    with torch.no_grad():
        expected = response_scores(adapted.eval(), batch).members
        torch.testing.assert_close(response_scores(loaded, batch).members, expected, atol=1e-5, rtol=1e-5)


def moved(model: PeftModel) -> PeftModel:
    """Every trained parameter is somewhere else than at its start."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.2)
    return model


def test_one_member_or_the_mean_of_all_can_be_exported_alone(tiny_model: TinyModel, tmp_path: Path) -> None:
    model, groups = build_reward_model(tiny_model(vocab_size=576), num_members=3).eval(), texts()
    with torch.no_grad():
        members = response_scores(model, GroupBatch.from_groups(groups)).members
    for member, expected in (("mean", members.mean(0)), (1, members[1])):
        export_reward_model(model, TOKENIZER, tmp_path / str(member), member=member)  # type: ignore[arg-type]
        found = plain_scores(tmp_path / str(member), groups, side="right")
        assert found.shape == (1, len(groups))
        torch.testing.assert_close(found[0], expected, atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match="`member` must be below the number of heads, 3, got 3"):
        export_reward_model(model, TOKENIZER, tmp_path / "export", member=3)
    with pytest.raises(ValueError, match="`member='mean'` needs `merge_adapter=True`"):
        export_reward_model(model, TOKENIZER, tmp_path / "export", member="mean", merge_adapter=False)


@pytest.mark.parametrize("tied", [False, True])
def test_W5_a_verbalizer_is_exported_as_a_linear_head(tiny_model: TinyModel, tmp_path: Path, tied: bool) -> None:
    model = tiny_model(vocab_size=576, tie_word_embeddings=tied)
    head = VerbalizerRewardHead(positive=300, negative=301)
    export_reward_model(model, TOKENIZER, tmp_path / "export", verbalizer=head)
    assert_scores_alike(model, tmp_path / "export", texts(), head=head)


def test_a_verbalizer_that_is_no_linear_score_is_not_exported_as_one(tmp_path: Path) -> None:
    sizes = {"vocab_size": 576, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    head = VerbalizerRewardHead(positive=300, negative=301)
    capped = Gemma2ForCausalLM(Gemma2Config(**sizes, num_key_value_heads=1, head_dim=8))
    with pytest.raises(ValueError, match="The logits of Gemma2ForCausalLM are soft-capped"):
        export_reward_model(capped, TOKENIZER, tmp_path / "export", verbalizer=head)
    biased = PhiForCausalLM(PhiConfig(**sizes))
    torch.nn.init.normal_(biased.lm_head.bias)
    with pytest.raises(ValueError, match="The head of PhiForCausalLM has a bias"):
        export_reward_model(biased, TOKENIZER, tmp_path / "export", verbalizer=head)


def test_a_half_precision_backbone_is_exported_with_its_full_precision_head(tiny_model: TinyModel, tmp_path: Path) -> None:
    from safetensors import safe_open

    model = build_reward_model(tiny_model(vocab_size=576)).to(torch.bfloat16)
    export_reward_model(model, TOKENIZER, tmp_path / "export")
    with safe_open(tmp_path / "export" / "model.safetensors", framework="pt") as file:
        assert torch.equal(file.get_tensor("score.weight"), model.score.weight)
        assert file.get_tensor("model.embed_tokens.weight").dtype == torch.bfloat16


def test_an_export_leaves_the_model_alone(tiny_model: TinyModel, tmp_path: Path) -> None:
    model = build_reward_model(tiny_model(vocab_size=576), num_members=2)
    config, weights = model.config.to_dict(), {name: value.clone() for name, value in model.state_dict().items()}
    export_reward_model(model, TOKENIZER, tmp_path / "export", member="mean")
    assert model.config.to_dict() == config
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    assert model.training
