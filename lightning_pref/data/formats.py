"""Any accepted row, recognised by its columns, becomes a `Row`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from functools import lru_cache
from typing import Any

from lightning_pref.data.fields import checked_boolean, checked_list, checked_number, checked_rank, decoded_json
from lightning_pref.data.messages import (
    check_answer,
    checked_messages,
    checked_prompt,
    checked_response,
    without_nulls,
)
from lightning_pref.data.prefixes import split_messages, split_text
from lightning_pref.data.rows import FIX_OR_SKIP, Messages, Place, Row, RowError, Step, describe


@dataclass(frozen=True)
class RowType:
    """A kind of row: the columns it must and may have (besides `SHARED_COLUMNS`), and how it is read."""

    required: frozenset[str]
    parse: Callable[[Mapping[str, object], Place], Row]
    optional: frozenset[str] = frozenset()


# A file may have any number of columns of any name, and a message names the first of them.
_SHOWN_COLUMNS = 12
_SHOWN_CHARACTERS = 40

SHARED_COLUMNS = frozenset({"tools", "chat_template_kwargs", "source"})


def parse_row(raw: object, place: Place) -> Row:
    """The checked row that `raw` stands for.

    Args:
        raw: The columns of one row; a `RowError` in its place (the reader could not read the row) is raised.
        place: File and row, for messages.

    Raises:
        RowError: If the columns belong to no row type, or a value is not what its column needs.

    >>> row = parse_row({"prompt": "2 + 2 =", "completion": " 4"}, Place("sums.jsonl", 1))
    >>> row.prompt, row.responses
    ('2 + 2 =', (' 4',))
    """
    if isinstance(raw, RowError):
        raise raw
    if not isinstance(raw, Mapping) or not all(isinstance(name, str) for name in raw):
        raise RowError("not_an_object", place, "", describe(raw), "an object with named columns")
    present = frozenset(name for name in raw if raw[name] is not None)
    finding = _recognise(present)
    if finding not in ROW_TYPES:
        nulls = sorted(name for name in TYPED_COLUMNS - present if name in raw)
        finding += f" (null counts as absent: {', '.join(nulls)})" if nulls else ""
        raise RowError(
            "unknown_columns", place, "", finding, "the columns of one row type",
            "Rename or choose columns with `columns: {name here: name in the file}`; the row types are: "
            + "; ".join(_summary(name) for name in _nearest_types(present)) + ".",
        )  # fmt: skip
    _check_spelling(present, finding, place)
    row = ROW_TYPES[finding].parse(raw, place)
    return replace(row, **_shared(raw, place)) if present & SHARED_COLUMNS else row


def _preference(raw: Mapping[str, object], place: Place) -> Row:
    chosen, rejected = raw["chosen"], raw["rejected"]
    prompt = raw.get("prompt")
    # Some datasets repeat the question as text beside two whole conversations: those hold the prompt.
    if prompt is None or (isinstance(prompt, str) and _is_conversation(chosen) and _is_conversation(rejected)):
        _check_differ(chosen, rejected, place)
        prompt, chosen, rejected = _split(chosen, rejected, place)
    else:
        prompt = checked_prompt(prompt, "prompt", place)
    conversational = isinstance(prompt, list)
    responses = (
        checked_response(chosen, "chosen", place, conversational=conversational),
        checked_response(rejected, "rejected", place, conversational=conversational),
    )
    _check_differ(*responses, place)
    margin = None if raw.get("margin") is None else checked_number(raw["margin"], "margin", place)
    return Row(place=place, prompt=prompt, responses=responses, ranks=(0, 1), margin=margin)


def _prompt_only(raw: Mapping[str, object], place: Place) -> Row:
    return Row(place=place, prompt=checked_prompt(raw["prompt"], "prompt", place))


def _prompt_completion(raw: Mapping[str, object], place: Place) -> Row:
    prompt = checked_prompt(raw["prompt"], "prompt", place)
    response = checked_response(raw["completion"], "completion", place, conversational=isinstance(prompt, list))
    return Row(place=place, prompt=prompt, responses=(response,))


def _unpaired(raw: Mapping[str, object], place: Place) -> Row:
    return replace(_prompt_completion(raw, place), labels=(checked_boolean(raw["label"], "label", place),))


def _stepwise(raw: Mapping[str, object], place: Place) -> Row:
    prompt = checked_prompt(raw["prompt"], "prompt", place)
    texts = checked_list(raw["completions"], "completions", place)
    labels = checked_list(raw["labels"], "labels", place, like=("completions", len(texts)))
    steps = []
    for i, (text, label) in enumerate(zip(texts, labels, strict=True)):
        if not isinstance(text, str):
            raise RowError("wrong_type", place, f"completions[{i}]", describe(text), "the text of a step")
        if not text.strip():
            raise RowError("empty_step", place, f"completions[{i}]", "a blank step", "the text of a step")
        steps.append(Step(text, checked_boolean(label, f"labels[{i}]", place)))
    return Row(place=place, prompt=prompt, steps=tuple(steps))


def _text(raw: Mapping[str, object], place: Place) -> Row:
    if not isinstance(raw["text"], str):
        raise RowError("wrong_type", place, "text", describe(raw["text"]), "text (conversations go into `messages`)")
    return Row(place=place, responses=(checked_response(raw["text"], "text", place, conversational=False),))


def _conversation(raw: Mapping[str, object], place: Place) -> Row:
    messages = checked_messages(raw["messages"], "messages", place)
    if len(messages) < 2:
        raise RowError("no_prompt", place, "messages", "a single message", "a question before the answer")
    check_answer(messages[-1:], "messages", place)
    return Row(place=place, prompt=messages[:-1], responses=(messages[-1:],))


def _ranked_responses(raw: Mapping[str, object], place: Place) -> Row:
    return _ranked_list(raw, "responses", place)


def _scored_completions(raw: Mapping[str, object], place: Place) -> Row:
    return _ranked_list(raw, "completions", place)


def _ranked_list(raw: Mapping[str, object], column: str, place: Place) -> Row:
    """K responses ordered by `ranks`, else by `scores`, else best first."""
    prompt = checked_prompt(raw["prompt"], "prompt", place)
    values = checked_list(raw[column], column, place)
    if len(values) < 2:
        raise RowError("too_few_responses", place, column, describe(values), "two responses or more to compare")
    responses = tuple(
        checked_response(value, f"{column}[{i}]", place, conversational=isinstance(prompt, list))
        for i, value in enumerate(values)
    )
    size = (column, len(values))
    scores = ranks = None
    if raw.get("scores") is not None:
        entries = checked_list(raw["scores"], "scores", place, like=size)
        scores = tuple(checked_number(value, f"scores[{i}]", place) for i, value in enumerate(entries))
        ranks = _dense([-score for score in scores])
    if raw.get("ranks") is not None:
        entries = checked_list(raw["ranks"], "ranks", place, like=size)
        ranks = _dense([checked_rank(value, f"ranks[{i}]", place) for i, value in enumerate(entries)])
        _check_agree(ranks, scores, place)
    if ranks is None:
        ranks = tuple(range(len(values)))
    if len(set(ranks)) == 1:
        field = "scores" if raw.get("ranks") is None else "ranks"
        raise RowError("no_preference", place, field, "the same value for all responses", "at least one difference")
    check_distinct(responses, ranks, place)
    return Row(place=place, prompt=prompt, responses=responses, ranks=ranks, scores=scores)


ROW_TYPES: dict[str, RowType] = {
    "preference": RowType(frozenset({"chosen", "rejected"}), _preference, frozenset({"prompt", "margin"})),
    "prompt-completion": RowType(frozenset({"prompt", "completion"}), _prompt_completion),
    "unpaired preference": RowType(frozenset({"prompt", "completion", "label"}), _unpaired),
    "stepwise supervision": RowType(frozenset({"prompt", "completions", "labels"}), _stepwise),
    "ranked list": RowType(frozenset({"prompt", "responses"}), _ranked_responses, frozenset({"ranks", "scores"})),
    "scored list": RowType(frozenset({"prompt", "completions", "scores"}), _scored_completions, frozenset({"ranks"})),
    "conversation": RowType(frozenset({"messages"}), _conversation),
    "text": RowType(frozenset({"text"}), _text),
    "prompt-only": RowType(frozenset({"prompt"}), _prompt_only),
}
TYPED_COLUMNS = frozenset().union(*(kind.required | kind.optional for kind in ROW_TYPES.values()))


def check_distinct(responses: Sequence[object], ranks: Sequence[int], place: Place, when: str = "") -> int:
    """Number of pairs (better, worse) of equal responses; raises where no other pair is left.

    Args:
        responses: K responses, as text, messages or token ids.
        ranks: Their ranks.
        place: File and row.
        when: What happened to the responses before they were compared, such as " after truncation".
    """
    ordered = [(i, j) for i in range(len(ranks)) for j in range(i + 1, len(ranks)) if ranks[i] != ranks[j]]
    identical = sum(responses[i] == responses[j] for i, j in ordered)
    if identical == len(ordered) > 0:
        raise RowError(
            "identical_responses", place, "", f"the same text for better and worse responses{when}",
            "responses that differ where their ranks differ",
        )  # fmt: skip
    return identical


@lru_cache(maxsize=1024)
def _recognise(present: frozenset[str]) -> str:
    """Name of the row type of these columns; a phrase about what is wrong where there is none."""
    typed = present & TYPED_COLUMNS
    for name, kind in ROW_TYPES.items():
        if kind.required <= typed <= kind.required | kind.optional:
            return name
    columns = f"the columns {_listed(present)}" if present else "no column with a value"
    complete = [name for name, kind in ROW_TYPES.items() if kind.required <= typed]
    # The completer type hides the ones that it extends: a preference row is no prompt-only row with a surplus.
    rivals = [a for a in complete if not any(ROW_TYPES[a].required < _columns(b) for b in complete if b != a)]
    if len(rivals) > 1:
        return f"{columns}, which fit several row types ({', '.join(rivals)})"
    nearest = _nearest_types(present)[0]
    missing = sorted(ROW_TYPES[nearest].required - typed)
    surplus = sorted(typed - _columns(nearest))
    parts = [f"lacks {', '.join(missing)}"] if missing else []
    parts += [f"has no {', '.join(surplus)}"] if surplus else []
    return f"{columns}; the nearest row type, {nearest}, {' and '.join(parts)}"


def _listed(columns: frozenset[str]) -> str:
    """The first columns by name, as far as a message has room."""
    names = [name if len(name) <= _SHOWN_CHARACTERS else f"{name[:_SHOWN_CHARACTERS]}..." for name in sorted(columns)]
    return ", ".join(names[:_SHOWN_COLUMNS]) + (f" and {len(names) - _SHOWN_COLUMNS} more" if len(names) > _SHOWN_COLUMNS else "")


def _columns(name: str) -> frozenset[str]:
    return ROW_TYPES[name].required | ROW_TYPES[name].optional


def _nearest_types(present: frozenset[str]) -> list[str]:
    """All row types, those first that the fewest columns have to be added to or taken from."""

    def distance(name: str) -> tuple[int, int]:
        kind, typed = ROW_TYPES[name], present & TYPED_COLUMNS
        matched = sum(bool(get_close_matches(column, present, n=1, cutoff=0.8)) for column in kind.required)
        return (len(kind.required) - matched) + len(typed - _columns(name)), -matched

    return sorted(ROW_TYPES, key=distance)


def _summary(name: str) -> str:
    kind = ROW_TYPES[name]
    optional = f" (and perhaps {', '.join(sorted(kind.optional))})" if kind.optional else ""
    return f"{name}: {', '.join(sorted(kind.required))}{optional}"


def _check_spelling(present: frozenset[str], name: str, place: Place) -> None:
    """A column that is nearly an optional column must not be ignored: its author counts on its effect."""
    misspelt = _misspelt(present, name)
    if misspelt:
        found, meant = misspelt
        raise RowError(
            "misspelt_column", place, found, "a column that would be ignored", f"`{meant}`, if that is what is meant",
            "Rename it, or leave it out with `columns: {name here: name in the file}`.",
        )  # fmt: skip


@lru_cache(maxsize=1024)
def _misspelt(present: frozenset[str], name: str) -> tuple[str, str] | None:
    absent = (ROW_TYPES[name].optional | SHARED_COLUMNS) - present
    for column in sorted(present - TYPED_COLUMNS - SHARED_COLUMNS):
        near = get_close_matches(column, sorted(absent), n=1, cutoff=0.85)
        if near:
            return column, near[0]
    return None


def _shared(raw: Mapping[str, object], place: Place) -> dict[str, Any]:  # Any: fields of a Row
    """The columns that any row type may have."""
    found: dict[str, Any] = {}
    tools = decoded_json(raw.get("tools"), "tools", place)
    if tools is not None:
        if not isinstance(tools, list | tuple) or not all(isinstance(tool, Mapping) for tool in tools):
            raise RowError("wrong_type", place, "tools", describe(tools), "a list of JSON schemas, or such a list as JSON text")
        # Some templates write their tool preamble for an empty list too.
        found["tools"] = without_nulls(tools) or None
    settings = decoded_json(raw.get("chat_template_kwargs"), "chat_template_kwargs", place)
    if settings is not None:
        if not isinstance(settings, Mapping) or not all(isinstance(key, str) for key in settings):
            raise RowError("wrong_type", place, "chat_template_kwargs", describe(settings), "an object")
        found["chat_template_kwargs"] = without_nulls(settings)
    source = raw.get("source")
    if source is not None:
        if not isinstance(source, str):
            raise RowError("wrong_type", place, "source", describe(source), "the name of the row's source as text")
        found["source"] = source
    return found


def _is_conversation(value: object) -> bool:
    """Whether a side of a pair is a conversation from its start, not only the answer."""
    return (
        isinstance(value, list | tuple)
        and len(value) > 1
        and isinstance(value[0], Mapping)
        and value[0].get("role") != "assistant"
    )


def _split(chosen: object, rejected: object, place: Place) -> tuple[str | Messages, object, object]:
    if isinstance(chosen, str) and isinstance(rejected, str):
        for field, side in (("chosen", chosen), ("rejected", rejected)):
            checked_response(side, field, place, conversational=False)
        return split_text(chosen, rejected)
    return split_messages(checked_messages(chosen, "chosen", place), checked_messages(rejected, "rejected", place), place)


def _check_differ(chosen: object, rejected: object, place: Place) -> None:
    if chosen == rejected:
        raise RowError("identical_responses", place, "rejected", "the same as in `chosen`", "a different response")


def _dense(keys: Sequence[float]) -> tuple[int, ...]:
    """Ranks from 0 without gaps, the smallest key first; equal keys share one."""
    order = {key: rank for rank, key in enumerate(sorted(set(keys)))}
    return tuple(order[key] for key in keys)


def _check_agree(ranks: Sequence[int], scores: Sequence[float] | None, place: Place) -> None:
    for i, j in ((i, j) for i in range(len(ranks)) for j in range(len(ranks)) if scores and ranks[i] < ranks[j]):
        if scores and scores[i] < scores[j]:
            raise RowError(
                "ranks_contradict_scores", place, "ranks", f"response {i} ranked above {j} with a smaller score",
                "ranks and scores in the same order", f"Leave one of the two columns out. {FIX_OR_SKIP}",
            )  # fmt: skip
