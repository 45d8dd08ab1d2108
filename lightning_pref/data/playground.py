"""The playground: an offline, endless, readable preference world whose true reward is known.

People book a table ("kitchen") or a trip ("travel"); an assistant answers, more or less carefully. Rows come in TRL's
formats and are a function of (seed, split, index), so that any number of them can be written again at any time.
"""

from collections.abc import Iterator
from random import Random
from typing import Any, Literal
from zlib import crc32

from lightning_pref.data.playground_reward import Flaw, explain, gold_reward, proxy_reward
from lightning_pref.data.playground_text import (
    DOMAINS,
    DomainName,
    Mark,
    Request,
    draw_marks,
    draw_request,
    write_answer,
    write_context,
    write_request,
)

__all__ = ["Flaw", "RowKind", "Split", "explain", "gold_reward", "playground_rows", "proxy_reward"]

RowKind = Literal["sft", "preference", "unpaired", "ranked", "prompts"]
Split = Literal["train", "val"]

# Care of a demonstration is uniform between these, so that a model of the demonstrations is far from the best attainable.
CARE = (0.3, 0.95)
# Two answers closer than this are a tie: no person would prefer one.
MIN_GAP = 0.02
# A demonstration is about as often above as below.
DESIRABLE = 0.7
# Responses of a "ranked" row where the caller does not say.
NUM_RANKED = 4
# One request in ten belongs to the validation split.
VAL_SHARE = 10


def playground_rows(
    kind: RowKind,
    num_rows: int,
    seed: int = 0,
    *,
    domain: DomainName | Literal["both"] = "both",
    split: Split = "train",
    noise: float = 0.0,
    long_prompts: float = 0.3,
    num_responses: int | None = None,
    conversational: bool = True,
    flaw: Flaw | None = None,
) -> Iterator[dict[str, Any]]:  # Any: values are texts, lists of messages, labels or scores, by kind
    """Write rows of the playground; the first rows of a longer run are the rows of a shorter one.

    Args:
        kind: "sft" (demonstrations of mixed quality), "preference", "unpaired", "ranked" or "prompts".
        num_rows: Number of rows.
        seed: Another seed gives other rows from the same world.
        domain: "kitchen", "travel", or "both" in turns. A row names its domain in `source`.
        split: "train" or "val"; no request of one is ever in the other, whatever the seeds.
        noise: Probability, in [0, 1], that a pair is swapped, a label flipped, or a row's scores reversed.
        long_prompts: Share of prompts, in [0, 1], with a long context in front.
        num_responses: Responses of a "ranked" row, 4 if not given.
        conversational: Chat messages; else plain strings.
        flaw: Order and score "preference" and "ranked" rows by the proxy reward with this flaw, not by the gold reward.
    """
    _check_names(kind, domain, split)
    _check_settings(kind, noise, long_prompts, num_responses, flaw)

    def row(index: int) -> dict[str, Any]:  # Any: as above
        name: DomainName = ("kitchen", "travel")[index % 2] if domain == "both" else domain
        rng = Random(f"{seed}/{split}/{name}/{index}")
        request = _draw(name, split, rng.random() < long_prompts, rng)
        prompt = (write_context(request, rng), write_request(request, rng))
        answers = _answers(kind, request, " ".join(prompt), num_responses or NUM_RANKED, flaw, rng)
        # A generator of its own, so that noise changes labels and no text.
        is_noisy = Random(f"noise/{seed}/{split}/{name}/{index}").random() < noise
        return {**_row(kind, prompt, answers, is_noisy, conversational), "source": name}

    return map(row, range(num_rows))


def _check_names(kind: str, domain: str, split: str) -> None:
    known = {
        "kind": (kind, ("sft", "preference", "unpaired", "ranked", "prompts")),
        "domain": (domain, (*DOMAINS, "both")),
        "split": (split, ("train", "val")),
    }
    for name, (value, choices) in known.items():
        if value not in choices:
            raise ValueError(f"`{name}` of playground rows must be one of {', '.join(choices)}; got {value!r}.")


def _check_settings(kind: RowKind, noise: float, long_prompts: float, num_responses: int | None, flaw: Flaw | None) -> None:
    for name, share in (("noise", noise), ("long_prompts", long_prompts)):
        if not 0 <= share <= 1:
            raise ValueError(f"`{name}` must be in [0, 1], got {share!r}.")
    if noise and kind in ("sft", "prompts"):
        raise ValueError(f"`noise` flips labels, and rows of kind {kind!r} have none; leave it at 0.")
    if flaw not in (None, "length"):
        raise ValueError(f"`flaw` must be None or 'length', got {flaw!r}.")
    if flaw and kind not in ("preference", "ranked"):
        raise ValueError(f"`flaw` changes how answers are compared, and rows of kind {kind!r} compare none; leave it at None.")
    if num_responses is not None and kind != "ranked":
        raise ValueError(f"`num_responses` is for rows of kind 'ranked'; {kind!r} has its own number, leave it out.")
    if num_responses is not None and num_responses < 2:
        raise ValueError(f"`num_responses` must be at least 2, got {num_responses!r}.")


def _draw(domain: DomainName, split: Split, long: bool, rng: Random) -> Request:
    while True:
        request = draw_request(domain, long, rng)
        # By what is asked, not by how: no rewording of a training request is held out.
        key = crc32(repr((domain, sorted(request.facts.items()), request.style)).encode())
        if (key % VAL_SHARE == 0) == (split == "val"):
            return request


def _answers(
    kind: RowKind, request: Request, prompt: str, num_responses: int, flaw: Flaw | None, rng: Random
) -> list[tuple[str, float]]:
    """Answers with their rewards; the two of a pair differ, the better one first."""

    def judged(marks: dict[str, Mark], wording: str) -> tuple[str, float]:
        answer = write_answer(request, marks, Random(wording))
        return answer, proxy_reward(prompt, answer, flaw)

    def draw() -> tuple[dict[str, Mark], str]:
        return draw_marks(request, rng.uniform(*CARE), rng), str(rng.random())

    num_answers = {"sft": 1, "unpaired": 1, "ranked": num_responses, "prompts": 0, "preference": 0}[kind]
    if kind != "preference":
        return [judged(*draw()) for _ in range(num_answers)]
    is_slight = rng.random() < 0.5
    while True:
        marks, wording = draw()
        other = (_spoil(marks, rng), wording) if is_slight else draw()
        pair = sorted([judged(marks, wording), judged(*other)], key=lambda answer: -answer[1])
        if pair[0][1] - pair[1][1] >= MIN_GAP:
            return pair


def _spoil(marks: dict[str, Mark], rng: Random) -> dict[str, Mark]:
    """The same answer with one more part done wrong."""
    part = rng.choice(list(marks))
    return {**marks, part: "wrong"}


def _row(
    kind: RowKind, prompt: tuple[str, str], answers: list[tuple[str, float]], is_noisy: bool, conversational: bool
) -> dict[str, Any]:  # Any: as in `playground_rows`
    context, question = prompt
    asked: object
    if conversational:
        system = [{"role": "system", "content": context}] if context else []
        asked = [*system, {"role": "user", "content": question}]
        texts: list[object] = [[{"role": "assistant", "content": text}] for text, _ in answers]
    else:
        asked = f"{context}\n{question}\n" if context else f"{question}\n"
        texts = [text for text, _ in answers]
    scores = [score for _, score in answers]
    if kind == "preference":
        chosen, rejected = reversed(texts) if is_noisy else texts
        return {"prompt": asked, "chosen": chosen, "rejected": rejected}
    if kind == "unpaired":
        return {"prompt": asked, "completion": texts[0], "label": (scores[0] >= DESIRABLE) != is_noisy}
    if kind == "ranked":
        return {"prompt": asked, "responses": texts, "scores": scores[::-1] if is_noisy else scores}
    return {"prompt": asked} | ({"completion": texts[0]} if kind == "sft" else {})
