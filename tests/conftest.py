"""Shared, small and real parts: random transformers models and groups of random tokens."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from tallies import print_tallies
from transformers import LlamaConfig, LlamaForCausalLM

from lightning_pref.data.groups import PromptGroup

VOCABULARY = 64

# Two test processes on two cores: more threads each would only fight.
torch.set_num_threads(1)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Here, since with several workers the process that prints knows no other conftest."""
    print_tallies(terminalreporter)


def build_tiny_model(seed: int = 0, **changes: int | float | bool) -> LlamaForCausalLM:
    """A random two-layer Llama, different for every seed."""
    settings: dict[str, int | float | bool] = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "initializer_range": 0.2,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(LlamaConfig(**{**settings, **changes}))


@pytest.fixture
def tiny_model() -> Callable[..., LlamaForCausalLM]:
    return build_tiny_model


def build_random_groups(num_groups: int = 4, num_responses: int = 2, *, seed: int = 0, ranked: bool = True) -> list[PromptGroup]:
    """Groups of ragged random tokens, ranked in the order of their responses."""
    generator = np.random.default_rng(seed)

    def tokens() -> np.ndarray:
        return generator.integers(1, VOCABULARY, size=generator.integers(2, 9))

    return [
        PromptGroup(
            row_id=row,
            prompt=tokens(),
            responses=tuple(tokens() for _ in range(num_responses)),
            ranks=tuple(range(num_responses)) if ranked else None,
        )
        for row in range(num_groups)
    ]


@pytest.fixture
def random_groups() -> Callable[..., list[PromptGroup]]:
    return build_random_groups
