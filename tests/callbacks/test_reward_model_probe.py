"""The probe of a reward model in training, on a fixed set that stands for responses of the policy to be taught."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from gloo_ranks import launched
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from rewarded import RESPONSES, Rewarded, Series, healthy
from speakers import quiet_trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader
from typing_extensions import override

from lightning_pref import RewardObservation, TaskSwitch, observe
from lightning_pref.callbacks.probe import Probe
from lightning_pref.callbacks.reward_model_probe import RewardModelProbe
from lightning_pref.callbacks.reward_variance import RewardVarianceMonitor


class LinearRewardModel(L.LightningModule):
    """Learns a score for vectors, and can be made to go wrong."""

    def __init__(self, wrap: Callable[[Tensor], Tensor] = lambda scores: scores, dropout: float = 0.5) -> None:
        super().__init__()
        self.layer = nn.Sequential(nn.Linear(3, 1), nn.Dropout(dropout))
        self.wrap = wrap

    def scores(self, responses: Tensor) -> Tensor:
        """One per response."""
        return self.wrap(self.layer(responses)[:, 0])

    @override
    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return nn.functional.softplus(-(self.scores(batch) * batch[:, 0])).mean()

    @override
    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=0.05)


def fixed_batch(seed: int, prompts: int = 5) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    responses = torch.randn(prompts * RESPONSES, 3, generator=generator)
    lengths = torch.randint(5, 50, (len(responses),), generator=generator)
    return {"responses": responses, "lengths": lengths, "prompts": 10 + torch.arange(len(responses)) // RESPONSES}


FIXED = [fixed_batch(seed) for seed in (1, 2)]


def score_fixed(module: LinearRewardModel, batch: dict[str, Tensor]) -> RewardObservation:
    torch.rand(3)
    return RewardObservation(
        rewards=module.scores(batch["responses"]),
        prompt_ids=batch["prompts"],
        lengths=batch["lengths"],
        gold=batch["responses"][:, 0],
    )


def probe(score: Any = score_fixed, **settings: Any) -> RewardModelProbe:
    return RewardModelProbe("policy", FIXED, score, **{"every_n_updates": 2, "budget": None, **settings})


def train_reward_model(
    *callbacks: Callback, wrap: Callable[[Tensor], Tensor] = lambda scores: scores, dropout: float = 0.5, **settings: Any
) -> tuple[Series, LinearRewardModel]:
    L.seed_everything(0, verbose=False)
    module, series = LinearRewardModel(wrap, dropout), Series()
    rows = torch.randn(24, 3, generator=torch.Generator().manual_seed(0))
    resume = settings.pop("resume", None)
    trainer = quiet_trainer(callbacks=list(callbacks), logger=series, **settings)
    loader: DataLoader[Tensor] = DataLoader(list(rows), batch_size=4)  # type: ignore[arg-type]
    trainer.fit(module, loader, ckpt_path=resume, weights_only=True if resume else None)
    return series, module


def test_a_probe_says_what_the_reward_model_would_teach() -> None:
    series, module = train_reward_model(probe(details=True))
    last = {key.removeprefix("probe/policy/reward_variance/"): values[6] for key, values in series.series.items()}
    module.eval()
    with torch.no_grad():
        scores = np.stack([module.scores(batch["responses"]).numpy().reshape(-1, RESPONSES) for batch in FIXED]).reshape(-1, 4)
    gold = np.stack([batch["responses"][:, 0].numpy().reshape(-1, RESPONSES) for batch in FIXED]).reshape(-1, 4)
    within = scores.astype(float).var(1, ddof=1).mean()
    assert last["within_prompt"] == pytest.approx(within, rel=1e-5)
    assert last["whitened"] == pytest.approx(within / scores.var(ddof=1), rel=1e-4)
    right = [(s[i] - s[j]) * (g[i] - g[j]) > 0 for s, g in zip(scores, gold, strict=True) for i in range(4) for j in range(i)]
    assert last["accuracy"] == pytest.approx(np.mean(right))
    assert last["ties"] == last["saturated"] == 0.0
    assert set(series.series["probe/policy/reward_variance/rank_correlation"]) == {0, 2, 4, 6}
    assert series.series["probe/policy/reward_variance/rank_correlation"][0] == pytest.approx(1.0)
    assert series.series["probe/policy/reward_variance/change"][0] == 1.0
    assert series.series["probe/policy/reward_variance/shift"][0] == 0.0
    known = {key.name.replace("<name>", "policy") for key in RewardModelProbe.keys}
    assert set(series.series) <= known


def test_a_probe_logs_at_most_eight_keys_unless_details_are_asked_for() -> None:
    series, _ = train_reward_model(probe())
    names = {key.removeprefix("probe/policy/reward_variance/") for key in series.series if "reward_variance" in key}
    assert names == {
        "within_prompt", "whitened", "change", "accuracy", "ties", "saturated", "rank_correlation", "length_correlation",
    }  # fmt: skip


def test_without_gold_or_lengths_there_is_no_accuracy_and_no_correlation() -> None:
    def bare(module: LinearRewardModel, batch: dict[str, Tensor]) -> list[RewardObservation]:
        return [RewardObservation(rewards=module.scores(batch["responses"]), prompt_ids=batch["prompts"])]

    series, _ = train_reward_model(probe(bare))
    assert not any(key.endswith(("accuracy", "length_correlation")) for key in series.series)
    assert "probe/policy/reward_variance/ties" in series.series


def test_M4_a_probe_of_a_reward_model_leaves_training_as_it_is() -> None:
    _, alone = train_reward_model()
    _, watched = train_reward_model(probe(every_n_updates=1))
    assert all(torch.equal(alone.state_dict()[name], value) for name, value in watched.state_dict().items())


def squashed(scores: Tensor) -> Tensor:
    return 10 * scores.round()


def test_W3_a_constant_reward_model_is_told_at_the_first_measurement() -> None:
    watch = probe()
    train_reward_model(watch, wrap=lambda scores: 0 * scores + 0.3)
    assert {alert.name for alert in watch.alerts} >= {"reward_variance/constant", "reward_variance/ties"}
    assert {alert.step for alert in watch.alerts} == {0}
    assert watch.alerts[0].source == "probe/policy"


def test_ties_raise_an_alert_and_a_healthy_reward_model_none() -> None:
    rough, fine = probe(), probe()
    train_reward_model(rough, wrap=squashed)
    train_reward_model(fine)
    assert "reward_variance/ties" in [alert.name for alert in rough.alerts]
    assert fine.alerts == []


def test_scores_that_start_at_zero_as_implicit_rewards_do_are_no_fault_and_those_that_stay_there_are() -> None:
    class FromZero(LinearRewardModel):
        def __init__(self, scale: float) -> None:
            super().__init__(lambda scores: scale * scores)
            nn.init.zeros_(self.layer[0].weight)  # type: ignore[arg-type]  # a layer of `nn.Sequential` has any type
            nn.init.zeros_(self.layer[0].bias)  # type: ignore[arg-type]

    learning, stuck = probe(), probe()
    for watch, scale in ((learning, 1.0), (stuck, 0.0)):
        loader: DataLoader[Tensor] = DataLoader(list(torch.randn(24, 3)), batch_size=4)  # type: ignore[arg-type]
        quiet_trainer(callbacks=[watch], logger=Series()).fit(FromZero(scale), loader)
    assert learning.alerts == []
    assert {alert.step for alert in stuck.alerts if alert.name == "reward_variance/constant"} == {2}


def test_a_probe_and_a_monitor_side_by_side_do_not_report_the_same_twice() -> None:
    class Says(LinearRewardModel):
        @override
        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            observe(self, RewardObservation(rewards=self.scores(batch), prompt_ids=torch.arange(len(batch)) // 2))
            return super().training_step(batch, batch_idx)

    series = Series()
    trainer = quiet_trainer(callbacks=[probe(), RewardVarianceMonitor(every_n_updates=2)], logger=series)
    trainer.fit(Says(), DataLoader(list(torch.randn(8, 3)), batch_size=4))  # type: ignore[arg-type]
    assert "reward_variance/mean" in series.series
    assert "probe/policy/reward_variance/mean" not in series.series


def test_a_plain_probe_feeds_the_monitor_where_training_has_one_response_per_prompt() -> None:
    sampled = Probe("policy", FIXED, score_fixed, every_n_updates=6, budget=None)

    class Says(LinearRewardModel):
        @override
        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            observe(self, RewardObservation(rewards=self.scores(batch), prompt_ids=torch.arange(len(batch))))
            return super().training_step(batch, batch_idx)

    series = Series()
    trainer = quiet_trainer(callbacks=[sampled, RewardVarianceMonitor(every_n_updates=6)], logger=series)
    trainer.fit(Says(), DataLoader(list(torch.randn(24, 3)), batch_size=4))  # type: ignore[arg-type]
    assert series.series["probe/policy/reward_variance/within_prompt"][6] > 0


def test_a_negative_floor_is_refused_at_construction() -> None:
    with pytest.raises(ValueError, match="`floor` is a standard deviation, 0 or more; got -0.1"):
        probe(floor=-0.1)


def test_a_score_function_that_gives_something_else_is_refused() -> None:
    watch = probe(lambda module, batch: TaskSwitch(task="x"))
    with pytest.raises(TypeError, match="The score function of RewardModelProbe 'policy' gave a TaskSwitch; it has to give a"):
        train_reward_model(watch)


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
def test_a_resumed_probe_compares_with_the_scores_of_the_start(tmp_path: Path) -> None:
    # Dropout off: a checkpoint holds no random states, so that a resumed run would train on differently.
    whole, _ = train_reward_model(probe(details=True), dropout=0.0, max_epochs=2)
    checkpoint = ModelCheckpoint(dirpath=tmp_path, filename="middle", save_on_train_epoch_end=True)
    train_reward_model(probe(details=True), checkpoint, dropout=0.0, enable_checkpointing=True)
    path = str(tmp_path / "middle.ckpt")
    resumed, _ = train_reward_model(probe(details=True), dropout=0.0, max_epochs=2, resume=path)
    for key, values in resumed.series.items():
        if not key.endswith("time_share"):
            assert values == pytest.approx({step: whole.series[key][step] for step in values}, nan_ok=True)
    fewer = RewardModelProbe("policy", FIXED[:1], score_fixed, every_n_updates=2, budget=None)
    with pytest.raises(ValueError, match=r"RewardModelProbe 'policy' scored 20 responses, but 40 in its first measurement"):
        train_reward_model(fewer, max_epochs=2, resume=path)


def by_length(module: Rewarded, batch: dict[str, Tensor]) -> RewardObservation:
    """Scores of vectors that no training changes."""
    scores = batch["responses"] @ torch.tensor([1.0, -2.0, 0.5])
    return RewardObservation(rewards=scores, prompt_ids=batch["prompts"], lengths=batch["lengths"], gold=batch["responses"][:, 0])


def run_of_ranks(ranks: int) -> dict[str, dict[int, float]]:
    """Two updates of two micro-batches each, over ranks or one after the other, and a probe of three unequal batches."""
    fixed = [fixed_batch(seed, prompts) for seed, prompts in ((1, 2), (2, 5), (3, 1))]
    held_out = RewardModelProbe("policy", fixed, by_length, every_n_updates=2, budget=None, details=True)
    parallel: dict[str, Any] = {"devices": ranks, "strategy": "ddp"} if ranks > 1 else {"accumulate_grad_batches": 2}
    monitor, series = RewardVarianceMonitor(every_n_updates=1, details=True), Series()
    trainer = quiet_trainer(callbacks=[monitor, held_out], logger=series, **parallel)
    trainer.fit(Rewarded(healthy), DataLoader(list(torch.randn(4, 2)), batch_size=1))  # type: ignore[arg-type]
    return {key: values for key, values in series.series.items() if not key.endswith("time_share")}


def run_shared(_folder: Path, _rank: int, ranks: int) -> dict[str, dict[int, float]]:
    return run_of_ranks(ranks)


@pytest.mark.slow
def test_two_ranks_log_what_one_process_does(tmp_path: Path) -> None:
    found, _ = launched(run_shared, tmp_path, 2)
    alone = run_of_ranks(1)
    assert found.keys() == alone.keys()
    for key, values in alone.items():
        assert found[key] == pytest.approx(values, rel=1e-9, nan_ok=True), key
