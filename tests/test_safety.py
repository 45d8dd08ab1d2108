"""Nothing is run, leaked, or shown raw that came from a file, the environment, or a model."""

from __future__ import annotations

import ast
import html
import io
import json
import logging
import os
import pickle
import re
from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from markdown import markdown as rendered
from rich.console import Console
from transformers import LlamaForCausalLM

import lightning_pref
from lightning_pref.alerts import Alert
from lightning_pref.callbacks.gold_reward import Sample
from lightning_pref.callbacks.hosts import markdown, record_alert
from lightning_pref.data.loading import load_groups
from lightning_pref.data.playground_tokenizer import playground_tokenizer
from lightning_pref.data.sources import read_rows
from lightning_pref.data.templates import Tokenization
from lightning_pref.escaping import in_html, in_markdown, on_terminal
from lightning_pref.mistakes import Ended, explanation, mistakes_in_one_paragraph
from lightning_pref.models.backbones import load_model, load_tokenizer
from lightning_pref.models.reward_models import build_reward_model
from lightning_pref.modules.rlhf_report import sample_table
from lightning_pref.recipes import sft
from lightning_pref.reports.summary import print_samples

PACKAGE = Path(lightning_pref.__file__).parent
SOURCES = sorted(PACKAGE.rglob("*.py"))
REPOSITORY = PACKAGE.parent


@cache
def nodes() -> list[tuple[str, ast.AST]]:
    """Everything that is written in the package, with its place."""
    return [
        (f"{path.relative_to(PACKAGE)}:{getattr(node, 'lineno', 0)}", node)
        for path in SOURCES
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
    ]


@cache
def calls() -> list[tuple[str, str, ast.Call]]:
    """Every call in the package: its place, what is called, and the call."""
    return [(place, ast.unparse(node.func), node) for place, node in nodes() if isinstance(node, ast.Call)]


def argument(call: ast.Call, name: str) -> str | None:
    return next((ast.unparse(keyword.value) for keyword in call.keywords if keyword.arg == name), None)


def test_nothing_in_the_package_unpickles() -> None:
    found = {
        place: name for place, name, _ in calls() if re.search(r"(^|\.)(pickle|cPickle|dill|cloudpickle|joblib|shelve)\.", name)
    }
    imports = [
        place
        for place, node in nodes()
        if isinstance(node, ast.Import | ast.ImportFrom)
        and re.search(r"\b(pickle|cPickle|dill|cloudpickle|joblib|shelve|marshal)\b", ast.unparse(node))
    ]
    assert not found and not imports


def test_torch_loads_weights_only() -> None:
    loads = [(place, argument(call, "weights_only")) for place, name, call in calls() if name == "torch.load"]
    assert loads, "the package reads checkpoints"
    assert all(value == "True" for _, value in loads), loads


def test_numpy_loads_no_objects() -> None:
    loads = [(place, argument(call, "allow_pickle")) for place, name, call in calls() if name in ("np.load", "numpy.load")]
    assert loads, "the package reads caches"
    assert all(value in (None, "False") for _, value in loads), loads


def test_lightning_loads_weights_only() -> None:
    """Lightning's own default would unpickle a checkpoint of the disk."""
    fits = [(place, call) for place, name, call in calls() if name.endswith((".fit", ".validate", ".load_from_checkpoint"))]
    with_checkpoint = [(place, call) for place, call in fits if argument(call, "ckpt_path") is not None]
    assert with_checkpoint
    assert all(argument(call, "weights_only") == "True" for _, call in with_checkpoint), with_checkpoint


def test_nothing_in_the_package_evaluates_text() -> None:
    forbidden = {"eval", "exec", "os.system", "os.popen", "yaml.load", "yaml.unsafe_load", "yaml.full_load", "compile"}
    assert not {place: name for place, name, _ in calls() if name in forbidden}
    shells = [
        place
        for place, name, call in calls()
        if name.startswith("subprocess.") and argument(call, "shell") not in (None, "False")
    ]
    assert not shells


def test_code_of_a_model_is_never_trusted_by_the_package() -> None:
    """Only what the user sets may turn it on: the value is always a name that is handed on, or False."""
    given = [(place, argument(call, "trust_remote_code")) for place, _, call in calls()]
    assert not [(place, value) for place, value in given if value == "True"]


TINY = (
    "--run.name=mine", "--data.playground.num_rows=24", "--data.playground.num_val_rows=8", "--data.batch_size=4",
    "--trainer.max_steps=2", "--trainer.limit_val_batches=1", "--trainer.val_check_interval=1.0", "--trainer.accelerator=cpu",
    "--model.optimizer.warmup=0",
)  # fmt: skip


class Harm:
    """Unpickling it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:  # Any: pickle's own protocol
        return os.mkdir, (str(self.path),)


def pickled_harm(tmp_path: Path) -> tuple[bytes, Path]:
    mark = tmp_path / "harm"
    content = pickle.dumps(Harm(mark))
    pickle.loads(content)
    assert mark.exists(), "the trap works"
    mark.rmdir()
    return content, mark


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".parquet", ".arrow"])
def test_a_pickle_as_data_is_not_run(suffix: str, tmp_path: Path) -> None:
    content, mark = pickled_harm(tmp_path)
    path = tmp_path / f"rows{suffix}"
    path.write_bytes(content)
    tokenization = Tokenization(playground_tokenizer())
    with pytest.raises(ValueError) as raised:  # noqa: PT011  # each format says it in its own words
        load_groups([path], tokenization, vocab_size=20_000, cache_dir=tmp_path / "cache")
    assert explanation(raised.value) is not None
    assert not mark.exists()


def test_a_pickle_among_a_saved_data_set_is_not_run(tmp_path: Path) -> None:
    content, mark = pickled_harm(tmp_path)
    folder = tmp_path / "saved"
    folder.mkdir()
    state = {
        "_data_files": [{"filename": "data-00000-of-00001.arrow"}],
        "_fingerprint": "x",
        "_format_type": None,
        "_split": None,
    }
    (folder / "state.json").write_text(json.dumps(state))
    (folder / "dataset_info.json").write_text("{}")
    (folder / "data-00000-of-00001.arrow").write_bytes(content)
    with pytest.raises(ValueError, match="the saved dataset is damaged"):
        list(read_rows(folder))
    assert not mark.exists()


def test_a_pickle_as_any_file_of_the_token_cache_is_not_run(tmp_path: Path) -> None:
    content, mark = pickled_harm(tmp_path)
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "Is it?", "completion": " It is."}\n' * 4)
    tokenization = Tokenization(playground_tokenizer())

    def load() -> int:
        store = load_groups([rows], tokenization, vocab_size=20_000, cache_dir=tmp_path / "cache")
        return sum(len(store[i].prompt) for i in range(len(store)))

    tokens = load()
    (folder,) = [path for path in (tmp_path / "cache").iterdir() if path.is_dir()]
    harm = io.BytesIO()
    np.save(harm, np.array([Harm(mark)], dtype=object), allow_pickle=True)
    for file in sorted(folder.iterdir()):
        whole = file.read_bytes()
        for bad in (content, harm.getvalue()):
            file.write_bytes(bad)
            # Built again or refused, by whatever reads that file; never run.
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(logging.getLogger("lightning_pref"), "disabled", True)
                try:
                    found = load()
                except Exception as error:  # whichever it is, it must be one for the user
                    found = tokens if explanation(error) is not None else -1
                assert found == tokens, file.name
            assert not mark.exists(), file.name
            if folder.exists() and file.exists():
                file.write_bytes(whole)


def test_a_pickle_as_checkpoint_is_not_run(tmp_path: Path) -> None:
    content, mark = pickled_harm(tmp_path)
    plain, zipped = tmp_path / "plain.ckpt", tmp_path / "zipped.ckpt"
    plain.write_bytes(content)
    torch.save({"state_dict": {}, "loops": Harm(mark)}, zipped)
    for path in (plain, zipped):
        with pytest.raises(Ended) as raised:
            sft.main([*TINY, f"--run.resume={path}", f"--run.root={tmp_path}", f"--data.cache_dir={tmp_path / 'cache'}"])
        assert raised.value.code == 2
        assert not mark.exists()


@pytest.mark.parametrize("load", [load_model, build_reward_model], ids=["policy", "reward model"])
def test_a_pickle_as_weights_is_not_run(
    load: Callable[[str], object], tmp_path: Path, tiny_model: Callable[..., LlamaForCausalLM]
) -> None:
    _, mark = pickled_harm(tmp_path)
    folder = tmp_path / "model"
    tiny_model().save_pretrained(folder)
    (folder / "model.safetensors").unlink()
    torch.save({"weights": Harm(mark)}, folder / "pytorch_model.bin")
    with pytest.raises(Ended), mistakes_in_one_paragraph():
        load(str(folder))
    assert not mark.exists()


@pytest.mark.parametrize("load", [load_model, build_reward_model, load_tokenizer], ids=["policy", "reward model", "tokenizer"])
def test_code_that_comes_with_a_model_is_refused_unless_asked_for(
    load: Callable[..., object], tmp_path: Path, tiny_model: Callable[..., LlamaForCausalLM]
) -> None:
    mark = tmp_path / "harm"
    folder = tmp_path / "model"
    tiny_model().save_pretrained(folder)
    playground_tokenizer().save_pretrained(folder)
    (folder / "own.py").write_text(f"import os\nos.mkdir({str(mark)!r})\n")
    own = {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model", "AutoTokenizer": ["own.Tokenizer", None]}
    for name in ("config.json", "tokenizer_config.json"):
        settings = json.loads((folder / name).read_text())
        settings = {**settings, "auto_map": own, "model_type": "own_model", "tokenizer_class": "OwnTokenizer"}
        (folder / name).write_text(json.dumps(settings))
    with (
        pytest.raises(Ended, match=r"comes with Python code of its own.*set `trust_remote_code: true`"),
        mistakes_in_one_paragraph(),
    ):
        load(str(folder))
    assert not mark.exists()


SECRETS = {
    "HF_TOKEN": "hf_secretsecretsecret1",
    "HUGGING_FACE_HUB_TOKEN": "hf_secretsecretsecret2",
    "WANDB_API_KEY": "wandbsecretsecretsecret3",
    "AWS_SECRET_ACCESS_KEY": "awssecretsecretsecret4",
    "OPENAI_API_KEY": "sk-secretsecretsecret5",
    "MY_PASSWORD": "passwordsecretsecret6",
}


@pytest.mark.slow
def test_no_secret_of_the_environment_is_in_anything_that_a_run_leaves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(tmp_path)
    sft.main([*TINY, "--data.cache_dir=cache"])
    shown = "".join(capfd.readouterr())
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    names = {path.name for path in files}
    assert {"config.yaml", "summary.json", "metrics.csv"} <= names
    assert any(name.startswith("events.out.tfevents") for name in names)
    for value in SECRETS.values():
        assert value not in shown
        assert not [path for path in files if value.encode() in path.read_bytes()]


def test_exports_are_safetensors(tmp_path: Path, tiny_model: Callable[..., LlamaForCausalLM]) -> None:
    saves = [(place, argument(call, "safe_serialization")) for place, name, call in calls() if name.endswith("save_pretrained")]
    assert not [(place, value) for place, value in saves if value == "False"]
    tiny_model().save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").exists() and not list(tmp_path.glob("*.bin"))


def test_tensorboard_is_only_ever_suggested_on_localhost() -> None:
    """Its default is localhost; these words would open it to the network."""
    texts = [*SOURCES, *REPOSITORY.glob("*.md"), *REPOSITORY.glob("docs/**/*.md"), *REPOSITORY.glob("examples/**/*.py")]
    texts += list(PACKAGE.rglob("*.yaml"))
    lines = [
        f"{path.relative_to(REPOSITORY)}: {line.strip()}"
        for path in texts
        for line in path.read_text(encoding="utf-8").splitlines()
        if "tensorboard" in line.lower() and re.search(r"--bind_all|--host|0\.0\.0\.0", line) and "never" not in line.lower()
    ]
    assert not lines


EVIL = (
    "<script>alert(1)</script><img src=x onerror=alert(1)> | `code` [link](javascript:alert(1)) **bold**"
    "\n\n# head\x1b[2J\u202e\x00"
)


def test_text_of_a_model_is_text_in_a_markdown_table() -> None:
    table = f"| prompt | answer |\n|---|---|\n| {in_markdown(EVIL)} | {in_markdown(EVIL)} |\n"
    page = rendered(table, extensions=["markdown.extensions.tables"])
    assert page.count("<tr>") == 2 and page.count("<td>") == 2, "one row of two cells"
    inside = re.findall(r"<td>(.*?)</td>", page, re.DOTALL)
    assert len(inside) == 2 and all("<" not in cell for cell in inside), "no tag of its own: no script, image, link, code, bold"
    assert html.unescape(inside[0]) == on_terminal(EVIL.replace("\n", " ")), "and it reads as it was"


def test_text_in_html_keeps_its_lines_and_no_tags() -> None:
    assert in_html("a <b>\n&\x1b") == "a &lt;b&gt;\n&amp;\\x1b"


def test_an_alert_shows_no_markup_of_what_it_reports() -> None:
    alert = Alert(level="warning", name="x", source=EVIL, since_step=1, step=2, evidence=f"row {EVIL}", advice="Stop.")
    text = markdown(alert)
    assert "<script>" not in text and "<img" not in text and "\x1b" not in text
    page = rendered(text)
    assert "<script" not in page and "<img" not in page and "href" not in page.partition("What to change")[0].partition("row")[0]


def test_an_alert_on_the_console_sends_no_commands_to_the_terminal(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG):
        record_alert(Alert(level="warning", name="x", source="train", since_step=1, step=2, evidence=EVIL, advice="Stop."), None)
    assert "\x1b" not in caplog.messages[0] and "\u202e" not in caplog.messages[0]


def test_samples_on_the_console_send_no_commands_to_the_terminal() -> None:
    out = io.StringIO()
    console = Console(file=out, force_terminal=False, width=200)
    sample = Sample(prompt=EVIL, response=f"[red]{EVIL}[/red]", reward=1.0)
    print_samples([sample], [sample], console=console)
    shown = out.getvalue()
    assert "\x1b" not in shown and "\x00" not in shown and "\u202e" not in shown
    assert "\\x1b[2J" in shown and "[red]" in shown, "spelled out, and not taken for the console's own markup"


def test_the_table_of_samples_in_tensorboard_has_a_row_for_each_answer_whatever_it_says() -> None:
    prompt = SimpleNamespace(text=[{"role": "user", "content": EVIL}])
    found = SimpleNamespace(rewards=torch.tensor([0.0, 1.0]), answers=SimpleNamespace(texts=[(EVIL, f"{EVIL}|")]))
    # Any: of a rollout the table reads these alone.
    table = sample_table(cast("Any", found), cast("Any", SimpleNamespace(prompts=[prompt], num_samples=2)))
    page = rendered(table, extensions=["markdown.extensions.tables"])
    assert page.count("<tr>") == 3 and page.count("<td>") == 6
    assert "<script" not in page and "<img" not in page and "href" not in page and "\x1b" not in page
