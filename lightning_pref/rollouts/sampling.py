"""What sampling is asked for and what it gives, whatever engine does it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
from peft import PeftModel
from transformers import PreTrainedModel

from lightning_pref.domains import check_range

TokenIds = np.ndarray[Any, np.dtype[np.integer[Any]]]


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How responses are drawn.

    Args:
        max_new_tokens: Longest response; one that has not ended by then is cut.
        temperature: Divisor of the logits; 0 decodes greedily.
        top_k: Draw from that many of the likeliest tokens; 0 draws from all.
        top_p: Draw from the likeliest tokens that together have this probability.
        min_p: Draw from tokens at least this many times as likely as the likeliest.
    """

    max_new_tokens: int = 256
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise ValueError(f"`max_new_tokens` must be at least 1, got {self.max_new_tokens!r}.")
        if self.temperature < 0:
            raise ValueError(f"`temperature` must not be negative, got {self.temperature!r}.")
        check_range("temperature", self.temperature)
        if self.top_k < 0:
            raise ValueError(f"`top_k` must not be negative (0 draws from all tokens), got {self.top_k!r}.")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"`top_p` must be in (0, 1], got {self.top_p!r}.")
        if not 0 <= self.min_p < 1:
            raise ValueError(f"`min_p` must be in [0, 1), got {self.min_p!r}.")

    @property
    def cuts_tokens(self) -> bool:
        """Whether some tokens cannot be drawn that the model gives a probability."""
        return self.temperature == 0 or self.top_k > 0 or self.top_p < 1.0 or self.min_p > 0.0


class Sampled(NamedTuple):
    """The responses to one prompt, K of them."""

    responses: tuple[TokenIds, ...]  # the end token included where it was drawn
    token_logps: tuple[np.ndarray[Any, np.dtype[np.float32]], ...]  # of each token under the distribution it was drawn from
    ended: tuple[bool, ...]  # whether the end token was drawn


class Sampler(Protocol):
    """Draws responses. It leaves no trace on the model or on the global random state."""

    def sample(
        self, model: PreTrainedModel | PeftModel, prompts: Sequence[TokenIds], num_samples: int, *, seed: int
    ) -> list[Sampled]:
        """`num_samples` responses for every prompt; the same seed gives the same responses."""
