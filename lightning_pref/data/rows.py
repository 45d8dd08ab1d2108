"""A row between the file and the tokens: where it came from, what it says, and what may be wrong with it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from typing_extensions import override

from lightning_pref.escaping import on_terminal

# Any: a message is JSON; besides `role` and `content` the chat template decides which keys it reads.
Message = dict[str, Any]
Messages = list[Message]

FIX_OR_SKIP = "Fix or remove the row, or set `on_bad_row: skip` to count and skip it."

_SHOWN_CHARACTERS = 60


class Place(NamedTuple):
    """Where a row stands, as an editor counts: the first line of a file is 1 (a CSV header is line 1)."""

    file: str
    row: int

    @override
    def __str__(self) -> str:
        return f"{self.file}, row {self.row}"


class RowError(ValueError):
    """A row that cannot be used: where it stands, what was found, what was expected and what to do.

    Attributes:
        reason: Short name of the defect for counting, such as "empty_response".
        place: File and row.
        field: Column, with a path into it where that helps: "chosen[1].role".
        finding: What was found, as a phrase that follows "found".
        expectation: What was expected, as a phrase that follows "expected".
        cure: What to do about it, as a sentence.
    """

    def __init__(self, reason: str, place: Place, field: str, finding: str, expectation: str, cure: str = FIX_OR_SKIP) -> None:
        # All of them go into `args`, so that the error survives the pickling between worker processes.
        super().__init__(reason, place, field, finding, expectation, cure)
        self.reason = reason
        self.place = place
        self.field = field
        self.finding = finding
        self.expectation = expectation
        self.cure = cure

    @override
    def __str__(self) -> str:
        field = f", field `{self.field}`" if self.field else ""
        return on_terminal(f"{self.place}{field}: found {self.finding}; expected {self.expectation}. {self.cure}")


class DroppedRowError(RowError):
    """A row that a setting of the user's leaves out (`truncation: drop`): always counted, never an error of the run."""


class Step(NamedTuple):
    """One step of a stepwise-supervised response."""

    text: str
    label: bool


@dataclass(frozen=True, kw_only=True)
class Row:
    """One checked row, still as text. A `str` prompt or response is plain text, a list is a piece of a conversation.

    Attributes:
        place: File and row.
        prompt: What comes before the responses; "" where a row has none (language modelling).
        responses: K responses in the order of the row; none for a prompt-only row and for one with `steps`.
        ranks: Per response, 0 is best, equal numbers are ties.
        scores: Per response, larger is better.
        labels: Per response, whether it is desirable.
        margin: How much better the chosen response is.
        steps: The reasoning steps of the one response of a stepwise row.
        tools: JSON schemas of the tools, given to the chat template.
        chat_template_kwargs: Further variables of the chat template.
        source: Where the row came from, for reports by source.
    """

    place: Place
    prompt: str | Messages = ""
    responses: tuple[str | Messages, ...] = ()
    ranks: tuple[int, ...] | None = None
    scores: tuple[float, ...] | None = None
    labels: tuple[bool, ...] | None = None
    margin: float | None = None
    steps: tuple[Step, ...] | None = None
    tools: list[dict[str, Any]] | None = None  # Any: JSON schema
    chat_template_kwargs: Mapping[str, Any] | None = None  # Any: whatever the template reads
    source: str = ""


def describe(value: object) -> str:
    """A short phrase for a value found in a file.

    >>> describe(""), describe(None), describe([1, 2]), describe({"role": "user"}), describe("yes")
    ('an empty string', 'null', 'a list of 2', "an object with the keys ['role']", "the text 'yes'")
    """
    if value is None:
        return "null"
    if isinstance(value, bool):
        return f"the boolean {str(value).lower()}"
    if isinstance(value, int | float):
        return f"the number {shorten(value)}"
    if isinstance(value, str):
        return f"the text {shorten(value)}" if value else "an empty string"
    if isinstance(value, list | tuple):
        return f"a list of {len(value)}" if value else "an empty list"
    if isinstance(value, Mapping):
        return f"an object with the keys {shorten(list(value))}" if value else "an empty object"
    return f"a value of type {type(value).__name__}"


def shorten(value: object) -> str:
    """`repr` of a value, cut to what fits into a message."""
    # A number of thousands of digits may not be printed at all.
    if isinstance(value, int) and value.bit_length() > 256:
        return f"with {value.bit_length()} bits"
    text = repr(value[: _SHOWN_CHARACTERS + 1] if isinstance(value, str | list) else value)
    return text if len(text) <= _SHOWN_CHARACTERS else text[:_SHOWN_CHARACTERS] + "..."
