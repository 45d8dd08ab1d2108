"""Scores of a batch are those of each sequence alone, read at its last token."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2ForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedModel,
)

from lightning_pref.models.reward_scores import load_reward_model, sequence_scores

VOCABULARY = 48
EOS = 2


def llama(num_labels: int = 1, pad: int | None = EOS) -> LlamaForSequenceClassification:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_labels=num_labels, pad_token_id=pad, initializer_range=0.3,
    )  # fmt: skip
    return LlamaForSequenceClassification(config).eval()


def gpt2() -> GPT2ForSequenceClassification:
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=VOCABULARY, n_embd=16, n_layer=2, n_head=2, n_positions=32, num_labels=1, initializer_range=0.3
    )
    return GPT2ForSequenceClassification(config).eval()


def bert() -> BertForSequenceClassification:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=VOCABULARY, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24, num_labels=1,
        initializer_range=0.3,
    )  # fmt: skip
    return BertForSequenceClassification(config).eval()


def sequences(num: int = 9) -> list[list[int]]:
    """Ragged, each ended by EOS."""
    generator = torch.Generator().manual_seed(1)
    sizes = torch.randint(1, 12, (num,), generator=generator).tolist()
    return [[*torch.randint(3, VOCABULARY, (size,), generator=generator).tolist(), EOS] for size in sizes]


@torch.no_grad()
def alone(model: PreTrainedModel, ids: list[int]) -> float:
    """transformers' own score of one sequence without padding."""
    pad, model.config.pad_token_id = model.config.pad_token_id, None
    score = model(torch.tensor([ids])).logits.item()
    model.config.pad_token_id = pad
    return score


@pytest.mark.parametrize("build", [llama, gpt2, bert])
@pytest.mark.parametrize("batch_size", [1, 4, 64])
def test_a_batch_scores_what_each_sequence_scores_alone(build: type, batch_size: int) -> None:
    model = build()
    given = sequences()
    expected = [alone(model, ids) for ids in given]
    assert sequence_scores(model, given, batch_size=batch_size).tolist() == pytest.approx(expected, abs=1e-5)


def test_W1_a_padding_token_that_is_also_eos_does_not_move_the_place_that_is_read() -> None:
    given = [[7, 9, 4, EOS], [5, EOS, EOS], [EOS]]
    model = llama(pad=None)
    without = sequence_scores(model, given)
    for pad in (EOS, 7):
        model.config.pad_token_id = pad
        assert torch.equal(sequence_scores(model, given), without)


def test_the_head_runs_in_float32_under_half_precision_weights() -> None:
    model = llama().to(torch.bfloat16)
    scores = sequence_scores(model, sequences(40))
    assert scores.dtype == torch.float32
    # Scores of a bfloat16 head come in steps of 2^-8 of their size.
    assert (scores.bfloat16().float() != scores).float().mean() > 0.9


def test_the_mode_of_the_model_is_left_as_it_was() -> None:
    model = llama().train()
    sequence_scores(model, sequences(2))
    assert model.training


def test_a_saved_reward_model_loads_with_the_same_scores(tmp_path: Path) -> None:
    model = llama()
    model.save_pretrained(tmp_path)
    loaded = load_reward_model(str(tmp_path))
    assert not loaded.training
    assert torch.equal(sequence_scores(loaded, sequences()), sequence_scores(model, sequences()))


def test_a_classifier_of_several_classes_is_refused(tmp_path: Path) -> None:
    llama(num_labels=3).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"tells 3 classes apart; a reward model gives one number \(num_labels=1\)"):
        load_reward_model(str(tmp_path))


def test_a_language_model_is_refused_since_its_head_would_be_random(tmp_path: Path) -> None:
    LlamaForCausalLM(llama().config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"lacks 'score.weight', without which its scores would be random"):
        load_reward_model(str(tmp_path))


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="There is no folder"):
        load_reward_model(str(tmp_path / "nowhere" / "model"))
