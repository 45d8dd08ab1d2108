"""Rows become token ids: special tokens, the split into prompt and responses, truncation."""

from __future__ import annotations

import hashlib
import json
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, ParamSpec, TypeVar

import numpy as np
from tokenizers import Encoding, Tokenizer
from transformers import PreTrainedTokenizerBase

from lightning_pref.data.formats import check_distinct
from lightning_pref.data.groups import PromptGroup
from lightning_pref.data.prefixes import common_prefix_length
from lightning_pref.data.rendering import ChatTemplate, Rendering, render_prompt, render_row
from lightning_pref.data.rows import Place, Row, RowError
from lightning_pref.data.truncation import Limits, Truncation

_P = ParamSpec("_P")
_T = TypeVar("_T")

# Raised whenever the same settings and rows begin to give other token ids, so that caches are built again.
_RULES_VERSION = 1

_ROWS_PER_BATCH = 256

# What `Tokenization.events` counts, in rows.
EVENTS = {
    "truncated_prompt": "the start of the prompt was cut",
    "truncated_response": "the end of at least one response was cut",
    "template_not_prefix": "the chat template writes the prompt differently once it is answered; the prompt ends where they part",
    "merged_boundary": "tokens of the prompt and of a response merge; the prompt ends before the merged token",
    "split_boundary": "the whole prompt would have merged into a response; both were tokenised apart",
    "identical_pair": "some better and worse responses of a list are the same tokens",
    "user_turn_in_response": "a response holds messages of the user or a tool, which are trained on as well",
    "double_bos": "the prompt begins with two BOS tokens, which the row or its template writes",
}


class _Split(NamedTuple):
    """Where the prompt of a row ends and its responses begin, in tokens."""

    prompt: list[int]
    bodies: Sequence[Encoding]  # per response, a text that it ends
    skipped_tokens: int  # tokens of each body before the response
    skipped_characters: int  # characters of each whole before its body
    events: list[str]


class Tokenization:
    """Turns rows into prompt groups.

    Plain text: `prompt` and response are joined as they are and tokenised as one text. BOS is put in front where the tokenizer
    does so itself; a row without a prompt is conditioned on BOS, or on EOS where the tokenizer has no BOS. Conversations: the
    chat template writes the text with all its special tokens, and nothing is put in front. Either way the response ends with
    exactly one EOS: white space that a template writes after EOS is cut, and EOS is appended where it is missing. A response
    that truncation cuts has no EOS.

    All responses of a row share one prompt, and prompt ids + response ids are the ids of the whole text. Where the ids of the
    prompt alone do not begin the ids of the whole, the prompt is the longest run of tokens, common to all responses, that lies
    inside the prompt's text; `events` counts such rows.

    Args:
        tokenizer: A fast tokenizer with an EOS token.
        chat_template: Jinja text or file that replaces the tokenizer's chat template.
        template_date: The day (ISO) that a template which writes the date is told; 2024-07-26 if not given.
        max_length: Most tokens of the prompt and any one response together.
        max_prompt_length: Most tokens of the prompt.
        truncation: What is kept of longer rows, see `Limits`.
        step_separator: Written after each step of a stepwise row; its last token bears the label of the step.

    Attributes:
        events: Rows in which something noteworthy happened, by the names in `EVENTS`.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        chat_template: str | Path | None = None,
        template_date: str | None = None,
        max_length: int | None = None,
        max_prompt_length: int | None = None,
        truncation: Truncation = "keep_start",
        step_separator: str = "\n",
    ) -> None:
        if not tokenizer.is_fast:
            raise ValueError(
                f"{type(tokenizer).__name__} is not backed by the `tokenizers` library, which gives the position of each token "
                "in the text. Convert it to a fast tokenizer (AutoTokenizer does so by default)."
            )
        if tokenizer.eos_token_id is None:
            raise ValueError("The tokenizer has no EOS token, so that no response could end. Set `tokenizer.eos_token`.")
        if not step_separator:
            raise ValueError("`step_separator` must not be empty: its last token bears the label of a step.")
        self.limits = Limits(max_length=max_length, max_prompt_length=max_prompt_length, truncation=truncation)
        self.events: Counter[str] = Counter()
        self._template = ChatTemplate(tokenizer, chat_template, template_date)
        self._step_separator = step_separator
        self._special_tokens = dict(tokenizer.special_tokens_map)
        self._eos: int = tokenizer.eos_token_id
        self._bos: int | None = tokenizer.bos_token_id
        self._adds_bos = self._bos is not None and tokenizer("a")["input_ids"][:1] == [self._bos]
        self._backend = _bare(tokenizer.backend_tokenizer)

    def __call__(self, row: Row, row_id: int) -> PromptGroup:
        """The group of one row.

        Raises:
            RowError: If the row cannot be rendered, has no response, or would be left with an empty one.
        """
        rendering = self._render(row)
        return self._group(row, row_id, rendering, self._encode([rendering.prompt, *rendering.wholes]))

    def tokenize_rows(self, rows: Iterable[tuple[int, Row]]) -> Iterator[PromptGroup | RowError]:
        """The group of each (row_id, row), or why there is none; the same as one by one, at the speed of batches."""
        remaining = iter(rows)
        while chunk := list(islice(remaining, _ROWS_PER_BATCH)):
            renderings = [_result_or_error(self._render, row) for _, row in chunk]
            texts = [t for r in renderings if isinstance(r, Rendering) for t in (r.prompt, *r.wholes)]
            encodings = iter(self._encode(texts))
            for (row_id, row), rendering in zip(chunk, renderings, strict=True):
                if isinstance(rendering, RowError):
                    yield rendering
                else:
                    own = list(islice(encodings, 1 + len(rendering.wholes)))
                    yield _result_or_error(self._group, row, row_id, rendering, own)

    def prompt_ids(self, row: Row) -> np.ndarray[Any, np.dtype[np.int32]]:
        """Prompt token ids of a row with or without responses, [P], as the model is given them for generation."""
        text = render_prompt(row, self._template)
        ids = self._with_start(self._encode([text])[0].ids, is_templated=not isinstance(row.prompt, str))
        return np.array(self.limits.cut_prompt(ids, row.place, keeps_first=ids[0] == self._bos), dtype=np.int32)

    def digest(self) -> str:
        """Identifies everything that the token ids of a row depend on, the row itself apart."""
        settings = [
            _RULES_VERSION,
            self._special_tokens,
            self._adds_bos,
            self._template.text,
            self._template.day,
            [self.limits.max_length, self.limits.max_prompt_length, self.limits.truncation],
            self._step_separator,
        ]
        return hashlib.sha256((json.dumps(settings, sort_keys=True) + self._backend.to_str()).encode()).hexdigest()

    def _encode(self, texts: list[str]) -> list[Encoding]:
        return self._backend.encode_batch(texts, add_special_tokens=False)

    def _render(self, row: Row) -> Rendering:
        if not row.responses and row.steps is None:
            raise RowError(
                "no_response",
                row.place,
                "",
                "a prompt without a response",
                "a row to learn from",
                "Prompt-only rows are for generation; add `completion`, or `chosen` and `rejected`.",
            )
        return render_row(row, self._template, self._step_separator)

    def _group(self, row: Row, row_id: int, rendering: Rendering, encodings: Sequence[Encoding]) -> PromptGroup:
        split = self._split(rendering, encodings)
        texts = [whole[split.skipped_characters :] for whole in rendering.wholes]
        pairs = zip(split.bodies, texts, strict=True)
        responses = [self._closed(body, text, split.skipped_tokens, row.place) for body, text in pairs]
        cut = self.limits.apply(split.prompt, responses, row.place, keeps_first=split.prompt[0] == self._bos)
        events = split.events + ["truncated_prompt"] * cut.cut_prompt + ["truncated_response"] * cut.cut_response
        if row.ranks is not None:
            when = " after truncation" if cut.cut_response else " after tokenisation"
            events += ["identical_pair"] * bool(check_distinct(cut.responses, row.ranks, row.place, when))
        if any(message["role"] != "assistant" for r in row.responses if not isinstance(r, str) for message in r):
            events.append("user_turn_in_response")
        steps = _steps(row, rendering, split, len(cut.responses[0])) if row.steps is not None else None
        self.events.update(events)
        return PromptGroup(
            row_id=row_id,
            prompt=np.array(cut.prompt, dtype=np.int32),
            responses=tuple(np.array(response, dtype=np.int32) for response in cut.responses),
            source=row.source,
            ranks=row.ranks,
            scores=row.scores,
            labels=row.labels,
            margin=row.margin,
            step_ends=None if steps is None else (tuple(end for end, _ in steps),),
            step_labels=None if steps is None else (tuple(label for _, label in steps),),
        )

    def _split(self, rendering: Rendering, encodings: Sequence[Encoding]) -> _Split:
        """Prompt and responses such that prompt + response are the tokens of the whole, but for BOS and EOS."""
        alone, bodies = encodings[0].ids, encodings[1:]
        events: list[str] = []
        skipped_tokens, skipped_characters = len(alone), 0
        if not rendering.extends_prompt or any(body.ids[: len(alone)] != alone for body in bodies):
            events.append("merged_boundary" if rendering.extends_prompt else "template_not_prefix")
            skipped_tokens = _tokens_inside(bodies, rendering.boundary)
        if alone and not skipped_tokens:
            events = ["split_boundary"]
            skipped_characters = rendering.boundary
            prompt = self._encode([rendering.wholes[0][: rendering.boundary]])[0].ids
            bodies = self._encode([whole[rendering.boundary :] for whole in rendering.wholes])
        else:
            # A text without a prompt may bring its own BOS.
            skipped_tokens += not alone and all(body.ids[:1] == [self._bos] for body in bodies)
            prompt = bodies[0].ids[:skipped_tokens]
        prompt = self._with_start(prompt, is_templated=rendering.is_templated)
        if prompt[:2] == [self._bos] * 2:
            events.append("double_bos")
        return _Split(prompt, bodies, skipped_tokens, skipped_characters, events)

    def _with_start(self, prompt: list[int], *, is_templated: bool) -> list[int]:
        """The prompt with the token that has to precede it, which is not put there twice."""
        if not prompt:
            return [self._eos if self._bos is None else self._bos]
        adds = self._adds_bos and not is_templated and prompt[0] != self._bos
        return [self._bos, *prompt] if adds and self._bos is not None else prompt

    def _closed(self, body: Encoding, text: str, skipped_tokens: int, place: Place) -> list[int]:
        """The tokens after the first `skipped_tokens`, with one EOS at their end instead of any EOS and blanks there."""
        ids = body.ids[skipped_tokens:]
        text_end = len(text)
        for i in [i for i, token in enumerate(ids) if token == self._eos][::-1]:
            start, end = body.token_to_chars(skipped_tokens + i) or (0, 0)
            if text[end:text_end].strip():
                break
            del ids[i:]
            text_end = start
        if not ids:
            raise RowError("empty_response", place, "", "a response of no tokens", "at least one token before EOS")
        return [*ids, self._eos]


def _steps(row: Row, rendering: Rendering, split: _Split, size: int) -> list[tuple[int, bool]]:
    """End and label of each step that lies within the first `size` tokens of the response."""
    starts = [start for start, _ in split.bodies[0].offsets]
    # The tokens of one character all begin where it begins; the last of them completes it.
    ends = [bisect_right(starts, end - split.skipped_characters) - 1 - split.skipped_tokens for end in rendering.step_ends]
    if len(set(ends)) < len(ends) or ends[0] < 0:
        finding = "steps that share a token"
        raise RowError("merged_steps", row.place, "completions", finding, "steps that end in tokens of their own")
    kept = [(end, step.label) for end, step in zip(ends, row.steps or (), strict=True) if end < size]
    if not kept:
        finding = f"a first step that ends beyond the {size} tokens that truncation leaves"
        raise RowError("empty_response", row.place, "completions", finding, "at least one whole step")
    return kept


def _bare(backend: Tokenizer) -> Tokenizer:
    """A copy that adds nothing, cuts nothing, and tells where each token lies in the text to the character."""
    bare: Tokenizer = Tokenizer.from_str(backend.to_str())
    bare.no_truncation()
    bare.no_padding()
    # Byte-level post-processors trim white space off the positions; special tokens are put in by this module.
    bare.post_processor = None
    return bare


def _tokens_inside(encodings: Sequence[Encoding], boundary: int) -> int:
    """Number of tokens that all texts begin with and that lie before the character `boundary`."""
    inside = [next((i for i, (_, end) in enumerate(e.offsets) if end > boundary), len(e.ids)) for e in encodings]
    first = encodings[0].ids[: min(inside)]
    return min(common_prefix_length(first, encoding.ids) for encoding in encodings)


def _result_or_error(function: Callable[_P, _T], *args: _P.args, **kwargs: _P.kwargs) -> _T | RowError:
    try:
        return function(*args, **kwargs)
    except RowError as error:
        return error
