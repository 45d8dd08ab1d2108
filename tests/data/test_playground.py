import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import pytest

from lightning_pref.data.playground import RowKind, gold_reward, playground_rows, proxy_reward
from lightning_pref.data.playground_text import DOMAINS, read_request

KINDS: tuple[RowKind, ...] = ("sft", "preference", "unpaired", "ranked", "prompts")
LABELLED: tuple[RowKind, ...] = ("preference", "unpaired", "ranked")


def words(row: Mapping[str, Any]) -> str:
    return json.dumps(row["prompt"])


def asked(row: Mapping[str, Any]) -> tuple[object, ...]:
    request = read_request("\n".join(message["content"] for message in row["prompt"]))
    return request.domain, tuple(sorted(request.facts.items())), request.style


def three_sigma(share: float, num_rows: int) -> float:
    return 3 * math.sqrt(share * (1 - share) / num_rows)


@pytest.mark.parametrize("kind", KINDS)
def test_rows_are_a_function_of_their_arguments_and_a_prefix_of_a_longer_run(kind: RowKind) -> None:
    rows = list(playground_rows(kind, 20, seed=3))
    assert rows == list(playground_rows(kind, 30, seed=3))[:20]
    assert all(row != other for row, other in zip(rows, playground_rows(kind, 20, seed=4), strict=True))


def test_a_published_row_never_changes() -> None:
    (row,) = playground_rows("sft", 1, seed=0, long_prompts=0.0)
    request = "Hello, I am Jonas. Please book a table for seven at 9 pm. No meat for me, please. A few words will do."
    answer = "Your table for seven will be ready at 9 pm. The noodles will suit you."
    assert row == {
        "prompt": [{"role": "user", "content": request}],
        "completion": [{"role": "assistant", "content": answer}],
        "source": "kitchen",
    }


@pytest.mark.parametrize(
    ("kind", "columns"),
    [
        ("sft", {"prompt", "completion"}),
        ("preference", {"prompt", "chosen", "rejected"}),
        ("unpaired", {"prompt", "completion", "label"}),
        ("ranked", {"prompt", "responses", "scores"}),
        ("prompts", {"prompt"}),
    ],
)
def test_columns_are_those_of_the_format(kind: RowKind, columns: set[str]) -> None:
    assert all(set(row) == columns | {"source"} for row in playground_rows(kind, 4))


def test_plain_rows_hold_the_same_words_as_conversational_ones() -> None:
    chats = playground_rows("preference", 20, long_prompts=0.5)
    plain = playground_rows("preference", 20, long_prompts=0.5, conversational=False)
    for chat, text in zip(chats, plain, strict=True):
        assert text["prompt"] == "".join(f"{message['content']}\n" for message in chat["prompt"])
        assert text["chosen"] == chat["chosen"][0]["content"]
        assert gold_reward(text["prompt"], text["chosen"]) == gold_reward(chat["prompt"], chat["chosen"])


def test_domains_take_turns_and_a_domain_alone_is_every_second_row() -> None:
    both = list(playground_rows("sft", 10))
    assert [row["source"] for row in both] == ["kitchen", "travel"] * 5
    kitchen = list(playground_rows("sft", 10, domain="kitchen"))
    assert [row for row in both if row["source"] == "kitchen"] == kitchen[::2]


def test_no_request_of_the_validation_split_is_in_training() -> None:
    train = {asked(row) for seed in (0, 1) for row in playground_rows("prompts", 1500, seed)}
    val = {asked(row) for seed in (0, 1) for row in playground_rows("prompts", 300, seed, split="val")}
    assert len(val) > 400
    assert not train & val


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_the_share_of_long_prompts_is_as_asked(share: float) -> None:
    rows = list(playground_rows("prompts", 1000, long_prompts=share))
    long = sum(row["prompt"][0]["role"] == "system" for row in rows) / len(rows)
    assert abs(long - share) <= three_sigma(share, len(rows))


@pytest.mark.parametrize("kind", LABELLED)
def test_noise_flips_its_share_of_labels_and_changes_no_text(kind: RowKind) -> None:
    clean, noisy = (list(playground_rows(kind, 800, noise=noise)) for noise in (0.0, 0.2))
    label = {"preference": "chosen", "unpaired": "label", "ranked": "scores"}[kind]
    flipped = sum(row[label] != other[label] for row, other in zip(clean, noisy, strict=True)) / 800
    assert 0.2 - three_sigma(0.2, 800) <= flipped <= 0.2 + three_sigma(0.2, 800)
    assert [words(row) for row in clean] == [words(row) for row in noisy]
    if kind == "preference":
        texts = [[{row[side][0]["content"] for side in ("chosen", "rejected")} for row in rows] for rows in (clean, noisy)]
        assert texts[0] == texts[1]


def test_chosen_answers_are_better_by_little_and_by_much() -> None:
    gaps = [
        gold_reward(row["prompt"], row["chosen"]) - gold_reward(row["prompt"], row["rejected"])
        for row in playground_rows("preference", 400)
    ]
    assert min(gaps) > 0
    assert sum(gap < 0.15 for gap in gaps) > 60
    assert sum(gap > 0.3 for gap in gaps) > 60


def test_demonstrations_are_of_mixed_quality() -> None:
    golds = [gold_reward(row["prompt"], row["completion"]) for row in playground_rows("sft", 600)]
    mean = sum(golds) / len(golds)
    spread = (sum((gold - mean) ** 2 for gold in golds) / len(golds)) ** 0.5
    assert 0.5 < mean < 0.75
    assert spread > 0.15
    assert len({round(gold, 3) for gold in golds}) > 50


def test_labels_of_unpaired_rows_are_about_balanced() -> None:
    labels = [row["label"] for row in playground_rows("unpaired", 600)]
    assert 0.35 < sum(labels) / len(labels) < 0.65


def test_ranked_rows_carry_the_gold_reward_of_each_response() -> None:
    for row in playground_rows("ranked", 20, num_responses=3):
        assert row["scores"] == [gold_reward(row["prompt"], response) for response in row["responses"]]
        assert len(row["scores"]) == 3


def test_the_length_flaw_orders_pairs_by_the_proxy_and_often_against_the_gold() -> None:
    rows = list(playground_rows("preference", 200, flaw="length"))
    for row in rows:
        better, worse = (proxy_reward(row["prompt"], row[side], "length") for side in ("chosen", "rejected"))
        assert better > worse
    gaps = [gold_reward(row["prompt"], row["chosen"]) - gold_reward(row["prompt"], row["rejected"]) for row in rows]
    assert sum(gap < 0 for gap in gaps) > 10


def test_the_two_domains_share_few_words() -> None:
    def vocabulary(domain: Any) -> set[str]:  # Any: a domain's name as a plain str
        rows = playground_rows("sft", 300, domain=domain)
        texts = (m["content"] for row in rows for m in [*row["prompt"], *row["completion"]])
        return {word.strip(".,!?:;()") for text in texts for word in text.split()}

    kitchen, travel = (vocabulary(domain) for domain in DOMAINS)
    assert len(kitchen & travel) < 0.3 * min(len(kitchen), len(travel))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kind": "dpo"}, r"`kind` .* sft, preference, unpaired, ranked, prompts; got 'dpo'"),
        ({"domain": "sea"}, r"`domain` .* kitchen, travel, both; got 'sea'"),
        ({"split": "test"}, r"`split` .* train, val; got 'test'"),
        ({"noise": 1.5}, r"`noise` must be in \[0, 1\], got 1\.5"),
        ({"long_prompts": -0.1}, r"`long_prompts` must be in \[0, 1\], got -0\.1"),
        ({"kind": "sft", "noise": 0.1}, r"`noise` flips labels, and rows of kind 'sft' have none"),
        ({"flaw": "tone"}, r"`flaw` must be None or 'length', got 'tone'"),
        ({"kind": "unpaired", "flaw": "length"}, r"`flaw` .* rows of kind 'unpaired' compare none"),
        ({"num_responses": 3}, r"`num_responses` is for rows of kind 'ranked'"),
        ({"kind": "ranked", "num_responses": 1}, r"`num_responses` must be at least 2, got 1"),
    ],
)
def test_impossible_settings_are_refused_at_the_call(settings: dict[str, Any], message: str) -> None:
    settings = {"kind": "preference", "num_rows": 1, **settings}
    with pytest.raises(ValueError, match=message):
        playground_rows(**settings)


def test_a_long_prompt_says_nothing_that_contradicts_its_request() -> None:
    messages: Sequence[Any] = [row["prompt"] for row in playground_rows("prompts", 200, long_prompts=1.0)]
    for system, user in messages:
        alone = read_request(user["content"])
        together = read_request(f"{system['content']} {user['content']}")
        assert (alone.facts, alone.style) == (together.facts, together.style)
        assert not alone.offered and together.offered
