"""Sampling with a transformers model: each prompt is computed once, and what has ended leaves the batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from peft import PeftModel
from transformers import PreTrainedModel
from typing_extensions import override

from lightning_pref.models.backbones import evaluating
from lightning_pref.models.heads import causal_lm_of
from lightning_pref.rollouts.engines.decoding import Decoding, PromptCache, sample_noise
from lightning_pref.rollouts.sampling import Sampled, Sampler, Sampling, TokenIds


class CachedSampler(Sampler):
    """Decodes with a key-value cache that all samples of a prompt start from.

    What a sample draws depends on the seed, its prompt's place in the call and its own number only: the first four of eight
    samples are the four samples of the same seed, however the rows are batched.

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
        # Whole groups, so that a prompt is computed once; a group larger than the bound is decoded by itself.
        groups = max(1, self.max_rows // num_samples)
        with evaluating(model):
            return [
                sampled
                for start in range(0, len(prompts), groups)
                for sampled in self._decode(plain, prompts[start : start + groups], num_samples, first=start, seed=seed)
            ]

    def _decode(
        self, model: PreTrainedModel, prompts: Sequence[TokenIds], num_samples: int, *, first: int, seed: int
    ) -> list[Sampled]:
        """Decode one batch; `first` is the place of its first prompt in the call."""
        length = self.sampling.max_new_tokens
        noise = sample_noise(seed, range(first, first + len(prompts)), num_samples, length)
        decoding = Decoding(PromptCache(model, prompts, num_samples), self.sampling, self.end_token, noise, self.any_rank)
        decoding.advance(length)
        return [decoding.sampled(range(start, start + num_samples)) for start in range(0, len(noise), num_samples)]
