from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_pref.data.rows import DroppedRowError, Place, RowError
from lightning_pref.data.truncation import Limits, Truncation

PLACE = Place("pairs.jsonl", 17)
PROMPT = [1, 2, 3, 4, 5]
RESPONSES = [[10, 11, 12], [20, 21]]


def test_without_limits_nothing_is_cut() -> None:
    assert Limits().apply(PROMPT, RESPONSES, PLACE, keeps_first=True) == (PROMPT, RESPONSES, False, False)


def test_a_group_exactly_at_its_limits_is_not_cut() -> None:
    limits = Limits(max_length=8, max_prompt_length=5)
    assert limits.apply(PROMPT, RESPONSES, PLACE, keeps_first=False) == (PROMPT, RESPONSES, False, False)


def test_keep_start_cuts_the_ends_of_the_responses() -> None:
    cut = Limits(max_length=6).apply(PROMPT, RESPONSES, PLACE, keeps_first=True)
    assert cut == (PROMPT, [[10], [20]], False, True)


def test_keep_end_cuts_the_start_of_the_prompt_once_for_all_responses() -> None:
    limits = Limits(max_length=6, truncation="keep_end")
    assert limits.apply(PROMPT, RESPONSES, PLACE, keeps_first=False) == ([3, 4, 5], RESPONSES, True, False)
    assert limits.apply(PROMPT, RESPONSES, PLACE, keeps_first=True) == ([1, 4, 5], RESPONSES, True, False)


@pytest.mark.parametrize("truncation", ["keep_start", "keep_end"])
def test_a_prompt_over_its_own_limit_loses_its_start(truncation: Truncation) -> None:
    limits = Limits(max_prompt_length=2, truncation=truncation)
    assert limits.apply(PROMPT, RESPONSES, PLACE, keeps_first=False) == ([4, 5], RESPONSES, True, False)
    assert limits.apply(PROMPT, RESPONSES, PLACE, keeps_first=True) == ([1, 5], RESPONSES, True, False)


def test_T9_keep_start_never_empties_a_response() -> None:
    expected = "a prompt of 5 tokens, which leaves nothing of the responses within `max_length` 5; expected room for at least one"
    with pytest.raises(RowError, match=re.escape(expected)) as caught:
        Limits(max_length=5).apply(PROMPT, RESPONSES, PLACE, keeps_first=False)
    assert caught.value.reason == "empty_response"


@pytest.mark.parametrize(("max_length", "keeps_first"), [(3, False), (4, True), (2, False)])
def test_T9_keep_end_never_empties_the_prompt(max_length: int, keeps_first: bool) -> None:
    with pytest.raises(RowError, match="of 5 prompt tokens; expected room for at least one prompt token") as caught:
        Limits(max_length=max_length, truncation="keep_end").apply(PROMPT, RESPONSES, PLACE, keeps_first=keeps_first)
    assert caught.value.reason == "empty_prompt"


@pytest.mark.parametrize("responses", [RESPONSES, RESPONSES[::-1]])
def test_T10_any_response_over_the_limit_drops_the_row(responses: list[list[int]]) -> None:
    expected = (
        "pairs.jsonl, row 17: found a prompt with a response of 8 tokens; expected at most 7 (`max_length`). "
        "It is left out, as `truncation: drop` asks."
    )
    with pytest.raises(DroppedRowError, match=re.escape(expected)):
        Limits(max_length=7, truncation="drop").apply(PROMPT, responses, PLACE, keeps_first=False)


def test_T10_a_prompt_over_its_limit_drops_the_row() -> None:
    with pytest.raises(DroppedRowError, match=re.escape("a prompt of 5 tokens; expected at most 4 (`max_prompt_length`)")):
        Limits(max_prompt_length=4, truncation="drop").apply(PROMPT, RESPONSES, PLACE, keeps_first=False)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"truncation": "middle"}, "`truncation` must be one of keep_start, keep_end, drop, got 'middle'"),
        ({"max_length": 1}, "`max_length` must hold a prompt and a response, that is at least 2, got 1"),
        ({"max_prompt_length": 0}, "`max_prompt_length` must be at least 1, got 0"),
        ({"max_length": 8, "max_prompt_length": 8}, "`max_prompt_length` (8) must be smaller than `max_length` (8)"),
        ({"truncation": "drop"}, "`truncation` is 'drop', but without `max_length`"),
    ],
)
def test_impossible_limits_are_refused(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        Limits(**settings)  # type: ignore[arg-type]


@given(
    st.integers(1, 9),
    st.lists(st.integers(1, 9), min_size=1, max_size=4),
    st.integers(2, 12),
    st.sampled_from(["keep_start", "keep_end"]),
    st.booleans(),
)
def test_what_is_kept_is_as_long_as_it_can_be(
    size: int, sizes: list[int], max_length: int, truncation: Truncation, keeps_first: bool
) -> None:
    prompt, responses = list(range(size)), [list(range(100, 100 + n)) for n in sizes]
    limits = Limits(max_length=max_length, truncation=truncation)
    longest = max(sizes)
    if truncation == "keep_start":
        possible = size < max_length
    else:
        possible = size + longest <= max_length or max_length - longest >= 1 + keeps_first
    if not possible:
        with pytest.raises(RowError, match="expected room for at least one"):
            limits.apply(prompt, responses, PLACE, keeps_first=keeps_first)
        return
    cut = limits.apply(prompt, responses, PLACE, keeps_first=keeps_first)
    kept_longest = max(len(response) for response in cut.responses)
    assert len(cut.prompt) + kept_longest == min(size + longest, max_length)
    assert all(kept == whole[: len(kept)] and kept for kept, whole in zip(cut.responses, responses, strict=True))
    assert cut.prompt[-1] == prompt[-1]
    assert not keeps_first or cut.prompt[0] == prompt[0]
