"""Checks of single values of a row."""

from __future__ import annotations

import json
import math

from lightning_pref.data.rows import FIX_OR_SKIP, Place, RowError, describe


def checked_list(value: object, field: str, place: Place, like: tuple[str, int] | None = None) -> list[object]:
    """A list that is not empty, with as many entries as the column `like`."""
    if not isinstance(value, list | tuple):
        raise RowError("wrong_type", place, field, describe(value), "a list")
    if not value:
        raise RowError("empty_list", place, field, "an empty list", "at least one entry")
    if like is not None and len(value) != like[1]:
        raise RowError("length_mismatch", place, field, describe(value), f"{like[1]} entries, one for each of `{like[0]}`")
    return list(value)


def checked_number(value: object, field: str, place: Place) -> float:
    """A finite number; a boolean is none."""
    expectation = "a finite number"
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise RowError("not_a_number", place, field, describe(value), expectation)
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise RowError("not_finite", place, field, describe(value), expectation)
    return number


def checked_rank(value: object, field: str, place: Place) -> int:
    """A rank: a whole number, smaller is better."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise RowError("not_a_rank", place, field, describe(value), "a whole number, smaller for better responses")
    return value


def checked_boolean(value: object, field: str, place: Place) -> bool:
    """A boolean and nothing that stands for one, since 0 and 1 may as well be scores."""
    if not isinstance(value, bool):
        cure = f"Write true or false (1 and 0 are not read as such). {FIX_OR_SKIP}"
        raise RowError("not_a_boolean", place, field, describe(value), "true or false", cure)
    return value


def decoded_json(value: object, field: str, place: Place) -> object:
    """The value, read as JSON where it is text."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as error:
        raise RowError("broken_json", place, field, f"text that is not JSON ({error})", "JSON") from error
