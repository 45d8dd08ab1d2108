"""Which rows are trained on: a share of old rows mixed in, and a part of the new ones instead of all.

Both narrow the stability gap (Guo et al., Efficient continual pre-training by mitigating the stability gap, 2024,
arXiv 2406.14833): several epochs over a good part of the new data, mixed as the old data was. Here they are functions of
tables, so that what is trained on is known, counted and part of the data's digest before the first batch is made.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from lightning_pref.data.fields import checked_number, decoded_json
from lightning_pref.data.groups import PromptGroup
from lightning_pref.data.rows import Place, RowError, describe
from lightning_pref.data.sources import RowSource
from lightning_pref.data.store import GroupSubset, GroupTable
from lightning_pref.data.store_files import digest_of

# Tell the two draws of one seed apart, and both from the shuffling of epochs.
_REPLAY_STREAM, _KEEP_STREAM = 2, 3


def check_choice(
    replay: Sequence[str] | None, replay_share: float | None, keep_rows: float | None, keep_rows_by: str | None
) -> None:
    """Raise where one of these settings makes no sense, or has no effect without another."""
    if replay is not None and not replay:
        raise ValueError("`replay` names no data; give a source as for `train`, or leave it out.")
    if replay_share is not None and replay is None:
        raise ValueError(f"`replay_share` is {replay_share!r}, but there is nothing to replay; name the old data by `replay`.")
    if replay is not None and (replay_share is None or not 0 < replay_share < 1):
        raise ValueError(f"`replay` needs a `replay_share` in (0, 1), the share of old rows among all, got {replay_share!r}.")
    if keep_rows is not None and (not 0 < keep_rows < math.inf or (keep_rows >= 1 and keep_rows != int(keep_rows))):
        raise ValueError(f"`keep_rows` is a share below 1 or a number of rows, got {keep_rows!r}.")
    if keep_rows_by is not None and keep_rows is None:
        raise ValueError(f"`keep_rows_by` is {keep_rows_by!r}, but all rows are kept; say how many by `keep_rows`.")


class JoinedTables:
    """The groups of one table, then those of another; itself a table.

    Row ids of the second are shifted past those of the first, so that a row id still names one row.
    """

    def __init__(self, first: GroupTable, second: GroupTable) -> None:
        self.first, self.second = first, second
        self.row_id_shift = int(first.row_ids.max()) + 1
        self.digest = digest_of([first.digest, second.digest, self.row_id_shift])
        self.row_ids = np.concatenate([first.row_ids, second.row_ids + self.row_id_shift])
        self.prompt_keys = np.concatenate([first.prompt_keys, second.prompt_keys])
        self.weights = np.concatenate([first.weights, second.weights])
        self.prompt_lengths = np.concatenate([first.prompt_lengths, second.prompt_lengths])
        self.num_responses = np.concatenate([first.num_responses, second.num_responses])
        self.response_tokens = np.concatenate([first.response_tokens, second.response_tokens])
        self.response_offsets = np.concatenate([first.response_offsets, second.response_offsets[1:] + first.response_offsets[-1]])

    def __len__(self) -> int:
        return len(self.row_ids)

    def __getitem__(self, index: int, /) -> PromptGroup:
        if index < len(self.first):
            return self.first[index]
        group = self.second[index - len(self.first)]
        return replace(group, row_id=group.row_id + self.row_id_shift)


def with_replay(new: GroupTable, old: GroupTable, share: float, seed: int, unwanted: GroupTable | None = None) -> JoinedTables:
    """The new rows and as many old ones as make the wanted share of all.

    The old rows are chosen once, so that every epoch has the same ones in another order. Where there are too few of them, all
    are repeated equally often, up to one time.

    Args:
        new: Rows of the new task; each of them is trained on.
        old: Rows of the old one.
        share: Share of old rows among all, in (0, 1), met to the nearest row.
        seed: Of the choice.
        unwanted: Rows, such as those of the validation, whose prompts must not be trained on.
    """
    usable = np.arange(len(old))
    if unwanted is not None:
        usable = np.flatnonzero(~np.isin(old.prompt_keys, unwanted.prompt_keys))
    if not len(usable):
        raise ValueError(
            f"All {len(old)} rows to replay have prompts that are held out for validation; give other `replay` data, or other "
            "validation data by `val`."
        )
    count = max(1, round(share * len(new) / (1 - share)))
    order = np.random.default_rng([seed, _REPLAY_STREAM]).permutation(usable)
    chosen = np.sort(np.resize(order, count))  # `resize` begins anew at the end
    return JoinedTables(new, GroupSubset(old, chosen))


def num_kept(keep: float, num_rows: int) -> int:
    """How many rows `keep_rows` means: a share of them where below 1, else their number.

    >>> num_kept(0.5, 10), num_kept(3, 10), num_kept(1, 10)
    (5, 3, 1)
    """
    count = max(1, round(keep * num_rows)) if keep < 1 else int(keep)
    if count > num_rows:
        raise ValueError(f"`keep_rows` is {count}, but there are only {num_rows} rows to train on; lower it, or leave it out.")
    return count


def kept_by_chance(table: GroupTable, keep: float, seed: int) -> GroupSubset:
    """A fixed random part of the rows, in their own order.

    Args:
        table: All rows.
        keep: Share of them where below 1, else their number.
        seed: Of the choice; a larger part holds every smaller one of the same seed.
    """
    order = np.random.default_rng([seed, _KEEP_STREAM]).permutation(len(table))
    return GroupSubset(table, np.sort(order[: num_kept(keep, len(table))]))


def kept_by_value(table: GroupTable, keep: float, values: Mapping[int, float], *, lowest: bool = False) -> GroupSubset:
    """The rows of the highest values, in their own order; of equal ones the earlier rows.

    Args:
        table: All rows.
        keep: Share of them where below 1, else their number.
        values: The value of every row, by row id.
        lowest: The rows of the lowest values instead.
    """
    found = np.array([values[row_id] for row_id in table.row_ids.tolist()])
    order = np.argsort(found if lowest else -found, kind="stable")
    return GroupSubset(table, np.sort(order[: num_kept(keep, len(table))]))


def column_values(sources: Iterable[RowSource], column: str, row_ids: NDArray[np.int64]) -> dict[int, float]:
    """A number of every wanted row, read from a column of its source.

    Args:
        sources: The sources of the rows, with all their columns; row ids count over them, as `load_groups` counts.
        column: Name of the column, as it is in the source.
        row_ids: Rows whose value is wanted.

    Raises:
        RowError: If a wanted row has no number there.
    """
    wanted = set(row_ids.tolist())
    values: dict[int, float] = {}
    rows = ((place, raw) for source in sources for place, raw in source)
    for row_id, (place, raw) in enumerate(rows):
        if row_id not in wanted:
            continue
        assert isinstance(raw, Mapping), "a row that became a group was an object"
        values[row_id] = _value(raw, column, place)
        if len(values) == len(wanted):
            break
    return values


def _value(raw: Mapping[str, object], column: str, place: Place) -> float:
    if column not in raw:
        raise RowError(
            "missing_key", place, "", f"no column {column!r} but {', '.join(sorted(map(str, raw)))}", "the one in `keep_rows_by`",
            "Name a column that every row has, or leave `keep_rows_by` out to keep rows by chance.",
        )  # fmt: skip
    value = raw[column]
    try:
        # CSV files know text only.
        return checked_number(decoded_json(value, column, place) if isinstance(value, str) else value, column, place)
    except RowError as error:
        raise RowError(
            error.reason, place, column, describe(value), "a finite number to choose rows by",
            "Fix or remove the row, or name another column in `keep_rows_by`.",
        ) from None  # fmt: skip
