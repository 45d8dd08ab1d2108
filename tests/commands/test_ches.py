"""The `ches` command on the playground and on files: its table against each row alone, its filter, its messages."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from lightning_pref.__main__ import main
from lightning_pref.commands.ches import ches
from lightning_pref.data.playground import playground_rows
from lightning_pref.data.playground_tokenizer import playground_tokenizer
from lightning_pref.models.backbones import load_model
from lightning_pref.models.pair_table import PAIR_COLUMNS

Command = Callable[..., dict[str, list[Any]]]
TOKENIZER = playground_tokenizer()


@pytest.fixture
def command(tmp_path: Path) -> Command:
    """Run `ches` on a file of rows in a folder of its own, and read the scores."""

    def run(rows: list[dict[str, Any]] | str, **settings: Any) -> dict[str, list[Any]]:
        data = rows if isinstance(rows, str) else write_rows(tmp_path / "pairs.jsonl", rows)
        out = str(tmp_path / "scores.parquet")
        ches("playground:tiny", data, **{"out": out, "cache_dir": str(tmp_path / "cache"), **settings})
        columns: dict[str, list[Any]] = pq.read_table(out).to_pydict()
        return columns

    return run


def write_rows(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def read_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def pairs(count: int = 12) -> list[dict[str, Any]]:
    return list(playground_rows("preference", count, seed=3))


@torch.no_grad()
def states_and_logp(model: PreTrainedModel, prompt: list[int], response: list[int]) -> tuple[np.ndarray[Any, Any], float]:
    """Oracle: one sequence through transformers alone; the states that predict the response, and its log-probability."""
    out = model(torch.tensor([prompt + response]), output_hidden_states=True)
    logps = out.logits[0, len(prompt) - 1 : -1].double().log_softmax(-1)
    states = out.hidden_states[-1][0, len(prompt) - 1 : -1].double().numpy()
    return states, logps.gather(1, torch.tensor(response)[:, None]).sum().item()


def test_every_column_is_that_of_the_row_alone(command: Command) -> None:
    rows = pairs()
    found = command(rows, max_tokens_per_batch=400, beta=0.2)
    assert list(found) == list(PAIR_COLUMNS)
    assert found["row_id"] == list(range(len(rows)))
    assert found["source"] == [row["source"] for row in rows]
    model = load_model("playground:tiny").eval()
    for i, row in enumerate(rows):
        prompt = TOKENIZER.apply_chat_template(row["prompt"], add_generation_prompt=True)["input_ids"]
        sides = {}
        for side in ("chosen", "rejected"):
            whole = TOKENIZER.apply_chat_template(row["prompt"] + row[side])["input_ids"]
            sides[side] = states_and_logp(model, prompt, whole[len(prompt) :])
            assert found[f"{side}_length"][i] == len(whole) - len(prompt)
            assert found[f"ref_{side}_logps"][i] == pytest.approx(sides[side][1], rel=1e-4)
        (chosen, chosen_logp), (rejected, rejected_logp) = sides["chosen"], sides["rejected"]
        h, g = chosen.sum(0), rejected.sum(0)
        assert found["ches"][i] == pytest.approx(h @ g - h @ h, rel=1e-3, abs=1e-2)
        h, g = chosen.mean(0), rejected.mean(0)
        assert found["length_normalized_ches"][i] == pytest.approx(h @ g - h @ h, rel=1e-3, abs=1e-4)
        assert found["prompt_length"][i] == len(prompt)
        assert found["ranked_rightly"][i] == (chosen_logp >= rejected_logp)
        assert found["ranked_rightly_per_token"][i] == (chosen_logp / len(chosen) >= rejected_logp / len(rejected))
        difficulty = rejected_logp - chosen_logp
        assert found["difficulty"][i] == pytest.approx(difficulty, abs=2e-2)
        assert found["flip_threshold"][i] == pytest.approx(np.log1p(np.exp(-0.2 * difficulty)), rel=1e-2)


def test_edits_are_counted_in_tokens(command: Command) -> None:
    rows = [{"prompt": "Hello", "chosen": " a b c d e f", "rejected": " a b x d e"}]
    found = command(rows)
    chosen, rejected = (TOKENIZER(rows[0][side], add_special_tokens=False)["input_ids"] for side in ("chosen", "rejected"))
    assert found["edit_distance"][0] >= 2
    assert found["normalized_edit_distance"][0] == found["edit_distance"][0] / max(
        found["chosen_length"] + found["rejected_length"]
    )
    assert found["shared_prefix"][0] == next(i for i, (a, b) in enumerate(zip(chosen, rejected, strict=False)) if a != b)


def test_the_top_rows_are_dropped_and_the_others_written_as_they_were(
    command: Command, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{**row, "note": i} for i, row in enumerate(pairs(20))]
    found = command(rows, drop_top="10%")
    order = np.argsort(found["length_normalized_ches"])
    expected = sorted(order[-2:].tolist())
    assert [i for i, dropped in zip(found["row_id"], found["dropped"], strict=True) if dropped] == expected
    assert read_lines(tmp_path / "scores.kept.jsonl") == [row for i, row in enumerate(rows) if i not in expected]
    printed = capsys.readouterr().out
    assert "kept 18 rows, dropped 2: " in printed
    assert "length-normalized CHES" in printed and "#" in printed


def test_what_is_kept_scores_as_before(command: Command, tmp_path: Path) -> None:
    rows = pairs(10)
    first = command(rows, drop_top="0.2", kept=str(tmp_path / "rest.jsonl"))
    second = command(str(tmp_path / "rest.jsonl"))
    kept = [score for score, dropped in zip(first["length_normalized_ches"], first["dropped"], strict=True) if not dropped]
    assert second["length_normalized_ches"] == pytest.approx(kept, rel=1e-3, abs=1e-4)


def test_rows_keep_their_own_column_names(command: Command, tmp_path: Path) -> None:
    rows = [{"question": row["prompt"], "chosen": row["chosen"], "rejected": row["rejected"]} for row in pairs(4)]
    command(rows, columns={"prompt": "question", "chosen": "chosen", "rejected": "rejected"}, drop_top="25%")
    assert {tuple(row) for row in read_lines(tmp_path / "scores.kept.jsonl")} == {("question", "chosen", "rejected")}


def test_rows_that_were_not_scored_are_kept_or_counted(
    command: Command, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    single = {"prompt": "Hello", "completion": " a"}
    bad = {"prompt": "Hello", "chosen": "", "rejected": " b"}
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [*pairs(4), single, bad]) + "{broken\n")
    found = command(str(tmp_path / "pairs.jsonl"), drop_top="25%", on_bad_row="skip")
    assert found["row_id"] == [0, 1, 2, 3]
    printed = capsys.readouterr().out
    assert "kept 3 rows, dropped 1, 2 not scored and written too, 1 unreadable and left out" in printed
    assert "rows without a pair" in printed
    assert [single, bad] == read_lines(tmp_path / "scores.kept.jsonl")[-2:]


def test_ranked_rows_give_all_their_pairs(command: Command) -> None:
    rows = [{"prompt": "Hello", "responses": [" a", " b", " c"], "scores": [0.0, 2.0, 1.0]} for _ in range(2)]
    found = command(rows)
    assert found["row_id"] == [0, 0, 0, 1, 1, 1]
    assert list(zip(found["chosen"], found["rejected"], strict=True))[:3] == [(1, 2), (1, 0), (2, 0)]
    assert command(rows, pairs="best_worst")["row_id"] == [0, 1]


def test_the_command_line_needs_nothing_from_outside(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "scores.parquet"
    settings = ["--drop-top", "0.05", "--playground.num_rows", "40", f"--out={out}", f"--cache_dir={tmp_path / 'cache'}"]
    main(["ches", "--model", "playground:tiny", "--data", "playground:preference", *settings])
    assert pq.read_metadata(out).num_rows == 40
    metadata = pq.read_schema(out).metadata
    assert metadata[b"model"] == b"playground:tiny" and metadata[b"beta"] == b"0.1"
    assert read_lines(tmp_path / "scores.kept.jsonl")[0] == next(playground_rows("preference", 1))
    assert "kept 38 rows, dropped 2" in capsys.readouterr().out


def test_settings_of_the_tokens_are_those_of_training(command: Command, tmp_path: Path) -> None:
    rows = pairs(6)
    plain = command(rows)
    longest = int(np.max(np.array(plain["prompt_length"]) + plain["chosen_length"]))
    cut = command(rows, max_length=longest - 3)
    assert sum(cut["chosen_length"]) < sum(plain["chosen_length"])
    assert cut["ches"] != plain["ches"]
    dropped = command(rows, max_length=longest - 3, truncation="drop", drop_top="25%")
    assert 0 < len(dropped["row_id"]) < len(rows)
    assert max(command(rows, max_prompt_length=20)["prompt_length"]) == 20
    template = "{% for message in messages %}{{ message.content }}{{ strftime_now('%d %B') }}{% endfor %}"
    days = [command(rows, chat_template=template, template_date=day) for day in ("2024-05-01", "2024-06-30")]
    assert days[0]["prompt_length"] != plain["prompt_length"]
    assert days[0]["ches"] != days[1]["ches"]
    other = playground_tokenizer()
    other.chat_template = template
    other.save_pretrained(tmp_path / "tokenizer")
    by_tokenizer = command(rows, tokenizer=str(tmp_path / "tokenizer"), template_date="2024-05-01")
    assert by_tokenizer["ches"] == days[0]["ches"]


def test_the_first_rows_can_be_tried_alone(command: Command, tmp_path: Path) -> None:
    rows = pairs(6)
    assert command(rows, limit_rows=4, drop_top="25%")["row_id"] == [0, 1, 2, 3]
    kept = read_lines(tmp_path / "scores.kept.jsonl")
    assert len(kept) == 3 and all(row in rows[:4] for row in kept)


def test_a_split_of_a_saved_data_set_is_scored_and_filtered(command: Command, tmp_path: Path) -> None:
    rows = pairs(9)
    splits = {"train": datasets.Dataset.from_list(rows[:5]), "test": datasets.Dataset.from_list(rows[5:])}
    datasets.DatasetDict(splits).save_to_disk(tmp_path / "saved")
    found = command(str(tmp_path / "saved"), split="test", drop_top="25%")
    assert found["row_id"] == [0, 1, 2, 3]
    assert read_lines(tmp_path / "scores.kept.jsonl") == [row for i, row in enumerate(rows[5:]) if not found["dropped"][i]]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("layout", ["padded", "packed", "shared"])
def test_layouts_and_precisions_agree(command: Command, dtype: Any, layout: Any) -> None:
    rows = pairs(6)
    plain, other = command(rows, layout="padded"), command(rows, layout=layout, dtype=dtype)
    tolerance = 1e-3 if dtype == "float32" else 0.1
    assert other["length_normalized_ches"] == pytest.approx(plain["length_normalized_ches"], rel=tolerance, abs=tolerance)


def test_a_model_without_finite_states_is_refused(command: Command, tmp_path: Path) -> None:
    row = {"prompt": "Hello", "chosen": " Hello", "rejected": " Hi"}
    damaged = TOKENIZER(" x", add_special_tokens=False)["input_ids"][-1]
    size = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(TOKENIZER), **size))
    with torch.no_grad():
        model.model.embed_tokens.weight[damaged] = float("nan")
    model.save_pretrained(tmp_path / "model")
    TOKENIZER.save_pretrained(tmp_path / "model")
    data = write_rows(tmp_path / "p.jsonl", [row, {**row, "chosen": " x x x"}, row])
    with pytest.raises(ValueError, match=r"1 of 3 pairs have no finite score, the first in row 1 .* `--dtype float32`"):
        ches(str(tmp_path / "model"), data, str(tmp_path / "s.parquet"), cache_dir=str(tmp_path))
    assert not (tmp_path / "s.parquet").exists()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"drop_top": "5"}, "For 5 percent write '5%'"),
        ({"drop_top": "lots"}, "A share of rows is above 0% and below 100%, such as '5%' or '0.05'; got 'lots'"),
        (
            {"out": "scores.csv"},
            "`out` is the Parquet file for the scores, got 'scores.csv'; give a name that ends with `.parquet`",
        ),
        ({"out": "nowhere/scores.parquet"}, r"There is no folder .*nowhere for `out` \(nowhere/scores.parquet\); make it first"),
        ({"drop_top": "5%", "kept": "nowhere/rest.jsonl"}, r"There is no folder .*nowhere for `kept`"),
        ({"drop_top": "5%", "kept": "rest.csv"}, "`kept` is a file of JSON lines, got 'rest.csv'; give a name that ends with"),
        ({"kept": "rest.jsonl"}, "`kept` is the file for the rows that are left over; say what to drop with `--drop-top 5%`"),
        ({"beta": 0.0}, "`beta` must be above 0, got 0.0"),
        ({"device": "toaster"}, "Unknown device 'toaster'; expected `auto`, `cpu`, `cuda`"),
    ],
)
def test_mistakes_are_named_before_the_work(command: Command, settings: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        command(pairs(2), **settings)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_missing_gpu_is_named(command: Command) -> None:
    with pytest.raises(ValueError, match="'cuda' was asked for, but torch sees no GPU here; use `--device cpu`"):
        command(pairs(2), device="cuda")


def test_the_data_is_never_overwritten(command: Command, tmp_path: Path) -> None:
    data = write_rows(tmp_path / "pairs.jsonl", pairs(2))
    with pytest.raises(
        ValueError, match="`kept` is .*pairs.jsonl, the data itself, which would be overwritten; give another name"
    ):
        command(data, drop_top="5%", kept=str(tmp_path / "." / "pairs.jsonl"))


def test_data_without_pairs_is_refused_in_one_paragraph(tmp_path: Path) -> None:
    arguments = ["ches", "--data", "playground:sft", f"--out={tmp_path / 's.parquet'}", f"--cache_dir={tmp_path}"]
    with pytest.raises(
        SystemExit, match="error: playground:sft: there are no pairs in its 30 rows; .* CHES compares a chosen"
    ) as caught:
        main([*arguments, "--playground.num_rows", "30"])
    assert "\n" not in str(caught.value)


def test_the_page_of_the_command_names_every_column() -> None:
    page = (Path(__file__).parents[2] / "docs" / "ches.md").read_text(encoding="utf-8")
    assert [name for name in (*PAIR_COLUMNS, "dropped") if f"`{name}`" not in page] == []
