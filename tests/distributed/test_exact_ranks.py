"""Several processes do what one does with all their rows, whatever splits the model: real gloo processes, every module."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from gloo_ranks import launched
from lightning.pytorch.strategies import ModelParallelStrategy
from rewarded import Rewarded, healthy
from shared_runs import (
    CASES,
    NUM_ROWS,
    FlatStrategy,
    Result,
    by_hand,
    complaint,
    dpo,
    is_rlhf,
    loader,
    model,
    reward,
    seen_rows,
    sft,
    shared_run,
    trainer_of,
    write_rows,
)
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from lightning_pref.callbacks import RewardVarianceMonitor
from lightning_pref.models.reference import EmaSettings
from lightning_pref.models.sharding import shard
from lightning_pref.rollouts.engines.generate import CachedSampler
from lightning_pref.rollouts.lockstep import any_process
from lightning_pref.rollouts.sampling import Sampling

# Both launches happen in the set-up of whichever test comes first.
pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

# Ranks, strategy, cases.
PLAN: list[tuple[int, str, list[str]]] = [
    (2, "ddp", ["sft", "reward", "reward lora", "dpo", "dpo ema", "grpo judged", "ppo shared"]),
    (2, "fsdp2", list(CASES)),
    (2, "fsdp", ["sft", "reward lora", "dpo", "dpo lora", "grpo judged", "ppo"]),
    (3, "ddp", ["sft in parts", "reward", "dpo", "grpo"]),
    (3, "fsdp2", ["dpo lora", "ppo"]),
]
RUNS = [(ranks, strategy, case) for ranks, strategy, cases in PLAN for case in cases]
PROMPTS = [np.array(ids) for ids in ([5, 6, 7], [8], [9, 10], [11, 12, 13, 14])]


def everything(folder: Path, rank: int, ranks: int) -> dict[str, Any]:
    """All that these processes do one after the other, since starting them takes longer than most of it."""
    found: dict[str, Any] = {
        f"{strategy} {case}": shared_run(case, strategy, folder, rank, ranks)
        for number, strategy, cases in PLAN
        if number == ranks
        for case in cases
    }
    if ranks == 2:
        found["samples"] = sampled(rank)
        found["heard by one"] = listened(folder, says=rank == 0)
        found["heard by none"] = listened(folder, says=False)
        found["refused"] = {name: refusal(folder, rank, name) for name in REFUSED}
    return found


def sampled(rank: int) -> Result:
    """Samples to other prompts on each rank, before and after the model is split."""
    prompts = PROMPTS[:2] if rank == 0 else PROMPTS[2:4]
    policy = model()
    calls: list[int] = []
    policy.register_forward_hook(lambda *_: calls.append(1))
    sampling = Sampling(max_new_tokens=24)
    alone = CachedSampler(sampling, 2, max_rows=4).sample(policy, prompts, 2, seed=rank)
    num_alone = len(calls)
    mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (2,))
    shard(policy, mesh)
    together = CachedSampler(sampling, 2, max_rows=4, any_rank=any_process).sample(policy, prompts, 2, seed=rank)
    return {"alone": alone, "together": together, "calls": (num_alone, len(calls) - num_alone)}


def listened(folder: Path, *, says: bool) -> str:
    """What a monitor complains of that is told something on some ranks."""
    monitor = RewardVarianceMonitor(silent_after=2)
    trainer = trainer_of(folder, "ddp", 2, monitor, max_epochs=1)
    rows: Any = list(torch.randn(8, 2, generator=torch.Generator().manual_seed(0)))
    return complaint(lambda: trainer.fit(Rewarded(healthy, says=says), DataLoader(rows, batch_size=1)))


REFUSED: dict[str, tuple[Callable[[], Any], Callable[[], Any]]] = {
    "moving reference": (FlatStrategy, lambda: dpo(ema=EmaSettings(mixing=0.5))),
    "flat parameters": (lambda: FlatStrategy(use_orig_params=False), sft),
    "flat head": (FlatStrategy, reward),
    "tensor parallel": (lambda: ModelParallelStrategy(data_parallel_size=1, tensor_parallel_size=2), sft),
}


def refusal(folder: Path, rank: int, name: str) -> str:
    strategy, make = REFUSED[name]
    precision = "bf16-true" if name == "flat head" else "32-true"
    trainer = trainer_of(folder, strategy(), 2, max_steps=1, precision=precision)
    return complaint(lambda: trainer.fit(make(), loader("sft", folder, rank, 2, accumulate=1)))


class Runs(NamedTuple):
    folder: Path
    ranks: dict[int, list[dict[str, Any]]]  # by number of ranks
    alone: dict[tuple[int, str, str], Result]

    def of(self, ranks: int, strategy: str, case: str) -> list[Result]:
        return [found[f"{strategy} {case}"] for found in self.ranks[ranks]]

    def updates(self, ranks: int, strategy: str, case: str) -> list[list[Any]]:
        """The batches of every update, of all ranks."""
        each = [result["updates"] for result in self.of(ranks, strategy, case)]
        return [[batch for windows in together for batch in windows] for together in zip(*each, strict=True)]

    def by_hand(self, ranks: int, strategy: str, case: str) -> Result:
        key = (ranks, strategy, case)
        if key not in self.alone:
            self.alone[key] = by_hand(case, self.updates(*key))
        return self.alone[key]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    folder = tmp_path_factory.mktemp("ranks")
    write_rows(folder)
    return Runs(folder, {ranks: launched(everything, folder, ranks) for ranks in sorted({ranks for ranks, _, _ in PLAN})}, {})


@pytest.mark.parametrize(("ranks", "strategy", "case"), RUNS)
def test_N5_ranks_share_every_row_and_none_counts_twice(runs: Runs, ranks: int, strategy: str, case: str) -> None:
    updates = runs.updates(ranks, strategy, case)
    if is_rlhf(case):
        # Seven prompts in one or two rollouts, of which fillers count nowhere.
        rows = [row for batches in updates[: len(updates) // 2] for row in weighed_prompts(batches)]
        assert set(rows) == set(range(7))
        return
    rows = [row for batches in updates for row in seen_rows(batches)]
    assert sorted(rows[:NUM_ROWS]) == sorted(rows[NUM_ROWS:]) == list(range(NUM_ROWS)), "two epochs"


def weighed_prompts(batches: list[Any]) -> list[int]:
    pairs = (pair for b in batches for pair in zip(b.groups.row_ids.tolist(), b.groups.weights.tolist(), strict=True))
    return [row for row, weight in pairs if weight]


@pytest.mark.parametrize(("ranks", "strategy", "case"), RUNS)
def test_N2_the_gradient_of_every_update_is_that_of_one_process_on_the_joined_batch(
    runs: Runs, ranks: int, strategy: str, case: str
) -> None:
    expected = runs.by_hand(ranks, strategy, case)["gradients"]
    for result in runs.of(ranks, strategy, case):
        assert len(result["gradients"]) == len(expected) > 2
        for found, wanted in zip(result["gradients"], expected, strict=True):
            assert found.keys() == wanted.keys()
            largest = max(float(gradient.abs().max()) for gradient in wanted.values())
            assert largest > 1e-3, "there is something to compare"
            for name, gradient in wanted.items():
                torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-5 * max(1.0, largest))


@pytest.mark.parametrize(("ranks", "strategy", "case"), RUNS)
def test_R7_R8_after_training_all_weights_are_equal_on_all_ranks_and_those_of_one_process(
    runs: Runs, ranks: int, strategy: str, case: str
) -> None:
    """All of them: policy, reference, value function and reward heads; clipped, decayed, with a reference that moves."""
    expected = runs.by_hand(ranks, strategy, case)["weights"]
    first, *others = (result["weights"] for result in runs.of(ranks, strategy, case))
    assert first.keys() == expected.keys()
    start = dict(configured(case).named_parameters())
    moved = {name for name, weight in first.items() if not torch.equal(weight, start[name])}
    assert any("reference" not in name for name in moved)
    assert any("reference" in name for name in moved) == (case == "dpo ema")
    for name, weight in first.items():
        assert all(torch.equal(weight, other[name]) for other in others)
        torch.testing.assert_close(weight, expected[name], rtol=1e-4, atol=1e-5)


def configured(case: str) -> Any:
    torch.manual_seed(0)
    module = CASES[case][0]()
    module.configure_model()
    return module


@pytest.mark.parametrize(("ranks", "strategy", "case"), [run for run in RUNS if not is_rlhf(run[2])])
def test_N5_the_validation_loss_is_that_of_one_process_on_every_rank(runs: Runs, ranks: int, strategy: str, case: str) -> None:
    expected = runs.by_hand(ranks, strategy, case)["val/loss"]
    results = runs.of(ranks, strategy, case)
    assert all(result["metrics"] == results[0]["metrics"] for result in results)
    assert results[0]["metrics"]["val/loss"] == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize(("ranks", "strategy", "case"), RUNS)
def test_R8_the_first_process_exports_whole_weights(runs: Runs, ranks: int, strategy: str, case: str) -> None:
    kind = AutoModelForSequenceClassification if case.startswith("reward") else AutoModelForCausalLM
    exported = kind.from_pretrained(runs.folder / f"export {strategy} {ranks} {case}")
    ids = torch.tensor([[3, 4, 5, 6]])
    with torch.no_grad():
        expected = runs.by_hand(ranks, strategy, case)["module"].trained(ids).logits
        torch.testing.assert_close(exported(ids).logits, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("case", ["sft", "dpo"])
def test_R8_the_digest_of_weights_does_not_depend_on_how_they_are_split(runs: Runs, case: str) -> None:
    """Of equal weights, that is: rounding differs between strategies, so they are compared with those they ended with."""
    for strategy in ("ddp", "fsdp2", "fsdp"):
        first = runs.of(2, strategy, case)[0]
        module = configured(case)
        module.load_state_dict(first["weights"], strict=False)
        assert first["digests"] == module.digests()


@pytest.mark.parametrize("strategy", ["fsdp2", "fsdp"])
def test_R8_a_reward_model_that_is_split_scores_as_a_whole_one(runs: Runs, strategy: str) -> None:
    found, expected = (runs.of(2, name, "grpo judged")[0]["metrics"] for name in (strategy, "ddp"))
    assert abs(expected["reward/mean"]) > 1e-3
    for key in ("reward/mean", "reward/std", "response/length"):
        assert found[key] == pytest.approx(expected[key], rel=1e-4)


@pytest.mark.parametrize("strategy", ["fsdp2", "fsdp"])
def test_a_process_that_gathered_nothing_says_how_weights_are_put_together(runs: Runs, strategy: str) -> None:
    first, second = (result["complaint"] for result in runs.of(2, strategy, "sft"))
    assert first == ""
    assert re.search(r"split over several processes. Call `module.gather\(\)` in every process", second)


def test_a_model_that_fsdp_has_taken_apart_says_so_outside_of_steps(runs: Runs) -> None:
    for result in runs.of(2, "fsdp", "dpo"):
        assert re.search(r"weights of this LlamaForCausalLM are split by FSDP.*--trainer.strategy fsdp2", result["outside"])


def test_samples_are_the_same_with_a_split_model_and_nobody_waits(runs: Runs) -> None:
    calls = []
    for found in runs.ranks[2]:
        for alone, together in zip(found["samples"]["alone"], found["samples"]["together"], strict=True):
            for mine, theirs in zip(alone.responses, together.responses, strict=True):
                assert mine.tolist() == theirs.tolist()
            for mine, theirs in zip(alone.token_logps, together.token_logps, strict=True):
                assert np.allclose(mine, theirs, atol=1e-4)
            assert alone.ended == together.ended
        calls.append(found["samples"]["calls"])
    (first, shared), (second, also) = calls
    assert first != second, "one rank would have been done before the other"
    assert shared == also == max(first, second)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2", "fsdp"])
def test_ranks_go_along_with_the_longest_rollout_where_the_policy_is_split_and_only_there(runs: Runs, strategy: str) -> None:
    assert [result["goes along"] for result in runs.of(2, strategy, "grpo judged")] == [strategy != "ddp"] * 2


def test_M6_a_monitor_is_silent_only_if_no_rank_heard_anything(runs: Runs) -> None:
    first, second = (found["heard by none"] for found in runs.ranks[2])
    assert "RewardVarianceMonitor received no RewardObservation in the first 2 training batches" in first
    assert first == second
    assert [found["heard by one"] for found in runs.ranks[2]] == ["", ""]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("moving reference", r"A moving reference does not go with FSDP.*--trainer.strategy fsdp2"),
        ("flat parameters", r"`use_orig_params: false` makes one parameter of all weights.*--trainer.strategy fsdp2"),
        ("flat head", r"stays in float32, but FSDP with the precision 'bf16-true' would cast it.*--trainer.strategy fsdp2"),
        ("tensor parallel", r"cut every layer in 2 parts.*`tensor_parallel_size: 1`"),
    ],
)
def test_what_a_strategy_cannot_do_exactly_is_refused_on_every_rank(runs: Runs, name: str, text: str) -> None:
    for found in runs.ranks[2]:
        assert re.search(text, found["refused"][name])
