"""The over-optimisation monitor on constructed diseases, and on healthy runs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from rewarded import Rewarded, Series
from speakers import quiet_trainer
from torch import Tensor
from torch.utils.data import DataLoader
from typing_extensions import override

from lightning_pref import RewardObservation, observe
from lightning_pref.alerts import ALERT_RULES
from lightning_pref.callbacks import OveroptimizationMonitor

PROMPTS, RESPONSES, UPDATES = 16, 8, 12
N = PROMPTS * RESPONSES
Rollout = Callable[[int], RewardObservation]


def rollout(
    number: int,
    *,
    proxy: float = 0.0,
    gold: float | None = None,
    length: float = 20.0,
    pays_length: float = 0.0,
    uncertainty: float | None = None,
    seed: int = 0,
) -> RewardObservation:
    generator = torch.Generator().manual_seed(1000 * seed + number)
    lengths = (length + 4 * torch.randn(N, generator=generator)).round().clamp(min=1)
    noise = torch.randn(N, generator=generator)
    return RewardObservation(
        rewards=proxy + noise + pays_length * (lengths - length),
        prompt_ids=torch.arange(PROMPTS).repeat_interleave(RESPONSES),
        lengths=lengths,
        gold=None if gold is None else gold + 0.5 * torch.randn(N, generator=generator),
        uncertainty=None if uncertainty is None else uncertainty + 0.05 * torch.rand(N, generator=generator),
        kl=torch.full((N,), float(number)),
    )


class Sampling(Rewarded):
    """Somebody's module that publishes a rollout in every step."""

    def __init__(self, rollout: Rollout) -> None:
        super().__init__(lambda number: (torch.zeros(1), None))
        self.rollout = rollout

    @override
    def training_step(self, batch: Tensor, batch_idx: int) -> dict[str, Tensor]:
        observe(self, self.rollout(batch_idx))
        return {"loss": self.layer(batch).square().mean()}


def watched(rollout: Rollout, **settings: Any) -> tuple[OveroptimizationMonitor, Series]:
    monitor, series = OveroptimizationMonitor(every_n_updates=1, **settings), Series()
    trainer = quiet_trainer(callbacks=[monitor], logger=series)
    trainer.fit(Sampling(rollout), DataLoader(list(torch.randn(UPDATES, 2)), batch_size=1))  # type: ignore[arg-type]
    return monitor, series


def names(monitor: OveroptimizationMonitor) -> list[str]:
    return [alert.name.removeprefix("overoptimization/") for alert in monitor.alerts]


@pytest.mark.parametrize("seed", range(5))
def test_a_healthy_run_raises_no_alert(seed: int) -> None:
    monitor, _ = watched(lambda i: rollout(i, proxy=0.3 * i, gold=0.1 * i, uncertainty=0.4, seed=seed))
    assert names(monitor) == []


@pytest.mark.parametrize("seed", range(5))
def test_noise_around_a_gold_reward_that_stands_still_is_no_fall(seed: int) -> None:
    monitor, _ = watched(lambda i: rollout(i, proxy=0.3 * i, gold=0.0, seed=seed))
    assert names(monitor) == []


def test_gold_that_falls_while_the_proxy_rises_is_said_with_where_it_began() -> None:
    monitor, series = watched(lambda i: rollout(i, proxy=0.3 * i, gold=0.2 * min(i, 8 - i)))
    (alert,) = monitor.alerts
    assert (alert.name, alert.level) == ("overoptimization/gold_falls", "critical")
    assert 6 <= alert.since_step <= 9
    assert "The gold reward was highest, 0.6" in alert.evidence
    assert "at sqrt(KL) 2.00 (now 2." in alert.evidence
    assert "the policy exploits what the reward gets wrong" in alert.advice
    drops = series.series["overoptimization/gold_drop"]
    assert drops[12] > drops[8] > drops[5] - 1e-9
    assert series.series["overoptimization/distance"][5] == pytest.approx(2.0)  # sqrt of the KL of the fifth rollout


def test_gold_that_falls_with_the_proxy_is_not_over_optimisation() -> None:
    monitor, _ = watched(lambda i: rollout(i, proxy=-0.3 * i, gold=-0.3 * i))
    assert names(monitor) == []


def test_without_gold_the_disagreement_of_an_ensemble_gives_it_away() -> None:
    monitor, _ = watched(lambda i: rollout(i, proxy=0.2 * i, uncertainty=0.3 + 0.05 * i))
    assert names(monitor) == ["disagreement"]
    assert "The members of the ensemble disagree more and more" in monitor.alerts[0].advice
    agreeing, _ = watched(lambda i: rollout(i, proxy=0.2 * i, uncertainty=0.3 - 0.02 * i))
    assert names(agreeing) == []


def test_without_gold_answers_that_only_grow_give_it_away() -> None:
    monitor, _ = watched(lambda i: rollout(i, proxy=0.2 * i, length=20 + 3 * i, pays_length=0.2))
    assert names(monitor) == ["length"]
    honest, _ = watched(lambda i: rollout(i, proxy=0.2 * i, length=20 + 3 * i))
    assert names(honest) == [], "answers grow, but are not paid for it"


def test_only_what_is_known_is_logged_and_thresholds_can_be_set() -> None:
    def bare(number: int) -> RewardObservation:
        return RewardObservation(rewards=rollout(number).rewards, prompt_ids=torch.arange(N) // RESPONSES)

    _, series = watched(bare)
    assert set(series.series) == {"overoptimization/proxy_gain"}
    _, series = watched(lambda i: rollout(i, gold=1.0, uncertainty=0.3))
    assert set(series.series) == {key.name for key in OveroptimizationMonitor.keys}
    falls: Rollout = lambda i: rollout(i, proxy=0.3 * i, gold=-0.2 * i)  # noqa: E731  # a name for the two uses
    assert names(watched(falls)[0]) == ["gold_falls"]
    assert names(watched(falls, thresholds={"overoptimization/gold_falls/gold_drop": 50.0})[0]) == []


def test_every_rule_of_the_monitor_has_a_planted_case() -> None:
    rules = {name.split("/")[1] for name in ALERT_RULES if name.startswith("overoptimization/")}
    assert rules == {"gold_falls", "disagreement", "length"}
