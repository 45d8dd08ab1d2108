"""The reward-variance monitor on real runs of a module that is not ours."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from rewarded import PROMPTS, RESPONSES, Rewarded, Rewards, Series, fit, healthy
from speakers import quiet_trainer
from torch import Tensor
from torch.utils.data import DataLoader
from typing_extensions import override

from lightning_pref import RewardObservation, observe
from lightning_pref.alerts import ALERT_RULES
from lightning_pref.callbacks.observe_outputs import ObserveOutputs
from lightning_pref.callbacks.reward_variance import RewardVarianceMonitor


def alerts_of(rewards: Rewards, **settings: Any) -> list[str]:
    monitor = RewardVarianceMonitor(every_n_updates=1, **settings)
    fit([monitor], rewards)
    return [alert.name.removeprefix("reward_variance/") for alert in monitor.alerts]


def test_the_logged_numbers_are_those_of_all_rewards_of_a_window() -> None:
    series, _ = fit([RewardVarianceMonitor(every_n_updates=3)])
    for window in range(4):
        table = np.stack([healthy(3 * window + i)[0].numpy() for i in range(3)]).reshape(-1, RESPONSES).astype(float)
        within = table.var(1, ddof=1).mean()
        expected = {
            "within_prompt": within,
            "whitened": within / table.var(ddof=1),
            "between_prompt": table.mean(1).var(),
            "mean": table.mean(),
            "zero_share": 0.0,
        }
        for name, value in expected.items():
            assert series.series[f"reward_variance/{name}"][3 * (window + 1)] == pytest.approx(value, rel=1e-5)
    changes = series.series["reward_variance/change"]
    variances = series.series["reward_variance/within_prompt"]
    assert list(changes.values()) == pytest.approx([value / variances[3] for value in variances.values()])


def test_accumulation_makes_one_report_of_all_micro_batches() -> None:
    series, _ = fit([RewardVarianceMonitor(every_n_updates=1)], updates=2, accumulate_grad_batches=3)
    table = np.stack([healthy(i)[0].numpy() for i in range(3)]).reshape(-1, RESPONSES)
    assert series.series["reward_variance/within_prompt"][1] == pytest.approx(table.var(1, ddof=1).mean(), rel=1e-5)


def test_a_monitor_logs_at_most_eight_keys_unless_details_are_asked_for() -> None:
    series, _ = fit([RewardVarianceMonitor(every_n_updates=4)])
    assert len(series.series) == 8
    detailed, _ = fit([RewardVarianceMonitor(every_n_updates=4, details=True)])
    assert set(detailed.series) - set(series.series) == {
        f"reward_variance/{name}" for name in ("effective_group_size", "whitened_by_first", "std_q05", "std_q50", "std_q95")
    }
    known = {key.name for key in RewardVarianceMonitor.keys}
    assert set(detailed.series) <= known


def test_without_lengths_nothing_is_said_about_length() -> None:
    series, _ = fit([RewardVarianceMonitor(every_n_updates=4)], lambda number: (healthy(number)[0], None))
    assert "reward_variance/length_correlation" not in series.series


def test_a_healthy_run_raises_no_alert() -> None:
    assert alerts_of(healthy) == []


def test_W3_a_constant_reward_raises_an_alert_within_a_few_updates() -> None:
    monitor = RewardVarianceMonitor(every_n_updates=1)
    fit([monitor], lambda number: (torch.full((PROMPTS * RESPONSES,), 0.7), None))
    first = monitor.alerts[0]
    assert first.name == "reward_variance/constant"
    assert first.level == "critical"
    assert (first.since_step, first.step) == (1, 3)
    assert "Every response gets the same reward" in first.advice


def small_within(number: int) -> tuple[Tensor, None]:
    offsets = torch.arange(PROMPTS).repeat_interleave(RESPONSES)
    return offsets + 0.1 * healthy(number)[0], None


def mostly_equal(number: int) -> tuple[Tensor, None]:
    rewards = torch.zeros(PROMPTS, RESPONSES)
    rewards[number % PROMPTS, 0] = 1.0
    return rewards.flatten(), None


def fading(number: int) -> tuple[Tensor, None]:
    return healthy(number)[0] * (1.0 if number < 3 else 0.1), None


def long_pays(number: int) -> tuple[Tensor, Tensor]:
    rewards, lengths = healthy(number)
    return rewards + 0.2 * lengths, lengths


def short_pays(number: int) -> tuple[Tensor, Tensor]:
    rewards, lengths = healthy(number)
    return rewards - 0.2 * lengths, lengths


def sometimes_nan(number: int) -> tuple[Tensor, None]:
    rewards, _ = healthy(number)
    rewards[3] = math.nan
    return rewards, None


@pytest.mark.parametrize(
    ("name", "rewards"),
    [
        ("flat", small_within),
        ("zero_share", mostly_equal),
        ("vanishing", fading),
        ("pays_length", long_pays),
        ("pays_brevity", short_pays),
        ("not_finite", sometimes_nan),
    ],
)
def test_a_planted_disease_raises_its_alert_and_no_other(name: str, rewards: Rewards) -> None:
    assert alerts_of(rewards) == [name]


def test_single_responses_raise_an_alert_and_are_not_zero_variance() -> None:
    class Single(Rewarded):
        @override
        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            observe(self, RewardObservation(rewards=torch.randn(6), prompt_ids=torch.arange(6)))
            return self.layer(batch).square().mean()

    monitor, series = RewardVarianceMonitor(every_n_updates=2), Series()
    trainer = quiet_trainer(callbacks=[monitor], logger=series)
    trainer.fit(Single(healthy), DataLoader(list(torch.randn(4, 2)), batch_size=1))  # type: ignore[arg-type]
    assert [alert.name for alert in monitor.alerts] == ["reward_variance/single_responses"]
    assert "attach a `Probe`" in monitor.alerts[0].advice
    assert series.series["reward_variance/single_share"][2] == 1.0
    assert math.isnan(series.series["reward_variance/zero_share"][2])


def test_every_rule_of_the_monitor_has_a_planted_case() -> None:
    rules = {name.split("/")[1] for name in ALERT_RULES if name.startswith("reward_variance/")}
    here = {
        "constant",
        "flat",
        "zero_share",
        "vanishing",
        "pays_length",
        "pays_brevity",
        "not_finite",
        "single_responses",
        "ties",
    }
    assert rules == here


def test_a_limit_can_be_moved_or_turned_off() -> None:
    assert alerts_of(small_within, thresholds={"reward_variance/flat": math.nan}) == []
    assert alerts_of(healthy, thresholds={"reward_variance/flat": 0.99}) == ["flat"]


def test_a_negative_floor_is_refused_at_construction() -> None:
    with pytest.raises(ValueError, match="`floor` is a standard deviation, 0 or more; got -0.1"):
        RewardVarianceMonitor(floor=-0.1)


def test_the_floor_decides_what_counts_as_no_variance() -> None:
    series, _ = fit([RewardVarianceMonitor(every_n_updates=4, floor=100.0)])
    assert set(series.series["reward_variance/zero_share"].values()) == {1.0}


def test_outputs_of_a_module_that_says_nothing_are_read() -> None:
    said, _ = fit([RewardVarianceMonitor(every_n_updates=4)], lambda number: (healthy(number)[0], None))
    read, _ = fit([ObserveOutputs(), RewardVarianceMonitor(every_n_updates=4)], says=False)
    assert read.series == said.series


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
def test_a_resumed_run_compares_with_the_first_report_of_the_whole_run(tmp_path: Path) -> None:
    whole, _ = fit([RewardVarianceMonitor(every_n_updates=2)], fading, updates=4, max_epochs=2)
    checkpoint = ModelCheckpoint(dirpath=tmp_path, filename="middle", save_on_train_epoch_end=True)
    fit([RewardVarianceMonitor(every_n_updates=2), checkpoint], fading, updates=4, enable_checkpointing=True)
    resumed, _ = fit(
        [RewardVarianceMonitor(every_n_updates=2)], fading, updates=4, max_epochs=2, resume=str(tmp_path / "middle.ckpt")
    )
    for key, values in resumed.series.items():
        assert values == {step: whole.series[key][step] for step in (6, 8)}
