from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from speakers import quiet_trainer
from transformers import LlamaForCausalLM

from lightning_pref.data.datamodule import PreferenceData
from lightning_pref.data.groups import GroupBatch, PromptGroup
from lightning_pref.data.playground_source import PlaygroundSettings
from lightning_pref.data.playground_tokenizer import playground_tokenizer
from lightning_pref.models.reference_cache import CachedReference
from lightning_pref.modules import DPOModule
from lightning_pref.modules.optimisation import OptimizerSettings

TinyModel = Callable[..., LlamaForCausalLM]

TOKENIZER = playground_tokenizer()
ROWS = PlaygroundSettings(num_rows=9, num_val_rows=4, long_prompts=0.0)
STEADY = OptimizerSettings(learning_rate=1e-3, schedule="constant", warmup=0)


def preference_data(folder: Path, **settings: Any) -> PreferenceData:
    options: dict[str, Any] = {"playground": ROWS, "batch_size": 4, **settings}
    return PreferenceData("playground:preference", tokenizer=TOKENIZER, cache_dir=str(folder), **options)


def policy(tiny_model: TinyModel, seed: int = 0) -> LlamaForCausalLM:
    vocabulary = max(TOKENIZER.get_vocab().values()) + 1
    return tiny_model(seed, vocab_size=vocabulary, max_position_embeddings=512, initializer_range=0.05)


class Losses(DPOModule):
    """Keeps every loss it computes."""

    seen: list[torch.Tensor]

    def terms(self, batch: GroupBatch) -> Any:
        terms = super().terms(batch)
        self.seen.append(terms.losses.detach())
        return terms


def fit(module: DPOModule, data: Any, folder: Path, **settings: Any) -> list[torch.Tensor]:
    module.seen = []  # type: ignore[assignment]
    trainer = quiet_trainer(max_epochs=2, default_root_dir=folder, **settings)
    trainer.fit(module, data)
    return module.seen  # type: ignore[return-value]


def cache_folders(folder: Path) -> list[Path]:
    return sorted((folder / "reference").iterdir())


def test_a_cache_gives_the_losses_of_a_frozen_copy(tiny_model: TinyModel, tmp_path: Path) -> None:
    copied = fit(Losses(policy(tiny_model), reference="copy", optimizer=STEADY), preference_data(tmp_path), tmp_path)
    module = Losses(policy(tiny_model), reference="cache", optimizer=STEADY)
    cached = fit(module, preference_data(tmp_path), tmp_path)
    assert isinstance(module.reference, CachedReference)
    assert isinstance(module.val_reference, CachedReference)
    # the sanity check, then two epochs of three training and one validation batch
    assert len(cached) == len(copied) == 9
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(cached, copied, strict=True))
    assert not torch.allclose(cached[-1], cached[0], atol=1e-3), "the policy has moved, its reference has not"


def test_the_second_run_reads_what_the_first_has_computed(tiny_model: TinyModel, tmp_path: Path) -> None:
    def run(**options: Any) -> DPOModule:
        module = Losses(policy(tiny_model), reference="cache", optimizer=STEADY, **options)
        fit(module, preference_data(tmp_path), tmp_path)
        return module

    run()
    written = {path: path.stat().st_mtime_ns for folder in cache_folders(tmp_path) for path in folder.iterdir()}
    assert len(cache_folders(tmp_path)) == 2, "one of the training rows and one of the validation rows"
    # A mark in the stored numbers, with the checksum put right: only a run that reads them can have it.
    for folder in cache_folders(tmp_path):
        mark(folder)
    second = run()
    assert {path: path.stat().st_mtime_ns for folder in cache_folders(tmp_path) for path in folder.iterdir()}.keys() == set(
        written
    )
    assert isinstance(second.reference, CachedReference)
    assert torch.equal(second.reference.table_logps, torch.full((18,), -7.0))


def mark(folder: Path) -> None:
    import hashlib

    import numpy as np

    path = folder / "logps.npy"
    np.save(path, np.full_like(np.load(path), -7.0))
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["sha256"]["logps"] = hashlib.sha256(path.read_bytes()).hexdigest()
    (folder / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize(
    ("part", "change"),
    [
        ("weights", {"seed": 1}),
        ("data", {"playground": PlaygroundSettings(num_rows=8, num_val_rows=4, long_prompts=0.0)}),
        ("tokenizer", {"max_length": 400}),
        ("precision", {"precision": "bf16-mixed"}),
    ],
)
def test_R5_a_stale_cache_in_a_folder_of_ones_own_raises_and_names_the_part(
    tiny_model: TinyModel, tmp_path: Path, part: str, change: dict[str, Any]
) -> None:
    folder = str(tmp_path / "mine")
    fit(
        Losses(policy(tiny_model), reference="cache", reference_cache=folder, optimizer=STEADY),
        preference_data(tmp_path),
        tmp_path,
    )
    assert sorted(path.name for path in (tmp_path / "mine").iterdir()) == ["train", "val"]
    settings = {"precision": change.pop("precision")} if "precision" in change else {}
    model = policy(tiny_model, change.pop("seed", 0))
    module = Losses(model, reference="cache", reference_cache=folder, optimizer=STEADY)
    with pytest.raises(ValueError, match=f"The reference cache in .*mine/train is stale: .*`{part}` was"):
        fit(module, preference_data(tmp_path, **change), tmp_path, **settings)


def test_in_our_own_folder_a_change_makes_another_cache(tiny_model: TinyModel, tmp_path: Path) -> None:
    for seed in (0, 1):
        module = Losses(policy(tiny_model, seed), reference="cache", optimizer=STEADY)
        fit(module, preference_data(tmp_path), tmp_path)
    assert len(cache_folders(tmp_path)) == 4


def test_another_model_can_be_cached(tiny_model: TinyModel, tmp_path: Path) -> None:
    policy(tiny_model, 5).save_pretrained(tmp_path / "other")
    losses = []
    for kind in ("cache", "copy"):
        module = Losses(policy(tiny_model), reference=kind, reference_model=str(tmp_path / "other"), optimizer=STEADY)  # type: ignore[arg-type]
        losses.append(fit(module, preference_data(tmp_path), tmp_path))
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(*losses, strict=True))
    assert (losses[0][0] - 0.6931).abs().max() > 1e-3, "the policy does not start at this reference"


@pytest.mark.filterwarnings("ignore:Total length of `list` across ranks is zero")
def test_without_validation_rows_there_is_one_cache(tiny_model: TinyModel, tmp_path: Path) -> None:
    module = Losses(policy(tiny_model), reference="cache", optimizer=STEADY)
    data = preference_data(tmp_path, playground=PlaygroundSettings(num_rows=6, num_val_rows=0, long_prompts=0.0))
    fit(module, data, tmp_path)
    assert module.val_reference is None
    assert len(cache_folders(tmp_path)) == 1


def test_a_run_that_was_cut_off_in_its_pass_is_done_again(tiny_model: TinyModel, tmp_path: Path) -> None:
    fit(Losses(policy(tiny_model), reference="cache", optimizer=STEADY), preference_data(tmp_path), tmp_path)
    complete = cache_folders(tmp_path)
    shutil.rmtree(complete[0])
    fit(Losses(policy(tiny_model), reference="cache", optimizer=STEADY), preference_data(tmp_path), tmp_path)
    assert cache_folders(tmp_path) == complete


@pytest.mark.parametrize("wrapped", [False, True])
def test_a_cache_needs_preference_data(
    tiny_model: TinyModel, random_groups: Callable[..., list[PromptGroup]], tmp_path: Path, wrapped: bool
) -> None:
    batches = [GroupBatch.from_groups(random_groups())]
    loader: Any = torch.utils.data.DataLoader(batches, batch_size=None)  # type: ignore[arg-type,var-annotated]
    data = L.LightningDataModule.from_datasets(batches, batch_size=1) if wrapped else loader  # type: ignore[arg-type]
    found = "LightningDataModule" if wrapped else "NoneType"
    with pytest.raises(TypeError, match=f"made from the data set of a PreferenceData, but the trainer has .*{found}.*'copy'"):
        fit(Losses(tiny_model(), reference="cache"), data, tmp_path)


def test_low_precision_weights_leave_the_cached_numbers_as_they_are(tiny_model: TinyModel, tmp_path: Path) -> None:
    module = Losses(policy(tiny_model), reference="cache", optimizer=STEADY)
    fit(module, preference_data(tmp_path), tmp_path, precision="bf16-true")
    assert isinstance(module.reference, CachedReference)
    assert module.reference.table_logps.dtype == torch.float32
