"""Small, real runs of TRL's trainers, offline. Import TRL by `pytest.importorskip("trl")` before this module."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification, PreTrainedTokenizerFast
from trl import DPOConfig, DPOTrainer, RewardConfig, RewardTrainer

WORDS = ["what", "did", "the", "a", "cat", "dog", "do", "?", "sat", "ran", "on", "mat", "rug", ".", "it", "no", "yes", "slept"]
VOCABULARY = {word: index for index, word in enumerate(["<pad>", "<bos>", "<eos>", "<unk>", *WORDS])}
QUIET = {"report_to": "none", "use_cpu": True, "bf16": False, "disable_tqdm": True, "save_strategy": "no", "seed": 1}


def tokenizer() -> PreTrainedTokenizerFast:
    """One token a word."""
    words = Tokenizer(models.WordLevel(VOCABULARY, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", unk_token="<unk>"
    )


def config(**changes: Any) -> LlamaConfig:
    settings: dict[str, Any] = {
        "vocab_size": len(VOCABULARY),
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "initializer_range": 0.2,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    return LlamaConfig(**{**settings, **changes})


def policy(seed: int = 0) -> LlamaForCausalLM:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(config())


def scorer(seed: int = 0) -> LlamaForSequenceClassification:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForSequenceClassification(config(num_labels=1))


def dataset() -> Dataset:
    """Eight pairs of different lengths, no two alike."""
    rows = []
    for who in ("cat", "dog"):
        for where in ("mat", "rug"):
            ends = ("slept .", "ran on the " + where)
            rows += [
                {"prompt": f"what did the {who} do ?", "chosen": f" the {who} sat on a {where} .", "rejected": f" it {end}"}
                for end in ends
            ]
    return Dataset.from_list(rows)


def dpo_trainer(folder: Path, model: Any = None, reference: Any = None, **changes: Any) -> DPOTrainer:
    model = policy() if model is None else model
    settings: dict[str, Any] = {"per_device_train_batch_size": 4, "logging_steps": 1, "learning_rate": 1e-2, "max_steps": 4}
    peft_config = changes.pop("peft_config", None)
    return DPOTrainer(
        model=model,
        ref_model=None if peft_config else (copy.deepcopy(model) if reference is None else reference),
        args=DPOConfig(output_dir=str(folder), **{**QUIET, **settings, **changes}),
        train_dataset=dataset(),
        eval_dataset=dataset().select(range(4)),
        processing_class=tokenizer(),
        peft_config=peft_config,
    )


def reward_trainer(folder: Path, **changes: Any) -> RewardTrainer:
    settings: dict[str, Any] = {"per_device_train_batch_size": 4, "logging_steps": 1, "learning_rate": 1e-2, "max_steps": 4}
    return RewardTrainer(
        model=scorer(),
        args=RewardConfig(output_dir=str(folder), **{**QUIET, **settings, **changes}),
        train_dataset=dataset(),
        eval_dataset=dataset().select(range(4)),
        processing_class=tokenizer(),
    )
