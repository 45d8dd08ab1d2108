"""Checks of text and messages as they come out of a file."""

from __future__ import annotations

from collections.abc import Mapping

from lightning_pref.data.rows import Message, Messages, Place, RowError, describe

ROLES = ("system", "developer", "user", "assistant", "tool")


def checked_prompt(value: object, field: str, place: Place) -> str | Messages:
    """A prompt that is text or messages, not empty."""
    if isinstance(value, list | tuple):
        return checked_messages(value, field, place)
    if not isinstance(value, str):
        raise RowError("wrong_type", place, field, describe(value), "text or a list of messages")
    if not value:
        raise RowError(
            "empty_prompt", place, field, "an empty string", "text or a list of messages",
            "Text without a prompt belongs in a column `text`; otherwise fix or remove the row, or set `on_bad_row: skip`.",
        )  # fmt: skip
    return value


def checked_response(value: object, field: str, place: Place, *, conversational: bool) -> str | Messages:
    """A response in the form of its prompt; a text that answers a conversation is the assistant's message."""
    if isinstance(value, str):
        if not value.strip():
            raise RowError("empty_response", place, field, _blank(value), "text or a list of messages")
        return [{"role": "assistant", "content": value}] if conversational else value
    if not isinstance(value, list | tuple):
        raise RowError("wrong_type", place, field, describe(value), "text or a list of messages")
    if not value:
        raise RowError("empty_response", place, field, "an empty list", "text or a list of messages")
    if not conversational:
        raise RowError(
            "mixed_forms", place, field, "messages although the prompt is text", "both as text or both as messages",
            "Write the prompt as [{\"role\": \"user\", \"content\": ...}], or leave it out if the responses repeat it.",
        )  # fmt: skip
    messages = checked_messages(value, field, place)
    check_answer(messages, field, place)
    return messages


def check_answer(messages: Messages, field: str, place: Place) -> None:
    """A response must begin and end with the assistant, and say something at the end."""
    for index in (0, len(messages) - 1):
        if messages[index]["role"] != "assistant":
            role = messages[index]["role"]
            raise RowError(
                "not_an_answer", place, f"{field}[{index}].role", f"the role '{role}'",
                "a response that begins and ends with a message of the role 'assistant'",
                "Move what the user or the system says into `prompt`; or remove the row, or set `on_bad_row: skip`.",
            )  # fmt: skip
    content = messages[-1].get("content", "")
    text = content if isinstance(content, str) else "".join(block["text"] for block in content)
    if not text.strip() and not messages[-1].get("tool_calls"):
        raise RowError("empty_response", place, f"{field}[{len(messages) - 1}].content", _blank(text), "text")


def checked_messages(value: object, field: str, place: Place) -> Messages:
    """At least one message, each with a known role and text content; keys that are null are left out."""
    if not isinstance(value, list | tuple):
        raise RowError("wrong_type", place, field, describe(value), "a list of messages")
    if not value:
        raise RowError("empty_messages", place, field, "an empty list", "at least one message")
    return [_checked_message(message, f"{field}[{index}]", place) for index, message in enumerate(value)]


def without_nulls(value: object) -> object:
    """The same JSON without the null keys that a columnar file adds where rows differ in their keys."""
    if isinstance(value, Mapping):
        return {key: without_nulls(item) for key, item in value.items() if item is not None}
    if isinstance(value, list | tuple):
        return [without_nulls(item) for item in value]
    return value


def _checked_message(value: object, field: str, place: Place) -> Message:
    if not isinstance(value, Mapping):
        raise RowError("wrong_type", place, field, describe(value), "a message with the keys `role` and `content`")
    role = value.get("role")
    if role is None:
        raise RowError("missing_key", place, field, describe(value), "a message with the keys `role` and `content`")
    if not isinstance(role, str) or role not in ROLES:
        raise RowError("unknown_role", place, f"{field}.role", describe(role), f"one of {', '.join(ROLES)}")
    message: Message = {key: without_nulls(item) for key, item in value.items() if item is not None}
    content = message.get("content")
    if content is None:
        if not message.get("tool_calls"):
            raise RowError("missing_key", place, field, "no `content`", "text content (or `tool_calls`)")
    elif isinstance(content, list):
        _check_blocks(content, f"{field}.content", place)
    elif not isinstance(content, str):
        raise RowError("wrong_type", place, f"{field}.content", describe(content), "text or a list of text blocks")
    return message


def _check_blocks(blocks: list[object], field: str, place: Place) -> None:
    for index, block in enumerate(blocks):
        if not isinstance(block, Mapping) or block.get("type") != "text" or not isinstance(block.get("text"), str):
            kind = block.get("type") if isinstance(block, Mapping) else None
            finding = f"a block of type {describe(kind)}" if isinstance(kind, str) else describe(block)
            expectation = 'text blocks {"type": "text", "text": ...}: only text can be trained on'
            raise RowError("unsupported_content", place, f"{field}[{index}]", finding, expectation)


def _blank(text: str) -> str:
    return "only white space" if text else "an empty string"
