from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from peft import LoraConfig, PeftModel
from transformers import GPT2Config, GPT2LMHeadModel, LlamaForCausalLM

from lightning_pref.models.adapters import (
    LoraSettings,
    adapter_is_fresh,
    adapters_off,
    add_lora,
    count_parameters,
    plain_state,
)

IDS = torch.tensor([[1, 5, 9, 3, 7, 2]])
Build = Callable[..., LlamaForCausalLM]


def randomized(model: PeftModel) -> PeftModel:
    """The adapter as after some training: nothing in it is zero."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter), alpha=0.2)
    return model


def test_a_fresh_adapter_changes_no_logit_and_is_all_that_trains(tiny_model: Build) -> None:
    plain = tiny_model()
    model = add_lora(tiny_model(), LoraSettings(r=2))
    assert torch.equal(model(IDS).logits, plain(IDS).logits)
    assert {name.split(".")[-3] for name, parameter in model.named_parameters() if parameter.requires_grad} == {
        "lora_A",
        "lora_B",
    }


def test_every_lora_setting_has_its_effect(tiny_model: Build) -> None:
    def layer(**changes: object) -> torch.nn.Module:
        settings = LoraSettings(**{"r": 4, "alpha": 8, **changes})
        return add_lora(tiny_model(), settings).get_base_model().model.layers[0].self_attn.q_proj

    assert layer().lora_A["default"].weight.shape[0] == 4
    assert layer().scaling["default"] == 2.0
    assert layer(alpha=4).scaling["default"] == 1.0
    assert layer(rslora=True).scaling["default"] == 4.0
    assert layer(dropout=0.25).lora_dropout["default"].p == 0.25
    assert not hasattr(layer(target_modules=["v_proj"]), "lora_A")
    saved = add_lora(tiny_model(), LoraSettings(modules_to_save=["lm_head"]))
    assert "base_model.model.lm_head.modules_to_save.default.weight" in saved.state_dict()


def test_impossible_lora_settings_are_refused(tiny_model: Build) -> None:
    with pytest.raises(ValueError, match="`r` of LoRA must be at least 1, got 0"):
        LoraSettings(r=0)
    with pytest.raises(ValueError, match=r"`dropout` of LoRA must be in \[0, 1\), got 1.0"):
        LoraSettings(dropout=1.0)
    with pytest.raises(ValueError, match=r"`target_modules` names 'c_attn'.*LlamaForCausalLM.*q_proj"):
        add_lora(tiny_model(), LoraSettings(target_modules=["q_proj", "c_attn"]))
    with pytest.raises(ValueError, match="`modules_to_save` names 'head'"):
        add_lora(tiny_model(), LoraSettings(modules_to_save=["head"]))
    with pytest.raises(ValueError, match="has an adapter already"):
        add_lora(add_lora(tiny_model(), LoraSettings()), LoraSettings())


def test_lora_finds_the_linear_layers_of_gpt2() -> None:
    model = add_lora(GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=16, n_layer=1, n_head=2)), LoraSettings(r=2))
    assert any("c_attn.lora_A" in name for name, _ in model.named_parameters())


def test_parameters_are_counted_once_and_reported_in_one_line() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(3, 3, bias=False), torch.nn.Linear(3, 3, bias=False))
    model[1].requires_grad_(False)
    assert str(count_parameters(model)) == "9 of 18 parameters are trained (50.00%)"
    model[1].weight = model[0].weight
    assert count_parameters(model) == (9, 9)


def test_an_adapter_is_fresh_until_it_changes_an_output(tiny_model: Build) -> None:
    model = add_lora(tiny_model(), LoraSettings(r=2, modules_to_save=["lm_head"]))
    assert adapter_is_fresh(model)
    saved = copy.deepcopy(model)
    with torch.no_grad():
        saved.get_base_model().lm_head.modules_to_save["default"].weight[0, 0] += 1
        model.get_base_model().model.layers[1].self_attn.q_proj.lora_B["default"].weight[0, 0] = 1
    assert not adapter_is_fresh(saved)
    assert not adapter_is_fresh(model)


@pytest.mark.parametrize("modules_to_save", [None, ["lm_head"], ["embed_tokens"]])
def test_R6_the_base_is_exact_inside_and_all_is_restored_after_an_error(
    tiny_model: Build, modules_to_save: list[str] | None
) -> None:
    plain = tiny_model()
    model = randomized(add_lora(tiny_model(), LoraSettings(r=2, modules_to_save=modules_to_save)))
    frozen = next(parameter for name, parameter in model.named_parameters() if "lora_A" in name)
    frozen.requires_grad_(False)  # peft would switch it on when the adapter comes back
    flags = [parameter.requires_grad for parameter in model.parameters()]
    before = model(IDS).logits
    assert not torch.allclose(before, plain(IDS).logits)

    def fail_inside() -> None:
        with adapters_off(model):
            assert torch.equal(model(IDS).logits, plain(IDS).logits)
            raise RuntimeError("inside")

    with pytest.raises(RuntimeError, match="inside"):
        fail_inside()

    assert torch.equal(model(IDS).logits, before)
    assert model.active_adapters == ["default"]
    assert [parameter.requires_grad for parameter in model.parameters()] == flags


def test_the_plain_state_without_the_adapter_is_that_of_the_base(tiny_model: Build) -> None:
    plain = tiny_model().state_dict()
    model = randomized(add_lora(tiny_model(), LoraSettings(r=2, modules_to_save=["lm_head"])))
    state = plain_state(model, merged=False)
    assert state.keys() == plain.keys()
    assert all(torch.equal(state[name], plain[name]) for name in plain)


def test_the_merged_state_is_peft_s_own_merge_and_leaves_the_model_alone(tiny_model: Build) -> None:
    model = randomized(add_lora(tiny_model(), LoraSettings(r=2, rslora=True, modules_to_save=["lm_head"])))
    before = copy.deepcopy(model.state_dict())
    state = plain_state(model, merged=True)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    expected = copy.deepcopy(model).merge_and_unload().state_dict()
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[name], expected[name]) for name in expected)


def test_two_active_adapters_are_refused(tiny_model: Build) -> None:
    model = add_lora(tiny_model(), LoraSettings(r=2))
    model.add_adapter("second", LoraConfig(r=2, target_modules=["q_proj"]))
    model.base_model.set_adapter(["default", "second"])
    with pytest.raises(ValueError, match=r"one active adapter, found \['default', 'second'\]"):
        plain_state(model, merged=True)


@pytest.mark.filterwarnings("ignore:.*tie_word_embeddings")  # peft 0.18 says it of any head that is saved
def test_a_second_inactive_adapter_stays_out_of_the_merge(tiny_model: Build) -> None:
    model = add_lora(tiny_model(), LoraSettings(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"]))
    model.add_adapter("second", LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"]))
    expected = copy.deepcopy(randomized(model)).merge_and_unload().state_dict()
    state = plain_state(model, merged=True)
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[name], expected[name]) for name in expected)
