"""What `teacher` measures: prompts with several responses of a policy, and their scores by anything that scores."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from numbers import Real

import torch

from lightning_pref.data.fields import checked_list, checked_number
from lightning_pref.data.formats import parse_row
from lightning_pref.data.playground_source import PlaygroundRows, PlaygroundSettings, is_playground
from lightning_pref.data.rows import Place, Row, RowError, describe
from lightning_pref.data.sources import read_rows
from lightning_pref.data.templates import Tokenization
from lightning_pref.models.backbones import Dtype, check_vocabulary, load_model, load_tokenizer
from lightning_pref.models.generation import sample_responses
from lightning_pref.models.reward_scores import load_reward_model, sequence_scores
from lightning_pref.rollouts.reward_functions import function_named


@dataclass(frozen=True)
class Answered:
    """A prompt with responses as text, and what these are worth where the file says so."""

    row: Row
    responses: tuple[str, ...]
    scores: tuple[float, ...] | None = None


def read_prompts(source: str, limit: int) -> list[Row]:
    """The first rows of a source, for their prompts."""
    rows = [parse_row(raw, place) for place, raw in islice(_raw_rows(source, limit), limit)]
    for row in rows:
        if not row.prompt:
            raise RowError(
                "no_prompt", row.place, "prompt", "a row without a prompt", "a column `prompt`, as text or as chat messages",
                "Rename the column, or give another file to `--prompts`.",
            )  # fmt: skip
    return rows


def read_answered(source: str, limit: int) -> list[Answered]:
    """The first rows of a file with `prompt`, `responses` (two or more) and perhaps `scores`."""
    return [_answered(raw, place) for place, raw in islice(iter(read_rows(source)), limit)]


def _raw_rows(source: str, limit: int) -> Iterator[tuple[Place, object]]:
    if is_playground(source):
        return iter(PlaygroundRows(source, PlaygroundSettings(num_val_rows=limit), "val"))
    return iter(read_rows(source))


def _answered(raw: object, place: Place) -> Answered:
    if isinstance(raw, RowError):
        raise raw
    if not isinstance(raw, dict) or raw.get("prompt") is None or raw.get("responses") is None:
        found = f"the columns {', '.join(sorted(raw))}" if isinstance(raw, dict) else describe(raw)
        raise RowError(
            "unknown_columns", place, "", found, "the columns `prompt` and `responses`",
            "Write them with `--save_responses`, or give `--policy` and `--prompts` to sample now.",
        )  # fmt: skip
    row = parse_row({"prompt": raw["prompt"]}, place)
    responses = checked_list(raw["responses"], "responses", place)
    if len(responses) < 2:
        raise RowError(
            "too_few_responses", place, "responses", describe(responses), "two responses or more to each prompt",
            "A variance needs two; sample more.",
        )  # fmt: skip
    for i, response in enumerate(responses):
        if not isinstance(response, str):
            raise RowError("wrong_type", place, f"responses[{i}]", describe(response), "text", "Write each response as text.")
    scores = None
    if raw.get("scores") is not None:
        entries = checked_list(raw["scores"], "scores", place, like=("responses", len(responses)))
        scores = tuple(checked_number(entry, f"scores[{i}]", place) for i, entry in enumerate(entries))
    return Answered(row, tuple(str(response) for response in responses), scores)


def sample_answers(
    policy: str,
    rows: Sequence[Row],
    *,
    num_responses: int,
    max_new_tokens: int,
    temperature: float,
    seed: int,
    batch_size: int,
    dtype: Dtype,
    device: torch.device,
) -> list[Answered]:
    """Responses of a policy to each prompt, sampled with a seed."""
    model, tokenizer = load_model(policy, dtype=dtype), load_tokenizer(policy)
    model.to(device)  # type: ignore[arg-type]  # transformers wraps the method of torch
    check_vocabulary(model, tokenizer)
    tokenization = Tokenization(tokenizer)
    prompts = [tokenization.prompt_ids(row).tolist() for row in rows]
    sampled = sample_responses(
        model,
        [prompt for prompt in prompts for _ in range(num_responses)],
        eos_token_id=tokenizer.eos_token_id,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        seed=seed,
        batch_size=batch_size,
    )
    texts = [str(tokenizer.decode(response, skip_special_tokens=True)) for response in sampled]
    return [Answered(row, tuple(texts[number * num_responses : (number + 1) * num_responses])) for number, row in enumerate(rows)]


def score_answers(name: str, answered: Sequence[Answered], *, batch_size: int, dtype: Dtype, device: torch.device) -> list[float]:
    """The scores of all responses, prompt by prompt, by whatever the name names."""
    function = function_named(name)
    if function is None:
        return _model_scores(name, answered, batch_size=batch_size, dtype=dtype, device=device)
    scores = [function(row.row.prompt, response) for row in answered for response in row.responses]
    for score in scores:
        if isinstance(score, bool) or not isinstance(score, Real):
            found = f"{score!r} ({type(score).__name__})"
            raise TypeError(f"{name!r} returned {found} for a response; it must return a number.")
    return [float(score) for score in scores if isinstance(score, Real)]


def _model_scores(name: str, answered: Sequence[Answered], *, batch_size: int, dtype: Dtype, device: torch.device) -> list[float]:
    model, tokenizer = load_reward_model(name, dtype=dtype), load_tokenizer(name)
    model.to(device)  # type: ignore[arg-type]  # transformers wraps the method of torch
    check_vocabulary(model, tokenizer)
    tokenization = Tokenization(tokenizer)
    sequences = [ids for row in answered for ids in _sequences(row, tokenization, tokenizer.eos_token_id)]
    return [float(score) for score in sequence_scores(model, sequences, batch_size=batch_size).tolist()]


def _sequences(answered: Answered, tokenization: Tokenization, eos: int) -> list[list[int]]:
    """Token ids of the prompt with each response, ended by EOS, in the reward model's own tokens and template."""
    as_given = not isinstance(answered.row.prompt, str)
    # A policy may well say nothing; a row of the data may not.
    spoken = [text for text in answered.responses if text.strip()]
    found = {}
    if spoken:
        responses = tuple([{"role": "assistant", "content": text}] if as_given else text for text in spoken)
        group = tokenization(replace(answered.row, responses=responses, ranks=None, scores=None, labels=None), 0)
        prompt = group.prompt.tolist()
        found = {text: [*prompt, *ids.tolist()] for text, ids in zip(spoken, group.responses, strict=True)}
    silent = [*tokenization.prompt_ids(answered.row).tolist(), eos]
    return [found.get(text, silent) for text in answered.responses]
