from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from chat_rows import CHAT, NEWLINE_TEMPLATE, NO_EOS_TEMPLATE, PLAIN_TEMPLATE, answer, row_of, said, texts
from transformers import PreTrainedTokenizerFast

from lightning_pref.data.rows import DroppedRowError, RowError
from lightning_pref.data.templates import EVENTS, Tokenization

# Any: see the fixture.
Build = Callable[..., Any]


PAIR = row_of(prompt="What color is the sky?", chosen=" The sky is blue.", rejected=" red")


def test_T1_eos_survives_pad_equal_eos(build_tokenizer: Build) -> None:
    tokenizer = build_tokenizer(pad="<|end|>", template=PLAIN_TEMPLATE)
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    for row in (PAIR, CHAT):
        group = Tokenization(tokenizer)(row, 0)
        assert [int(r[-1]) for r in group.responses] == [tokenizer.eos_token_id] * 2
        assert [(r == tokenizer.eos_token_id).sum() for r in group.responses] == [1, 1]


def test_T2_pad_token_zero_inside_text_is_kept(build_tokenizer: Build) -> None:
    tokenizer = build_tokenizer(pad="!")
    assert tokenizer.pad_token_id == 0
    group = Tokenization(tokenizer)(row_of(prompt="Stop!! Now", completion=" yes! no!!"), 0)
    assert (group.prompt == 0).sum() == 2
    assert (group.responses[0] == 0).sum() == 3
    assert texts(tokenizer, group) == ("Stop!! Now", [" yes! no!!<|end|>"])


@pytest.mark.parametrize("prompt", ["the sky", "<|start|>the sky"])
def test_T3_plain_text_begins_with_one_bos(build_tokenizer: Build, prompt: str) -> None:
    tokenizer = build_tokenizer(adds_bos=True)
    group = Tokenization(tokenizer)(row_of(prompt=prompt, completion=" is blue"), 0)
    assert texts(tokenizer, group) == ("<|start|>the sky", [" is blue<|end|>"])


def test_T3_templated_text_gets_no_second_bos(build_tokenizer: Build) -> None:
    tokenizer = build_tokenizer(adds_bos=True, template=NEWLINE_TEMPLATE)
    group = Tokenization(tokenizer)(CHAT, 0)
    assert (group.prompt == tokenizer.bos_token_id).sum() == 1
    assert group.prompt[0] == tokenizer.bos_token_id


def test_T3_two_bos_that_the_row_itself_writes_are_counted(build_tokenizer: Build) -> None:
    tokenize = Tokenization(build_tokenizer(adds_bos=True))
    tokenize(row_of(prompt="<|start|><|start|>the", completion=" sky"), 0)
    assert tokenize.events == {"double_bos": 1}


def test_a_tokenizer_that_adds_no_bos_gets_none(build_tokenizer: Build) -> None:
    tokenizer = build_tokenizer(adds_bos=False)
    assert Tokenization(tokenizer)(PAIR, 0).prompt[0] != tokenizer.bos_token_id


@pytest.mark.parametrize(
    ("prompt", "chosen", "rejected"),
    [
        ("Answer: ", "yes", "no"),  # " yes" is one token
        ("Answer:\n", "\nyes", "\nno"),  # "\n\n" merges
        ("\u7b54\u6848\u662f", "\u84dd\u8272", "\u7d05"),
        ("The s", "ky is blue", "ea is green"),
        ("caf", "\u00e9", "e"),
    ],
)
def test_T6_merges_across_the_boundary_keep_text_and_tokens(
    build_tokenizer: Build, prompt: str, chosen: str, rejected: str
) -> None:
    tokenizer = build_tokenizer()
    group = Tokenization(tokenizer)(row_of(prompt=prompt, chosen=chosen, rejected=rejected), 0)
    for response, text in zip(group.responses, (chosen, rejected), strict=True):
        assert [*group.prompt, *response[:-1]] == tokenizer(prompt + text, add_special_tokens=False)["input_ids"]
        assert tokenizer.decode([*group.prompt, *response[:-1]]) == prompt + text
    assert prompt.startswith(tokenizer.decode(group.prompt).rstrip("\ufffd"))


def test_T6_merged_rows_are_counted_and_others_are_not(build_tokenizer: Build) -> None:
    tokenize = Tokenization(build_tokenizer())
    tokenize(row_of(prompt="Answer: ", completion="yes"), 0)
    tokenize(row_of(prompt="Answer:", completion=" yes"), 1)
    assert tokenize.events == {"merged_boundary": 1}


def test_T6_a_prompt_that_would_merge_away_is_tokenised_apart(build_tokenizer: Build) -> None:
    tokenizer = build_tokenizer()
    tokenize = Tokenization(tokenizer)
    assert len(tokenizer("sky")["input_ids"]) == 1
    group = tokenize(row_of(prompt="s", completion="ky"), 0)
    assert texts(tokenizer, group) == ("s", ["ky<|end|>"])
    assert tokenize.events == {"split_boundary": 1}


def test_T7_line_break_after_eos_is_cut(build_tokenizer: Build) -> None:
    tokenizer = build_tokenizer(template=NEWLINE_TEMPLATE)
    _, responses = texts(tokenizer, Tokenization(tokenizer)(CHAT, 0))
    assert responses == ["blue<|end|>", "It is red.<|end|>"]


def test_T7_template_without_eos_gets_one(build_tokenizer: Build) -> None:
    tokenizer = build_tokenizer(template=NO_EOS_TEMPLATE)
    _, responses = texts(tokenizer, Tokenization(tokenizer)(CHAT, 0))
    assert responses == [" blue\n<|end|>", " It is red.\n<|end|>"]


@pytest.mark.parametrize("ending", ["", "<|end|>", "<|end|>\n", "<|end|><|end|>", "<|end|>\n<|end|>\n\n"])
def test_T7_exactly_one_eos_ends_a_plain_response(build_tokenizer: Build, ending: str) -> None:
    tokenizer = build_tokenizer()
    group = Tokenization(tokenizer)(row_of(prompt="the sky", completion=" is blue" + ending), 0)
    assert texts(tokenizer, group)[1] == [" is blue<|end|>"]


def test_T7_line_break_at_the_end_of_a_plain_response_is_its_own(build_tokenizer: Build) -> None:
    tokenizer = build_tokenizer()
    group = Tokenization(tokenizer)(row_of(prompt="the sky", completion=" is blue\n"), 0)
    assert texts(tokenizer, group)[1] == [" is blue\n<|end|>"]


def test_T7_response_of_eos_alone_is_refused(build_tokenizer: Build) -> None:
    with pytest.raises(RowError, match="found a response of no tokens; expected at least one token before EOS") as caught:
        Tokenization(build_tokenizer())(row_of(prompt="the sky", completion="<|end|>"), 0)
    assert caught.value.reason == "empty_response"


def test_T8_truncated_response_does_not_gain_eos(build_tokenizer: Build) -> None:
    tokenizer = build_tokenizer()
    whole = Tokenization(tokenizer)(PAIR, 0)
    tokenize = Tokenization(tokenizer, max_length=len(whole.prompt) + 3)
    cut = tokenize(PAIR, 0)
    assert cut.responses[0].tolist() == whole.responses[0][:3].tolist()
    assert tokenizer.eos_token_id not in cut.responses[0]
    assert tokenize.events == {"truncated_response": 1}


def test_T9_truncation_that_would_empty_a_response_is_an_error_with_a_reason(build_tokenizer: Build) -> None:
    tokenizer = build_tokenizer()
    size = len(Tokenization(tokenizer)(PAIR, 0).prompt)
    with pytest.raises(RowError, match=f"a prompt of {size} tokens, which leaves nothing of the responses") as caught:
        Tokenization(tokenizer, max_length=size)(PAIR, 0)
    assert caught.value.reason == "empty_response"


@pytest.mark.parametrize("long_side", ["chosen", "rejected"])
def test_T10_either_side_that_is_too_long_triggers_the_policy(build_tokenizer: Build, long_side: str) -> None:
    sides = {"chosen": " blue", "rejected": " red"} | {long_side: " The sky is blue." * 8}
    row = row_of(prompt="What color?", **sides)
    with pytest.raises(DroppedRowError, match="a prompt with a response of .* tokens; expected at most 24") as caught:
        Tokenization(build_tokenizer(), max_length=24, truncation="drop")(row, 0)
    assert caught.value.reason == "too_long"


def test_T11_responses_that_truncation_makes_equal_are_refused(build_tokenizer: Build) -> None:
    row = row_of(prompt="What color is the sky?", chosen=" The sky is blue.", rejected=" The sky is red.")
    tokenizer = build_tokenizer()
    size = len(Tokenization(tokenizer)(row, 0).prompt)
    with pytest.raises(RowError, match="the same text for better and worse responses after truncation") as caught:
        Tokenization(tokenizer, max_length=size + 3)(row, 0)
    assert caught.value.reason == "identical_responses"


def test_T11_responses_that_are_equal_as_tokens_are_refused(build_tokenizer: Build) -> None:
    row = row_of(prompt="the sky", chosen=" is blue", rejected=" is blue<|end|>")
    with pytest.raises(RowError, match="after tokenisation"):
        Tokenization(build_tokenizer())(row, 0)


def test_T11_a_list_with_some_equal_responses_is_counted(build_tokenizer: Build) -> None:
    tokenize = Tokenization(build_tokenizer())
    tokenize(row_of(prompt="the sky", responses=[" blue", " blue", " red"]), 0)
    assert tokenize.events == {"identical_pair": 1}


@pytest.mark.parametrize(
    ("chosen", "rejected"),
    [
        ("Is it so? Yes", "Is it so? Yes indeed"),
        ("What? \u00e9l\u00e9gant", "What? \u00e8re"),
        ("Which? \U0001f1e9\U0001f1ea", "Which? \U0001f1e9\U0001f1f0"),
        ("Which? \U0001f44b\U0001f3fb", "Which? \U0001f44b\U0001f3ff"),
        ("Who? re\u0301", "Who? re\u0300"),
    ],
)
def test_T12_implicit_prompt_leaves_first_token_and_characters_whole(build_tokenizer: Build, chosen: str, rejected: str) -> None:
    tokenizer = build_tokenizer()
    group = Tokenization(tokenizer)(row_of(chosen=chosen, rejected=rejected), 0)
    prompt, responses = texts(tokenizer, group)
    assert prompt == chosen[: chosen.index("?") + 1] or prompt == "Is it so?"
    assert [prompt + response for response in responses] == [chosen + "<|end|>", rejected + "<|end|>"]
    assert "\ufffd" not in "".join(responses)


@pytest.mark.parametrize("has_bos", [True, False])
def test_text_without_prompt_is_conditioned_on_bos_or_else_eos(build_tokenizer: Build, has_bos: bool) -> None:
    tokenizer = build_tokenizer(has_bos=has_bos)
    start = "<|start|>" if has_bos else "<|end|>"
    assert texts(tokenizer, Tokenization(tokenizer)(row_of(text="The sky"), 0)) == (start, ["The sky<|end|>"])


def test_text_that_brings_its_own_bos_gets_no_other(build_tokenizer: Build) -> None:
    tokenizer = build_tokenizer(adds_bos=True)
    assert texts(tokenizer, Tokenization(tokenizer)(row_of(text="<|start|>The sky"), 0)) == ("<|start|>", ["The sky<|end|>"])


def test_everything_the_loss_needs_is_carried_into_the_group(build_tokenizer: Build) -> None:
    tokenize = Tokenization(build_tokenizer())
    pair = tokenize(row_of(prompt="a", chosen=" b", rejected=" c", margin=0.5, source="web"), 7)
    assert (pair.row_id, pair.ranks, pair.margin, pair.source) == (7, (0, 1), 0.5, "web")
    scored = tokenize(row_of(prompt="a", completions=[" b", " c", " d"], scores=[1, 3, 1]), 8)
    assert (scored.ranks, scored.scores) == ((1, 0, 1), (1.0, 3.0, 1.0))
    assert tokenize(row_of(prompt="a", completion=" b", label=False), 9).labels == (False,)
    assert pair.prompt.dtype == np.int32


def test_a_prompt_only_row_has_prompt_ids_but_is_no_group(build_tokenizer: Build) -> None:
    tokenizer = build_tokenizer(template=PLAIN_TEMPLATE)
    tokenize = Tokenization(tokenizer)
    row = row_of(prompt=said("sky?"))
    assert tokenizer.decode(tokenize.prompt_ids(row)) == "<|user|>sky?<|end|><|assistant|>"
    with pytest.raises(RowError, match="a prompt without a response; expected a row to learn from"):
        tokenize(row, 0)


def test_prompt_ids_are_those_of_the_group_and_obey_its_limit(build_tokenizer: Build) -> None:
    tokenizer = build_tokenizer(adds_bos=True)
    assert Tokenization(tokenizer).prompt_ids(PAIR).tolist() == Tokenization(tokenizer)(PAIR, 0).prompt.tolist()
    assert len(Tokenization(tokenizer, max_prompt_length=3).prompt_ids(PAIR)) == 3


@pytest.mark.parametrize("separator", ["\n", " ;;\n", "\n\n"])
@pytest.mark.parametrize("prompt", ["What color is the sky?\n", said("What color is the sky?")])
def test_step_marks_stand_on_the_last_token_of_the_separator(build_tokenizer: Build, separator: str, prompt: object) -> None:
    tokenizer = build_tokenizer(template=PLAIN_TEMPLATE)
    steps = ["The sky is not red.", "It is blue\u00e9", "yes"]
    group = Tokenization(tokenizer, step_separator=separator)(
        row_of(prompt=prompt, completions=steps, labels=[True, False, True]), 0
    )
    assert group.step_labels == ((True, False, True),)
    assert group.step_ends is not None
    text = ""
    for end, step in zip(group.step_ends[0], steps, strict=True):
        text += step + separator
        assert tokenizer.decode(group.responses[0][: end + 1]) == text


def test_step_marks_end_with_the_text_where_the_template_strips_it(build_tokenizer: Build) -> None:
    tokenizer = build_tokenizer(template=PLAIN_TEMPLATE.replace("m.content", "m.content.strip()"))
    group = Tokenization(tokenizer)(row_of(prompt=said("sky?"), completions=["blue", "yes"], labels=[True, False]), 0)
    assert group.step_ends is not None
    assert tokenizer.decode(group.responses[0][: group.step_ends[0][0] + 1]) == "blue\n"
    assert tokenizer.decode(group.responses[0][: group.step_ends[0][1] + 1]) == "blue\nyes"


def test_step_marks_beyond_a_cut_are_left_out_and_a_row_without_any_is_refused(build_tokenizer: Build) -> None:
    tokenizer = build_tokenizer()
    row = row_of(prompt="sky?\n", completions=["blue", "The sky is not red."], labels=[True, False])
    whole = Tokenization(tokenizer)(row, 0)
    assert whole.step_ends is not None
    size = len(whole.prompt) + whole.step_ends[0][0] + 1
    assert Tokenization(tokenizer, max_length=size)(row, 0).step_labels == ((True,),)
    with pytest.raises(RowError, match="a first step that ends beyond"):
        Tokenization(tokenizer, max_length=size - 1)(row, 0)


def test_steps_survive_a_prompt_that_is_tokenised_apart(build_tokenizer: Build) -> None:
    tokenizer = build_tokenizer()
    group = Tokenization(tokenizer)(row_of(prompt="s", completions=["ky", "yes"], labels=[True, False]), 0)
    assert group.step_ends is not None
    assert [tokenizer.decode(group.responses[0][: end + 1]) for end in group.step_ends[0]] == ["ky\n", "ky\nyes\n"]


def test_responses_with_turns_of_others_are_counted(build_tokenizer: Build) -> None:
    tokenize = Tokenization(build_tokenizer(template=PLAIN_TEMPLATE))
    completion = [*answer("blue"), {"role": "user", "content": "really?"}, *answer("yes")]
    group = tokenize(row_of(prompt=said("sky?"), completion=completion), 0)
    assert tokenize.events == {"user_turn_in_response": 1}
    assert set(tokenize.events) <= set(EVENTS)
    assert len(group.responses) == 1


def test_tokenizer_without_eos_is_refused(build_tokenizer: Build) -> None:
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=build_tokenizer().backend_tokenizer)
    with pytest.raises(ValueError, match="has no EOS token"):
        Tokenization(tokenizer)


def test_empty_step_separator_is_refused(build_tokenizer: Build) -> None:
    with pytest.raises(ValueError, match="`step_separator` must not be empty"):
        Tokenization(build_tokenizer(), step_separator="")


def test_digest_changes_with_each_setting_and_with_nothing_else(build_tokenizer: Build) -> None:
    tokenizer = build_tokenizer(template=PLAIN_TEMPLATE)
    first = Tokenization(tokenizer).digest()
    tokenizer(["a", "the sky"], padding=True, truncation=True, max_length=2)  # leaves its mark in the backend
    assert Tokenization(tokenizer).digest() == first
    changed = [
        Tokenization(tokenizer, chat_template=NO_EOS_TEMPLATE),
        Tokenization(tokenizer, template_date="2025-01-01"),
        Tokenization(tokenizer, max_length=9),
        Tokenization(tokenizer, max_prompt_length=9),
        Tokenization(tokenizer, max_length=9, truncation="keep_end"),
        Tokenization(tokenizer, step_separator=";"),
        Tokenization(build_tokenizer(template=NEWLINE_TEMPLATE)),
        Tokenization(build_tokenizer(template=PLAIN_TEMPLATE, adds_bos=True)),
        Tokenization(build_tokenizer(template=PLAIN_TEMPLATE, has_bos=False)),
    ]
    assert len({first, *(tokenization.digest() for tokenization in changed)}) == 1 + len(changed)
