"""Limits on the length of a group, and what is kept of one that is longer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

from lightning_pref.data.rows import FIX_OR_SKIP, DroppedRowError, Place, RowError

Truncation = Literal["keep_start", "keep_end", "drop"]

_RAISE_LIMIT = f"Raise `max_length`, lower `max_prompt_length`, or choose another `truncation`. {FIX_OR_SKIP}"


class Cut(NamedTuple):
    """What is left of a group, and what was cut."""

    prompt: list[int]
    responses: list[list[int]]
    cut_prompt: bool = False
    cut_response: bool = False


@dataclass(frozen=True, kw_only=True)
class Limits:
    """How long a group may be, in tokens.

    A prompt is only ever cut at its start, since its end holds the question and the opening of the answer; a leading BOS stays.
    It is cut once for all responses of the group. A response is only ever cut at its end.

    Attributes:
        max_length: Most tokens of the prompt and any one response together.
        max_prompt_length: Most tokens of the prompt; the start of a longer one is cut whatever `truncation` keeps.
        truncation: What happens where the prompt and a response are longer than `max_length`. "keep_start" cuts the ends of the
            responses; "keep_end" cuts the start of the prompt; "drop" leaves out rows with a prompt or a response over a limit.
    """

    max_length: int | None = None
    max_prompt_length: int | None = None
    truncation: Truncation = "keep_start"

    def __post_init__(self) -> None:
        if self.truncation not in get_args(Truncation):
            raise ValueError(f"`truncation` must be one of {', '.join(get_args(Truncation))}, got {self.truncation!r}.")
        if self.max_length is not None and self.max_length < 2:
            raise ValueError(f"`max_length` must hold a prompt and a response, that is at least 2, got {self.max_length!r}.")
        if self.max_prompt_length is not None and self.max_prompt_length < 1:
            raise ValueError(f"`max_prompt_length` must be at least 1, got {self.max_prompt_length!r}.")
        if self.truncation != "keep_start" and self.max_length is None and self.max_prompt_length is None:
            raise ValueError(
                f"`truncation` is {self.truncation!r}, but without `max_length` and `max_prompt_length` nothing is too long. "
                "Set a limit, or leave `truncation` out."
            )
        if self.max_length and self.max_prompt_length and self.max_prompt_length >= self.max_length:
            raise ValueError(
                f"`max_prompt_length` ({self.max_prompt_length}) must be smaller than `max_length` ({self.max_length}): "
                "a response needs room too."
            )

    def apply(self, prompt: list[int], responses: list[list[int]], place: Place, *, keeps_first: bool) -> Cut:
        """The group within its limits; neither the prompt nor a response is ever left empty.

        Args:
            prompt: Prompt token ids, P >= 1.
            responses: Token ids of each response.
            place: File and row, for messages.
            keeps_first: Whether the first prompt token is a BOS, which survives a cut.

        Raises:
            DroppedRowError: If something is too long and `truncation` is "drop".
            RowError: If the cut would leave nothing of the prompt ("empty_prompt") or of a response ("empty_response").
        """
        if self.truncation == "drop":
            self._check_fits(prompt, responses, place)
        kept = self.cut_prompt(prompt, place, keeps_first=keeps_first)
        longest = max(len(response) for response in responses)
        if self.max_length is None or len(kept) + longest <= self.max_length:
            return Cut(kept, responses, cut_prompt=len(kept) < len(prompt))
        if self.truncation == "keep_end":
            kept = _keep_tail(kept, self.max_length - longest, place, keeps_first=keeps_first)
            return Cut(kept, responses, cut_prompt=True)
        room = self.max_length - len(kept)
        if room < 1:
            raise RowError(
                "empty_response",
                place,
                "",
                f"a prompt of {len(kept)} tokens, which leaves nothing of the responses within `max_length` {self.max_length}",
                "room for at least one response token",
                _RAISE_LIMIT,
            )
        shortened = [response[:room] for response in responses]
        return Cut(kept, shortened, cut_prompt=len(kept) < len(prompt), cut_response=True)

    def cut_prompt(self, prompt: list[int], place: Place, *, keeps_first: bool) -> list[int]:
        """The prompt within `max_prompt_length`."""
        if self.max_prompt_length is None or len(prompt) <= self.max_prompt_length:
            return prompt
        return _keep_tail(prompt, self.max_prompt_length, place, keeps_first=keeps_first)

    def _check_fits(self, prompt: list[int], responses: list[list[int]], place: Place) -> None:
        total = len(prompt) + max(len(response) for response in responses)
        for length, name in ((len(prompt), "max_prompt_length"), (total, "max_length")):
            limit: int | None = getattr(self, name)
            if limit is not None and length > limit:
                what = "a prompt" if name == "max_prompt_length" else "a prompt with a response"
                cure = "It is left out, as `truncation: drop` asks."
                raise DroppedRowError("too_long", place, "", f"{what} of {length} tokens", f"at most {limit} (`{name}`)", cure)


def _keep_tail(prompt: list[int], size: int, place: Place, *, keeps_first: bool) -> list[int]:
    """The last `size` tokens; with `keeps_first`, the first token and the last `size` - 1."""
    if size < 1 + keeps_first:
        raise RowError(
            "empty_prompt",
            place,
            "",
            f"responses or limits that leave room for {max(size, 0)} of {len(prompt)} prompt tokens",
            "room for at least one prompt token" + (" besides BOS" if keeps_first else ""),
            _RAISE_LIMIT,
        )
    return prompt[:1] + prompt[len(prompt) - size + 1 :] if keeps_first else prompt[len(prompt) - size :]
