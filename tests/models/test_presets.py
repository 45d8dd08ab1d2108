from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from lightning_pref.data.playground_tokenizer import playground_tokenizer
from lightning_pref.models.presets import PRESETS, build_preset, is_preset

TOKENIZER = playground_tokenizer()


@pytest.mark.parametrize(("name", "fewest", "most"), [("tiny", 0.4e6, 0.6e6), ("small", 8e6, 12e6)])
def test_a_preset_has_about_the_promised_parameters(name: str, fewest: float, most: float) -> None:
    assert fewest <= build_preset(name, TOKENIZER).num_parameters() <= most


def test_weights_depend_on_the_seed_alone_and_leave_the_generator_as_it_was() -> None:
    torch.manual_seed(5)
    first = build_preset("playground:tiny", TOKENIZER, seed=1)
    drawn = torch.rand(3)
    again = build_preset("tiny", TOKENIZER, seed=1)
    other = build_preset("tiny", TOKENIZER, seed=2)
    torch.manual_seed(5)
    assert torch.equal(drawn, torch.rand(3))
    assert all(torch.equal(a, b) for a, b in zip(first.state_dict().values(), again.state_dict().values(), strict=True))
    assert not torch.equal(first.lm_head.weight, other.lm_head.weight)


def test_weights_do_not_depend_on_the_default_dtype() -> None:
    """Which the precision 'bf16-true' sets while models are built."""
    first = build_preset("tiny", TOKENIZER)
    torch.set_default_dtype(torch.bfloat16)
    try:
        again = build_preset("tiny", TOKENIZER)
        assert torch.get_default_dtype() == torch.bfloat16
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(torch.equal(a, b) for a, b in zip(first.state_dict().values(), again.state_dict().values(), strict=True))


def test_a_preset_knows_the_special_tokens_of_its_tokenizer() -> None:
    config = build_preset("tiny", TOKENIZER).config
    assert (config.pad_token_id, config.bos_token_id) == (TOKENIZER.pad_token_id, TOKENIZER.bos_token_id)
    assert config.eos_token_id == TOKENIZER.eos_token_id
    assert config.vocab_size == len(TOKENIZER)


def test_a_new_preset_is_about_as_uncertain_as_a_uniform_guess() -> None:
    model = build_preset("tiny", TOKENIZER)
    ids = torch.tensor([TOKENIZER("Gladly, Anna. A table for four is set at 7 pm.")["input_ids"]])
    with torch.no_grad():
        loss = model(input_ids=ids, labels=ids).loss
    assert loss.item() == pytest.approx(torch.tensor(float(len(TOKENIZER))).log().item(), abs=1.0)


def test_a_saved_preset_loads_with_plain_transformers_and_says_the_same(tmp_path: Path) -> None:
    model = build_preset("tiny", TOKENIZER).train(False)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).train(False)
    ids = torch.arange(20)[None]
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids).logits, loaded(input_ids=ids).logits)


def test_names_of_presets_carry_their_prefix() -> None:
    assert all(is_preset(f"playground:{name}") for name in PRESETS)
    assert not is_preset("tiny") and not is_preset("./tiny")


def test_an_unknown_preset_lists_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"Unknown model preset 'playground:huge'; known: playground:tiny, playground:small"):
        build_preset("playground:huge", TOKENIZER)
