"""A user's mistake ends in one paragraph and code 2, an interrupt in 130, a fault of the program in its traceback."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from rollouts import speaker
from speakers import PairRegression, quiet_trainer
from transformers import LlamaForCausalLM
from typing_extensions import override

from lightning_pref.__main__ import main
from lightning_pref.arguments import check_config, plain
from lightning_pref.callbacks.hosts import as_floats
from lightning_pref.data.playground_tokenizer import playground_tokenizer
from lightning_pref.mistakes import Ended, end, explanation, mistakes_in_one_paragraph, one_paragraph, without_debug
from lightning_pref.models.backbones import load_model, load_tokenizer
from lightning_pref.models.reward_models import build_reward_model
from lightning_pref.recipes import dpo, rlhf


def error_of(run: Callable[..., object], *args: object) -> str:
    """The one paragraph that it ends with; the exit code is 2."""
    with pytest.raises(Ended) as raised:
        run(*args)
    text = str(raised.value)
    assert raised.value.code == 2
    assert text.startswith("error: ")
    assert text.isprintable() and "Traceback" not in text
    return text


@pytest.mark.parametrize(
    ("args", "found", "cure"),
    [
        (["--model.bta=1"], "There is no option `--model.bta`", "Did you mean `--model.beta`"),
        (["--learning_rate=1"], "There is no option `--learning_rate`", "Did you mean `--model.optimizer.learning_rate`?"),
        (["--nonsense.of.mine=1"], "There is no option `--nonsense.of.mine`", "`--help` lists all options"),
        (["--model.beta=much"], "`--model.beta`: got much", "expected float, null"),
        (["--model.beta"], "--model.beta: expected one argument", "`--help`"),
        (["--trainer.max_steps=1.5"], "`--trainer.max_steps`: got 1.5", "expected int"),
        (["--model.loading.dtype=float99"], "got float99", "expected one of 'auto', 'float32'"),
        (["--trainer.callbacks+=foo.Bar"], "No module named 'foo'", "A class is given by its path, `package.module.ClassName`"),
        (["--model.optimizer=3"], "`--model.optimizer`", "expected a file with these settings"),
        (["--data.batch_size=0"], "`batch_size` must be at least 1, got 0.", ""),
        (["--trainer.accelerator=gpu"], "The Trainer cannot be set up so: ", "Change the `--trainer.*` setting"),
        (["--trainer.strategy=ddppp"], "ddppp", "Change the `--trainer.*` setting"),
        (["--trainer.devices=-3"], "The Trainer cannot be set up so", ""),
        (["--trainer.precision=16-mixd"], "16-mixd", ""),
        (["--data.chat_template=nowhere.jinja"], "no chat template at ", "Correct the path"),
        (["--data.template_date=today"], "`template_date` is a day such as 2024-07-26, got 'today'", ""),
    ],
)
def test_a_mistake_on_the_command_line_says_what_was_found_and_what_to_do(
    args: list[str], found: str, cure: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if torch.cuda.is_available() and args == ["--trainer.accelerator=gpu"]:
        pytest.skip("there is a GPU")
    monkeypatch.chdir(tmp_path)
    text = error_of(dpo.main, [*args, "--trainer.max_steps=1", "--data.cache_dir=cache"])
    assert found in text and cure in text
    assert capsys.readouterr().err.count(text) == 1, "it is said once, on standard error"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"model:\n  loss: [a\n", r"my.yaml, line 3, column 1: .*expected ',' or '\]'"),
        (b"model:\n  beta: 1\n bta: 2\n", r"my.yaml, line 3"),
        (b"model:\n  loss: \xff\xfe\n", r"my.yaml is no UTF-8 text \(byte 15 is 0xff\)\. Save it as UTF-8"),
        (b"", r"my.yaml holds nothing; expected named settings"),
        (b"[1, 2]", r"my.yaml holds a list; expected named settings"),
        (b"1: 2", r"my.yaml holds a dict"),
        (b"a: \x00", r"special characters are not allowed"),
        (b"model: !!python/object/apply:os.system ['touch harm']", r"line 1, column 8: could not determine a constructor"),
        (b"model: 3\n", r"`--model`: got 3; expected a group of settings: --model"),
        (b"model: {optimizer: {warmup: null}}\n", r"`--model.optimizer.warmup`: got null; expected .*float. Give a value"),
        (b"model: {layout: null}\n", r"`--model.layout`: got null; expected auto or padded or packed or shared\. Give a value"),
        (b"model: {tail_weight: 1" + 400 * b"0" + b"}\n", r"int too large to convert to float"),
        (b"? " + 5000 * b"x" + b"\n: 1\n", r"There is no option `--x{195}\.\.\.`\. "),
        (b"model: {optimizer: null}\n", r"`--model.optimizer`: got null; expected a group of settings: --model.optimizer"),
        (b"model:\n  bta: 0.1\n", r"no option `--model.bta`. Did you mean `--model.beta`"),
        (b"modle:\n  beta: 0.1\n", r"no option `--modle.beta`. Did you mean `--model.beta`"),
        (b"[" * 1500, r"my.yaml is nested too deeply"),
    ],
)
def test_a_broken_configuration_file_is_named_with_the_line(
    content: bytes, message: str, tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my.yaml").write_bytes(content)
    text = error_of(dpo.main, ["--config=my.yaml"])
    assert re.search(message, text), text
    assert not (tmp_path / "harm").exists(), "YAML is data"
    assert not (tmp_path / "runs").exists(), "nothing was begun"


def test_a_configuration_file_that_is_not_there_is_named_beside_the_nearest_one(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("model: {beta: 0.1}\n")
    with pytest.raises(FileNotFoundError, match=r"there is no file .*min.yaml\. Did you mean '.*mine.yaml'\?"):
        check_config(tmp_path / "min.yaml")
    with pytest.raises(ValueError, match=r"is a folder; expected a file of settings in YAML"):
        check_config(tmp_path)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["chess"], "unknown command 'chess'. Did you mean 'ches'? Known: ches (score preference pairs"),
        (["ches", "--modle=a"], "There is no option `--modle`. Did you mean `--model`?"),
        (["ches", "--data=nowhere.jsonl"], "no such file or folder"),
        (["teacher", "--policy=a"], "arguments are required: reward_model"),
        (["sample", "--num_prompts=many"], "`--num_prompts`: got many; expected int"),
    ],
)
def test_commands_explain_mistakes_like_recipes(args: list[str], message: str, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    assert message in error_of(main, args)


def test_an_unknown_preset_is_named_beside_the_known_ones() -> None:
    assert "Unknown preset 'grp'; known: dapo, " in error_of(rlhf.main, ["--preset=grp"])


def test_debug_shows_the_traceback_before_the_paragraph(capsys: pytest.CaptureFixture[str]) -> None:
    quiet = error_of(dpo.main, ["--model.beta=x"])
    assert "Traceback" not in capsys.readouterr().err
    for command in (dpo.main, main):
        error_of(command, (["ches"] if command is main else []) + ["--debug", "--config=nowhere.yaml"])
        shown = capsys.readouterr().err
        assert "Traceback (most recent call last)" in shown and "lightning_pref/" in shown
        assert shown.splitlines()[-1].startswith("error: ")
    assert quiet == error_of(dpo.main, ["--model.beta=x"]), "the flag of one call does not stay on for the next"
    assert "Traceback" not in capsys.readouterr().err


def test_debug_is_no_setting(capsys: pytest.CaptureFixture[str]) -> None:
    assert without_debug(["--a", "--debug", "--b=--debug"]) == (["--a", "--b=--debug"], True)
    with pytest.raises(SystemExit) as raised:
        dpo.main(["--debug", "--print_config"])
    assert raised.value.code == 0
    assert "debug" not in capsys.readouterr().out


def test_what_python_raises_at_a_line_of_ours_is_a_fault_of_the_program() -> None:
    """`float("x")` in the package is nobody's words for the user, although a ValueError leaves a line of the package."""
    with pytest.raises(ValueError, match="could not convert") as raised:
        as_floats({"loss": "x"})  # type: ignore[dict-item]
    assert explanation(raised.value) is None
    with pytest.raises(ValueError, match="could not convert"), mistakes_in_one_paragraph():
        as_floats({"loss": "x"})  # type: ignore[dict-item]


def test_a_fault_inside_a_function_of_the_users_keeps_its_traceback() -> None:
    def of_the_user() -> None:
        raise ValueError("my own")

    with pytest.raises(ValueError, match="my own"), mistakes_in_one_paragraph():
        of_the_user()


def test_a_fault_of_the_users_own_loader_keeps_its_traceback_although_lightning_asked_for_it() -> None:
    class Broken(L.LightningDataModule):
        @override
        def train_dataloader(self) -> object:
            raise ValueError("of mine")

    with pytest.raises(ValueError, match="of mine"), mistakes_in_one_paragraph():
        quiet_trainer(max_epochs=1).fit(PairRegression(), Broken())


def test_a_first_stage_that_ends_the_run_is_explained_once(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(Ended), mistakes_in_one_paragraph(), mistakes_in_one_paragraph():
        end("Wrong.")
    assert capsys.readouterr().err == "error: Wrong.\n"


def test_a_paragraph_has_one_line_and_no_commands_to_the_terminal() -> None:
    assert one_paragraph("a\n\n b\x1b[31m\u202e\ud800") == "a b\\x1b[31m\\u202e\\ud800"


@pytest.mark.parametrize("make", [lambda path: path.mkdir(), lambda path: None], ids=["folder", "missing"])
def test_what_the_system_says_of_a_file_gets_a_cure(make: Callable[[Path], None], tmp_path: Path) -> None:
    path = tmp_path / "there"
    make(path)
    with (
        pytest.raises(Ended, match=rf"error: {path}: (is a directory\. Give a file|no such file or directory\. Correct)"),
        mistakes_in_one_paragraph(),
    ):
        path.read_text()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_that_may_not_be_read_gets_a_cure(tmp_path: Path) -> None:
    path = tmp_path / "mine"
    path.write_text("secret")
    path.chmod(0)
    with pytest.raises(Ended, match=r"permission denied\. Allow this user to use it"), mistakes_in_one_paragraph():
        path.read_text()


def test_a_missing_file_of_the_package_is_a_fault_of_the_program() -> None:
    with pytest.raises(FileNotFoundError), mistakes_in_one_paragraph():
        (Path(dpo.__file__).parent / "configs" / "nothing.yaml").read_text()


@pytest.mark.parametrize("content", [b"", b"no checkpoint", b"PK\x03\x04" + b"\x00" * 40, b"\x80\x04."])
def test_a_checkpoint_that_is_none_is_named(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "mine.ckpt"
    path.write_bytes(content)
    with (
        pytest.raises(Ended, match=rf"{path}: this is no whole checkpoint \(.+\)\. Give a file that a run wrote"),
        mistakes_in_one_paragraph(),
    ):
        torch.load(path, weights_only=True)


def resize(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "hidden_size": 48, "head_dim": 8}))


SPOILT: dict[str, Callable[[Path], None]] = {
    "nothing in it": lambda folder: [path.unlink() for path in folder.iterdir()] and None,
    "no config": lambda folder: (folder / "config.json").unlink(),
    "no weights": lambda folder: (folder / "model.safetensors").unlink(),
    "config is no JSON": lambda folder: (folder / "config.json").write_text("{") and None,
    "config is a list": lambda folder: (folder / "config.json").write_text("[]") and None,
    "config is not UTF-8": lambda folder: (folder / "config.json").write_bytes(b"\xff\xfe{}") and None,
    "config without a type": lambda folder: (folder / "config.json").write_text("{}") and None,
    "config of an unknown type": lambda folder: (folder / "config.json").write_text('{"model_type": "nope"}') and None,
    "config with nonsense": lambda folder: (
        (folder / "config.json").write_text('{"model_type": "llama", "hidden_size": "x", "architectures": ["LlamaForCausalLM"]}')
        and None
    ),
    "weights cut off": lambda folder: (
        (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:5000]) and None
    ),
    "weights are text": lambda folder: (folder / "model.safetensors").write_text("weights") and None,
    "weights of another size": resize,
}


@pytest.mark.parametrize("name", SPOILT)
@pytest.mark.parametrize("load", [load_model, build_reward_model], ids=["policy", "reward model"])
def test_a_model_folder_that_is_none_is_explained(
    name: str, load: Callable[[str], object], tmp_path: Path, tiny_model: Callable[..., LlamaForCausalLM]
) -> None:
    tiny_model().save_pretrained(tmp_path)
    SPOILT[name](tmp_path)
    assert str(tmp_path) in error_of(_within, load, str(tmp_path))


SPOILT_TOKENIZERS: dict[str, Callable[[Path], object]] = {
    "none": lambda folder: [path.unlink() for path in folder.glob("tokenizer*")],
    "tokenizer is no JSON": lambda folder: (folder / "tokenizer.json").write_text("{"),
    "tokenizer is empty JSON": lambda folder: (folder / "tokenizer.json").write_text("{}"),
    "tokenizer is not UTF-8": lambda folder: (folder / "tokenizer.json").write_bytes(b"\xff\xfe"),
    "configuration is no JSON": lambda folder: (folder / "tokenizer_config.json").write_text("["),
    "configuration is a list": lambda folder: (folder / "tokenizer_config.json").write_text("[]"),
    "only a configuration": lambda folder: (folder / "tokenizer.json").unlink(),
}


@pytest.mark.parametrize("name", SPOILT_TOKENIZERS)
def test_a_tokenizer_that_is_none_is_explained(name: str, tmp_path: Path, tiny_model: Callable[..., LlamaForCausalLM]) -> None:
    tiny_model().save_pretrained(tmp_path)
    playground_tokenizer().save_pretrained(tmp_path)
    SPOILT_TOKENIZERS[name](tmp_path)
    assert str(tmp_path) in error_of(_within, load_tokenizer, str(tmp_path))


def test_an_adapter_in_place_of_a_model_is_explained(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    assert "holds a PEFT adapter without its base model. Merge it first" in error_of(_within, load_model, str(tmp_path))


@pytest.mark.parametrize("name", ["", "no/such-model-anywhere", "a b", "\x00", "x" * 300, "~nobody/model", "a/b/c", "--model"])
def test_a_model_name_that_is_neither_folder_nor_on_the_hub_is_explained(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for load in (load_model, load_tokenizer, build_reward_model):
        assert repr(name)[1:-1] in error_of(_within, load, name)


def _within(function: Callable[..., object], *args: object) -> None:
    with mistakes_in_one_paragraph():
        function(*args)


def test_the_parser_is_not_asked_for_what_it_cannot_say() -> None:
    assert plain("odd\n  words", []) == "odd words. `--help` explains all options."


def start(*args: str, folder: Path, **kwargs: Any) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", *args]
    return subprocess.Popen(command, cwd=folder, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **kwargs)


SMALL = (
    "--data.playground.num_rows=400", "--data.playground.num_val_rows=8", "--data.cache_dir=cache", "--trainer.max_steps=100000",
    "--trainer.max_epochs=100000", "--trainer.limit_val_batches=0", "--run.name=mine", "--trainer.enable_progress_bar=false",
)  # fmt: skip


@pytest.mark.slow
@pytest.mark.timeout(700)
def test_ctrl_c_ends_a_run_with_130_and_says_where_its_checkpoint_lies(tmp_path: Path) -> None:
    with start("lightning_pref.recipes.sft", *SMALL, "--checkpoint.every_n_updates=5", folder=tmp_path) as process:
        deadline = time.monotonic() + 300
        while not list((tmp_path / "runs/sft/mine").glob("checkpoints/*.json")) and time.monotonic() < deadline:
            assert process.poll() is None, process.communicate()
            time.sleep(0.2)
        process.send_signal(signal.SIGINT)
        _, shown = process.communicate(timeout=300)
    assert process.returncode == 130
    assert "Traceback" not in shown
    assert "Stopped (Ctrl-C); the last checkpoint is runs/sft/mine/checkpoints/" in shown
    assert "`--run.name mine --run.resume auto`" in shown


@pytest.mark.slow
@pytest.mark.timeout(700)
def test_a_run_outlives_the_reader_of_its_output(tmp_path: Path) -> None:
    args = [arg for arg in SMALL if "max_steps" not in arg]
    args += ["--trainer.max_steps=3", "--model.optimizer.warmup=1"]
    with start("lightning_pref.recipes.sft", *args, folder=tmp_path) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.close()  # as `head` does when it has seen enough
        shown = process.stderr.read()
        assert process.wait(timeout=300) == 0, shown
    assert "Traceback" not in shown and "BrokenPipe" not in shown
    assert json.loads((tmp_path / "runs/sft/mine/summary.json").read_text())["steps"] == 3


@pytest.mark.slow
@pytest.mark.timeout(700)
@pytest.mark.parametrize(
    "args", [["lightning_pref.recipes.sft", "--help"], ["lightning_pref.recipes.dpo", "--print_config"], ["lightning_pref"]]
)
def test_help_into_a_pipe_that_is_closed_says_nothing_of_it(args: list[str], tmp_path: Path) -> None:
    with start(*args, folder=tmp_path) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.close()
        shown = process.stderr.read()
        assert process.wait(timeout=300) == 0, shown
    assert "Traceback" not in shown and "BrokenPipe" not in shown


@pytest.mark.slow
@pytest.mark.timeout(700)
def test_the_exit_code_of_a_mistake_is_2_and_of_a_fault_1(tmp_path: Path) -> None:
    with start("lightning_pref.recipes.sft", "--config=nowhere.yaml", folder=tmp_path) as process:
        _, shown = process.communicate(timeout=300)
    assert process.returncode == 2
    assert [line for line in shown.splitlines() if line.startswith("error: ")] == [
        f"error: `--config`: there is no file {tmp_path}/nowhere.yaml. Correct the path."
    ]
    assert "Traceback" not in shown
    (tmp_path / "broken.py").write_text("def reward(prompt, response):\n    raise ValueError('of mine')\n")
    speaker().save_pretrained(tmp_path / "model")
    playground_tokenizer().save_pretrained(tmp_path / "model")
    args = ["--data.reward=broken:reward", "--model.model=model", "--data.num_prompts=2", "--data.num_samples=2"]
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    stages = ["--config=own.yaml"]
    (tmp_path / "own.yaml").write_text("data: {train: prompts.jsonl}\n")
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "Is it?"}\n{"prompt": "Was it?"}\n')
    with start("lightning_pref.recipes.rlhf", *stages, *args, folder=tmp_path, env=environment) as process:
        _, shown = process.communicate(timeout=300)
    assert process.returncode == 1
    assert "Traceback (most recent call last)" in shown and "of mine" in shown
