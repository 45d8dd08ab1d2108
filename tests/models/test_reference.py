from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaForCausalLM, PreTrainedModel

from lightning_pref.data.groups import GroupBatch, PromptGroup
from lightning_pref.losses import PairLogps, preference_loss
from lightning_pref.models.adapters import LoraSettings, add_lora
from lightning_pref.models.digests import reference_digest
from lightning_pref.models.reference import AdapterOff, EmaReference, EmaSettings, FrozenCopy, Reference, summed_logps
from lightning_pref.models.reference_cache import CachedReference, compute_reference_cache, read_reference_cache
from lightning_pref.models.reference_choice import ReferenceKind, resolve_kind, resolve_reference

Build = Callable[..., LlamaForCausalLM]
Groups = Callable[..., list[PromptGroup]]


def with_dropout() -> GPT2LMHeadModel:
    rates = {"attn_pdrop": 0.3, "embd_pdrop": 0.3, "resid_pdrop": 0.3}
    return GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=16, n_layer=2, n_head=2, n_positions=64, **rates)).train()


def train_a_step(policy: PreTrainedModel | PeftModel, batch: GroupBatch) -> None:
    optimizer = torch.optim.SGD([parameter for parameter in policy.parameters() if parameter.requires_grad], lr=0.1)
    summed_logps(policy, batch).sum().neg().backward()
    optimizer.step()


def build(kind: str, policy: PreTrainedModel | PeftModel, batch: GroupBatch, folder: Path) -> Reference:
    """A reference of each kind, made before the first update of the policy."""
    table = None
    if kind == "cache":
        digest = reference_digest(policy, tokenizer="t", data="d", precision="32-true")
        compute_reference_cache(policy, [batch], batch.num_responses, folder / "cache", digest)
        table = read_reference_cache(folder / "cache", digest)
    reference = resolve_reference(kind, policy, needs_reference=True, table=table)  # type: ignore[arg-type]
    assert reference is not None
    return reference


@pytest.fixture
def batch(random_groups: Groups) -> GroupBatch:
    return GroupBatch.from_groups(random_groups())


@pytest.mark.parametrize("kind", ["copy", "adapter", "ema", "cache"])
def test_R1_policy_equals_reference_at_step_0(kind: str, tiny_model: Build, batch: GroupBatch, tmp_path: Path) -> None:
    policy = add_lora(tiny_model(), LoraSettings(r=2)) if kind == "adapter" else tiny_model()
    logps, reference = summed_logps(policy, batch), build(kind, policy, batch, tmp_path).logps(batch)
    assert torch.equal(logps, reference)
    pairs = batch.pairs()
    pair = PairLogps(logps[pairs.chosen], logps[pairs.rejected], reference[pairs.chosen], reference[pairs.rejected])
    loss = preference_loss("sigmoid", pair)
    torch.testing.assert_close(loss, torch.full_like(loss, math.log(2)), atol=1e-6, rtol=0)


@pytest.mark.parametrize("kind", ["copy", "adapter", "ema", "cache"])
def test_R2_dropout_never_reaches_the_reference(kind: str, batch: GroupBatch, tmp_path: Path) -> None:
    policy = add_lora(with_dropout(), LoraSettings(r=2, dropout=0.3)) if kind == "adapter" else with_dropout()
    holder = nn.Module()
    holder.policy, holder.reference = policy, build(kind, policy, batch, tmp_path)
    modes = [module.training for module in holder.policy.modules()]
    assert any(modes)
    holder.train()
    state = torch.get_rng_state()
    first, second = holder.reference.logps(batch), holder.reference.logps(batch)
    assert torch.equal(first, second)
    assert torch.equal(first, summed_logps(policy.eval(), batch))
    assert torch.equal(torch.get_rng_state(), state)
    holder.train()
    assert not torch.equal(summed_logps(policy, batch), first)


@pytest.mark.parametrize("kind", ["adapter", "cache"])
def test_R2_training_mode_is_restored_module_by_module(kind: str, batch: GroupBatch, tmp_path: Path) -> None:
    policy = add_lora(with_dropout(), LoraSettings(r=2, dropout=0.3))
    policy.get_base_model().transformer.h[0].eval()
    modes = [module.training for module in policy.modules()]
    build(kind, policy, batch, tmp_path).logps(batch)
    assert [module.training for module in policy.modules()] == modes


@pytest.mark.parametrize("kind", ["copy", "adapter", "cache"])
def test_R3_training_does_not_move_the_reference(kind: str, tiny_model: Build, batch: GroupBatch, tmp_path: Path) -> None:
    policy = add_lora(tiny_model(), LoraSettings(r=2)) if kind == "adapter" else tiny_model()
    reference = build(kind, policy, batch, tmp_path)
    before = reference.logps(batch)
    train_a_step(policy, batch)
    policy.eval()
    assert not torch.allclose(summed_logps(policy, batch), before)
    assert torch.equal(reference.logps(batch), before)


@pytest.mark.parametrize("kind", ["copy", "adapter", "ema", "cache"])
def test_the_reference_has_no_gradient(kind: str, tiny_model: Build, batch: GroupBatch, tmp_path: Path) -> None:
    policy = add_lora(tiny_model(), LoraSettings(r=2)) if kind == "adapter" else tiny_model()
    reference = build(kind, policy, batch, tmp_path)
    assert not reference.logps(batch).requires_grad
    if isinstance(reference, nn.Module):
        assert not any(parameter.requires_grad for parameter in reference.parameters())


@pytest.mark.parametrize("modules_to_save", [None, ["lm_head"]])
def test_R6_the_adapter_is_back_after_an_error_and_the_base_gets_no_gradient(
    tiny_model: Build, batch: GroupBatch, modules_to_save: list[str] | None
) -> None:
    policy = add_lora(tiny_model(), LoraSettings(r=2, modules_to_save=modules_to_save))
    base = summed_logps(tiny_model(), batch)
    train_a_step(policy, batch)
    policy.zero_grad()
    trained = summed_logps(policy, batch)
    calls = []

    def fails_at_first(model: PreTrainedModel | PeftModel, batch: GroupBatch) -> Tensor:
        calls.append(1)
        if len(calls) == 1:
            raise RuntimeError("out of memory")
        return summed_logps(model, batch)

    reference = AdapterOff(policy, score=fails_at_first)
    with pytest.raises(RuntimeError, match="out of memory"):
        reference.logps(batch)
    assert policy.active_adapters == ["default"]
    assert torch.equal(summed_logps(policy, batch), trained)

    (summed_logps(policy, batch) - reference.logps(batch)).sum().backward()
    assert torch.equal(reference.logps(batch), base)
    for name, parameter in policy.named_parameters():
        assert (parameter.grad is not None) == ("lora_" in name or "modules_to_save" in name), name


def test_an_adapter_that_trains_biases_is_no_reference(tiny_model: Build) -> None:
    policy = add_lora(tiny_model(attention_bias=True), LoraSettings(r=2))
    policy.peft_config["default"].bias = "all"
    with pytest.raises(ValueError, match="trains biases of the base model.*or the reference 'copy'"):
        AdapterOff(policy)


def test_R10_no_reference_runs_no_reference_forward(tiny_model: Build, batch: GroupBatch) -> None:
    calls = []

    def counted(model: PreTrainedModel | PeftModel, batch: GroupBatch) -> Tensor:
        calls.append(1)
        return summed_logps(model, batch)

    for kind in ("none", "auto"):
        assert resolve_reference(kind, tiny_model(), needs_reference=False, score=counted) is None
    for policy in (tiny_model(), add_lora(tiny_model(), LoraSettings(r=2))):
        reference = resolve_reference("auto", policy, needs_reference=True, score=counted)
        assert not calls
        assert reference is not None
        reference.logps(batch)
        assert calls.pop()


def test_R9_a_cache_of_a_moving_reference_is_refused(tiny_model: Build) -> None:
    with pytest.raises(ValueError, match="A cache holds log-probs of a reference that never changes.*Use the reference 'ema'"):
        resolve_kind("cache", tiny_model(), needs_reference=True, ema=EmaSettings())


@pytest.mark.parametrize(
    ("kind", "needs", "other_model", "ema", "message"),
    [
        ("none", True, False, None, "the loss compares the policy with one. Use the reference 'auto'"),
        ("adapter", True, False, None, "the policy has none. Turn LoRA on, or use the reference 'copy'"),
        ("copy", True, False, EmaSettings(), "the reference 'copy' does not move; use 'ema'"),
        ("ema", True, True, None, "Use 'copy' \\(or 'cache'\\) with that model"),
        ("none", False, True, None, "would ignore it"),
        ("auto", True, True, EmaSettings(), "Another model is given"),
    ],
)
def test_an_impossible_wish_names_the_nearest_possible_one(
    tiny_model: Build, kind: ReferenceKind, needs: bool, other_model: bool, ema: EmaSettings | None, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        resolve_kind(kind, tiny_model(), needs_reference=needs, other_model=other_model, ema=ema)


def test_auto_takes_the_cheapest_reference_that_equals_the_start(tiny_model: Build, batch: GroupBatch) -> None:
    plain, adapted = tiny_model(), add_lora(tiny_model(), LoraSettings(r=2))
    assert resolve_kind("auto", plain, needs_reference=True) == "copy"
    assert resolve_kind("auto", adapted, needs_reference=True) == "adapter"
    assert resolve_kind("auto", adapted, needs_reference=False) == "none"
    assert resolve_kind("auto", adapted, needs_reference=True, other_model=True) == "copy"
    assert resolve_kind("auto", plain, needs_reference=True, ema=EmaSettings()) == "ema"
    train_a_step(adapted, batch)
    assert resolve_kind("auto", adapted, needs_reference=True) == "copy"


def test_another_model_is_taken_over_and_frozen(tiny_model: Build, batch: GroupBatch) -> None:
    other = tiny_model(seed=7)
    expected = summed_logps(other, batch)
    reference = resolve_reference("copy", tiny_model(), needs_reference=True, other_model=other)
    assert isinstance(reference, FrozenCopy)
    assert reference.model is other
    assert torch.equal(reference.logps(batch), expected)
    assert not any(parameter.requires_grad for parameter in other.parameters())


def test_a_cache_without_a_table_is_refused(tiny_model: Build) -> None:
    with pytest.raises(ValueError, match="'cache' needs its table"):
        resolve_reference("cache", tiny_model(), needs_reference=True)


def test_a_frozen_copy_stays_out_of_checkpoints_and_loads_strictly(tiny_model: Build, batch: GroupBatch) -> None:
    def holder(seed: int, start: LlamaForCausalLM) -> nn.Module:
        module = nn.Module()
        module.policy, module.reference = tiny_model(seed), FrozenCopy(start)
        return module

    saved = holder(1, tiny_model()).state_dict()
    assert [name for name in saved if name.startswith("reference.")] == ["reference._extra_state"]
    resumed = holder(2, tiny_model())
    resumed.load_state_dict(saved)
    assert torch.equal(resumed.policy.lm_head.weight, tiny_model(1).lm_head.weight)
    assert torch.equal(resumed.reference.logps(batch), summed_logps(tiny_model(), batch))
    with pytest.raises(ValueError, match="The checkpoint was trained against the reference .* but this run has"):
        holder(2, tiny_model(seed=5)).load_state_dict(saved)


def test_references_survive_deepcopy_and_pickle(tiny_model: Build, batch: GroupBatch, tmp_path: Path) -> None:
    for kind in ("copy", "adapter", "ema", "cache"):
        policy = add_lora(tiny_model(), LoraSettings(r=2)) if kind == "adapter" else tiny_model()
        reference = build(kind, policy, batch, tmp_path)
        for twin in (copy.deepcopy(reference), pickle.loads(pickle.dumps(reference))):
            assert torch.equal(twin.logps(batch), reference.logps(batch))


def test_an_ema_reference_follows_every_k_updates(tiny_model: Build) -> None:
    policy = tiny_model()
    start, reference = copy.deepcopy(policy), EmaReference(policy, EmaSettings(mixing=0.6, every_n_updates=3))
    with torch.no_grad():
        policy.lm_head.weight.add_(1.0)
    assert [reference.after_update(policy) for _ in range(3)] == [False, False, True]
    expected = 0.6 * policy.lm_head.weight + 0.4 * start.lm_head.weight
    torch.testing.assert_close(reference.model.lm_head.weight, expected)
    assert not torch.equal(start.lm_head.weight, policy.lm_head.weight)


def test_a_hard_update_makes_the_reference_the_policy(tiny_model: Build, batch: GroupBatch) -> None:
    policy = tiny_model()
    reference = EmaReference(policy, EmaSettings(mixing=1.0, every_n_updates=1))
    train_a_step(policy, batch)
    reference.after_update(policy)
    assert torch.equal(reference.logps(batch), summed_logps(policy, batch))


def test_an_ema_of_a_lora_policy_moves_the_adapter_only(tiny_model: Build, batch: GroupBatch) -> None:
    policy = add_lora(tiny_model(), LoraSettings(r=2))
    reference = EmaReference(policy, EmaSettings(mixing=0.5, every_n_updates=1))
    before = copy.deepcopy(reference.model.state_dict())
    train_a_step(policy, batch)
    reference.after_update(policy)
    moved = {name for name, tensor in reference.model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert moved
    assert all("lora_" in name for name in moved)


def test_an_ema_reference_resumes_in_the_middle_of_its_interval(tiny_model: Build) -> None:
    policy, settings = tiny_model(seed=1), EmaSettings(mixing=0.6, every_n_updates=3)
    whole, first = EmaReference(tiny_model(), settings), EmaReference(tiny_model(), settings)
    for _ in range(4):
        whole.after_update(policy)
        first.after_update(policy)
    resumed = EmaReference(tiny_model(seed=9), settings)
    resumed.load_state_dict(first.state_dict())
    for _ in range(2):
        whole.after_update(policy)
        resumed.after_update(policy)
    assert torch.equal(resumed.model.lm_head.weight, whole.model.lm_head.weight)


def test_impossible_ema_settings_are_refused(tiny_model: Build) -> None:
    with pytest.raises(ValueError, match=r"`mixing` must be in \(0, 1\], got 0.0"):
        EmaSettings(mixing=0.0)
    with pytest.raises(ValueError, match="`every_n_updates` must be at least 1, got 0"):
        EmaSettings(every_n_updates=0)
    with pytest.raises(ValueError, match="torch.bfloat16 weights would round most of its steps away"):
        EmaReference(tiny_model().to(torch.bfloat16), EmaSettings(mixing=0.01, every_n_updates=1))


def test_a_second_adapter_does_not_confuse_the_reference(tiny_model: Build, batch: GroupBatch) -> None:
    policy = add_lora(tiny_model(), LoraSettings(r=2))
    policy.add_adapter("second", LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    policy.set_adapter("second")
    trained = summed_logps(policy, batch)
    assert torch.equal(AdapterOff(policy).logps(batch), summed_logps(tiny_model(), batch))
    assert policy.active_adapters == ["second"]
    assert torch.equal(summed_logps(policy, batch), trained)


def test_a_cached_reference_needs_no_model(tiny_model: Build, batch: GroupBatch, tmp_path: Path) -> None:
    reference = build("cache", tiny_model(), batch, tmp_path)
    assert isinstance(reference, CachedReference)
    assert list(reference.parameters()) == []
