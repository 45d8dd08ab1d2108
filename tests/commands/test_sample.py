"""`sample` on the playground and on small files: what it writes is read back by the data reader and by `teacher`."""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lightning_pref.__main__ import main
from lightning_pref.commands.places import device_named, output_file
from lightning_pref.commands.sample import sample
from lightning_pref.commands.sample_rows import Answer, best_rows, listed_rows, pair_rows
from lightning_pref.commands.teacher import teacher
from lightning_pref.data.formats import parse_row
from lightning_pref.data.rows import Place, Row, RowError
from lightning_pref.data.sources import read_rows
from lightning_pref.measures.overoptimization import kl_of_best_of_n
from lightning_pref.rollouts.pilaf import SampledPairs
from lightning_pref.rollouts.prompts import Prompt

REWARDS = """
def length(prompt, response):
    return float(len(response))

def picky(prompt, response):
    return float("nan") if len(response) % 2 else float(len(response))

def constant(prompt, response):
    return 1.0
"""

SMALL: dict[str, Any] = {"num_prompts": 4, "max_new_tokens": 12}


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder with rewards written in Python, that is worked in."""
    (tmp_path / "own_rewards.py").write_text(REWARDS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield tmp_path
    sys.modules.pop("own_rewards", None)


def written(file: str = "samples.jsonl") -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(file).read_text().splitlines()]


def read_back(file: str = "samples.jsonl") -> list[Row]:
    return [parse_row(raw, place) for place, raw in read_rows(file)]


def asked(number: int = 1, **columns: object) -> list[Prompt]:
    row = Row(place=Place("rows.jsonl", 1), prompt="Say something.")
    return [Prompt(i, np.array([1]), row, {"prompt": "Say something.", **columns}) for i in range(number)]


def test_scored_responses_are_read_back_as_a_ranked_list(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = sample(**SMALL, reward="own_rewards:length", num_responses=3)
    rows, raw = read_back(), written()
    assert len(rows) == report.num_rows == 4
    for row, columns in zip(rows, raw, strict=True):
        assert row.scores == tuple(float(len(text)) for text in columns["responses"])
        assert row.ranks is not None
        assert row.scores[row.ranks.index(0)] == max(row.scores)
    assert report.facts["reward, mean"] == pytest.approx(np.mean([row.scores for row in rows]))
    assert "4 rows for 4 prompts: samples.jsonl" in capsys.readouterr().out
    # The same rows are what `teacher` reads.
    (found,) = teacher(["own_rewards:length"], responses="samples.jsonl", gold="scores")
    assert found.accuracy == 1.0


def test_unscored_responses_go_to_teacher_but_cannot_be_mistaken_for_a_ranking(place: Path) -> None:
    sample(**SMALL)
    assert all(len(row["responses"]) == 4 and row["ranks"] == [0] * 4 for row in written())
    assert teacher(["own_rewards:length"], responses="samples.jsonl")[0].within_prompt > 0
    with pytest.raises(RowError, match="the same value for all responses"):
        read_back()


def test_a_single_response_is_read_back_as_a_completion(place: Path) -> None:
    sample(**SMALL, num_responses=1)
    for row, raw in zip(read_back(), written(), strict=True):
        assert row.prompt == raw["prompt"]
        # Prompts of the playground are chat messages.
        assert row.responses == ([{"role": "assistant", "content": raw["completion"]}],)
    assert {frozenset(row) - {"source"} for row in written()} == {frozenset({"prompt", "completion"})}


def test_the_same_seed_writes_the_same_file(place: Path) -> None:
    texts = []
    for name, options in {"a": {"max_rows": 3}, "b": {}, "c": {"seed": 1}}.items():
        sample(out=f"{name}.jsonl", **SMALL, **options)
        texts.append(Path(f"{name}.jsonl").read_text())
    assert texts[0] == texts[1] != texts[2]


def test_sampling_flags_have_an_effect(place: Path) -> None:
    plain = {"num_prompts": 2, "max_new_tokens": 6, "num_responses": 2}
    found = {}
    for name, options in {
        "plain": {},
        "cold": {"temperature": 0.3},
        "top_k": {"top_k": 2},
        "top_p": {"top_p": 0.1},
        "min_p": {"min_p": 0.9},
        "long": {"max_new_tokens": 7},
        "half": {"dtype": "bfloat16"},
        "paged": {"engine": "paged"},
    }.items():
        sample(out=f"{name}.jsonl", **{**plain, **options})
        found[name] = Path(f"{name}.jsonl").read_text()
    assert len(set(found.values())) == len(found)


def test_the_best_of_n_is_the_best_of_the_responses_of_the_same_seed(place: Path) -> None:
    sample(**SMALL, num_responses=6, reward="own_rewards:length", out="all.jsonl", keep_all=True)
    report = sample(**SMALL, best_of=6, reward="own_rewards:length")
    for every, best in zip(written("all.jsonl"), written(), strict=True):
        assert best["score"] == max(every["scores"])
        assert best["completion"] == every["responses"][every["scores"].index(max(every["scores"]))]
    assert read_back()
    assert report.facts["nats from the policy, at most"] == pytest.approx(kl_of_best_of_n(6))
    assert report.facts["reward, mean of all"] < report.facts["reward, mean of the best"]


def test_speculative_rejection_of_nothing_writes_what_best_of_n_writes(place: Path) -> None:
    sample(**SMALL, best_of=6, reward="own_rewards:length", out="best.jsonl")
    options = {"best_of": 6, "reward": "own_rewards:length", **SMALL}
    none = sample(**options, speculative_rejection=0.0, checkpoints=[4, 8], out="none.jsonl")
    assert Path("none.jsonl").read_text() == Path("best.jsonl").read_text()
    assert none.facts["of those of best-of-n, at least"] == none.facts["of those of best-of-n, at most"] == 1.0
    half = sample(**options, speculative_rejection=0.5, checkpoints=[4, 8])
    assert half.facts["responses left after 8 tokens"] == 2
    share = half.facts["tokens decoded"] / none.facts["tokens decoded"]
    assert half.facts["of those of best-of-n, at least"] <= share <= half.facts["of those of best-of-n, at most"] < 1
    assert -1 <= half.facts["rank correlation with the end after 4 tokens"] <= 1
    room = sample(**options, speculative_rejection=0.5, token_capacity=24)
    assert "responses left after 8 tokens" in room.facts  # 24 // 3
    assert len(read_back()) == 4


def test_pairs_are_labelled_by_the_reward(place: Path) -> None:
    report = sample(num_prompts=12, max_new_tokens=8, pilaf="playground:tiny", beta=0.3, reward="own_rewards:length")
    for row in written():
        assert len(row["chosen"]) == row["score_chosen"] > row["score_rejected"] == len(row["rejected"])
        assert row["branch"] in ("policy", "tilted")
    assert len(read_back()) == report.num_rows
    assert 0 < report.facts["tilted pairs"] < 12
    # The reference is the policy itself.
    assert report.facts["nats per token of pi+ from the policy"] == 0
    sample(num_prompts=3, max_new_tokens=8, pilaf="playground:tiny", out="unlabelled.jsonl")
    assert all(row["ranks"] == [0, 0] and "branch" in row for row in written("unlabelled.jsonl"))


def test_what_cannot_be_trained_on_is_left_out_and_counted(place: Path) -> None:
    picky = sample(**SMALL, reward="own_rewards:picky", num_responses=8)
    assert picky.left_out["responses without a score"] > 0
    assert all(score % 2 == 0 for row in written() for score in row["scores"])
    flat = sample(**SMALL, reward="own_rewards:constant")
    assert (flat.num_rows, dict(flat.left_out)) == (0, {"rows with the same value for all responses": 4})
    kept = sample(**SMALL, reward="own_rewards:constant", keep_all=True)
    assert (kept.num_rows, dict(kept.left_out)) == (4, {})


def test_rows_are_what_they_should_be() -> None:
    nan = float("nan")
    listed = listed_rows(
        asked(3), [[Answer("a", 1.0), Answer(" ", 2.0), Answer("b", nan), Answer("c", 0.0)], [Answer("", None)],
                   [Answer("x", None), Answer("y", None), Answer(" ", None)]], keep_all=False,
    )  # fmt: skip
    assert listed.rows == [
        {"prompt": "Say something.", "responses": ["a", "c"], "scores": [1.0, 0.0]},
        {"prompt": "Say something.", "responses": ["x", "y"], "ranks": [0, 0]},
    ]
    assert listed.left_out == Counter({"blank responses": 3, "responses without a score": 1})
    best = best_rows(asked(2, source="kitchen", other=3), [None, Answer("a", 1.5)], keep_all=False)
    assert best.rows == [{"prompt": "Say something.", "completion": "a", "score": 1.5, "source": "kitchen"}]
    assert best.left_out == Counter({"prompts without a scored response": 1})
    pairs = pair_rows(
        asked(4), SampledPairs([], ["policy", "tilted", "policy", "tilted"], nan, nan),
        [[Answer("a", 1.0), Answer("b", 2.0)], [Answer("a", 1.0), Answer("b", 1.0)], [Answer("a", nan), Answer("b", 1.0)],
         [Answer("a", 3.0), Answer("", 1.0)]], keep_all=False,
    )  # fmt: skip
    assert [(row["chosen"], row["rejected"], row["branch"]) for row in pairs.rows] == [("b", "a", "policy")]
    assert pairs.left_out == Counter({"pairs with equal scores": 1, "pairs without a score": 1, "rows with an empty string": 1})


def test_prompts_may_come_from_a_file_with_columns_of_other_names(place: Path) -> None:
    Path("asked.jsonl").write_text('{"question": "One?"}\n{"question": "Two?"}\n')
    main(["sample", "--prompts", "asked.jsonl", "--columns", "{prompt: question}", "--max-new-tokens", "4", "--num-prompts", "1",
          "--reward", "{own_rewards:length: 2.0}", "--out", "found.jsonl"])  # fmt: skip
    (row,) = written("found.jsonl")
    assert row["prompt"] == "One?"
    assert row["scores"] == [2.0 * len(text) for text in row["responses"]]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_prompts": 0}, "`num_prompts` must be at least 1, got 0"),
        ({"num_responses": 0}, "`num_responses` must be at least 1, got 0"),
        ({"best_of": 0}, "`best_of` must be at least 1, got 0"),
        ({"pilaf": "playground:tiny", "best_of": 4}, "`--pilaf` samples two responses.*leave one of them out"),
        ({"best_of": 4, "num_responses": 4}, "`--best_of` says how many responses are sampled; leave `--num_responses` out"),
        ({"pilaf": "playground:tiny", "num_responses": 2}, "`--pilaf` says how many"),
        ({"best_of": 4}, "`--best_of` keeps the response with the highest reward; say with `--reward`"),
        ({"beta": 0.2}, "`--beta` is a setting of PILAF; give the reference model with `--pilaf`"),
        ({"checkpoints": [4]}, "`--checkpoints` says when responses are given up; say how many with"),
        ({"token_capacity": 40}, "`--token_capacity` says when"),
        ({"speculative_rejection": 0.5}, "`--speculative_rejection` makes `--best_of` cheaper"),
        ({"speculative_rejection": 0.5, "best_of": 4, "reward": "r"}, r"needs to know when to score: .*`--token_capacity`\."),
        (
            {"speculative_rejection": 0.5, "best_of": 4, "reward": "r", "checkpoints": [4], "token_capacity": 40},
            "`--checkpoints .* or `--token_capacity`, not both",
        ),
        ({"engine": "paged", "pilaf": "playground:tiny"}, "`--pilaf` decodes with our own loop; leave `--engine paged` out"),
        (
            {"engine": "paged", "speculative_rejection": 0.5, "best_of": 4, "reward": "r", "checkpoints": [4]},
            "`--speculative_rejection` decodes with our own loop",
        ),
        ({"out": "samples.json"}, "`out` is a file that ends with `.jsonl`, got 'samples.json'"),
        ({"prompts": "samples.jsonl"}, "`out` is samples.jsonl, which is read, too, and would be overwritten"),
    ],
)
def test_what_cannot_be_meant_is_refused_before_anything_is_loaded(place: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sample(model="no/such/model/here", **options)


def test_places_are_checked() -> None:
    with pytest.raises(FileNotFoundError, match=r"There is no folder .*nowhere for `out` \(nowhere/a.jsonl\); make it first"):
        output_file("nowhere/a.jsonl", "out", suffix=".jsonl")
    with pytest.raises(ValueError, match="Unknown device 'gpu'; expected `auto`, `cpu`"):
        device_named("gpu")


def test_a_mistake_is_told_in_one_paragraph(place: Path) -> None:
    with pytest.raises(SystemExit, match=r"error: `--best_of` keeps the response with the highest reward; say with `--reward`"):
        main(["sample", "--best-of", "4"])
