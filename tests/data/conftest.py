"""Small trained tokenizers for the tests of rows and templates."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

_CORPUS = [
    "What color is the sky? The sky is blue. The sea is green: not red, not yellow.",
    "Answer: yes\n\nAnswer: no\nThe answer is yes! It is not no.",
    "sky\nyes\nsky",
]


@cache
def _build_tokenizer(*, adds_bos: bool = False, has_bos: bool = True, pad: str = "<|end|>", template: str | None = None) -> Any:
    """A byte-level BPE tokenizer of some 340 tokens, "!" being token 0. Any: transformers' class is untyped for tests."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=340, initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()), show_progress=False
    )
    backend.train_from_iterator(_CORPUS * 3, trainer)
    backend.add_special_tokens([AddedToken(t) for t in ("<|end|>", "<|start|>", "<|user|>", "<|assistant|>", "<|system|>")])
    # Trimmed positions are what GPT-2 and Llama 3 ship with.
    steps: list[Any] = [processors.ByteLevel(trim_offsets=True)]
    if adds_bos:
        start = ("<|start|>", backend.token_to_id("<|start|>"))
        steps.append(processors.TemplateProcessing(single="<|start|> $A", special_tokens=[start]))
    backend.post_processor = processors.Sequence(steps)
    bos = {"bos_token": "<|start|>"} if has_bos else {}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|end|>", pad_token=pad, **bos)
    tokenizer.chat_template = template
    return tokenizer


@pytest.fixture(scope="session")
def build_tokenizer() -> Callable[..., Any]:
    return _build_tokenizer
