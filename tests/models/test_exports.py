from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel, LlamaForCausalLM, PreTrainedModel

from lightning_pref.data.groups import GroupBatch, PromptGroup
from lightning_pref.models.adapters import LoraSettings, add_lora
from lightning_pref.models.backbones import load_tokenizer
from lightning_pref.models.exports import export
from lightning_pref.models.folders import replaced_folder
from lightning_pref.models.forward import response_logps

Groups = Callable[..., list[PromptGroup]]
Build = Callable[..., LlamaForCausalLM]
TOKENIZER = load_tokenizer("playground:tiny")


def gpt2() -> GPT2LMHeadModel:
    return GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=16, n_layer=2, n_head=2, n_positions=64))


def logps(model: PreTrainedModel | PeftModel, groups: list[PromptGroup]) -> torch.Tensor:
    with torch.no_grad():
        return response_logps(model.eval(), GroupBatch.from_groups(groups), layout="padded").logps


def randomized(model: PeftModel) -> PeftModel:
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter), alpha=0.2)
    return model


@pytest.mark.parametrize("tied", [False, True])
def test_an_exported_model_loads_with_bit_equal_log_probs(
    tmp_path: Path, tiny_model: Build, random_groups: Groups, tied: bool
) -> None:
    model = tiny_model(tie_word_embeddings=tied)
    export(model, TOKENIZER, tmp_path / "export")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "export")
    assert torch.equal(logps(loaded, random_groups()), logps(model, random_groups()))
    assert loaded.config.tie_word_embeddings is tied
    assert (tmp_path / "export" / "model.safetensors").exists()


@pytest.mark.parametrize(
    "settings",
    [
        LoraSettings(r=2),
        LoraSettings(r=2, rslora=True, modules_to_save=["lm_head"]),
        LoraSettings(r=2, target_modules=["q_proj", "lm_head"]),
        LoraSettings(r=2, modules_to_save=["embed_tokens"]),
    ],
)
@pytest.mark.parametrize("tied", [False, True])
def test_a_merged_adapter_gives_the_same_log_probs_in_plain_transformers(
    tmp_path: Path, tiny_model: Build, random_groups: Groups, settings: LoraSettings, tied: bool
) -> None:
    model = randomized(add_lora(tiny_model(tie_word_embeddings=tied), settings))
    export(model, TOKENIZER, tmp_path / "export")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "export")
    torch.testing.assert_close(logps(loaded, random_groups()), logps(model, random_groups()), atol=1e-5, rtol=1e-5)
    assert not any("lora" in name for name in loaded.state_dict())


def test_the_transposed_weights_of_gpt2_merge(tmp_path: Path, random_groups: Groups) -> None:
    model = randomized(add_lora(gpt2(), LoraSettings(r=2)))
    export(model, TOKENIZER, tmp_path / "export")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "export")
    torch.testing.assert_close(logps(loaded, random_groups()), logps(model, random_groups()), atol=1e-5, rtol=1e-5)


# What peft says of its own accord, 0.21 about transformers 5.23 and 0.18 about any head that is saved.
@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing", "ignore:.*tie_word_embeddings")
def test_an_adapter_alone_loads_onto_its_base(tmp_path: Path, tiny_model: Build, random_groups: Groups) -> None:
    model = randomized(add_lora(tiny_model(), LoraSettings(r=2, modules_to_save=["lm_head"])))
    export(model, TOKENIZER, tmp_path / "adapter", merge_adapter=False)
    assert not (tmp_path / "adapter" / "model.safetensors").exists()
    loaded = PeftModel.from_pretrained(tiny_model(), str(tmp_path / "adapter"))
    assert torch.equal(logps(loaded, random_groups()), logps(model, random_groups()))


def test_an_adapter_alone_needs_an_adapter(tmp_path: Path, tiny_model: Build) -> None:
    with pytest.raises(ValueError, match="`merge_adapter=False` writes an adapter alone, but the model has none"):
        export(tiny_model(), TOKENIZER, tmp_path / "export", merge_adapter=False)


def test_the_tokenizer_with_its_template_and_the_generation_config_come_along(tmp_path: Path, tiny_model: Build) -> None:
    model = tiny_model()
    model.generation_config.max_new_tokens = 17
    export(model, TOKENIZER, tmp_path / "export")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "export")
    messages = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Good day."}]
    assert tokenizer.apply_chat_template(messages) == TOKENIZER.apply_chat_template(messages)
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "export").generation_config.max_new_tokens == 17


def test_a_contradictory_generation_config_does_not_lose_the_export(tmp_path: Path, tiny_model: Build) -> None:
    model = tiny_model()
    model.generation_config.temperature = 0.6
    with pytest.warns(UserWarning, match="exported one has `do_sample: true`"):
        export(model, TOKENIZER, tmp_path / "export")
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "export").generation_config.do_sample is True
    assert not model.generation_config.do_sample


def test_export_leaves_the_model_and_its_config_alone(tmp_path: Path, tiny_model: Build) -> None:
    model = tiny_model().train()
    config, pointers = model.config.to_dict(), [parameter.data_ptr() for parameter in model.parameters()]
    export(model, TOKENIZER, tmp_path / "export")
    assert model.config.to_dict() == config
    assert [parameter.data_ptr() for parameter in model.parameters()] == pointers
    assert model.training


def test_a_second_export_replaces_the_first(tmp_path: Path, tiny_model: Build, random_groups: Groups) -> None:
    for seed in (0, 1):
        export(tiny_model(seed), TOKENIZER, tmp_path / "export")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "export")
    assert torch.equal(logps(loaded, random_groups()), logps(tiny_model(1), random_groups()))
    assert [entry.name for entry in tmp_path.iterdir()] == ["export"]


def test_a_folder_with_something_else_is_not_overwritten(tmp_path: Path, tiny_model: Build) -> None:
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(FileExistsError, match=r"holds something else \(no 'config.json' in it\)"):
        export(tiny_model(), TOKENIZER, tmp_path)
    assert (tmp_path / "thesis.tex").exists()


def test_a_failed_write_keeps_what_was_there(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    with replaced_folder(folder, replaces="config.json") as partial:
        (partial / "config.json").write_text("first")

    def fail_halfway() -> None:
        with replaced_folder(folder, replaces="config.json") as partial:
            (partial / "config.json").write_text("second")
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        fail_halfway()
    assert (folder / "config.json").read_text() == "first"
    assert [entry.name for entry in tmp_path.iterdir()] == ["model"]


@pytest.mark.slow
def test_the_exported_folder_needs_none_of_our_code(tmp_path: Path, tiny_model: Build) -> None:
    model = tiny_model().eval()
    export(model, TOKENIZER, tmp_path / "export")
    code = (
        "import sys, torch; from transformers import AutoModelForCausalLM; "
        "model = AutoModelForCausalLM.from_pretrained(sys.argv[1]); "
        "assert 'lightning_pref' not in sys.modules; "
        "print(model(torch.tensor([[1, 5, 9]])).logits.double().sum().item())"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "export")]
    printed = subprocess.run(command, capture_output=True, text=True, check=True, env=dict(os.environ), cwd=tmp_path).stdout
    assert float(printed) == model(torch.tensor([[1, 5, 9]])).logits.double().sum().item()
