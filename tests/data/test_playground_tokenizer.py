from pathlib import Path
from typing import Any

from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from lightning_pref.data.playground import playground_rows
from lightning_pref.data.playground_tokenizer import playground_tokenizer

TOKENIZER = playground_tokenizer()
ROWS: list[dict[str, Any]] = list(playground_rows("preference", 300, seed=7, long_prompts=0.5))


def ids(messages: list[dict[str, str]], generation_prompt: bool = False) -> list[int]:
    rendered = TOKENIZER.apply_chat_template(messages, tokenize=False, add_generation_prompt=generation_prompt)
    return list(TOKENIZER(rendered, add_special_tokens=False)["input_ids"])


def test_every_text_of_the_world_comes_back_unchanged() -> None:
    for row in ROWS:
        for message in [*row["prompt"], *row["chosen"], *row["rejected"]]:
            assert TOKENIZER.decode(TOKENIZER(message["content"])["input_ids"]) == message["content"]


@given(st.text(max_size=80))
def test_any_unicode_text_comes_back_unchanged(text: str) -> None:
    assert TOKENIZER.decode(TOKENIZER(text, split_special_tokens=True)["input_ids"]) == text


def test_words_of_the_world_are_single_tokens() -> None:
    for row in ROWS:
        for message in [*row["prompt"], *row["chosen"]]:
            num_words = len(message["content"].split())
            num_marks = sum(message["content"].count(mark) for mark in ".,!?:;()")
            assert len(TOKENIZER(message["content"])["input_ids"]) <= num_words + num_marks


def test_prompts_and_answers_have_the_promised_lengths() -> None:
    for row in ROWS:
        size = len(ids(row["prompt"], generation_prompt=True))
        assert 110 <= size <= 200 if row["prompt"][0]["role"] == "system" else 20 <= size <= 60
        assert all(1 <= len(TOKENIZER(row[side][0]["content"])["input_ids"]) <= 48 for side in ("chosen", "rejected"))


def test_special_tokens_differ_from_each_other_and_the_vocabulary_is_full() -> None:
    special = [TOKENIZER.pad_token_id, TOKENIZER.bos_token_id, TOKENIZER.eos_token_id]
    assert len(set(special)) == 3
    assert sorted(TOKENIZER.get_vocab().values()) == list(range(len(TOKENIZER)))
    assert len(TOKENIZER) < 600


def test_the_template_only_ever_appends() -> None:
    dialogue = [*ROWS[0]["prompt"], *ROWS[0]["chosen"], {"role": "user", "content": "Thanks."}, *ROWS[0]["rejected"]]
    for end in range(1, len(dialogue)):
        shorter = ids(dialogue[:end])
        assert ids(dialogue)[: len(shorter)] == shorter
        if dialogue[end]["role"] == "assistant":
            opened = ids(dialogue[:end], generation_prompt=True)
            assert ids(dialogue)[: len(opened)] == opened


def test_a_templated_answer_has_one_bos_in_front_and_one_eos_at_the_end() -> None:
    for row in ROWS[:50]:
        tokens = ids([*row["prompt"], *row["chosen"]])
        assert [i for i, token in enumerate(tokens) if token == TOKENIZER.eos_token_id] == [len(tokens) - 1]
        assert [i for i, token in enumerate(tokens) if token == TOKENIZER.bos_token_id] == [0]
        assert TOKENIZER.pad_token_id not in tokens


def test_a_saved_tokenizer_is_the_same_tokenizer(tmp_path: Path) -> None:
    TOKENIZER.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    for row in ROWS[:20]:
        dialogue = [*row["prompt"], *row["chosen"]]
        assert loaded.apply_chat_template(dialogue, tokenize=False) == TOKENIZER.apply_chat_template(dialogue, tokenize=False)
        text = TOKENIZER.apply_chat_template(dialogue, tokenize=False)
        assert loaded(text)["input_ids"] == TOKENIZER(text)["input_ids"]
    assert (loaded.pad_token, loaded.bos_token, loaded.eos_token) == ("<|pad|>", "<|bos|>", "<|eos|>")
    assert loaded.get_vocab() == TOKENIZER.get_vocab()


def test_each_call_gives_a_tokenizer_of_its_own() -> None:
    changed = playground_tokenizer()
    changed.pad_token = changed.eos_token
    assert playground_tokenizer().pad_token == "<|pad|>"
