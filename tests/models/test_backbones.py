from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import (
    BertConfig,
    FalconConfig,
    FalconForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    T5Config,
)

from lightning_pref.models.adapters import LoraSettings, add_lora
from lightning_pref.models.backbones import (
    check_vocabulary,
    disable_dropout,
    enable_gradient_checkpointing,
    evaluating,
    load_model,
    load_tokenizer,
)

IDS = torch.tensor([[1, 5, 9, 3, 7, 2]])


def gpt2_with_dropout() -> GPT2LMHeadModel:
    rates = {"attn_pdrop": 0.5, "embd_pdrop": 0.5, "resid_pdrop": 0.5}
    return GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=16, n_layer=2, n_head=2, n_positions=32, **rates))


def test_a_saved_folder_loads_with_the_same_logits(tmp_path: Path, tiny_model: Callable[..., LlamaForCausalLM]) -> None:
    model = tiny_model()
    model.save_pretrained(tmp_path)
    assert torch.equal(load_model(str(tmp_path))(IDS).logits, model(IDS).logits)


def test_a_loaded_model_is_in_training_mode(tmp_path: Path, tiny_model: Callable[..., LlamaForCausalLM]) -> None:
    tiny_model().save_pretrained(tmp_path)
    assert all(module.training for module in load_model(str(tmp_path)).modules())
    assert load_model("playground:tiny").training


def test_weights_are_float32_unless_asked_otherwise(tmp_path: Path, tiny_model: Callable[..., LlamaForCausalLM]) -> None:
    tiny_model().to(torch.bfloat16).save_pretrained(tmp_path)
    assert load_model(str(tmp_path)).dtype == torch.float32
    assert load_model(str(tmp_path), dtype="auto").dtype == torch.bfloat16
    assert load_model("playground:tiny", dtype="float16").dtype == torch.float16


def test_the_attention_implementation_is_passed_on(tmp_path: Path, tiny_model: Callable[..., LlamaForCausalLM]) -> None:
    tiny_model().save_pretrained(tmp_path)
    for name in (str(tmp_path), "playground:tiny"):
        assert load_model(name, attn_implementation="eager").config._attn_implementation == "eager"
        assert load_model(name, attn_implementation="sdpa").config._attn_implementation == "sdpa"


def test_a_preset_depends_on_its_seed_alone() -> None:
    first, again, other = (load_model("playground:tiny", seed=seed).lm_head.weight for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_an_unknown_preset_lists_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"'playground:huge'.*playground:tiny, playground:small"):
        load_model("playground:huge")


def test_a_folder_without_config_says_what_it_holds(tmp_path: Path) -> None:
    (tmp_path / "last.ckpt").touch()
    with pytest.raises(FileNotFoundError, match=r"holds last\.ckpt; expected 'config\.json'.*'export'"):
        load_model(str(tmp_path))
    (tmp_path / "last.ckpt").unlink()
    with pytest.raises(FileNotFoundError, match="holds nothing; expected 'tokenizer.json' or"):
        load_tokenizer(str(tmp_path))


def test_a_missing_folder_is_not_mistaken_for_a_hub_id(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"There is no folder .*save_pretrained"):
        load_model(str(tmp_path / "nowhere"))


def test_a_file_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    file.touch()
    with pytest.raises(NotADirectoryError, match="give the folder"):
        load_model(str(file))


def test_an_adapter_folder_says_how_to_merge_it(tmp_path: Path, tiny_model: Callable[..., LlamaForCausalLM]) -> None:
    add_lora(tiny_model(), LoraSettings(r=2)).save_pretrained(str(tmp_path), save_embedding_layers=False)
    with pytest.raises(ValueError, match="PEFT adapter without its base model.*merge_and_unload"):
        load_model(str(tmp_path))


@pytest.mark.parametrize(
    ("config", "finding"),
    [
        (T5Config(architectures=["T5ForConditionalGeneration"]), "an encoder-decoder, saved as T5ForConditionalGeneration"),
        (BertConfig(architectures=["BertForMaskedLM"]), "a 'bert' model, saved as BertForMaskedLM"),
        (LlamaConfig(architectures=["LlamaForSequenceClassification"]), "saved as LlamaForSequenceClassification"),
    ],
)
def test_other_kinds_of_models_are_refused(tmp_path: Path, config: LlamaConfig, finding: str) -> None:
    config.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=rf"is {'.*' if 'Llama' in finding else ''}{finding}; that is no causal language model"):
        load_model(str(tmp_path))


def test_missing_weights_are_not_replaced_by_random_ones(tmp_path: Path) -> None:
    config = LlamaConfig(vocab_size=64, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    LlamaForSequenceClassification(config).save_pretrained(tmp_path)
    config.architectures = None
    config.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"lacks 1 weights of a LlamaForCausalLM, among them 'lm_head\.weight'"):
        load_model(str(tmp_path))


def test_custom_code_is_refused_unless_trusted(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "own", "auto_map": {"AutoConfig": "own.Config"}}')
    with pytest.raises(ValueError, match="Python code of its own.*trust_remote_code: true"):
        load_model(str(tmp_path))


def test_an_unreachable_hub_says_how_to_work_offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for load in (load_model, load_tokenizer):
        with pytest.raises(OSError, match=r"'nobody/no-such-model' is not a folder here.*hf download nobody/no-such-model"):
            load("nobody/no-such-model")


def test_a_folder_that_transformers_cannot_read_is_named(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match=f"Could not load '{tmp_path}': .*valid JSON"):
        load_model(str(tmp_path))


def test_a_tokenizer_gains_no_token(tmp_path: Path) -> None:
    tokenizer = load_tokenizer("playground:tiny")
    tokenizer.pad_token = None
    tokenizer.save_pretrained(tmp_path)
    loaded = load_tokenizer(str(tmp_path))
    assert loaded.pad_token is None
    assert len(loaded) == len(tokenizer)


def test_a_tokenizer_of_another_model_is_refused(tiny_model: Callable[..., LlamaForCausalLM]) -> None:
    tokenizer = load_tokenizer("playground:tiny")
    check_vocabulary(load_model("playground:tiny"), tokenizer)
    with pytest.raises(ValueError, match="only 64 embedding rows.*never resized"):
        check_vocabulary(tiny_model(), tokenizer)


def falcon_with_dropout() -> FalconForCausalLM:
    """Falcon reads its rates from the config in every forward."""
    sizes = {"vocab_size": 64, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    return FalconForCausalLM(FalconConfig(**sizes, attention_dropout=0.5, hidden_dropout=0.5))


def llama_with_dropout() -> LlamaForCausalLM:
    sizes = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(**sizes, attention_dropout=0.5))


@pytest.mark.parametrize("build", [gpt2_with_dropout, falcon_with_dropout, llama_with_dropout])
def test_disable_dropout_reaches_modules_attributes_and_config(build: Callable[[], nn.Module]) -> None:
    model = build().train()
    assert not torch.equal(model(IDS).logits, model(IDS).logits)
    disable_dropout(model)
    assert torch.equal(model(IDS).logits, model(IDS).logits)
    trained = model(IDS).logits
    assert torch.equal(trained, model.eval()(IDS).logits)


def test_disable_dropout_keeps_the_rate_that_lora_was_given() -> None:
    model = add_lora(gpt2_with_dropout(), LoraSettings(r=2, dropout=0.5))
    disable_dropout(model)
    rates = {name.split(".")[-2]: module.p for name, module in model.named_modules() if isinstance(module, nn.Dropout)}
    assert rates.pop("lora_dropout") == 0.5
    assert set(rates.values()) == {0.0}


def test_O5_gradient_checkpointing_reaches_lora_weights(tiny_model: Callable[..., LlamaForCausalLM]) -> None:
    def gradients(checkpointing: bool) -> dict[str, torch.Tensor | None]:
        torch.manual_seed(0)
        model = add_lora(tiny_model(), LoraSettings(r=2)).train()
        calls = []
        model.get_base_model().model.layers[0].input_layernorm.register_forward_hook(lambda *_: calls.append(1))
        if checkpointing:
            enable_gradient_checkpointing(model)
        model(IDS, use_cache=False).logits.logsumexp(-1).sum().backward()
        assert len(calls) == (2 if checkpointing else 1)
        return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.requires_grad}

    plain, recomputed = gradients(False), gradients(True)
    assert plain
    assert all(grad is not None and torch.equal(grad, plain[name]) for name, grad in recomputed.items())


def test_gradient_checkpointing_of_a_model_without_it_is_refused(tiny_model: Callable[..., LlamaForCausalLM]) -> None:
    model = tiny_model()
    model.supports_gradient_checkpointing = False
    with pytest.raises(ValueError, match="LlamaForCausalLM does not support gradient checkpointing"):
        enable_gradient_checkpointing(model)


def test_evaluating_restores_the_mode_of_every_module_after_an_error() -> None:
    model = gpt2_with_dropout().train()
    model.transformer.h[1].eval()
    before = [module.training for module in model.modules()]

    def fail_inside() -> None:
        with evaluating(model):
            assert not any(module.training for module in model.modules())
            assert not torch.is_grad_enabled()
            raise RuntimeError("inside")

    with pytest.raises(RuntimeError, match="inside"):
        fail_inside()
    assert [module.training for module in model.modules()] == before
    assert torch.is_grad_enabled()
