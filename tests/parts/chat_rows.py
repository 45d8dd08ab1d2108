"""Chat templates of every kind, and rows to render with them: shared by the tests of rendering and tokenisation."""

from __future__ import annotations

from typing import Any

from lightning_pref.data.formats import parse_row
from lightning_pref.data.groups import PromptGroup
from lightning_pref.data.rows import Place, Row

PLACE = Place("pairs.jsonl", 17)
PLAIN_TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
NEWLINE_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
# Opens the answer with a line for thoughts, which finished conversations do not have.
THINKING_TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|><think>\n{% endif %}"
)
NO_EOS_TEMPLATE = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
)


def row_of(**columns: object) -> Row:
    return parse_row(columns, PLACE)


def said(*turns: str) -> list[dict[str, str]]:
    """User and assistant in turn."""
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(turns)]


def answer(text: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": text}]


def texts(tokenizer: Any, group: PromptGroup) -> tuple[str, list[str]]:  # Any: a tokenizer
    return tokenizer.decode(group.prompt), [tokenizer.decode(response) for response in group.responses]


CHAT = row_of(prompt=said("What color is the sky?"), chosen=answer("blue"), rejected=answer("It is red."))
