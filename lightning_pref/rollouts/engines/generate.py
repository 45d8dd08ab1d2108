"""Sampling with a transformers model: each prompt is computed once, and what has ended leaves the batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from peft import PeftModel
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from typing_extensions import override

from lightning_pref.models.backbones import evaluating
from lightning_pref.models.heads import causal_lm_of
from lightning_pref.rollouts.processors import draw, processed_logps
from lightning_pref.rollouts.sampling import Sampled, Sampler, Sampling, TokenIds

# Rows that have ended are carried along until so many are gone, since taking them out copies the whole cache.
COMPACT_BELOW = 0.75


class CachedSampler(Sampler):
    """Decodes with a key-value cache that all samples of a prompt start from.

    Args:
        sampling: How tokens are drawn.
        end_token: Id that ends a response.
        max_rows: Most responses that are decoded together.
        any_rank: Tells whether any process still has something to decode, given whether this one has. Needed where a forward
            pass is a joint act of all processes (FSDP): then a process that is done goes along.
    """

    def __init__(
        self,
        sampling: Sampling,
        end_token: int,
        *,
        max_rows: int = 256,
        any_rank: Callable[[bool], bool] = lambda alive: alive,
    ) -> None:
        if max_rows < 1:
            raise ValueError(f"`max_rows` must be at least 1, got {max_rows!r}.")
        self.sampling = sampling
        self.end_token = end_token
        self.max_rows = max_rows
        self.any_rank = any_rank

    @override
    def sample(
        self, model: PreTrainedModel | PeftModel, prompts: Sequence[TokenIds], num_samples: int, *, seed: int
    ) -> list[Sampled]:
        if num_samples < 1:
            raise ValueError(f"`num_samples` must be at least 1, got {num_samples!r}.")
        plain = causal_lm_of(model)
        generator = torch.Generator(next(plain.parameters()).device).manual_seed(seed)
        # Whole groups, so that a prompt is computed once; a group larger than the bound is decoded by itself.
        groups = max(1, self.max_rows // num_samples)
        with evaluating(model):
            return [
                sampled
                for start in range(0, len(prompts), groups)
                for sampled in self._decode(plain, prompts[start : start + groups], num_samples, generator)
            ]

    def _decode(
        self, model: PreTrainedModel, prompts: Sequence[TokenIds], num_samples: int, generator: torch.Generator
    ) -> list[Sampled]:
        state = _Decoding(model, prompts, num_samples)
        num_rows = len(prompts) * num_samples
        tokens = np.full((num_rows, self.sampling.max_new_tokens), self.end_token, dtype=np.int32)
        logps = np.zeros((num_rows, self.sampling.max_new_tokens), dtype=np.float32)
        lengths = np.zeros(num_rows, dtype=np.int64)
        ended = np.zeros(num_rows, dtype=bool)
        for position in range(self.sampling.max_new_tokens):
            distribution = self._distribution(state.logits)
            drawn = draw(distribution, generator)
            chosen = distribution.gather(-1, drawn[:, None])[:, 0]
            ids, values = drawn.cpu().numpy(), chosen.float().cpu().numpy()
            alive = ~ended[state.rows]
            writing = state.rows[alive]
            tokens[writing, position], logps[writing, position] = ids[alive], values[alive]
            lengths[writing] = position + 1
            ended[writing] = ids[alive] == self.end_token
            going_on = ~ended[state.rows]
            is_last = position + 1 == self.sampling.max_new_tokens
            if is_last or not self.any_rank(bool(going_on.any())):
                break
            if going_on.any() and going_on.mean() < COMPACT_BELOW:
                keep = np.flatnonzero(going_on)
                state.keep(keep)
                drawn = drawn[torch.as_tensor(keep, device=drawn.device)]
            state.step(drawn)
        responses = [tokens[row, : lengths[row]].copy() for row in range(num_rows)]
        kept = [logps[row, : lengths[row]].copy() for row in range(num_rows)]
        spans = [slice(start, start + num_samples) for start in range(0, num_rows, num_samples)]
        return [Sampled(tuple(responses[s]), tuple(kept[s]), tuple(map(bool, ended[s]))) for s in spans]

    def _distribution(self, logits: Tensor) -> Tensor:
        how = self.sampling
        return processed_logps(logits, temperature=how.temperature, top_k=how.top_k, top_p=how.top_p, min_p=how.min_p)


class _Decoding:
    """The cache and the next-token logits of the rows that are being decoded."""

    logits: Tensor  # [R, V]

    def __init__(self, model: PreTrainedModel, prompts: Sequence[TokenIds], num_samples: int) -> None:
        self.model = model
        device = next(model.parameters()).device
        width = max(map(len, prompts))
        # Left-padded, so that all rows go on in the same column; padding is told apart by the mask, its id never matters.
        ids = np.stack([np.pad(prompt, (width - len(prompt), 0)) for prompt in prompts]).astype(np.int64)
        mask = np.stack([np.arange(width) >= width - len(prompt) for prompt in prompts])
        self.cache = DynamicCache(config=model.config)
        self.mask = torch.as_tensor(mask, device=device).long()
        self._forward(torch.as_tensor(ids, device=device), self.mask.cumsum(-1).sub(1).clamp(min=0))
        self.cache.batch_repeat_interleave(num_samples)
        self.mask = self.mask.repeat_interleave(num_samples, dim=0)
        self.logits = self.logits.repeat_interleave(num_samples, dim=0)
        self.rows = np.arange(len(prompts) * num_samples)

    def step(self, tokens: Tensor) -> None:
        """Append a token to every row."""
        self.mask = torch.cat([self.mask, self.mask.new_ones(len(self.mask), 1)], dim=-1)
        self._forward(tokens[:, None], self.mask.sum(-1, keepdim=True) - 1)

    def keep(self, rows: np.ndarray[tuple[int], np.dtype[np.int64]]) -> None:
        """Go on with some of the rows only."""
        self.rows = self.rows[rows]
        index = torch.as_tensor(rows, device=self.mask.device)
        self.cache.batch_select_indices(index)
        self.mask = self.mask[index]

    def _forward(self, ids: Tensor, positions: Tensor) -> None:
        out = self.model(
            input_ids=ids,
            attention_mask=self.mask,
            position_ids=positions,
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=1,
        )
        self.logits = out.logits[:, -1]
