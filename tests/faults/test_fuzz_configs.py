"""Any configuration is either refused in words, or its values are within what the documentation says of them."""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml
from fuzzing import NASTY_TEXTS, SCALARS, TEXTS, VALUES, Tally, declared, many
from hypothesis import given, seed
from hypothesis import strategies as st
from jsonargparse import ArgumentParser, Namespace
from tallies import TALLY

from lightning_pref.__main__ import COMMANDS
from lightning_pref.arguments import PlainErrors
from lightning_pref.cli import RecipeCLI
from lightning_pref.commands.ches import ches
from lightning_pref.commands.sample import sample
from lightning_pref.commands.teacher import teacher
from lightning_pref.recipes import dpo, reward, rlhf, sft

RECIPES = {recipe.name: recipe for recipe in (sft.RECIPE, reward.RECIPE, dpo.RECIPE, rlhf.RECIPE)}

MANY = 10**40

# Documented ranges of settings that every recipe, or one, has: smallest and largest value.
DOMAINS: dict[str, tuple[float, float]] = {
    "model.optimizer.learning_rate": (1e-300, 1e300),
    "model.optimizer.weight_decay": (0, 1e300),
    "model.optimizer.eps": (0, 1e300),
    "model.optimizer.warmup": (0, 1e300),
    "model.optimizer.floor": (0, 1),
    "model.loading.seed": (0, 2**32 - 1),
    "model.beta": (0, 1e300),
    "model.tail_weight": (0, 1),
    "model.retain_weight": (0, 1e300),
    "model.num_members": (1, MANY),
    "model.margin_scale": (0, 1e300),
    "model.center": (0, 1e300),
    "model.label_smoothing": (0, 0.5),
    "model.top_k": (1, MANY),
    "model.kl.coefficient": (0, 1e300),
    "model.kl.target": (1e-300, 1e300),
    "model.kl.horizon": (1e-300, 1e300),
    "model.advantage.gamma": (0, 1),
    "model.advantage.lam": (0, 1),
    "model.value.coefficient": (1e-300, 1e300),
    "model.value.rate_factor": (1e-300, 1e300),
    "model.scores.clip": (1e-300, 1e300),
    "model.scores.missing_eos_score": (-1e300, 1e300),
    "model.scores.missing_eos_penalty": (1e-300, 1e300),
    "model.surrogate.clip_low": (1e-300, 1),
    "model.surrogate.dual_clip": (1, 1e300),
    "model.surrogate.max_weight": (1, math.inf),
    "model.entropy_bonus": (-1e300, 1e300),
    "model.log_samples_every": (0, MANY),
    "data.val_size": (0, 1e300),
    "data.limit_rows": (1, MANY),
    "data.max_length": (2, MANY),
    "data.max_prompt_length": (1, MANY),
    "data.max_tokens_per_batch": (1, MANY),
    "data.batch_size": (1, MANY),
    "data.replay_share": (1e-300, 1),
    "data.keep_rows": (1e-300, 1e300),
    "data.seed": (0, 2**32 - 1),
    "data.num_workers": (0, MANY),
    "data.num_prompts": (1, MANY),
    "data.num_samples": (1, MANY),
    "data.inner_epochs": (1, MANY),
    "data.num_minibatches": (1, MANY),
    "data.reward_batch_size": (1, MANY),
    "data.max_rows": (1, MANY),
    "data.uwo_coefficient": (0, 1e300),
    "data.sampling.max_new_tokens": (1, MANY),
    "data.sampling.temperature": (0, 1e300),
    "data.playground.num_rows": (1, MANY),
    "data.playground.num_val_rows": (0, MANY),
    "data.playground.noise": (0, 1),
    "data.playground.long_prompts": (0, 1),
    "data.playground.num_responses": (2, MANY),
}
NUMBERS = (
    "-1", "0", "1", "2", "0.5", "1.5", "-0.5", "1e400", "1e-9", ".nan", ".inf", "-.inf", str(10**12), str(10**30), "0x10", "1_0",
)  # fmt: skip
CLASSES = (
    "RewardVarianceMonitor", "EarlyStopping", "lightning_pref.callbacks", "torch.nn.Linear", "{class_path: os.system}",
    "[{class_path: RewardVarianceMonitor, init_args: 3}]", "{class_path: SpikeAwareOptimizerReset, init_args: {reset_every: -1}}",
)  # fmt: skip
WORDS = (
    "null", "true", "none", "auto", "", "[]", "{}", "[{}]", "[1, 2]", "{a: 1}", "sigmoid", "grpo", "playground",
    "playground:tiny", "a/b", "- x", *CLASSES,
)  # fmt: skip


class Parsed(RecipeCLI):
    """A recipe's command line up to the point where a folder would be made."""

    def before_instantiate_classes(self) -> None:
        """Make no folder."""

    def instantiate_classes(self) -> None:
        """Build no trainer."""


@cache
def parser_of(recipe: str) -> ArgumentParser:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return Parsed(RECIPES[recipe], ["--model.model=my/model", "--data.train=my.jsonl"]).parser


@cache
def flags_of(recipe: str) -> dict[str, tuple[str, ...]]:
    """Every flag of the recipe's own, with its choices where it has them."""
    flags: dict[str, tuple[str, ...]] = {}
    for action in parser_of(recipe)._actions:
        for flag in action.option_strings:
            if flag.startswith(("--model.", "--data.", "--run.", "--trainer.")) and not flag.endswith(".help"):
                flags[flag] = tuple(map(str, action.choices or ()))
    return flags


def values_in(config: Namespace) -> Iterator[tuple[str, Any]]:
    for name in DOMAINS:
        value = config.get(name)
        if value is not None and not isinstance(value, str):
            yield name, value


def check_domains(config: Namespace) -> None:
    for name, value in values_in(config):
        low, high = DOMAINS[name]
        assert low <= value <= high, f"{name}={value!r} was accepted"


def build(recipe: str, args: list[str]) -> None:
    """Parse and construct; nothing is loaded and nothing trained."""
    parser = parser_of(recipe)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = parser.parse_args(args)
        parts = Namespace(model=config.model, data=config.data, trainer=config.trainer)
        parser.instantiate_classes(parts)  # type: ignore[no-untyped-call]
    check_domains(config)


def reason(error: Exception) -> str | None:
    name = declared(error)
    if name is None:
        return None
    text = str(error)
    assert len(text) < 3000
    kinds = {"There is no option": "unknown option", "; expected": "wrong type or file", "must be": "out of range"}
    return next((kind for words, kind in kinds.items() if words in text), "does not go together, or else")


TEXT_VALUES = st.one_of(
    st.sampled_from(NUMBERS + WORDS),
    st.sampled_from(NASTY_TEXTS[:-6]),
    st.text(st.characters(exclude_categories=("Cs",)), max_size=8),
)
YAML_MARKS = ("\t", ":", "[", "{", "}", "&a", "*a", "!!python/name:os.system", "---\n", "\x00", "- ")


@st.composite
def command_lines(draw: st.DrawFn) -> tuple[str, list[str]]:
    """Some flags of a recipe, some of them misspelt, with values that may be anything."""
    recipe = draw(st.sampled_from(sorted(RECIPES)))
    flags = flags_of(recipe)
    args = draw(st.sampled_from([[], ["--model.model=my/model", "--data.train=my.jsonl"]]))
    for _ in range(draw(st.integers(1, 4))):
        flag = draw(st.sampled_from(sorted(flags)))
        choices = flags[flag]
        value = draw(st.sampled_from(choices) if choices and draw(st.booleans()) else TEXT_VALUES)
        how = draw(st.sampled_from(("=",) * 12 + ("+=", " ", "alone", "misspelt")))
        if how == "alone":
            args = [*args, flag]
        elif how == " ":
            args = [*args, flag, value]
        elif how == "misspelt":
            at = draw(st.integers(2, len(flag) - 1))
            args = [*args, f"{flag[:at]}{flag[at + 1 :]}={value}"]
        else:
            args = [*args, f"{flag}{how}{value}"]
    return recipe, args


@st.composite
def yaml_files(draw: st.DrawFn) -> tuple[str, str]:
    """Settings of any structure: right names with any values, any names, or text that is hardly YAML."""
    recipe = draw(st.sampled_from(sorted(RECIPES)))
    flags = [flag.removeprefix("--").split(".") for flag in flags_of(recipe)]
    tree: Any = {}
    for parts in draw(st.lists(st.sampled_from(flags), max_size=4)):
        at = tree
        for part in parts[: draw(st.integers(1, len(parts)))][:-1]:
            at = at.setdefault(part, {}) if isinstance(at.get(part, {}), dict) else {}
        at[parts[-1] if draw(st.integers(0, 9)) else draw(TEXTS)] = draw(SCALARS | VALUES)
    if not draw(st.integers(0, 5)):
        tree = draw(VALUES)
    try:
        text = yaml.safe_dump(tree, allow_unicode=draw(st.booleans()))
    except (yaml.YAMLError, ValueError, UnicodeError):
        text = str(tree)
    if not draw(st.integers(0, 4)):
        at = draw(st.integers(0, len(text)))
        text = text[:at] + draw(st.sampled_from(YAML_MARKS)) + text[at:]
    return recipe, text


def try_line(case: tuple[str, list[str]], tally: Tally) -> None:
    with tally.case(reason):
        build(*case)


def try_file(case: tuple[str, str], path: Path, tally: Tally) -> None:
    recipe, text = case
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    with tally.case(reason):
        build(recipe, [f"--config={path}"])


def fuzz_lines(num_cases: int, number: int) -> Tally:
    tally = Tally()
    many(num_cases)(seed(number)(given(case=command_lines())(lambda case: try_line(case, tally))))()
    return tally


def fuzz_files(num_cases: int, number: int, folder: Path) -> Tally:
    tally = Tally()
    many(num_cases)(seed(number)(given(case=yaml_files())(lambda case: try_file(case, folder / "my.yaml", tally))))()
    return tally


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.chdir(tmp_path)
    caplog.set_level(logging.ERROR)


def test_a_sample_of_command_lines(record_property: Any) -> None:
    tally = fuzz_lines(25, 1)
    record_property(TALLY, str(tally))
    assert tally.num_cases >= 25


def test_a_sample_of_configuration_files(tmp_path: Path, record_property: Any) -> None:
    tally = fuzz_files(25, 1, tmp_path)
    record_property(TALLY, str(tally))
    assert tally.num_cases >= 25


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_many_command_lines(record_property: Any) -> None:
    tally = fuzz_lines(1000, 2)
    record_property(TALLY, str(tally))
    assert tally.num_cases >= 950
    assert tally.outcomes["accepted"] > 20


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_many_configuration_files(tmp_path: Path, record_property: Any) -> None:
    tally = fuzz_files(700, 2, tmp_path)
    record_property(TALLY, str(tally))
    assert tally.num_cases >= 650


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_every_number_of_every_flag(record_property: Any) -> None:
    """The nonsense that fuzzing might miss: each number at each flag of each recipe that takes one."""
    tally = Tally()
    for recipe in RECIPES:
        own = [name for name in DOMAINS if f"--{name}" in flags_of(recipe)]
        for name in own:
            base = [] if name.startswith("data.playground") else ["--model.model=my/model", "--data.train=my.jsonl"]
            for number in ("-1", "0", "-0.5", ".nan", ".inf", "-.inf"):
                try_line((recipe, [*base, f"--{name}={number}"]), tally)
    record_property(TALLY, str(tally))
    assert tally.outcomes["refused: out of range"] > 100


FUNCTIONS = {"ches": ches, "sample": sample, "teacher": teacher}


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_flags_of_the_commands(record_property: Any) -> None:
    """Parsed and no further: what the values mean is up to each command's own tests."""
    assert set(FUNCTIONS) <= set(COMMANDS)
    tally = Tally()
    parsers = {}
    for name, function in FUNCTIONS.items():
        parsers[name] = PlainErrors(prog=name)
        parsers[name].add_function_arguments(function, as_positional=False)

    def case(name: str, pairs: list[tuple[int, str]]) -> None:
        flags = [flag for action in parsers[name]._actions for flag in action.option_strings if flag.startswith("--")]
        args = [f"{flags[at % len(flags)]}={value}" for at, value in pairs if flags[at % len(flags)] != "--help"]
        with tally.case(reason), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            parsers[name].parse_args(args)

    strategy = st.lists(st.tuples(st.integers(0, 50), TEXT_VALUES), max_size=4)
    many(600)(seed(3)(given(name=st.sampled_from(sorted(FUNCTIONS)), pairs=strategy)(case)))()
    record_property(TALLY, str(tally))
    assert tally.num_cases >= 500
