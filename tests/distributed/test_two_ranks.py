"""Two processes with half the rows each do what one process does with all of them: real DDP over gloo, one model each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import lightning as L
import numpy as np
import pytest
import torch
from gloo_ranks import launched
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM
from update_witness import Witness, rows_of_updates, trainer_of_ranks

from lightning_pref.callbacks import GoldReward, Throughput
from lightning_pref.data.datamodule import PreferenceData
from lightning_pref.data.groups import GroupBatch, PromptGroup
from lightning_pref.data.playground_source import PlaygroundSettings
from lightning_pref.data.playground_tokenizer import playground_tokenizer
from lightning_pref.data.sampler import GroupBatches, GroupBatchSampler
from lightning_pref.data.store import GroupStore, GroupStoreWriter
from lightning_pref.models.reference_cache import CachedReference
from lightning_pref.modules import DPOModule, SFTModule
from lightning_pref.modules.optimisation import OptimizerSettings
from lightning_pref.modules.policy import PolicyModule
from lightning_pref.reports import RunRecord

pytestmark = pytest.mark.slow

RANKS = 2
NUM_ROWS = 13
# A large eps keeps Adam near the gradient; else a rounding error in a gradient of nearly 0 would decide a whole step.
MOVING = OptimizerSettings(learning_rate=1e-2, eps=0.1, schedule="constant", warmup=0)
# No update moves the model, so that what is seen in every update can be computed again afterwards.
STILL = OptimizerSettings(learning_rate=1e-12, schedule="constant", warmup=0)

Result = dict[str, Any]


def build(kind: str, folder: Path, optimizer: OptimizerSettings) -> PolicyModule:
    """The module of a kind, the policy being another model than the reference, so that nothing is trivially 0."""
    policy, reference = str(folder / "policy"), str(folder / "reference")
    if kind.startswith("sft"):
        return SFTModule(policy, normalize="token" if kind == "sft-token" else "sequence", optimizer=optimizer)
    return DPOModule(policy, loss=kind, beta=0.5, reference_model=reference, optimizer=optimizer)


def loader(store: Path, rank: int, ranks: int, *, batch_size: int, accumulate: int, shuffle: bool) -> DataLoader[Any]:
    batches = GroupBatches(GroupStore(store))
    sampler = GroupBatchSampler(
        batches, num_replicas=ranks, rank=rank, batch_size=batch_size, accumulate=accumulate, shuffle=shuffle
    )
    return DataLoader(batches, batch_size=None, sampler=sampler)


def still_run(kind: str, accumulate: int, folder: Path, rank: int, ranks: int) -> Result:
    """One epoch that leaves the weights alone, with validation."""
    witness, record = Witness(), RunRecord()
    module = build(kind, folder, STILL)
    baselines: list[Tensor] = []
    if isinstance(module, DPOModule) and kind == "kto":
        measure = module._kto_baseline
        module._kto_baseline = lambda batch: baselines.append(measure(batch)) or baselines[-1]  # type: ignore[assignment,func-returns-value,method-assign]
    store = folder / ("demonstrations" if kind.startswith("sft") else "pairs")
    data = [
        loader(store, rank, ranks, batch_size=4, accumulate=accumulate if shuffle else 1, shuffle=shuffle)
        for shuffle in (True, False)
    ]
    fit = trainer_of_ranks(folder, ranks, [witness], logger=[record], max_epochs=1, accumulate_grad_batches=accumulate)
    fit.fit(module, *data)
    threshold = module.bco_threshold if isinstance(module, DPOModule) else None
    return {
        "rows": witness.rows,
        "gradients": witness.gradients,
        "val": {key: value.item() for key, value in fit.callback_metrics.items() if key.startswith("val/")},
        "baselines": baselines,
        "threshold": None if threshold is None else (threshold.mean.item(), threshold.num_seen.item()),
    }


def moving_run(folder: Path, rank: int, ranks: int) -> Result:
    """Three updates of eight rows each, however many ranks share them, watched by every callback."""
    gold = GoldReward(["a", "bc", "def"], answer_by_weight, lambda prompt, response: float(len(prompt)), every_n_updates=2)
    record = RunRecord()
    module = build("sigmoid", folder, MOVING)
    data = loader(folder / "pairs", rank, ranks, batch_size=8 // ranks, accumulate=1, shuffle=False)
    fit = trainer_of_ranks(folder, ranks, [gold, Throughput()], logger=[record], max_steps=3, limit_train_batches=1, max_epochs=3)
    fit.fit(module, data)
    return {
        "weights": {name: parameter.detach() for name, parameter in module.policy.named_parameters()},
        "metrics": dict(record.metrics),
    }


def answer_by_weight(module: L.LightningModule, prompts: Sequence[str]) -> list[str]:
    return ["x"] * len(prompts)


def cached_run(folder: Path, rank: int, ranks: int) -> Result:
    """A reference cache that all ranks fill together."""
    data = PreferenceData(
        "playground:preference",
        tokenizer=playground_tokenizer(),
        playground=PlaygroundSettings(num_rows=7, num_val_rows=3, long_prompts=0.0),
        batch_size=2,
        cache_dir=str(folder / f"cache-{ranks}"),
    )
    module = DPOModule(str(folder / "speaker"), reference="cache", optimizer=STILL)
    trainer_of_ranks(folder, ranks, [], max_steps=1).fit(module, data)
    assert isinstance(module.reference, CachedReference)
    assert isinstance(module.val_reference, CachedReference)
    return {"train": module.reference.table_logps, "val": module.val_reference.table_logps, "key": module.reference.key}


STILL_RUNS = [("sft-token", 1), ("sft-token", 2), ("sft-sequence", 1), ("sigmoid", 1), ("sigmoid", 2), ("kto", 1), ("bco", 1)]


def everything(folder: Path, rank: int, ranks: int) -> dict[str, Result]:
    results = {f"{kind} x{accumulate}": still_run(kind, accumulate, folder, rank, ranks) for kind, accumulate in STILL_RUNS}
    return {**results, "moving": moving_run(folder, rank, ranks), "cached": cached_run(folder, rank, ranks)}


class Runs(NamedTuple):
    folder: Path
    groups: list[PromptGroup]
    ranks: list[dict[str, Result]]
    alone: dict[str, Result]


def small_model(seed: int, vocabulary: int) -> LlamaForCausalLM:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(LlamaConfig(vocab_size=vocabulary, max_position_embeddings=512, initializer_range=0.2, **sizes))


def ragged_pairs() -> list[PromptGroup]:
    generator = np.random.default_rng(0)

    def tokens() -> Any:
        return generator.integers(1, 64, size=generator.integers(2, 9))

    return [PromptGroup(row_id=row, prompt=tokens(), responses=(tokens(), tokens()), ranks=(0, 1)) for row in range(NUM_ROWS)]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    folder = tmp_path_factory.mktemp("ranks")
    groups = ragged_pairs()
    for name, ranks in (("pairs", (0, 1)), ("demonstrations", None)):
        with GroupStoreWriter(folder / name, vocab_size=64) as writer:
            for group in groups:
                writer.append(replace(group, ranks=ranks))
    vocabulary = max(playground_tokenizer().get_vocab().values()) + 1
    for seed, (name, size) in enumerate({"policy": 64, "reference": 64, "speaker": vocabulary}.items()):
        small_model(seed, size).save_pretrained(folder / name)
    return Runs(folder, groups, launched(everything, folder, RANKS), everything(folder, 0, 1))


def updates(runs: Runs, name: str) -> list[list[int]]:
    return rows_of_updates([result[name]["rows"] for result in runs.ranks])


def exact_gradient(module: PolicyModule, groups: list[PromptGroup]) -> Tensor:
    """Oracle: the rows in one batch in one process."""
    module.zero_grad()
    terms = module.terms(GroupBatch.from_groups(groups))
    ((terms.losses * terms.weights).sum() / terms.weights.sum()).backward()
    return torch.cat([p.grad.flatten() for p in module.parameters() if p.grad is not None])


@pytest.mark.parametrize("name", [f"{kind} x{accumulate}" for kind, accumulate in STILL_RUNS])
def test_N5_the_ranks_see_every_row_once_between_them(runs: Runs, name: str) -> None:
    assert sorted(row for update in updates(runs, name) for row in update) == list(range(NUM_ROWS))


@pytest.mark.parametrize("name", ["sft-token x1", "sft-token x2", "sft-sequence x1", "sigmoid x1", "sigmoid x2"])
def test_N2_the_gradient_of_every_update_is_that_of_one_process_on_all_its_rows(runs: Runs, name: str) -> None:
    kind = name.split(maxsplit=1)[0]
    module = build(kind, runs.folder, STILL)
    module.configure_model()
    groups = [replace(group, ranks=None if kind.startswith("sft") else group.ranks) for group in runs.groups]
    found = updates(runs, name)
    assert len(found) == (1 if name.endswith("x2") else 2)
    for number, rows in enumerate(found):
        expected = exact_gradient(module, [groups[row] for row in rows])
        for rank in range(RANKS):
            seen = runs.ranks[rank][name]["gradients"][number]
            assert torch.allclose(seen, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["sft-token x1", "sigmoid x1", "kto x1", "bco x1"])
def test_N5_validation_metrics_are_those_of_one_process_on_every_rank(runs: Runs, name: str) -> None:
    first, second = (runs.ranks[rank][name]["val"] for rank in range(RANKS))
    assert first == second
    alone = runs.alone[name]["val"]
    assert set(first) == set(alone)
    # KTO's baseline, and so its loss, depends on which prompts are neighbours in a batch.
    assert len(first) > 1
    for key in set(first) - ({"val/loss"} if name.startswith("kto") else set()):
        assert first[key] == pytest.approx(alone[key], rel=1e-5), key


def test_F7_the_baseline_of_kto_is_one_number_from_the_unrelated_pairs_of_all_ranks(runs: Runs) -> None:
    first, second = (runs.ranks[rank]["kto x1"]["baselines"] for rank in range(RANKS))
    assert first == second
    assert len(first) == 4, "two updates and two batches of validation"
    policy, reference = (LlamaForCausalLM.from_pretrained(runs.folder / name) for name in ("policy", "reference"))
    for number in range(2):
        ratios = []
        for rank in range(RANKS):
            (rows,) = runs.ranks[rank]["kto x1"]["rows"][number]
            own = [runs.groups[row] for row in rows]
            if len(own) > 1:
                unrelated = [(group.prompt, own[i - 1].responses) for i, group in enumerate(own)]
                ratios += [logp(policy, p, r) - logp(reference, p, r) for p, responses in unrelated for r in responses]
        assert first[number].item() == pytest.approx(max(0.0, sum(ratios) / len(ratios)), rel=1e-4, abs=1e-5)


@torch.no_grad()
def logp(model: LlamaForCausalLM, prompt: Any, response: Any) -> float:
    ids = torch.tensor([[*prompt.tolist(), *response.tolist()]])
    logps = model(ids).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
    return float(logps.gather(1, ids[0, len(prompt) :, None]).sum())


def test_F7_the_threshold_of_bco_is_the_mean_reward_over_all_ranks(runs: Runs) -> None:
    policy, reference = (LlamaForCausalLM.from_pretrained(runs.folder / name) for name in ("policy", "reference"))
    rewards = [
        0.5 * (logp(policy, group.prompt, response) - logp(reference, group.prompt, response))
        for group in runs.groups
        for response in group.responses
    ]
    for result in (*runs.ranks, runs.alone):
        mean, count = result["bco x1"]["threshold"]
        assert count == 2 * NUM_ROWS
        assert mean == pytest.approx(sum(rewards) / len(rewards), rel=1e-4)
    assert runs.ranks[0]["bco x1"]["threshold"] == runs.ranks[1]["bco x1"]["threshold"]


def test_R7_after_training_the_weights_are_equal_on_all_ranks_and_those_of_one_process(runs: Runs) -> None:
    first, second, alone = (result["moving"]["weights"] for result in (*runs.ranks, runs.alone))
    start = LlamaForCausalLM.from_pretrained(runs.folder / "policy").state_dict()
    for name in first:
        assert torch.equal(first[name], second[name])
        assert torch.allclose(first[name], alone[name], atol=1e-6)
    assert max((first[name] - start[name]).abs().max() for name in first) > 1e-3, "there was something to compare"


def test_every_rank_measures_its_share_and_all_of_them_together_are_logged(runs: Runs) -> None:
    metrics = runs.ranks[0]["moving"]["metrics"]
    assert metrics["gold_reward"].last == 2.0, "the mean length of the prompts of both ranks"
    assert metrics["throughput/rows_per_second"].last > 0
    assert metrics["loss"] == pytest.approx(runs.alone["moving"]["metrics"]["loss"], rel=1e-4)


def test_a_reference_cache_of_two_ranks_is_that_of_one(runs: Runs) -> None:
    first, second, alone = (result["cached"] for result in (*runs.ranks, runs.alone))
    assert first["key"] == second["key"] == alone["key"]
    for part, size in (("train", 14), ("val", 6)):
        assert torch.equal(first[part], second[part])
        assert len(first[part]) == size
        assert torch.allclose(first[part], alone[part], atol=1e-4)
