"""Watch TRL's trainers: the same monitors on a `DPOTrainer` and a `RewardTrainer`, with one line each.

pip install trl==1.16.0
python examples/attach_trl.py --out runs/attach_trl
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification, PreTrainedTokenizerFast, Trainer
from trl import DPOConfig, DPOTrainer, RewardConfig, RewardTrainer

from lightning_pref.callbacks import LikelihoodDisplacementTracker, RewardVarianceMonitor, SpikeAwareOptimizerReset
from lightning_pref.integrations.transformers import attach
from lightning_pref.integrations.trl import ObserveDPO, ObserveRewards, rows_by_id

WORDS = ["what", "is", "the", "colour", "of", "a", "sky", "leaf", "rose", "coal", "?", "it", "blue", "green", "red", "black", "."]
SPECIAL = ["<pad>", "<bos>", "<eos>", "<unk>"]
SETTINGS: dict[str, Any] = {
    "per_device_train_batch_size": 4,
    "logging_steps": 10,
    "report_to": "tensorboard",
    "save_strategy": "no",
    "use_cpu": True,
    "bf16": False,
    "disable_tqdm": True,
}


def tokenizer() -> PreTrainedTokenizerFast:
    """One token a word, made without a download."""
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate([*SPECIAL, *WORDS])}))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    names = ("pad_token", "bos_token", "eos_token", "unk_token")
    return PreTrainedTokenizerFast(tokenizer_object=words, **dict(zip(names, SPECIAL, strict=True)))


def tiny_llama(**changes: int) -> LlamaConfig:
    """Two layers, so that a core trains it in seconds."""
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    return LlamaConfig(vocab_size=len(SPECIAL) + len(WORDS), **sizes, **changes, pad_token_id=0, bos_token_id=1, eos_token_id=2)


def preferences() -> Dataset:
    """Right and wrong colours."""
    colours = {"sky": "blue", "leaf": "green", "rose": "red", "coal": "black"}
    rows = [
        {"prompt": f"what is the colour of a {thing} ?", "chosen": f" it is {right} .", "rejected": f" it is {wrong} ."}
        for thing, right in colours.items()
        for wrong in colours.values()
        if wrong != right
    ]
    return Dataset.from_list(rows)


def reports(trainer: Trainer, *prefixes: str) -> dict[str, float]:
    """The last value of every key of some monitors."""
    entries = trainer.state.log_history
    return {key: value for entry in entries for key, value in entry.items() if key.startswith(prefixes)}


def watch_dpo(folder: Path, steps: int) -> dict[str, float]:
    """DPO, with the displacement of its pairs and a guard against spikes."""
    model = LlamaForCausalLM(tiny_llama())
    trainer = DPOTrainer(
        model=model,
        ref_model=deepcopy(model),
        args=DPOConfig(output_dir=str(folder), max_steps=steps, learning_rate=2e-2, **SETTINGS),
        train_dataset=preferences(),
        processing_class=tokenizer(),
    )
    tracker = LikelihoodDisplacementTracker()
    attach(trainer, tracker, SpikeAwareOptimizerReset(mode="evidence"), ObserveDPO())
    trainer.train()
    numbers = rows_by_id(trainer)
    for pair in tracker.worst_rows()[:3]:
        row = trainer.train_dataset[numbers[pair.row_id]]
        print(f"{pair.chosen_change:+.2f} nats: {row['prompt']}{row['chosen']} (not:{row['rejected']})")
    return reports(trainer, "displacement/", "spike/")


def watch_reward_model(folder: Path, steps: int) -> dict[str, float]:
    """A reward model, with how well it tells the two responses of a row apart."""
    trainer = RewardTrainer(
        model=LlamaForSequenceClassification(tiny_llama(num_labels=1)),
        args=RewardConfig(output_dir=str(folder), max_steps=steps, learning_rate=1e-2, **SETTINGS),
        train_dataset=preferences(),
        processing_class=tokenizer(),
    )
    attach(trainer, RewardVarianceMonitor(), ObserveRewards())
    trainer.train()
    return reports(trainer, "reward_variance/")


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Train both."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/attach_trl"), help="folder of the run")
    parser.add_argument("--steps", type=int, default=40)
    options = parser.parse_args(argv)

    # TRL calls transformers by names that the newest transformers announces to drop.
    warnings.filterwarnings("ignore", message=".*will be removed in v6", category=FutureWarning)
    torch.manual_seed(0)
    found = {
        "dpo": watch_dpo(options.out / "dpo", options.steps),
        "reward": watch_reward_model(options.out / "reward", options.steps),
    }
    for values in found.values():
        for key, value in values.items():
            print(f"{key:45} {value:8.4f}")
    print(f"tensorboard --logdir {options.out}")
    return found


if __name__ == "__main__":
    main()
