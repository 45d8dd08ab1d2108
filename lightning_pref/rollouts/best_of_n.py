"""Best-of-n: sample n responses and keep the one with the highest score."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from peft import PeftModel
from transformers import PreTrainedModel

from lightning_pref.rollouts.sampling import Sampled, Sampler, TokenIds
from lightning_pref.rollouts.scoring import Asked, Score, best, scores_of


class Chosen(NamedTuple):
    """The responses to one prompt with their scores, and the best of them."""

    sampled: Sampled
    scores: tuple[float, ...]  # one per response, `nan` where there is none
    best: int | None  # index of the response with the highest score, the first of equal ones; `None` where none has a score

    @property
    def num_unscored(self) -> int:
        """Responses without a score; they are never chosen."""
        return sum(map(math.isnan, self.scores))


def best_of_n(
    sampler: Sampler,
    model: PreTrainedModel | PeftModel,
    prompts: Sequence[TokenIds],
    n: int,
    score: Score,
    *,
    seed: int,
) -> list[Chosen]:
    """Sample n responses to every prompt and tell the best.

    `lightning_pref.measures.overoptimization.best_of_n` gives what the best of fewer would have been worth, from the same
    scores.

    Args:
        sampler: Any engine.
        model: The policy.
        prompts: Token ids.
        n: Responses to choose from.
        score: Scores responses.
        seed: Of the sampling.
    """
    sampled = sampler.sample(model, prompts, n, seed=seed)
    asked = [Asked(number, found.responses, found.ended) for number, found in enumerate(sampled)]
    return [Chosen(found, tuple(scores), best(scores)) for found, scores in zip(sampled, scores_of(score, asked), strict=True)]
