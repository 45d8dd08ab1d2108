"""Held-out prompts: which they are, what is logged of the answers to them, and that training does not notice."""

from __future__ import annotations

import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

import pytest
import torch
from rollouts import MOVING, STILL, count_of_letters, fit, rollout_data, speaker
from torch import Tensor
from typing_extensions import override

from lightning_pref.callbacks import RewardVarianceMonitor
from lightning_pref.data.groups import GroupBatch
from lightning_pref.data.playground_source import PlaygroundSettings
from lightning_pref.data.playground_tokenizer import playground_tokenizer
from lightning_pref.models.forward import Quantity, ResponseLogps
from lightning_pref.modules.rlhf import RLHFModule
from lightning_pref.modules.rlhf_settings import KLSettings
from lightning_pref.rollouts.engines.generate import CachedSampler
from lightning_pref.rollouts.rollout_data import RolloutData
from lightning_pref.rollouts.sampling import Sampling
from lightning_pref.rollouts.validation import HeldOutSampling

GREEDY = HeldOutSampling(temperature=0.0)


def write(folder: Path, count: int = 5) -> str:
    path = folder / "val.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"Say {i}{' please' * (i % 2)}."}) + "\n" for i in range(count)))
    return str(path)


def module(**options: Any) -> RLHFModule:
    return RLHFModule(speaker(), **{"optimizer": STILL, **options})


def test_what_is_logged_is_the_reward_of_greedy_answers_to_every_prompt_once(tmp_path: Path) -> None:
    data = rollout_data(tmp_path, val=write(tmp_path), val_sampling=GREEDY, gold="rollouts:likes_vowels")
    metrics = fit(tmp_path, module(), data).metrics
    tokenizer = playground_tokenizer()
    eos = int(tokenizer.eos_token_id)
    sampling = Sampling(max_new_tokens=6, temperature=0.0)
    prompts = [f"Say {i}{' please' * (i % 2)}." for i in range(5)]
    held = RolloutData(write(tmp_path), reward="rollouts:count_of_letters", tokenizer=tokenizer)
    held.setup("fit")
    found = CachedSampler(sampling, eos).sample(speaker(), [prompt.ids for prompt in held.prompts], 1, seed=99)
    texts = [str(tokenizer.decode(own.responses[0], skip_special_tokens=True)) for own in found]
    rewards = torch.tensor([count_of_letters(prompt, text) for prompt, text in zip(prompts, texts, strict=True)])
    assert metrics["val/reward/mean"].last == pytest.approx(rewards.mean().item(), rel=1e-5)
    assert metrics["val/reward/std"].last == pytest.approx(rewards.std(correction=0).item(), rel=1e-5)
    assert metrics["val/response/length"].last == pytest.approx(sum(len(own.responses[0]) for own in found) / 5)
    assert metrics["val/response/ended_share"].last == pytest.approx(sum(own.ended[0] for own in found) / 5)
    vowels = [sum(letter in "aeiou" for letter in text) / max(len(text), 1) for text in texts]
    assert metrics["val/reward/gold"].last == pytest.approx(sum(vowels) / 5, rel=1e-5)
    assert {"val/kl", "val/reward/zero_share", "val/reward/uncertainty", "val/loss"} & set(metrics) == set()


def test_the_kl_of_samples_is_logged_and_is_nothing_before_the_policy_moves(tmp_path: Path) -> None:
    tied = {"kl": KLSettings(coefficient=0.1)}
    still = fit(tmp_path, module(**tied), rollout_data(tmp_path, val=write(tmp_path))).metrics
    assert still["val/kl"].last == pytest.approx(0.0, abs=1e-4)
    moved = fit(tmp_path, module(**tied, optimizer=MOVING), rollout_data(tmp_path, val=write(tmp_path)), max_epochs=4).metrics
    assert moved["val/kl"].last > 0.05


class Reader(RLHFModule):
    """Notes how many responses are read at once where nothing is trained."""

    def __init__(self, **options: Any) -> None:
        super().__init__(speaker(), optimizer=STILL, **options)
        self.read: list[int] = []

    @override
    def policy_logps(self, batch: GroupBatch, want: Collection[Quantity] = ()) -> ResponseLogps:
        if not torch.is_grad_enabled():
            self.read.append(len(batch.response_lengths))
        return super().policy_logps(batch, want)


def read(folder: Path, accumulate: int, **settings: Any) -> tuple[Reader, dict[str, float]]:
    """What a run reads, and how far it finds the policy to be from another model."""
    folder.mkdir()
    speaker(1).save_pretrained(folder / "reference")
    reader = Reader(reference_model=str(folder / "reference"), algorithm="rloo", kl=KLSettings(coefficient=0.1))
    data = rollout_data(folder, **settings)
    metrics = fit(folder, reader, data, accumulate_grad_batches=accumulate, num_sanity_val_steps=0).metrics
    return reader, {key: metric.first for key, metric in metrics.items() if key in ("kl", "val/kl")}


def test_a_validation_reads_no_more_responses_at_once_than_an_update(tmp_path: Path) -> None:
    held_out: dict[str, Any] = {"val": write(tmp_path), "val_sampling": HeldOutSampling(num_samples=12)}
    # Four prompts with three responses each, in two parts; and 36 responses to three held-out prompts.
    small, found = read(tmp_path / "parts", 2, **held_out)
    assert max(small.read) == 6
    assert sum(small.read) == 8 * 3 + 5 * 12
    whole, expected = read(tmp_path / "whole", 1, **{**held_out, "num_samples": 36})
    assert 36 in whole.read
    assert found["val/kl"] == pytest.approx(expected["val/kl"], rel=1e-5)
    assert abs(found["val/kl"]) > 0.1


def test_the_responses_to_one_prompt_are_read_in_parts_as_they_are_trained_on(tmp_path: Path) -> None:
    one: dict[str, Any] = {"prompts": 1, "num_prompts": 1, "num_samples": 6}
    parts, found = read(tmp_path / "parts", 3, **one)
    whole, expected = read(tmp_path / "whole", 1, **one)
    assert (parts.read, whole.read) == ([2, 2, 2], [6])
    assert found["kl"] == pytest.approx(expected["kl"], rel=1e-5)


def weights(folder: Path, **data: Any) -> Tensor:
    trained = module(optimizer=MOVING)
    fit(folder, trained, rollout_data(folder, **data), max_epochs=2, val_check_interval=1)
    return torch.cat([parameter.flatten() for parameter in trained.policy.parameters()])


def test_M4_training_is_bit_identical_with_a_validation_after_every_update(tmp_path: Path) -> None:
    for sampling in (GREEDY, HeldOutSampling(num_samples=3)):
        assert torch.equal(weights(tmp_path), weights(tmp_path, val=write(tmp_path), val_sampling=sampling))


def test_every_validation_draws_the_same_so_that_only_the_policy_changes_it(tmp_path: Path) -> None:
    metrics = fit(tmp_path, module(), rollout_data(tmp_path, val=write(tmp_path)), max_epochs=3).metrics
    assert metrics["val/reward/mean"].first == metrics["val/reward/mean"].last
    assert metrics["reward/mean"].first != metrics["reward/mean"].last


def test_several_answers_to_a_prompt_reach_the_monitors_under_their_own_source(tmp_path: Path) -> None:
    data = rollout_data(tmp_path, val=write(tmp_path), val_sampling=HeldOutSampling(num_samples=4, temperature=0.7))
    metrics = fit(tmp_path, module(), data, [RewardVarianceMonitor()]).metrics
    assert metrics["val/reward_variance/within_prompt"].last > 0
    assert "val/reward/zero_share" in metrics
    alone = fit(tmp_path, module(), rollout_data(tmp_path, val=write(tmp_path)), [RewardVarianceMonitor()]).metrics
    assert not any(name.startswith("val/reward_variance") for name in alone)


def test_a_part_of_the_prompts_is_held_out_by_their_hash(tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"Prompt {i % 20}."}) + "\n" for i in range(40)))
    common: dict[str, Any] = {"reward": "rollouts:count_of_letters", "tokenizer": playground_tokenizer()}
    sides = []
    for size in (0.25, 10):
        data = RolloutData(str(path), val_size=size, **common)
        data.setup("fit")
        loader = data.val_dataloader()
        assert not isinstance(loader, list)
        held = {str(prompt.text) for prompt in loader.prompts}
        kept = {str(prompt.text) for prompt in data.prompts}
        assert len(loader.prompts) == 10
        assert held | kept == {f"Prompt {i}." for i in range(20)}
        assert held & kept == set()
        sides.append(held)
    assert sides[0] == sides[1]


def test_a_split_or_the_playgrounds_own_prompts_can_be_the_validation(tmp_path: Path) -> None:
    common: dict[str, Any] = {"reward": "playground:gold", "tokenizer": playground_tokenizer()}
    data = RolloutData("playground", "playground", playground=PlaygroundSettings(num_rows=12, num_val_rows=7), **common)
    data.setup("fit")
    loader = data.val_dataloader()
    assert not isinstance(loader, list)
    assert len(loader.prompts) == 7
    assert {tuple(prompt.ids) for prompt in loader.prompts}.isdisjoint(tuple(prompt.ids) for prompt in data.prompts)
    from datasets import Dataset, DatasetDict

    parts = {name: Dataset.from_list([{"prompt": f"{name} {i}"} for i in range(n)]) for name, n in (("train", 4), ("test", 2))}
    DatasetDict(parts).save_to_disk(tmp_path / "saved")
    data = RolloutData(str(tmp_path / "saved"), split="train", val_split="test", **common)
    data.setup("fit")
    loader = data.val_dataloader()
    assert not isinstance(loader, list)
    assert [prompt.text for prompt in loader.prompts] == ["test 0", "test 1"]
    assert len(data.prompts) == 4


def test_there_is_no_validation_unless_asked_for(tmp_path: Path) -> None:
    data = rollout_data(tmp_path)
    data.setup("fit")
    assert data.val_dataloader() == []
    assert not any(name.startswith("val/") for name in fit(tmp_path, module(), rollout_data(tmp_path)).metrics)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"val_sampling": GREEDY}, "`val_sampling` is set, but there is no validation; give `val`, `val_split` or `val_size`"),
        ({"val": "x.jsonl", "val_sampling": HeldOutSampling(num_samples=0)}, "`val_sampling.num_samples` must be at least 1"),
        (
            {"val": "x.jsonl", "val_sampling": HeldOutSampling(num_samples=2, temperature=0.0)},
            "asks for 2 greedy responses to each prompt, which are all the same",
        ),
        ({"val": "x.jsonl", "val_sampling": HeldOutSampling(temperature=-1.0)}, "`temperature` must not be negative"),
        ({"val": "x.jsonl", "val_size": 3}, "`val_size` holds out training rows, but the validation data comes from `val`"),
        ({"val_size": -1}, "`val_size` is a share below 1 or a number of rows, got -1"),
    ],
)
def test_what_cannot_be_meant_is_refused(tmp_path: Path, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        rollout_data(tmp_path, **settings)


def test_holding_out_everything_or_rows_of_the_playground_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="Holding out 8 of 8 prompts for validation leaves none to train on"):
        rollout_data(tmp_path, val_size=8).setup("fit")
    with pytest.raises(ValueError, match="the playground writes rows of its own for validation: leave it out and give `val"):
        RolloutData("playground", reward="playground:gold", val_size=0.1)
