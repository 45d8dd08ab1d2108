"""Sampling with transformers' continuous batching: a paged cache, and requests that enter as others end."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from peft import PeftModel
from transformers import ContinuousBatchingConfig, GenerationConfig, PreTrainedModel
from transformers.generation.continuous_batching import ContinuousBatchingManager
from transformers.generation.continuous_batching.requests import GenerationOutput
from typing_extensions import override

from lightning_pref.models.backbones import evaluating
from lightning_pref.models.heads import causal_lm_of
from lightning_pref.rollouts.sampling import Sampled, Sampler, Sampling, TokenIds

# How long to look for a result before looking whether the engine still lives.
POLL_SECONDS = 1.0
STOP_SECONDS = 60.0


class PagedSampler(Sampler):
    """Hands the prompts to the engine that transformers serves with (`init_continuous_batching`).

    It pays on a GPU with flash attention, where many responses of very different lengths are wanted; elsewhere `CachedSampler`
    is faster. Log-probs are those the engine drew with. The same seed gives the same responses for the same prompts in the
    same order on the same machine; unlike `CachedSampler`'s, a response also depends on what is sampled beside it.

    Args:
        sampling: How tokens are drawn.
        end_token: Id that ends a response.
        max_rows: Most responses that are decoded together; the cache is made large enough for these and no larger.
        page_size: Tokens of a page of the cache.
    """

    def __init__(self, sampling: Sampling, end_token: int, *, max_rows: int = 256, page_size: int = 256) -> None:
        if max_rows < 1:
            raise ValueError(f"`max_rows` must be at least 1, got {max_rows!r}.")
        if page_size < 4:
            raise ValueError(f"`page_size` must be at least 4 tokens, got {page_size!r}.")
        self.sampling = sampling
        self.end_token = end_token
        self.max_rows = max_rows
        self.page_size = page_size

    @override
    def sample(
        self, model: PreTrainedModel | PeftModel, prompts: Sequence[TokenIds], num_samples: int, *, seed: int
    ) -> list[Sampled]:
        if num_samples < 1:
            raise ValueError(f"`num_samples` must be at least 1, got {num_samples!r}.")
        if not prompts:
            return []
        plain = causal_lm_of(model)
        check_pageable(plain)
        requests = [prompt.tolist() for prompt in prompts for _ in range(num_samples)]
        device = next(plain.parameters()).device
        devices = [device] if device.type == "cuda" else []
        with evaluating(model), torch.random.fork_rng(devices=devices):
            found = self._run(plain, requests, seed)
        return [self._sampled(found[start : start + num_samples]) for start in range(0, len(found), num_samples)]

    def _run(self, model: PreTrainedModel, requests: list[list[int]], seed: int) -> list[GenerationOutput]:
        """What the engine gives for each request."""
        outputs: dict[str, GenerationOutput] = {}
        # All requests are there before the engine starts, so that how they are batched does not depend on timing.
        with self._engine(model, requests, seed) as engine:
            names = engine.add_requests(requests, max_new_tokens=self.sampling.max_new_tokens)
            engine.start()
            while len(outputs) < len(names):
                output = engine.get_result(timeout=POLL_SECONDS)
                if output is not None and output.is_finished():
                    outputs[output.request_id] = output
                elif output is None and not engine.is_running():
                    break
        failed = next((output for output in outputs.values() if output.error is not None), None)
        if failed is not None or len(outputs) < len(names):
            reason = f"it stopped after {len(outputs)} of {len(names)} responses" if failed is None else failed.error
            raise RuntimeError(
                f"Continuous batching failed: {reason}. Lower `max_rows` if memory ran short, or sample with `CachedSampler`."
            )
        return [outputs[name] for name in names]

    @contextmanager
    def _engine(self, model: PreTrainedModel, requests: list[list[int]], seed: int) -> Iterator[ContinuousBatchingManager]:
        how = self.sampling
        drawing = {"temperature": how.temperature, "top_k": how.top_k, "top_p": how.top_p, "min_p": how.min_p or None}
        config = GenerationConfig(  # type: ignore[no-untyped-call]
            max_new_tokens=how.max_new_tokens,
            eos_token_id=self.end_token,
            pad_token_id=self.end_token,
            do_sample=how.temperature > 0,
            **(drawing if how.temperature > 0 else {}),
        )
        rows = min(self.max_rows, len(requests))
        longest = max(map(len, requests)) + how.max_new_tokens
        settings = ContinuousBatchingConfig(
            page_size=self.page_size,
            # Left to itself the engine takes most of the memory there is, of the GPU or of the machine.
            num_blocks=rows * (-(-longest // self.page_size) + 1),
            max_requests_per_batch=rows,
            max_batch_tokens=max(rows, self.page_size),
            return_logprobs=True,
            seed=seed % 2**63,
            # It would fetch a kernel from the hub and change the model's attention.
            auto_switch_to_flash=False,
        )
        engine: ContinuousBatchingManager = model.init_continuous_batching(  # type: ignore[operator]  # untyped in transformers
            generation_config=config, continuous_batching_config=settings
        )
        try:
            yield engine
        finally:
            # It also gives the model its attention back, which for `eager` was exchanged.
            engine.stop(block=True, timeout=STOP_SECONDS)
            engine.destroy()

    def _sampled(self, outputs: Sequence[GenerationOutput]) -> Sampled:
        responses = tuple(np.array(output.generated_tokens, dtype=np.int32) for output in outputs)
        # Greedily there is one token that can be drawn; the engine gives its log-prob among all.
        sure = self.sampling.temperature == 0
        return Sampled(
            responses=responses,
            token_logps=tuple(
                np.zeros(len(ids), dtype=np.float32) if sure else np.array(output.logprobs, dtype=np.float32)
                for ids, output in zip(responses, outputs, strict=True)
            ),
            ended=tuple(bool(ids[-1] == self.end_token) for ids in responses),
        )


def check_pageable(model: PreTrainedModel) -> None:
    """Raise unless the model can run on a paged cache."""
    attention = str(model.config._attn_implementation)  # noqa: SLF001  # it has no public name
    if attention not in ("sdpa", "eager") and not attention.startswith(("paged|", "flash_attention")):
        raise ValueError(
            f"Continuous batching has no paged form of the attention {attention!r}. Load the model with "
            "`attn_implementation='sdpa'` ('flash_attention_2' on a GPU), or sample with `CachedSampler`."
        )
    kinds = set(getattr(model.config.get_text_config(), "layer_types", None) or ["full_attention"])
    if unknown := sorted(kinds - {"full_attention", "sliding_attention"}):
        raise ValueError(
            f"Continuous batching pages the cache of attention layers, but {type(model).__name__} has layers of the kind "
            f"{unknown[0]!r}. Sample with `CachedSampler`."
        )
