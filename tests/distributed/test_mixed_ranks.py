"""FSDP2 with mixed precision, and with a reference cache: two real gloo processes against one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from gloo_ranks import launched
from shared_runs import MOVING, Result, by_hand, model, shared_run, trainer_of, weights, write_rows
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from lightning_pref.data.datamodule import PreferenceData
from lightning_pref.data.groups import GroupBatch
from lightning_pref.data.playground_source import PlaygroundSettings
from lightning_pref.data.playground_tokenizer import playground_tokenizer
from lightning_pref.models.adapters import LoraSettings
from lightning_pref.models.reference_cache import CachedReference
from lightning_pref.modules import DPOModule

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

MIXED = ["sft", "reward lora", "dpo", "grpo"]
# By name: LoRA, precision, and the reference that needs no cache.
CACHED: dict[str, tuple[LoraSettings | None, str, str]] = {
    "all weights": (None, "32-true", "copy"),
    "lora": (LoraSettings(r=2), "32-true", "adapter"),
    "mixed": (None, "bf16-mixed", "copy"),
}
ROWS = PlaygroundSettings(num_rows=9, num_val_rows=5, long_prompts=0.0)


def everything(folder: Path, rank: int, ranks: int) -> dict[str, Any]:
    """All that these processes do one after the other, since starting them takes longer than most of it."""
    return {
        "mixed": {case: shared_run(case, "fsdp2", folder, rank, ranks, precision="bf16-mixed") for case in MIXED},
        "cached": {name: [dpo_run(folder, ranks, name, kind) for kind in ("cache", CACHED[name][2])] for name in CACHED},
    }


def preference_data(folder: Path) -> PreferenceData:
    options: dict[str, Any] = {"playground": ROWS, "batch_size": 2, "tokenizer": playground_tokenizer()}
    return PreferenceData("playground:preference", cache_dir=str(folder / "cache"), **options)


def dpo_run(folder: Path, ranks: int, name: str, kind: Any) -> Result:
    """Two epochs on nine pairs, with what the reference says of all of them where it is cached."""
    lora, precision, _ = CACHED[name]
    torch.manual_seed(0)
    module, data = DPOModule(model(), reference=kind, lora=lora, optimizer=MOVING, beta=0.5), preference_data(folder)
    trainer = trainer_of(folder, "fsdp2", ranks, max_epochs=2, precision=precision)
    trainer.fit(module, data)
    is_cached = isinstance(module.reference, CachedReference)
    return {
        "split": any(isinstance(parameter, DTensor) for parameter in module.policy.parameters()),
        "weights": weights(trainer, module.policy),
        "metrics": {key: value.item() for key, value in trainer.callback_metrics.items()},
        "reference": module.reference.logps(rows_of(data)) if is_cached else None,  # type: ignore[union-attr]
    }


def rows_of(data: PreferenceData) -> GroupBatch:
    return GroupBatch.from_groups([data.train_table[row] for row in range(len(data.train_table))])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("ranks")
    write_rows(place)
    return place


@pytest.fixture(scope="module")
def ranks(folder: Path) -> list[dict[str, Any]]:
    return launched(everything, folder, 2)


def updates_of(results: list[Result]) -> list[list[Any]]:
    """The batches of every update, of all ranks."""
    each = [result["updates"] for result in results]
    return [[batch for windows in together for batch in windows] for together in zip(*each, strict=True)]


def flat(gradients: dict[str, Tensor]) -> Tensor:
    return torch.cat([gradients[name].flatten() for name in sorted(gradients)])


@pytest.mark.parametrize("case", MIXED)
def test_N2_R8_gradients_under_bf16_mixed_are_those_of_one_process_and_weights_stay_in_float32(
    ranks: list[dict[str, Any]], folder: Path, case: str
) -> None:
    """Products of bfloat16 have three digits, and a sum over two ranks rounds twice where one process rounds once."""
    results = [found["mixed"][case] for found in ranks]
    updates = updates_of(results)
    mixed, plain = (by_hand(case, updates, mixed=given) for given in (True, False))
    for result in results:
        assert len(result["gradients"]) == len(updates) > 2
        for found, wanted in zip(result["gradients"], mixed["gradients"], strict=True):
            assert found.keys() == wanted.keys()
            assert (flat(found) - flat(wanted)).norm() <= 0.03 * flat(wanted).norm()
        assert {weight.dtype for weight in result["weights"].values()} == {torch.float32}
    first, second = (result["weights"] for result in results)
    assert all(torch.equal(weight, second[name]) for name, weight in first.items())
    for name, weight in mixed["weights"].items():
        torch.testing.assert_close(first[name], weight, rtol=1e-2, atol=1e-3)
    differs = (flat(results[0]["gradients"][0]) - flat(plain["gradients"][0])).norm() / flat(plain["gradients"][0]).norm()
    assert differs > 1e-3, "the products were in bfloat16"
    kind = AutoModelForSequenceClassification if case.startswith("reward") else AutoModelForCausalLM
    exported = kind.from_pretrained(folder / f"export fsdp2 2 {case}")
    ids = torch.tensor([[3, 4, 5, 6]])
    with torch.no_grad():
        torch.testing.assert_close(exported(ids).logits, mixed["module"].trained(ids).logits, rtol=3e-2, atol=3e-2)


@pytest.mark.parametrize("name", CACHED)
def test_R8_a_reference_cache_under_fsdp2_trains_as_the_reference_itself_does(ranks: list[dict[str, Any]], name: str) -> None:
    for found in ranks:
        cached, held = found["cached"][name]
        assert cached["split"] and held["split"]
        assert cached["metrics"].keys() == held["metrics"].keys()
        for key, value in held["metrics"].items():
            assert cached["metrics"][key] == pytest.approx(value, rel=1e-3, abs=1e-4), key
        for key, weight in held["weights"].items():
            torch.testing.assert_close(cached["weights"][key], weight, rtol=1e-3, atol=1e-4)
    moved = ranks[0]["cached"]["all weights"][0]["weights"]["lm_head.weight"]
    assert not torch.allclose(moved, model().lm_head.weight, atol=1e-3)


@pytest.mark.parametrize("name", CACHED)
def test_R8_both_ranks_read_the_log_probs_of_the_whole_model(ranks: list[dict[str, Any]], folder: Path, name: str) -> None:
    data = preference_data(folder)
    data.prepare_data()
    data.setup("fit")
    whole, expected = model().eval(), []
    for row in range(len(data.train_table)):
        group = data.train_table[row]
        for response in group.responses:
            ids = torch.tensor([[*group.prompt.tolist(), *response.tolist()]])
            with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=name == "mixed"):
                logps = whole(ids).logits[0, :-1].float().log_softmax(-1)
            expected.append(logps.gather(1, ids[0, 1:, None])[len(group.prompt) - 1 :].sum())
    wanted = torch.stack(expected)
    rtol, atol = (2e-2, 1.0) if name == "mixed" else (1e-4, 1e-3)
    for found in ranks:
        torch.testing.assert_close(found["cached"][name][0]["reference"], wanted, rtol=rtol, atol=atol)
    assert wanted.std() > 1.0
