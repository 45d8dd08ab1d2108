from __future__ import annotations

import json
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_pref.data.formats import ROW_TYPES, TYPED_COLUMNS, check_distinct, parse_row
from lightning_pref.data.rows import Place, Row, RowError, Step

PLACE = Place("pairs.jsonl", 17)
ASKED = [{"role": "user", "content": "What color is the sky?"}]
BLUE = [{"role": "assistant", "content": "It is blue."}]
GREEN = [{"role": "assistant", "content": "It is green."}]


def row(**fields: object) -> Row:
    return Row(place=PLACE, **fields)  # type: ignore[arg-type]


# The dataset types of TRL's documentation, standard and conversational, and the lists of this package.
ACCEPTED = {
    "preference": (
        {"prompt": "The sky is", "chosen": " blue.", "rejected": " green."},
        row(prompt="The sky is", responses=(" blue.", " green."), ranks=(0, 1)),
    ),
    "preference, conversational": (
        {"prompt": ASKED, "chosen": BLUE, "rejected": GREEN},
        row(prompt=ASKED, responses=(BLUE, GREEN), ranks=(0, 1)),
    ),
    "preference, implicit prompt": (
        {"chosen": "The sky is blue.", "rejected": "The sky is green."},
        row(prompt="The sky is", responses=(" blue.", " green."), ranks=(0, 1)),
    ),
    "preference, implicit prompt, conversational": (
        {"chosen": ASKED + BLUE, "rejected": ASKED + GREEN},
        row(prompt=ASKED, responses=(BLUE, GREEN), ranks=(0, 1)),
    ),
    "preference, question repeated as text": (
        {"prompt": "What color is the sky?", "chosen": ASKED + BLUE, "rejected": ASKED + GREEN},
        row(prompt=ASKED, responses=(BLUE, GREEN), ranks=(0, 1)),
    ),
    "preference, margin": (
        {"prompt": "The sky is", "chosen": " blue.", "rejected": " green.", "margin": 2},
        row(prompt="The sky is", responses=(" blue.", " green."), ranks=(0, 1), margin=2.0),
    ),
    "prompt-completion": (
        {"prompt": "The sky is", "completion": " blue."},
        row(prompt="The sky is", responses=(" blue.",)),
    ),
    "prompt-completion, conversational": (
        {"prompt": ASKED, "completion": BLUE},
        row(prompt=ASKED, responses=(BLUE,)),
    ),
    "prompt-only": ({"prompt": "The sky is"}, row(prompt="The sky is")),
    "prompt-only, conversational": ({"prompt": ASKED}, row(prompt=ASKED)),
    "unpaired": (
        {"prompt": "The sky is", "completion": " blue.", "label": True},
        row(prompt="The sky is", responses=(" blue.",), labels=(True,)),
    ),
    "unpaired, conversational": (
        {"prompt": ASKED, "completion": GREEN, "label": False},
        row(prompt=ASKED, responses=(GREEN,), labels=(False,)),
    ),
    "stepwise": (
        {"prompt": "Which is larger?", "completions": ["0.8 < 0.11.", "So 9.11."], "labels": [True, False]},
        row(prompt="Which is larger?", steps=(Step("0.8 < 0.11.", True), Step("So 9.11.", False))),
    ),
    "stepwise, conversational": (
        {"prompt": ASKED, "completions": ["Look up.", "Blue."], "labels": [True, True]},
        row(prompt=ASKED, steps=(Step("Look up.", True), Step("Blue.", True))),
    ),
    "language modelling": ({"text": "The sky is blue."}, row(responses=("The sky is blue.",))),
    "language modelling, conversational": ({"messages": ASKED + BLUE}, row(prompt=ASKED, responses=(BLUE,))),
    "conversation of several turns": (
        {"messages": ASKED + GREEN + ASKED + BLUE},
        row(prompt=ASKED + GREEN + ASKED, responses=(BLUE,)),
    ),
    "ranked, best first": (
        {"prompt": "a", "responses": ["b", "c", "d"]},
        row(prompt="a", responses=("b", "c", "d"), ranks=(0, 1, 2)),
    ),
    "ranked, by ranks with ties": (
        {"prompt": "a", "responses": ["b", "c", "d"], "ranks": [7, 1, 7]},
        row(prompt="a", responses=("b", "c", "d"), ranks=(1, 0, 1)),
    ),
    "scored": (
        {"prompt": "a", "responses": ["b", "c", "d"], "scores": [0.5, 3, 0.5]},
        row(prompt="a", responses=("b", "c", "d"), ranks=(1, 0, 1), scores=(0.5, 3.0, 0.5)),
    ),
    "scored completions, conversational": (
        {"prompt": ASKED, "completions": [GREEN, BLUE], "scores": [0, 1]},
        row(prompt=ASKED, responses=(GREEN, BLUE), ranks=(1, 0), scores=(0.0, 1.0)),
    ),
    "text that answers a conversation": (
        {"prompt": ASKED, "responses": ["It is blue.", "It is green."]},
        row(prompt=ASKED, responses=(BLUE, GREEN), ranks=(0, 1)),
    ),
}


@pytest.mark.parametrize("kind", ACCEPTED)
def test_every_row_type_is_recognised(kind: str) -> None:
    raw, expected = ACCEPTED[kind]
    assert parse_row(raw, PLACE) == expected


@pytest.mark.parametrize("kind", ACCEPTED)
def test_null_in_an_optional_column_equals_absence_and_others_are_ignored(kind: str) -> None:
    raw, expected = ACCEPTED[kind]
    nulls = dict.fromkeys(TYPED_COLUMNS - set(raw) | {"tools", "chat_template_kwargs", "source"})
    assert parse_row({**nulls, **raw, "id": 3, "score_chosen": 7.5}, PLACE) == expected


@pytest.mark.parametrize("kind", ROW_TYPES)
def test_the_columns_of_a_row_type_are_those_of_no_other(kind: str) -> None:
    """Exactly the required columns: the type itself must be found, so that no two types can be confused."""
    with pytest.raises(RowError) as caught:
        parse_row({name: 3 + i for i, name in enumerate(sorted(ROW_TYPES[kind].required))}, PLACE)
    assert caught.value.reason == "wrong_type"


def test_shared_columns_are_read_from_objects_and_from_json_text() -> None:
    tools = [{"name": "search", "parameters": {"q": "string", "unit": None}}]
    for given_tools in (tools, json.dumps(tools)):
        parsed = parse_row(
            {
                "prompt": ASKED,
                "completion": BLUE,
                "tools": given_tools,
                "chat_template_kwargs": {"mood": "calm", "x": None},
                "source": "web",
            },
            PLACE,
        )
        assert parsed.tools == [{"name": "search", "parameters": {"q": "string"}}]
        assert parsed.chat_template_kwargs == {"mood": "calm"}
        assert parsed.source == "web"
    assert parse_row({"prompt": "a", "tools": []}, PLACE).tools is None


def test_null_keys_that_a_columnar_file_adds_to_messages_are_left_out() -> None:
    call = {"function": {"name": "look", "arguments": {"at": "sky", "unit": None}}}
    answer = {"role": "assistant", "content": None, "tool_calls": [call], "name": None}
    asked = [{**ASKED[0], "tool_calls": None}]
    parsed = parse_row({"prompt": asked, "completion": [answer]}, PLACE)
    kept = {"role": "assistant", "tool_calls": [{"function": {"name": "look", "arguments": {"at": "sky"}}}]}
    assert (parsed.prompt, parsed.responses) == (ASKED, ([kept],))


PAIR = {"prompt": "a", "chosen": "b", "rejected": "c"}
CHAT = {"prompt": ASKED, "chosen": BLUE, "rejected": GREEN}
LIST = {"prompt": "a", "responses": ["b", "c"]}
STEPS = {"prompt": "a", "completions": ["b", "c"], "labels": [True, False]}
REFUSED = [
    (PAIR | {"chosen": ""}, "empty_response", "field `chosen`: found an empty string; expected text or a list of messages"),
    (PAIR | {"chosen": " \n"}, "empty_response", "found only white space"),
    (PAIR | {"chosen": 3}, "wrong_type", "field `chosen`: found the number 3; expected text or a list of messages"),
    (PAIR | {"chosen": "c"}, "identical_responses", "field `rejected`: found the same as in `chosen`"),
    ({"chosen": "b", "rejected": "b"}, "identical_responses", "expected a different response"),
    ({"chosen": "Q\n ", "rejected": "Q\nx"}, "empty_response", "field `chosen`: found only white space"),
    ({"chosen": "b", "rejected": BLUE}, "wrong_type", "field `chosen`: found the text 'b'; expected a list of messages"),
    (PAIR | {"prompt": ""}, "empty_prompt", "Text without a prompt belongs in a column `text`"),
    (PAIR | {"prompt": []}, "empty_messages", "field `prompt`: found an empty list; expected at least one message"),
    (PAIR | {"prompt": {"role": "user"}}, "wrong_type", "found an object with the keys ['role']"),
    (PAIR | {"margin": float("nan")}, "not_finite", "field `margin`: found the number nan; expected a finite number"),
    (PAIR | {"margin": 10**400}, "not_finite", "field `margin`: found the number with 1329 bits"),
    (PAIR | {"margin": "2"}, "not_a_number", "found the text '2'"),
    (PAIR | {"margin": True}, "not_a_number", "found the boolean true"),
    (PAIR | {"margins": 2}, "misspelt_column", "field `margins`: found a column that would be ignored; expected `margin`"),
    (PAIR | {"source": 3}, "wrong_type", "field `source`: found the number 3"),
    (PAIR | {"tools": "[{"}, "broken_json", "field `tools`: found text that is not JSON"),
    (PAIR | {"tools": ["look"]}, "wrong_type", "field `tools`: found a list of 1; expected a list of JSON schemas"),
    (PAIR | {"chat_template_kwargs": [1]}, "wrong_type", "field `chat_template_kwargs`: found a list of 1; expected an object"),
    (CHAT | {"prompt": "a"}, "mixed_forms", "found messages although the prompt is text"),
    (CHAT | {"chosen": []}, "empty_response", "found an empty list"),
    (CHAT | {"chosen": ASKED + BLUE}, "not_an_answer", "field `chosen[0].role`: found the role 'user'"),
    (CHAT | {"chosen": BLUE + ASKED}, "not_an_answer", "field `chosen[1].role`: found the role 'user'"),
    (CHAT | {"chosen": [{"role": "assistant", "content": ""}]}, "empty_response", "field `chosen[0].content`: found an empty"),
    (CHAT | {"prompt": ["hi"]}, "wrong_type", "field `prompt[0]`: found the text 'hi'; expected a message with the keys"),
    (CHAT | {"prompt": [{"content": "hi"}]}, "missing_key", "field `prompt[0]`: found an object with the keys ['content']"),
    (
        CHAT | {"prompt": [{"role": "human", "content": "hi"}]},
        "unknown_role",
        "found the text 'human'; expected one of system, dev",
    ),
    (CHAT | {"prompt": [{"role": "user"}]}, "missing_key", "field `prompt[0]`: found no `content`"),
    (CHAT | {"prompt": [{"role": "user", "content": 3}]}, "wrong_type", "field `prompt[0].content`: found the number 3"),
    (
        CHAT | {"prompt": [{"role": "user", "content": [{"type": "image"}]}]},
        "unsupported_content",
        "field `prompt[0].content[0]`: found a block of type the text 'image'; expected text blocks",
    ),
    (
        {"prompt": "a", "completion": "b", "label": 1},
        "not_a_boolean",
        "field `label`: found the number 1; expected true or false",
    ),
    ({"messages": ASKED}, "no_prompt", "found a single message; expected a question before the answer"),
    ({"messages": BLUE + ASKED}, "not_an_answer", "found the role 'user'"),
    ({"text": ASKED}, "wrong_type", "conversations go into `messages`"),
    (LIST | {"responses": ["b"]}, "too_few_responses", "found a list of 1; expected two responses or more"),
    (LIST | {"responses": "bc"}, "wrong_type", "field `responses`: found the text 'bc'; expected a list"),
    (LIST | {"responses": ["b", ""]}, "empty_response", "field `responses[1]`: found an empty string"),
    (LIST | {"responses": ["b", "b"]}, "identical_responses", "the same text for better and worse responses"),
    (
        LIST | {"ranks": [0]},
        "length_mismatch",
        "field `ranks`: found a list of 1; expected 2 entries, one for each of `responses`",
    ),
    (LIST | {"ranks": [0, 1.5]}, "not_a_rank", "field `ranks[1]`: found the number 1.5; expected a whole number"),
    (LIST | {"ranks": [1, 1]}, "no_preference", "field `ranks`: found the same value for all responses"),
    (LIST | {"scores": [2, 2]}, "no_preference", "field `scores`: found the same value for all responses"),
    (LIST | {"scores": []}, "empty_list", "field `scores`: found an empty list"),
    (LIST | {"scores": [1, float("nan")]}, "not_finite", "field `scores[1]`: found the number nan"),
    (LIST | {"scores": [1, 2], "ranks": [0, 1]}, "ranks_contradict_scores", "response 0 ranked above 1 with a smaller score"),
    (STEPS | {"labels": [True]}, "length_mismatch", "field `labels`: found a list of 1; expected 2 entries"),
    (STEPS | {"labels": [True, None]}, "not_a_boolean", "field `labels[1]`: found null"),
    (STEPS | {"completions": ["b", ""]}, "empty_step", "field `completions[1]`: found a blank step"),
    (STEPS | {"completions": ["b", 3]}, "wrong_type", "field `completions[1]`: found the number 3; expected the text of a step"),
]


@pytest.mark.parametrize(("raw", "reason", "message"), REFUSED)
def test_every_mistake_names_its_field_and_what_was_found(raw: dict[str, object], reason: str, message: str) -> None:
    with pytest.raises(RowError, match=re.escape(message)) as caught:
        parse_row(raw, PLACE)
    assert caught.value.reason == reason
    assert str(caught.value).startswith("pairs.jsonl, row 17")


@pytest.mark.parametrize(
    ("raw", "finding", "first"),
    [
        ({"prompt": "a", "choosen": "b", "rejected": "c"}, "the nearest row type, preference, lacks chosen", "preference"),
        (PAIR | {"chosen": None}, "lacks chosen (null counts as absent: chosen)", "preference"),
        (PAIR | {"label": True}, "the nearest row type, preference, has no label", "preference"),
        (PAIR | {"messages": ASKED + BLUE}, "which fit several row types (preference, conversation)", "preference"),
        (
            {"prompt": "a", "completion": "b", "labels": [True]},
            "unpaired preference, lacks label and has no labels",
            "unpaired preference",
        ),
        ({"conversation": ASKED}, "the columns conversation;", "conversation"),
        ({}, "no column with a value", "conversation"),
    ],
)
def test_unknown_columns_list_the_row_types_nearest_first(raw: dict[str, object], finding: str, first: str) -> None:
    with pytest.raises(RowError, match=re.escape(finding)) as caught:
        parse_row(raw, PLACE)
    assert caught.value.reason == "unknown_columns"
    assert f"the row types are: {first}:" in str(caught.value)
    assert all(name in str(caught.value) for name in ROW_TYPES)


@pytest.mark.parametrize("raw", [None, 3, "text", [1], {1: 2}])
def test_what_is_no_object_is_refused(raw: object) -> None:
    with pytest.raises(RowError, match="expected an object with named columns"):
        parse_row(raw, PLACE)


def test_a_row_that_the_reader_could_not_read_raises_its_error() -> None:
    error = RowError("broken_json", PLACE, "", "x", "y")
    with pytest.raises(RowError) as caught:
        parse_row(error, PLACE)
    assert caught.value is error


def test_equal_responses_are_counted_where_others_differ() -> None:
    assert check_distinct("aab", (0, 1, 2), PLACE) == 1
    assert check_distinct("aa", (0, 0), PLACE) == 0


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.sampled_from(["", "user", "assistant", "a", "[{", "[]"])
    | st.text(),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["role", "content", "type", "text", "tool_calls"]) | st.text(), inner, max_size=3)
    ),
    max_leaves=8,
)
COLUMNS = st.sampled_from([*sorted(TYPED_COLUMNS), "tools", "chat_template_kwargs", "source"])


@given(st.dictionaries(COLUMNS | st.text(), JSON, max_size=5) | JSON)
def test_garbage_raises_nothing_but_row_errors(raw: object) -> None:
    try:
        parsed = parse_row(raw, PLACE)
    except RowError as error:
        paragraph = str(error)
    else:
        paragraph = f"{parsed.place}: a row"
    assert paragraph.startswith("pairs.jsonl, row 17")


@given(st.sampled_from(sorted(ROW_TYPES)), st.data())
def test_garbage_in_the_right_columns_raises_nothing_but_row_errors(kind: str, data: st.DataObject) -> None:
    columns = ROW_TYPES[kind].required | ROW_TYPES[kind].optional
    raw = {name: data.draw(JSON, label=name) for name in sorted(columns)}
    try:
        parsed = parse_row(raw, PLACE)
    except RowError as error:
        paragraph = str(error)
    else:
        paragraph = f"{parsed.place}: a row"
    assert paragraph.startswith("pairs.jsonl, row 17")
