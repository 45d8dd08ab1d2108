from __future__ import annotations

from collections.abc import Callable
from typing import Any

from chat_rows import NEWLINE_TEMPLATE, NO_EOS_TEMPLATE, PLACE, PLAIN_TEMPLATE, THINKING_TEMPLATE, answer, row_of, said
from hypothesis import given
from hypothesis import strategies as st

from lightning_pref.data.formats import parse_row
from lightning_pref.data.groups import PromptGroup
from lightning_pref.data.rows import DroppedRowError, Row, RowError
from lightning_pref.data.templates import Tokenization

# Any: see the fixture.
Build = Callable[..., Any]


def result_or_error(tokenize: Tokenization, row: Row, row_id: int) -> PromptGroup | RowError:
    try:
        return tokenize(row, row_id)
    except RowError as error:
        return error


WORDS = st.text(
    st.sampled_from("the sky is blue \n:!\u00e9\u7b54\u84dd\U0001f600Answeryn") | st.characters(exclude_categories=("Cs",)),
    min_size=1,
    max_size=20,
)
TEXTS = WORDS.filter(lambda text: text.strip() != "")
TURNS = TEXTS.map(answer)


@st.composite
def rows(draw: Callable[..., Any]) -> Row:  # Any: whatever the strategy draws
    """A valid row of any type."""
    kind = draw(st.sampled_from(["pair", "list", "text", "chat", "steps", "unpaired"]))
    prompt = draw(WORDS)
    columns: dict[str, object]
    if kind == "pair":
        columns = {"prompt": prompt, "chosen": draw(TEXTS), "rejected": draw(TEXTS)}
    elif kind == "list":
        columns = {"prompt": prompt, "responses": draw(st.lists(TEXTS, min_size=2, max_size=4, unique=True))}
    elif kind == "text":
        columns = {"text": draw(TEXTS)}
    elif kind == "chat":
        columns = {"prompt": said(prompt), "chosen": draw(TURNS), "rejected": draw(TURNS)}
    elif kind == "steps":
        steps = draw(st.lists(TEXTS, min_size=1, max_size=3))
        columns = {"prompt": prompt, "completions": steps, "labels": [True] * len(steps)}
    else:
        columns = {"prompt": prompt, "completion": draw(TEXTS), "label": draw(st.booleans())}
    if columns.get("chosen") is not None and columns["chosen"] == columns["rejected"]:
        columns["rejected"] = "no" if kind == "pair" else answer("no" if columns["chosen"] != answer("no") else "yes")
        if columns["chosen"] == columns["rejected"]:
            columns["rejected"] = "yes"
    return parse_row(columns, PLACE)


@given(rows(), st.sampled_from([PLAIN_TEMPLATE, NEWLINE_TEMPLATE, THINKING_TEMPLATE, NO_EOS_TEMPLATE]), st.booleans())
def test_prompt_and_response_are_the_whole(build_tokenizer: Build, row: Row, template: str, adds_bos: bool) -> None:
    tokenizer = build_tokenizer(adds_bos=adds_bos, template=template)
    tokenize = Tokenization(tokenizer)
    group = result_or_error(tokenize, row, 0)
    if isinstance(group, RowError):
        assert group.reason in {"identical_responses", "merged_steps", "steps_changed", "empty_response"}
        return
    if isinstance(row.prompt, str):
        steps = "".join(step.text + "\n" for step in row.steps or ())
        wholes = [row.prompt + response for response in row.responses if isinstance(response, str)] or [row.prompt + steps]
    else:
        wholes = [tokenizer.apply_chat_template([*row.prompt, *r], tokenize=False) for r in row.responses]  # type: ignore[misc]
    for response, whole in zip(group.responses, wholes, strict=True):
        prompt = group.prompt.tolist()
        # What the tokenisation puts in front of plain text, and the end that it unifies.
        added = 1 if isinstance(row.prompt, str) and (adds_bos or not row.prompt) else 0
        expected = tokenizer(whole, add_special_tokens=False)["input_ids"]
        found = [*prompt[added:], *response.tolist()]
        assert found[-1] == tokenizer.eos_token_id
        assert tokenizer.decode(found).removesuffix("<|end|>") == whole.removesuffix("\n").removesuffix("<|end|>") or (
            tokenizer.decode(found).removesuffix("<|end|>") == whole
        )
        if "split_boundary" not in tokenize.events:
            assert found[:-1] == expected[: len(found) - 1]


@given(rows(), st.integers(2, 14), st.none() | st.integers(1, 6), st.sampled_from(["keep_start", "keep_end", "drop"]))
def test_truncation_never_empties_and_never_exceeds(
    build_tokenizer: Build, row: Row, max_length: int, max_prompt_length: int | None, truncation: Any
) -> None:
    # Any: one of three literals
    if max_prompt_length is not None and max_prompt_length >= max_length:
        max_prompt_length = max_length - 1
    tokenizer = build_tokenizer(adds_bos=True, template=PLAIN_TEMPLATE)
    limits = {"max_length": max_length, "max_prompt_length": max_prompt_length, "truncation": truncation}
    group = result_or_error(Tokenization(tokenizer, **limits), row, 0)
    if isinstance(group, RowError):
        assert group.reason in {"identical_responses", "merged_steps", "empty_response", "empty_prompt", "too_long"}
        assert isinstance(group, DroppedRowError) == (group.reason == "too_long")
        return
    whole = Tokenization(tokenizer)(row, 0)
    assert len(group.prompt) + max(map(len, group.responses)) <= max_length
    assert len(group.prompt) <= (max_prompt_length or max_length)
    for cut, full in zip(group.responses, whole.responses, strict=True):
        assert cut.tolist() == full[: len(cut)].tolist()
    if truncation == "drop":
        assert group.num_tokens == whole.num_tokens


@given(st.lists(rows(), max_size=8), st.sampled_from([NEWLINE_TEMPLATE, THINKING_TEMPLATE]))
def test_batches_of_rows_give_what_single_rows_give(build_tokenizer: Build, many: list[Row], template: str) -> None:
    tokenizer = build_tokenizer(template=template)
    single, batched = (Tokenization(tokenizer, max_length=24) for _ in range(2))
    found = list(batched.tokenize_rows((10 + i, row) for i, row in enumerate(many)))
    assert len(found) == len(many)
    for i, (row, result) in enumerate(zip(many, found, strict=True)):
        expected = result_or_error(single, row, 10 + i)
        if isinstance(expected, RowError) or isinstance(result, RowError):
            assert str(result) == str(expected)
            continue
        assert vars(result).keys() == vars(expected).keys()
        assert result.prompt.tolist() == expected.prompt.tolist()
        assert [r.tolist() for r in result.responses] == [r.tolist() for r in expected.responses]
        names = ("row_id", "source", "ranks", "scores", "labels", "margin", "step_ends", "step_labels")
        assert [getattr(result, n) for n in names] == [getattr(expected, n) for n in names]
    assert batched.events == single.events


def test_batches_longer_than_one_chunk_keep_their_order(build_tokenizer: Build) -> None:
    tokenize = Tokenization(build_tokenizer())
    many = [(i, row_of(prompt="the", completion=f" sky {i}")) for i in range(600)]
    found = list(tokenize.tokenize_rows(many))
    assert [group.row_id for group in found if isinstance(group, PromptGroup)] == list(range(600))
