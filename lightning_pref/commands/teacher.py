"""`python -m lightning_pref teacher`: which reward model would teach this policy fastest."""

from __future__ import annotations

import inspect
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from lightning_pref.commands.places import device_named
from lightning_pref.commands.teacher_scores import Answered, read_answered, read_prompts, sample_answers, score_answers
from lightning_pref.measures.teaching import compare_pairs, length_correlation, relative_speed, speed_in_words
from lightning_pref.measures.variance import (
    effective_prompts,
    prompt_statistics,
    variance_parts,
    whitened_variance,
    zero_variance_share,
)
from lightning_pref.models.backbones import Dtype

# Gold rewards that stand in the file of responses.
GOLD_COLUMN = "scores"
# Of pairs of responses, half are in the right order by chance.
MIN_ACCURACY = 0.55


@dataclass(frozen=True, kw_only=True)
class TeacherReport:
    """What one reward model would be as a teacher of one policy; `nan` where something cannot be told.

    Attributes:
        name: As given on the command line.
        whitened: Mean variance within prompts of rewards divided by the pooled standard deviation.
        within_prompt: The same of raw rewards, reward^2.
        between_prompt: Variance of the prompts' means, reward^2.
        std_quantiles: Standard deviation within a prompt, its 5, 50 and 95 % quantiles over prompts.
        zero_share: Share of prompts whose responses all get the same reward.
        effective_prompts: How many prompts carry the signal.
        ties: Share of pairs of different responses with equal rewards.
        saturated: Share of pairs on which the Bradley-Terry loss is flat.
        length_correlation: Of reward and length in characters, among responses to the same prompt.
        accuracy: Share of pairs in the order of the gold reward; a tie is not right.
        accuracy_with_ties: Share of pairs whose order, or tie, is that of the gold reward.
        speed: Highest learning speed relative to the best teacher compared, in [0, 1].
        speed_in_words: What that means.
    """

    name: str
    whitened: float
    within_prompt: float
    between_prompt: float
    std_quantiles: tuple[float, float, float]
    zero_share: float
    effective_prompts: float
    ties: float
    saturated: float
    length_correlation: float
    accuracy: float
    accuracy_with_ties: float
    speed: float = math.nan
    speed_in_words: str = ""


def teacher(
    reward_model: list[str],
    policy: str | None = None,
    prompts: str | None = None,
    *,
    responses: str | None = None,
    gold: str | None = None,
    num_prompts: int = 100,
    num_responses: int = 8,
    max_new_tokens: int = 128,
    temperature: float = 1.0,
    seed: int = 0,
    save_responses: str | None = None,
    out: str | None = None,
    batch_size: int = 16,
    dtype: Dtype = "float32",
    device: str = "auto",
) -> list[TeacherReport]:
    """Rank reward models by how fast a policy would learn from them, measured on the policy's own responses.

    Accuracy alone does not tell (arXiv 2503.15477): where the responses that this policy samples get nearly the same reward, its
    gradient is small. Rewards are whitened before they are compared, so that their scales do not matter.

    Args:
        reward_model: What to compare, given once for each: a folder or hub id of an AutoModelForSequenceClassification, a Python
            function `module:function` of (prompt, response), or `playground:gold` and `playground:length`.
        policy: The policy to be taught: a folder, a hub id, `playground:tiny` or `playground:small`.
        prompts: Rows with prompts: a file, a folder saved by `datasets`, a hub id, or `playground`.
        responses: File of rows with `prompt` and `responses` to score instead of sampling from a policy.
        gold: What the responses are really worth: any of the kinds of `reward_model`, or `scores` for that column of `responses`.
        num_prompts: Most prompts to use.
        num_responses: Responses to sample for each prompt.
        max_new_tokens: Longest response.
        temperature: Of the sampling; 1 is the policy itself.
        seed: Of the sampling.
        save_responses: JSON-lines file for the sampled responses, all ranked alike, for `responses` next time.
        out: JSON file for the numbers.
        batch_size: Sequences that a model works on at a time.
        dtype: Of the models' weights.
        device: `cpu`, `cuda`, `cuda:1`, ...; `auto` takes a GPU where there is one.
    """
    _check(reward_model, policy, prompts, responses, gold, num_prompts=num_prompts, num_responses=num_responses)
    if responses is not None:
        _check_unsampled(
            save_responses=save_responses,
            num_responses=num_responses,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            seed=seed,
        )
    _check_folders(out=out, save_responses=save_responses)
    place = device_named(device)
    console = Console()
    if responses is not None:
        answered = read_answered(responses, num_prompts)
    else:
        assert policy is not None and prompts is not None
        rows = read_prompts(prompts, num_prompts)
        _say(console, f"sampling {num_responses} responses of {policy} to each of {len(rows)} prompts")
        answered = sample_answers(
            policy, rows, num_responses=num_responses, max_new_tokens=max_new_tokens, temperature=temperature, seed=seed,
            batch_size=batch_size, dtype=dtype, device=place,
        )  # fmt: skip
        _save(answered, save_responses)
    worth = None if gold is None else _gold_rewards(gold, answered, batch_size=batch_size, dtype=dtype, device=place)
    reports = []
    for name in reward_model:
        _say(console, f"scoring with {name}")
        scores = score_answers(name, answered, batch_size=batch_size, dtype=dtype, device=place)
        reports.append(measure(name, scores, answered, worth))
    ranked = with_speed(reports)
    sampled = {"temperature": temperature, "seed": seed, "max_new_tokens": max_new_tokens} if responses is None else {}
    facts = {"policy": policy, "prompts": prompts, "responses": responses, "gold": gold, **sampled}
    if out is not None:
        Path(out).write_text(json.dumps(_as_json(ranked, answered, facts), indent=2) + "\n", encoding="utf-8")
    _print(console, ranked, answered, has_gold=worth is not None)
    if out is not None:
        _say(console, f"numbers: {out}")
    return ranked


def measure(name: str, scores: Sequence[float], answered: Sequence[Answered], gold: Sequence[float] | None) -> TeacherReport:
    """What the scores of sampled responses say about their reward model.

    Args:
        name: Of the reward model.
        scores: One per response, prompt by prompt.
        answered: The prompts with their responses.
        gold: What the responses are really worth, like `scores`.
    """
    rewards = torch.tensor(list(scores), dtype=torch.float64)
    _check_finite(name, rewards, answered)
    prompt_ids = torch.tensor([prompt for prompt, row in enumerate(answered) for _ in row.responses])
    lengths = torch.tensor([float(len(response)) for row in answered for response in row.responses])
    statistics = prompt_statistics(rewards, prompt_ids)
    variances = statistics.variances[: len(answered)]
    pairs = compare_pairs(rewards, prompt_ids, None if gold is None else torch.tensor(list(gold), dtype=torch.float64))
    low, middle, high = torch.nanquantile(variances.sqrt(), torch.tensor([0.05, 0.5, 0.95], dtype=torch.float64)).tolist()
    return TeacherReport(
        name=name,
        whitened=whitened_variance(variances.nanmean(), rewards.var()).item(),
        within_prompt=variances.nanmean().item(),
        between_prompt=variance_parts(statistics).between.item(),
        std_quantiles=(low, middle, high),
        zero_share=zero_variance_share(variances).item(),
        effective_prompts=effective_prompts(variances).item(),
        ties=_ties_of_different_responses(rewards, answered),
        saturated=pairs.saturated_share.item(),
        length_correlation=length_correlation(rewards, lengths, prompt_ids).within.item(),
        accuracy=pairs.accuracy.item(),
        accuracy_with_ties=pairs.accuracy_with_ties.item(),
    )


def with_speed(reports: Sequence[TeacherReport]) -> list[TeacherReport]:
    """The reports from the fastest to the slowest teacher, with their speed."""
    speeds = relative_speed([report.whitened for report in reports])
    told = [
        TeacherReport(**{**vars(report), "speed": speed, "speed_in_words": speed_in_words(speed)})
        for report, speed in zip(reports, speeds, strict=True)
    ]
    return sorted(told, key=lambda report: -report.whitened)


def _ties_of_different_responses(rewards: Tensor, answered: Sequence[Answered]) -> float:
    """Share of pairs of responses with equal rewards; a policy that says the same twice is not the reward model's fault."""
    texts = {text: number for number, text in enumerate({response for row in answered for response in row.responses})}
    pairs = ties = start = 0
    for row in answered:
        numbers = torch.tensor([texts[response] for response in row.responses])
        own = rewards[start : start + len(numbers)]
        start += len(numbers)
        differ = (numbers[:, None] != numbers).triu(1)
        pairs += int(differ.sum())
        ties += int((differ & (own[:, None] == own)).sum())
    return ties / pairs if pairs else math.nan


def _gold_rewards(gold: str, answered: Sequence[Answered], *, batch_size: int, dtype: Dtype, device: torch.device) -> list[float]:
    if gold != GOLD_COLUMN:
        return score_answers(gold, answered, batch_size=batch_size, dtype=dtype, device=device)
    lacking = next((row for row in answered if row.scores is None), None)
    if lacking is not None:
        raise ValueError(
            f"{lacking.row.place}: `--gold {GOLD_COLUMN}` takes the gold rewards from this column of `--responses`, but the row "
            "has none. Add a list of numbers, one per response, or name a gold reward model."
        )
    return [score for row in answered for score in row.scores or ()]


def _check(
    reward_model: Sequence[str],
    policy: str | None,
    prompts: str | None,
    responses: str | None,
    gold: str | None,
    *,
    num_prompts: int,
    num_responses: int,
) -> None:
    if not reward_model:
        raise ValueError("There is no reward model to compare; give at least one `--reward_model`.")
    twice = next((name for i, name in enumerate(reward_model) if name in reward_model[:i]), None)
    if twice is not None:
        raise ValueError(f"The reward model {twice!r} is given twice; give each once.")
    if responses is not None and (policy is not None or prompts is not None):
        raise ValueError("`--responses` takes the place of sampling: leave `--policy` and `--prompts` out, or leave it out.")
    if responses is None and (policy is None or prompts is None):
        lacking = "--policy" if policy is None else "--prompts"
        raise ValueError(
            f"`{lacking}` is missing: give `--policy` and `--prompts` to sample responses, or `--responses` with sampled ones."
        )
    if gold == GOLD_COLUMN and responses is None:
        raise ValueError(f"`--gold {GOLD_COLUMN}` reads a column of `--responses`, which is not given; name a gold reward model.")
    if num_prompts < 1:
        raise ValueError(f"`num_prompts` must be at least 1, got {num_prompts!r}.")
    if num_responses < 2:
        raise ValueError(f"`num_responses` must be at least 2, since a variance needs two; got {num_responses!r}.")


def _check_unsampled(save_responses: str | None, **sampling: float) -> None:
    """Raise for a setting of the sampling where responses are read."""
    if save_responses is not None:
        raise ValueError(
            "`--save_responses` keeps what is sampled, but `--responses` takes the place of sampling; leave one out."
        )
    defaults = inspect.signature(teacher).parameters
    useless = [name for name, value in sampling.items() if value != defaults[name].default]
    if useless:
        raise ValueError(
            f"`--{useless[0]}` acts on sampling, but `--responses` takes the place of that: it has no effect. Leave it out, or "
            "sample with `--policy` and `--prompts`."
        )


def _check_folders(**files: str | None) -> None:
    for name, file in files.items():
        if file is not None and not Path(file).absolute().parent.is_dir():
            raise FileNotFoundError(f"There is no folder {Path(file).absolute().parent} for `{name}` ({file}); make it first.")


def _check_finite(name: str, rewards: Tensor, answered: Sequence[Answered]) -> None:
    bad = (~rewards.isfinite()).nonzero()
    if len(bad):
        owners = [row.row.place for row in answered for _ in row.responses]
        raise ValueError(
            f"{name!r} gives {len(bad)} of {len(rewards)} responses no finite reward, the first to the prompt of "
            f"{owners[int(bad[0])]}. Half precision may overflow (try `--dtype float32`); a function must return a number."
        )


def _save(answered: Sequence[Answered], file: str | None) -> None:
    if file is not None:
        # Without ranks a list of responses is best first.
        rows = [
            {"prompt": row.row.prompt, "responses": list(row.responses), "ranks": [0] * len(row.responses)} for row in answered
        ]
        lines = [json.dumps(row) for row in rows]
        Path(file).write_text("\n".join(lines) + "\n", encoding="utf-8")


def _as_json(reports: Sequence[TeacherReport], answered: Sequence[Answered], facts: dict[str, Any]) -> dict[str, Any]:
    """The report as plain data, `None` where a number is not known."""

    def plain(value: object) -> object:
        if isinstance(value, tuple):
            return [plain(entry) for entry in value]
        return None if isinstance(value, float) and not math.isfinite(value) else value

    sizes = {"num_prompts": len(answered), "num_scored_responses": sum(len(row.responses) for row in answered)}
    teachers = [{name: plain(value) for name, value in vars(report).items()} for report in reports]
    return {**facts, **sizes, "teachers": teachers}


def _print(console: Console, reports: Sequence[TeacherReport], answered: Sequence[Answered], *, has_gold: bool) -> None:
    num_responses = sum(len(row.responses) for row in answered)
    table = Table(
        title=f"Teachers by whitened variance, {len(answered)} prompts, {num_responses} responses", title_justify="left"
    )
    for heading in ("reward model", "whitened variance", *(("accuracy",) if has_gold else ()), "ties", "length corr.", "speed"):
        table.add_column(heading, justify="left" if heading == "reward model" else "right", overflow="fold")
    for report in reports:
        accuracy = [_shown(report.accuracy)] if has_gold else []
        numbers = [_shown(report.whitened), *accuracy, _shown(report.ties), _shown(report.length_correlation)]
        table.add_row(report.name, *numbers, _shown(report.speed))
    console.print(table)
    for report in reports:
        _say(console, f"{report.name}: {report.speed_in_words}")
    _say(console, "Time to a given gain grows at least like variance^(-1/3); speed is relative to the best of those compared.")
    if has_gold and len(reports) > 1:
        _say(console, _verdict(reports))


def _shown(number: float) -> str:
    return "-" if math.isnan(number) else f"{number:.3f}"


def _verdict(reports: Sequence[TeacherReport]) -> str:
    """Which of the reward models to take: the fastest of those that rank better than chance."""
    usable = [report for report in reports if report.accuracy >= MIN_ACCURACY]
    if not usable:
        return f"None ranks this policy's responses better than chance (accuracy {MIN_ACCURACY} or more): none should teach it."
    choice, most_accurate = usable[0], max(usable, key=lambda report: report.accuracy)
    left_out = [report.name for report in reports if report.whitened > choice.whitened]
    text = f"Take {choice.name} (accuracy {choice.accuracy:.3f}), the fastest teacher that ranks better than chance."
    if left_out:
        text += f" {', '.join(left_out)} would be faster at teaching something else (accuracy below {MIN_ACCURACY})."
    if choice.accuracy < most_accurate.accuracy:
        text += f" For best-of-n, where only the order counts, take {most_accurate.name} ({most_accurate.accuracy:.3f})."
    return text


def _say(console: Console, text: str) -> None:
    console.print(text, highlight=False, markup=False, soft_wrap=True)
