"""What two sequences share at their start, and the prompt of a pair whose sides both repeat it."""

from __future__ import annotations

from collections.abc import Sequence

from lightning_pref.data.messages import check_answer
from lightning_pref.data.rows import Messages, Place, RowError

# Sentence marks of scripts that put no spaces between words.
_FULL_WIDTH_MARKS = "\u3001\u3002\uff01\uff0c\uff1a\uff1b\uff1f"


def common_prefix_length(first: Sequence[object], second: Sequence[object]) -> int:
    """Length of the longest common start.

    >>> common_prefix_length("The sky", "The sea")
    5
    """
    longest = min(len(first), len(second))
    if first[:longest] == second[:longest]:
        return longest
    return next(i for i in range(longest) if first[i] != second[i])


def split_text(chosen: str, rejected: str) -> tuple[str, str, str]:
    r"""Prompt, chosen and rejected response of two texts that begin alike.

    The common beginning is cut back to the last white space in it, so that neither the first word of an answer nor a
    composed character is torn apart. A blank stays with the response, as tokenizers attach it to the word behind it; a line
    break stays with the prompt. The mark before an answer in a script without spaces ends the prompt as well. At least one
    character is left on each side.

    >>> split_text("The sky is blue.", "The sky is bluish.")
    ('The sky is', ' blue.', ' bluish.')
    >>> split_text("Q: Ready?\nYes", "Q: Ready?\nYes, I am")
    ('Q: Ready?\n', 'Yes', 'Yes, I am')
    """
    shared = min(common_prefix_length(chosen, rejected), len(chosen) - 1, len(rejected) - 1)
    cut = next((i for i in range(shared, 0, -1) if _separates(chosen[i - 1])), 0)
    if cut and _joins_next_word(chosen[cut - 1]):
        cut -= 1
    return chosen[:cut], chosen[cut:], rejected[cut:]


def split_messages(chosen: Messages, rejected: Messages, place: Place) -> tuple[Messages, Messages, Messages]:
    """Prompt, chosen and rejected response of two conversations that begin alike.

    The prompt is the longest common run of messages after which both sides go on with the assistant.
    """
    shared = common_prefix_length(chosen, rejected)
    longest = min(shared, len(chosen) - 1, len(rejected) - 1)
    answers = (i for i in range(longest, 0, -1) if chosen[i]["role"] == rejected[i]["role"] == "assistant")
    cut = next(answers, 0)
    if not cut:
        raise RowError(
            "prompts_differ", place, "chosen", f"conversations that agree on their first {shared} messages only",
            "`chosen` and `rejected` to begin with the same messages, followed by an answer of the assistant on each side",
        )  # fmt: skip
    for field, messages in (("chosen", chosen), ("rejected", rejected)):
        check_answer(messages[cut:], field, place)
    return chosen[:cut], chosen[cut:], rejected[cut:]


def _separates(character: str) -> bool:
    return character.isspace() or character in _FULL_WIDTH_MARKS


def _joins_next_word(character: str) -> bool:
    return character.isspace() and character not in "\r\n"
