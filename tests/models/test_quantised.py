"""A frozen base in 4 bit under LoRA, with the real bitsandbytes."""

from __future__ import annotations

import copy
import shutil
import sys
import warnings
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from peft import PeftModel
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, LlamaForCausalLM

from lightning_pref.data.groups import GroupBatch, PromptGroup
from lightning_pref.data.playground_tokenizer import playground_tokenizer
from lightning_pref.models.adapters import LoraSettings, add_lora, count_parameters
from lightning_pref.models.backbones import load_model
from lightning_pref.models.digests import weights_digest
from lightning_pref.models.forward import response_logps
from lightning_pref.models.implicit_rewards import ImplicitReward
from lightning_pref.models.quantised import (
    QuantizationSettings,
    dense_weight,
    is_quantized,
    made_exact,
    quantize,
    quantized_layers,
)
from lightning_pref.models.reference import AdapterOff, EmaSettings
from lightning_pref.modules import DPOModule, RewardModule, RLHFModule, SFTModule
from lightning_pref.modules.group_module import Loading
from lightning_pref.modules.optimisation import OptimizerSettings

missing = find_spec("bitsandbytes") is None or find_spec("accelerate") is None
pytestmark = pytest.mark.skipif(missing, reason="the extra 'bnb' is not installed")

Build = Callable[..., LlamaForCausalLM]
Groups = Callable[..., list[PromptGroup]]

IDS = torch.tensor([[1, 5, 9, 3, 7, 2]])
NF4 = Loading(quantization=QuantizationSettings(kind="nf4"))
LORA = LoraSettings(r=2)
STEADY = OptimizerSettings(learning_rate=1e-2, schedule="constant", warmup=0)


@pytest.fixture
def small(tiny_model: Build) -> Build:
    """Random models whose layers have whole blocks of 64 inputs."""
    return lambda **changes: tiny_model(**{"hidden_size": 64, "intermediate_size": 192, **changes})


@pytest.fixture
def folder(small: Build, tmp_path: Path) -> str:
    small().save_pretrained(tmp_path / "base")
    return str(tmp_path / "base")


def base_of(model: nn.Module) -> dict[str, Tensor]:
    """Everything that is not trained, scales included."""
    return {name: tensor.clone() for name, tensor in model.state_dict().items() if "lora_" not in name}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def multiplied_out(model: nn.Module, dense: LlamaForCausalLM) -> LlamaForCausalLM:
    """The dense model with the values of the 4-bit weights, looked up in the table by hand."""
    state = dense.state_dict()
    for name, layer in quantized_layers(model):
        kept = layer.weight.quant_state
        nibbles = torch.stack([layer.weight.data.flatten() >> 4, layer.weight.data.flatten() & 15], dim=1).flatten()
        scales = kept.absmax
        if kept.nested:
            scales = kept.state2.code[kept.absmax.int()] * kept.state2.absmax.repeat_interleave(256)[: len(kept.absmax)]
            scales = scales + kept.offset
        values = kept.code[nibbles.int()] * scales.repeat_interleave(kept.blocksize)[: len(nibbles)]
        state[f"{name}.weight"] = values[: kept.shape.numel()].view(kept.shape)
    dense.load_state_dict(state)
    return dense


def move_adapter(model: nn.Module) -> None:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1, generator=torch.Generator().manual_seed(0))


def fit(module: L.LightningModule, batch: GroupBatch, root: Path, updates: int, **options: Any) -> L.Trainer:
    trainer = L.Trainer(
        max_steps=updates,
        accelerator="cpu",
        default_root_dir=root,
        logger=False,
        callbacks=[ModelCheckpoint(dirpath=root / "checkpoints", filename="{step}", every_n_train_steps=1, save_top_k=-1)],
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    loader: DataLoader[Any] = DataLoader([batch] * 2, batch_size=None)  # type: ignore[arg-type]
    trainer.fit(module, loader, weights_only=True, **options)
    return trainer


@pytest.mark.parametrize("double", [True, False])
def test_log_probs_are_those_of_the_dense_model_with_the_same_values(
    small: Build, folder: str, random_groups: Groups, double: bool
) -> None:
    """To the rounding of float32."""
    model = load_model(folder, quantization=QuantizationSettings(double=double))
    dense = multiplied_out(model, small())
    batch = GroupBatch.from_groups(random_groups())
    found, wanted = (response_logps(each, batch).logps for each in (model, dense))
    assert torch.allclose(found, wanted, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(found, response_logps(small(), batch).logps, rtol=1e-3), "4 bits are not 32"


def test_head_and_embedding_stay_dense_and_the_rest_takes_a_seventh(folder: str) -> None:
    model = load_model(folder, quantization=QuantizationSettings())
    assert type(model.lm_head) is nn.Linear
    layers = dict(quantized_layers(model))
    assert {name.rsplit(".", 1)[-1] for name in layers} == {
        "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"
    }  # fmt: skip
    assert count_parameters(model).total == count_parameters(load_model(folder)).total
    packed = sum(layer.weight.numel() for layer in layers.values())
    assert packed * 8 == sum(dense_weight(layer).numel() for layer in layers.values()) * 4


def test_every_quantisation_setting_has_its_effect(folder: str) -> None:
    def layer(**options: Any) -> Any:
        return load_model(folder, quantization=QuantizationSettings(**options)).model.layers[0].mlp.up_proj

    assert (layer().weight.quant_state.quant_type, layer(kind="fp4").weight.quant_state.quant_type) == ("nf4", "fp4")
    assert (layer().weight.quant_state.nested, layer(double=False).weight.quant_state.nested) == (True, False)
    states = torch.randn(3, 64)
    rounded, plain = layer(compute_dtype="bfloat16")(states), layer()(states)
    assert rounded.dtype == plain.dtype == torch.float32
    assert torch.equal(rounded, rounded.bfloat16().float())
    assert not torch.equal(plain, plain.bfloat16().float())


def test_a_preset_and_an_object_are_quantised_like_a_checkpoint(small: Build, folder: str) -> None:
    model = load_model("playground:tiny", quantization=QuantizationSettings())
    assert type(model.lm_head) is nn.Linear
    assert is_quantized(model)
    one = load_model(folder, quantization=QuantizationSettings())
    other = quantize(small(), QuantizationSettings()).train()
    assert same(base_of(one), base_of(other))
    assert torch.equal(one(IDS).logits, other(IDS).logits)


def test_evaluation_neither_changes_the_base_nor_its_numbers(folder: str) -> None:
    """A CPU with AVX512-BF16 would round the scales in the first evaluation."""
    model = load_model(folder, quantization=QuantizationSettings())
    before, logits = base_of(model), model(IDS).logits
    model.eval()
    with torch.no_grad():
        assert torch.equal(model(IDS).logits, logits)
    model.train()
    assert same(base_of(model), before)
    assert torch.equal(model(IDS).logits, logits)


def test_a_base_that_was_packed_by_an_evaluation_is_refused(small: Build) -> None:
    model = quantize(small(), QuantizationSettings())
    layer = model.model.layers[0].self_attn.q_proj
    layer.weight.quant_state.packing_format_for_cpu = True  # as bitsandbytes leaves it
    with pytest.raises(ValueError, match=r"'model.layers.0.self_attn.q_proj' was evaluated on this CPU before.*anew"):
        made_exact(model)


def test_sizes_that_bitsandbytes_reads_wrongly_on_a_cpu_are_refused(small: Build) -> None:
    message = "'model.layers.0.mlp.down_proj' has 96 inputs, no multiple of the 64 weights that share a scale. On a CPU"
    with pytest.raises(ValueError, match=message):
        quantize(small(intermediate_size=96), QuantizationSettings())


def test_a_quantised_base_trains_its_adapter_and_nothing_else(folder: str, random_groups: Groups, tmp_path: Path) -> None:
    module = DPOModule(folder, reference="adapter", lora=LORA, loading=NF4, optimizer=STEADY)
    batch = GroupBatch.from_groups(random_groups())
    module.configure_model()
    before, reference = base_of(module.policy), module.reference_logps(batch)
    trainer = fit(module, batch, tmp_path, 4)
    assert isinstance(module.reference, AdapterOff)
    assert same(base_of(module.policy), before)
    assert torch.equal(module.reference_logps(batch), reference)  # type: ignore[arg-type]
    trained = {id(p) for group in trainer.optimizers[0].param_groups for p in group["params"]}
    assert trained == {id(p) for name, p in module.policy.named_parameters() if "lora_" in name}
    assert not torch.allclose(module.policy_logps(batch).logps, module.reference_logps(batch))  # type: ignore[arg-type]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists")
@pytest.mark.parametrize("name", ["adamw", "adamw_8bit"])
def test_C1_a_resumed_run_goes_on_bit_for_bit_and_its_checkpoint_leaves_the_base_out(
    folder: str, random_groups: Groups, tmp_path: Path, name: Any
) -> None:
    def module() -> DPOModule:
        optimizer = OptimizerSettings(name=name, learning_rate=1e-2, schedule="cosine")
        return DPOModule(folder, lora=LoraSettings(r=2, modules_to_save=["lm_head"]), loading=NF4, optimizer=optimizer)

    batch = GroupBatch.from_groups(random_groups())
    whole = module()
    fit(whole, batch, tmp_path / "whole", 4)
    resumed = module()
    fit(resumed, batch, tmp_path / "whole", 4, ckpt_path=tmp_path / "whole" / "checkpoints" / "step=2.ckpt")
    assert same(whole.policy.state_dict(), resumed.policy.state_dict())
    saved = torch.load(tmp_path / "whole" / "checkpoints" / "step=2.ckpt", weights_only=True)["state_dict"]
    held = {name for name, tensor in saved.items() if tensor.dtype == torch.uint8}
    assert held == {"quantized_base_digest"}
    assert not any("absmax" in name for name in saved)

    other = DPOModule(
        folder,
        lora=LoraSettings(r=2, modules_to_save=["lm_head"]),
        loading=Loading(quantization=QuantizationSettings(double=False)),
    )
    with pytest.raises(ValueError, match=r"trained on the 4-bit base \w{12}, but this run has the 4-bit base \w{12}"):
        fit(other, batch, tmp_path / "whole", 4, ckpt_path=tmp_path / "whole" / "checkpoints" / "step=2.ckpt")


def test_a_checkpoint_of_a_dense_base_is_refused(folder: str) -> None:
    dense, quantised = (SFTModule(folder, lora=LORA, loading=loading) for loading in (Loading(), NF4))
    dense.configure_model()
    quantised.configure_model()
    with pytest.raises(ValueError, match="trained on a base that was not in 4 bit"):
        quantised.load_state_dict(dense.state_dict())


def test_a_frozen_copy_of_a_quantised_policy_is_saved_by_its_digest(folder: str, random_groups: Groups) -> None:
    modules = [DPOModule(folder, reference="copy", lora=LORA, loading=NF4) for _ in range(2)]
    for module in modules:
        module.configure_model()
    batch = GroupBatch.from_groups(random_groups())
    assert torch.allclose(modules[0].reference_logps(batch), modules[0].policy_logps(batch).logps)  # type: ignore[arg-type]
    modules[1].load_state_dict(modules[0].state_dict())
    assert modules[0].digests() == modules[1].digests()


def test_digests_see_a_scale_and_a_code(folder: str) -> None:
    model = load_model(folder, quantization=QuantizationSettings())
    before = weights_digest(model)
    assert weights_digest(load_model(folder, quantization=QuantizationSettings())) == before
    adapted = add_lora(copy.deepcopy(model), LORA)
    assert weights_digest(adapted) == before, "a fresh adapter changes no log-prob"
    state = model.model.layers[1].mlp.down_proj.weight.quant_state
    state.absmax[0] += 1
    changed = weights_digest(model)
    model.model.layers[1].mlp.down_proj.weight.data[0] += 1
    assert len({before, changed, weights_digest(model)}) == 3


@pytest.mark.parametrize("target_modules", ["all-linear", ["q_proj", "down_proj"]])
def test_an_export_is_a_dense_model_with_the_adapter_in_it(folder: str, tmp_path: Path, target_modules: Any) -> None:
    """Also where some of the 4-bit layers have no adapter."""
    module = SFTModule(folder, lora=LoraSettings(r=2, target_modules=target_modules), loading=NF4)
    module.configure_model()
    move_adapter(module.policy)
    wanted = module.policy(IDS).logits
    before = base_of(module.policy)
    module.save_pretrained(tmp_path / "export", playground_tokenizer())
    assert same(base_of(module.policy), before)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "export")
    assert not is_quantized(loaded)
    assert not hasattr(loaded.config, "quantization_config")
    assert torch.allclose(loaded(IDS).logits, wanted, rtol=1e-4, atol=1e-4)


def test_an_adapter_alone_is_loaded_by_peft_on_the_same_base(folder: str, tmp_path: Path) -> None:
    module = SFTModule(folder, lora=LORA, loading=NF4)
    module.configure_model()
    move_adapter(module.policy)
    module.save_pretrained(tmp_path / "adapter", playground_tokenizer(), merge=False)
    base = load_model(folder, quantization=QuantizationSettings())
    with warnings.catch_warnings():
        # Asked by peft of transformers.
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing")
        loaded = PeftModel.from_pretrained(base, tmp_path / "adapter")
    assert torch.equal(loaded.train()(IDS).logits, module.policy(IDS).logits)


def test_a_checkpoint_that_was_saved_in_4_bit_is_taken_as_it_is(folder: str, tmp_path: Path) -> None:
    model = load_model(folder, quantization=QuantizationSettings())
    model.save_pretrained(tmp_path / "saved")
    again = load_model(str(tmp_path / "saved"))
    assert torch.equal(again(IDS).logits, model(IDS).logits)
    with pytest.raises(ValueError, match="is in 4 bit already, so `quantization` cannot be chosen"):
        load_model(str(tmp_path / "saved"), quantization=QuantizationSettings())
    with pytest.raises(ValueError, match="are in 4 bit, which cannot be trained. Train an adapter"):
        SFTModule(str(tmp_path / "saved")).configure_model()


def test_a_checkpoint_in_another_quantisation_is_refused(folder: str) -> None:
    import json

    config = Path(folder) / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "quantization_config": {"quant_method": "gptq", "bits": 4}}))
    with pytest.raises(ValueError, match="was saved quantised by 'gptq'.*Give the original checkpoint"):
        load_model(folder)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda place: SFTModule(place, loading=NF4),
            r"in 4 bit, which cannot be trained. Train an adapter .* `lora: \{r: 16\}`",
        ),
        (
            lambda place: SFTModule(place, loading=NF4, lora=LoraSettings(modules_to_save=["down_proj"])),
            "`modules_to_save` names 'down_proj', but the layer 'model.layers.0.mlp.down_proj' is in 4 bit",
        ),
        (
            lambda place: DPOModule(place, loading=NF4, lora=LORA, reference="ema", ema=EmaSettings()),
            "A moving reference averages weights, which those in 4 bit cannot do. Use the reference 'adapter'",
        ),
        (lambda place: RewardModule(place, loading=NF4, lora=LORA), "but this run has a classifier"),
        (
            lambda place: RLHFModule(place, loading=NF4, lora=LORA, algorithm="ppo"),
            "but this run has a value function with a trunk of its own",
        ),
    ],
)
def test_what_a_4_bit_base_cannot_do_is_refused(folder: str, make: Callable[[str], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(folder).configure_model()


def test_an_implicit_reward_may_have_a_4_bit_base(folder: str, random_groups: Groups) -> None:
    module = RewardModule(folder, head="implicit", lora=LORA, loading=NF4)
    module.configure_model()
    assert (module.rewards(GroupBatch.from_groups(random_groups())) == 0).all()
    assert "quantized_base_digest" in module.state_dict()


@pytest.mark.parametrize("reference", ["adapter", "copy"])
def test_an_exported_reward_on_a_4_bit_base_takes_its_reference_along(
    small: Build, random_groups: Groups, tmp_path: Path, reference: Any
) -> None:
    """The dense model of that name would be another reference. What is written needs no bitsandbytes."""
    vocabulary = max(playground_tokenizer().get_vocab().values()) + 1
    small(vocab_size=vocabulary).save_pretrained(tmp_path / "base")
    module = RewardModule(str(tmp_path / "base"), head="implicit", beta=0.3, reference=reference, lora=LORA, loading=NF4)
    module.configure_model()
    move_adapter(module.reward_model)
    batch = GroupBatch.from_groups(random_groups())
    module.save_pretrained(tmp_path / "reward", playground_tokenizer())
    shutil.rmtree(tmp_path / "base")
    found = ImplicitReward(str(shutil.move(tmp_path / "reward", tmp_path / "moved")))
    assert not is_quantized(found)
    wanted = module.rewards(batch).detach()
    assert wanted.std() > 0.1
    torch.testing.assert_close(found(batch).detach(), wanted, rtol=1e-3, atol=1e-3)


def test_an_object_is_not_quantised_behind_its_owners_back(small: Build) -> None:
    with pytest.raises(ValueError, match="`loading.quantization` acts on a model given by name, but an object is given"):
        SFTModule(small(), lora=LORA, loading=NF4).configure_model()


def test_a_model_without_linear_layers_is_not_quantised() -> None:
    model = GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=16, n_layer=1, n_head=2))
    with pytest.raises(ValueError, match="GPT2LMHeadModel has no torch.nn.Linear apart from its head"):
        quantize(model, QuantizationSettings())


@pytest.mark.parametrize("sharding", ["fsdp", "fsdp2", "deepspeed"])
def test_a_4_bit_base_is_not_split_over_processes(folder: str, sharding: Any) -> None:
    module = SFTModule(folder, lora=LORA, loading=NF4)
    module._sharding = sharding
    with pytest.raises(
        ValueError, match=r"in 4 bit does not go with .*The nearest that does is LoRA on a base with `dtype: bfloat16`"
    ):
        module.configure_model()


def test_a_missing_package_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "accelerate", None)
    monkeypatch.setattr("lightning_pref.models.quantised.find_spec", lambda name: None if name == "accelerate" else object())
    with pytest.raises(ValueError, match=r"needs accelerate, which is not installed. .*`pip install 'lightning-pref\[bnb\]'`"):
        QuantizationSettings()
