"""Decoding token by token: the cache that all samples of a prompt start from, and the rows that go on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from typing_extensions import override

from lightning_pref.rollouts.processors import draw, processed_logps
from lightning_pref.rollouts.sampling import Sampled, Sampling, TokenIds

# Rows that have ended are carried along until so many are gone, since taking them out copies the whole cache.
COMPACT_BELOW = 0.75

RowIndex = np.ndarray[Any, np.dtype[np.integer[Any]]]
Noise = np.ndarray[Any, np.dtype[np.float64]]


class Speaker(Protocol):
    """What says how likely every next token is, for rows that go on together."""

    logits: Tensor  # [R, V]

    def step(self, tokens: Tensor) -> None:
        """Append a token to every row, [R]."""

    def keep(self, rows: RowIndex) -> None:
        """Go on with some of the rows only."""


class PromptCache(Speaker):
    """The key-value cache and the next-token logits of one model. Every prompt is computed once, for all of its samples.

    Args:
        model: Decodes; the caller has set its mode.
        prompts: Token ids, none empty.
        num_samples: Rows that start from each prompt.
    """

    def __init__(self, model: PreTrainedModel, prompts: Sequence[TokenIds], num_samples: int) -> None:
        self.model = model
        device = next(model.parameters()).device
        width = max(map(len, prompts))
        # Left-padded, so that all rows go on in the same column; padding is told apart by the mask, its id never matters.
        ids = np.stack([np.pad(prompt, (width - len(prompt), 0)) for prompt in prompts]).astype(np.int64)
        mask = np.stack([np.arange(width) >= width - len(prompt) for prompt in prompts])
        self.cache = DynamicCache(config=model.config)
        self.mask = torch.as_tensor(mask, device=device).long()
        logits = self._forward(torch.as_tensor(ids, device=device), self.mask.cumsum(-1).sub(1).clamp(min=0))
        self.cache.batch_repeat_interleave(num_samples)
        self.mask = self.mask.repeat_interleave(num_samples, dim=0)
        self.logits = logits.repeat_interleave(num_samples, dim=0)

    @override
    def step(self, tokens: Tensor) -> None:
        self.mask = torch.cat([self.mask, self.mask.new_ones(len(self.mask), 1)], dim=-1)
        self.logits = self._forward(tokens[:, None], self.mask.sum(-1, keepdim=True) - 1)

    @override
    def keep(self, rows: RowIndex) -> None:
        index = torch.as_tensor(rows, device=self.mask.device)
        self.cache.batch_select_indices(index)
        self.mask = self.mask[index]
        self.logits = self.logits[index]

    def _forward(self, ids: Tensor, positions: Tensor) -> Tensor:
        """The logits after the last token, [R, V]."""
        out = self.model(
            input_ids=ids,
            attention_mask=self.mask,
            position_ids=positions,
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=1,
        )
        logits: Tensor = out.logits[:, -1]
        return logits


class Decoding:
    """Responses that are being decoded. It can stop anywhere, have rows dropped, and go on.

    Args:
        speaker: Gives the logits.
        sampling: How tokens are drawn.
        end_token: Id that ends a response.
        noise: See `sample_noise`, [R, max_new_tokens].
        any_rank: Tells whether any process still has something to decode, given whether this one has.
    """

    def __init__(
        self,
        speaker: Speaker,
        sampling: Sampling,
        end_token: int,
        noise: Noise,
        any_rank: Callable[[bool], bool] = lambda alive: alive,
    ) -> None:
        self.speaker = speaker
        self.sampling = sampling
        self.end_token = end_token
        self.any_rank = any_rank
        num_rows = len(noise)
        self.position = 0
        self.rows = np.arange(num_rows)  # of the responses, those that are still in the batch
        self.tokens = np.full(noise.shape, end_token, dtype=np.int32)
        self.logps = np.zeros(noise.shape, dtype=np.float32)
        self.lengths = np.zeros(num_rows, dtype=np.int64)
        self.ended = np.zeros(num_rows, dtype=bool)
        self.dropped = np.zeros(num_rows, dtype=bool)
        self._noise = torch.as_tensor(noise, device=speaker.logits.device)
        self._drawn: Tensor | None = None
        self._compacts_now = False

    def advance(self, position: int) -> None:
        """Go on until every response has that many tokens, has ended or was dropped."""
        while self.position < position and self.any_rank(bool(self._going_on().any())):
            if self._drawn is not None:
                self._leave_behind()
                self.speaker.step(self._drawn)
            self._draw()

    def drop(self, rows: RowIndex) -> None:
        """Decode these responses no further."""
        self.dropped[rows] = True
        self._compacts_now = True

    def response(self, row: int) -> TokenIds:
        """What a response is so far."""
        return self.tokens[row, : self.lengths[row]].copy()

    def sampled(self, rows: Sequence[int]) -> Sampled:
        """Some of the responses as they are."""
        return Sampled(
            responses=tuple(self.response(row) for row in rows),
            token_logps=tuple(self.logps[row, : self.lengths[row]].copy() for row in rows),
            ended=tuple(bool(self.ended[row]) for row in rows),
        )

    def _going_on(self) -> np.ndarray[Any, np.dtype[np.bool_]]:
        """Which of the rows in the batch need another token."""
        return ~(self.ended | self.dropped)[self.rows]

    def _leave_behind(self) -> None:
        """Take rows that do not go on out of the batch, once it pays."""
        going_on = self._going_on()
        pays = self._compacts_now or going_on.mean() < COMPACT_BELOW
        # A process that has nothing left to decode but goes along with others keeps its rows.
        if pays and going_on.any() and not going_on.all():
            kept = np.flatnonzero(going_on)
            self.rows = self.rows[kept]
            self.speaker.keep(kept)
            assert self._drawn is not None
            self._drawn = self._drawn[torch.as_tensor(kept, device=self._drawn.device)]
        self._compacts_now = False

    def _draw(self) -> None:
        how = self.sampling
        distribution = processed_logps(
            self.speaker.logits, temperature=how.temperature, top_k=how.top_k, top_p=how.top_p, min_p=how.min_p
        )
        index = torch.as_tensor(self.rows, device=self._noise.device)
        drawn = draw(distribution, self._noise[index, self.position])
        chosen = distribution.gather(-1, drawn[:, None])[:, 0]
        ids, values = drawn.cpu().numpy(), chosen.float().cpu().numpy()
        alive = self._going_on()
        writing = self.rows[alive]
        self.tokens[writing, self.position], self.logps[writing, self.position] = ids[alive], values[alive]
        self.position += 1
        self.lengths[writing] = self.position
        self.ended[writing] = ids[alive] == self.end_token
        self._drawn = drawn


def sample_noise(seed: int, prompts: Sequence[int], num_samples: int, length: int) -> Noise:
    """Uniform numbers in [0, 1) for every token that may be drawn, [P * K, length].

    What a sample draws is a function of the seed, the number of its prompt, its own number and the position: not of how many
    other samples there are, how they are batched, or which of them end or are dropped.

    Args:
        seed: Of the call.
        prompts: Numbers of the prompts.
        num_samples: Samples of each prompt.
        length: Most tokens of a response.
    """
    streams = [np.random.default_rng([seed % 2**64, prompt, sample]) for prompt in prompts for sample in range(num_samples)]
    return np.stack([stream.random(length) for stream in streams])
