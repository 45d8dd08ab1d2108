from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_pref.data.prefixes import common_prefix_length, split_messages, split_text
from lightning_pref.data.rows import Place, RowError

PLACE = Place("pairs.jsonl", 17)


@given(st.text("ab", max_size=6), st.text("ab", max_size=6))
def test_common_prefix_is_the_longest(first: str, second: str) -> None:
    size = common_prefix_length(first, second)
    assert first[:size] == second[:size]
    assert size == min(len(first), len(second)) or first[size] != second[size]


@pytest.mark.parametrize(
    ("chosen", "rejected", "prompt"),
    [
        ("Q: why? A: so", "Q: why? A: no", "Q: why? A:"),
        ("Q\nYes", "Q\nYes indeed", "Q\n"),
        ("Q\n\nYes", "Q\n\nNo", "Q\n\n"),
        ("It costs 3.14", "It costs 3.15", "It costs"),
        ("yes", "yesterday", ""),
        ("\u5929\u7a7a\uff1f\u84dd", "\u5929\u7a7a\uff1f\u84dd\u8272", "\u5929\u7a7a\uff1f"),
        ("A  b", "A  c", "A "),
    ],
)
def test_T12_shared_text_is_cut_back_to_a_word(chosen: str, rejected: str, prompt: str) -> None:
    assert split_text(chosen, rejected) == (prompt, chosen[len(prompt) :], rejected[len(prompt) :])


@given(st.text(min_size=1), st.text(min_size=1), st.text())
def test_T12_nothing_is_lost_and_both_sides_keep_something(first: str, second: str, shared: str) -> None:
    prompt, chosen, rejected = split_text(shared + first, shared + second)
    assert (prompt + chosen, prompt + rejected) == (shared + first, shared + second)
    assert chosen
    assert rejected


def messages(*turns: str) -> list[dict[str, str]]:
    names = {"u": "user", "a": "assistant", "t": "tool"}
    return [{"role": names[turn[0]], "content": turn} for turn in turns]


@pytest.mark.parametrize(
    ("chosen", "rejected", "size"),
    [
        (("u1", "a1"), ("u1", "a2"), 1),
        (("u1", "a1", "u2", "a2"), ("u1", "a1", "u2", "a3"), 3),
        (("u1", "a1"), ("u1", "a1", "u2", "a2"), 1),  # one message at least is left on each side
        (("u1", "a1", "t1", "a2"), ("u1", "a1", "t2", "a3"), 1),  # an answer begins with the assistant
    ],
)
def test_T12_shared_messages_end_before_an_answer(chosen: tuple[str, ...], rejected: tuple[str, ...], size: int) -> None:
    sides = messages(*chosen), messages(*rejected)
    assert split_messages(*sides, PLACE) == (sides[0][:size], sides[0][size:], sides[1][size:])


@pytest.mark.parametrize(("chosen", "rejected"), [(("u1", "a1"), ("u2", "a1")), (("a1",), ("a2",))])
def test_conversations_with_different_questions_are_refused(chosen: tuple[str, ...], rejected: tuple[str, ...]) -> None:
    with pytest.raises(RowError, match="conversations that agree on their first 0 messages only") as caught:
        split_messages(messages(*chosen), messages(*rejected), PLACE)
    assert caught.value.reason == "prompts_differ"
