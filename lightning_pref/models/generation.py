"""Answers sampled from a causal LM with transformers' `generate`, leaving no trace on the model or on random state."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from peft import PeftModel
from transformers import GenerationConfig, PreTrainedModel

from lightning_pref.models.backbones import evaluating
from lightning_pref.models.heads import causal_lm_of
from lightning_pref.models.sharding import is_split


def sample_responses(
    model: PreTrainedModel | PeftModel,
    prompts: Sequence[Sequence[int]],
    *,
    eos_token_id: int,
    max_new_tokens: int,
    temperature: float = 1.0,
    seed: int = 0,
    batch_size: int = 64,
) -> list[list[int]]:
    """One sampled response per prompt, cut at its EOS (not included).

    Prompts are left-padded for `generate`; padding is told apart by the attention mask, never by its id. The checkpoint's own
    generation config (top-k, repetition penalty, ...) is left aside: what is sampled is the policy itself.

    Args:
        model: The policy; its training mode and the global random state are restored afterwards.
        prompts: Token ids, none empty.
        eos_token_id: Ends a response.
        max_new_tokens: Longest response.
        temperature: 0 decodes greedily.
        seed: Of the sampling, so that two calls differ by the model alone.
        batch_size: Prompts that are decoded together.
    """
    device = next(model.parameters()).device
    devices = [device] if device.type == "cuda" else []
    # The adapted layers sit inside the plain model; peft's own `generate` would leave a method behind on it.
    plain = causal_lm_of(model)
    with evaluating(model), _own_generation_config_aside(plain), torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        return [
            response
            for start in range(0, len(prompts), batch_size)
            for response in _generate(plain, prompts[start : start + batch_size], eos_token_id, max_new_tokens, temperature)
        ]


@contextmanager
def _own_generation_config_aside(model: PreTrainedModel) -> Iterator[None]:
    """`generate` fills whatever it is not told from the model's config, so a plain one takes its place."""
    own = model.generation_config
    model.generation_config = GenerationConfig()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        model.generation_config = own


def _generate(
    model: PreTrainedModel, prompts: Sequence[Sequence[int]], eos: int, max_new_tokens: int, temperature: float
) -> list[list[int]]:
    device = next(model.parameters()).device
    width = max(len(prompt) for prompt in prompts)
    ids = torch.tensor([[eos] * (width - len(prompt)) + list(prompt) for prompt in prompts], device=device)
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=device)
    # transformers samples from the 50 likeliest tokens unless told otherwise.
    decoding = {"do_sample": False} if temperature == 0 else {"do_sample": True, "temperature": temperature, "top_k": 0}
    sequences = model.generate(  # type: ignore[operator]  # transformers types `generate` as Tensor | Module
        ids,
        attention_mask=mask,
        max_new_tokens=max_new_tokens,
        eos_token_id=eos,
        pad_token_id=eos,
        # Where a forward pass is a joint act of all processes, none may stop before the last one has ended.
        synced_gpus=is_split(model),
        **decoding,
    )
    responses = sequences[:, width:].tolist()
    return [response[: response.index(eos)] if eos in response else response for response in responses]
