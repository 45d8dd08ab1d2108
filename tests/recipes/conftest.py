"""A user's folder: a model and a tokenizer saved by transformers, and rows in TRL's format."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from lightning_pref.cli import RunResult
from lightning_pref.recipes import dpo, reward, sft

END = "<|end|>"
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}"
    + END
    + "{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
)

Row = Mapping[str, object]

PAIRS: list[Row] = [
    {"prompt": f"Name a number above {i}.", "chosen": f" {i + 1} is one.", "rejected": f" Take {i}, or is it {i - 1}?"}
    for i in range(24)
]


def build_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of 300 tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=[END], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator((str(value) for row in PAIRS for value in row.values()), trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END)
    fast.chat_template = CHAT_TEMPLATE
    return fast


def build_model(seed: int) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=300,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=256,
        bos_token_id=None,
        eos_token_id=0,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(config)


def write_rows(path: Path, rows: Sequence[Row]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


class Bench(NamedTuple):
    """What a user brings, and where the runs go."""

    folder: Path
    model: Path
    pairs: Path

    @property
    def runs(self) -> Path:
        return self.folder / "runs"

    def args(self, *more: str) -> list[str]:
        """Few steps on the pairs; what comes later wins."""
        return [
            f"--run.root={self.runs}",
            f"--model.model={self.model}",
            f"--data.train={self.pairs}",
            f"--data.cache_dir={self.folder / 'cache'}",
            "--data.batch_size=4",
            "--data.val_size=4",
            "--trainer.accelerator=cpu",
            "--trainer.max_steps=2",
            "--trainer.log_every_n_steps=1",
            *more,
        ]

    def dpo(self, *more: str) -> RunResult:
        return dpo.main(self.args(*more))

    def reward(self, *more: str) -> RunResult:
        return reward.main(self.args(*more))

    def sft(self, *more: str) -> RunResult:
        return sft.main(self.args(*more))

    def rows(self, rows: Sequence[Row]) -> str:
        """The flag that trains on these rows."""
        return f"--data.train={write_rows(self.folder / 'rows.jsonl', rows)}"


@pytest.fixture(scope="session")
def saved_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    build_model(seed=0).save_pretrained(folder)
    build_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def bench(saved_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bench:
    monkeypatch.chdir(tmp_path)
    return Bench(tmp_path, saved_model, write_rows(tmp_path / "pairs.jsonl", PAIRS))


@pytest.fixture(scope="session")
def another_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("another")
    build_model(seed=1).save_pretrained(folder)
    build_tokenizer().save_pretrained(folder)
    return folder
