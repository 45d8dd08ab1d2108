"""Checks that an option of a module has an effect, each a function of a bench with a tiny model and a batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lightning as L
import pytest
import torch
from torch.utils.data import DataLoader
from transformers import LlamaForCausalLM

from lightning_pref.data.groups import GroupBatch, PromptGroup
from lightning_pref.models.adapters import LoraSettings
from lightning_pref.models.reference import AdapterOff
from lightning_pref.modules import DPOModule, SFTModule, group_module
from lightning_pref.modules.group_module import GroupModule, Loading
from lightning_pref.modules.optimisation import OptimizerSettings
from lightning_pref.modules.policy import PolicyModule
from lightning_pref.modules.reward import RewardModule

TinyModel = Callable[..., LlamaForCausalLM]
RandomGroups = Callable[..., list[PromptGroup]]


class Bench:
    """What a check may use."""

    def __init__(self, tiny_model: TinyModel, random_groups: RandomGroups, monkeypatch: pytest.MonkeyPatch) -> None:
        self.tiny_model = tiny_model
        self.groups = random_groups()
        # Pairs, and demonstrations of the same texts.
        self.pairs = GroupBatch.from_groups(self.groups)
        self.demonstrations = GroupBatch.from_groups(random_groups(ranked=False))
        self.monkeypatch = monkeypatch

    def batch(self, kind: type[Any]) -> GroupBatch:
        return self.demonstrations if kind is SFTModule else self.pairs

    def configured(self, kind: type[Any], **options: Any) -> Any:
        module = kind(self.tiny_model(), **options)
        module.configure_model()
        return module


Check = Callable[[Bench], None]


def changes_losses(kind: type[PolicyModule], **options: Any) -> Check:
    """The losses of a policy that has left its reference are others."""

    def check(bench: Bench) -> None:
        losses = []
        for given in ({}, options):
            module = bench.configured(kind, **given)
            generator = torch.Generator().manual_seed(0)
            with torch.no_grad():
                module.policy.lm_head.weight.add_(torch.randn(64, 32, generator=generator), alpha=0.1)
            losses.append(module.terms(bench.batch(kind)).losses)
        assert losses[0].shape != losses[1].shape or not torch.allclose(*losses, rtol=1e-3)

    return check


def lays_out(kind: type[PolicyModule]) -> Check:
    """The policy runs in the layout that was asked for, and so does a reference."""

    def check(bench: Bench) -> None:
        for layout in ("padded", "packed", "shared"):
            module = bench.configured(kind, layout=layout)
            assert module.policy_logps(bench.batch(kind)).layout == layout
            assert not isinstance(module, DPOModule) or module.reference.score.keywords == {"layout": layout}  # type: ignore[union-attr]

    return check


def adapts(kind: type[PolicyModule]) -> Check:
    """Only an adapter is trained, and the base under it is the reference."""

    def check(bench: Bench) -> None:
        module = bench.configured(kind, lora=LoraSettings(r=2))
        trained = [name for name, parameter in module.named_parameters() if parameter.requires_grad]
        assert trained
        assert all("lora_" in name for name in trained)
        assert not isinstance(module, DPOModule) or isinstance(module.reference, AdapterOff)

    return check


def optimises(kind: type[GroupModule]) -> Check:
    def check(bench: Bench) -> None:
        settings = OptimizerSettings(learning_rate=0.123, schedule="constant", warmup=0)
        trainer = L.Trainer(
            max_steps=1,
            accelerator="cpu",
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        loader: DataLoader[Any] = DataLoader([bench.batch(kind)], batch_size=None)  # type: ignore[arg-type]
        trainer.fit(kind(bench.tiny_model(), optimizer=settings), loader)  # type: ignore[call-arg]
        assert trainer.optimizers[0].param_groups[0]["lr"] == 0.123

    return check


def loads(kind: type[PolicyModule], **options: Any) -> Check:
    """What `Loading` says reaches `load_model`, for the policy and for another reference."""

    def check(bench: Bench) -> None:
        calls: list[dict[str, Any]] = []

        def load_model(name: str, **given: Any) -> LlamaForCausalLM:
            calls.append(given)
            return bench.tiny_model()

        bench.monkeypatch.setattr(group_module, "load_model", load_model)
        other = {"reference_model": "other"} if kind is DPOModule else {}
        kind("mine", loading=Loading(**options), **other).configure_model()  # type: ignore[call-arg]
        assert len(calls) == 1 + len(other)
        assert all(options.items() <= given.items() for given in calls)

    return check


def recomputes(kind: type[GroupModule]) -> Check:
    def check(bench: Bench) -> None:
        for wanted in (True, False):
            module = bench.configured(kind, gradient_checkpointing=wanted)
            losses = module.terms(bench.batch(kind)).losses
            runs: list[int] = []
            module.trained.model.layers[0].mlp.register_forward_pre_hook(lambda *_, runs=runs: runs.append(1))
            losses.sum().backward()
            assert len(runs) == wanted

    return check


def logs_entropy(kind: type[PolicyModule]) -> Check:
    def check(bench: Bench) -> None:
        for wanted in (True, False):
            module = bench.configured(kind, log_entropy=wanted)
            module._measured_terms(bench.batch(kind), module.train_means)
            means = module.train_means.compute()
            assert ("entropy" in means) == wanted
            assert not wanted or means["entropy"] > 0

    return check


def changes_rewards(**options: Any) -> Check:
    def check(bench: Bench) -> None:
        rewards = [bench.configured(RewardModule, **given).rewards(bench.pairs) for given in ({}, options)]
        assert not torch.allclose(*rewards, rtol=1e-3)

    return check


def lays_rewards_out(bench: Bench) -> None:
    for layout in ("padded", "packed", "shared"):
        assert bench.configured(RewardModule, layout=layout).scores(bench.pairs).layout == layout
        implicit = bench.configured(RewardModule, layout=layout, head="implicit")
        assert implicit.scores(bench.pairs).layout == layout
        assert implicit.reference.score.keywords == {"layout": layout}


def adapts_rewards(bench: Bench) -> None:
    module = bench.configured(RewardModule, lora=LoraSettings(r=2))
    trained = [name for name, parameter in module.named_parameters() if parameter.requires_grad]
    assert any("lora_" in name for name in trained)
    assert [name for name in trained if "lora_" not in name] == [
        "reward_model.base_model.model.score.modules_to_save.default.weight"
    ]


def changes_updates(**options: Any) -> Check:
    """Three updates of one weight end elsewhere."""

    def check(bench: Bench) -> None:
        ends = []
        for given in ({}, options):
            layer = torch.nn.Linear(2, 1)
            torch.nn.init.ones_(layer.weight)
            optimizer, schedule = OptimizerSettings(**{"learning_rate": 0.1, **given}).build(layer.parameters(), 10)
            for size in (1.0, 2.0, -0.5):
                optimizer.zero_grad()
                (layer.weight.sum() * size).backward()
                optimizer.step()
                schedule.step()
            ends.append(layer.weight.detach())
        assert not torch.allclose(*ends, rtol=1e-4)

    return check
