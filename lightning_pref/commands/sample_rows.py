"""What `sample` writes: rows that the data reader takes, and what does not make one."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase

from lightning_pref.data.formats import SHARED_COLUMNS, parse_row
from lightning_pref.data.rows import Place, RowError
from lightning_pref.rollouts.pilaf import SampledPairs
from lightning_pref.rollouts.prompts import Prompt
from lightning_pref.rollouts.sampling import Sampled

# JSON.
RawRow = dict[str, Any]


class Rows(NamedTuple):
    """Rows in the order of the prompts, and what was left out, by reason."""

    rows: list[RawRow]
    left_out: Counter[str]


class Answer(NamedTuple):
    """One response as text."""

    text: str
    score: float | None  # `None` where nothing scored it


def answers_of(sampled: Sampled, scores: Sequence[float] | None, tokenizer: PreTrainedTokenizerBase) -> list[Answer]:
    """The responses to one prompt as text, without special tokens."""
    texts = [str(tokenizer.decode(ids, skip_special_tokens=True)) for ids in sampled.responses]
    return [Answer(text, None if scores is None else scores[number]) for number, text in enumerate(texts)]


def listed_rows(prompts: Sequence[Prompt], answers: Sequence[Sequence[Answer]], *, keep_all: bool) -> Rows:
    """All responses of each prompt in one row.

    Blank responses and those whose score is `nan` are left out. A single response makes a row with `completion`. Without
    scores all ranks are equal: the order of the samples is no preference, and rows without ranks would be read as ranked.

    Args:
        prompts: What was answered.
        answers: Responses of each.
        keep_all: Keep blank responses, and rows that training refuses.
    """
    rows = Rows([], Counter())
    for prompt, given in zip(prompts, answers, strict=True):
        known = [answer for answer in given if answer.score is None or not math.isnan(answer.score)]
        spoken = [answer for answer in known if keep_all or answer.text.strip()]
        rows.left_out.update({"responses without a score": len(given) - len(known), "blank responses": len(known) - len(spoken)})
        texts, scores = [answer.text for answer in spoken], [answer.score for answer in spoken]
        if len(given) == 1:
            _add(rows, prompt, _single(spoken), keep_all=keep_all)
        elif None in scores:
            _add(rows, prompt, {"responses": texts}, keep_all=keep_all, unchecked={"ranks": [0] * len(texts)})
        else:
            _add(rows, prompt, {"responses": texts, "scores": scores}, keep_all=keep_all)
    return _without_zeros(rows)


def best_rows(prompts: Sequence[Prompt], best: Sequence[Answer | None], *, keep_all: bool) -> Rows:
    """One response to each prompt, where there is one."""
    rows = Rows([], Counter())
    for prompt, answer in zip(prompts, best, strict=True):
        rows.left_out["prompts without a scored response"] += answer is None
        if answer is not None:
            _add(rows, prompt, _single([answer]), keep_all=keep_all)
    return _without_zeros(rows)


def pair_rows(prompts: Sequence[Prompt], sampled: SampledPairs, answers: Sequence[Sequence[Answer]], *, keep_all: bool) -> Rows:
    """A pair to each prompt, `chosen` and `rejected` by their scores; without scores two responses of equal rank."""
    rows = Rows([], Counter())
    for prompt, branch, (first, second) in zip(prompts, sampled.branches, answers, strict=True):
        if first.score is None or second.score is None:
            row: RawRow = {"responses": [first.text, second.text]}
            _add(rows, prompt, row, keep_all=keep_all, unchecked={"ranks": [0, 0], "branch": branch})
        elif math.isnan(first.score) or math.isnan(second.score):
            rows.left_out["pairs without a score"] += 1
        elif first.score == second.score:
            rows.left_out["pairs with equal scores"] += 1
        else:
            chosen, rejected = (first, second) if first.score > second.score else (second, first)
            extra = {"score_chosen": chosen.score, "score_rejected": rejected.score, "branch": branch}
            _add(rows, prompt, {"chosen": chosen.text, "rejected": rejected.text, **extra}, keep_all=keep_all)
    return rows


def _single(answers: Sequence[Answer]) -> RawRow | None:
    if not answers:
        return None
    (answer,) = answers
    return {"completion": answer.text} if answer.score is None else {"completion": answer.text, "score": answer.score}


def _add(rows: Rows, prompt: Prompt, columns: RawRow | None, *, keep_all: bool, unchecked: RawRow | None = None) -> None:
    """Append a row if training would take it; `unchecked` are columns that it need not understand."""
    if columns is None:
        return
    shared = {name: prompt.columns[name] for name in sorted(SHARED_COLUMNS) if prompt.columns.get(name) is not None}
    row = {"prompt": prompt.text, **columns, **shared}
    try:
        parse_row(row, Place("samples", len(rows.rows) + 1))
    except RowError as error:
        if not keep_all:
            rows.left_out[f"rows with {error.finding}"] += 1
            return
    rows.rows.append({**row, **(unchecked or {})})


def _without_zeros(rows: Rows) -> Rows:
    return Rows(rows.rows, +rows.left_out)
