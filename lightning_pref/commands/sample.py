"""`python -m lightning_pref sample`: responses of a model, the best of many, or pairs to be labelled."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import numpy as np
import torch
from rich.console import Console
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lightning_pref.commands.places import device_named, output_file
from lightning_pref.commands.sample_rows import Answer, Rows, answers_of, best_rows, listed_rows, pair_rows
from lightning_pref.data.playground_source import PlaygroundRows, PlaygroundSettings, is_playground
from lightning_pref.data.sources import read_rows
from lightning_pref.data.templates import Tokenization
from lightning_pref.measures.overoptimization import kl_of_best_of_n
from lightning_pref.models.backbones import Dtype, check_vocabulary, load_model, load_tokenizer
from lightning_pref.rollouts.best_of_n import best_of_n
from lightning_pref.rollouts.engines.generate import CachedSampler
from lightning_pref.rollouts.engines.paged import PagedSampler
from lightning_pref.rollouts.pilaf import PilafSampler
from lightning_pref.rollouts.prompts import Prompt, read_prompts
from lightning_pref.rollouts.rewards import RewardSpec, load_reward
from lightning_pref.rollouts.sampling import Sampler, Sampling, TokenIds
from lightning_pref.rollouts.scoring import Asked, RewardScore, Score, scores_of
from lightning_pref.rollouts.speculative_rejection import SpeculativeRejection, checkpoints_of_capacity

Engine = Literal["cached", "paged"]
DEFAULT_RESPONSES = 4
DEFAULT_BETA = 0.1


@dataclass(frozen=True, kw_only=True)
class SampleReport:
    """What was sampled.

    Attributes:
        num_prompts: That were answered.
        num_rows: That were written.
        left_out: What was not written, by reason.
        facts: What else is worth knowing, by name.
    """

    num_prompts: int
    num_rows: int
    left_out: Mapping[str, int]
    facts: Mapping[str, float] = field(default_factory=dict)


def sample(
    model: str = "playground:tiny",
    prompts: str = "playground",
    out: str = "samples.jsonl",
    *,
    num_prompts: int = 100,
    num_responses: int | None = None,
    reward: RewardSpec | None = None,
    best_of: int | None = None,
    speculative_rejection: float | None = None,
    checkpoints: list[int] | None = None,
    token_capacity: int | None = None,
    pilaf: str | None = None,
    beta: float | None = None,
    keep_all: bool = False,
    max_new_tokens: int = 128,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    seed: int = 0,
    engine: Engine = "cached",
    max_rows: int = 256,
    columns: dict[str, str] | None = None,
    dtype: Dtype = "float32",
    device: str = "auto",
) -> SampleReport:
    """Sample responses of a model and write them as rows that can be trained on.

    Rows have `prompt` and `responses` (with `scores` if there is a reward), `prompt` and `completion` where one response is
    asked for or chosen, or `prompt`, `chosen` and `rejected` for pairs. What training would refuse is left out and counted.

    Args:
        model: The policy: a folder, a hub id, `playground:tiny` or `playground:small`.
        prompts: Rows with prompts: a file, a folder saved by `datasets`, a hub id, or `playground`.
        out: JSON-lines file for the rows.
        num_prompts: Most prompts to answer.
        num_responses: Responses to each prompt, 4 if not given.
        reward: Scores the responses: a folder or hub id of a reward model, a list of them (an ensemble), a Python function
            `module:function` of (prompt, response), `playground:gold` or `playground:length`, or `{name: weight}`.
        best_of: Sample that many and write the one with the highest reward.
        speculative_rejection: Share of responses, 0 <= share < 1, that each checkpoint of `best_of` gives up early.
        checkpoints: Lengths in tokens at which that happens, `[16, 32, 64]`.
        token_capacity: Response tokens of one prompt that fit into memory; checkpoints are where they are reached.
        pilaf: The reference model; samples pairs by PILAF: from the policy, or from it moved away from and towards this one.
        beta: Of the DPO loss that PILAF's pairs are for, 0.1 if not given.
        keep_all: Write blank responses too, and rows that training refuses, such as those with equal scores (`teacher` takes
            them).
        max_new_tokens: Longest response.
        temperature: Divisor of the logits; 1 is the policy itself, 0 decodes greedily.
        top_k: Draw from that many of the likeliest tokens; 0 draws from all.
        top_p: Draw from the likeliest tokens that together have this probability.
        min_p: Draw from tokens at least this many times as likely as the likeliest.
        seed: The same seed gives the same responses.
        engine: `cached` decodes with our own loop, `paged` with the continuous batching of transformers.
        max_rows: Most responses that are decoded together.
        columns: Columns of the prompts by the names they have there, {name here: name there}.
        dtype: Of the models' weights.
        device: `cpu`, `cuda`, `cuda:1`, ...; `auto` takes a GPU where there is one.
    """
    _check(
        num_prompts=num_prompts, num_responses=num_responses, reward=reward, best_of=best_of, pilaf=pilaf, beta=beta,
        speculative_rejection=speculative_rejection, checkpoints=checkpoints, token_capacity=token_capacity, engine=engine,
    )  # fmt: skip
    file = output_file(out, "out", suffix=".jsonl", inputs=(prompts,))
    how = Sampling(max_new_tokens=max_new_tokens, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    place, console = device_named(device), Console()
    tokenizer = load_tokenizer(model)
    tokenization = Tokenization(tokenizer)
    source = (
        PlaygroundRows(prompts, PlaygroundSettings(num_val_rows=num_prompts), "val")
        if is_playground(prompts)
        else read_rows(prompts, columns=columns)
    )
    asked, _ = read_prompts([source], tokenization, limit_rows=num_prompts)
    policy = _on_device(model, tokenizer, dtype, place)
    score: Score | None = None
    if reward is not None:
        judge = load_reward(reward, tokenization, dtype=dtype)
        judge.to(place)
        score = RewardScore(judge, asked, tokenizer)
    job = _Job(policy, tokenizer, asked, how, score, seed, max_rows, keep_all)
    if pilaf is not None:
        reference = _on_device(pilaf, tokenizer, dtype, place)
        rows, facts = _pairs(job, reference, DEFAULT_BETA if beta is None else beta)
    elif speculative_rejection is not None:
        assert best_of is not None
        cuts = tuple(checkpoints or ())
        if token_capacity is not None:
            cuts = checkpoints_of_capacity(token_capacity, best_of, speculative_rejection, max_new_tokens)
        rows, facts = _raced(job, best_of, speculative_rejection, cuts)
    else:
        kind: Callable[..., Sampler] = CachedSampler if engine == "cached" else PagedSampler
        sampler = kind(how, int(tokenizer.eos_token_id), max_rows=max_rows)
        if best_of is not None:
            rows, facts = _best(job, sampler, best_of)
        else:
            rows, facts = _plain(job, sampler, DEFAULT_RESPONSES if num_responses is None else num_responses)
    file.write_text("".join(json.dumps(row, allow_nan=False) + "\n" for row in rows.rows), encoding="utf-8")
    report = SampleReport(num_prompts=len(asked), num_rows=len(rows.rows), left_out=dict(rows.left_out), facts=facts)
    _print(console, report, str(file))
    return report


class _Job(NamedTuple):
    """What every way of sampling needs."""

    policy: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    prompts: list[Prompt]
    how: Sampling
    score: Score | None
    seed: int
    max_rows: int
    keep_all: bool

    @property
    def ids(self) -> list[TokenIds]:
        return [prompt.ids for prompt in self.prompts]

    @property
    def end_token(self) -> int:
        return int(self.tokenizer.eos_token_id)


def _plain(job: _Job, sampler: Sampler, num_responses: int) -> tuple[Rows, dict[str, float]]:
    sampled = sampler.sample(job.policy, job.ids, num_responses, seed=job.seed)
    scores: list[list[float]] | None = None
    if job.score is not None:
        scores = scores_of(job.score, [Asked(i, found.responses, found.ended) for i, found in enumerate(sampled)])
    answers = [answers_of(found, None if scores is None else scores[i], job.tokenizer) for i, found in enumerate(sampled)]
    facts = {
        "response tokens, mean": float(np.mean([len(ids) for found in sampled for ids in found.responses])),
        "share that ended": float(np.mean([ended for found in sampled for ended in found.ended])),
    }
    if scores is not None:
        facts["reward, mean"] = _mean([value for some in scores for value in some])
    return listed_rows(job.prompts, answers, keep_all=job.keep_all), facts


def _best(job: _Job, sampler: Sampler, n: int) -> tuple[Rows, dict[str, float]]:
    assert job.score is not None
    found = best_of_n(sampler, job.policy, job.ids, n, job.score, seed=job.seed)
    best = [_answer(chosen.best, answers_of(chosen.sampled, chosen.scores, job.tokenizer)) for chosen in found]
    facts = {
        "reward, mean of all": _mean([value for chosen in found for value in chosen.scores]),
        "reward, mean of the best": _mean([answer.score for answer in best if answer is not None]),
        "nats from the policy, at most": kl_of_best_of_n(n),
        "responses without a score": float(sum(chosen.num_unscored for chosen in found)),
    }
    return best_rows(job.prompts, best, keep_all=job.keep_all), facts


def _raced(job: _Job, n: int, alpha: float, checkpoints: tuple[int, ...]) -> tuple[Rows, dict[str, float]]:
    assert job.score is not None
    race = SpeculativeRejection(
        sampling=job.how, end_token=job.end_token, alpha=alpha, checkpoints=checkpoints, max_rows=job.max_rows
    )
    found = race.sample(job.policy, job.ids, n, job.score, seed=job.seed)
    best = [_answer(some.best, answers_of(some.sampled, some.scores, job.tokenizer)) for some in found]
    tokens = sum(some.num_tokens for some in found)
    facts = {"reward, mean of the best": _mean([answer.score for answer in best if answer is not None])}
    for number, position in enumerate(checkpoints):
        rounds = [some.rounds[number] for some in found]
        facts[f"responses left after {position} tokens"] = float(np.mean([r.num_kept for r in rounds]))
        facts[f"rank correlation with the end after {position} tokens"] = _mean([r.spearman for r in rounds])
    facts |= {
        "tokens decoded": float(tokens),
        "of those of best-of-n, at least": tokens / sum(some.most_tokens for some in found),
        "of those of best-of-n, at most": tokens / sum(some.fewest_tokens for some in found),
        "scorings": float(sum(some.num_scorings for some in found)),
        "scorings without a number": float(sum(some.num_unscored for some in found)),
        "nats from the policy, at most": kl_of_best_of_n(n),
    }
    return best_rows(job.prompts, best, keep_all=job.keep_all), facts


def _pairs(job: _Job, reference: PreTrainedModel, beta: float) -> tuple[Rows, dict[str, float]]:
    sampler = PilafSampler(job.how, job.end_token, reference, beta=beta, max_rows=job.max_rows)
    sampled = sampler.sample_pairs(job.policy, job.ids, seed=job.seed)
    scores: list[list[float]] | None = None
    if job.score is not None:
        scores = scores_of(job.score, [Asked(i, pair.responses, pair.ended) for i, pair in enumerate(sampled.pairs)])
    facts = {
        "tilted pairs": float(sampled.branches.count("tilted")),
        "identical pairs": float(sampled.num_identical),
        "nats per token of pi+ from the policy": sampled.kl_plus,
        "nats per token of the policy from pi-": sampled.kl_minus,
    }
    if scores is not None:
        for branch in ("policy", "tilted"):
            own = [pair for pair, its in zip(scores, sampled.branches, strict=True) if its == branch]
            # A tie is half a win, so that a first response no better than the second wins half of the pairs.
            wins = [math.nan if math.isnan(a + b) else (a > b) + (a == b) / 2 for a, b in own]
            facts[f"share that the first wins, {branch} pairs"] = _mean(wins)
    answers = [
        answers_of(pair, None if scores is None else scores[number], job.tokenizer) for number, pair in enumerate(sampled.pairs)
    ]
    return pair_rows(job.prompts, sampled, answers, keep_all=job.keep_all), facts


def _answer(best: int | None, answers: list[Answer]) -> Answer | None:
    return None if best is None else answers[best]


def _mean(values: list[float | None] | list[float]) -> float:
    """Mean of the numbers that are known."""
    known = [value for value in values if value is not None and not math.isnan(value)]
    return float(np.mean(known)) if known else math.nan


def _on_device(name: str, tokenizer: PreTrainedTokenizerBase, dtype: Dtype, device: torch.device) -> PreTrainedModel:
    model = load_model(name, dtype=dtype)
    model.to(device)  # type: ignore[arg-type]  # transformers wraps the method of torch
    check_vocabulary(model, tokenizer)
    return model


def _check(
    *,
    num_prompts: int,
    num_responses: int | None,
    reward: RewardSpec | None,
    best_of: int | None,
    speculative_rejection: float | None,
    checkpoints: list[int] | None,
    token_capacity: int | None,
    pilaf: str | None,
    beta: float | None,
    engine: Engine,
) -> None:
    """Refuse numbers that mean nothing and flags that would have no effect."""
    for name, value in {"num_prompts": num_prompts, "num_responses": num_responses, "best_of": best_of}.items():
        if value is not None and value < 1:
            raise ValueError(f"`{name}` must be at least 1, got {value!r}.")
    if pilaf is not None and best_of is not None:
        raise ValueError("`--pilaf` samples two responses to compare and `--best_of` keeps one of many; leave one of them out.")
    if num_responses is not None and (pilaf is not None or best_of is not None):
        other = "--best_of" if pilaf is None else "--pilaf"
        raise ValueError(f"`{other}` says how many responses are sampled; leave `--num_responses` out.")
    if best_of is not None and reward is None:
        raise ValueError("`--best_of` keeps the response with the highest reward; say with `--reward` what that is.")
    if beta is not None and pilaf is None:
        raise ValueError("`--beta` is a setting of PILAF; give the reference model with `--pilaf`, or leave it out.")
    cuts = [name for name, value in (("checkpoints", checkpoints), ("token_capacity", token_capacity)) if value is not None]
    if speculative_rejection is None:
        if cuts:
            raise ValueError(f"`--{cuts[0]}` says when responses are given up; say how many with `--speculative_rejection 0.5`.")
    elif best_of is None:
        raise ValueError("`--speculative_rejection` makes `--best_of` cheaper; say how many responses to start with.")
    elif len(cuts) != 1:
        raise ValueError(
            "`--speculative_rejection` needs to know when to score: give `--checkpoints [16,32,64]` or `--token_capacity`"
            + (", not both." if cuts else ".")
        )
    if engine == "paged" and (pilaf is not None or speculative_rejection is not None):
        other = "--speculative_rejection" if pilaf is None else "--pilaf"
        raise ValueError(f"`{other}` decodes with our own loop; leave `--engine paged` out.")


def _print(console: Console, report: SampleReport, file: str) -> None:
    lines = [f"{name}: {value:.4g}" for name, value in report.facts.items()]
    lines += [f"left out: {count} {what}" for what, count in report.left_out.items()]
    lines.append(f"{report.num_rows} rows for {report.num_prompts} prompts: {file}")
    for line in lines:
        console.print(line, highlight=False, markup=False, soft_wrap=True)
