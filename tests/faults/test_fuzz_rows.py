"""Any row is either refused with its place and a cure, or becomes what it says."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Any

import numpy as np
import pytest
from fuzzing import NASTY_TEXTS, ODD_VALUES, TEXTS, VALUES, Tally, changed, deep, is_finite, many
from hypothesis import given, seed
from hypothesis import strategies as st
from tallies import TALLY

from lightning_pref.data.formats import ROW_TYPES, TYPED_COLUMNS, parse_row
from lightning_pref.data.groups import PromptGroup
from lightning_pref.data.playground import RowKind, playground_rows
from lightning_pref.data.playground_tokenizer import playground_tokenizer
from lightning_pref.data.rendering import ChatTemplate, render_prompt, render_row
from lightning_pref.data.rows import Place, Row, RowError
from lightning_pref.data.templates import Tokenization

PLACE = Place("rows.jsonl", 7)
KINDS: tuple[RowKind, ...] = ("preference", "ranked", "unpaired", "sft", "prompts")

SAID = [{"role": "user", "content": "Is it?"}]
ANSWER = [{"role": "assistant", "content": "It is."}]
RIGHT: list[dict[str, Any]] = [
    {"prompt": "Is it?", "chosen": " It is.", "rejected": " No.", "margin": 1.5},
    {"prompt": SAID, "chosen": ANSWER, "rejected": [{"role": "assistant", "content": "No."}]},
    {"chosen": [*SAID, *ANSWER], "rejected": [*SAID, {"role": "assistant", "content": "No."}]},
    {"chosen": "Is it? It is.", "rejected": "Is it? No."},
    {"prompt": "2 + 2 =", "completion": " 4", "source": "sums"},
    {"prompt": SAID, "completion": ANSWER, "label": True},
    {"prompt": "Add.", "completions": ["First.", "Then."], "labels": [True, False]},
    {"prompt": "Say.", "responses": [" a", " b", " c"], "ranks": [0, 1, 1]},
    {"prompt": "Say.", "responses": [" a", " b", " c"], "ranks": [0, 1, 2], "scores": [3.0, 2, -1e-3]},
    {"prompt": "Say.", "completions": [" a", " b"], "scores": [0.5, 2]},
    {"messages": [{"role": "system", "content": "Be brief."}, *SAID, *ANSWER]},
    {"messages": [*SAID, *ANSWER], "tools": [{"type": "function", "function": {"name": "f", "parameters": {}}}]},
    {"messages": [*SAID, *ANSWER], "tools": "[]", "chat_template_kwargs": {"thinking": True}},
    {"messages": [*SAID, {"role": "assistant", "content": [{"type": "text", "text": "It is."}]}]},
    {
        "messages": [
            *SAID,
            {"role": "assistant", "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": {}}}]},
        ]
    },
    {"text": "A text of its own."},
    {"prompt": "Only a prompt."},
    *(row for kind in KINDS for row in playground_rows(kind, 3, 0)),
]
TOKENIZATION = Tokenization(playground_tokenizer(), max_length=64, max_prompt_length=48)
TEMPLATE = ChatTemplate(playground_tokenizer())

ROWS = st.one_of(
    changed(st.sampled_from(RIGHT)),
    changed(st.sampled_from(RIGHT), ODD_VALUES),
    changed(st.sampled_from(RIGHT), TEXTS),
    st.dictionaries(st.sampled_from(sorted(TYPED_COLUMNS)), VALUES, max_size=4),
    st.sampled_from(sorted(ROW_TYPES)).flatmap(
        lambda kind: st.fixed_dictionaries(dict.fromkeys(sorted(ROW_TYPES[kind].required), VALUES | TEXTS))
    ),
    ODD_VALUES,
)


def texts_in(value: object) -> Iterator[str]:
    """All text anywhere in a value."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from texts_in(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from texts_in(item)


def check_row(row: Row, raw: dict[str, Any]) -> None:
    """What was accepted is what the row says, and can be calculated with."""
    sources = list(texts_in(raw))
    for said in (row.prompt, *row.responses):
        for text in texts_in(said if isinstance(said, str) else [m.get("content", "") for m in said]):
            assert any(text in source for source in sources) or text == ""
    assert all(list(texts_in(response)) for response in row.responses)
    assert row.prompt or (row.responses and not set(raw) & {"prompt"}) or raw.get("prompt") is None
    numbers = [*(row.scores or ()), *([] if row.margin is None else [row.margin])]
    assert all(map(is_finite, numbers))
    if row.ranks is not None:
        assert len(row.ranks) == len(row.responses) >= 2
        assert set(row.ranks) == set(range(max(row.ranks) + 1)) and max(row.ranks) > 0, "from 0 without gaps, not all equal"
    if row.scores is not None and row.ranks is not None:
        best = np.asarray(row.scores)[np.asarray(row.ranks) == 0].min()
        assert best == max(row.scores)
    assert all(type(label) is bool for label in row.labels or ())
    assert all(step.text.strip() and type(step.label) is bool for step in row.steps or ())


def check_rendering(row: Row) -> None:
    """The prompt and every response stand in the text that is tokenised."""
    if row.responses or row.steps:
        rendering = render_row(row, TEMPLATE, "\n")
        for whole in rendering.wholes:
            assert whole[rendering.boundary :].strip()
        for whole, response in zip(rendering.wholes, row.responses, strict=False):
            content = response if isinstance(response, str) else response[-1].get("content", "")
            assert not isinstance(content, str) or content.strip() in whole
    else:
        assert render_prompt(row, TEMPLATE)


def check_group(group: PromptGroup) -> None:
    """Every part has tokens of the vocabulary, and fits the limits."""
    assert len(group.prompt) >= 1
    for ids in group.responses:
        assert 1 <= len(ids) <= 64 - len(group.prompt)
        assert ids.min() >= 0


def try_row(raw: object, tally: Tally) -> None:
    def reason(error: Exception) -> str | None:
        if not isinstance(error, RowError):
            return None
        text = str(error)
        assert text.startswith("rows.jsonl, row 7") and "; expected " in text and "\n" not in text
        assert len(text) < 2000
        return error.reason

    with tally.case(reason):
        row = parse_row(raw, PLACE)
        assert isinstance(raw, dict)
        check_row(row, raw)
        check_rendering(row)
        if row.responses or row.steps:
            # Both ways to the tokens, which are two code paths.
            (group,) = TOKENIZATION.tokenize_rows([(0, row)])
            if isinstance(group, RowError):
                raise group
            check_group(group)
        else:
            assert len(TOKENIZATION.prompt_ids(row)) >= 1


def test_a_sample_of_rows_is_refused_in_words_or_means_what_it_says(record_property: Any) -> None:
    tally = Tally()
    many(150)(seed(1)(given(raw=ROWS)(lambda raw: try_row(raw, tally))))()
    record_property(TALLY, str(tally))
    assert tally.outcomes["accepted"] > 10, "the strategy must also write rows that are right"


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_thousands_of_rows_are_refused_in_words_or_mean_what_they_say(record_property: Any) -> None:
    tally = Tally()
    many(6500)(seed(2)(given(raw=ROWS)(lambda raw: try_row(raw, tally))))()
    record_property(TALLY, str(tally))
    assert tally.num_cases >= 6000
    assert tally.outcomes["accepted"] > 500
    assert len(tally.outcomes) > 20, "many kinds of mistakes are met"


@cache
def tally_with(text: str) -> Tally:
    """What becomes of right rows with one value after the other replaced by a text, alone and as a message."""
    tally = Tally()
    for row, name in [(right, name) for right in RIGHT[:17] for name in right]:
        for value in (text, [text], {"role": text, "content": text}, [*SAID, {"role": "assistant", "content": text}]):
            try_row({**row, name: value}, tally)
    return tally


@pytest.mark.parametrize("text", NASTY_TEXTS, ids=lambda text: ascii(text[:8]))
def test_a_nasty_text_is_taken_where_a_plain_one_is_unless_it_is_blank_or_none(text: str) -> None:
    nasty, plain = tally_with(text), tally_with("word")
    assert nasty.num_cases == plain.num_cases
    is_text = bool(text.strip()) and not any("\ud800" <= character <= "\udfff" for character in text)
    assert (nasty.outcomes["accepted"] == plain.outcomes["accepted"]) is is_text
    assert 0 < nasty.outcomes["accepted"] <= plain.outcomes["accepted"], "there are columns for any text, such as the source"


@pytest.mark.parametrize("depth", [30, 3000])
def test_a_value_that_is_nested_without_end_is_refused(depth: int) -> None:
    tally = Tally()
    for row in RIGHT[:17]:
        for name in row:
            try_row({**row, name: deep(depth)}, tally)
    assert not tally.outcomes["accepted"]
