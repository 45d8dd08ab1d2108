"""What happened to the log-probabilities of every preference pair since its anchor, by row id."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

Anchor = Literal["auto", "reference", "first"]

# `anchor_step` of a pair whose anchor is its log-probability under the reference.
REFERENCE = -1

# Columns of the table beside the key: 13 numbers of 8 bytes, with the key 120 bytes a pair.
INTEGERS = ("anchor_step", "last_step", "minimum_step", "num_sights")
REALS = (
    "anchor_chosen",
    "anchor_rejected",
    "last_chosen",
    "last_rejected",
    "minimum_chosen",
    "chosen_length",
    "rejected_length",
    "ches",
    "normalized_ches",
)


class PairSights(NamedTuple):
    """Log-probabilities of M pairs in the order they were seen, on the CPU; `nan` for what was not told."""

    row_ids: Tensor  # [M] int64
    observation: Tensor  # [M] int64, rising: pairs of one forward pass have one number
    step: Tensor  # [M] int64, updates executed before
    chosen: Tensor  # [M] float64, nats, summed over response tokens
    rejected: Tensor  # [M]
    chosen_lengths: Tensor  # [M] float64, tokens
    rejected_lengths: Tensor  # [M]
    ref_chosen: Tensor  # [M] float64, nats
    ref_rejected: Tensor  # [M]


class PairScores(NamedTuple):
    """CHES of M pairs on the CPU."""

    row_ids: Tensor  # [M] int64
    observation: Tensor  # [M] int64
    ches: Tensor  # [M] float64, squared hidden norm
    normalized_ches: Tensor  # [M] float64, the same with states averaged over each response


class PairChanges(NamedTuple):
    """What M sights say, sorted by row; `nan` at the first sight of a pair whose anchor is late."""

    row_ids: Tensor  # [M] int64
    chosen: Tensor  # [M] float64, nats, log-probability now minus at the anchor
    rejected: Tensor  # [M]
    chosen_step: Tensor  # [M] float64, nats, now minus at the sight before
    rejected_step: Tensor  # [M]
    chosen_lengths: Tensor  # [M] float64, tokens
    rejected_lengths: Tensor  # [M]
    is_late: Tensor  # [M] bool, the anchor is the pair's own value after the first update
    normalized_ches: Tensor  # [M] float64, squared hidden norm
    num_left_out: int = 0  # further sights: not finite, or without room in the table and without a reference


class PairRecord(NamedTuple):
    """One pair of the table."""

    row_id: int
    place: int  # among the pairs of its row
    chosen_change: float  # nats, last value minus anchor
    rejected_change: float
    chosen_length: float  # tokens
    rejected_length: float
    lowest_change: float  # nats, of the chosen response, smallest value minus anchor
    lowest_step: int  # updates executed when it was smallest
    ches: float
    normalized_ches: float


class PairQueue:
    """Pairs on their way to the host: kept on the device, then fetched in one copy."""

    def __init__(self) -> None:
        self._packed: list[tuple[Tensor, bool]] = []
        self._observation = 0
        self._scored = 0
        self.num_rows = 0

    def add_pairs(self, step: int, row_ids: Tensor, *values: Tensor | None) -> None:
        """Queue the pairs of one forward pass.

        Args:
            step: Updates executed so far.
            row_ids: [B] integer.
            values: chosen, rejected, their lengths, their reference log-probabilities, [B] each, `None` where unknown.
        """
        self._packed.append((_pack(row_ids, self._observation, step, values), True))
        self._observation += 1
        self.num_rows += len(row_ids)

    def add_scores(self, row_ids: Tensor, *values: Tensor) -> None:
        """Queue CHES and length-normalised CHES, [B] each, of the pairs of one forward pass."""
        self._packed.append((_pack(row_ids, self._scored, 0, values), False))
        self._scored += 1
        self.num_rows += len(row_ids)

    def fetch(self) -> tuple[PairSights, PairScores]:
        """Everything queued, on the CPU; the queue is empty afterwards. The one place that waits for the device."""
        found: dict[bool, list[Tensor]] = {True: [_nothing(9)], False: [_nothing(5)]}
        if self._packed:
            device = self._packed[0][0].device
            flat = torch.cat([packed.to(device).flatten() for packed, _ in self._packed]).cpu()
            pieces = torch.split(flat, [packed.numel() for packed, _ in self._packed])
            for (packed, is_pair), piece in zip(self._packed, pieces, strict=True):
                found[is_pair].append(piece.view(packed.shape))
        self._packed, self._observation, self._scored, self.num_rows = [], 0, 0, 0
        pairs, scores = torch.cat(found[True], dim=1), torch.cat(found[False], dim=1)
        # Every row of the packed tensors is contiguous, so that its bits can be read as float64 again.
        return (
            PairSights(pairs[0], pairs[1], pairs[2], *(row.view(torch.float64) for row in pairs[3:])),
            PairScores(scores[0], scores[1], *(row.view(torch.float64) for row in scores[3:])),
        )


def _pack(row_ids: Tensor, observation: int, step: int, values: tuple[Tensor | None, ...]) -> Tensor:
    """One integer tensor, [3 + values, B], that holds the bits of float64 numbers: a single copy, and ids of any size."""
    device = next(value.device for value in values if value is not None)
    like = torch.empty(len(row_ids), dtype=torch.int64, device=device)
    rows = [row_ids.to(device, torch.int64, non_blocking=True), torch.full_like(like, observation), torch.full_like(like, step)]
    for value in values:
        numbers = torch.full_like(like, torch.nan, dtype=torch.float64) if value is None else value.detach().double()
        rows.append(numbers.to(device).contiguous().view(torch.int64))
    return torch.stack(rows)


def _nothing(num_columns: int) -> Tensor:
    return torch.empty(num_columns, 0, dtype=torch.int64)


class PairHistory:
    """A table of pairs by row id: anchor, last and smallest log-probability, lengths, CHES at first sight.

    A row may have several pairs (a ranked list has); they are told apart by their place among the pairs of that row in one
    forward pass. All columns are CPU tensors sorted by row and place; looking up and changing M pairs of N takes O(M log N),
    a new pair O(N) once for all new pairs of a call. A pair takes 120 bytes.

    The anchor of a pair is its log-probability under the reference where that is known and wanted, else its value at first
    sight. A first sight says nothing about change, so it counts as 0 before the first update and as unknown after it.

    Args:
        anchor: `reference` and `auto` take the reference's log-probability at first sight, `first` never does.
        max_rows: Pairs in the table at most. Further ones are compared with the reference where it is known, and counted.

    Attributes:
        num_overflowed: Sights of pairs that found no room.
        num_undefined: Sights of rows with a log-probability that is not finite; they are left out.
    """

    def __init__(self, *, anchor: Anchor = "auto", max_rows: int = 200_000) -> None:
        if anchor not in ("auto", "reference", "first"):
            raise ValueError(f"`anchor` must be 'auto', 'reference' or 'first', got {anchor!r}.")
        if max_rows < 1:
            raise ValueError(f"`max_rows` must be at least 1, got {max_rows!r}.")
        self.anchor = anchor
        self.max_rows = max_rows
        self.num_overflowed = 0
        self.num_undefined = 0
        self._ids = torch.empty(0, dtype=torch.int64)
        self._places = torch.empty(0, dtype=torch.int64)
        self._columns = _columns(0)

    def __len__(self) -> int:
        return len(self._ids)

    def column(self, name: str) -> Tensor:
        """One column, [N]: `row_ids`, `places`, or one of `INTEGERS` and `REALS`."""
        known = {"row_ids": self._ids, "places": self._places, **self._columns}
        if name not in known:
            raise ValueError(f"The table of pairs has no column {name!r}; it has {', '.join(known)}.")
        return known[name]

    def see(self, sights: PairSights, scores: PairScores | None = None) -> PairChanges:
        """Take up what was seen, with the CHES of pairs that have none yet, and say how far each pair has moved."""
        finite = _all_finite(sights)
        num_undefined = int((~finite).sum())
        self.num_undefined += num_undefined
        ids, places, order = _by_pair(sights.row_ids[finite], sights.observation[finite])
        sights = PairSights(*(column[finite][order] for column in sights))
        first, segment = _segments(ids, places)
        fresh = self._insert(ids[first], places[first], PairSights(*(column[first] for column in sights)))
        slots = self._find(ids, places)
        known = slots >= 0
        self.num_overflowed += int((~known).sum())
        if scores is not None:
            self._note(scores)
        changes = self._changes(sights, slots, is_first=fresh[segment] & _is_first(segment), segment=segment)
        self._take_up(slots, known, segment, sights)
        has_anchor = known | self._has_reference(sights.ref_chosen, sights.ref_rejected)
        kept = {name: column[has_anchor] for name, column in changes._asdict().items() if isinstance(column, Tensor)}
        return PairChanges(**kept, num_left_out=num_undefined + int((~has_anchor).sum()))

    def _note(self, scores: PairScores) -> None:
        ids, places, order = _by_pair(scores.row_ids, scores.observation)
        first, _ = _segments(ids, places)
        slots = self._find(ids[first], places[first])
        new = slots >= 0
        new[new.clone()] = self._columns["normalized_ches"][slots[new]].isnan()
        for name, values in (("ches", scores.ches), ("normalized_ches", scores.normalized_ches)):
            self._columns[name][slots[new]] = values[order][first][new]

    def anchors(self, row_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Anchors of the chosen and rejected responses of one forward pass, [B] each, nats; `nan` for pairs that are not here.

        Args:
            row_ids: [B] int64, on the CPU.
        """
        ids, places, order = _by_pair(row_ids, torch.zeros_like(row_ids))
        slots = self._find(ids, places)
        found = torch.full((2, len(row_ids)), torch.nan, dtype=torch.float64)
        for side, name in zip(found, ("anchor_chosen", "anchor_rejected"), strict=True):
            side[order] = torch.where(slots >= 0, self._look_up(name, slots.clamp(min=0)), torch.nan)
        return found[0], found[1]

    def worst(self, count: int) -> list[PairRecord]:
        """The pairs whose chosen response fell furthest, last value against anchor, furthest first; only such that fell."""
        change = self._columns["last_chosen"] - self._columns["anchor_chosen"]
        lowest = change.topk(min(count, len(change)), largest=False)
        return [self._record(int(slot)) for slot, value in zip(lowest.indices, lowest.values, strict=True) if value < 0]

    def _record(self, slot: int) -> PairRecord:
        row = {name: values[slot].item() for name, values in self._columns.items()}
        return PairRecord(
            row_id=int(self._ids[slot]),
            place=int(self._places[slot]),
            chosen_change=row["last_chosen"] - row["anchor_chosen"],
            rejected_change=row["last_rejected"] - row["anchor_rejected"],
            chosen_length=row["chosen_length"],
            rejected_length=row["rejected_length"],
            lowest_change=row["minimum_chosen"] - row["anchor_chosen"],
            lowest_step=int(row["minimum_step"]),
            ches=row["ches"],
            normalized_ches=row["normalized_ches"],
        )

    def state(self) -> dict[str, Any]:  # Any: tensors and counts
        """The table as plain CPU tensors."""
        columns = {name: values.clone() for name, values in self._columns.items()}
        counts = {"num_overflowed": self.num_overflowed, "num_undefined": self.num_undefined}
        return {"row_ids": self._ids.clone(), "places": self._places.clone(), "columns": columns, **counts}

    def load(self, state: Mapping[str, Any]) -> None:
        """Take up a table; what is asked of new pairs stays as this one was made."""
        self._ids, self._places = state["row_ids"].clone(), state["places"].clone()
        self._columns = {name: values.clone() for name, values in state["columns"].items()}
        self.num_overflowed, self.num_undefined = state["num_overflowed"], state["num_undefined"]

    def _find(self, ids: Tensor, places: Tensor) -> Tensor:
        """Where pairs stand in the table, -1 for those that do not. The places of a row follow each other without a gap."""
        slots = torch.searchsorted(self._ids, ids) + places
        inside = slots < len(self)
        near = slots.clamp(max=max(len(self) - 1, 0))
        if not len(self):
            return torch.full_like(ids, -1)
        return torch.where(inside & (self._ids[near] == ids) & (self._places[near] == places), slots, -1)

    def _insert(self, ids: Tensor, places: Tensor, sights: PairSights) -> Tensor:
        """Make room for the pairs that are not there yet; returns which of the given ones are new, [U] bool."""
        new = self._find(ids, places) < 0
        room = self.max_rows - len(self)
        new &= new.cumsum(0) <= room
        if not new.any():
            return new
        columns = _columns(int(new.sum()))
        refs, own = (sights.ref_chosen[new], sights.ref_rejected[new]), (sights.chosen[new], sights.rejected[new])
        by_reference = self._has_reference(*refs)
        columns["anchor_chosen"] = torch.where(by_reference, refs[0], own[0])
        columns["anchor_rejected"] = torch.where(by_reference, refs[1], own[1])
        columns["anchor_step"] = torch.where(by_reference, REFERENCE, sights.step[new])
        all_ids = torch.cat([self._ids, ids[new]])
        # Stable, and places grow in time: so the pairs of a row stay in the order of their places.
        order = all_ids.argsort(stable=True)
        self._ids, self._places = all_ids[order], torch.cat([self._places, places[new]])[order]
        self._columns = {name: torch.cat([values, columns[name]])[order] for name, values in self._columns.items()}
        return new

    def _has_reference(self, ref_chosen: Tensor, ref_rejected: Tensor) -> Tensor:
        usable = ref_chosen.isfinite() & ref_rejected.isfinite()
        return usable & (self.anchor != "first")

    def _changes(self, sights: PairSights, slots: Tensor, *, is_first: Tensor, segment: Tensor) -> PairChanges:
        known, near = slots >= 0, slots.clamp(min=0)
        outside = self._has_reference(sights.ref_chosen, sights.ref_rejected)
        anchor_step = self._look_up("anchor_step", near)
        # A pair's first sight is its own anchor: no change before the first update, no knowledge after it.
        tells = torch.where(known, ~(is_first & (anchor_step > 0)), outside)

        def change(name: str, values: Tensor, reference: Tensor) -> Tensor:
            anchors = torch.where(known, self._look_up(f"anchor_{name}", near), reference)
            return torch.where(tells, values - anchors, torch.nan)

        def step(name: str, values: Tensor) -> Tensor:
            before = torch.where(known, self._look_up(f"last_{name}", near), torch.nan)
            again = ~_is_first(segment)
            before[again] = values.roll(1)[again]  # seen twice in one window: the sight before is in the window, too
            return torch.where(known, values - before, torch.nan)

        return PairChanges(
            row_ids=sights.row_ids,
            chosen=change("chosen", sights.chosen, sights.ref_chosen),
            rejected=change("rejected", sights.rejected, sights.ref_rejected),
            chosen_step=step("chosen", sights.chosen),
            rejected_step=step("rejected", sights.rejected),
            chosen_lengths=sights.chosen_lengths,
            rejected_lengths=sights.rejected_lengths,
            is_late=known & (anchor_step > 0),
            normalized_ches=torch.where(known, self._look_up("normalized_ches", near), torch.nan),
        )

    def _look_up(self, name: str, near: Tensor) -> Tensor:
        column = self._columns[name]
        return column[near] if len(column) else torch.zeros_like(near, dtype=column.dtype)

    def _take_up(self, slots: Tensor, known: Tensor, segment: Tensor, sights: PairSights) -> None:
        """Last and smallest values of the pairs that stand in the table."""
        if not known.any():
            return
        kept = PairSights(*(column[known] for column in sights))
        first, runs = _segments(segment[known])
        last = torch.cat([first[1:] - 1, torch.tensor([len(runs) - 1])])
        at = slots[known][first]
        table = self._columns
        pairs = (("last_chosen", kept.chosen), ("last_rejected", kept.rejected), ("last_step", kept.step))
        for name, values in (*pairs, ("chosen_length", kept.chosen_lengths), ("rejected_length", kept.rejected_lengths)):
            table[name][at] = values[last]
        table["num_sights"][at] += last - first + 1
        smallest = torch.full((len(at),), torch.inf, dtype=torch.float64).scatter_reduce(0, runs, kept.chosen, "amin")
        never = torch.iinfo(torch.int64).max
        steps = torch.where(kept.chosen == smallest[runs], kept.step, never)
        when = torch.full((len(at),), never).scatter_reduce(0, runs, steps, "amin")
        is_lower = smallest < table["minimum_chosen"][at]
        table["minimum_chosen"][at[is_lower]] = smallest[is_lower]
        table["minimum_step"][at[is_lower]] = when[is_lower]


def _columns(size: int) -> dict[str, Tensor]:
    """Empty columns; the smallest value of a pair that was not seen yet is infinite."""
    columns = {name: torch.zeros(size, dtype=torch.int64) for name in INTEGERS}
    columns |= {name: torch.full((size,), torch.nan, dtype=torch.float64) for name in REALS}
    columns["minimum_chosen"] = torch.full((size,), torch.inf, dtype=torch.float64)
    return columns


def _all_finite(sights: PairSights) -> Tensor:
    """Which sights are of a row all whose pairs in that pass are finite; without one of them, the others lose their place."""
    order = sights.row_ids.argsort(stable=True)
    _, run = _segments(sights.row_ids[order], sights.observation[order])
    infinite = ~(sights.chosen.isfinite() & sights.rejected.isfinite())
    num_infinite = torch.zeros(len(run), dtype=torch.int64).index_add(0, run, infinite[order].long())
    finite = torch.empty_like(infinite)
    finite[order] = num_infinite[run] == 0
    return finite


def _by_pair(row_ids: Tensor, observation: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Ids, places and the order that sorts sights by pair, and the sights of a pair by time."""
    order = row_ids.argsort(stable=True)
    ids, passes = row_ids[order], observation[order]
    first, segment = _segments(ids, passes)
    places = torch.arange(len(ids)) - first[segment] if len(ids) else torch.empty(0, dtype=torch.int64)
    by_place = places.argsort(stable=True)
    again = ids[by_place].argsort(stable=True)
    final = by_place[again]
    return ids[final], places[final], order[final]


def _segments(*keys: Tensor) -> tuple[Tensor, Tensor]:
    """Runs of equal keys: index of the first entry of each, and the run of every entry."""
    size = len(keys[0])
    begins = torch.ones(size, dtype=torch.bool)
    begins[1:] = torch.stack([key[1:] != key[:-1] for key in keys]).any(0)
    return torch.nonzero(begins).flatten(), begins.cumsum(0) - 1


def _is_first(segment: Tensor) -> Tensor:
    """Which entries begin a run."""
    first = torch.ones(len(segment), dtype=torch.bool)
    first[1:] = segment[1:] != segment[:-1]
    return first
