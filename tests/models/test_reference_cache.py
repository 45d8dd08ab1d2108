from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from lightning_pref.data.groups import GroupBatch, PromptGroup
from lightning_pref.models import digests
from lightning_pref.models.adapters import LoraSettings, add_lora
from lightning_pref.models.backbones import load_model
from lightning_pref.models.digests import ReferenceDigest, config_digest, reference_digest, weights_digest
from lightning_pref.models.reference import summed_logps
from lightning_pref.models.reference_cache import (
    CachedReference,
    compute_reference_cache,
    merge_parts,
    read_reference_cache,
    write_part,
)

Build = Callable[..., LlamaForCausalLM]
Groups = Callable[..., list[PromptGroup]]
DIGEST = ReferenceDigest(weights="w", config="c", tokenizer="t", data="d", precision="32-true", attention="sdpa")


@pytest.fixture
def batches(random_groups: Groups) -> list[GroupBatch]:
    """Six groups in three batches, the last first, with their ids in the whole dataset."""
    groups = random_groups(6)
    return [
        GroupBatch.from_groups(groups[start : start + 2], response_ids=range(2 * start, 2 * start + 4)) for start in (4, 0, 2)
    ]


def test_the_cache_gives_each_response_its_own_log_prob(
    tmp_path: Path, tiny_model: Build, random_groups: Groups, batches: list[GroupBatch]
) -> None:
    model = tiny_model()
    compute_reference_cache(model, batches, 12, tmp_path / "cache", DIGEST)
    reference = CachedReference(read_reference_cache(tmp_path / "cache", DIGEST))
    for i, group in enumerate(random_groups(6)):
        alone = GroupBatch.from_groups([group], response_ids=[2 * i, 2 * i + 1])
        torch.testing.assert_close(reference.logps(alone), summed_logps(model, alone), atol=1e-5, rtol=1e-6)
    assert [entry.name for entry in tmp_path.iterdir()] == ["cache"]


def test_R2_the_pass_leaves_modes_gradients_and_random_state(
    tmp_path: Path, tiny_model: Build, batches: list[GroupBatch]
) -> None:
    model = tiny_model(attention_dropout=0.5).train()
    model.model.layers[0].eval()
    modes, state = [module.training for module in model.modules()], torch.get_rng_state()
    for name in ("first", "second"):
        compute_reference_cache(model, batches, 12, tmp_path / name, DIGEST)
    tables = [read_reference_cache(tmp_path / name, DIGEST) for name in ("first", "second")]
    assert torch.equal(tables[0].logps, tables[1].logps)
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_two_ranks_write_what_one_process_writes(tmp_path: Path, tiny_model: Build, batches: list[GroupBatch]) -> None:
    model = tiny_model()
    compute_reference_cache(model, batches, 12, tmp_path / "one", DIGEST)
    for rank, share in enumerate((batches[:2], batches[2:])):
        write_part(model, share, tmp_path / "two", DIGEST, rank=rank, num_ranks=2)
    merge_parts(tmp_path / "two", DIGEST, num_responses=12, num_ranks=2)
    one, two = (read_reference_cache(tmp_path / name, DIGEST) for name in ("one", "two"))
    assert torch.equal(one.logps, two.logps)
    assert torch.equal(one.lengths, two.lengths)


def test_a_rank_without_batches_writes_an_empty_part(tmp_path: Path, tiny_model: Build, batches: list[GroupBatch]) -> None:
    for rank, share in enumerate((batches, [])):
        write_part(tiny_model(), share, tmp_path / "cache", DIGEST, rank=rank, num_ranks=2)
    merge_parts(tmp_path / "cache", DIGEST, num_responses=12, num_ranks=2)
    assert len(read_reference_cache(tmp_path / "cache", DIGEST).logps) == 12


def test_a_missing_part_names_its_rank(tmp_path: Path, tiny_model: Build, batches: list[GroupBatch]) -> None:
    write_part(tiny_model(), batches, tmp_path / "cache", DIGEST, rank=0, num_ranks=2)
    with pytest.raises(FileNotFoundError, match="part of rank 1 of 2"):
        merge_parts(tmp_path / "cache", DIGEST, num_responses=12, num_ranks=2)


def test_R4_missing_responses_raise_instead_of_counting_as_zero(
    tmp_path: Path, tiny_model: Build, batches: list[GroupBatch]
) -> None:
    with pytest.raises(ValueError, match="no finite log-prob for 4 of 12 responses, the first being response 0"):
        compute_reference_cache(tiny_model(), [batches[0], batches[2]], 12, tmp_path / "cache", DIGEST)
    assert not (tmp_path / "cache").exists()


def test_R4_a_log_prob_that_is_no_number_raises(tmp_path: Path, tiny_model: Build, batches: list[GroupBatch]) -> None:
    def overflowing(_: object, batch: GroupBatch) -> Tensor:
        return torch.where(batch.response_ids == 7, torch.nan, 0.0)

    with pytest.raises(ValueError, match="for 1 of 12 responses, the first being response 7"):
        compute_reference_cache(tiny_model(), batches, 12, tmp_path / "cache", DIGEST, score=overflowing)


def test_batches_of_a_larger_dataset_are_refused(tmp_path: Path, tiny_model: Build, batches: list[GroupBatch]) -> None:
    with pytest.raises(ValueError, match="scored response ids 0 to 11, but the dataset has 8 responses"):
        compute_reference_cache(tiny_model(), batches, 8, tmp_path / "cache", DIGEST)


@pytest.mark.parametrize("part", ["weights", "config", "tokenizer", "data", "precision", "attention", "definition"])
def test_R5_a_stale_cache_raises_and_names_what_changed(
    tmp_path: Path, tiny_model: Build, batches: list[GroupBatch], part: str
) -> None:
    compute_reference_cache(tiny_model(), batches, 12, tmp_path / "cache", DIGEST)
    changed = replace(DIGEST, **{part: "new"})
    with pytest.raises(ValueError, match=rf"is stale: `{part}` was '.*', is 'new'\. "):
        read_reference_cache(tmp_path / "cache", changed)
    assert changed.key != DIGEST.key


def test_R5_the_digest_follows_weights_adapter_and_architecture(tiny_model: Build) -> None:
    model = tiny_model()
    same = weights_digest(model)
    assert weights_digest(tiny_model()) == same
    assert weights_digest(tiny_model(seed=1)) != same
    assert weights_digest(tiny_model().to(torch.bfloat16)) != same
    with torch.no_grad():
        model.lm_head.weight[-1, -1] += 1e-3
    assert weights_digest(model) != same

    adapted = add_lora(tiny_model(), LoraSettings(r=2))
    assert weights_digest(adapted) == same
    with torch.no_grad():
        next(weight for name, weight in adapted.named_parameters() if "lora_B" in name)[0, 0] = 1.0
    assert weights_digest(adapted) != same

    assert config_digest(tiny_model(seed=1)) == config_digest(tiny_model())
    assert config_digest(tiny_model(attention_dropout=0.5)) == config_digest(tiny_model())
    assert config_digest(tiny_model(rms_norm_eps=1e-3)) != config_digest(tiny_model())


def test_R5_equal_bytes_of_another_shape_or_type_are_another_weight() -> None:
    zeros = [torch.zeros(2, 3), torch.zeros(3, 2), torch.zeros(2, 3, dtype=torch.int32)]
    assert len({digests._tensor_digest(tensor) for tensor in zeros}) == 3


def test_R5_the_digest_survives_saving_and_loading(tmp_path: Path, tiny_model: Build) -> None:
    def digest(model: LlamaForCausalLM) -> ReferenceDigest:
        return reference_digest(model, tokenizer="t", data="d", precision="32-true")

    tiny_model().save_pretrained(tmp_path)
    assert digest(load_model(str(tmp_path))) == digest(tiny_model())
    eager = digest(load_model(str(tmp_path), attn_implementation="eager"))
    assert eager == replace(digest(tiny_model()), attention="eager")


def test_a_truncated_file_is_found(tmp_path: Path, tiny_model: Build, batches: list[GroupBatch]) -> None:
    compute_reference_cache(tiny_model(), batches, 12, tmp_path / "cache", DIGEST)
    table = tmp_path / "cache" / "logps.npy"
    table.write_bytes(table.read_bytes()[:-4])
    with pytest.raises(ValueError, match=r"damaged: .*logps\.npy is missing, cut short or altered.*Delete the folder"):
        read_reference_cache(tmp_path / "cache", DIGEST)


def test_an_altered_number_is_found(tmp_path: Path, tiny_model: Build, batches: list[GroupBatch]) -> None:
    compute_reference_cache(tiny_model(), batches, 12, tmp_path / "cache", DIGEST)
    np.save(tmp_path / "cache" / "logps.npy", np.zeros(12, dtype=np.float32))
    with pytest.raises(ValueError, match="damaged"):
        read_reference_cache(tmp_path / "cache", DIGEST)


def test_a_damaged_manifest_is_found(tmp_path: Path, tiny_model: Build, batches: list[GroupBatch]) -> None:
    compute_reference_cache(tiny_model(), batches, 12, tmp_path / "cache", DIGEST)
    manifest = tmp_path / "cache" / "manifest.json"
    assert json.loads(manifest.read_text())["num_responses"] == 12
    manifest.write_text(manifest.read_text()[:30])
    with pytest.raises(ValueError, match=r"damaged: .*manifest\.json"):
        read_reference_cache(tmp_path / "cache", DIGEST)


def test_no_cache_is_said_so(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="There is no reference cache in"):
        read_reference_cache(tmp_path / "cache", DIGEST)


def test_a_batch_of_another_dataset_is_refused_in_every_mode(
    tmp_path: Path, tiny_model: Build, random_groups: Groups, batches: list[GroupBatch]
) -> None:
    compute_reference_cache(tiny_model(), batches, 12, tmp_path / "cache", DIGEST)
    reference = CachedReference(read_reference_cache(tmp_path / "cache", DIGEST))
    reference.logps(batches[0])
    validation = GroupBatch.from_groups(random_groups(2, seed=9))
    reference.eval()
    with pytest.raises(ValueError, match="does not belong to the dataset of the reference cache"):
        reference.logps(validation)
    with pytest.raises(ValueError, match=r"up to 20.*not among its 12 responses"):
        reference.logps(GroupBatch.from_groups(random_groups(1), response_ids=[19, 20]))


def test_the_table_moves_with_the_module_but_stays_out_of_checkpoints(
    tmp_path: Path, tiny_model: Build, batches: list[GroupBatch]
) -> None:
    compute_reference_cache(tiny_model(), batches, 12, tmp_path / "cache", DIGEST)
    reference = CachedReference(read_reference_cache(tmp_path / "cache", DIGEST))
    assert reference.to("meta").table_logps.device.type == "meta"
    assert list(reference.state_dict()) == ["_extra_state"]
    other = CachedReference(read_reference_cache(tmp_path / "cache", DIGEST)._replace(key="other"))
    with pytest.raises(ValueError, match="trained against the reference"):
        other.load_state_dict(reference.state_dict())
