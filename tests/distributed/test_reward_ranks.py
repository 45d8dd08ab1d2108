"""Reward models on two ranks that share ragged data are those of one process."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import pytest
import torch
from gloo_ranks import launched
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM
from update_witness import Witness, rows_of_updates, trainer_of_ranks

from lightning_pref.callbacks.reward_variance import RewardVarianceMonitor
from lightning_pref.data.groups import GroupBatch, PromptGroup
from lightning_pref.data.sampler import GroupBatches, GroupBatchSampler
from lightning_pref.data.store import GroupStore, GroupStoreWriter
from lightning_pref.models.adapters import LoraSettings
from lightning_pref.modules.optimisation import OptimizerSettings
from lightning_pref.modules.reward import RewardModule

pytestmark = pytest.mark.slow

RANKS = 2
NUM_ROWS = 13
STILL = OptimizerSettings(learning_rate=1e-12, schedule="constant", warmup=0)
MOVING = OptimizerSettings(learning_rate=1e-2, eps=0.1, schedule="constant", warmup=0)

KINDS: dict[str, dict[str, Any]] = {
    "bradley_terry": {"num_members": 2, "center": 0.01},
    "regression": {"loss": "regression"},
    "step_bce": {"loss": "step_bce"},
}

Result = dict[str, Any]


def ragged_groups(kind: str) -> list[PromptGroup]:
    """Rows of ragged lengths, of two sources, whose first source is on the first rows only."""
    generator = np.random.default_rng(0)

    def tokens() -> Any:
        return generator.integers(1, 64, size=generator.integers(3, 9))

    groups = []
    for row in range(NUM_ROWS):
        source = "first" if row < 3 else "second"
        group = PromptGroup(row_id=row, prompt=tokens(), responses=(tokens(), tokens()), source=source)
        if kind == "step_bce":
            response = group.responses[0]
            ends = ((1, len(response) - 1),) if row % 2 else ((len(response) - 1,),)
            labels = ((True, False),) if row % 2 else ((row % 4 == 0,),)
            groups.append(replace(group, responses=(response,), step_ends=ends, step_labels=labels))
        else:
            groups.append(replace(group, ranks=(0, 1), scores=(float(generator.normal()), -2.0)))
    return groups


def loader(folder: Path, rank: int, ranks: int, *, batch_size: int, shuffle: bool) -> DataLoader[Any]:
    batches = GroupBatches(GroupStore(folder))
    sampler = GroupBatchSampler(batches, num_replicas=ranks, rank=rank, batch_size=batch_size, accumulate=1, shuffle=shuffle)
    return DataLoader(batches, batch_size=None, sampler=sampler)


def everything(folder: Path, rank: int, ranks: int) -> dict[str, Result]:
    results: dict[str, Result] = {}
    for name, options in {"full": {}, "lora": {"lora": LoraSettings(r=2)}}.items():
        # Ranks that were seeded apart, and nothing that would make their weights equal afterwards.
        torch.manual_seed(rank)
        fresh = RewardModule(str(folder / "model"), **options)
        fresh.configure_model()
        head = [p.detach() for key, p in fresh.named_parameters() if "score" in key and p.requires_grad]
        results[f"fresh {name}"] = {"head": head}
    for kind, options in KINDS.items():
        witness = Witness()
        module = RewardModule(str(folder / "model"), optimizer=STILL, **options)
        data = [loader(folder / kind, rank, ranks, batch_size=4, shuffle=shuffle) for shuffle in (True, False)]
        fit = trainer_of_ranks(folder, ranks, [witness, RewardVarianceMonitor()], max_epochs=1)
        fit.fit(module, *data)
        val = {key: value.item() for key, value in fit.callback_metrics.items() if key.startswith("val/")}
        results[kind] = {"rows": witness.rows, "gradients": witness.gradients, "val": val}
    moving = RewardModule(str(folder / "model"), num_members=2, optimizer=MOVING)
    data = [loader(folder / "bradley_terry", rank, ranks, batch_size=8 // ranks, shuffle=False)]
    trainer_of_ranks(folder, ranks, [], max_steps=3, limit_train_batches=1, max_epochs=3).fit(moving, *data)
    results["moving"] = {"weights": {name: parameter.detach() for name, parameter in moving.named_parameters()}}
    return results


class Runs(NamedTuple):
    folder: Path
    ranks: list[dict[str, Result]]
    alone: dict[str, Result]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    folder = tmp_path_factory.mktemp("ranks")
    for kind in KINDS:
        with GroupStoreWriter(folder / kind, vocab_size=64) as writer:
            for group in ragged_groups(kind):
                writer.append(group)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        LlamaForCausalLM(LlamaConfig(vocab_size=64, initializer_range=0.2, **sizes)).save_pretrained(folder / "model")
    return Runs(folder, launched(everything, folder, RANKS), everything(folder, 0, 1))


@pytest.mark.parametrize("name", ["full", "lora"])
def test_W2_heads_are_equal_before_the_first_step_on_ranks_that_were_seeded_apart(runs: Runs, name: str) -> None:
    first, second, alone = (result[f"fresh {name}"]["head"] for result in (*runs.ranks, runs.alone))
    assert len(first) == 1
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[0], alone[0])


def updates(runs: Runs, kind: str) -> list[list[int]]:
    return rows_of_updates([result[kind]["rows"] for result in runs.ranks])


@pytest.mark.parametrize("kind", KINDS)
def test_N2_the_gradient_of_every_update_is_that_of_one_process_on_all_its_rows(runs: Runs, kind: str) -> None:
    found = updates(runs, kind)
    assert sorted(row for rows in found for row in rows) == list(range(NUM_ROWS))
    groups = ragged_groups(kind)
    module = RewardModule(str(runs.folder / "model"), **KINDS[kind])
    module.configure_model()
    for number, rows in enumerate(found):
        module.zero_grad()
        terms = module.terms(GroupBatch.from_groups([groups[row] for row in rows]))
        ((terms.losses * terms.weights).sum() / terms.weights.sum()).backward()
        expected = torch.cat([p.grad.flatten() for p in module.parameters() if p.grad is not None])
        for rank in range(RANKS):
            torch.testing.assert_close(runs.ranks[rank][kind]["gradients"][number], expected, rtol=1e-4, atol=1e-6)
        assert expected.abs().max() > 1e-2


@pytest.mark.parametrize("kind", KINDS)
def test_N5_every_number_of_a_validation_is_that_of_one_process_on_every_rank(runs: Runs, kind: str) -> None:
    first, second, alone = (cast("dict[str, float]", result[kind]["val"]) for result in (*runs.ranks, runs.alone))
    assert first.keys() == second.keys() == alone.keys()
    wanted = {"val/loss", "val/rewards/accuracies", "val/rewards/std"}
    if kind != "step_bce":
        wanted |= {"val/rewards/accuracies/first", "val/rewards/calibration_error", "val/rewards/length_correlation"}
        wanted |= {"val/reward_variance/within_prompt"}
    assert wanted <= first.keys()
    for key in first:
        assert first[key] == pytest.approx(second[key], nan_ok=True), key
        assert first[key] == pytest.approx(alone[key], rel=1e-4, abs=1e-6, nan_ok=True), key


def test_R7_after_training_the_weights_are_equal_on_all_ranks_and_those_of_one_process(runs: Runs) -> None:
    first, second, alone = (result["moving"]["weights"] for result in (*runs.ranks, runs.alone))
    start = RewardModule(str(runs.folder / "model"), num_members=2)
    start.configure_model()
    for name in first:
        assert torch.equal(first[name], second[name])
        torch.testing.assert_close(first[name], alone[name], atol=1e-6, rtol=1e-5)
    moved = max(float((first[name] - value.detach()).abs().max()) for name, value in start.named_parameters())
    assert moved > 1e-3, "there was something to compare"
