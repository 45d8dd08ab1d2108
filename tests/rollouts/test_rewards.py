"""Rewards by name: functions, models, ensembles and sums of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rollouts import VOCABULARY, answers_of, count_of_letters, speaker
from torch import Tensor
from transformers import BertConfig, BertForSequenceClassification, LlamaForSequenceClassification, PreTrainedTokenizerFast

from lightning_pref.data.playground import gold_reward, playground_rows, proxy_reward
from lightning_pref.data.playground_tokenizer import playground_tokenizer
from lightning_pref.data.templates import Tokenization
from lightning_pref.losses.ensemble import ensemble_reward
from lightning_pref.models.reward_models import ScoreScale
from lightning_pref.rollouts.rewards import Answers, Reward, is_model_reward, judged, load_reward

# Factor and offset of two members.
UNITS = ((1.0, 5.0), (3.0, -2.0))
TEXTS = [["four", "seven is fine", "", " "], ["a b c", "one", "two two", "x"]]


def load(spec: Any, tokenizer: PreTrainedTokenizerFast | None = None, **settings: Any) -> Reward:
    return load_reward(spec, Tokenization(tokenizer or playground_tokenizer()), **settings)


def saved_classifier(folder: Path, *, seed: int = 0, num_labels: int = 1, tokenizer: Any = None) -> Path:
    config = speaker().config
    config.num_labels = num_labels
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForSequenceClassification(config)
    model.save_pretrained(folder)
    (tokenizer or playground_tokenizer()).save_pretrained(folder)
    return folder


@torch.no_grad()
def plain_scores(folder: Path, answers: Answers) -> Tensor:
    """Oracle: transformers' own classifier, one sequence at a time, no padding; [K, R]."""
    model = LlamaForSequenceClassification.from_pretrained(folder).eval()
    rows = [[*group.prompt, *ids] for group in answers.groups for ids in group.responses]
    states = [model.model(torch.tensor(np.array([row]))).last_hidden_state[0, -1] for row in rows]
    return torch.stack([model.score(state) for state in states]).T


def other_tokenizer() -> PreTrainedTokenizerFast:
    """The same vocabulary with another end token and no template: other ids for the same texts."""
    tokenizer = playground_tokenizer()
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }} {% endfor %}"
    tokenizer.eos_token = "<|user|>"
    return tokenizer


def test_a_function_gets_prompt_and_response_and_the_columns_it_names() -> None:
    answers = answers_of([["0", "1"], ["it is 1", "2"]])
    assert load("rollouts:count_of_letters")(answers).tolist() == pytest.approx(
        [count_of_letters("", text) for text in ("0", "1", "it is 1", "2")]
    )
    assert load("rollouts:says_the_answer")(answers).tolist() == [1.0, 0.0, 1.0, 0.0]


def test_a_column_that_is_not_there_is_named() -> None:
    with pytest.raises(ValueError, match=r"takes `number`, but rows, row 1 has no such column; it has answer, prompt"):
        load("bad_rewards:wants_a_number")(answers_of([["0", "1"]]))


@pytest.mark.parametrize(("name", "found"), [("says_yes", r"'yes' \(str\)"), ("says_true", r"True \(bool\)")])
def test_what_is_no_number_is_refused(name: str, found: str) -> None:
    with pytest.raises(TypeError, match=f"returned {found} for a response; it must return a number"):
        load(f"bad_rewards:{name}")(answers_of([["0", "1"]]))


def test_rewards_of_the_playground_are_those_of_its_functions() -> None:
    rows = list(playground_rows("ranked", 3, conversational=False))
    answers = answers_of([row["responses"] for row in rows], prompts=lambda i: str(rows[i]["prompt"]))
    for name, settings, expected in (
        ("playground:gold", {}, gold_reward),
        ("playground:length", {}, lambda p, r: proxy_reward(p, r, "length")),
        ("playground:proxy", {}, gold_reward),
        ("playground:proxy", {"flaw": "length"}, lambda p, r: proxy_reward(p, r, "length")),
    ):
        wanted = [expected(row["prompt"], text) for row in rows for text in row["responses"]]
        assert load(name, **settings)(answers).tolist() == pytest.approx(wanted)


@pytest.mark.parametrize("ended", [True, False])
def test_a_reward_model_reads_the_policys_own_tokens_at_the_last_of_them(tmp_path: Path, ended: bool) -> None:
    folder = saved_classifier(tmp_path / "model")
    answers = answers_of([["four", "seven is fine"], ["a b c", "one", "two two"]], ended=ended)
    for batch_size in (2, 64):
        found = load(str(folder), batch_size=batch_size)(answers)
        assert torch.allclose(found, plain_scores(folder, answers)[0], atol=1e-5)
    assert not found.requires_grad


def test_W1_a_reward_model_with_another_tokenizer_reads_the_text_with_its_own_end(tmp_path: Path) -> None:
    tokenizer = other_tokenizer()
    folder = saved_classifier(tmp_path / "model", tokenizer=tokenizer)
    answers = answers_of(TEXTS)
    found = load(str(folder))(answers)
    model = LlamaForSequenceClassification.from_pretrained(folder).eval()
    expected = []
    for prompt, texts in zip(answers.prompts, answers.texts, strict=True):
        for text in texts:
            said = text if text.strip() else ""
            whole = tokenizer(f"{prompt.text}{said}")["input_ids"]
            ids = torch.tensor([[*whole, tokenizer.eos_token_id]])
            with torch.no_grad():
                expected.append(float(model.score(model.model(ids).last_hidden_state[0, -1])))
    assert found.tolist() == pytest.approx(expected, abs=1e-5)
    spoken = [["four", "seven is fine"], ["a b c", "one"]]
    whole_ones, cut = (load(str(folder))(answers_of(spoken, ended=ended)) for ended in (True, False))
    assert not torch.isclose(whole_ones, cut).any(), "what did not end has no end token to be read at"


@pytest.mark.parametrize(("how", "coefficient"), [("mean", 0.5), ("wco", 0.5), ("uwo", 0.5), ("uwo", 2.0)])
def test_an_ensemble_of_folders_and_of_heads_is_aggregated(tmp_path: Path, how: Any, coefficient: float) -> None:
    folders = [saved_classifier(tmp_path / str(seed), seed=seed) for seed in range(2)]
    heads = saved_classifier(tmp_path / "heads", num_labels=3)
    answers = answers_of([["four", "seven is fine"], ["a b c", "one"]])
    members = torch.cat([plain_scores(folder, answers) for folder in folders])
    found = load([str(folder) for folder in folders], how=how, coefficient=coefficient)(answers)
    assert torch.allclose(found, ensemble_reward(members, how, coefficient), atol=1e-5)
    found = load(str(heads), how=how, coefficient=coefficient)(answers)
    assert torch.allclose(found, ensemble_reward(plain_scores(heads, answers), how, coefficient), atol=1e-5)
    assert torch.equal(load({str(heads): 1.0}, how=how, coefficient=coefficient)(answers), found), "as a term of a sum, too"


def test_an_aggregate_of_one_member_is_refused(tmp_path: Path) -> None:
    folder = saved_classifier(tmp_path / "model")
    count, gold = "rollouts:count_of_letters", "playground:gold"
    cure = "Give a list of reward models or one with several heads, or leave `aggregate` out."
    for spec in (str(folder), [str(folder)], count, gold):
        with pytest.raises(ValueError, match=f"`aggregate: wco` compares the members of an ensemble, but '.*' has one. {cure}"):
            load(spec, how="wco")
    for terms in ({gold: 1.0}, {count: 1.0, str(folder): 2.0}):
        with pytest.raises(ValueError, match=f"`aggregate: uwo` compares .*, but '.*' (has one|have one each). {cure}"):
            load(terms, how="uwo")


def test_a_function_beside_an_ensemble_leaves_its_aggregate_alone(tmp_path: Path) -> None:
    heads = str(saved_classifier(tmp_path / "heads", num_labels=3))
    answers = answers_of([["four", "seven is fine"], ["a b c", "one"]])
    found = load({heads: 2.0, "rollouts:count_of_letters": 1.0}, how="wco")(answers)
    expected = 2.0 * plain_scores(Path(heads), answers).amin(0) + load("rollouts:count_of_letters")(answers)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_members_with_different_tokenizers_are_refused(tmp_path: Path) -> None:
    folders = [
        str(saved_classifier(tmp_path / name, tokenizer=tokenizer))
        for name, tokenizer in (("a", playground_tokenizer()), ("b", other_tokenizer()))
    ]
    with pytest.raises(ValueError, match="have different tokenizers; an ensemble needs one"):
        load(folders)


def test_any_sequence_classifier_will_do(tmp_path: Path) -> None:
    """An encoder has no state at the last token to be read; it scores whole sequences."""
    config = BertConfig(
        vocab_size=VOCABULARY, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24, num_labels=1
    )
    torch.manual_seed(0)
    model = BertForSequenceClassification(config).eval()
    model.save_pretrained(tmp_path)
    playground_tokenizer().save_pretrained(tmp_path)
    answers = answers_of([["four", "seven is fine"], ["a b c", "one"]])
    rows = [[*group.prompt, *ids] for group in answers.groups for ids in group.responses]
    with torch.no_grad():
        expected = [float(model(torch.tensor(np.array([row]))).logits) for row in rows]
    assert load(str(tmp_path))(answers).tolist() == pytest.approx(expected, abs=1e-5)


def test_weights_by_name_add_up_rewards_of_any_kind(tmp_path: Path) -> None:
    folder = saved_classifier(tmp_path / "model")
    answers = answers_of([["four", "seven is fine"], ["1", "one"]])
    found = load({"rollouts:says_the_answer": 2.0, str(folder): -0.5, "no.such.module:f": 0.0})(answers)
    expected = 2.0 * torch.tensor([0.0, 0.0, 1.0, 0.0]) - 0.5 * plain_scores(folder, answers)[0]
    assert torch.allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ("playground:silver", "Unknown reward 'playground:silver' of the playground; known: playground:gold"),
        ("no_such_module:f", "There is no Python module 'no_such_module' for the reward"),
        ("rollouts:no_such_function", "The module 'rollouts' has no function 'no_such_function'"),
        (["rollouts:count_of_letters", "playground:gold"], "A list of rewards is an ensemble of reward models"),
        ([], "A list of rewards is an ensemble of reward models"),
        ({"playground:gold": 0.0}, "has no term with a weight other than 0"),
    ],
)
def test_a_reward_that_cannot_be_meant_is_refused(spec: Any, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        load(spec)


def test_model_rewards_are_told_from_functions() -> None:
    assert is_model_reward("my/model")
    assert is_model_reward(["a", "b"])
    assert not is_model_reward("playground:gold")
    assert not is_model_reward("module:function")


def test_the_modes_and_weights_of_a_reward_model_are_frozen(tmp_path: Path) -> None:
    folder = saved_classifier(tmp_path / "model")
    reward: Any = load(str(folder))
    reward.to(torch.device("cpu"))
    (model,) = reward.models
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert json.loads((folder / "config.json").read_text())["architectures"] == ["LlamaForSequenceClassification"]


def rescaled(folder: Path, place: Path, factor: float, offset: float) -> Path:
    """The same reward model in another unit and with another zero, which its config tells."""
    model = LlamaForSequenceClassification.from_pretrained(folder)
    with torch.no_grad():
        model.score.weight.mul_(factor)
    ScoreScale(torch.tensor([offset]), torch.tensor([factor])).remember(model.config)
    model.save_pretrained(place)
    playground_tokenizer().save_pretrained(place)
    return place


def test_W6_members_with_a_known_scale_are_standardised_before_they_are_compared(tmp_path: Path) -> None:
    plain = [saved_classifier(tmp_path / str(seed), seed=seed) for seed in range(2)]
    folders = [rescaled(folder, tmp_path / f"r{k}", *unit) for k, (folder, unit) in enumerate(zip(plain, UNITS, strict=True))]
    answers = answers_of([["four", "seven is fine"], ["a b c", "one"]])
    members = torch.cat([plain_scores(folder, answers) for folder in folders])
    mean, std = torch.tensor([unit[::-1] for unit in UNITS]).T
    common = (members - mean[:, None]) / std[:, None] * std.mean() + mean.mean()
    for how in ("mean", "wco", "uwo"):
        found = judged(load([str(folder) for folder in folders], how=how), answers)
        torch.testing.assert_close(found.rewards, ensemble_reward(common, how), atol=1e-5, rtol=1e-5)  # type: ignore[arg-type]
        assert found.uncertainty is not None
        torch.testing.assert_close(found.uncertainty, common.std(0), atol=1e-5, rtol=1e-5)
    alone = judged(load(str(folders[1])), answers)
    torch.testing.assert_close(alone.rewards, members[1], atol=1e-5, rtol=1e-5)
    assert alone.uncertainty is None
    mixed = judged(load([str(folders[0]), str(plain[1])]), answers)
    raw = torch.cat([plain_scores(folders[0], answers), plain_scores(plain[1], answers)])
    torch.testing.assert_close(mixed.rewards, raw.mean(0), atol=1e-5, rtol=1e-5)


def test_a_weighted_sum_is_as_uncertain_as_its_terms_together(tmp_path: Path) -> None:
    single = str(saved_classifier(tmp_path / "single"))
    heads = str(saved_classifier(tmp_path / "heads", num_labels=3))
    answers = answers_of([["four", "seven is fine"], ["a b c", "one"]])
    found = judged(load({heads: 2.0, "rollouts:count_of_letters": 1.0, single: -1.0}), answers)
    alone = judged(load(heads), answers)
    assert found.uncertainty is not None and alone.uncertainty is not None
    torch.testing.assert_close(found.uncertainty, 2.0 * alone.uncertainty)
    assert judged(load("rollouts:count_of_letters"), answers).uncertainty is None
