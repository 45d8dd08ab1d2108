"""Models of the playground, built from a config with fresh weights: nothing to download."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase

PresetName = Literal["tiny", "small"]
PREFIX = "playground:"


@dataclass(frozen=True)
class Preset:
    """Sizes of a Llama model with tied embeddings."""

    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_key_value_heads: int


PRESETS: Mapping[PresetName, Preset] = {
    "tiny": Preset(hidden_size=128, intermediate_size=448, num_layers=2, num_heads=4, num_key_value_heads=2),
    "small": Preset(hidden_size=320, intermediate_size=896, num_layers=9, num_heads=8, num_key_value_heads=4),
}


def is_preset(name: str) -> bool:
    """Whether a model's name asks for a preset, as "playground:tiny" does."""
    return name.startswith(PREFIX)


def build_preset(name: str, tokenizer: PreTrainedTokenizerBase, seed: int = 0) -> LlamaForCausalLM:
    """A new model of the preset's sizes for the tokenizer's vocabulary, in float32 on the CPU.

    The weights depend on the arguments alone, and the state of torch's random generators is left as it was.

    Args:
        name: "tiny" (about 0.5 M parameters) or "small" (about 10 M), with or without "playground:" in front.
        tokenizer: Gives the vocabulary size and the special tokens.
        seed: Seed of the weights.
    """
    short = name.removeprefix(PREFIX)
    preset = next((preset for known, preset in PRESETS.items() if known == short), None)
    if preset is None:
        raise ValueError(f"Unknown model preset {name!r}; known: {', '.join(PREFIX + known for known in PRESETS)}.")
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=preset.hidden_size,
        intermediate_size=preset.intermediate_size,
        num_hidden_layers=preset.num_layers,
        num_attention_heads=preset.num_heads,
        num_key_value_heads=preset.num_key_value_heads,
        max_position_embeddings=1024,
        # 0.02 is made for wide models; one this narrow learns faster from weights of about 1 / sqrt(width).
        initializer_range=preset.hidden_size**-0.5,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        dtype=torch.float32,
    )
    with torch.random.fork_rng(devices=[]), torch.device("cpu"), _float32_by_default():
        torch.random.manual_seed(seed)
        return LlamaForCausalLM(config)


@contextmanager
def _float32_by_default() -> Iterator[None]:
    """A precision plugin may have set another default, in which other weights would be drawn."""
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        yield
    finally:
        torch.set_default_dtype(default)
