from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers_runs import Chosen, logged, weights
from typing_extensions import override

from lightning_pref.callbacks.displacement import LikelihoodDisplacementTracker
from lightning_pref.callbacks.monitor import Monitor
from lightning_pref.callbacks.probe import Probe
from lightning_pref.callbacks.reward_variance import RewardVarianceMonitor
from lightning_pref.data.groups import GroupBatch, PromptGroup
from lightning_pref.integrations.transformers import attach
from lightning_pref.integrations.trl import ObserveDPO, ObserveRewards, check_version, pair_ids, rows_by_id
from lightning_pref.measures.means import WeightedMeans
from lightning_pref.models.pair_scores import pair_observation
from lightning_pref.observations import Observation, PairObservation, RewardObservation

pytest.importorskip("trl")

from trl_runs import dpo_trainer, policy, reward_trainer  # imports TRL

pytestmark = [
    # TRL's own, against the transformers it runs on.
    pytest.mark.filterwarnings("ignore:.*is deprecated and will be removed in v:FutureWarning"),
]


@pytest.fixture(autouse=True)
def no_telemetry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CI", "1")


class Pairs(Monitor[WeightedMeans]):
    """Keeps every pair, and reports what TRL reports."""

    prefix = "pairs"
    consumes = (PairObservation,)

    def __init__(self) -> None:
        super().__init__(every_n_updates=1)
        self.seen: list[tuple[str, PairObservation]] = []

    @override
    def receive(self, observation: Observation, source: str) -> None:
        assert isinstance(observation, PairObservation)
        self.seen.append((source, observation))
        super().receive(observation, source)

    @override
    def new_accumulator(self) -> WeightedMeans:
        return WeightedMeans(["logps/chosen", "logps/rejected", "rewards/chosen", "rewards/rejected", "rewards/accuracies"])

    @override
    def update(self, accumulator: WeightedMeans, observation: Observation) -> None:
        assert isinstance(observation, PairObservation)
        assert observation.ref_chosen_logps is not None
        assert observation.ref_rejected_logps is not None
        chosen = 0.1 * (observation.chosen_logps - observation.ref_chosen_logps)
        rejected = 0.1 * (observation.rejected_logps - observation.ref_rejected_logps)
        values = {
            "logps/chosen": observation.chosen_logps,
            "logps/rejected": observation.rejected_logps,
            "rewards/chosen": chosen,
            "rewards/rejected": rejected,
            "rewards/accuracies": (chosen > rejected).float(),
        }
        accumulator.update(values, torch.ones_like(chosen))

    @override
    def summarize(self, accumulator: WeightedMeans) -> dict[str, Tensor]:
        return {f"ours/{name}": value for name, value in accumulator.compute().items()}


class Rewards(Pairs):
    """Keeps every reward."""

    consumes: Any = (RewardObservation,)

    @override
    def receive(self, observation: Observation, source: str) -> None:
        self.seen.append((source, observation))  # type: ignore[arg-type]
        Monitor.receive(self, observation, source)

    @override
    def new_accumulator(self) -> WeightedMeans:
        return WeightedMeans(["mean_reward"])

    @override
    def update(self, accumulator: WeightedMeans, observation: Observation) -> None:
        assert isinstance(observation, RewardObservation)
        accumulator.update({"mean_reward": observation.rewards}, torch.ones_like(observation.rewards))


def variants() -> Iterator[Any]:
    from peft import LoraConfig

    adapters = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights="gaussian", task_type="CAUSAL_LM")
    yield pytest.param({}, id="reference-model")
    yield pytest.param({"precompute_ref_log_probs": True}, id="precomputed-reference")
    yield pytest.param({"gradient_accumulation_steps": 2}, id="accumulation")
    yield pytest.param({"max_length": 10}, id="truncated")
    yield pytest.param({"peft_config": adapters}, id="adapters")


@pytest.mark.parametrize("changes", list(variants()))
def test_pairs_read_from_dpo_give_the_numbers_trl_logs(tmp_path: Path, changes: dict[str, Any]) -> None:
    trainer = dpo_trainer(tmp_path, **changes, eval_strategy="steps", eval_steps=4, per_device_eval_batch_size=2)
    monitor = Pairs()
    attach(trainer, monitor, ObserveDPO())
    trainer.train()
    for name in monitor.new_accumulator().names:
        for stage, steps in (("", [1, 2, 3, 4]), ("eval_", [4])):
            theirs, ours = logged(trainer, f"{stage}{name}"), logged(trainer, f"{stage}ours/{name}")
            assert list(theirs) == list(ours) == steps
            assert list(ours.values()) == pytest.approx(list(theirs.values()), rel=1e-5, abs=1e-6)
    assert len(set(logged(trainer, "logps/chosen").values())) == 4
    assert [source for source, _ in monitor.seen].count("val") == 2


def test_lengths_and_references_are_those_of_the_rows(tmp_path: Path) -> None:
    trainer = dpo_trainer(tmp_path, reference=policy(5), learning_rate=1e-12, max_steps=2)
    monitor = Pairs()
    attach(trainer, monitor, ObserveDPO())
    trainer.train()
    models = {"": policy().eval(), "ref_": policy(5).eval()}
    rows, numbers = trainer.train_dataset, rows_by_id(trainer)
    followed = set()
    for _, pair in monitor.seen:
        for place, row_id in enumerate(pair.row_ids.tolist()):
            row = rows[numbers[row_id]]
            followed.add(numbers[row_id])
            for side in ("chosen", "rejected"):
                response = row[f"{side}_ids"]
                ids = torch.tensor([row["prompt_ids"] + response])
                assert getattr(pair, f"{side}_lengths")[place] == len(response)
                for prefix, model in models.items():
                    with torch.no_grad():
                        table = model(ids).logits[0, :-1].log_softmax(-1)
                    start = len(row["prompt_ids"]) - 1
                    expected = sum(table[start + i, token].item() for i, token in enumerate(response))
                    assert getattr(pair, f"{prefix}{side}_logps")[place].item() == pytest.approx(expected, rel=1e-4)
    assert followed == set(range(8))


def test_sums_are_plain_where_the_loss_weighs_tails(tmp_path: Path) -> None:
    seen = []
    for ld_alpha in (None, 0.5):
        trainer, monitor = dpo_trainer(tmp_path, ld_alpha=ld_alpha, max_steps=1), Pairs()
        attach(trainer, monitor, ObserveDPO())
        trainer.train()
        seen.append(monitor.seen[0][1])
    assert torch.equal(seen[0].row_ids, seen[1].row_ids)
    for name in ("chosen_logps", "rejected_logps", "ref_chosen_logps", "ref_rejected_logps"):
        assert torch.allclose(getattr(seen[0], name), getattr(seen[1], name), atol=1e-5)


def test_row_ids_are_the_same_in_every_epoch(tmp_path: Path) -> None:
    trainer, monitor = dpo_trainer(tmp_path, max_steps=6), Pairs()
    attach(trainer, monitor, ObserveDPO())
    trainer.train()
    epochs = [torch.cat([pair.row_ids for _, pair in monitor.seen[i : i + 2]]) for i in (0, 2, 4)]
    assert len(set(epochs[0].tolist())) == 8
    assert not torch.equal(epochs[0], epochs[1])  # shuffled anew
    assert all(sorted(ids.tolist()) == sorted(epochs[0].tolist()) for ids in epochs)


def test_rewards_read_from_the_reward_trainer_give_the_numbers_trl_logs(tmp_path: Path) -> None:
    trainer, monitor = reward_trainer(tmp_path), Rewards()
    attach(trainer, monitor, ObserveRewards())
    trainer.train()
    ours = logged(trainer, "ours/mean_reward")
    assert list(ours.values()) == pytest.approx(list(logged(trainer, "mean_reward").values()), rel=1e-5)
    numbers = rows_by_id(trainer)
    margins = []
    for _, observation in monitor.seen:
        assert isinstance(observation, RewardObservation)
        chosen, rejected = observation.rewards.chunk(2)
        margins.append((chosen - rejected).mean().item())
        first, second = observation.prompt_ids.chunk(2)
        assert torch.equal(first, second)
        assert all(row_id in numbers for row_id in first.tolist())
    assert margins == pytest.approx(list(logged(trainer, "margin").values()), rel=1e-4)
    assert sorted(numbers.values()) == list(range(8))


def test_the_tracker_and_the_variance_monitor_agree_with_what_trl_logs(tmp_path: Path) -> None:
    trainer, tracker = dpo_trainer(tmp_path), LikelihoodDisplacementTracker(every_n_updates=1)
    attach(trainer, tracker, ObserveDPO())
    trainer.train()
    for side in ("chosen", "rejected"):
        theirs = {step: value / 0.1 for step, value in logged(trainer, f"rewards/{side}").items()}  # beta is 0.1
        assert logged(trainer, f"displacement/{side}_logp_change") == pytest.approx(theirs, rel=1e-4, abs=1e-5)
    scored, variance = reward_trainer(tmp_path), RewardVarianceMonitor(every_n_updates=1)
    attach(scored, variance, ObserveRewards())
    scored.train()
    assert logged(scored, "reward_variance/mean") == pytest.approx(logged(scored, "mean_reward"), rel=1e-4)


def test_a_probe_of_our_own_groups_measures_a_model_that_trl_trains(tmp_path: Path, random_groups: Any) -> None:
    groups = GroupBatch.from_groups([shrunk(group) for group in random_groups(3)])
    trainer = dpo_trainer(tmp_path)
    attach(trainer, Probe("held_out", [groups], pair_observation, every_n_updates=2, budget=None), Chosen())
    trainer.train()
    values = logged(trainer, "probe/held_out/chosen/logps")
    assert sorted(values) == [0, 2, 4]
    expected = [pair_observation(model, groups).chosen_logps.mean().item() for model in (policy(), trainer.model)]
    assert [values[0], values[4]] == pytest.approx(expected, rel=1e-5)


def shrunk(group: PromptGroup) -> PromptGroup:
    """With token ids of TRL's tiny vocabulary."""
    return replace(group, prompt=group.prompt % 20, responses=tuple(response % 20 for response in group.responses))


def test_a_resumed_dpo_run_reports_what_one_without_interruption_does(tmp_path: Path) -> None:
    reports = []
    for resume in (False, True):
        trainer, tracker = (
            dpo_trainer(tmp_path, save_strategy="steps", save_steps=3),
            LikelihoodDisplacementTracker(every_n_updates=2),
        )
        attach(trainer, tracker, ObserveDPO())
        trainer.train(resume_from_checkpoint=resume)
        reports.append(
            {key: logged(trainer, key) for entry in trainer.state.log_history for key in entry if "displacement" in key}
        )
        if not resume:
            (tmp_path / "checkpoint-4").rename(tmp_path / "gone")
    assert reports[0] == reports[1]
    assert sorted(reports[0]["displacement/share"]) == [2, 4]


@pytest.mark.parametrize("make", [dpo_trainer, reward_trainer])
def test_reading_changes_no_weight(tmp_path: Path, make: Any) -> None:
    finals = []
    for watched in (False, True):
        trainer = make(tmp_path)
        if watched:
            attach(trainer, *((Pairs(), ObserveDPO()) if make is dpo_trainer else (Rewards(), ObserveRewards())))
        trainer.train()
        finals.append(weights(trainer.model))
    assert all(torch.equal(value, finals[1][name]) for name, value in finals[0].items())


def test_silence_under_dpo_names_the_reader(tmp_path: Path) -> None:
    trainer = dpo_trainer(tmp_path)
    monitor = Pairs()
    monitor.silent_after = 2
    attach(trainer, monitor)
    with pytest.raises(ValueError, match="attach\\(trainer, Pairs\\(...\\), ObserveDPO\\(\\)\\)") as error:
        trainer.train()
    assert "from lightning_pref.integrations.trl import ObserveDPO" in str(error.value)
    trainer = dpo_trainer(tmp_path)
    rewards = Rewards()
    rewards.silent_after = 2
    attach(trainer, rewards, ObserveDPO())  # which finds pairs, no rewards
    with pytest.raises(ValueError, match="observe\\(self, RewardObservation\\(rewards=..., prompt_ids=...\\)\\)") as error:
        trainer.train()
    assert "It did receive: PairObservation." in str(error.value)


def test_readers_refuse_other_trainers_and_versions(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="ObserveDPO reads TRL's DPOTrainer, got a RewardTrainer"):
        attach(reward_trainer(tmp_path), Pairs(), ObserveDPO())
    compiled = dpo_trainer(tmp_path)
    compiled.args.torch_compile = True
    with pytest.raises(ValueError, match="ObserveDPO cannot look inside a compiled model"):
        attach(compiled, Pairs(), ObserveDPO())
    with pytest.raises(RuntimeError, match="ObserveDPO knows the inside of TRL .*, found 1.17.0"):
        check_version("1.17.0", "ObserveDPO")
    check_version("1.16.3", "ObserveDPO")


def slow_id(chosen: list[int], rejected: list[int]) -> int:
    """`pair_ids` in Python's own unbounded integers."""

    def mixed(value: int) -> int:
        value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) % 2**64
        value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) % 2**64
        return value ^ (value >> 31)

    def text(ids: list[int]) -> int:
        return mixed(sum(mixed((token + (i + 1) * 0x9E3779B97F4A7C15) % 2**64) for i, token in enumerate(ids)) % 2**64)

    return mixed((3 * text(chosen) + text(rejected)) % 2**64) % 2**63


def test_pair_ids_equal_their_definition_and_heed_only_tokens() -> None:
    generator = torch.Generator().manual_seed(0)
    texts = [
        torch.randint(0, 50_000, (int(n),), generator=generator).tolist() for n in torch.randint(1, 9, (8,), generator=generator)
    ]
    for left in (0, 3):
        ids = torch.full((8, 12), 7)
        mask = torch.zeros(8, 12, dtype=torch.long)
        for row, text in enumerate(texts):
            ids[row, left : left + len(text)] = torch.tensor(text)
            mask[row, left : left + len(text)] = 1
        assert pair_ids(ids, mask).tolist() == [slow_id(texts[i], texts[i + 4]) for i in range(4)]


def test_pair_ids_differ_where_anything_differs() -> None:
    chosen = [[5, 6, 7], [6, 5, 7], [5, 6], [5, 6, 7], [0, 5, 6], [8]]
    rejected = [[8], [8], [8], [9], [8], [5, 6, 7]]
    rows = [torch.tensor(row) for row in chosen + rejected]
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
    found = pair_ids(ids, mask).tolist()
    assert len(set(found)) == 6
    assert all(0 <= number < 2**63 for number in found)
