"""Answers sampled from a causal LM with transformers' `generate`, leaving no trace on the model or on random state."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from peft import PeftModel
from transformers import PreTrainedModel

from lightning_pref.models.backbones import evaluating


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

    Prompts are left-padded for `generate`; padding is told apart by the attention mask, never by its id.

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
    with evaluating(model), torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        return [
            response
            for start in range(0, len(prompts), batch_size)
            for response in _generate(model, prompts[start : start + batch_size], eos_token_id, max_new_tokens, temperature)
        ]


def _generate(
    model: PreTrainedModel | PeftModel, prompts: Sequence[Sequence[int]], eos: int, max_new_tokens: int, temperature: float
) -> list[list[int]]:
    device = next(model.parameters()).device
    width = max(len(prompt) for prompt in prompts)
    ids = torch.tensor([[eos] * (width - len(prompt)) + list(prompt) for prompt in prompts], device=device)
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=device)
    decoding = {"do_sample": False} if temperature == 0 else {"do_sample": True, "temperature": temperature}
    # top_k and top_p are named because generation_config.json of a checkpoint may narrow them silently.
    sequences = model.generate(  # type: ignore[operator]  # transformers types `generate` as Tensor | Module
        ids,
        attention_mask=mask,
        max_new_tokens=max_new_tokens,
        eos_token_id=eos,
        pad_token_id=eos,
        **decoding,
        **({} if temperature == 0 else {"top_k": 0, "top_p": 1.0}),
    )
    responses = sequences[:, width:].tolist()
    return [response[: response.index(eos)] if eos in response else response for response in responses]
