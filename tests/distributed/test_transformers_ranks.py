"""Two processes of a transformers Trainer, over gloo: one report for both, written once."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from gloo_ranks import launched
from transformers_runs import Chosen, Recorder, collate, logps, pair_observation, pair_rows, run, tiny_llama
from typing_extensions import override

from lightning_pref.alerts import Alert
from lightning_pref.callbacks.displacement import LikelihoodDisplacementTracker
from lightning_pref.callbacks.hosts import Host
from lightning_pref.callbacks.probe import Probe
from lightning_pref.callbacks.spike_reset import SpikeAwareOptimizerReset
from lightning_pref.callbacks.stability_gap import StabilityGapEvaluator
from lightning_pref.integrations.transformers import attach
from lightning_pref.integrations.trl import ObserveDPO

pytestmark = pytest.mark.slow

RANKS, NUM_ROWS = 2, 16


class Alarm(Recorder):
    """Raises one alert, on every rank."""

    @override
    def finish(self, host: Host) -> None:
        self.raise_alert(host, Alert(level="info", name="recorder/done", since_step=0, step=host.step, evidence="", advice=""))


def parts() -> list[Any]:
    fixed = [collate(pair_rows(3, seed=seed)) for seed in (5, 6, 7)]  # an odd number: one rank only goes along in the end
    return [
        Chosen(every_n_updates=2),
        Alarm(),
        Probe("fixed", fixed, pair_observation, every_n_updates=2, budget=None),
        StabilityGapEvaluator({"old": fixed}, lambda model, batch: -logps(model, batch["chosen"]), budget=None),
        SpikeAwareOptimizerReset("spam", reset_every=3, warmup_steps=1, guard_steps=1),
    ]


def train_dpo(folder: Path, rank: int, ranks: int) -> None:
    from trl_runs import dpo_trainer

    warnings.filterwarnings("ignore", message=".*is deprecated and will be removed in v", category=FutureWarning)
    trainer = dpo_trainer(
        folder,
        per_device_train_batch_size=4 // ranks,
        train_sampling_strategy="sequential",
        lr_scheduler_type="constant",
        learning_rate=1e-3,
        optim="adamw_torch",
        adam_epsilon=0.1,
    )
    attach(trainer, LikelihoodDisplacementTracker(every_n_updates=1), ObserveDPO())
    trainer.train()
    (folder / f"history-{rank}.json").write_text(json.dumps(trainer.state.log_history))


def train(folder: Path, rank: int, ranks: int) -> None:
    settings: dict[str, Any] = {"num_rows": NUM_ROWS, "per_device_train_batch_size": 4 // ranks, "lr_scheduler_type": "constant"}
    # Halves of a batch are averaged over ranks, so that both runs make the same updates.
    trainer = run(
        tiny_llama(),
        folder,
        *parts(),
        train_sampling_strategy="sequential",
        learning_rate=1e-3,
        optim="adamw_torch",
        adam_epsilon=0.1,
        save_strategy="steps",
        save_steps=2,
        **settings,
    )
    (folder / f"history-{rank}.json").write_text(json.dumps(trainer.state.log_history))


def on_the_cpu(training: Callable[[Path, int, int], None], folder: Path, rank: int, ranks: int) -> None:
    os.environ.update(LOCAL_WORLD_SIZE=str(ranks), ACCELERATE_USE_CPU="true")
    training(folder, rank, ranks)


def by_key(history: list[dict[str, float]]) -> dict[str, dict[float, float]]:
    found: dict[str, dict[float, float]] = {}
    for entry in history:
        for key, value in entry.items():
            if "/" in key and not key.endswith("time_share"):
                found.setdefault(key, {})[entry["step"]] = value
    return found


def histories(training: Callable[[Path, int, int], None], folder: Path) -> list[dict[str, dict[float, float]]]:
    """What both processes of a run of two wrote down, and the process of a run of one."""
    (folder / "two").mkdir()
    launched(partial(on_the_cpu, training), folder / "two", RANKS)
    training(folder / "one", 0, 1)
    return [
        by_key(json.loads((folder / name).read_text()))
        for name in ("two/history-0.json", "two/history-1.json", "one/history-0.json")
    ]


def test_two_processes_report_what_one_does(tmp_path: Path) -> None:
    first, second, alone = histories(train, tmp_path)
    assert first == second
    assert {"chosen/logps", "probe/fixed/chosen/logps", "stability_gap/old/loss", "spike/reset"} <= set(first) == set(alone)
    for key, values in alone.items():
        if key == "spike/max_ratio":  # over a second moment near 0, which is rounding error
            continue
        assert first[key] == pytest.approx(values, rel=1e-3, abs=1e-5, nan_ok=True), key
    assert (tmp_path / "two" / "alerts.jsonl").read_text().count("recorder/done") == 1
    assert (tmp_path / "two" / "checkpoint-2" / "diagnostics.pt").exists()


@pytest.mark.filterwarnings("ignore:.*is deprecated and will be removed in v:FutureWarning")
def test_two_processes_of_dpo_are_read_as_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("trl")
    monkeypatch.setenv("CI", "1")  # keeps TRL from reporting its use
    first, second, alone = histories(train_dpo, tmp_path)
    assert str(first) == str(second)  # as text, in which nan equals nan
    for side in ("chosen", "rejected"):
        key, theirs = f"displacement/{side}_logp_change", first[f"rewards/{side}"]
        assert first[key] == pytest.approx(alone[key], rel=1e-3, abs=1e-5)
        assert first[key] == pytest.approx({step: value / 0.1 for step, value in theirs.items()}, rel=1e-4, abs=1e-5)
        assert any(abs(value) > 1e-3 for value in first[key].values())
