"""Responses, whole or cut, brought to whatever scores them, and put in order by their scores."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from transformers import PreTrainedTokenizerBase

from lightning_pref.data.groups import PromptGroup
from lightning_pref.rollouts.prompts import Prompt
from lightning_pref.rollouts.rewards import Answers, Reward
from lightning_pref.rollouts.sampling import TokenIds


class Asked(NamedTuple):
    """Responses to one prompt that are to be scored."""

    prompt: int  # its number among the prompts that are sampled for
    responses: tuple[TokenIds, ...]  # as far as they have come; none empty
    ended: tuple[bool, ...]  # whether the end token was drawn


# A score for every response that is asked for; `nan` where it has none.
Score = Callable[[Sequence[Asked]], Sequence[Sequence[float]]]


@dataclass(frozen=True)
class RewardScore:
    """Scores by a reward; what has not ended is scored as it is, without an end token.

    Attributes:
        reward: See `lightning_pref.rollouts.rewards`.
        prompts: The prompts that are sampled for, in their order.
        tokenizer: Of the policy.
    """

    reward: Reward
    prompts: Sequence[Prompt]
    tokenizer: PreTrainedTokenizerBase

    def __call__(self, asked: Sequence[Asked]) -> list[list[float]]:
        prompts = [self.prompts[some.prompt] for some in asked]
        answers = Answers(
            prompts=prompts,
            texts=[[str(self.tokenizer.decode(ids, skip_special_tokens=True)) for ids in some.responses] for some in asked],
            groups=[
                PromptGroup(row_id=prompt.row_id, prompt=prompt.ids, responses=some.responses)
                for prompt, some in zip(prompts, asked, strict=True)
            ],
            ended=[some.ended for some in asked],
        )
        flat = iter(self.reward(answers).tolist())
        return [[float(next(flat)) for _ in some.responses] for some in asked]


def scores_of(score: Score, asked: Sequence[Asked]) -> list[list[float]]:
    """The scores of all that is asked for. Prompts without responses are not shown to the scorer."""
    shown = [some for some in asked if some.responses]
    # All at once, so that a reward model is run on full batches.
    found = iter(score(shown) if shown else [])
    scores = [[float(value) for value in next(found, ())] if some.responses else [] for some in asked]
    for some, values in zip(asked, scores, strict=True):
        if len(values) != len(some.responses):
            raise ValueError(
                f"The scorer gave {len(values)} scores for the {len(some.responses)} responses to prompt {some.prompt}; expected "
                "one for each, prompt by prompt."
            )
    return scores


def best_first(scores: Sequence[float]) -> list[int]:
    """The places of the scores in falling order; equal ones in the order they come, `nan` behind all others.

    >>> best_first([1.0, float("nan"), 3.0, 1.0])
    [2, 0, 3, 1]
    """
    return sorted(range(len(scores)), key=lambda i: (math.isnan(scores[i]), 0.0 if math.isnan(scores[i]) else -scores[i]))


def best(scores: Sequence[float]) -> int | None:
    """The place of the highest score, the first of equal ones; `None` where no response has a score.

    >>> best([1.0, 2.0, 2.0])
    1
    """
    first = next(iter(best_first(scores)), None)
    return None if first is None or math.isnan(scores[first]) else first
