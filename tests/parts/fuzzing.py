"""Any JSON, rows that are nearly right, and the tally of what became of them."""

from __future__ import annotations

import json
import math
import signal
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st

from lightning_pref.mistakes import explanation

# Any: fuzzed values are anything at all.
Value = Any

# A case takes milliseconds; the longest pause of a busy machine is far below this.
SECONDS_PER_CASE = 60


class HangError(AssertionError):
    """A case that does not end."""


@contextmanager
def time_limit(seconds: int = SECONDS_PER_CASE) -> Iterator[None]:
    """Raise in a case that hangs."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise HangError(f"a case takes longer than {seconds} s")

    former = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, former)


class Tally:
    """Counts cases by what became of them."""

    def __init__(self) -> None:
        self.outcomes: Counter[str] = Counter()

    @property
    def num_cases(self) -> int:
        return sum(self.outcomes.values())

    @contextmanager
    def case(self, reason_of: Callable[[Exception], str | None]) -> Iterator[None]:
        """One case: accepted, refused for a reason, or (by any other exception) a defect, which fails the test.

        Args:
            reason_of: Why an exception refuses the input; `None` if it is not one that was raised for the user.
        """
        try:
            with time_limit():
                yield
        except AssertionError:
            raise
        except Exception as error:
            reason = reason_of(error)
            if reason is None:
                raise
            self.outcomes[f"refused: {reason}"] += 1
        else:
            self.outcomes["accepted"] += 1

    def __str__(self) -> str:
        return json.dumps(dict(self.outcomes.most_common()))


def declared(error: Exception) -> str | None:
    """The kind of a mistake that the command line explains; `None` for what it would show as a traceback."""
    text = explanation(error)
    return None if text is None else type(error).__name__


def many(num_cases: int) -> settings:
    """So many cases, the same in every run."""
    return settings(
        max_examples=num_cases,
        deadline=None,
        derandomize=True,
        database=None,
        # A defect is found by its input; making that smaller takes longer than reading it.
        phases=(Phase.explicit, Phase.generate, Phase.shrink),
        suppress_health_check=list(HealthCheck),
    )


# Lone surrogates, controls, marks that turn the direction, and what markup and terminals give a meaning to.
NASTY_TEXTS = (
    "",
    " ",
    "\n\t",
    "\ud800",
    "a\udfffb",
    "\x00",
    "\x1b[31mred\x1b[0m",
    "\u202eevil",
    "\ufeff",
    "<script>alert(1)</script>",
    "| `a` |",
    "{{ 7 * 7 }}",
    "<|endoftext|>",
    "\U0001f468\u200d\U0001f469\u200d\U0001f467",
    "e\u0301" * 40,
    "x" * 20_000,
    "NaN",
    "true",
    "../../etc/passwd",
)
TEXTS = st.text(max_size=12) | st.sampled_from(NASTY_TEXTS) | st.text(st.characters(codec=None), max_size=12)
NUMBERS = st.integers() | st.floats() | st.sampled_from([10**400, -(10**30), 1e308, math.nan, math.inf, -math.inf, -0.0])
SCALARS: st.SearchStrategy[Value] = st.none() | st.booleans() | NUMBERS | TEXTS
KEYS = st.sampled_from(("role", "content", "text", "type", "tool_calls", "name", "prompt", "messages", "")) | TEXTS
VALUES: st.SearchStrategy[Value] = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(KEYS, inner, max_size=4), max_leaves=8
)
# What is no JSON, but what columnar files hand over.
ODD_VALUES: st.SearchStrategy[Value] = st.one_of(
    VALUES, st.binary(max_size=8), st.datetimes(), st.decimals(), st.tuples(st.integers()), st.sets(st.integers(), max_size=2)
)


def deep(depth: int, value: Value = "end") -> Value:
    """A list in a list in a list ..."""
    for _ in range(depth):
        value = [value]
    return value


@st.composite
def changed(draw: st.DrawFn, rows: st.SearchStrategy[dict[str, Value]], values: st.SearchStrategy[Value] = VALUES) -> Value:
    """A row that is right, with some of its values replaced, taken away or repeated, at any depth."""
    row: Value = draw(rows)
    for _ in range(draw(st.integers(0, 3))):
        row = draw(_changed_once(row, values, whole=False))
    return row


@st.composite
def _changed_once(draw: st.DrawFn, value: Value, values: st.SearchStrategy[Value], *, whole: bool = True) -> Value:
    inside = isinstance(value, dict | list) and value and (not whole or draw(st.integers(0, 3)))
    if not inside:
        return draw(values)
    if isinstance(value, dict):
        key = draw(st.sampled_from(sorted(value, key=str)))
        rest = {name: item for name, item in value.items() if name != key}
        how = draw(st.sampled_from(("in", "in", "in", "away", "renamed", "more")))
        if how == "away":
            return rest
        if how == "renamed":
            return {**rest, draw(KEYS): value[key]}
        if how == "more":
            return {**value, draw(KEYS): draw(values)}
        return {**value, key: draw(_changed_once(value[key], values))}
    at = draw(st.integers(0, len(value) - 1))
    how = draw(st.sampled_from(("in", "in", "in", "away", "twice")))
    middle = {"in": [draw(_changed_once(value[at], values))] if how == "in" else [], "away": [], "twice": [value[at]] * 2}[how]
    return [*value[:at], *middle, *value[at + 1 :]]


def is_finite(value: object) -> bool:
    """Whether it is a number that one can calculate with."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
