"""Reward models of a user's own data, from the command line to a folder that plain transformers loads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from lightning_pref.cli import RunResult
from lightning_pref.recipes import reward

RANKED = [
    {"prompt": f"Name a number above {i}.", "responses": [f" {i + 1}.", " No.", f" {i - 1}, or so."], "scores": [2.0, 1.0, 0.0]}
    for i in range(16)
]
LABELLED = [{"prompt": f"Above {i}?", "completion": f" {i + 1}.", "label": i % 2 == 0} for i in range(16)]
STEPS = [{"prompt": f"{i} + 2 =", "completions": ["add one", f"so {i + 1}"], "labels": [True, i % 2 == 0]} for i in range(16)]


def scores_of(folder: Path, texts: list[str]) -> torch.Tensor:
    """What a user of transformers alone would compute."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    with torch.no_grad():
        return model(**tokenizer(texts, padding=True, return_tensors="pt", return_token_type_ids=False)).logits


def test_a_reward_model_of_ones_own_pairs_prefers_what_was_chosen(bench: Any) -> None:
    result: RunResult = bench.reward("--trainer.max_steps=30", "--model.optimizer.learning_rate=1e-2", "--model.center=0.01")
    assert result.folder.parent.name == "reward"
    assert result.metrics["loss"].last < result.metrics["loss"].first
    assert result.metrics["rewards/accuracies"].last == 1.0
    assert not [key for key in result.metrics if key.startswith("probe/")], "the playground's probe has no place here"
    assert result.export is not None
    # The tokenizer has no padding token of its own, but the export does, and scores rows of different lengths in one batch.
    chosen, rejected = "Name a number above 3. 4 is one.<|end|>", "Name a number above 3. Take 3, or is it 2?<|end|>"
    together = scores_of(result.export, [chosen, rejected])
    assert together.shape == (2, 1)
    assert together[0] > together[1]
    alone = torch.cat([scores_of(result.export, [text]) for text in (chosen, rejected)])
    torch.testing.assert_close(together, alone, atol=1e-4, rtol=1e-4)
    summary = json.loads((result.folder / "summary.json").read_text())
    assert summary["recipe"] == "reward"
    assert set(summary["digests"]) == {"data", "weights"}


@pytest.mark.parametrize(
    ("rows", "flags"),
    [
        (RANKED, ["--model.loss=plackett_luce"]),
        (RANKED, ["--model.loss=regression"]),
        (RANKED, ["--model.loss=ordinal", "--model.levels=[0, 1, 2]"]),
        (RANKED, ["--model.num_members=3", "--model.aggregate=wco"]),
        (LABELLED, ["--model.loss=outcome_bce"]),
        (LABELLED, ["--model.loss=implicit_prm", "--model.head=implicit"]),
        (STEPS, ["--model.loss=step_bce"]),
        (RANKED, ["--model.head=verbalizer", '--model.label_words=["4", "5"]']),
        (RANKED, ["--model.lora.r=2"]),
    ],
    ids=["plackett_luce", "regression", "ordinal", "ensemble", "outcome", "implicit", "steps", "verbalizer", "lora"],
)
def test_every_kind_of_reward_model_trains_from_the_command_line(bench: Any, rows: Any, flags: list[str]) -> None:
    result: RunResult = bench.reward(bench.rows(rows), *flags)
    assert {"loss", "rewards/mean", "rewards/std"} <= set(result.metrics)
    if "--model.head=implicit" not in flags:
        members = 3 if "--model.num_members=3" in flags else 1
        assert result.export is not None
        assert scores_of(result.export, ["Above 3? 4."]).shape == (1, members)


def test_a_reward_model_can_be_trained_further(bench: Any) -> None:
    first = bench.reward("--run.name=first", "--model.num_members=2")
    second = bench.reward("--run.name=second", f"--model.model={first.export}")
    assert "rewards/uncertainty" in second.metrics


def test_on_the_playground_it_is_compared_with_the_gold_reward_on_the_policys_own_answers(bench: Any) -> None:
    small = [
        "--data.playground.num_rows=40",
        "--data.playground.num_val_rows=8",
        "--data.cache_dir=cache",
        "--data.batch_size=8",
        "--trainer.accelerator=cpu",
        "--trainer.max_steps=2",
        "--trainer.val_check_interval=1.0",
        "--trainer.limit_val_batches=1",
        "--model.optimizer.warmup=0",
    ]
    # A folder instead of the preset, so that there is no first stage.
    from lightning_pref.models.backbones import load_model, load_tokenizer

    load_model("playground:tiny").save_pretrained("tiny")
    load_tokenizer("playground:tiny").save_pretrained("tiny")
    result = reward.main([*small, "--model.model=tiny"])
    wanted = {"accuracy", "length_correlation", "within_prompt", "ties"}
    assert {f"probe/policy/reward_variance/{name}" for name in wanted} <= set(result.metrics)
    further = reward.main([*small, f"--model.model={result.export}", "--run.name=further"])
    assert not any(key.startswith("probe/") for key in further.metrics), "a reward model gives no answers"
