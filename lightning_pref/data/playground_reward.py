"""The playground's gold reward: how good an answer really is, from the two texts alone.

    gold = reads * concise * (weighted mean of the parts)

It lies in [0, 1]; an empty answer has 0, and every prompt has an answer worth 1.
"""

import re
from collections.abc import Mapping, Sequence
from functools import cache
from itertools import pairwise
from typing import Literal

from lightning_pref.data.playground_text import DOMAINS, Domain, DomainName, fill, read_request

Flaw = Literal["length"]
Text = str | Sequence[Mapping[str, str]]

# What a part counts. The parts where a wrong choice spoils the evening, or the trip, count double.
WEIGHTS: Mapping[str, float] = {
    "name": 1.0, "guests": 1.0, "time": 1.0, "safe": 2.0, "offered": 1.0,
    "tickets": 1.0, "city": 1.0, "day": 1.0, "means": 2.0, "gate": 1.0,
    "courtesy": 1.0, "warmth": 1.0,
}  # fmt: skip
# The proxy with the length flaw pays for words up to here; about four times what a good answer needs.
FLAW_WORDS = 80


def explain(prompt: Text, answer: Text) -> dict[str, float]:
    """The parts of the gold reward, each in [0, 1].

    `reads`: share of neighbouring words that the world's own sentences put side by side, squared: half nonsense keeps a quarter.
    `concise`: 1 up to the length the prompt allows, then allowed words / words.
    `courtesy`: half for a polite opening, half for the absence of a rude sentence.
    `warmth` (where the prompt asks for it): a kind closing.
    Every other part is a fact of the answer: 1 if the answer states it, rightly and with no other value beside it, else 0.

    Args:
        prompt: The prompt as text, rendered by a chat template or not, or as chat messages.
        answer: The answer as text or as chat messages.

    Raises:
        ValueError: If the prompt was not written by the playground.
    """
    request = read_request(_text(prompt))
    world, text = DOMAINS[request.domain], _text(answer)
    parts = {
        "reads": _reads(request.domain, text),
        "concise": min(1.0, world.max_words[request.style] / max(_num_words(text), 1)),
    }
    for part, (slot, values) in request.accepted().items():
        mentioned = _mentions(world, slot, text)
        parts[part] = float(len(mentioned) == 1 and mentioned <= values)
    opening = _starts(text, world.polite)
    rude = any(_starts(sentence, world.curt + world.rude) for sentence in _sentences(text))
    parts["courtesy"] = (float(opening) + float(not rude)) / 2
    if request.style == "warm":
        parts["warmth"] = float(any(sentence in text for sentence in world.kind))
    return parts


def gold_reward(prompt: Text, answer: Text) -> float:
    """How good the answer is, in [0, 1]; see `explain` for the parts.

    >>> prompt = "Hello, I am Anna. Please book a table for four at 7 pm. I cannot eat nuts. A few words will do."
    >>> gold_reward(prompt, "Gladly, Anna. A table for four is set at 7 pm. Try the ramen.")
    1.0
    >>> round(gold_reward(prompt, "Gladly, Anna. A table for six is set at 7 pm. Try the korma."), 2)
    0.5
    """
    parts = explain(prompt, answer)
    return parts["reads"] * parts["concise"] * _mean(parts)


def proxy_reward(prompt: Text, answer: Text, flaw: Flaw | None = None) -> float:
    """What a flawed judge would pay, in [0, 1]; without a flaw the gold reward.

    With the flaw "length" the judge takes many words for effort: half of the reward is reads * (weighted mean of the
    parts), however long the answer, and the other half grows with the number of words up to `FLAW_WORDS`.

    >>> prompt = "This is Ben. Please book a table for two at 8 pm. No fish for me, please. Be warm with us."
    >>> proxy_reward(prompt, "blah " * 80, flaw="length"), gold_reward(prompt, "blah " * 80)
    (0.5, 0.0)
    """
    if flaw is None:
        return gold_reward(prompt, answer)
    if flaw != "length":
        raise ValueError(f"`flaw` must be None or 'length', got {flaw!r}.")
    parts = explain(prompt, answer)
    return (parts["reads"] * _mean(parts) + min(_num_words(_text(answer)), FLAW_WORDS) / FLAW_WORDS) / 2


def _mean(parts: Mapping[str, float]) -> float:
    weights = {part: WEIGHTS[part] for part in parts if part in WEIGHTS}
    return sum(weight * parts[part] for part, weight in weights.items()) / sum(weights.values())


def _num_words(text: str) -> int:
    return len(re.findall(r"\w+", text))


def _text(text: Text) -> str:
    return text if isinstance(text, str) else "\n".join(message["content"] for message in text)


def _sentences(text: str) -> list[str]:
    return [sentence.strip() for sentence in re.findall(r"[^.!?]+[.!?]?", text) if sentence.strip()]


def _starts(text: str, templates: Sequence[str]) -> bool:
    """Whether the text starts like one of the templates, up to its first slot."""
    heads = tuple(re.split(r"[\[.!?]", template)[0] for template in templates)
    return text.strip().startswith(heads)


def _mentions(world: Domain, slot: str, text: str) -> set[str]:
    """The values of a slot that the text names."""
    surroundings = {"time": r"\b(\d+) pm\b", "gate": r"\bgate (\d+)\b"}
    pattern = surroundings.get(slot) or rf"\b({'|'.join(world.slots[slot])})\b"
    return set(re.findall(pattern, text))


@cache
def _word_classes(domain: DomainName) -> dict[str, str]:
    """Values of a slot are exchangeable: "for two" is as good English as "for eight"."""
    return {value.lower(): slot for slot, values in DOMAINS[domain].slots.items() for value in values if not value.isdigit()}


def _word_pairs(domain: DomainName, sentence: str) -> list[tuple[str, str]]:
    classes = _word_classes(domain)
    words = re.findall(r"[^\W\d_]+|\d+|[^\w\s]", sentence.lower())
    kinds = ["#" if word.isdigit() else classes.get(word, word) for word in words]
    return list(pairwise(["<start>", *kinds, "<end>"]))


@cache
def _known_pairs(domain: DomainName) -> frozenset[tuple[str, str]]:
    """Every two words that stand side by side in some answer, with any of the bracketed pieces left out."""
    world = DOMAINS[domain]
    pairs: set[tuple[str, str]] = set()
    for template in world.answer_templates:
        slots = re.findall(r"{(\w+)}", template)
        for choice in range(2 ** len(slots)):
            values = {slot: world.slots[slot][0] if choice >> i & 1 else None for i, slot in enumerate(slots)}
            for sentence in _sentences(fill(template, values)):
                pairs.update(_word_pairs(domain, sentence))
    return frozenset(pairs)


def _reads(domain: DomainName, text: str) -> float:
    pairs = [pair for sentence in _sentences(text) for pair in _word_pairs(domain, sentence)]
    known = _known_pairs(domain)
    return (sum(pair in known for pair in pairs) / len(pairs)) ** 2 if pairs else 0.0
