"""Parsers whose errors are one paragraph: which flag or file, what was found, what was expected, what to do."""

from __future__ import annotations

import re
from argparse import Action
from collections.abc import Collection, Iterator, Sequence
from difflib import get_close_matches
from pathlib import Path
from types import NoneType
from typing import Any, NoReturn, get_args

import yaml
from jsonargparse import ArgumentParser, Namespace
from lightning.pytorch.cli import LightningArgumentParser
from typing_extensions import override

CONFIG_FLAGS = ("--config", "-c")

# What jsonargparse does not catch itself: values of half characters, too large, without end, or of an unexpected structure.
BEYOND_JSONARGPARSE = (ValueError, OverflowError, RecursionError, AttributeError, IndexError, OSError, yaml.YAMLError)

# Types as jsonargparse writes them, and as people say them.
_TYPE_NAMES = (
    (re.compile(r"<class '(?:\w+\.)*(\w+)'>"), r"\1"),
    (re.compile(r"\btyping\.Literal\[(.*?)\]"), r"one of \1"),
    (re.compile(r"\btyping\."), ""),
    (re.compile(r"\bNoneType\b"), "null"),
)


class RefusedArgument(ValueError):
    """A value that the parser itself refuses, in words for the user."""


class PlainErrors(ArgumentParser):
    """Raises what a command line is refused for, instead of printing pages of usage before it."""

    @override
    def parse_args(self, args: Sequence[str] | None = None, *rest: Any, **kwargs: Any) -> Namespace:  # type: ignore[override]
        # Any: what jsonargparse takes
        for path in _config_files(args or ()):
            check_config(Path(path))
        try:
            config = super().parse_args(args, *rest, **kwargs)
        except RefusedArgument:
            raise
        except BEYOND_JSONARGPARSE as error:
            raise ValueError(
                f"The command line cannot be read ({type(error).__name__}: {_shortened(str(error))}); expected flags with values "
                "in YAML. Leave flags out one by one to find the one at fault."
            ) from error
        check_groups(config, self._flags())
        check_nulls(config, self._actions)
        return config

    @override
    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        # The parsers of single values raise, and the one above them collects.
        if not self.exit_on_error:
            super().error(message, ex)
        raise RefusedArgument(plain(message, self._flags())) from ex

    def _flags(self) -> list[str]:
        return [flag for action in self._actions for flag in action.option_strings if flag.startswith("--")]


class RecipeParser(PlainErrors, LightningArgumentParser):
    """The parser of a recipe."""

    @override
    def format_help(self, *args: Any) -> str:
        # The recipe's own flags first; those of the Trainer are known, and are many.
        self._action_groups = sorted(self._action_groups, key=lambda group: group is (self.groups or {}).get("trainer"))
        return super().format_help(*args)


def divided(args: Sequence[str], lists: Collection[str]) -> tuple[Sequence[str], list[str]]:
    """What is a command's own, and what it hands on as `flags`: all behind `--`, and the configuration.

    >>> divided(["--workers=2", "--config", "my.yaml", "--", "--run.name", "a"], {"flags"})
    (['--workers=2'], ['--flags+=--config=my.yaml', '--flags+=--run.name', '--flags+=a'])
    """
    if "flags" not in lists:
        return args, []
    cut = args.index("--") if "--" in args else len(args)
    own, handed_on = list(args[:cut]), list(args[cut + 1 :])
    for place in reversed(range(len(own))):
        if own[place] == "--config" and place + 1 < len(own):
            own[place : place + 2] = [f"--config={own[place + 1]}"]
    configs = [arg for arg in own if arg.startswith("--config=")]
    return [arg for arg in own if arg not in configs], [f"--flags+={arg}" for arg in [*configs, *handed_on]]


def as_parsed(arg: str, lists: Collection[str]) -> str:
    """An argument as jsonargparse reads it: `--drop-top` is `--drop_top`, and what is a list is appended to.

    >>> as_parsed("--reward-model=a-b", {"reward_model"})
    '--reward_model+=a-b'
    """
    if not arg.startswith("--"):
        return arg
    name, equals, value = arg.partition("=")
    plain = name[2:].replace("-", "_")
    return f"--{plain}{'+' if plain in lists else ''}{equals}{value}"


def check_groups(config: Namespace, flags: Sequence[str]) -> None:
    """Raise where a single value, or nothing, stands for a whole group of settings, which jsonargparse lets pass."""
    names = [flag.removeprefix("--").split(".") for flag in flags if not flag.endswith(".help")]
    for group in dict.fromkeys(".".join(parts[:end]) for parts in names for end in range(1, len(parts))):
        value = config.get(group, {})
        if not isinstance(value, Namespace | dict):
            within = [flag for flag in flags if flag.startswith(f"--{group}.")]
            found = "null" if value is None else _shortened(repr(value))
            raise ValueError(
                f"`--{group}`: got {found}; expected a group of settings: {_shortened(', '.join(within))}. "
                "Set those that you mean, or leave the group out."
            )


def check_nulls(config: Namespace, actions: Sequence[Action]) -> None:
    """Raise where a setting of a group is null that cannot be, which jsonargparse lets pass."""
    for action in actions:
        hint = getattr(action, "_typehint", None)
        kinds = get_args(hint) or (hint,)
        if action.default is None or {None, NoneType, Any} & set(kinds) or config.get(action.dest, action.default) is not None:
            continue
        names = " or ".join(getattr(kind, "__name__", str(kind)) for kind in kinds)
        raise ValueError(
            f"`--{action.dest}`: got null; expected {_shortened(names)}. Give a value, or leave it out for its default."
        )


def check_config(path: Path) -> None:
    """Raise unless the file is YAML (or JSON) with named settings."""
    if not path.exists():
        near = get_close_matches(path.name, [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else [], n=1)
        hint = f" Did you mean {str(path.with_name(near[0]))!r}?" if near else " Correct the path."
        raise FileNotFoundError(f"`--config`: there is no file {path.absolute()}.{hint}")
    if not path.is_file():
        raise ValueError(f"`--config`: {path} is a folder; expected a file of settings in YAML. Name the file in it.")
    try:
        settings = yaml.safe_load(path.read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        raise ValueError(
            f"`--config`: {path} is no UTF-8 text (byte {error.start} is {error.object[error.start]:#04x}). Save it as UTF-8."
        ) from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}, column {mark.column + 1}" if mark is not None else ""
        problem = getattr(error, "problem", None) or getattr(error, "reason", None) or "it cannot be read"
        raise ValueError(f"`--config`: {path}{line}: {problem}; expected settings in YAML. Correct that line.") from error
    except RecursionError as error:
        raise ValueError(f"`--config`: {path} is nested too deeply to be settings; expected a few levels of YAML.") from error
    if not isinstance(settings, dict) or not all(isinstance(key, str) for key in settings):
        found = "nothing" if settings is None else f"a {type(settings).__name__}"
        raise ValueError(
            f"`--config`: {path} holds {found}; expected named settings in YAML, such as `trainer: {{max_steps: 100}}`. "
            "`--print_config` writes a whole file to begin with."
        )


def plain(message: str, flags: Sequence[str]) -> str:
    """jsonargparse's message as one paragraph, with the nearest flags for one that there is not.

    Args:
        message: As jsonargparse says it.
        flags: All that there are.
    """
    unknown = _unknown_option(message)
    if unknown is not None:
        return f"There is no option `{_shortened(unknown)}`.{_suggestion(unknown, flags)} `--help` lists all options."
    for pattern, words in _TYPE_NAMES:
        message = pattern.sub(words, message)
    key, _, rest = message.partition("\n")
    found = re.fullmatch(r'Parser key "(.+?)":', key.strip())
    if found is None:
        return f"{_sentence(_shortened(message, 1000))} `--help` explains all options."
    name = _shortened(found[1])
    if group := re.search(r"Unable to load config '(.*?)'", rest, re.DOTALL):
        within = [flag for flag in flags if flag.startswith(f"--{found[1]}.")]
        return (
            f"`--{name}`: got {_shortened(group[1])}; expected a file with these settings, or the settings by themselves: "
            f"{_shortened(', '.join(within))}."
        )
    causes = list(dict.fromkeys(_causes(rest)))
    value = re.search(r"Given value: (.*)", rest, re.DOTALL) or re.search(r"Got value: (.*)", rest, re.DOTALL)
    got = f"got {_shortened(' '.join(value[1].split()))}" if value else "got another"
    expected = re.search(r"Subtypes: \[(.*)\]", rest) or re.search(r"Expected an? (.*?)\. Got value", rest)
    kinds = f"; expected {_shortened(expected[1])}" if expected else ""
    why = f" ({'; '.join(causes)})" if causes else ""
    takes_class = "Subtypes" in rest and re.search(r"Problem with given class_path|either not accessible", rest)
    cure = " A class is given by its path, `package.module.ClassName`." if takes_class else ""
    return f"`--{name}`: {got}{kinds}{why}.{cure} `--help` explains it."


def _causes(text: str) -> Iterator[str]:
    """What went wrong further down, in the words of whatever refused it."""
    lines = [line.strip(" -") for line in text.splitlines()]
    for line, following in zip(lines, [*lines[1:], ""], strict=True):
        if line.startswith(("Problem with given class_path", "Import of")):
            yield _shortened(f"{line.rstrip(':')}: {following}" if line.endswith(":") else line)
        elif "does not accept" in line or "is not accepted" in line:
            yield _shortened(line)


def _unknown_option(message: str) -> str | None:
    patterns = (
        r"unrecognized arguments: ([^\s=]+)",
        r"^Option '([^']+)' is not accepted",
        r"^Key '([^']+)' is not expected",
    )
    for pattern in patterns:
        if found := re.search(pattern, message):
            return _as_flag(found[1])
    in_group = re.search(r"^Group '([^']+)' does not accept option '([^']+)'", message)
    return _as_flag(f"{in_group[1]}.{in_group[2]}") if in_group else None


def _as_flag(name: str) -> str:
    return name if name.startswith("-") else f"--{name}"


def _suggestion(unknown: str, flags: Sequence[str]) -> str:
    """The flags with the same last part, else those spelled nearly so."""
    last = unknown.lstrip("-").rsplit(".", 1)[-1]
    same = [flag for flag in flags if flag.lstrip("-").rsplit(".", 1)[-1] == last]
    by_last = {flag.lstrip("-").rsplit(".", 1)[-1]: flag for flag in flags}
    near = (
        get_close_matches(unknown, same, n=2, cutoff=0.0)
        or get_close_matches(unknown, flags, n=2, cutoff=0.75)
        or [by_last[name] for name in get_close_matches(last, by_last, n=2, cutoff=0.75)]
    )
    return f" Did you mean {' or '.join(f'`{flag}`' for flag in near)}?" if near else ""


def _sentence(text: str) -> str:
    line = " ".join(text.split())
    return line if line.endswith((".", "!", "?")) else f"{line}."


def _shortened(text: str, limit: int = 200) -> str:
    return text if len(text) <= limit else f"{text[: limit - 3]}..."


def _config_files(args: Sequence[str]) -> Iterator[str]:
    """The files given with `--config`."""
    for i, arg in enumerate(args):
        flag, equals, value = arg.partition("=")
        if flag in CONFIG_FLAGS:
            following = value if equals else next(iter(args[i + 1 :]), "")
            # Settings may be given in place of a file.
            if following and not following.lstrip().startswith("{"):
                yield following
