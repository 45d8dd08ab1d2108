from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import LlamaForCausalLM
from typing_extensions import override

from lightning_pref.data.groups import GroupBatch, PromptGroup
from lightning_pref.data.sampler import GroupBatches, GroupBatchSampler
from lightning_pref.data.store import GroupStore, GroupStoreWriter
from lightning_pref.measures.means import WeightedMeans
from lightning_pref.models.adapters import LoraSettings
from lightning_pref.models.backbones import load_tokenizer
from lightning_pref.models.reference import EmaReference, EmaSettings
from lightning_pref.modules import DPOModule, SFTModule
from lightning_pref.modules.optimisation import OptimizerSettings
from lightning_pref.modules.policy import Loading, PolicyModule
from lightning_pref.reports import RunRecord

TinyModel = Callable[..., LlamaForCausalLM]
RandomGroups = Callable[..., list[PromptGroup]]

STEADY = OptimizerSettings(learning_rate=1e-3, schedule="constant", warmup=0)


class History(RunRecord):
    """Keeps every logged value with its step."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[tuple[int, dict[str, float]]] = []

    @override
    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        assert step is not None
        self.rows.append((step, {key: float(value) for key, value in metrics.items()}))

    def of(self, key: str) -> dict[int, float]:
        return {step: row[key] for step, row in self.rows if key in row}


def loader(groups: list[PromptGroup], folder: Path, *, batch_size: int, accumulate: int = 1) -> DataLoader[Any]:
    if not folder.exists():
        with GroupStoreWriter(folder, vocab_size=64) as writer:
            for group in groups:
                writer.append(group)
    batches = GroupBatches(GroupStore(folder))
    sampler = GroupBatchSampler(batches, batch_size=batch_size, accumulate=accumulate, shuffle=False)
    return DataLoader(batches, batch_size=None, sampler=sampler)


def trainer(folder: Path, **settings: Any) -> L.Trainer:
    options: dict[str, Any] = {"max_epochs": 1, "logger": False, "enable_checkpointing": False, "log_every_n_steps": 1}
    return L.Trainer(
        accelerator="cpu",
        default_root_dir=folder,
        enable_progress_bar=False,
        enable_model_summary=False,
        **{**options, **settings},
    )


class Frozen(DPOModule):
    """Every update leaves the weights where they were, so that means over steps are means over one model's rows."""

    @override
    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.policy.parameters(), lr=0.0)


def chosen_logps(model: LlamaForCausalLM, groups: list[PromptGroup]) -> Tensor:
    with torch.no_grad():
        return torch.stack([model_logp(model, group) for group in groups])


def model_logp(model: LlamaForCausalLM, group: PromptGroup) -> Tensor:
    response = torch.from_numpy(group.responses[0]).long()
    ids = torch.cat([torch.from_numpy(group.prompt).long(), response])[None]
    logps = model(ids).logits[0, len(group.prompt) - 1 : -1].log_softmax(-1)
    return logps.gather(1, response[:, None]).sum()


@pytest.mark.parametrize(("every", "steps"), [(1, [1, 2, 3, 4]), (3, [3, 4]), (2, [2, 4]), (50, [4])])
def test_logged_means_are_exact_over_everything_since_the_last_logged_update(
    tiny_model: TinyModel, random_groups: RandomGroups, tmp_path: Path, every: int, steps: list[int]
) -> None:
    groups = random_groups(13)
    history = History()
    # batches of 2, 2, 2, 2, 2, 2, 1 rows; updates of 2, 2, 2 and 1 batches
    data = loader(groups, tmp_path / "store", batch_size=2, accumulate=2)
    fit = trainer(tmp_path, logger=[history], log_every_n_steps=every, accumulate_grad_batches=2)
    fit.fit(Frozen(tiny_model()), data)
    rows = chosen_logps(tiny_model(), groups)
    ends = {1: 4, 2: 8, 3: 12, 4: 13}
    bounds = [0, *(ends[step] for step in steps)]
    expected = [rows[start:end].mean().item() for start, end in pairwise(bounds)]
    found = history.of("logps/chosen")
    # Lightning counts the step of a log from 0, and the end of training from 1.
    assert list(found.values()) == pytest.approx(expected, rel=1e-5)


def test_validation_means_are_exact_over_uneven_batches_and_fillers(
    tiny_model: TinyModel, random_groups: RandomGroups, tmp_path: Path
) -> None:
    groups = random_groups(13)
    filler = PromptGroup(row_id=0, prompt=groups[0].prompt, responses=groups[0].responses, ranks=(0, 1), weight=0.0)
    batches = [GroupBatch.from_groups(part) for part in (groups[:6], groups[6:12], [groups[12], filler], [filler])]
    history = History()
    val: DataLoader[Any] = DataLoader(batches, batch_size=None)  # type: ignore[arg-type]
    fit = trainer(tmp_path, logger=[history], max_epochs=2)
    fit.fit(Frozen(tiny_model()), loader(groups, tmp_path / "store", batch_size=4), val)
    found = history.of("val/logps/chosen")
    expected = chosen_logps(tiny_model(), groups).mean().item()
    assert len(found) == 2, "one per epoch, none of the sanity check"
    assert list(found.values()) == pytest.approx([expected] * 2, rel=1e-5)
    assert fit.callback_metrics["val/logps/chosen"].item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("loss", ["sigmoid", "kto", "npo", "align"])
def test_every_logged_number_is_defined(tiny_model: TinyModel, random_groups: RandomGroups, tmp_path: Path, loss: str) -> None:
    history = History()
    fit = trainer(tmp_path, logger=[history], max_steps=1)
    fit.fit(DPOModule(tiny_model(), loss=loss, optimizer=STEADY), loader(random_groups(), tmp_path / "store", batch_size=4))
    logged = {key: value for _, row in history.rows for key, value in row.items()}
    assert {"loss", "logps/chosen", "logps/rejected"} <= set(logged)
    assert all(value == value for value in logged.values()), logged


def test_configuring_twice_changes_nothing(tiny_model: TinyModel) -> None:
    module = DPOModule(tiny_model(), lora=LoraSettings(r=2), loss="ipo")
    module.configure_model()
    policy, reference = module.policy, module.reference
    module.configure_model()
    assert module.policy is policy
    assert module.reference is reference


@pytest.mark.parametrize("options", [{}, {"lora": LoraSettings(r=2)}])
def test_a_model_given_as_an_object_is_saved_once_as_one_given_by_folder_is(
    tiny_model: TinyModel, tmp_path: Path, options: dict[str, Any]
) -> None:
    tiny_model().save_pretrained(tmp_path / "model")
    modules = [DPOModule(given, **options) for given in (tiny_model(), str(tmp_path / "model"))]
    for module in modules:
        torch.manual_seed(0)
        module.configure_model()
    by_object, by_folder = (module.state_dict() for module in modules)
    assert list(by_object) == list(by_folder)
    assert all(torch.equal(by_object[name], by_folder[name]) for name in by_object if isinstance(by_object[name], Tensor))


def test_a_model_that_comes_in_eval_mode_is_trained_in_training_mode(
    tiny_model: TinyModel, random_groups: RandomGroups, tmp_path: Path
) -> None:
    module = DPOModule(tiny_model().eval(), optimizer=STEADY)
    data = loader(random_groups(), tmp_path / "store", batch_size=4)
    trainer(tmp_path).fit(module, data, data)
    assert all(part.training for part in module.policy.modules())
    assert not any(part.training for part in module.reference.model.modules())  # type: ignore[union-attr]


def test_loading_settings_reach_the_model(tmp_path: Path, tiny_model: TinyModel) -> None:
    tiny_model().save_pretrained(tmp_path / "model")
    loading = Loading(dtype="bfloat16", attn_implementation="eager")
    module = SFTModule(str(tmp_path / "model"), loading=loading)
    module.configure_model()
    assert {parameter.dtype for parameter in module.policy.parameters()} == {torch.bfloat16}
    assert module.policy.config._attn_implementation == "eager"


def test_the_seed_of_loading_is_that_of_a_presets_weights() -> None:
    weights = []
    for seed in (0, 0, 1):
        module = SFTModule(loading=Loading(seed=seed))
        module.configure_model()
        weights.append(module.digests()["weights"])
    assert weights[0] == weights[1] != weights[2]


def test_a_run_without_an_end_is_refused(tiny_model: TinyModel, random_groups: RandomGroups, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="The run has no end, so the schedule has no length; set `trainer.max_epochs`"):
        trainer(tmp_path, max_epochs=-1).fit(SFTModule(tiny_model()), loader(random_groups(), tmp_path / "store", batch_size=4))


def test_an_export_keeps_the_adapter_apart_where_that_is_asked(tiny_model: TinyModel, tmp_path: Path) -> None:
    module = SFTModule(tiny_model(), lora=LoraSettings(r=2))
    module.configure_model()
    tokenizer = load_tokenizer("playground:tiny")
    module.save_pretrained(tmp_path / "merged", tokenizer)
    module.save_pretrained(tmp_path / "adapter", tokenizer, merge=False)
    assert (tmp_path / "merged" / "config.json").exists()
    assert not (tmp_path / "merged" / "adapter_config.json").exists()
    assert (tmp_path / "adapter" / "adapter_config.json").exists()
    assert not (tmp_path / "adapter" / "model.safetensors").exists()


# -- checkpoints ------------------------------------------------------------------------------------------------------------

RESUMABLE: dict[str, dict[str, Any]] = {
    "copy": {"reference": "copy"},
    "adapter": {"lora": LoraSettings(r=2)},
    "ema": {"ema": EmaSettings(mixing=0.5, every_n_updates=3)},
    "none": {"loss": "simpo"},
    "kto": {"loss": "kto"},
    "bco": {"loss": "bco", "beta": 0.5},
}


def run(module: PolicyModule, data: DataLoader[Any], folder: Path, *, epochs: int, resume: Path | None = None) -> Path:
    """Train and write a checkpoint."""
    fit = trainer(folder, max_epochs=epochs)
    torch.manual_seed(0)  # the same fresh adapter in every run
    fit.fit(module, data, ckpt_path=resume)
    fit.save_checkpoint(folder / "end.ckpt")
    return folder / "end.ckpt"


@pytest.mark.parametrize("kind", RESUMABLE)
def test_a_resumed_run_ends_where_an_uninterrupted_one_does(
    tiny_model: TinyModel, random_groups: RandomGroups, tmp_path: Path, kind: str
) -> None:
    def build() -> DPOModule:
        return DPOModule(tiny_model(), optimizer=STEADY, **RESUMABLE[kind])

    data = loader(random_groups(5), tmp_path / "store", batch_size=2)
    whole, resumed = build(), build()
    run(whole, data, tmp_path / "whole", epochs=3)
    half = run(build(), data, tmp_path / "half", epochs=2)
    run(resumed, data, tmp_path / "rest", epochs=3, resume=half)
    states = whole.state_dict(), resumed.state_dict()
    assert list(states[0]) == list(states[1])
    for name, value in states[0].items():
        other = states[1][name]
        assert torch.equal(value, other) if isinstance(value, Tensor) else value == other, name
    batch = GroupBatch.from_groups(random_groups(3, seed=5))
    assert torch.equal(whole.eval().terms(batch).losses, resumed.eval().terms(batch).losses)


def test_a_frozen_copy_is_no_part_of_the_checkpoint(tiny_model: TinyModel, random_groups: RandomGroups, tmp_path: Path) -> None:
    data = loader(random_groups(), tmp_path / "store", batch_size=2)
    checkpoint = run(DPOModule(tiny_model()), data, tmp_path / "run", epochs=1)
    saved = torch.load(checkpoint, weights_only=True)["state_dict"]
    assert {name.split(".")[0] for name, value in saved.items() if isinstance(value, Tensor)} == {"policy"}
    assert sum(value.numel() for value in saved.values() if isinstance(value, Tensor)) == sum(
        parameter.numel() for parameter in tiny_model().parameters()
    )


def test_resuming_against_another_reference_raises(tiny_model: TinyModel, random_groups: RandomGroups, tmp_path: Path) -> None:
    data = loader(random_groups(), tmp_path / "store", batch_size=2)
    checkpoint = run(DPOModule(tiny_model()), data, tmp_path / "run", epochs=1)
    with pytest.raises(ValueError, match="was trained against the reference .* but this run has .* Give the model the run began"):
        run(DPOModule(tiny_model(seed=1)), data, tmp_path / "again", epochs=2, resume=checkpoint)


def test_a_checkpoint_in_the_middle_of_an_epoch_counts_the_update_it_follows(
    tiny_model: TinyModel, random_groups: RandomGroups, tmp_path: Path
) -> None:
    """Lightning's checkpoint callback runs before the module's own hook at the end of a batch."""
    data = loader(random_groups(6), tmp_path / "store", batch_size=1, accumulate=2)
    module = DPOModule(tiny_model(), ema=EmaSettings(mixing=1.0, every_n_updates=2), optimizer=STEADY)
    saving = ModelCheckpoint(tmp_path / "saved", save_top_k=-1, filename="{step}", every_n_train_steps=1)
    trainer(tmp_path, enable_checkpointing=True, callbacks=[saving], accumulate_grad_batches=2).fit(module, data)
    for step in (1, 2, 3):
        state = torch.load(tmp_path / "saved" / f"step={step}.ckpt", weights_only=True)["state_dict"]
        assert state["reference._extra_state"] == {"num_updates": step}
        head = "lm_head.weight"
        followed = torch.equal(state[f"reference.model.{head}"], state[f"policy.{head}"])
        assert followed == (step == 2)


def test_the_moving_reference_counts_updates_and_not_micro_batches(
    tiny_model: TinyModel, random_groups: RandomGroups, tmp_path: Path
) -> None:
    data = loader(random_groups(7), tmp_path / "store", batch_size=1, accumulate=3)
    module = DPOModule(tiny_model(), ema=EmaSettings(), optimizer=STEADY)
    trainer(tmp_path, accumulate_grad_batches=3).fit(module, data)
    assert isinstance(module.reference, EmaReference)
    assert module.reference.num_updates == 3


def test_R3_validation_compares_with_the_same_reference_after_training(
    tiny_model: TinyModel, random_groups: RandomGroups, tmp_path: Path
) -> None:
    groups = random_groups()
    module = DPOModule(tiny_model(), optimizer=STEADY)
    fit = trainer(tmp_path, max_epochs=3)
    fit.fit(module, loader(groups, tmp_path / "store", batch_size=2))
    assert not torch.equal(module.policy.lm_head.weight, tiny_model().lm_head.weight)
    module.eval()
    found = module.reference_logps(GroupBatch.from_groups(groups))
    assert found is not None
    assert torch.allclose(found[0::2], chosen_logps(tiny_model(), groups), atol=1e-5)


# -- precision --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["bf16-true", "bf16-mixed"])
@pytest.mark.parametrize("loss", ["sigmoid", "bco", "align"])
def test_low_precision_weights_leave_losses_sums_and_counts_in_full_precision(
    tiny_model: TinyModel, random_groups: RandomGroups, tmp_path: Path, precision: Any, loss: str
) -> None:
    seen: list[tuple[torch.dtype, ...]] = []

    class Watching(DPOModule):
        @override
        def terms(self, batch: GroupBatch) -> Any:
            out, terms = self.policy_logps(batch), super().terms(batch)
            seen.append((out.token_logps.dtype, out.logps.dtype, terms.losses.dtype, terms.weights.dtype))
            return terms

    data = loader(random_groups(), tmp_path / "store", batch_size=2)
    module = Watching(tiny_model(), loss=loss, optimizer=STEADY)
    trainer(tmp_path, precision=precision).fit(module, data, data)
    weights = {parameter.dtype for parameter in module.policy.parameters()}
    assert weights == {torch.bfloat16 if precision == "bf16-true" else torch.float32}
    assert set(seen) == {(torch.float32,) * 4}
    for means in (module.train_means, module.val_means):
        assert means.sums.dtype == means.weights.dtype == torch.float64
    if loss == "bco":
        assert module.bco_threshold is not None
        assert module.bco_threshold.mean.dtype == module.bco_threshold.num_seen.dtype == torch.float32
        assert module.bco_threshold.num_seen == 8


def test_means_survive_a_cast_of_the_module_around_them() -> None:
    means = WeightedMeans(["x"])
    means.update({"x": torch.tensor([257.0])}, torch.ones(1))
    module = torch.nn.Sequential(means)
    for cast in (lambda: module.to(torch.bfloat16), module.half, module.bfloat16):
        cast()
        assert means.compute()["x"].item() == 257.0
        means.reset()
        means.update({"x": torch.tensor([257.0])}, torch.ones(1))
