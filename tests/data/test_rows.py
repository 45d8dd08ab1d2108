from __future__ import annotations

import pickle
import re
from pathlib import Path

import pytest

import lightning_pref.data
from lightning_pref.data.rows import DroppedRowError, Place, RowError, describe, shorten
from lightning_pref.data.templates import EVENTS

PLACE = Place("pairs.jsonl", 17)


def test_error_is_one_paragraph_of_place_finding_expectation_and_cure() -> None:
    error = RowError("empty_response", PLACE, "chosen", "an empty string", "text or a list of messages")
    assert str(error) == (
        "pairs.jsonl, row 17, field `chosen`: found an empty string; expected text or a list of messages. "
        "Fix or remove the row, or set `on_bad_row: skip` to count and skip it."
    )


def test_error_without_a_field_names_the_row_only() -> None:
    error = RowError("x", PLACE, "", "nothing", "something", "Do it.")
    assert str(error) == "pairs.jsonl, row 17: found nothing; expected something. Do it."


@pytest.mark.parametrize("kind", [RowError, DroppedRowError])
def test_error_survives_the_way_between_processes(kind: type[RowError]) -> None:
    error = kind("too_long", PLACE, "prompt", "much", "less", "Cut.")
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is kind
    assert str(copy) == str(error)
    assert (copy.reason, copy.place) == ("too_long", PLACE)


@pytest.mark.parametrize(
    ("value", "phrase"),
    [
        (None, "null"),
        (True, "the boolean true"),
        (float("nan"), "the number nan"),
        pytest.param(10**5000, "the number with 16610 bits", id="huge"),
        ("", "an empty string"),
        ("a" * 100, "the text '" + "a" * 59 + "..."),
        ([], "an empty list"),
        ({}, "an empty object"),
        ({"a": 1}, "an object with the keys ['a']"),
        (b"x", "a value of type bytes"),
    ],
)
def test_values_are_described_in_a_phrase(value: object, phrase: str) -> None:
    assert describe(value) == phrase


def test_long_values_are_cut_without_being_printed_whole() -> None:
    assert len(shorten("x" * 10**7)) < 80
    assert shorten("short") == "'short'"


def test_every_reason_and_event_is_in_the_docs() -> None:
    package = Path(lightning_pref.data.__path__[0])
    code = "".join(path.read_text(encoding="utf-8") for path in package.glob("*.py"))
    reasons = set(re.findall(r'RowError\(\s*"(\w+)"', code))
    page = (Path(__file__).parents[2] / "docs" / "data.md").read_text(encoding="utf-8")
    assert len(reasons) > 30
    assert not [name for name in reasons | set(EVENTS) if f"`{name}`" not in page]
