"""Which rows go, and that the others stay as they were."""

from __future__ import annotations

import datetime as dt
import decimal
import json
from fractions import Fraction
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_pref.data.filtering import KeptRows, highest_rows, parse_share, write_kept
from lightning_pref.data.sources import read_rows


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize(("text", "share"), [("5%", 0.05), ("0.05", 0.05), (" 12.5 % ", 0.125), ("99%", 0.99), ("1e-3", 0.001)])
def test_a_share_is_a_percentage_or_a_number_below_one(text: str, share: float) -> None:
    assert float(parse_share(text)) == share


@pytest.mark.parametrize("text", ["0", "0%", "100%", "1", "-5%", "five", "", "%", "nan", "1/0"])
def test_what_is_no_share_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"above 0% and below 100%, such as '5%' or '0.05'; got "):
        parse_share(text)


def test_a_bare_number_of_percent_is_pointed_out() -> None:
    with pytest.raises(ValueError, match="got '5'. For 5 percent write '5%'."):
        parse_share("5")


@given(st.lists(st.integers(0, 5), min_size=1, max_size=40), st.integers(1, 99))
def test_the_highest_share_goes_and_of_equal_scores_the_later_rows(scores: list[int], percent: int) -> None:
    found = highest_rows(range(len(scores)), scores, Fraction(percent, 100))
    assert len(found) == min((percent * len(scores) + 50) // 100, len(scores) - 1)
    kept = [row for row in range(len(scores)) if row not in found]
    assert kept
    for row in found:
        assert all((scores[other], other) < (scores[row], row) for other in kept)


def test_shares_are_exact() -> None:
    # 0.29 * 100 is 28.999999999999996 in floating point, and 0.5 % of 100 rows is half a row.
    assert len(highest_rows(range(100), range(100), parse_share("0.29"))) == 29
    assert highest_rows(range(100), range(100), parse_share("0.5%")) == {99}
    assert highest_rows(range(100), range(100), parse_share("0.4%")) == set()


def test_a_row_of_several_pairs_counts_with_its_highest() -> None:
    assert highest_rows([4, 4, 4, 9, 9, 9], [0.0, 8.0, 0.0, 5.0, 5.0, 5.0], Fraction(1, 2)) == {4}


def test_the_rest_of_a_file_is_written_as_it_was(tmp_path: Path) -> None:
    rows = [{"prompt": f"Gr\u00fc\u00dfe {i}", "note": [i, None, {"a": 0.5}]} for i in range(6)]
    given_file = tmp_path / "rows.jsonl"
    given_file.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    kept = tmp_path / "kept.jsonl"
    counts = write_kept(read_rows(given_file), kept, dropped={1, 4}, scored={0, 1, 2, 4, 5})
    assert counts == KeptRows(kept=3, dropped=2, not_scored=1, unreadable=0)
    assert rows_of(kept) == [rows[i] for i in (0, 2, 3, 5)]
    assert "Gr\u00fc\u00dfe" in kept.read_text(encoding="utf-8")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["kept.jsonl", "rows.jsonl"]


def test_lines_that_cannot_be_read_are_counted(tmp_path: Path) -> None:
    given_file = tmp_path / "rows.jsonl"
    given_file.write_text('{"text": "a"}\n{"text": \n{"text": "lone \\ud800"}\n{"text": "d"}\n', encoding="utf-8")
    counts = write_kept(read_rows(given_file), tmp_path / "kept.jsonl", dropped=set(), scored={0, 2}, limit_rows=3)
    assert counts == KeptRows(kept=2, dropped=0, not_scored=0, unreadable=1)
    assert rows_of(tmp_path / "kept.jsonl") == [{"text": "a"}, {"text": "lone \ud800"}]


def test_dates_and_decimals_become_text(tmp_path: Path) -> None:
    table = pa.table({"day": [dt.date(2024, 5, 1)], "at": [dt.datetime(2024, 5, 1, 12)], "cost": [decimal.Decimal("1.50")]})
    pq.write_table(table, tmp_path / "rows.parquet")
    write_kept(read_rows(tmp_path / "rows.parquet"), tmp_path / "kept.jsonl", dropped=set(), scored={0})
    assert rows_of(tmp_path / "kept.jsonl") == [{"day": "2024-05-01", "at": "2024-05-01T12:00:00", "cost": "1.50"}]


def test_a_value_that_json_cannot_hold_is_named_and_leaves_no_file(tmp_path: Path) -> None:
    pq.write_table(pa.table({"prompt": ["a"], "image": [b"\x00"]}), tmp_path / "rows.parquet")
    with pytest.raises(
        ValueError, match=r"rows.parquet, row 1, column `image`: found a value of type bytes, which JSON has no form"
    ):
        write_kept(read_rows(tmp_path / "rows.parquet"), tmp_path / "kept.jsonl", dropped=set(), scored={0})
    assert [path.name for path in tmp_path.iterdir()] == ["rows.parquet"]
