"""Whether a number that a user sets is one that can be meant."""

from __future__ import annotations

import math

# What torch, numpy and Lightning all take.
MAX_SEED = 2**32 - 1


def check_range(
    name: str,
    value: float | None,
    *,
    at_least: float | None = None,
    above: float | None = None,
    at_most: float | None = None,
    below: float | None = None,
) -> None:
    """Raise unless the number is finite and within its bounds.

    Args:
        name: Of the setting.
        value: What it is set to; `None` (not set) passes.
        at_least: Smallest value.
        above: What it has to be larger than.
        at_most: Largest value.
        below: What it has to be smaller than.

    >>> check_range("beta", -1.0, above=0)
    Traceback (most recent call last):
        ...
    ValueError: `beta` must be above 0, got -1.0.
    """
    if value is None:
        return
    bounds = {"at least": at_least, "above": above, "at most": at_most, "below": below}
    is_inside = (
        math.isfinite(value)
        and (at_least is None or value >= at_least)
        and (above is None or value > above)
        and (at_most is None or value <= at_most)
        and (below is None or value < below)
    )
    if not is_inside:
        wanted = " and ".join(f"{words} {bound}" for words, bound in bounds.items() if bound is not None)
        raise ValueError(f"`{name}` must be {wanted or 'a finite number'}, got {value!r}.")


def check_seed(name: str, value: int) -> None:
    """Raise unless every random generator can be seeded with the number."""
    check_range(name, value, at_least=0, at_most=MAX_SEED)
