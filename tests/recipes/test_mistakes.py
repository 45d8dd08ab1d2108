"""What a user gets wrong ends in one paragraph with the cure."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lightning_pref.recipes import dpo


def error_of(run: Any, *args: Any) -> str:
    """The message the run ends with; it is one paragraph."""
    with pytest.raises(SystemExit) as raised:
        run(*args)
    text = str(raised.value)
    assert text.startswith("error: ")
    assert "\n" not in text and "Traceback" not in text
    return text


def test_a_bad_row_ends_the_run_with_its_file_and_number(bench: Any) -> None:
    with bench.pairs.open("a") as file:
        file.write('{"prompt": "Say it.", "chosen": " It."}\n')
    assert "pairs.jsonl, row 25: found the columns chosen, prompt" in error_of(bench.dpo)


def test_bad_rows_can_be_skipped_and_are_counted(bench: Any, caplog: pytest.LogCaptureFixture) -> None:
    with bench.pairs.open("a") as file:
        file.write('{"prompt": "Say it.", "chosen": " It."}\n')
    bench.dpo("--data.on_bad_row=skip")
    assert "skipped 1 of 25 rows of pairs.jsonl" in caplog.text


def test_a_folder_that_holds_a_run_is_refused_with_the_way_to_go_on(bench: Any) -> None:
    folder = bench.dpo("--run.name=mine").folder
    text = error_of(bench.dpo, "--run.name=mine")
    assert f"The run folder {folder} is not empty" in text
    assert "--run.name mine --run.resume auto" in text


def test_a_folder_where_a_run_failed_at_its_start_can_be_used_again(bench: Any) -> None:
    error_of(bench.dpo, "--run.name=mine", "--model.reference=adapter")
    assert bench.dpo("--run.name=mine").folder.name == "mine"


def test_a_missing_model_folder_is_named(bench: Any) -> None:
    assert "There is no folder './nowhere'" in error_of(bench.dpo, "--model.model=./nowhere")


def test_a_missing_data_file_is_named_with_the_nearest_one(bench: Any) -> None:
    text = error_of(bench.dpo, "--data.train=pair.jsonl")
    assert "no such file or folder" in text
    assert "pairs.jsonl" in text


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--model.loss=sigmod"], "did you mean 'sigmoid'?"),
        (["--model.optimizer.learning_rate=-1"], "`learning_rate` must be positive"),
        (["--model.loss=simpo", "--model.reference=adapter"], "Turn LoRA on, or use the reference 'copy'"),
    ],
)
def test_a_setting_that_cannot_be_meant_is_explained(bench: Any, args: list[str], message: str) -> None:
    assert message in error_of(bench.dpo, *args)


def test_what_lightning_refuses_beside_the_data_is_one_paragraph_as_well(bench: Any) -> None:
    with pytest.raises(SystemExit) as raised:
        bench.dpo("--trainer.val_check_interval=50")
    assert raised.value.code == 2
    said = "`val_check_interval` (50) must be less than or equal to the number of the training batches (5)"
    text = error_of(bench.dpo, "--trainer.val_check_interval=50", "--run.name=again")
    assert text.startswith(f"error: The Trainer cannot be set up so: {said}")
    assert "Change the `--trainer.*` setting it speaks of, or leave it out." in text


def test_a_misspelt_flag_is_refused(bench: Any, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as raised:
        bench.dpo("--data.trian=x")
    assert raised.value.code == 2
    assert "--data.trian" in capsys.readouterr().err


def test_several_processes_from_outside_need_a_name_for_the_run(bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "`--run.name my-run`" in error_of(bench.dpo)
    assert not Path("runs").exists()


def test_a_setting_is_refused_before_the_first_stage_of_the_playground_and_not_after_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert "did you mean 'sigmoid'?" in error_of(dpo.main, ["--model.loss=sigmod"])
    assert not (tmp_path / "runs" / "sft").exists()
