"""Whole runs on a model and data of one's own, through the recipe's `main`, as `python -m` calls it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoModelForCausalLM, AutoTokenizer

from lightning_pref.checkpoints import checkpoints_of
from lightning_pref.recipes import dpo

PAIR_KEYS = {
    "loss",
    "rewards/margins",
    "rewards/accuracies",
    "rewards/chosen",
    "rewards/rejected",
    "logps/chosen",
    "logps/rejected",
}
THROUGHPUT_KEYS = {"throughput/tokens_per_second", "throughput/rows_per_second"}


def summary_of(folder: Path) -> dict[str, Any]:
    summary: dict[str, Any] = json.loads((folder / "summary.json").read_text())
    return summary


def scalars_of(folder: Path) -> set[str]:
    events = EventAccumulator(str(folder))
    events.Reload()
    return set(events.Tags()["scalars"])


def checkpoint_of(folder: Path) -> dict[str, Any]:
    newest = checkpoints_of(folder / "checkpoints")[0]
    loaded: dict[str, Any] = torch.load(newest, weights_only=True)
    return loaded


def test_a_config_file_of_ones_own_leaves_a_run_folder_with_everything(bench: Any, capsys: pytest.CaptureFixture[str]) -> None:
    config = {
        "model": {"model": str(bench.model), "loss": "sigmoid", "beta": 0.1, "optimizer": {"learning_rate": 1e-3}},
        "data": {"train": str(bench.pairs), "cache_dir": str(bench.folder / "cache"), "max_tokens_per_batch": 256},
        "trainer": {"max_epochs": 1, "accelerator": "cpu", "log_every_n_steps": 1},
    }
    Path("my.yaml").write_text(yaml.safe_dump(config))
    result = dpo.main(["--config", "my.yaml"])

    assert result.folder.parent == Path("runs/dpo")
    entries = {entry.name for entry in result.folder.iterdir()}
    assert {"config.yaml", "metrics.csv", "checkpoints", "export", "summary.json"} <= entries
    assert not {entry.name for entry in Path.cwd().iterdir()} - {"my.yaml", "pairs.jsonl", "cache", "runs"}
    assert PAIR_KEYS | {f"val/{key}" for key in PAIR_KEYS} | THROUGHPUT_KEYS <= scalars_of(result.folder)

    summary = summary_of(result.folder)
    assert set(summary) == {"recipe", "steps", "seconds", "metrics", "alerts", "versions", "digests"}
    assert (summary["recipe"], summary["alerts"]) == ("dpo", 0)
    assert summary["steps"] == checkpoint_of(result.folder)["global_step"] > 1
    assert set(summary["digests"]) == {"data", "weights"}
    assert summary["metrics"]["loss"]["first"] == pytest.approx(0.6931, abs=1e-3)
    assert summary["metrics"]["loss"]["last"] < 0.69
    assert "gold_reward" not in summary["metrics"]

    header = (result.folder / "metrics.csv").read_text().splitlines()[0]
    assert set(header.split(",")) >= PAIR_KEYS
    saved = yaml.safe_load((result.folder / "config.yaml").read_text())
    assert saved["model"]["optimizer"]["learning_rate"] == 1e-3
    assert saved["data"]["tokenizer"] == str(bench.model)
    printed = capsys.readouterr().out
    assert "rewards/margins" in printed
    assert str(result.export) in printed


def test_the_export_gives_the_trained_modules_log_probabilities_in_plain_transformers(bench: Any) -> None:
    result = bench.dpo("--model.optimizer.learning_rate=1e-2")
    model = AutoModelForCausalLM.from_pretrained(result.export, dtype=torch.float32)
    ids = AutoTokenizer.from_pretrained(result.export)("Name a number above 3. 4 is one.", return_tensors="pt")["input_ids"]
    start = AutoModelForCausalLM.from_pretrained(bench.model, dtype=torch.float32)
    trained = AutoModelForCausalLM.from_pretrained(bench.model, dtype=torch.float32)
    state = checkpoint_of(result.folder)["state_dict"]
    trained.load_state_dict({k.removeprefix("policy."): v for k, v in state.items() if k.startswith("policy.")})
    with torch.no_grad():
        exported, expected, before = (each(ids).logits.log_softmax(-1) for each in (model, trained, start))
    assert torch.equal(exported, expected)
    assert not torch.allclose(exported, before, atol=1e-3)


def test_lora_trains_an_adapter_and_exports_a_plain_model(bench: Any, capsys: pytest.CaptureFixture[str]) -> None:
    result = bench.dpo("--model.lora.r=4", "--model.optimizer.learning_rate=1e-2")
    saved = yaml.safe_load((result.folder / "config.yaml").read_text())
    assert saved["model"]["lora"]["r"] == 4
    assert any("lora_A" in name for name in checkpoint_of(result.folder)["state_dict"])
    exported = AutoModelForCausalLM.from_pretrained(result.export).state_dict()
    start = AutoModelForCausalLM.from_pretrained(bench.model).state_dict()
    assert exported.keys() == start.keys()
    changed = {name for name in start if not torch.equal(exported[name], start[name])}
    assert changed and all("proj" in name for name in changed)
    assert "parameters are trained" in capsys.readouterr().out


def test_a_cached_reference_is_computed_once_and_found_again(bench: Any) -> None:
    first = bench.dpo("--model.reference=cache", "--run.name=first")
    stores = sorted((bench.folder / "cache" / "reference").iterdir())
    stamps = [store.stat().st_mtime_ns for store in stores]
    second = bench.dpo("--model.reference=cache", "--run.name=second")
    copied = bench.dpo("--model.reference=copy", "--run.name=copied")
    assert len(stores) == 2  # training and validation rows
    assert sorted((bench.folder / "cache" / "reference").iterdir()) == stores
    assert [store.stat().st_mtime_ns for store in stores] == stamps
    assert first.metrics["rewards/margins"] == second.metrics["rewards/margins"]
    assert first.metrics["rewards/margins"].last == pytest.approx(copied.metrics["rewards/margins"].last, abs=1e-5)


def test_a_reference_folder_of_ones_own_that_belongs_to_another_model_raises(bench: Any, another_model: Path) -> None:
    cached = ("--model.reference=cache", f"--model.reference_cache={bench.folder / 'reference'}")
    bench.dpo(*cached, "--run.name=first")
    with pytest.raises(SystemExit, match="is stale: `weights` was"):
        bench.dpo(*cached, "--run.name=second", f"--model.model={another_model}")


def test_kto_trains_on_labelled_responses(bench: Any) -> None:
    rows = [{"prompt": f"Say {i}.", "completion": f" {i}", "label": i % 2 == 0} for i in range(16)]
    result = bench.dpo(bench.rows(rows), "--model.loss=kto")
    assert {"loss", "rewards/chosen", "rewards/rejected"} <= set(result.metrics)


def test_ranked_lists_train_on_all_their_pairs(bench: Any) -> None:
    rows = [{"prompt": f"Say {i}.", "responses": [f" {i}", f" {i} or so", " no"], "ranks": [0, 1, 2]} for i in range(16)]
    result = bench.dpo(bench.rows(rows))
    assert result.metrics["rewards/margins"].last != 0.0


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "Say hello.", "completion": " Hello."},
        {"messages": [{"role": "user", "content": "Say hello."}, {"role": "assistant", "content": "Hello."}]},
    ],
    ids=["prompt-completion", "messages"],
)
def test_sft_lowers_the_loss_of_demonstrations(bench: Any, row: dict[str, object]) -> None:
    result = bench.sft(bench.rows([row] * 8), "--data.val_size=0", "--model.optimizer.learning_rate=1e-2")
    assert result.folder.parent.name == "sft"
    assert result.metrics["loss"].last < result.metrics["loss"].first


@pytest.mark.parametrize("suffix", ["csv", "parquet"])
def test_a_table_trains_as_the_same_rows_in_json_do(bench: Any, suffix: str) -> None:
    import pyarrow as pa
    import pyarrow.csv
    import pyarrow.parquet

    table = pa.Table.from_pylist([json.loads(line) for line in bench.pairs.read_text().splitlines()])
    path = bench.folder / f"pairs.{suffix}"
    (pa.csv.write_csv if suffix == "csv" else pa.parquet.write_table)(table, path)
    from_json, from_table = bench.dpo("--run.name=json"), bench.dpo("--run.name=table", f"--data.train={path}")
    assert from_table.metrics["loss"] == from_json.metrics["loss"]


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_half_precision_comes_close_to_full_precision(bench: Any, precision: str) -> None:
    full = bench.dpo("--run.name=full", "--trainer.max_steps=1")
    half = bench.dpo("--run.name=half", "--trainer.max_steps=1", f"--trainer.precision={precision}")
    assert half.metrics["logps/chosen"].last == pytest.approx(full.metrics["logps/chosen"].last, rel=0.02)
    assert half.metrics["logps/chosen"].last != full.metrics["logps/chosen"].last
    # With weights in 16 bit, how many updates they do not feel is watched.
    assert ("lost_updates/share" in half.metrics) == (precision == "bf16-true")


def test_two_accumulated_batches_take_the_step_of_one_twice_as_large(bench: Any) -> None:
    # One update of all 20 rows an epoch, so that both runs see the same rows in each.
    epochs = ("--trainer.max_epochs=3", "--trainer.max_steps=-1", "--model.optimizer.learning_rate=1e-3")
    whole = bench.dpo(*epochs, "--run.name=whole", "--data.batch_size=20")
    halves = bench.dpo(*epochs, "--run.name=halves", "--data.batch_size=10", "--trainer.accumulate_grad_batches=2")
    assert summary_of(halves.folder)["steps"] == summary_of(whole.folder)["steps"] == 3
    for key in PAIR_KEYS:
        assert halves.metrics[key].last == pytest.approx(whole.metrics[key].last, rel=1e-4, abs=1e-6)


def test_without_a_logger_the_summary_and_the_configuration_are_still_there(bench: Any) -> None:
    result = bench.dpo("--trainer.logger=false")
    assert {entry.name for entry in result.folder.iterdir()} == {".lock", "config.yaml", "summary.json", "checkpoints", "export"}
    assert "loss" in summary_of(result.folder)["metrics"]


def test_a_logger_of_ones_own_replaces_the_default_ones(bench: Any) -> None:
    logger = {"class_path": "lightning.pytorch.loggers.CSVLogger", "init_args": {"save_dir": "mine"}}
    result = bench.dpo(f"--trainer.logger={json.dumps(logger)}")
    assert list(Path("mine").rglob("metrics.csv"))
    assert {entry.name for entry in result.folder.iterdir()} == {".lock", "config.yaml", "summary.json", "checkpoints", "export"}


def test_alerts_are_told_of_where_the_logger_of_ones_own_has_its_folder(bench: Any, capsys: pytest.CaptureFixture[str]) -> None:
    logger = {"class_path": "lightning.pytorch.loggers.CSVLogger", "init_args": {"save_dir": "mine"}}
    result = bench.dpo(f"--trainer.logger={json.dumps(logger)}", "--trainer.callbacks+=outspoken.Outspoken", "--run.name=told")
    (written,) = Path.cwd().rglob("alerts.jsonl")
    assert written.is_relative_to(Path.cwd() / "mine")
    assert summary_of(result.folder)["alerts"] == 1
    printed = capsys.readouterr().out
    assert "warning outspoken/says since step 1" in printed
    assert str(written.relative_to(Path.cwd())) in printed


def test_callbacks_of_ones_own_are_added_to_those_of_the_recipe(bench: Any) -> None:
    early = {"class_path": "lightning.pytorch.callbacks.EarlyStopping", "init_args": {"monitor": "loss", "stopping_threshold": 9}}
    result = bench.dpo(f"--trainer.callbacks={json.dumps([early])}", "--trainer.max_steps=-1", "--trainer.max_epochs=3")
    assert summary_of(result.folder)["steps"] < 15
    assert set(result.metrics) >= THROUGHPUT_KEYS


def test_checkpoints_and_export_can_be_left_out(bench: Any, capsys: pytest.CaptureFixture[str]) -> None:
    result = bench.dpo("--trainer.enable_checkpointing=false", "--run.export=false")
    assert result.export is None
    assert not {"checkpoints", "export"} & {entry.name for entry in result.folder.iterdir()}
    assert "AutoModel" not in capsys.readouterr().out


def test_a_resumed_run_goes_on_from_the_saved_step_and_ends_as_if_uninterrupted(bench: Any) -> None:
    # A constant schedule, because another depends on the length of the run.
    constant = ("--model.optimizer.schedule=constant", "--model.optimizer.warmup=1", "--model.optimizer.learning_rate=1e-3")
    args = (*constant, "--trainer.max_steps=-1")
    whole = bench.dpo(*args, "--run.name=whole", "--trainer.max_epochs=2")
    half = bench.dpo(*args, "--run.name=half", "--trainer.max_epochs=1")
    rest = bench.dpo(*args, "--run.name=half", "--trainer.max_epochs=2", "--resume=auto")
    assert rest.folder == half.folder
    assert [summary_of(run.folder)["steps"] for run in (whole, rest)] == [10, 10]
    assert rest.metrics["loss"] == whole.metrics["loss"]
    assert summary_of(rest.folder)["metrics"].keys() == summary_of(whole.folder)["metrics"].keys()
    assert summary_of(rest.folder)["digests"] == summary_of(whole.folder)["digests"]


def test_one_seed_orders_the_data_and_makes_fresh_weights_unless_they_have_their_own(bench: Any) -> None:
    folder = bench.dpo("--run.name=five", "--seed_everything=5", "--model.loading.seed=3").folder
    config = yaml.safe_load((folder / "config.yaml").read_text())
    assert (config["data"]["seed"], config["model"]["loading"]["seed"]) == (5, 3)
    first, same, other = (
        summary_of(bench.dpo(f"--run.name={name}", f"--seed_everything={seed}", "--data.batch_size=2").folder)["digests"]
        for name, seed in (("a", 1), ("b", 1), ("c", 2))
    )
    assert first == same != other
