"""A row as the texts that are tokenised: the prompt alone, and the prompt with each response."""

from __future__ import annotations

import inspect
import json
import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import date
from pathlib import Path
from typing import Any, cast

from jinja2 import TemplateSyntaxError
from transformers import PreTrainedTokenizerBase

from lightning_pref.data.prefixes import common_prefix_length
from lightning_pref.data.rows import Messages, Row, RowError, shorten

# The day that Llama templates themselves fall back to where no clock is given to them.
DEFAULT_TEMPLATE_DATE = "2024-07-26"

_CLOCK_CALL = re.compile(r"""strftime_now\(\s*(?:"([^"]*)"|'([^']*)')\s*\)""")

# Two contents that no template treats differently, for finding where the content of an answer begins.
_PROBES = ("0", "1")


@dataclass(frozen=True)
class Rendering:
    """The texts of one row.

    Attributes:
        prompt: The prompt alone, as the model is given it for generation.
        wholes: The prompt with each response, as one text.
        boundary: Characters at the start of every whole that belong to the prompt.
        extends_prompt: Whether every whole begins with `prompt`; if not, the template writes the prompt of a finished
            conversation differently, and `boundary` is where its common part ends.
        is_templated: Whether a chat template wrote the texts, with all special tokens that belong there.
        step_ends: For a stepwise row, the index of the last character of each step (with its separator) in the whole.
    """

    prompt: str
    wholes: tuple[str, ...]
    boundary: int
    extends_prompt: bool
    is_templated: bool
    step_ends: tuple[int, ...] = ()


class ChatTemplate:
    """The chat template of a tokenizer, or one given instead of it, with its clock stopped.

    Args:
        tokenizer: Brings the template where none is given, and the special tokens that templates write.
        template: A Jinja template, or a file that holds one (a text without "{" is a file name).
        template_date: The day (ISO) that a template which writes the date is told.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        template: str | Path | None = None,
        template_date: str | None = None,
    ) -> None:
        self._tokenizer = tokenizer
        self._own = None if template is None else _read_template(template)
        self._day = _day_of(template_date or DEFAULT_TEMPLATE_DATE)
        self._reserved = frozenset(inspect.signature(tokenizer.apply_chat_template).parameters) | {"messages", "strftime_now"}
        self._warn_of_clock(is_day_chosen=template_date is not None)

    @property
    def text(self) -> str:
        """All that the rendering depends on, for a digest; "" without a template."""
        named = self._own if self._own is not None else self._tokenizer.chat_template
        return named if isinstance(named, str) else json.dumps(named, sort_keys=True) if named else ""

    @property
    def day(self) -> str:
        """The day that the template is told, ISO."""
        return self._day.isoformat()

    def _warn_of_clock(self, *, is_day_chosen: bool) -> None:
        if re.search(r"strftime_now\s*\(", _CLOCK_CALL.sub("", self.text.replace('\\"', '"'))):
            warnings.warn(
                "The chat template writes the time in a format that it computes, which cannot be stopped: token ids change from "
                "day to day. Give a template with the format, or the date itself, written out as `chat_template`.",
                stacklevel=4,
            )
        elif "strftime_now" in self.text and not is_day_chosen:
            warnings.warn(
                f"The chat template writes today's date. It is told {self._day} every day, so that token ids and caches stay "
                "the same; set `template_date` to choose the day and to silence this warning.",
                stacklevel=4,
            )

    def render(self, conversations: list[Messages], row: Row, *, opens_answer: bool) -> list[str]:
        """The text of each conversation.

        Args:
            conversations: Lists of messages.
            row: Brings tools and template variables.
            opens_answer: Whether the text ends with the opening of the assistant's answer.
        """
        settings = dict(row.chat_template_kwargs or {})
        reserved = sorted(self._reserved & set(settings) - {"documents"})
        if reserved:
            raise RowError(
                "reserved_template_variable",
                row.place,
                "chat_template_kwargs",
                f"the key {', '.join(reserved)}",
                "variables of the template's own only",
            )
        template = self._stopped_template(row.tools)
        tools: list[dict[Any, Any] | Callable[..., Any]] | None = (
            [*row.tools] if row.tools else None
        )  # Any: as transformers has it
        try:
            rendered = self._tokenizer.apply_chat_template(
                conversations,
                tools=tools,
                chat_template=template,
                add_generation_prompt=opens_answer,
                tokenize=False,
                **settings,
            )
        except TemplateSyntaxError as error:
            raise ValueError(f"The chat template is no valid Jinja: {error} (line {error.lineno}). Repair it.") from error
        except Exception as error:  # a template is a program and may fail on a row in any way
            finding = f"a conversation that the chat template refuses ({type(error).__name__}: {shorten(str(error))})"
            raise RowError("template_error", row.place, "", finding, "a conversation that the template supports") from error
        return cast("list[str]", rendered)

    def _stopped_template(self, tools: list[dict[str, Any]] | None) -> str:  # Any: JSON schemas
        text = self._own
        if text is None:
            if not self._tokenizer.chat_template:
                raise ValueError(
                    "The rows are conversations, but the tokenizer has no chat template. Give one by `chat_template` (a Jinja "
                    "text or file), or write prompts and responses as text."
                )
            text = self._tokenizer.get_chat_template(None, tools)
        return stop_clock(text, self._day)


def stop_clock(template: str, day: date) -> str:
    """The template with every reading of the clock replaced by the text it gives on `day`.

    >>> stop_clock("Today: {{ strftime_now('%d %b %Y') }}", date(2024, 7, 26))
    'Today: {{ "26 Jul 2024" }}'
    """
    return _CLOCK_CALL.sub(lambda call: json.dumps(day.strftime(call[1] or call[2])), template)


def render_row(row: Row, template: ChatTemplate, step_separator: str) -> Rendering:
    """The texts of a row with at least one response.

    Raises:
        RowError: If the template refuses the row, or the texts are no valid Unicode or lack a response.
    """
    responses: tuple[str | Messages, ...] = row.responses
    content = "".join(step.text + step_separator for step in row.steps or ())
    if row.steps is not None:
        responses = (content,) if isinstance(row.prompt, str) else ([{"role": "assistant", "content": content}],)
    if isinstance(row.prompt, str):
        texts = [row.prompt + response for response in responses if isinstance(response, str)]
        rendering = Rendering(row.prompt, tuple(texts), len(row.prompt), extends_prompt=True, is_templated=False)
    else:
        rendering = _render_conversation(row, row.prompt, [r for r in responses if not isinstance(r, str)], template)
    _check_texts(rendering, row)
    if row.steps is None:
        return rendering
    ends = _step_ends(rendering, row, [len(step.text) + len(step_separator) for step in row.steps], content)
    return replace(rendering, step_ends=ends)


def render_prompt(row: Row, template: ChatTemplate) -> str:
    """The prompt alone, as the model is given it for generation."""
    text = row.prompt if isinstance(row.prompt, str) else template.render([row.prompt], row, opens_answer=True)[0]
    _check_unicode(text, row)
    return text


def _render_conversation(row: Row, prompt: Messages, responses: list[Messages], template: ChatTemplate) -> Rendering:
    opening = template.render([prompt], row, opens_answer=True)[0]
    wholes = tuple(template.render([prompt + response for response in responses], row, opens_answer=False))
    if all(whole.startswith(opening) for whole in wholes):
        return Rendering(opening, wholes, len(opening), extends_prompt=True, is_templated=True)
    # A finished conversation is written differently from one that waits for its answer. Where the answer begins in it is
    # seen from two finished conversations that differ in the answer only.
    probes = template.render([[*prompt, {"role": "assistant", "content": text}] for text in _PROBES], row, opens_answer=False)
    finished = probes[0][: common_prefix_length(*probes)]
    boundary = max(min(common_prefix_length(start, whole) for whole in wholes) for start in (opening, finished))
    if not boundary:
        finding = "a conversation of which the chat template keeps nothing once it is answered"
        raise RowError("template_error", row.place, "", finding, "a template that begins both alike")
    return Rendering(opening, wholes, boundary, extends_prompt=False, is_templated=True)


def _check_texts(rendering: Rendering, row: Row) -> None:
    for whole in rendering.wholes:
        _check_unicode(whole, row)
        if not whole[rendering.boundary :].strip():
            finding = "a response of which the chat template writes nothing"
            raise RowError("empty_response", row.place, "", finding, "a response that shows in the text")
    _check_unicode(rendering.prompt, row)


def _check_unicode(text: str, row: Row) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        finding = f"half a character ({text[error.start]!a}) in {shorten(text[max(0, error.start - 20) : error.start])}"
        expectation = "valid Unicode (in a CSV: UTF-8)"
        raise RowError("broken_text", row.place, "", finding, expectation) from error


def _step_ends(rendering: Rendering, row: Row, sizes: list[int], content: str) -> tuple[int, ...]:
    """Index of the last character of each step in the whole; a template may strip the white space around the content."""
    whole, visible = rendering.wholes[0], content.strip()
    start = whole.find(visible, rendering.boundary)
    if start < 0:
        finding = "steps that the chat template does not write as they are"
        raise RowError("steps_changed", row.place, "completions", finding, "a template that keeps the text of an answer")
    last = start + len(visible) - 1
    if whole.startswith(content[len(content.rstrip()) :], last + 1):
        last += len(content) - len(content.rstrip())
    start -= len(content) - len(content.lstrip())
    ends = [start + sum(sizes[: i + 1]) - 1 for i in range(len(sizes))]
    return tuple(min(end, last) for end in ends)


def _read_template(template: str | Path) -> str:
    if isinstance(template, str) and "{" in template:
        return template
    path = Path(template)
    # A text that is no template and no name of a file may not even be asked for.
    if "\0" in str(path) or not path.is_file():
        raise FileNotFoundError(
            f"no chat template at {path.absolute()}. Correct the path, or give the Jinja text itself as `chat_template`."
        )
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: the chat template is no UTF-8 text ({error.reason}). Save it as UTF-8.") from error


def _day_of(text: str) -> date:
    try:
        return date.fromisoformat(text)
    except ValueError as error:
        raise ValueError(f"`template_date` is a day such as {DEFAULT_TEMPLATE_DATE}, got {text!r}.") from error


def check_template(template: str | Path | None, template_date: str | None) -> None:
    """Raise for a template that cannot be read and a day that is none, before any row is."""
    if template is not None:
        _read_template(template)
    if template_date is not None:
        _day_of(template_date)
