from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from reward_modules import STEADY, STILL, Listener, configured, labelled, loader, mean_loss, measured, stepwise, trainer
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, LlamaForCausalLM
from typing_extensions import override

from lightning_pref.data.groups import GroupBatch, PromptGroup
from lightning_pref.models.adapters import LoraSettings
from lightning_pref.models.backbones import load_tokenizer
from lightning_pref.models.reward_heads import VerbalizerRewardHead
from lightning_pref.models.reward_models import build_reward_model, response_scores
from lightning_pref.modules.group_module import Loading
from lightning_pref.modules.optimisation import OptimizerSettings
from lightning_pref.modules.reward import RewardModule

TinyModel = Callable[..., LlamaForCausalLM]
RandomGroups = Callable[..., list[PromptGroup]]


class Gradients(Callback):
    def __init__(self) -> None:
        self.seen: list[Tensor] = []

    @override
    def on_before_optimizer_step(
        self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        self.seen.append(torch.cat([p.grad.flatten().clone() for p in pl_module.parameters() if p.grad is not None]))


KINDS: dict[str, tuple[dict[str, Any], Callable[[list[PromptGroup]], list[PromptGroup]]]] = {
    "bradley_terry": ({"num_members": 2, "center": 0.01}, list),
    "plackett_luce": ({"loss": "plackett_luce"}, list),
    "ordinal": ({"loss": "ordinal", "levels": [0.0, 1.0]}, lambda groups: [replace(g, scores=(1.0, 0.0)) for g in groups]),
    "step_bce": ({"loss": "step_bce"}, stepwise),
    "implicit_prm": ({"loss": "implicit_prm", "head": "implicit"}, labelled),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("batch_size", "accumulate"), [(8, 1), (2, 4)])
def test_N1_one_update_is_the_mean_over_all_rows_however_it_is_accumulated(
    tiny_model: TinyModel, random_groups: RandomGroups, tmp_path: Path, kind: str, batch_size: int, accumulate: int
) -> None:
    options, change = KINDS[kind]
    groups = change(random_groups(8))
    expected = configured(tiny_model(), **options)
    mean_loss(expected, groups).backward()
    gradients = Gradients()
    data = loader(groups, tmp_path / "store", batch_size=batch_size, accumulate=accumulate)
    fit = trainer(tmp_path, gradients, accumulate_grad_batches=accumulate)
    fit.fit(RewardModule(tiny_model(), optimizer=STILL, **options), data)
    (seen,) = gradients.seen
    wanted = torch.cat([p.grad.flatten() for p in expected.parameters() if p.grad is not None])
    torch.testing.assert_close(seen, wanted, rtol=1e-4, atol=1e-6)
    assert wanted.abs().max() > 1e-3


@pytest.mark.parametrize("precision", ["bf16-true", "bf16-mixed", "64-true"])
def test_W2_heads_and_scores_keep_full_precision_whatever_the_trainer_computes_in(
    tiny_model: TinyModel, random_groups: RandomGroups, tmp_path: Path, precision: Any
) -> None:
    listener = Listener()
    groups = [replace(group, scores=(1.0, 0.0)) for group in random_groups()]
    module = RewardModule(tiny_model(), loss="ordinal", levels=[0.0, 1.0, 2.0], optimizer=STEADY)
    trainer(tmp_path, listener, precision=precision).fit(module, loader(groups, tmp_path / "store"))
    wanted = torch.float64 if precision == "64-true" else torch.float32
    head: Any = module.reward_model.score
    assert module.thresholds is not None
    assert {head.weight.dtype, *(p.dtype for p in module.thresholds.parameters())} == {wanted}
    assert next(module.reward_model.base_model.parameters()).dtype == {  # type: ignore[operator, union-attr]
        "bf16-true": torch.bfloat16, "bf16-mixed": torch.float32, "64-true": torch.float64
    }[precision]  # fmt: skip
    assert {seen.rewards.dtype for _, seen in listener.heard} == {wanted}


RESUMABLE: dict[str, dict[str, Any]] = {
    "ensemble": {"num_members": 2},
    "lora": {"lora": LoraSettings(r=2)},
    "ordinal": {"loss": "ordinal", "levels": [0.0, 1.0]},
    "implicit": {"head": "implicit"},
}


@pytest.mark.parametrize("kind", RESUMABLE)
def test_a_resumed_run_ends_where_an_uninterrupted_one_does(
    tiny_model: TinyModel, random_groups: RandomGroups, tmp_path: Path, kind: str
) -> None:
    groups = [replace(group, scores=(1.0, 0.0)) for group in random_groups(5)]
    data = loader(groups, tmp_path / "store", batch_size=2)

    def run(name: str, epochs: int, resume: Path | None = None) -> RewardModule:
        module = RewardModule(tiny_model(), optimizer=STEADY, **RESUMABLE[kind])
        fit = trainer(tmp_path / name, max_epochs=epochs)
        torch.manual_seed(0)  # the same fresh adapter in every run
        fit.fit(module, data, ckpt_path=resume)
        fit.save_checkpoint(tmp_path / name / "end.ckpt")
        return module

    whole = run("whole", 3)
    run("half", 2)
    resumed = run("rest", 3, tmp_path / "half" / "end.ckpt")
    first, second = whole.state_dict(), resumed.state_dict()
    assert list(first) == list(second)
    assert all(torch.equal(v, second[name]) if isinstance(v, Tensor) else v == second[name] for name, v in first.items())
    saved = torch.load(tmp_path / "half" / "end.ckpt", weights_only=True)["state_dict"]
    assert kind == "implicit" or any("score" in name for name in saved), "the head is saved"


def test_training_raises_the_accuracy_and_the_head_moves(
    tiny_model: TinyModel, random_groups: RandomGroups, tmp_path: Path
) -> None:
    groups = random_groups(8)
    module = RewardModule(tiny_model(), optimizer=OptimizerSettings(learning_rate=5e-3, schedule="constant", warmup=0))
    trainer(tmp_path, max_epochs=10).fit(module, loader(groups, tmp_path / "store"))
    assert measured(module, groups)["rewards/accuracies"] == 1.0
    start = build_reward_model(tiny_model())
    assert not torch.equal(cast("Any", module.reward_model).score.weight, cast("Any", start).score.weight)


@pytest.mark.parametrize("head", ["linear", "verbalizer", "implicit"])
def test_loading_settings_reach_the_model_of_every_head(tiny_model: TinyModel, tmp_path: Path, head: Any) -> None:
    tiny_model().save_pretrained(tmp_path / "model")
    loading = Loading(dtype="bfloat16", attn_implementation="eager")
    words: dict[str, Any] = {"label_words": (7, 8)} if head == "verbalizer" else {}
    module = configured(str(tmp_path / "model"), head=head, loading=loading, **words)
    assert {p.dtype for name, p in module.trained.named_parameters() if "score" not in name} == {torch.bfloat16}
    assert module.trained.config._attn_implementation == "eager"


def test_a_model_may_be_a_preset_a_folder_or_an_object(tiny_model: TinyModel, tmp_path: Path) -> None:
    tiny_model().save_pretrained(tmp_path / "model")
    by_object, by_folder = (configured(given).state_dict() for given in (tiny_model(), str(tmp_path / "model")))
    assert list(by_object) == list(by_folder)
    assert all(torch.equal(by_object[name], by_folder[name]) for name in by_object)
    assert sum(p.numel() for p in configured("playground:tiny").parameters()) == 516_352 + 128


def test_label_words_are_found_in_the_tokenizer_of_a_preset() -> None:
    tokenizer = load_tokenizer("playground:tiny")
    words = (tokenizer.decode([300]), tokenizer.decode([301]))
    module = configured("playground:tiny", head="verbalizer", label_words=words)
    assert module.head == VerbalizerRewardHead(positive=300, negative=301)


def test_configuring_twice_changes_nothing(tiny_model: TinyModel) -> None:
    module = configured(tiny_model(), lora=LoraSettings(r=2))
    first = module.reward_model
    module.configure_model()
    assert module.reward_model is first


@pytest.mark.parametrize(
    "options",
    [{}, {"num_members": 2}, {"lora": LoraSettings(r=2)}, {"head": "verbalizer", "label_words": (7, 8)}],
    ids=["linear", "ensemble", "lora", "verbalizer"],
)
def test_W5_an_exported_module_scores_alike(tiny_model: TinyModel, tmp_path: Path, options: dict[str, Any]) -> None:
    tokenizer = load_tokenizer("playground:tiny")
    module = configured(tiny_model(vocab_size=576), **options).eval()
    prompt, response = np.array([9, 10, 11]), np.array([12, 13, int(tokenizer.pad_token_id)])
    group = PromptGroup(row_id=0, prompt=prompt, responses=(response, response[:2]), ranks=(0, 1))
    with torch.no_grad():
        module.terms(GroupBatch.from_groups([group]))  # here it sees that responses end in the padding token
        expected = module.scores(GroupBatch.from_groups([group])).members[:, 0]
    module.save_pretrained(tmp_path / "export", tokenizer)
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "export")
    with torch.no_grad():
        found = loaded(torch.tensor([[*prompt, *response]])).logits[0]
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def test_the_mean_of_an_ensemble_can_be_exported(tiny_model: TinyModel, random_groups: RandomGroups, tmp_path: Path) -> None:
    module = configured(tiny_model(vocab_size=576), num_members=3).eval()
    module.save_pretrained(tmp_path / "export", load_tokenizer("playground:tiny"), member="mean")
    batch = GroupBatch.from_groups(random_groups())
    with torch.no_grad():
        found = response_scores(build_reward_model(str(tmp_path / "export")).eval(), batch).rewards()
        torch.testing.assert_close(found, module.rewards(batch), atol=1e-5, rtol=1e-5)


def test_an_implicit_reward_is_exported_as_the_language_model_it_is(tiny_model: TinyModel, tmp_path: Path) -> None:
    module = configured(tiny_model(vocab_size=576), head="implicit")
    module.save_pretrained(tmp_path / "export", load_tokenizer("playground:tiny"))
    assert type(AutoModelForCausalLM.from_pretrained(tmp_path / "export")).__name__ == "LlamaForCausalLM"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss": "hinge"}, "Unknown loss 'hinge' of a reward model; known: bradley_terry, plackett_luce"),
        ({"head": "mlp"}, "Unknown head 'mlp' of a reward model; known: linear, verbalizer, implicit"),
        ({"loss": "regression", "center": 0.1}, "`center` acts on the loss 'bradley_terry' only; with 'regression' it has no"),
        ({"loss": "plackett_luce", "pairs": "adjacent"}, "`pairs` acts on the loss 'bradley_terry' only"),
        ({"top_k": 2}, "`top_k` acts on the loss 'plackett_luce' only"),
        ({"levels": [1.0, 2.0]}, "`levels` acts on the loss 'ordinal' only"),
        ({"beta": 0.1}, "`beta` acts with the head 'implicit' only; with 'linear' it has no effect"),
        ({"head": "implicit", "num_members": 2}, "`num_members` acts with the head 'linear' only"),
        ({"head": "implicit", "label_words": (1, 2)}, "`label_words` acts with the head 'verbalizer' only"),
        ({"loss": "implicit_prm"}, "trains the log-ratio to a reference, but the head is 'linear'. Use the head 'implicit'"),
        ({"loss": "step_bce", "head": "implicit"}, "'step_bce' reads a head's score, which the head 'implicit' has not"),
        ({"loss": "ordinal"}, "The loss 'ordinal' needs `levels`, the scores that annotators could give"),
        ({"loss": "ordinal", "levels": [2.0, 1.0]}, "`levels` must be two or more numbers in ascending order, got [2.0, 1.0]"),
        ({"head": "verbalizer"}, "The head 'verbalizer' needs `label_words`"),
        ({"uwo_coefficient": 0.1}, "`uwo_coefficient` acts on `aggregate: uwo` only; with 'mean' it has no effect"),
        ({"aggregate": "wco", "num_members": 1}, "`aggregate: wco` compares the members of an ensemble, but `num_members` is 1"),
        ({"center": -1.0}, "`center` must not be negative"),
        ({"label_smoothing": 0.5}, "`label_smoothing` must be in [0, 0.5)"),
        ({"loss": "plackett_luce", "top_k": 0}, "`top_k` must be at least 1"),
        ({"head": "implicit", "beta": 0.0}, "`beta` must be positive, got 0.0"),
    ],
)
def test_settings_that_cannot_be_meant_are_refused_at_construction(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        RewardModule("playground:tiny", **options)


def test_settings_that_the_model_contradicts_are_refused_when_it_is_loaded(tiny_model: TinyModel) -> None:
    with pytest.raises(ValueError, match="`aggregate: wco` compares the members of an ensemble, but the model has one head"):
        configured(tiny_model(), aggregate="wco")
    with pytest.raises(ValueError, match="`label_words` are looked up in the tokenizer of a model given by name"):
        configured(tiny_model(), head="verbalizer", label_words=("yes", "no"))


def test_rows_that_lack_what_the_loss_needs_are_refused(tiny_model: TinyModel, random_groups: RandomGroups) -> None:
    unordered = GroupBatch.from_groups(random_groups(ranked=False))
    for options, message in (
        ({}, "Row 0 has no ordered pair"),
        ({"loss": "plackett_luce"}, "Row 0 has no ordered pair"),
        ({"loss": "regression"}, "A row of this batch has no scores, which this loss is fitted to"),
        ({"loss": "outcome_bce"}, "An unpaired loss needs to know which responses are good"),
        ({"loss": "step_bce"}, "The rows have no step marks"),
    ):
        with pytest.raises(ValueError, match=message):
            configured(tiny_model(), **options).terms(unordered)
    scored = [replace(group, scores=(4.0, 1.0)) for group in random_groups()]
    with pytest.raises(ValueError, match=r"The data has the score 4, which is not among `levels` \[1.0, 2.0\]"):
        configured(tiny_model(), loss="ordinal", levels=[1.0, 2.0]).terms(GroupBatch.from_groups(scored))


def test_a_tie_in_scored_rows_makes_no_pair_and_no_error(tiny_model: TinyModel, random_groups: RandomGroups) -> None:
    groups = [replace(group, ranks=(0, 0), scores=(1.0, 1.0)) for group in random_groups(2)]
    found = measured(configured(tiny_model(), loss="regression"), groups)
    assert math.isnan(found["rewards/accuracies"])
    assert found["rewards/errors"] > 0
