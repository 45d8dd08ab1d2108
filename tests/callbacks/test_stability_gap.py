"""The evaluator finds a dip that was planted, and stays silent where there is none."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from clockwork import DIP, ONE, Clockwork, by_table, by_task, run
from lightning.pytorch.callbacks import ModelCheckpoint
from speakers import quiet_trainer
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset
from typing_extensions import override

from lightning_pref import TaskSwitch, observe
from lightning_pref.callbacks.stability_gap import StabilityGapEvaluator
from lightning_pref.measures.forgetting import ProbeScores, stability_gap
from lightning_pref.reports import RunRecord


def test_a_planted_dip_is_found_where_it_was_planted() -> None:
    evaluator = StabilityGapEvaluator({"old": ONE}, by_table(DIP), budget=None)
    record, _ = run(evaluator, 12)
    gap = evaluator.gaps()["old"]
    assert (gap.onset, gap.worst_step, gap.recovery_step, gap.duration) == (1, 2, 5, 4)
    assert gap.depth == pytest.approx(1.5)
    assert gap.final_change == pytest.approx(0.0, abs=1e-6)
    assert evaluator.trace("old")[0] == list(range(13))
    found = {key: value.last for key, value in record.metrics.items()}
    assert found["stability_gap/old/loss"] == pytest.approx(2.0)
    assert found["stability_gap/old/depth"] == pytest.approx(1.5)
    assert found["stability_gap/old/recovery_step"] == 5.0
    assert found["stability_gap/old/worst_step"] == 2.0
    assert found["stability_gap/min_acc"] == pytest.approx(np.exp(-3.5), rel=1e-5)
    assert found["stability_gap/wf_10"] == pytest.approx(np.exp(-2.0) - np.exp(-3.5), rel=1e-5)
    assert found["stability_gap/wp_100"] == pytest.approx(np.exp(-2.0) - np.exp(-3.5), rel=1e-5)
    assert found["stability_gap/forgetting"] == pytest.approx(0.0, abs=1e-6)
    assert found["stability_gap/lasting_depth"] == 0.0
    assert found["stability_gap/time_share"] > 0
    alerts = [alert for alert in evaluator.alerts if alert.name != "stability_gap/expensive"]
    assert [alert.name for alert in alerts] == ["stability_gap/dip"]
    assert alerts[0].since_step == 1
    assert "Loss of 'old' is worse by" in alerts[0].evidence
    assert "than before training started" in alerts[0].evidence


def test_a_dip_that_lasts_is_called_so_in_time_and_at_the_end_at_the_latest() -> None:
    lost = [2.0, 3.0]
    for updates, within, since in ((12, 200, 12), (12, 5, 6)):
        evaluator = StabilityGapEvaluator({"old": ONE}, by_table(lost), budget=None, recovery_within=within)
        run(evaluator, updates)
        said = {alert.name: alert for alert in evaluator.alerts}
        assert said["stability_gap/no_recovery"].since_step == since
        assert "the dip began at update 1 and has not ended" in said["stability_gap/no_recovery"].evidence
        assert evaluator.gaps()["old"].recovery_step is None


def test_noise_alone_raises_no_alert() -> None:
    generator = torch.Generator().manual_seed(0)

    def score(module: Clockwork, batch: Tensor) -> Tensor:
        return 2.0 + torch.randn(64, generator=generator)

    evaluator = StabilityGapEvaluator({"old": ONE}, score, budget=None, thresholds={"stability_gap/expensive": float("nan")})
    run(evaluator, 60)
    assert evaluator.alerts == []
    values = evaluator.trace("old")[1]
    assert max(values) - values[0] > 0.1, "there was something to mistake for a dip"


def test_thresholds_decide_what_is_a_dip() -> None:
    quiet = {f"stability_gap/{name}": float("nan") for name in ("dip", "no_recovery", "expensive")}
    evaluator = StabilityGapEvaluator({"old": ONE}, by_table(DIP), budget=None, thresholds=quiet)
    run(evaluator, 12)
    assert evaluator.alerts == []


def test_a_switch_said_in_the_step_sets_baselines_before_the_update_it_was_said_in() -> None:
    """Task a is learned for five updates, then b: a falls from .9 to .4 and comes back to .8 while b rises from .1 to .9."""
    first = [0.1, 0.5, 0.9, 0.9, 0.9, 0.9, 0.6, 0.4, 0.7, 0.8, 0.8]
    second = [0.1] * 6 + [0.3, 0.6, 0.9, 0.9, 0.9]
    evaluator = StabilityGapEvaluator(
        {"a": [torch.tensor(0.0)], "b": [torch.tensor(1.0)]},
        by_task({0: first, 1: second}),
        kind="accuracy",
        learning="a",
        dense_updates=3,
        growth=9.0,
        budget=None,
    )
    record, _ = run(evaluator, 10, {5: "b"})
    assert [tuple(switch) for switch in evaluator.switches] == [(0, "a"), (5, "b")]
    # Every update up to 3, then only because of the switch at 5, and so on.
    assert evaluator.trace("a")[0] == [0, 1, 2, 3, 5, 6, 7, 8, 10]
    assert evaluator.gaps(0) == {}
    gap = evaluator.gaps()["a"]
    steps, values = evaluator.trace("a")
    assert gap == stability_gap(steps, [-value for value in values], 5)
    assert (gap.onset, gap.worst_step, gap.recovery_step) == (6, 7, None)
    assert gap.depth == pytest.approx(0.5)
    found = {key: value.last for key, value in record.metrics.items()}
    assert found["stability_gap/min_acc"] == pytest.approx(0.4)
    assert found["stability_gap/wc_acc"] == pytest.approx((0.9 + 0.4) / 2)
    assert found["stability_gap/a/accuracy"] == pytest.approx(0.8)
    assert "stability_gap/b/depth" not in found
    said = {alert.name: alert for alert in evaluator.alerts}
    assert (
        "Accuracy of 'a' is worse by 0.3 at update 6 than before the switch to 'b' at update 5"
        in said["stability_gap/dip"].evidence
    )


def test_a_switch_after_an_evaluation_of_the_same_weights_evaluates_once() -> None:
    calls: list[int] = []

    def score(module: Clockwork, batch: Tensor) -> Tensor:
        calls.append(int(module.position.item()))
        return torch.ones(4)

    evaluator = StabilityGapEvaluator({"a": ONE}, score, budget=None)
    run(evaluator, 4, {0: "new", 2: "newer"})
    assert calls == [0, 1, 2, 3, 4]
    assert [tuple(switch) for switch in evaluator.switches] == [(0, None), (0, "new"), (2, "newer")]


def test_a_switch_said_before_training_starts_is_kept() -> None:
    class Early(Clockwork):
        @override
        def on_fit_start(self) -> None:
            observe(self, TaskSwitch(task="early"))

    evaluator = StabilityGapEvaluator({"a": ONE}, by_table([1.0]), budget=None)
    quiet_trainer(callbacks=[evaluator], max_steps=2).fit(Early(), DataLoader(TensorDataset(torch.zeros(3, 1))))
    assert [tuple(switch) for switch in evaluator.switches] == [(0, None), (0, "early")]


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20]),
        ({"dense_updates": 4, "growth": 1.5}, [0, 1, 2, 3, 4, 6, 9, 14, 20]),
        ({"dense_updates": 4, "growth": 1.5, "every_n_updates": 2}, [0, 2, 4, 6, 9, 14, 20]),
        ({"dense_updates": 0, "growth": 1.0, "every_n_updates": 6}, [0, 6, 12, 18, 20]),
    ],
)
def test_evaluations_are_dense_after_a_start_and_rarer_by_a_factor_after_that(
    settings: dict[str, Any], expected: list[int]
) -> None:
    evaluator = StabilityGapEvaluator({"old": ONE}, by_table([1.0]), budget=None, **settings)
    run(evaluator, 20)
    assert evaluator.trace("old")[0] == expected


def test_steps_are_executed_updates_not_batches() -> None:
    evaluator = StabilityGapEvaluator({"old": ONE}, by_table([1.0]), budget=None)
    run(evaluator, 3, accumulate_grad_batches=2)
    assert evaluator.trace("old")[0] == [0, 1, 2, 3]


def test_the_budget_bounds_what_follows_the_dense_part_only() -> None:
    def score(module: Clockwork, batch: Tensor) -> Tensor:
        time.sleep(0.01)
        return torch.ones(4)

    evaluator = StabilityGapEvaluator({"old": ONE}, score, dense_updates=3, growth=1.0, budget=1e-9)
    record, _ = run(evaluator, 8)
    # The first one that the budget decides on costs nothing it knows of.
    assert evaluator.trace("old")[0] == [0, 1, 2, 3, 4, 8]
    assert record.metrics["stability_gap/skipped"].last == 4.0
    assert record.metrics["stability_gap/time_share"].last > 0.2
    assert [alert.name for alert in evaluator.alerts] == ["stability_gap/expensive"]


def test_dense_evaluations_are_reported_at_once_and_others_at_the_trainers_cadence() -> None:
    record = RunRecord()
    logged: dict[str, list[int]] = {}
    keep = record.log_metrics

    def note(metrics: dict[str, float], step: int | None = None) -> None:
        for key in metrics:
            logged.setdefault(key, []).append(step or 0)
        keep(metrics, step)

    record.log_metrics = note  # type: ignore[method-assign]
    evaluator = StabilityGapEvaluator({"old": ONE}, by_table([1.0]), budget=None, dense_updates=2, growth=1.0)
    run(evaluator, 10, logger=record, log_every_n_steps=4)
    assert logged["stability_gap/old/loss"] == [*range(11), 10]
    assert logged["stability_gap/min_acc"] == [0, 1, 2, 6, 10, 10]


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before")  # all batches are the same
@pytest.mark.parametrize("middle", [5, 8, 12])
def test_C5_a_run_resumed_between_two_switches_goes_on_with_its_traces(tmp_path: Path, middle: int) -> None:
    def build() -> StabilityGapEvaluator:
        tables = {0: DIP[:5] * 4, 1: DIP[::-1] * 2}
        tasks = {"a": [torch.tensor(0.0)], "b": [torch.tensor(1.0)]}
        return StabilityGapEvaluator(tasks, by_task(tables), budget=None, dense_updates=3, growth=1.4)

    switches = {5: "b", 11: "other"}
    whole, resumed = build(), build()
    run(whole, 16, switches)
    checkpoint = ModelCheckpoint(dirpath=tmp_path, filename="middle", every_n_train_steps=middle)
    run(build(), middle, switches, callbacks=[checkpoint], enable_checkpointing=True)
    run(resumed, 16, switches, resume=str(tmp_path / "middle.ckpt"))
    assert resumed.switches == whole.switches
    assert len(whole.switches) == 3
    for number in range(3):
        assert resumed.gaps(number) == whole.gaps(number) != {}
    for task in ("a", "b"):
        assert resumed.trace(task) == whole.trace(task)
    assert [alert.name for alert in resumed.alerts if alert.step <= middle] == [], "what was said is not said again"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"tasks": {}}, "`tasks` is empty; give the batches of at least one task"),
        ({"tasks": {"old": []}}, "The task 'old' needs at least one batch, got none"),
        ({"kind": "perplexity"}, "`kind` is 'loss' or 'accuracy', got 'perplexity'"),
        ({"learning": "new"}, "`learning` is one of the tasks that are watched .old., got 'new'; leave it out"),
        ({"every_n_updates": 0}, "`every_n_updates` must be at least 1, got 0"),
        ({"recovery_within": 0}, "`recovery_within` must be at least 1, got 0"),
        ({"dense_updates": -1}, "`dense_updates` must be at least 0, got -1"),
        ({"growth": 0.9}, "`growth` must be at least 1, got 0.9"),
        ({"tolerance": -1.0}, "`tolerance` must be at least 0, got -1.0"),
        ({"budget": 2.0}, "`budget` is a share of the training time in"),
        ({"thresholds": {"stability_gap/depth": 1.0}}, "Unknown threshold 'stability_gap/depth' of stability_gap"),
    ],
)
def test_a_setting_without_sense_raises(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        StabilityGapEvaluator(**{"tasks": {"old": ONE}, "score": by_table([1.0]), **given})


@pytest.mark.parametrize(
    ("score", "kind", "message"),
    [
        (lambda m, b: torch.ones(()), "loss", r"one value and one weight per example.*got \[\] and \[\]. Do not average"),
        (lambda m, b: ProbeScores(torch.ones(3), torch.ones(2)), "loss", r"got \[3\] and \[2\]"),
        (lambda m, b: ProbeScores(torch.ones(2), -torch.ones(2)), "loss", "weights of the task 'old' must not be negative"),
        (lambda m, b: ProbeScores(torch.ones(2), torch.zeros(2)), "loss", "must not be negative, and not all 0"),
        (lambda m, b: torch.tensor([0.5, 1.5]), "accuracy", r"must be in \[0, 1\], got values from 0.5 to 1.5. For losses, say"),
        (lambda m, b: torch.ones(2 + int(m.position)), "loss", r"other sizes than at the first evaluation.*had \[2\] examples"),
    ],
)
def test_a_score_that_says_nothing_about_examples_is_refused(score: Any, kind: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        run(StabilityGapEvaluator({"old": ONE}, score, kind=kind), 2)


def test_weights_weigh_examples_and_a_loss_without_noise_that_rises_is_a_dip() -> None:
    def score(module: Clockwork, batch: Tensor) -> ProbeScores:
        value = 1.0 + (module.position.item() > 0)
        return ProbeScores(torch.tensor([value, value, 9.0]), torch.tensor([5.0, 3.0, 0.0]))

    evaluator = StabilityGapEvaluator({"old": ONE}, score, budget=None)
    run(evaluator, 4)
    assert evaluator.trace("old")[1] == [1.0, 2.0, 2.0, 2.0, 2.0]
    assert "stability_gap/dip" in {alert.name for alert in evaluator.alerts}


def test_a_single_example_has_no_noise_to_compare_a_dip_with() -> None:
    evaluator = StabilityGapEvaluator({"old": ONE}, lambda module, batch: module.position[None] + 1, budget=None)
    record, _ = run(evaluator, 4)
    assert np.isnan(evaluator.noise_floor("old"))
    assert record.metrics["stability_gap/old/depth"].last == pytest.approx(4.0)
    assert "stability_gap/relative_depth" not in record.metrics
    assert {alert.name for alert in evaluator.alerts} <= {"stability_gap/expensive"}
