"""Speculative rejection: best-of-n that stops unpromising responses early.

Sun et al. 2024, "Fast Best-of-N Decoding via Speculative Rejection" (arXiv 2410.20290). At each checkpoint the responses are
scored as far as they have come and the lower part is given up. The paper takes its checkpoints from the memory that is free;
here they are named, or follow from a number of tokens, so that a run can be repeated on any machine.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
from peft import PeftModel
from transformers import PreTrainedModel

from lightning_pref.models.backbones import evaluating
from lightning_pref.models.heads import causal_lm_of
from lightning_pref.rollouts.engines.decoding import Decoding, PromptCache, sample_noise
from lightning_pref.rollouts.sampling import Sampled, Sampling, TokenIds
from lightning_pref.rollouts.scoring import Asked, Score, best, best_first, scores_of

Numbers = np.ndarray[Any, np.dtype[np.float64]]


class Round(NamedTuple):
    """What happened to the responses of one prompt at one checkpoint."""

    position: int  # tokens that those had which had not ended
    num_responses: int
    num_kept: int
    threshold: float  # lowest score that was kept
    spearman: float  # of scores here and at the end, over the kept responses that had not ended here; `nan` below two


class Speculated(NamedTuple):
    """The responses to one prompt that were left in the end."""

    sampled: Sampled
    numbers: tuple[int, ...]  # of these responses among those that were started
    scores: tuple[float, ...]  # of the whole responses
    best: int | None  # index of the highest score, the first of equal ones; `None` where none has a score
    rounds: tuple[Round, ...]
    num_tokens: int  # decoded, of given up responses too
    fewest_tokens: int  # that best-of-n decodes from this start if what was given up would have ended with the next token
    most_tokens: int  # that best-of-n decodes from this start if what was given up never ends before the bound
    num_scorings: int
    num_unscored: int  # scorings that gave no number; such a response ranks below all others


@dataclass(frozen=True, kw_only=True)
class SpeculativeRejection:
    """How many responses are given up, and when.

    Args:
        sampling: How tokens are drawn.
        end_token: Id that ends a response.
        alpha: Share of the responses that a checkpoint gives up, 0 <= alpha < 1; 0 is best-of-n. See `num_kept` for rounding.
        checkpoints: Lengths at which responses are scored, rising, below `max_new_tokens`; see also `checkpoints_of_capacity`.
        max_rows: Most responses that are decoded together; those of one prompt always are.
        any_rank: As in `CachedSampler`.
    """

    sampling: Sampling
    end_token: int
    alpha: float = 0.5
    checkpoints: tuple[int, ...] = ()
    max_rows: int = 256
    any_rank: Callable[[bool], bool] = lambda alive: alive

    def __post_init__(self) -> None:
        _check_alpha(self.alpha)
        if self.max_rows < 1:
            raise ValueError(f"`max_rows` must be at least 1, got {self.max_rows!r}.")
        bounds = (0, *self.checkpoints, self.sampling.max_new_tokens)
        if any(later <= earlier for earlier, later in pairwise(bounds)):
            raise ValueError(
                f"`checkpoints` must rise from 1 and stay below `max_new_tokens` ({self.sampling.max_new_tokens}), where whole "
                f"responses are scored; got {list(self.checkpoints)}."
            )

    def sample(
        self, model: PreTrainedModel | PeftModel, prompts: Sequence[TokenIds], n: int, score: Score, *, seed: int
    ) -> list[Speculated]:
        """Start n responses to every prompt and go on with the promising ones.

        A response draws the same tokens as with `CachedSampler` and the same seed, whatever happens to the others. A response
        that ends before a checkpoint stays in the running with the score of the whole and is not scored again.

        Args:
            model: The policy; it is left as it was.
            prompts: Token ids.
            n: Responses to start with.
            score: Scores responses, cut ones as they are.
            seed: Of the sampling.
        """
        if n < 1:
            raise ValueError(f"`n` must be at least 1, got {n!r}.")
        plain = causal_lm_of(model)
        groups = max(1, self.max_rows // n)
        with evaluating(model):
            return [
                found
                for start in range(0, len(prompts), groups)
                for found in self._decode(plain, prompts[start : start + groups], n, score, first=start, seed=seed)
            ]

    def _decode(
        self, model: PreTrainedModel, prompts: Sequence[TokenIds], n: int, score: Score, *, first: int, seed: int
    ) -> list[Speculated]:
        """Decode one batch; `first` is the place of its first prompt in the call."""
        length = self.sampling.max_new_tokens
        noise = sample_noise(seed, range(first, first + len(prompts)), n, length)
        decoding = Decoding(PromptCache(model, prompts, n), self.sampling, self.end_token, noise, self.any_rank)
        races = [_Race(decoding, first + number, number * n, n) for number in range(len(prompts))]
        for checkpoint in self.checkpoints:
            decoding.advance(checkpoint)
            _score_all(races, score)
            for race in races:
                race.give_up(self.alpha, checkpoint)
        decoding.advance(length)
        _score_all(races, score)
        return [race.finish(length) for race in races]


class _Race:
    """The responses of one prompt that are still in the running."""

    def __init__(self, decoding: Decoding, prompt: int, start: int, n: int) -> None:
        self.decoding = decoding
        self.prompt = prompt
        self.start = start
        self.pool = list(range(start, start + n))  # rows of the decoding
        self.scores: dict[int, float] = {}
        self.scored_at: dict[int, int] = {}  # the length that the score is of
        self.rounds: list[Round] = []
        self.partial: list[dict[int, float]] = []  # of each checkpoint: scores of the kept rows that had not ended
        self.all_rows = list(self.pool)
        self.num_scorings = 0
        self.num_unscored = 0

    def unscored(self) -> list[int]:
        """Rows that have grown since they were scored, or never were."""
        return [row for row in self.pool if self.scored_at.get(row) != self.decoding.lengths[row]]

    def take(self, rows: Sequence[int], scores: Sequence[float]) -> None:
        for row, value in zip(rows, scores, strict=True):
            self.scores[row] = value
            self.scored_at[row] = int(self.decoding.lengths[row])
        self.num_scorings += len(rows)
        self.num_unscored += sum(map(math.isnan, scores))

    def give_up(self, alpha: float, position: int) -> None:
        scores = [self.scores[row] for row in self.pool]
        order = best_first(scores)[: num_kept(alpha, len(self.pool))]
        # In the order of the rows, so that equal scores go by number at the next checkpoint, too.
        kept = [self.pool[i] for i in sorted(order)]
        # How well the scores here foretold the last ones is known in the end.
        self.rounds.append(Round(position, len(self.pool), len(kept), scores[order[-1]], spearman=math.nan))
        self.partial.append({row: self.scores[row] for row in kept if not self.decoding.ended[row]})
        given_up = sorted(set(self.pool) - set(kept))
        if given_up:
            self.decoding.drop(np.array(given_up))
        self.pool = kept

    def finish(self, bound: int) -> Speculated:
        decoding = self.decoding
        scores = tuple(self.scores[row] for row in self.pool)
        rounds = [
            found._replace(spearman=self._spearman(partial)) for found, partial in zip(self.rounds, self.partial, strict=True)
        ]
        num_tokens = int(decoding.lengths[self.all_rows].sum())
        cut = [row for row in self.all_rows if decoding.dropped[row] and not decoding.ended[row]]
        return Speculated(
            sampled=decoding.sampled(self.pool),
            numbers=tuple(row - self.start for row in self.pool),
            scores=scores,
            best=best(scores),
            rounds=tuple(rounds),
            num_tokens=num_tokens,
            fewest_tokens=num_tokens + len(cut),
            most_tokens=num_tokens + sum(bound - int(decoding.lengths[row]) for row in cut),
            num_scorings=self.num_scorings,
            num_unscored=self.num_unscored,
        )

    def _spearman(self, partial: dict[int, float]) -> float:
        rows = [row for row in self.pool if row in partial]
        early, late = np.array([partial[row] for row in rows]), np.array([self.scores[row] for row in rows])
        known = ~(np.isnan(early) | np.isnan(late))
        return rank_correlation(early[known], late[known])


def _score_all(races: Sequence[_Race], score: Score) -> None:
    asked_rows = [race.unscored() for race in races]
    asked = []
    for race, rows in zip(races, asked_rows, strict=True):
        so_far = race.decoding.sampled(rows)
        asked.append(Asked(race.prompt, so_far.responses, so_far.ended))
    for race, rows, scores in zip(races, asked_rows, scores_of(score, asked), strict=True):
        race.take(rows, scores)


def num_kept(alpha: float, num_responses: int) -> int:
    """Responses that a checkpoint keeps: (1 - alpha) n rounded to the nearest number, halves up, and at least 1.

    >>> num_kept(0.5, 5), num_kept(0.99, 5), num_kept(0.0, 5)
    (3, 1, 5)
    """
    return max(1, math.floor((1 - alpha) * num_responses + 0.5))


def checkpoints_of_capacity(capacity: int, n: int, alpha: float, max_new_tokens: int) -> tuple[int, ...]:
    """Checkpoints where a cache for so many response tokens of one prompt is full: roughly geometric in 1 / (1 - alpha).

    With K responses in the running it is full when each has capacity / K tokens. Responses that end early leave room that
    this schedule does not count on, so that it is known in advance and the same for every prompt.

    >>> checkpoints_of_capacity(512, n=32, alpha=0.5, max_new_tokens=256)
    (16, 32, 64, 128)

    Args:
        capacity: Response tokens of all samples of a prompt together.
        n: Responses to start with.
        alpha: Share that a checkpoint gives up, 0 < alpha < 1.
        max_new_tokens: Longest response.
    """
    _check_alpha(alpha)
    if alpha == 0:
        raise ValueError("A token capacity needs an `alpha` above 0: with 0 nothing is given up and no room is made.")
    if capacity < n:
        raise ValueError(
            f"A capacity of {capacity} tokens is less than one for each of {n} responses; give at least {n}, or start with fewer."
        )
    found: list[int] = []
    alive = n
    while capacity // alive < max_new_tokens and num_kept(alpha, alive) < alive:
        # Where the room made is less than a token for each, the next checkpoint is the same one.
        if not found or capacity // alive > found[-1]:
            found.append(capacity // alive)
        alive = num_kept(alpha, alive)
    return tuple(found)


def rank_correlation(first: Numbers, second: Numbers) -> float:
    """Spearman's correlation: Pearson's of the ranks, equal values sharing the mean of theirs; `nan` where one is constant."""
    if len(first) < 2:
        return math.nan
    ranks = [_ranks(values) for values in (first, second)]
    centred = [rank - rank.mean() for rank in ranks]
    scale = math.sqrt(float((centred[0] ** 2).sum()) * float((centred[1] ** 2).sum()))
    return float((centred[0] * centred[1]).sum()) / scale if scale > 0 else math.nan


def _ranks(values: Numbers) -> Numbers:
    _, group, counts = np.unique(values, return_inverse=True, return_counts=True)
    ends = counts.cumsum()
    means: Numbers = ends - (counts - 1) / 2
    return means[group]


def _check_alpha(alpha: float) -> None:
    if not 0 <= alpha < 1:
        raise ValueError(f"`alpha` must be in [0, 1), got {alpha!r}; it is the share of responses that a checkpoint gives up.")
