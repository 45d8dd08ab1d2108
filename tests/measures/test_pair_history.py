"""The table of pairs against a dictionary that is kept by hand."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from lightning_pref.measures.pair_history import REFERENCE, PairChanges, PairHistory, PairQueue

Pass = dict[str, Any]


def random_passes(
    num_passes: int, *, seed: int = 0, references: float = 0.0, num_rows: int = 12, scores: bool = False
) -> list[Pass]:
    """Forward passes over random pairs, some rows with several pairs, steps rising, ids too large for a float."""
    rng = np.random.default_rng(seed)
    ids = rng.integers(2**55, 2**62, size=num_rows)
    passes = []
    for number in range(num_passes):
        rows = np.repeat(rng.permutation(ids)[: rng.integers(1, 6)], rng.integers(1, 4))
        rng.shuffle(rows)
        size = len(rows)
        told = rng.random() < references
        passes.append(
            {
                "step": number // 3,
                "row_ids": rows,
                "chosen": rng.normal(-20, 5, size),
                "rejected": rng.normal(-20, 5, size),
                "chosen_lengths": rng.integers(1, 9, size),
                "rejected_lengths": rng.integers(1, 9, size),
                "ref_chosen": rng.normal(-20, 5, size) if told else None,
                "ref_rejected": rng.normal(-20, 5, size) if told else None,
                "ches": rng.normal(size=size) if scores else None,
            }
        )
    return passes


def queue_passes(queue: PairQueue, passes: list[Pass]) -> None:
    names = ("chosen", "rejected", "chosen_lengths", "rejected_lengths", "ref_chosen", "ref_rejected")
    for entry in passes:
        values = [None if entry[name] is None else torch.tensor(entry[name]) for name in names]
        queue.add_pairs(entry["step"], torch.tensor(entry["row_ids"]), *values)
        if entry["ches"] is not None:
            scores = torch.tensor(entry["ches"])
            queue.add_scores(torch.tensor(entry["row_ids"]), scores, 2 * scores)


def feed(history: PairHistory, passes: list[Pass]) -> PairChanges:
    queue = PairQueue()
    queue_passes(queue, passes)
    return history.see(*queue.fetch())


class Diary:
    """Oracle: one dictionary entry a pair, one sight after the other."""

    def __init__(self, anchor: str, max_rows: int = 10**9) -> None:
        self.anchor, self.max_rows = anchor, max_rows
        self.pairs: dict[tuple[int, int], dict[str, float]] = {}

    def see(self, entry: Pass) -> list[tuple[int, float, float, float]]:
        """Row, chosen change, rejected change and step of the chosen one, of each sight."""
        places: dict[int, int] = {}
        found = []
        for i, row in enumerate(entry["row_ids"].tolist()):
            place = places.get(row, 0)
            places[row] = place + 1
            chosen, rejected = float(entry["chosen"][i]), float(entry["rejected"][i])
            by_reference = entry["ref_chosen"] is not None and self.anchor != "first"
            is_new = (row, place) not in self.pairs
            if is_new:
                self.pairs[row, place] = {
                    "anchor_chosen": float(entry["ref_chosen"][i]) if by_reference else chosen,
                    "anchor_rejected": float(entry["ref_rejected"][i]) if by_reference else rejected,
                    "anchor_step": REFERENCE if by_reference else entry["step"],
                    "last_chosen": math.nan,
                    "minimum_chosen": math.inf,
                    "minimum_step": 0,
                    "num_sights": 0,
                    "normalized_ches": math.nan,
                }
            pair = self.pairs[row, place]
            if entry["ches"] is not None and is_new:
                pair["normalized_ches"] = 2 * entry["ches"][i]
            tells = not (is_new and pair["anchor_step"] > 0)
            changes = (chosen - pair["anchor_chosen"], rejected - pair["anchor_rejected"])
            found.append((row, *(changes if tells else (math.nan, math.nan)), chosen - pair["last_chosen"]))
            pair["last_chosen"], pair["last_rejected"], pair["last_step"] = chosen, rejected, entry["step"]
            pair["chosen_length"], pair["rejected_length"] = entry["chosen_lengths"][i], entry["rejected_lengths"][i]
            pair["num_sights"] += 1
            if chosen < pair["minimum_chosen"]:
                pair["minimum_chosen"], pair["minimum_step"] = chosen, entry["step"]
        return found


def assert_same_table(history: PairHistory, diary: Diary) -> None:
    keys = list(zip(history.column("row_ids").tolist(), history.column("places").tolist(), strict=True))
    assert keys == sorted(diary.pairs)
    for slot, key in enumerate(keys):
        for name, value in diary.pairs[key].items():
            assert history.column(name)[slot].item() == pytest.approx(value, abs=0, rel=0, nan_ok=True), (key, name)


@pytest.mark.parametrize("anchor", ["auto", "first"])
@pytest.mark.parametrize("references", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("window", [1, 4])
def test_table_and_changes_are_those_of_a_diary(anchor: Any, references: float, window: int) -> None:
    history, diary = PairHistory(anchor=anchor), Diary(anchor)
    passes = random_passes(24, references=references, scores=True)
    for start in range(0, len(passes), window):
        part = passes[start : start + window]
        changes = feed(history, part)
        expected = sorted((sight for entry in part for sight in diary.see(entry)), key=repr)
        columns = (changes.row_ids, changes.chosen, changes.rejected, changes.chosen_step)
        found = sorted(zip(*(column.tolist() for column in columns), strict=True), key=repr)
        assert [row for row, *_ in found] == [row for row, *_ in expected]
        assert np.array_equal(np.array([r[1:] for r in found]), np.array([r[1:] for r in expected]), equal_nan=True)
    assert_same_table(history, diary)


def test_how_passes_are_cut_into_windows_changes_nothing() -> None:
    passes = random_passes(30, references=0.3, scores=True)
    tables = []
    for window in (1, 7, 30):
        history = PairHistory()
        for start in range(0, len(passes), window):
            feed(history, passes[start : start + window])
        tables.append(history.state())
    for other in tables[1:]:
        assert torch.equal(tables[0]["row_ids"], other["row_ids"])
        for name, column in tables[0]["columns"].items():
            assert torch.equal(column.nan_to_num(), other["columns"][name].nan_to_num()), name


def test_a_table_saved_and_loaded_goes_on_as_if_nothing_had_happened(tmp_path: Any) -> None:
    passes = random_passes(20, references=0.3, scores=True)
    straight, first, second = PairHistory(), PairHistory(), PairHistory()
    feed(straight, passes)
    feed(first, passes[:11])
    torch.save(first.state(), tmp_path / "state.pt")
    second.load(torch.load(tmp_path / "state.pt", weights_only=True))
    feed(first, passes[11:])  # what goes on here must not reach into the copy
    feed(second, passes[11:])
    for name, column in straight.state()["columns"].items():
        assert torch.equal(column.nan_to_num(), second.state()["columns"][name].nan_to_num()), name


def test_M2_a_first_sight_after_the_first_update_is_no_change_but_unknown() -> None:
    history = PairHistory()
    early, late = ({**random_passes(1)[0], "step": step, "row_ids": np.array([row])} for step, row in ((0, 5), (3, 6)))
    for entry in (early, late):
        for name in ("chosen", "rejected", "chosen_lengths", "rejected_lengths"):
            entry[name] = entry[name][:1]
    assert feed(history, [early]).chosen.tolist() == [0.0]
    changes = feed(history, [late])
    assert changes.chosen.isnan().tolist() == [True]
    assert changes.is_late.tolist() == [True]
    again = feed(history, [{**late, "chosen": late["chosen"] - 2.0, "step": 4}])
    assert again.chosen.tolist() == pytest.approx([-2.0])
    assert again.is_late.tolist() == [True]


def test_a_full_table_counts_what_it_has_no_room_for_and_uses_the_reference() -> None:
    history = PairHistory(max_rows=3)
    entry: Pass = {
        "step": 0,
        "row_ids": np.arange(5),
        "chosen": np.zeros(5),
        "rejected": np.zeros(5),
        "chosen_lengths": None,
        "rejected_lengths": None,
        "ref_chosen": None,
        "ref_rejected": None,
        "ches": None,
    }
    changes = feed(history, [entry])
    assert len(history) == 3
    assert history.num_overflowed == changes.num_left_out == 2
    assert changes.row_ids.tolist() == [0, 1, 2]
    told = feed(history, [{**entry, "ref_chosen": np.ones(5), "ref_rejected": np.ones(5)}])
    assert told.num_left_out == 0
    assert history.num_overflowed == 4
    # Rows of the table keep their first anchor; the others have the reference's.
    assert told.chosen.tolist() == [0.0, 0.0, 0.0, -1.0, -1.0]


def test_pairs_that_are_not_finite_are_left_out_and_counted() -> None:
    history = PairHistory()
    entry: Pass = {**random_passes(1)[0], "step": 0, "row_ids": np.array([1, 2, 2, 3]), "ches": None}
    entry |= {name: np.array([-1.0, -2.0, -3.0, -4.0]) for name in ("chosen", "rejected", "chosen_lengths", "rejected_lengths")}
    broken = {**entry, "chosen": np.array([-1.0, -math.inf, -3.0, math.nan])}
    changes = feed(history, [entry, broken])
    # Row 2 has two pairs: with one of them gone, nobody could say which the other is.
    assert changes.num_left_out == history.num_undefined == 3
    assert history.column("num_sights").tolist() == [2, 1, 1, 1]


def test_worst_pairs_are_the_ones_that_fell_furthest() -> None:
    history = PairHistory(anchor="first")
    passes = [entry | {"ches": None} for entry in random_passes(12)]
    feed(history, passes)
    diary = Diary("first")
    for entry in passes:
        diary.see(entry)
    fell = sorted((pair["last_chosen"] - pair["anchor_chosen"], key) for key, pair in diary.pairs.items())
    expected = [(change, *key) for change, key in fell if change < 0]
    found = [(record.chosen_change, record.row_id, record.place) for record in history.worst(5)]
    assert found == expected[:5]
    assert len(history.worst(10_000)) == len(expected)


def test_anchors_are_given_in_the_order_of_the_pairs() -> None:
    history = PairHistory()
    assert history.anchors(torch.tensor([3]))[0].isnan().all()
    queue, rows = PairQueue(), torch.tensor([9, 4, 9, 2])
    queue.add_pairs(0, rows, torch.arange(4.0), torch.arange(4.0) + 10, None, None, None, None)
    history.see(*queue.fetch())
    chosen, rejected = history.anchors(torch.tensor([2, 9, 5, 9]))
    assert chosen.nan_to_num(-1.0).tolist() == [3.0, 0.0, -1.0, 2.0]
    assert rejected.nan_to_num(-1.0).tolist() == [13.0, 10.0, -1.0, 12.0]


def test_scores_of_pairs_that_are_not_in_the_table_are_passed_over() -> None:
    history, queue = PairHistory(), PairQueue()
    queue.add_pairs(0, torch.tensor([4]), *torch.zeros(6, 1))
    queue.add_scores(torch.tensor([3, 4, 9]), torch.arange(3.0), torch.arange(3.0) + 10)
    history.see(*queue.fetch())
    queue.add_scores(torch.tensor([4]), torch.tensor([7.0]), torch.tensor([8.0]))
    history.see(*queue.fetch())
    assert history.column("ches").tolist() == [1.0]
    assert history.column("normalized_ches").tolist() == [11.0]


def test_an_empty_queue_gives_an_empty_answer() -> None:
    changes = PairHistory().see(*PairQueue().fetch())
    assert len(changes.row_ids) == len(changes.chosen) == changes.num_left_out == 0
    assert PairHistory().worst(3) == []


def test_wrong_settings_are_refused() -> None:
    with pytest.raises(ValueError, match="`anchor` must be 'auto', 'reference' or 'first', got 'last'."):
        PairHistory(anchor="last")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="`max_rows` must be at least 1, got 0."):
        PairHistory(max_rows=0)
    with pytest.raises(ValueError, match="The table of pairs has no column 'minimum'; it has row_ids, places, anchor_step"):
        PairHistory().column("minimum")
