"""Exported reward models: rows to score, and what a user of plain transformers gets for them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from lightning_pref.data.groups import GroupBatch, PromptGroup
from lightning_pref.models.backbones import load_tokenizer
from lightning_pref.models.reward_models import response_scores

TOKENIZER = load_tokenizer("playground:tiny")
EOS = int(TOKENIZER.eos_token_id)
PAD = int(TOKENIZER.pad_token_id)


def texts(seed: int = 0, count: int = 5) -> list[PromptGroup]:
    """Rows of several lengths, most of them ending in EOS, one cut off, one of a single token."""
    generator = np.random.default_rng(seed)
    groups = []
    for row in range(count):
        prompt = generator.integers(6, 576, size=generator.integers(1, 9))
        answer = generator.integers(6, 576, size=generator.integers(1, 9))
        ends = [EOS] if row != 1 else []
        groups.append(PromptGroup(row_id=row, prompt=prompt, responses=(np.array([*answer.tolist(), *ends]),)))
    return groups


def plain_scores(folder: Path, groups: list[PromptGroup], *, side: str) -> torch.Tensor:
    """What a user of transformers gets: the exported tokenizer pads, the exported model scores, [K, R]."""
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side=side)
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    assert type(model).__module__.startswith("transformers.")
    rows = [{"input_ids": [*group.prompt.tolist(), *group.responses[0].tolist()]} for group in groups]
    padded = tokenizer.pad(rows, return_tensors="pt")
    with torch.no_grad():
        return model(**padded).logits.T


def assert_scores_alike(model: Any, folder: Path, groups: list[PromptGroup], *, atol: float = 2e-5, **options: Any) -> None:
    with torch.no_grad():
        ours = response_scores(model.eval(), GroupBatch.from_groups(groups), **options).members
    for side in ("right", "left"):
        torch.testing.assert_close(plain_scores(folder, groups, side=side), ours, atol=atol, rtol=1e-5)
    for k, group in enumerate(groups):
        torch.testing.assert_close(plain_scores(folder, [group], side="right")[:, 0], ours[:, k], atol=atol, rtol=1e-5)
