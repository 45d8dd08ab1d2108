"""Prompts out of rows, and their share among rollouts and ranks."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_pref.data.playground_source import PlaygroundRows, PlaygroundSettings
from lightning_pref.data.playground_tokenizer import playground_tokenizer
from lightning_pref.data.rows import RowError
from lightning_pref.data.sources import read_rows
from lightning_pref.data.templates import Tokenization
from lightning_pref.rollouts.prompts import PromptSampler, prompts_digest, read_prompts


def tokenization(**limits: int) -> Tokenization:
    return Tokenization(playground_tokenizer(), **limits)  # type: ignore[arg-type]


def file_of(folder: Path, rows: list[dict[str, object]]) -> Path:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_rows_with_and_without_responses_give_the_prompt_alone(tmp_path: Path) -> None:
    rows: list[dict[str, object]] = [
        {"prompt": "Name a number."},
        {"prompt": "Name a number.", "chosen": " 4", "rejected": " x"},
        {"prompt": [{"role": "user", "content": "Name a number."}], "answer": "4"},
    ]
    plain, paired, chat = read_prompts([read_rows(file_of(tmp_path, rows))], tokenization())[0]
    tokenizer = playground_tokenizer()
    assert plain.ids.tolist() == paired.ids.tolist() == tokenizer("Name a number.")["input_ids"]
    rendered = tokenizer.apply_chat_template(rows[2]["prompt"], tokenize=False, add_generation_prompt=True)
    assert chat.ids.tolist() == tokenizer(rendered, add_special_tokens=False)["input_ids"]
    assert (plain.text, chat.text) == (rows[0]["prompt"], rows[2]["prompt"])
    assert chat.columns["answer"] == "4"
    assert [prompt.row_id for prompt in (plain, paired, chat)] == [0, 1, 2]


def test_a_long_prompt_loses_its_start() -> None:
    source = PlaygroundRows("playground", PlaygroundSettings(num_rows=8), "train")
    whole, short = (read_prompts([source], tokenization(**limits))[0] for limits in ({}, {"max_prompt_length": 9}))
    for before, after in zip(whole, short, strict=True):
        assert after.ids.tolist() == [before.ids[0], *before.ids[-8:]]


def test_a_row_without_a_prompt_is_refused_or_left_out(tmp_path: Path) -> None:
    source = read_rows(file_of(tmp_path, [{"prompt": "Say 1."}, {"text": "Once."}, {"prompt": "Say 2."}]))
    with pytest.raises(RowError, match="row 2, field `prompt`: found a row without a prompt; expected a column `prompt`"):
        read_prompts([source], tokenization())
    prompts, errors = read_prompts([source], tokenization(), skip_bad=True)
    assert [prompt.row_id for prompt in prompts] == [0, 2]
    assert [error.reason for error in errors] == ["no_prompt"]


def test_nothing_but_bad_rows_raises_with_the_first_of_them(tmp_path: Path) -> None:
    source = read_rows(file_of(tmp_path, [{"text": "Once."}]))
    with pytest.raises(ValueError, match="None of the 1 rows has a usable prompt. The first: rows.jsonl, row 1"):
        read_prompts([source], tokenization(), skip_bad=True)


def test_the_digest_changes_with_a_token() -> None:
    source = PlaygroundRows("playground", PlaygroundSettings(num_rows=4), "train")
    prompts, _ = read_prompts([source], tokenization())
    again, _ = read_prompts([source], tokenization())
    assert prompts_digest(prompts) == prompts_digest(again)
    again[2].ids[1] += 1
    assert prompts_digest(prompts) != prompts_digest(again)


@given(
    num_prompts=st.integers(1, 60),
    per_rollout=st.integers(1, 9),
    ranks=st.integers(1, 4),
    seed=st.integers(0, 3),
    epoch=st.integers(0, 2),
)
def test_P7_every_prompt_is_drawn_once_per_epoch_whole_and_by_one_rank(
    num_prompts: int, per_rollout: int, ranks: int, seed: int, epoch: int
) -> None:
    samplers = [
        PromptSampler(num_prompts, per_rollout=per_rollout, num_replicas=ranks, rank=rank, seed=seed) for rank in range(ranks)
    ]
    seen: Counter[int] = Counter()
    for sampler in samplers:
        sampler.set_epoch(epoch)
    sizes = []
    for rollout in range(samplers[0].num_rollouts):
        drawn = [sampler.drawn(rollout) for sampler in samplers]
        assert len({len(each.places) for each in drawn}) == 1, "every rank has as much to do"
        assert len(drawn[0].places) <= per_rollout
        assert drawn[0].num_fillers == 0, "the first rank has real prompts only, so no update is of fillers alone"
        assert all(each.num_fillers <= 1 for each in drawn)
        real = [place for each in drawn for place in each.places[: len(each.places) - each.num_fillers]]
        sizes.append(len(real))
        seen.update(real)
        assert len(drawn[0].places) >= samplers[0].fewest
    assert seen == Counter(range(num_prompts))
    assert max(sizes) - min(sizes) <= 1, "no rollout is a small rest"


def test_epochs_and_seeds_shuffle_and_ranks_sample_with_seeds_of_their_own() -> None:
    sampler = PromptSampler(40, per_rollout=10)
    orders = []
    for epoch in (0, 1, 0):
        sampler.set_epoch(epoch)
        orders.append([sampler.drawn(rollout).places for rollout in range(4)])
    assert orders[0] == orders[2] != orders[1]
    other = PromptSampler(40, per_rollout=10, seed=1)
    assert other.drawn(0) != sampler.drawn(0)
    seeds = set()
    for rank in range(3):
        for epoch in range(3):
            own = PromptSampler(40, per_rollout=10, num_replicas=3, rank=rank)
            own.set_epoch(epoch)
            seeds |= {own.seed_of(rollout) for rollout in range(2)}
    assert len(seeds) == 18
    assert all(0 <= seed < np.iinfo(np.int64).max for seed in seeds)
