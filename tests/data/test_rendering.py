from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from chat_rows import CHAT, NO_EOS_TEMPLATE, PLAIN_TEMPLATE, THINKING_TEMPLATE, answer, row_of, said, texts

from lightning_pref.data.rows import RowError
from lightning_pref.data.templates import Tokenization

# Any: see the fixture.
Build = Callable[..., Any]
DATE_TEMPLATE = "Today is {{ strftime_now('%d %b %Y') }}.<|end|>" + PLAIN_TEMPLATE


def test_T4_date_in_the_template_is_stopped_and_warned_about(build_tokenizer: Build) -> None:
    tokenizer = build_tokenizer(template=DATE_TEMPLATE)
    with pytest.warns(UserWarning, match="writes today's date. It is told 2024-07-26 every day"):
        tokenize = Tokenization(tokenizer)
    prompt, _ = texts(tokenizer, tokenize(CHAT, 0))
    assert prompt.startswith("Today is 26 Jul 2024.")


def test_T4_ids_are_equal_on_two_days(build_tokenizer: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    import transformers.utils.chat_template_utils as clock

    def frozen(year: int) -> type:
        class Day(clock.datetime):  # type: ignore[misc, name-defined]
            @classmethod
            def now(cls, tz: object = None) -> Any:  # Any: a datetime
                return cls(year, 1, 2)

        return Day

    found = []
    for year in (2025, 2026):
        monkeypatch.setattr(clock, "datetime", frozen(year))
        found.append(Tokenization(build_tokenizer(template=DATE_TEMPLATE), template_date="2020-05-04")(CHAT, 0).prompt.tolist())
    assert found[0] == found[1]
    days = ("2020-05-04", "2020-05-05")
    assert len({Tokenization(build_tokenizer(template=DATE_TEMPLATE), template_date=day).digest() for day in days}) == 2


def test_T4_a_clock_that_cannot_be_stopped_is_warned_about(build_tokenizer: Build) -> None:
    tokenizer = build_tokenizer(template="{% set form = '%d' %}{{ strftime_now(form) }}" + PLAIN_TEMPLATE)
    with pytest.warns(UserWarning, match="which cannot be stopped: token ids change from day to day"):
        Tokenization(tokenizer, template_date="2020-05-04")


def test_T5_template_that_is_not_prefix_preserving_is_split_by_position_and_counted(build_tokenizer: Build) -> None:
    tokenizer = build_tokenizer(template=THINKING_TEMPLATE)
    tokenize = Tokenization(tokenizer)
    prompt, responses = texts(tokenizer, tokenize(CHAT, 0))
    assert prompt == "<|user|>What color is the sky?<|end|><|assistant|>"
    assert responses == ["blue<|end|>", "It is red.<|end|>"]
    assert tokenize.events == {"template_not_prefix": 1}


def test_T5_the_question_never_becomes_part_of_the_answer(build_tokenizer: Build) -> None:
    """This template writes the number of messages first, so that nothing behind it is common text."""
    template = "{{ messages | length }} messages: " + PLAIN_TEMPLATE
    tokenizer = build_tokenizer(template=template)
    prompt, responses = texts(tokenizer, Tokenization(tokenizer)(CHAT, 0))
    assert prompt == "2 messages: <|user|>What color is the sky?<|end|><|assistant|>"
    assert responses == ["blue<|end|>", "It is red.<|end|>"]


def test_T5_earlier_thoughts_that_the_template_strips_do_not_matter(build_tokenizer: Build) -> None:
    shown = "m.content if loop.last else m.content.split('</think>')[-1]"
    template = PLAIN_TEMPLATE.replace("m.content", shown)
    tokenizer = build_tokenizer(template=template)
    prompt = said("sky?", "<think>sea</think>blue", "sea?")
    group = Tokenization(tokenizer)(row_of(prompt=prompt, completion=answer("<think>sky</think>green")), 0)
    text, responses = texts(tokenizer, group)
    assert text == "<|user|>sky?<|end|><|assistant|>blue<|end|><|user|>sea?<|end|><|assistant|>"
    assert responses == ["<think>sky</think>green<|end|>"]


def test_tools_and_variables_reach_the_template(build_tokenizer: Build) -> None:
    template = "{% if tools %}{{ tools[0].name }} {% endif %}{{ mood }} " + PLAIN_TEMPLATE
    tokenizer = build_tokenizer(template=template)
    row = row_of(prompt=said("a"), completion=answer("b"), tools=[{"name": "search"}], chat_template_kwargs={"mood": "calm"})
    assert texts(tokenizer, Tokenization(tokenizer)(row, 0))[0].startswith("search calm <|user|>")


def test_reserved_template_variable_is_refused(build_tokenizer: Build) -> None:
    row = row_of(prompt=said("a"), completion=answer("b"), chat_template_kwargs={"tokenize": True})
    with pytest.raises(RowError, match="found the key tokenize; expected variables of the template's own only"):
        Tokenization(build_tokenizer(template=PLAIN_TEMPLATE))(row, 0)


def test_conversation_that_the_template_refuses_is_a_row_error(build_tokenizer: Build) -> None:
    tokenizer = build_tokenizer(template="{{ raise_exception('roles must alternate') }}")
    with pytest.raises(RowError, match="a conversation that the chat template refuses .*roles must alternate"):
        Tokenization(tokenizer)(CHAT, 0)


def test_template_that_drops_the_answer_is_a_row_error(build_tokenizer: Build) -> None:
    tokenizer = build_tokenizer(template="{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}")
    with pytest.raises(RowError, match="a response of which the chat template writes nothing"):
        Tokenization(tokenizer)(CHAT, 0)


def test_half_a_character_is_a_row_error(build_tokenizer: Build) -> None:
    with pytest.raises(RowError, match=r"half a character \('\\ud83d'\) in 'sky bl'"):
        Tokenization(build_tokenizer())(row_of(prompt="sky", completion=" bl\ud83d"), 0)


def test_missing_or_broken_template_stops_the_run(build_tokenizer: Build) -> None:
    with pytest.raises(ValueError, match="the tokenizer has no chat template. Give one by `chat_template`"):
        Tokenization(build_tokenizer())(CHAT, 0)
    with pytest.raises(ValueError, match="The chat template is no valid Jinja"):
        Tokenization(build_tokenizer(), chat_template="{% for %}")(CHAT, 0)
    with pytest.raises(FileNotFoundError, match="no chat template at /.*missing.jinja"):
        Tokenization(build_tokenizer(), chat_template="missing.jinja")


def test_template_given_as_file_or_text_replaces_the_tokenizers(build_tokenizer: Build, tmp_path: Path) -> None:
    path = tmp_path / "own.jinja"
    path.write_text(NO_EOS_TEMPLATE)
    tokenizer = build_tokenizer(template=PLAIN_TEMPLATE)
    found = [Tokenization(tokenizer, chat_template=t)(CHAT, 0).prompt.tolist() for t in (path, str(path), NO_EOS_TEMPLATE)]
    assert found[0] == found[1] == found[2] == tokenizer("user: What color is the sky?\nassistant:")["input_ids"]
