"""Leaving out rows by a score: which they are, and the rest of the data set as it was."""

from __future__ import annotations

import datetime as dt
import decimal
import json
import math
from collections.abc import Mapping, Sequence, Set
from fractions import Fraction
from itertools import islice
from pathlib import Path
from typing import NamedTuple

from lightning_pref.data.rows import Place, RowError, describe
from lightning_pref.data.sources import RowSource


class KeptRows(NamedTuple):
    """How the rows of a source fared."""

    kept: int  # scored and written
    dropped: int
    not_scored: int  # written as well: nothing is known against them
    unreadable: int  # not written


def parse_share(text: str) -> Fraction:
    """A share above 0 and below 1 given as `5%` or `0.05`, exactly: 0.29 of 100 rows are 29.

    >>> parse_share("5%") == parse_share("0.05")
    True
    """
    number = text.strip()
    is_percentage = number.endswith("%")
    try:
        share = Fraction(number.removesuffix("%").strip()) / (100 if is_percentage else 1)
    except (ValueError, ZeroDivisionError):
        share = Fraction(0)
    if not 0 < share < 1:
        hint = f" For {number} percent write '{number}%'." if 1 <= share < 100 and not is_percentage else ""
        raise ValueError(f"A share of rows is above 0% and below 100%, such as '5%' or '0.05'; got {text!r}.{hint}")
    return share


def highest_rows(row_ids: Sequence[int], scores: Sequence[float], share: Fraction) -> set[int]:
    """The rows with the highest scores: `share` of all rows, rounded (half a row up), and never all of them.

    Of rows with equal scores those with the larger numbers are taken. A row with several scores counts with its highest.

    >>> highest_rows([0, 1, 2, 3], [0.5, 2.0, 2.0, 1.0], Fraction(1, 4))
    {2}
    """
    highest: dict[int, float] = {}
    for row, score in zip(row_ids, scores, strict=True):
        highest[row] = max(score, highest.get(row, -math.inf))
    count = min(math.floor(share * len(highest) + Fraction(1, 2)), len(highest) - 1)
    ascending = sorted(highest, key=lambda row: (highest[row], row))
    return set(ascending[len(ascending) - count :])


def write_kept(source: RowSource, path: Path, dropped: Set[int], scored: Set[int], limit_rows: int | None = None) -> KeptRows:
    """Write the rows of a source but the dropped ones as JSON lines, in their order and with all their columns.

    Args:
        source: Where the rows came from, under its own column names.
        path: File to write; it appears when all is written.
        dropped: Numbers of the rows to leave out, counted over the source from 0.
        scored: Numbers of the rows that were scored; the others are written too, and counted apart.
        limit_rows: Read this many rows at most.
    """
    counts = dict.fromkeys(KeptRows._fields, 0)
    partial = path.with_name(f"{path.name}.partial")
    try:
        # A lone surrogate is no UTF-8; as a backslash escape it is JSON, and read back as it was.
        with partial.open("w", encoding="utf-8", errors="backslashreplace", newline="\n") as file:
            for row_id, (place, row) in enumerate(islice(source, limit_rows)):
                if isinstance(row, RowError):
                    counts["unreadable"] += 1
                elif row_id in dropped:
                    counts["dropped"] += 1
                else:
                    counts["kept" if row_id in scored else "not_scored"] += 1
                    file.write(_line_of(row, place))
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    return KeptRows(**counts)


def _line_of(row: Mapping[str, object], place: Place) -> str:
    try:
        return json.dumps(dict(row), ensure_ascii=False, default=_as_text) + "\n"
    except TypeError as error:
        for column, value in row.items():
            try:
                json.dumps(value, default=_as_text)
            except TypeError:
                raise ValueError(
                    f"{place}, column `{column}`: found {describe(value)}, which JSON has no form for; expected texts, numbers, "
                    "lists and objects. Take the column out of the data; training does not read it."
                ) from error
        raise


def _as_text(value: object) -> str:
    if isinstance(value, dt.date | dt.time):
        return value.isoformat()
    if isinstance(value, decimal.Decimal):
        return str(value)
    raise TypeError(f"no JSON for {type(value).__name__}")
