"""Flags, files and defaults of the recipes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonargparse import Namespace

from lightning_pref.cli import RunResult, on_playground, trains_on_playground
from lightning_pref.recipes import dpo, reward, sft

RECIPES = pytest.mark.parametrize("recipe", [dpo, reward, sft], ids=["dpo", "reward", "sft"])
OWN = ("--model.model=my/model", "--data.train=my.jsonl")


def printed(main: Any, capsys: pytest.CaptureFixture[str], args: Sequence[str]) -> str:
    with pytest.raises(SystemExit) as raised:
        main(list(args))
    assert raised.value.code == 0
    return capsys.readouterr().out


def configuration(main: Any, capsys: pytest.CaptureFixture[str], *args: str) -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load(printed(main, capsys, [*args, "--print_config"]))
    return loaded


def test_settings_made_for_the_playground_apply_there(capsys: pytest.CaptureFixture[str]) -> None:
    config = configuration(dpo.main, capsys)
    assert config["trainer"]["max_steps"] > 0
    assert config["model"]["optimizer"]["learning_rate"] > 1e-5
    assert config["data"]["train"] == "playground:preference"
    assert config["data"]["playground"]["num_rows"] > 0


@RECIPES
@pytest.mark.parametrize("own", [OWN, OWN[:1], OWN[1:]], ids=["both", "model", "data"])
def test_settings_made_for_the_playground_do_not_leak_into_a_run_of_ones_own(
    recipe: Any, own: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    config = configuration(recipe.main, capsys, *own)
    assert config["trainer"]["max_steps"] == -1
    assert config["trainer"]["accelerator"] == "auto"
    assert config["model"]["optimizer"]["learning_rate"] <= 2e-5
    assert config["model"].get("beta") in (None, 0.05), "the constructors' own"
    assert config["data"]["batch_size"] is None


def test_a_flag_wins_over_the_file_and_the_file_over_the_playgrounds_defaults(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    file = tmp_path / "my.yaml"
    file.write_text("model: {beta: 0.7, optimizer: {warmup: 3}}\n")
    config = configuration(dpo.main, capsys, f"--config={file}", "--model.optimizer.warmup=5")
    assert config["model"]["beta"] == 0.7
    assert config["model"]["optimizer"]["warmup"] == 5
    assert config["model"]["optimizer"]["schedule"] == "linear"  # of the playground


@RECIPES
@pytest.mark.parametrize("own", [OWN, ()], ids=["own", "playground"])
def test_a_printed_configuration_fed_back_gives_itself(
    recipe: Any, own: tuple[str, ...], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    text = printed(recipe.main, capsys, [*own, "--model.lora.r=4", "--print_config"])
    file = tmp_path / "printed.yaml"
    file.write_text(text)
    assert printed(recipe.main, capsys, [f"--config={file}", "--print_config"]) == text


@RECIPES
def test_help_explains_the_options(recipe: Any, capsys: pytest.CaptureFixture[str]) -> None:
    text = " ".join(printed(recipe.main, capsys, ["--help"]).split())
    assert f"python -m lightning_pref.recipes.{recipe.RECIPE.name}" in text
    for option, words in {
        "--model.model": "Folder or hub name of a",
        "--model.optimizer.learning_rate": "Peak learning rate",
        "--model.loading.dtype": "Keep `float32` with mixed precision",
        "--model.layout": "how prompts and responses are laid out",
        "--data.max_tokens_per_batch": "Most tokens of a batch on one device",
        "--data.on_bad_row": "stops at the first row that cannot be used",
        "--data.playground.num_rows": "",
        "--run.resume": "Checkpoint to go on from",
        "--trainer.precision": "",
    }.items():
        assert option in text
        assert words.lower() in text.lower()


@RECIPES
def test_help_begins_with_the_recipe_and_its_own_flags(recipe: Any, capsys: pytest.CaptureFixture[str]) -> None:
    text = printed(recipe.main, capsys, ["--help"])
    usage, _, about = text.splitlines()[:3]
    assert usage == f"usage: python -m lightning_pref.recipes.{recipe.RECIPE.name} [--config FILE] [--FLAG VALUE ...]"
    assert about == recipe.__doc__.splitlines()[0][: len(about)]
    assert text.index("--model.model MODEL") < text.index("--data.train TRAIN") < text.index("--trainer.precision PRECISION")
    assert "known subclasses" not in text, "every class there is"
    assert "Literal['auto', 'padded'" not in text, "the choices stand in the flag: --model.layout {auto,padded,...}"
    assert "`--trainer.strategy.help NAME` shows them" in " ".join(text.split())


def test_gold_reward_is_measured_where_the_data_is_the_playgrounds_and_nowhere_else(bench: Any) -> None:
    small = ("--data.playground.num_rows=40", "--data.playground.num_val_rows=8", "--data.cache_dir=cache")
    few = (
        "--trainer.max_steps=2",
        "--trainer.limit_val_batches=1",
        "--trainer.val_check_interval=1.0",
        "--model.optimizer.warmup=0",
    )
    result: RunResult = sft.main([*small, *few, "--trainer.max_epochs=1", "--trainer.check_val_every_n_epoch=1"])
    assert "gold_reward" in result.metrics
    assert "gold_reward" not in bench.sft(bench.rows([{"prompt": f"a{i}", "completion": " b"} for i in range(12)])).metrics


@pytest.mark.parametrize(
    ("train", "expected"),
    [
        ("playground", True),
        ("playground:sft:kitchen", True),
        ("playground_pairs.jsonl", False),
        (["playground:kitchen", "playground:travel"], True),
        (["playground", "pairs.jsonl"], False),
    ],
)
def test_the_playground_is_known_by_its_whole_name(train: str | list[str], expected: bool) -> None:
    data = Namespace(data=Namespace(train=train), model=Namespace(model="playground:tiny"))
    assert trains_on_playground(data) == expected
    assert on_playground(data) == expected
    own = Namespace(data=Namespace(train=train), model=Namespace(model="playground_model"))
    assert not on_playground(own)
