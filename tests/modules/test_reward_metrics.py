from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from reward_modules import STEADY, STILL, Listener, configured, loader, measured, scores_of, trainer
from torch.utils.data import DataLoader
from transformers import AutoModelForSequenceClassification, LlamaForCausalLM

from lightning_pref.callbacks.reward_variance import RewardVarianceMonitor
from lightning_pref.data.groups import GroupBatch, PromptGroup
from lightning_pref.models.backbones import load_tokenizer
from lightning_pref.models.reward_models import ScoreScale, build_reward_model
from lightning_pref.modules.reward import RewardModule
from lightning_pref.reports import RunRecord

TinyModel = Callable[..., LlamaForCausalLM]
RandomGroups = Callable[..., list[PromptGroup]]


def test_metrics_are_those_of_the_rewards(tiny_model: TinyModel, random_groups: RandomGroups) -> None:
    groups = [replace(group, weight=1.0 + row) for row, group in enumerate(random_groups(4))]
    module = configured(tiny_model(), num_members=3, aggregate="uwo", uwo_coefficient=0.2)
    scores = np.array(scores_of(module.reward_model, groups))  # [K, G, 2]
    rewards = scores.mean(0) - 0.2 * scores.var(0, ddof=1)
    weights = np.array([group.weight for group in groups])
    found = measured(module, groups)

    def mean(values: Any) -> float:
        return float((values * weights).sum() / weights.sum())

    chosen, rejected = rewards.T
    assert found["rewards/chosen"] == pytest.approx(mean(chosen), rel=1e-4)
    assert found["rewards/rejected"] == pytest.approx(mean(rejected), rel=1e-4)
    assert found["rewards/margins"] == pytest.approx(mean(chosen - rejected), rel=1e-4)
    assert found["rewards/accuracies"] == pytest.approx(mean(chosen > rejected))
    assert found["rewards/ties"] == 0.0
    assert found["rewards/mean"] == pytest.approx(mean(rewards.mean(1)), rel=1e-4)
    spread = mean((rewards**2).mean(1)) - mean(rewards.mean(1)) ** 2
    assert found["rewards/std"] == pytest.approx(math.sqrt(spread), rel=1e-4)
    assert found["rewards/uncertainty"] == pytest.approx(mean(scores.std(0, ddof=1).mean(1)), rel=1e-4)
    assert found["rewards/within_prompt_variance"] == pytest.approx(mean(rewards.var(1, ddof=1)), rel=1e-4)
    assert "rewards/square" not in found


def test_one_member_has_no_uncertainty_to_log(tiny_model: TinyModel, random_groups: RandomGroups) -> None:
    assert "rewards/uncertainty" not in measured(configured(tiny_model()), random_groups())


def constant(model: LlamaForCausalLM, **options: Any) -> RewardModule:
    """A reward model that gives every response 0."""
    classifier = build_reward_model(model)
    with torch.no_grad():
        cast("Any", classifier).score.weight.zero_()
    return RewardModule(classifier, **options)


def test_W3_a_constant_reward_has_accuracy_0_and_ties_1(tiny_model: TinyModel, random_groups: RandomGroups) -> None:
    module = constant(tiny_model())
    module.configure_model()
    found = measured(module, random_groups())
    assert found["rewards/accuracies"] == 0.0
    assert found["rewards/ties"] == 1.0
    assert found["loss"] == pytest.approx(math.log(2))


def test_W3_a_constant_reward_raises_the_alert_of_the_variance_monitor(
    tiny_model: TinyModel, random_groups: RandomGroups, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    data = loader(random_groups(12), tmp_path / "store")
    trainer(tmp_path, RewardVarianceMonitor()).fit(RewardModule(tiny_model(), optimizer=STILL), data)
    assert "reward_variance/constant" not in caplog.text
    trainer(tmp_path, RewardVarianceMonitor()).fit(constant(tiny_model(), optimizer=STILL), data)
    assert "CRITICAL reward_variance/constant since step 1" in caplog.text, "within the three updates of this run"


def test_rewards_are_published_by_prompt_without_rows_that_only_fill_a_batch(
    tiny_model: TinyModel, random_groups: RandomGroups, tmp_path: Path
) -> None:
    groups = [replace(group, row_id=40 + row, scores=(1.0, 0.0)) for row, group in enumerate(random_groups(3))]
    filled = [*groups, replace(groups[0], weight=0.0)]
    data: DataLoader[Any] = DataLoader([GroupBatch.from_groups(filled)], batch_size=None)  # type: ignore[arg-type]
    only_filler: DataLoader[Any] = DataLoader([GroupBatch.from_groups(filled[3:])], batch_size=None)  # type: ignore[arg-type]
    listener = Listener()
    trainer(tmp_path, listener, num_sanity_val_steps=0).fit(RewardModule(tiny_model(), optimizer=STILL), data, only_filler)
    ((source, seen),) = listener.heard
    assert source == "train"
    (expected,) = scores_of(build_reward_model(tiny_model()), groups)
    assert seen.rewards.tolist() == pytest.approx([score for own in expected for score in own], rel=1e-3, abs=1e-4)
    assert seen.prompt_ids.tolist() == [40, 40, 41, 41, 42, 42]
    assert seen.lengths is not None and seen.gold is not None
    assert seen.lengths.tolist() == [len(response) for group in groups for response in group.responses]
    assert seen.gold.tolist() == [1.0, 0.0] * 3


def test_N5_validation_says_how_sure_how_fair_and_how_long_exactly(
    tiny_model: TinyModel, random_groups: RandomGroups, tmp_path: Path
) -> None:
    groups = [replace(group, source=("a", "b", "b")[row % 3]) for row, group in enumerate(random_groups(13))]
    module = configured(tiny_model(), optimizer=STILL)
    module.eval().terms(GroupBatch.from_groups(random_groups(3, seed=9)))  # no validation, so no part of one
    fit = trainer(tmp_path, num_sanity_val_steps=0)
    fit.fit(
        module,
        loader(groups, tmp_path / "store", batch_size=13),
        loader(groups, tmp_path / "store", batch_size=4),
    )
    found = {name: value.item() for name, value in fit.callback_metrics.items() if name.startswith("val/")}
    (scores,) = scores_of(build_reward_model(tiny_model()), groups)
    chosen, rejected = np.array(scores).T
    right = chosen > rejected
    assert found["val/rewards/accuracies"] == pytest.approx(right.mean())
    assert found["val/rewards/ties"] == 0.0
    for source in "ab":
        own = np.array([group.source == source for group in groups])
        assert found[f"val/rewards/accuracies/{source}"] == pytest.approx(right[own].mean())
    confidence = 1 / (1 + np.exp(-np.abs(chosen - rejected)))
    bins = np.minimum(((confidence - 0.5) * 20).astype(int), 9)
    gaps = [abs((confidence[bins == b] - right[bins == b]).sum()) for b in range(10)]
    assert found["val/rewards/calibration_error"] == pytest.approx(sum(gaps) / len(groups), rel=1e-4)
    lengths = np.array([[len(response) for response in group.responses] for group in groups]).T
    difference, score = lengths[0] - lengths[1], chosen - rejected
    correlation = (difference * score).sum() / math.sqrt((difference**2).sum() * (score**2).sum())
    assert found["val/rewards/length_correlation"] == pytest.approx(correlation, rel=1e-4)
    balanced = (right[difference > 0].mean() + right[difference < 0].mean()) / 2
    assert found["val/rewards/length_balanced_accuracies"] == pytest.approx(balanced, rel=1e-5)
    assert found["val/rewards/within_prompt_variance"] == pytest.approx(np.mean(score**2 / 2), rel=1e-4)


def test_the_scale_of_every_member_on_the_validation_rows_goes_into_the_export(
    tiny_model: TinyModel, random_groups: RandomGroups, tmp_path: Path
) -> None:
    groups = random_groups(9)
    data = loader(groups, tmp_path / "store", batch_size=4)
    module = RewardModule(tiny_model(vocab_size=576), num_members=3, optimizer=STILL)
    trainer(tmp_path, num_sanity_val_steps=0).fit(module, data, data)
    scores = np.array(scores_of(module.reward_model, groups)).reshape(3, -1)
    for member, expected in (("all", scores), (1, scores[1:2])):
        module.save_pretrained(tmp_path / str(member), load_tokenizer("playground:tiny"), member=member)  # type: ignore[arg-type]
        scale = ScoreScale.recall(AutoModelForSequenceClassification.from_pretrained(tmp_path / str(member)).config)
        assert scale is not None
        assert scale.mean.tolist() == pytest.approx(expected.mean(1), rel=1e-4, abs=1e-5)
        assert scale.std.tolist() == pytest.approx(expected.std(1), rel=1e-4)
    module.save_pretrained(tmp_path / "mean", load_tokenizer("playground:tiny"), member="mean")
    assert ScoreScale.recall(AutoModelForSequenceClassification.from_pretrained(tmp_path / "mean").config) is None
    out = module.eval().scores(GroupBatch.from_groups(groups))
    standard = (scores - scores.mean(1, keepdims=True)) / scores.std(1, keepdims=True)
    scale = ScoreScale.recall(cast("Any", module.reward_model).config)
    np.testing.assert_allclose(out.rewards("wco", scale=scale).detach(), standard.min(0), rtol=1e-3, atol=1e-4)
    assert not np.allclose(out.rewards("wco").detach(), standard.min(0), atol=0.1)


def reward_model_with_a_scale(tiny_model: TinyModel, folder: Path) -> str:
    """The folder of a reward model of two members that says what scale they have."""
    model = build_reward_model(tiny_model(vocab_size=576), num_members=2)
    ScoreScale(torch.tensor([7.0, 8.0]), torch.tensor([9.0, 9.0])).remember(model.config)
    model.save_pretrained(folder)
    return str(folder)


def exported_scale(module: RewardModule, folder: Path) -> ScoreScale | None:
    module.save_pretrained(folder, load_tokenizer("playground:tiny"))
    return ScoreScale.recall(AutoModelForSequenceClassification.from_pretrained(folder).config)


def test_a_reward_model_that_goes_on_training_does_not_keep_the_scale_it_had(
    tiny_model: TinyModel, random_groups: RandomGroups, tmp_path: Path
) -> None:
    start = reward_model_with_a_scale(tiny_model, tmp_path / "start")
    groups = random_groups(9)
    data = loader(groups, tmp_path / "store")
    for name, validated in (("without", []), ("with", [data])):
        module = RewardModule(start, optimizer=STEADY)
        trainer(tmp_path, num_sanity_val_steps=0).fit(module, data, *validated)
        found = exported_scale(module, tmp_path / name)
        if not validated:
            assert found is None, "nobody has measured the head that it ends with"
    scores = np.array(scores_of(module.reward_model, groups)).reshape(2, -1)
    assert found is not None
    assert found.mean.tolist() == pytest.approx(scores.mean(1), rel=1e-4, abs=1e-5)
    assert found.std.tolist() == pytest.approx(scores.std(1), rel=1e-4)


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists", "ignore:.*your dataloader is not resumable")
def test_C1_a_resumed_run_exports_the_scale_that_was_measured_before_it_broke_off(
    tiny_model: TinyModel, random_groups: RandomGroups, tmp_path: Path
) -> None:
    start = reward_model_with_a_scale(tiny_model, tmp_path / "start")
    data = loader(random_groups(9), tmp_path / "store")

    def run(**options: Any) -> ScoreScale | None:
        module = RewardModule(start, optimizer=STEADY)
        keeps = ModelCheckpoint(dirpath=tmp_path, filename="{step}", every_n_train_steps=1, save_top_k=-1)
        settings: dict[str, Any] = {"max_steps": 5, "max_epochs": -1, "enable_checkpointing": True, "num_sanity_val_steps": 0}
        # Three batches an epoch: the scale is measured after update 3, and the checkpoint of update 4 has it.
        trainer(tmp_path, keeps, **settings).fit(module, data, data, weights_only=True, **options)
        return exported_scale(module, tmp_path / "export")

    whole = run()
    resumed = run(ckpt_path=tmp_path / "step=4.ckpt")
    assert whole is not None and resumed is not None
    assert torch.equal(whole.mean, resumed.mean) and torch.equal(whole.std, resumed.std)
    assert whole.mean.tolist() != [7.0, 8.0]


def test_a_validation_that_tells_members_from_nothing_leaves_no_scale(
    tiny_model: TinyModel, random_groups: RandomGroups, tmp_path: Path
) -> None:
    """All scores are alike: the scale of the validation before is none of theirs."""
    module = RewardModule(tiny_model(vocab_size=576), optimizer=STILL)
    data = loader(random_groups(9), tmp_path / "store")
    fit = trainer(tmp_path, num_sanity_val_steps=0)
    fit.fit(module, data, data)
    model = cast("Any", module.reward_model)
    assert ScoreScale.recall(model.config) is not None
    torch.nn.init.zeros_(model.score.weight)
    fit.validate(module, data, verbose=False)
    assert ScoreScale.recall(model.config) is None


@pytest.mark.parametrize("loss", ["bradley_terry", "plackett_luce", "regression", "ordinal"])
def test_every_logged_number_is_defined(tiny_model: TinyModel, random_groups: RandomGroups, tmp_path: Path, loss: Any) -> None:
    record = RunRecord()
    groups = [replace(group, scores=(2.0, 1.0)) for group in random_groups(8)]
    options: dict[str, Any] = {"levels": [1.0, 2.0]} if loss == "ordinal" else {}
    data = loader(groups, tmp_path / "store")
    fit = trainer(tmp_path, logger=[record], limit_train_batches=1)
    fit.fit(RewardModule(tiny_model(), loss=loss, optimizer=STEADY, **options), data, data)
    assert {"loss", "rewards/margins", "rewards/std", "val/rewards/calibration_error"} <= set(record.metrics)
    assert not [name for name, value in record.metrics.items() if value.last != value.last]
