"""`teacher` on real folders: a tiny policy, tiny reward models, and rewards written in Python."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

from lightning_pref.__main__ import main
from lightning_pref.commands.teacher import measure, teacher, with_speed
from lightning_pref.commands.teacher_scores import Answered, score_answers
from lightning_pref.data.playground_tokenizer import playground_tokenizer
from lightning_pref.data.rows import Place, Row, RowError
from lightning_pref.data.templates import Tokenization

REWARDS = """
def length(prompt, response):
    return float(len(response))

def constant(prompt, response):
    return 1

def hash_of_text(prompt, response):
    return sum(map(ord, response)) % 97 / 97

def offset(prompt, response):
    return 10 * int(prompt[-2]) + hash_of_text(prompt, response)

def nothing(prompt, response):
    return None

def broken(prompt, response):
    return float("nan")

not_a_function = 3
"""


def config(**changes: Any) -> LlamaConfig:
    tokenizer = playground_tokenizer()
    settings = {
        "vocab_size": len(tokenizer), "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1,
        "num_attention_heads": 2, "initializer_range": 0.3, "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }  # fmt: skip
    return LlamaConfig(**{**settings, **changes})


def save(model: Any, folder: Path) -> str:
    model.save_pretrained(folder)
    playground_tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A policy and two reward models, as `save_pretrained` leaves them."""
    root = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    found = {"policy": save(LlamaForCausalLM(config()), root / "policy")}
    for name in ("judge", "other"):
        found[name] = save(LlamaForSequenceClassification(config(num_labels=1)), root / name)
    return found


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder with prompts, with responses, and with rewards written in Python, that is worked in."""
    prompts = [{"prompt": f"Name a number above {i}."} for i in range(5)]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in prompts))
    answers = ["", " one", " two or three", " forty"]
    answered = [{**row, "responses": answers, "scores": [0.0, 1.0, 3.0, 2.0]} for row in prompts]
    (tmp_path / "answered.jsonl").write_text("".join(json.dumps(row) + "\n" for row in answered))
    (tmp_path / "own_rewards.py").write_text(REWARDS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield tmp_path
    sys.modules.pop("own_rewards", None)


def answered_rows(responses: Sequence[Sequence[str]]) -> list[Answered]:
    return [
        Answered(Row(place=Place("rows.jsonl", number), prompt=f"p{number}"), tuple(texts))
        for number, texts in enumerate(responses, start=1)
    ]


def test_the_numbers_of_a_report_are_numpys() -> None:
    rng = np.random.default_rng(0)
    scores, gold = rng.normal(size=(2, 6, 4))
    texts = [["a" * int(n) + str(i) for i, n in enumerate(row)] for row in rng.integers(1, 9, size=(6, 4))]
    report = measure("judge", scores.ravel().tolist(), answered_rows(texts), gold.ravel().tolist())
    variances = scores.var(1, ddof=1)
    assert report.within_prompt == pytest.approx(variances.mean())
    assert report.whitened == pytest.approx(variances.mean() / scores.var(ddof=1))
    assert report.std_quantiles == pytest.approx(tuple(np.quantile(np.sqrt(variances), [0.05, 0.5, 0.95])))
    assert report.effective_prompts == pytest.approx(variances.sum() ** 2 / (variances**2).sum())
    right = [(s[i] - s[j]) * (g[i] - g[j]) > 0 for s, g in zip(scores, gold, strict=True) for i in range(4) for j in range(i)]
    assert report.accuracy == pytest.approx(np.mean(right))
    lengths = np.array([[len(text) for text in row] for row in texts], dtype=float)
    centred = [(table - table.mean(1, keepdims=True)).ravel() for table in (scores, lengths)]
    assert report.length_correlation == pytest.approx(np.corrcoef(*centred)[0, 1])


def test_the_same_response_twice_is_no_tie_of_the_reward_model() -> None:
    rows = answered_rows([["x", "x", "y"], ["x", "y", "z"]])
    # Pairs of different texts: 2 and 3; of these (y, z) is tied.
    report = measure("judge", [1.0, 1.0, 2.0, 1.0, 3.0, 3.0], rows, None)
    assert report.ties == pytest.approx(1 / 5)
    assert math.isnan(report.accuracy)
    assert math.isnan(measure("judge", [1.0, 1.0], answered_rows([["x", "x"]]), None).ties)


def test_teachers_are_ranked_by_whitened_variance_whatever_the_scale(place: Path) -> None:
    fast, slow, none = teacher(
        ["own_rewards:constant", "own_rewards:offset", "own_rewards:hash_of_text"], responses="answered.jsonl", out="out.json"
    )
    assert [report.name.split(":")[1] for report in (fast, slow, none)] == ["hash_of_text", "offset", "constant"]
    assert fast.speed == 1.0
    assert slow.within_prompt == pytest.approx(fast.within_prompt)
    assert slow.speed == pytest.approx((slow.whitened / fast.whitened) ** (1 / 3))
    assert none.speed_in_words == "teaches nothing: every response gets the same reward"
    assert none.ties == 1.0
    written = json.loads((place / "out.json").read_text())
    assert [entry["name"] for entry in written["teachers"]] == [report.name for report in (fast, slow, none)]
    assert written["num_prompts"] == 5
    assert written["num_scored_responses"] == 20
    assert written["teachers"][0]["accuracy"] is None


def test_gold_may_stand_in_the_file(place: Path) -> None:
    (report,) = teacher(["own_rewards:length"], responses="answered.jsonl", gold="scores")
    # Lengths 0, 4, 13, 6 order the four responses as the scores do.
    assert report.accuracy == 1.0
    (flat,) = teacher(["own_rewards:constant"], responses="answered.jsonl", gold="scores")
    assert flat.accuracy == 0.0


def test_a_policy_is_sampled_scored_and_the_table_printed(
    place: Path, folders: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = {"policy": folders["policy"], "prompts": "prompts.jsonl", "num_responses": 3, "max_new_tokens": 6}
    reports = teacher(
        [folders["judge"], folders["other"]], **arguments, gold="own_rewards:length", save_responses="kept.jsonl", out="o.json"
    )
    shown = capsys.readouterr().out
    assert f"sampling 3 responses of {folders['policy']} to each of 5 prompts" in shown
    assert "Teachers by whitened variance, 5 prompts, 15 responses" in shown
    assert "the fastest of those compared" in shown
    kept = [json.loads(line) for line in (place / "kept.jsonl").read_text().splitlines()]
    assert all(row["ranks"] == [0, 0, 0] for row in kept), "nobody has said which is best"
    again = teacher([folders["judge"], folders["other"]], responses="kept.jsonl", gold="own_rewards:length")
    assert with_speed(again) == with_speed(reports)
    other_seed = teacher([folders["judge"], folders["other"]], **arguments, seed=1)
    assert {report.whitened for report in other_seed} != {report.whitened for report in reports}
    assert json.loads((place / "o.json").read_text())["policy"] == folders["policy"]


def test_a_reward_model_reads_prompt_and_response_with_one_eos(place: Path, folders: dict[str, str]) -> None:
    rows = answered_rows([["", "yes", "no, not at all", "yes"], ["b", ""]])
    found = score_answers(folders["judge"], rows, batch_size=4, dtype="float32", device=torch.device("cpu"))
    model = LlamaForSequenceClassification.from_pretrained(folders["judge"]).eval()
    model.config.pad_token_id = None
    tokenizer = playground_tokenizer()
    expected = []
    with torch.no_grad():
        for row in rows:
            prompt = Tokenization(tokenizer).prompt_ids(row.row).tolist()
            for text in row.responses:
                ids = [*prompt, *tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
                expected.append(model(torch.tensor([ids])).logits.item())
    assert found == pytest.approx(expected, abs=1e-5)


def test_chat_prompts_are_rendered_by_the_reward_models_own_template(folders: dict[str, str]) -> None:
    messages = [{"role": "user", "content": "Good evening."}]
    row = Answered(Row(place=Place("chat.jsonl", 1), prompt=messages), ("Welcome.", ""))
    found = score_answers(folders["judge"], [row], batch_size=2, dtype="float32", device=torch.device("cpu"))
    model = LlamaForSequenceClassification.from_pretrained(folders["judge"]).eval()
    model.config.pad_token_id = None
    tokenizer = playground_tokenizer()
    asked = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    with torch.no_grad():
        expected = [
            model(
                torch.tensor([tokenizer(asked + text + tokenizer.eos_token, add_special_tokens=False)["input_ids"]])
            ).logits.item()
            for text in row.responses
        ]
    assert found == pytest.approx(expected, abs=1e-5)


def test_the_playground_is_a_source_of_prompts_and_of_rewards(folders: dict[str, str]) -> None:
    reports = teacher(
        ["playground:gold", "playground:length"], policy=folders["policy"], prompts="playground", gold="playground:gold",
        num_prompts=3, num_responses=2, max_new_tokens=8,
    )  # fmt: skip
    assert {report.name for report in reports} == {"playground:gold", "playground:length"}


def test_the_command_line_takes_several_reward_models(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--reward_model+", "own_rewards:length", "--reward_model+", "own_rewards:hash_of_text"]
    main(["teacher", *flags, "--responses", "answered.jsonl", "--gold", "scores"])
    shown = capsys.readouterr().out
    assert "own_rewards:hash_of_text" in shown
    assert "Take own_rewards:length (accuracy 1.000)" in shown


def test_a_fast_teacher_that_ranks_no_better_than_chance_is_not_recommended(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"prompt": f"p{i}", "responses": ["a", "bb", "ccc"], "scores": [3, 2, 1]} for i in range(4)]
    (place / "backward.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    teacher(["own_rewards:length", "own_rewards:constant"], responses="backward.jsonl", gold="scores")
    assert "None ranks this policy's responses better than chance" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"reward_model": []}, "There is no reward model to compare; give at least one `--reward_model`"),
        ({"reward_model": ["a", "b", "a"]}, "The reward model 'a' is given twice"),
        ({"prompts": "prompts.jsonl"}, "`--policy` is missing: give `--policy` and `--prompts` to sample responses"),
        ({"policy": "playground:tiny"}, "`--prompts` is missing"),
        ({"responses": "answered.jsonl", "policy": "x"}, "`--responses` takes the place of sampling: leave `--policy`"),
        (
            {"policy": "x", "prompts": "y", "gold": "scores"},
            "`--gold scores` reads a column of `--responses`, which is not given",
        ),
        ({"responses": "answered.jsonl", "save_responses": "kept.jsonl"}, "`--save_responses` keeps what is sampled, but"),
        *(
            ({"responses": "answered.jsonl", name: 3}, f"`--{name}` acts on sampling, but `--responses` takes the place of that")
            for name in ("num_responses", "max_new_tokens", "temperature", "seed")
        ),
        ({"responses": "answered.jsonl", "num_prompts": 0}, "`num_prompts` must be at least 1, got 0"),
        (
            {"policy": "x", "prompts": "y", "num_responses": 1},
            "`num_responses` must be at least 2, since a variance needs two; got 1",
        ),
        ({"responses": "answered.jsonl", "device": "abacus"}, "Unknown device 'abacus'"),
        ({"responses": "answered.jsonl", "reward_model": ["own_rewards:typo"]}, "has no function 'typo', which the reward"),
        (
            {"responses": "answered.jsonl", "reward_model": ["own_rewards:not_a_function"]},
            "has no function 'not_a_function', which the reward",
        ),
        ({"responses": "answered.jsonl", "reward_model": ["no_such_module:f"]}, "There is no Python module 'no_such_module'"),
        ({"responses": "answered.jsonl", "reward_model": ["playground:silver"]}, "Unknown reward 'playground:silver'"),
        (
            {"responses": "answered.jsonl", "reward_model": ["own_rewards:broken"]},
            "'own_rewards:broken' gives 20 of 20 responses no finite reward, the first to the prompt of answered.jsonl, row 1",
        ),
    ],
)
def test_mistakes_are_named(place: Path, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        teacher(**{"reward_model": ["own_rewards:length"], **arguments})


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_named(place: Path) -> None:
    with pytest.raises(ValueError, match="The device 'cuda' was asked for, but torch sees no GPU here"):
        teacher(["own_rewards:length"], responses="answered.jsonl", device="cuda")


def test_a_function_that_returns_no_number_is_refused(place: Path) -> None:
    with pytest.raises(
        TypeError, match=r"'own_rewards:nothing' returned None \(NoneType\) for a response; it must return a number"
    ):
        teacher(["own_rewards:nothing"], responses="answered.jsonl")


def test_files_and_folders_that_are_not_there_are_named(place: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no such file or folder: .*answers.jsonl; nearest names"):
        teacher(["own_rewards:length"], responses="answers.jsonl")
    with pytest.raises(FileNotFoundError, match="There is no folder .*nowhere for `out`"):
        teacher(["own_rewards:length"], responses="answered.jsonl", out="nowhere/out.json")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"question": "?"}, "responses.jsonl, row 1: found the columns question; expected the columns `prompt` and `responses`"),
        ({"prompt": "p", "responses": ["one"]}, "expected two responses or more to each prompt. A variance needs two"),
        ({"prompt": "p", "responses": ["a", 2]}, r"field `responses\[1\]`: found the number 2; expected text"),
        ({"prompt": "p", "responses": ["a", "b"], "scores": [1.0]}, "expected 2 entries, one for each of `responses`"),
    ],
)
def test_rows_of_responses_that_cannot_be_used_are_named(place: Path, row: dict[str, Any], message: str) -> None:
    (place / "responses.jsonl").write_text(json.dumps(row) + "\n")
    with pytest.raises(RowError, match=message):
        teacher(["own_rewards:length"], responses="responses.jsonl")


def test_gold_scores_that_a_row_lacks_are_named(place: Path) -> None:
    (place / "bare.jsonl").write_text(json.dumps({"prompt": "p", "responses": ["a", "b"]}) + "\n")
    with pytest.raises(ValueError, match="bare.jsonl, row 1: `--gold scores` takes the gold rewards from this column"):
        teacher(["own_rewards:length"], responses="bare.jsonl", gold="scores")


def test_prompts_without_a_prompt_column_are_named(place: Path, folders: dict[str, str]) -> None:
    (place / "texts.jsonl").write_text(json.dumps({"text": "no question here"}) + "\n")
    with pytest.raises(
        RowError, match="texts.jsonl, row 1, field `prompt`: found a row without a prompt; expected a column `prompt`"
    ):
        teacher(["own_rewards:length"], policy=folders["policy"], prompts="texts.jsonl")


def test_a_tokenizer_that_does_not_belong_to_the_model_is_refused(place: Path, tmp_path: Path) -> None:
    small = LlamaForSequenceClassification(config(num_labels=1, vocab_size=20, pad_token_id=0, eos_token_id=1))
    with pytest.raises(ValueError, match="the model has only 20 embedding rows"):
        teacher([save(small, tmp_path / "small")], responses="answered.jsonl")
