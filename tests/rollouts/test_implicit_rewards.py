"""A language model that was trained as a reward, as a reward of sampled responses."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rollouts import answers_of, speaker
from torch import Tensor
from transformers import AutoModelForCausalLM

from lightning_pref.data.playground_tokenizer import playground_tokenizer
from lightning_pref.data.templates import Tokenization
from lightning_pref.losses.ensemble import ensemble_reward
from lightning_pref.models.adapters import LoraSettings
from lightning_pref.models.implicit_rewards import FILE
from lightning_pref.modules.group_module import Loading
from lightning_pref.modules.reward import RewardModule
from lightning_pref.rollouts.rewards import Answers, Reward, load_reward

TEXTS = [["four", "seven is fine", "a b"], ["a b c", "one", "two two"]]
BETA = 0.3


def load(spec: str | list[str], **settings: float | str) -> Reward:
    return load_reward(spec, Tokenization(playground_tokenizer()), **settings)  # type: ignore[arg-type]  # `how` is a literal


def base(folder: Path) -> Path:
    speaker(0).save_pretrained(folder)
    playground_tokenizer().save_pretrained(folder)
    return folder


def trained(folder: Path, start: Path, *, seed: int = 1) -> Path:
    """The export of a reward module that began at `start` and has moved."""
    module = RewardModule(str(start), head="implicit", beta=BETA)
    module.configure_model()
    module.reward_model.load_state_dict(speaker(seed).state_dict())
    module.save_pretrained(folder, playground_tokenizer())
    return folder


@torch.no_grad()
def plain_logps(folder: Path, answers: Answers) -> Tensor:
    """Oracle: transformers' own model, one sequence at a time; [R]."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    found = []
    for group in answers.groups:
        for ids in group.responses:
            row = torch.tensor(np.array([[*group.prompt, *ids]]))
            logps = model(row).logits[0].log_softmax(-1)
            found.append(sum(logps[at - 1, row[0, at]] for at in range(len(group.prompt), row.shape[1])))
    return torch.tensor(found)


def log_ratios(reward: Path, reference: Path, answers: Answers) -> Tensor:
    return BETA * (plain_logps(reward, answers) - plain_logps(reference, answers))


@pytest.mark.parametrize("ended", [True, False])
def test_an_implicit_reward_is_beta_times_the_log_ratio_to_where_its_training_began(tmp_path: Path, ended: bool) -> None:
    start = base(tmp_path / "start")
    folder = trained(tmp_path / "reward", start)
    answers = answers_of(TEXTS, ended=ended)
    found = load(str(folder))(answers)
    assert found.std() > 0.1
    torch.testing.assert_close(found, log_ratios(folder, start, answers), rtol=1e-4, atol=1e-4)


def test_reward_and_reference_can_be_moved_together(tmp_path: Path) -> None:
    start = base(tmp_path / "runs" / "sft" / "export")
    folder = trained(tmp_path / "runs" / "reward" / "export", start)
    answers = answers_of(TEXTS)
    before = load(str(folder))(answers)
    shutil.move(tmp_path / "runs", tmp_path / "elsewhere")
    assert torch.equal(load(str(tmp_path / "elsewhere" / "reward" / "export"))(answers), before)


def test_implicit_rewards_make_an_ensemble(tmp_path: Path) -> None:
    start = base(tmp_path / "start")
    folders = [trained(tmp_path / f"reward{seed}", start, seed=seed) for seed in (1, 2)]
    answers = answers_of(TEXTS)
    members = torch.stack([log_ratios(folder, start, answers) for folder in folders])
    found = load([str(folder) for folder in folders], how="wco")(answers)
    torch.testing.assert_close(found, ensemble_reward(members, "wco", 0.5), rtol=1e-4, atol=1e-4)


def test_a_language_model_without_the_note_is_no_reward(tmp_path: Path) -> None:
    folder = trained(tmp_path / "reward", base(tmp_path / "start"))
    policy = AutoModelForCausalLM.from_pretrained(folder)
    policy.save_pretrained(tmp_path / "policy")
    playground_tokenizer().save_pretrained(tmp_path / "policy")
    with pytest.raises(ValueError, match="probably saved from a language model"):
        load(str(tmp_path / "policy"))


def test_a_reference_that_is_gone_is_named(tmp_path: Path) -> None:
    folder = trained(tmp_path / "reward", base(tmp_path / "start"))
    shutil.rmtree(tmp_path / "start")
    with pytest.raises(
        ValueError, match=r"is an implicit reward, measured against '.*start', which could not be loaded: (.|\n)*"
    ):
        load(str(folder))


def unmoved(folder: Path, model: str, **options: Any) -> Path:
    """The export of a reward module that has not been trained yet: all rewards are 0 against the reference it began with."""
    module = RewardModule(model, head="implicit", beta=BETA, **options)
    module.configure_model()
    module.save_pretrained(folder, playground_tokenizer())
    return folder


def test_the_reference_is_the_preset_of_the_seed_that_training_began_with(tmp_path: Path) -> None:
    folder = unmoved(tmp_path / "reward", "playground:tiny", loading=Loading(seed=3))
    assert (load(str(folder))(answers_of(TEXTS)) == 0).all()


@pytest.mark.parametrize("lora", [None, LoraSettings(r=2)])
def test_the_reference_is_the_revision_that_training_began_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lora: LoraSettings | None
) -> None:
    """Of a hub model in the local cache, with another model on its main branch."""
    hub = tmp_path / "hub" / "models--some--base"
    for seed, (branch, commit) in enumerate({"main": "a" * 40, "v2": "b" * 40}.items()):
        speaker(seed).save_pretrained(hub / "snapshots" / commit)
        (hub / "refs").mkdir(exist_ok=True)
        (hub / "refs" / branch).write_text(commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    folder = unmoved(tmp_path / "reward", "some/base", loading=Loading(revision="v2"), lora=lora)
    assert (load(str(folder))(answers_of(TEXTS)) == 0).all()
    note = json.loads((folder / FILE).read_text())
    (folder / FILE).write_text(json.dumps({**note, "revision": None}))
    with pytest.raises(ValueError, match="whose weights are not those it was trained against"):
        load(str(folder))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_reference_that_the_precision_has_rounded_is_rounded_again(tmp_path: Path, dtype: str) -> None:
    module = RewardModule(str(base(tmp_path / "start")), head="implicit", beta=BETA)
    module.configure_model()
    module.to(torch.bfloat16)  # as the precision 'bf16-true' does
    module.save_pretrained(tmp_path / "reward", playground_tokenizer())
    assert (load(str(tmp_path / "reward"), dtype=dtype)(answers_of(TEXTS)) == 0).all()


def test_a_reference_whose_weights_have_changed_is_refused(tmp_path: Path) -> None:
    folder = trained(tmp_path / "reward", base(tmp_path / "start"))
    speaker(5).save_pretrained(tmp_path / "start")
    message = r"is an implicit reward, measured against '.*start', whose weights are not those.*digest is \w{12}, expected \w{12}"
    with pytest.raises(ValueError, match=message):
        load(str(folder))


def test_a_note_of_ones_own_needs_beta_and_reference_alone(tmp_path: Path) -> None:
    start = base(tmp_path / "start")
    folder = trained(tmp_path / "reward", start)
    (folder / FILE).write_text(json.dumps({"beta": BETA, "reference": "../start"}))
    answers = answers_of(TEXTS)
    torch.testing.assert_close(load(str(folder))(answers), log_ratios(folder, start, answers), rtol=1e-4, atol=1e-4)


NOTE = {"beta": 0.1, "reference": "x"}
BROKEN = ["{", "[1]", *map(json.dumps, ({"beta": "much", "reference": "x"}, {"beta": 0.1}, {**NOTE, "dtype": "float31"}))]


@pytest.mark.parametrize("text", [*BROKEN, *map(json.dumps, ({**NOTE, "loaded_in": "int8"}, {**NOTE, "seed": -1}))])
def test_a_broken_note_is_explained(tmp_path: Path, text: str) -> None:
    folder = trained(tmp_path / "reward", base(tmp_path / "start"))
    (folder / FILE).write_text(text)
    with pytest.raises(ValueError, match=f"{FILE} must hold `beta`, in rewards per nat, and `reference`"):
        load(str(folder))


def test_without_a_name_for_the_reference_only_the_language_model_is_written(tmp_path: Path) -> None:
    module = RewardModule(speaker(), head="implicit", beta=BETA)
    module.configure_model()
    module.save_pretrained(tmp_path / "reward", playground_tokenizer())
    assert not (tmp_path / "reward" / FILE).exists()
