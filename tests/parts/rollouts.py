"""A tiny world for rollouts: prompts in a file, a model of the playground's vocabulary, rewards that are plain functions."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from lightning.pytorch.callbacks import Callback
from transformers import LlamaConfig, LlamaForCausalLM

from lightning_pref.data.playground_tokenizer import playground_tokenizer
from lightning_pref.data.rows import Place, Row
from lightning_pref.modules.optimisation import OptimizerSettings
from lightning_pref.modules.rlhf import RLHFModule
from lightning_pref.reports.summary import RunRecord
from lightning_pref.rollouts.prompts import Prompt
from lightning_pref.rollouts.rewards import Answers
from lightning_pref.rollouts.rollout_data import RolloutData
from lightning_pref.rollouts.sampling import Sampling

VOCABULARY = max(playground_tokenizer().get_vocab().values()) + 1
# No update moves the model, so that what is seen in every update can be computed again afterwards.
STILL = OptimizerSettings(learning_rate=1e-12, schedule="constant", warmup=0)
MOVING = OptimizerSettings(learning_rate=1e-2, schedule="constant", warmup=0)


def speaker(seed: int = 0, **changes: Any) -> LlamaForCausalLM:
    """A random model that says anything in the playground's vocabulary, not too evenly."""
    sizes: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 128,
        "initializer_range": 0.3,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(LlamaConfig(**{**sizes, **changes}))


def write_prompts(folder: Path, num_prompts: int = 8) -> Path:
    path = folder / "prompts.jsonl"
    rows = [{"prompt": f"Name the number {'very ' * (i % 3)}{i}.", "answer": str(i)} for i in range(num_prompts)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def count_of_letters(prompt: str, response: str) -> float:
    """A reward that differs between most responses."""
    return len(response) / 10 + sum(map(ord, response)) % 7


def says_the_answer(prompt: str, response: str, answer: str) -> float:
    return float(answer in response)


def nothing_to_tell(prompt: str, response: str) -> float:
    return 1.0


def sometimes_nan(prompt: str, response: str) -> float:
    return float("nan") if len(response) % 3 == 0 else float(len(response))


def rollout_data(folder: Path, reward: Any = "rollouts:count_of_letters", *, prompts: int = 8, **settings: Any) -> RolloutData:
    given: dict[str, Any] = {
        "tokenizer": playground_tokenizer(),
        "num_prompts": 4,
        "num_samples": 3,
        "sampling": Sampling(max_new_tokens=6),
    }
    return RolloutData(str(write_prompts(folder, prompts)), reward=reward, **{**given, **settings})


def fit(
    folder: Path, module: L.LightningModule, data: RolloutData, callbacks: Sequence[Callback] = (), **settings: Any
) -> RunRecord:
    record = RunRecord()
    given: dict[str, Any] = {"max_epochs": 1, "log_every_n_steps": 1, "logger": [record], "enable_checkpointing": False}
    trainer = L.Trainer(
        accelerator="cpu",
        callbacks=list(callbacks),
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        **{**given, **settings},
    )
    trainer.fit(module, data)
    return record


def trained(
    folder: Path, data: RolloutData | None = None, *, model: LlamaForCausalLM | None = None, **options: Any
) -> RLHFModule:
    """A module after one epoch; by default on eight prompts of the file, whose weights hardly move."""
    options = {"optimizer": STILL, **options}
    module = RLHFModule(speaker() if model is None else model, **options)
    fit(folder, module, rollout_data(folder) if data is None else data)
    return module


def answers_of(
    texts: Sequence[Sequence[str]], *, ended: bool = True, prompts: Callable[[int], str] = lambda i: f"Say {i}."
) -> Answers:
    """Answers as a sampler of the playground's tokenizer would have given them."""
    from lightning_pref.data.groups import PromptGroup
    from lightning_pref.data.templates import Tokenization

    tokenizer = playground_tokenizer()
    tokenization = Tokenization(tokenizer)
    asked, groups = [], []
    for i, own in enumerate(texts):
        row = Row(place=Place("rows", i + 1), prompt=prompts(i))
        ids = tokenization.prompt_ids(row)
        asked.append(Prompt(i, ids, row, {"prompt": row.prompt, "answer": str(i)}))
        end = [tokenizer.eos_token_id] if ended else []
        said = tuple(np.array([*tokenizer(text, add_special_tokens=False)["input_ids"], *end]) for text in own)
        groups.append(PromptGroup(row_id=i, prompt=ids, responses=said))
    return Answers(asked, texts, groups, [[ended] * len(own) for own in texts])


def likes_vowels(prompt: str, response: str) -> float:
    """Share of vowels: something that a small policy can learn in seconds."""
    return sum(letter in "aeiou" for letter in response) / max(len(response), 1)


def dislikes_vowels(prompt: str, response: str) -> float:
    return -likes_vowels(prompt, response)


def begins_words_with_vowels(prompt: str, response: str) -> float:
    """Share of words that begin with a vowel: 1 can be attained, in many ways."""
    words = response.split()
    return sum(word[0] in "aeiouAEIOU" for word in words) / max(len(words), 1)
