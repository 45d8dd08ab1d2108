"""The rlhf recipe on a small playground: reward hacking on request, and every preset on a learned reward."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import NamedTuple

import pytest

from lightning_pref.cli import CONFIGS, RunResult
from lightning_pref.recipes import reward, rlhf, sft
from lightning_pref.recipes.rlhf import COMPARISONS, known_presets

pytestmark = pytest.mark.slow

SAMPLING = ["--data.num_prompts=8", "--data.sampling.max_new_tokens=48", "--model.optimizer.learning_rate=1e-3"]


class Stages(NamedTuple):
    """A policy after a short fine-tuning, and the judges that are trained from it, all of whom take many words for effort."""

    root: Path
    policy: Path

    def judge(self, name: str, num_updates: int, *flags: str) -> Path:
        """A reward model."""
        settings = [f"--config={CONFIGS / 'reward_playground.yaml'}", *COMPARISONS, "--data.playground.flaw=length"]
        size = [f"--data.playground.num_rows={16 * num_updates}", "--data.playground.num_val_rows=40"]
        steps = [f"--trainer.max_steps={num_updates}", f"--trainer.val_check_interval={num_updates}"]
        where = [*common_flags(self.root), f"--run.name={name}", f"--model.model={self.policy}"]
        export = reward.main([*settings, *size, *steps, *where, *flags]).export
        assert export is not None
        return export


def common_flags(root: Path) -> list[str]:
    return [f"--run.root={root}", f"--data.cache_dir={root / 'cache'}", "--trainer.logger=false"]


@pytest.fixture(scope="module")
def stages(tmp_path_factory: pytest.TempPathFactory) -> Stages:
    root = tmp_path_factory.mktemp("playground")
    fitting = ["--run.name=small", "--trainer.max_steps=130", "--data.playground.num_rows=4000"]
    policy = sft.main([*common_flags(root), *fitting]).export
    assert policy is not None
    return Stages(root, policy)


@pytest.fixture(scope="module")
def three_heads(stages: Stages) -> Path:
    """One reward model with three heads, each on rows of its own drawing."""
    heads = ["--model.head=linear", "--model.loss=regression", "--model.num_members=3", "--model.bootstrap=true"]
    return stages.judge("heads", 40, *heads, "--model.beta=0.05")  # its default again: an implicit reward alone has one


def run(stages: Stages, name: str, *flags: str) -> RunResult:
    where = [f"--run.root={stages.root}", f"--run.name={name}", f"--model.model={stages.policy}", "--run.export=false"]
    return rlhf.main([*where, "--trainer.accelerator=cpu", "--data.gold=playground:gold", *SAMPLING, *flags])


@pytest.mark.timeout(600)
def test_reward_models_with_a_taste_for_length_are_hacked_and_both_the_monitor_and_the_ensemble_show_it(stages: Stages) -> None:
    seeds = (0, 1, 2)
    judges = [stages.judge(f"judge-{i}", 60, f"--seed_everything={i}", f"--data.playground.seed={i}") for i in seeds]
    result = run(
        stages,
        "hacked",
        f"--data.reward=[{','.join(map(str, judges))}]",
        "--model.kl.coefficient=0.01",
        "--data.num_samples=8",
        "--data.playground.num_rows=320",
        "--trainer.log_every_n_steps=3",
    )
    # The margins are wide: in these 40 rollouts gold was seen to fall from 0.49 to 0.07, and the disagreement to grow sevenfold.
    metrics = result.metrics
    assert metrics["reward/mean"].last > metrics["reward/mean"].first + 1.0, "what is trained on rises"
    assert metrics["reward/gold"].last < metrics["reward/gold"].first - 0.1, "what it stands for falls"
    assert metrics["response/length"].last > 1.4 * metrics["response/length"].first, "it pays for words"
    assert metrics["reward/uncertainty"].last > 2.0 * metrics["reward/uncertainty"].first, "its members part"
    assert metrics["overoptimization/gold_drop"].last > 0.5
    alerts = {alert["name"]: alert for alert in map(json.loads, (result.folder / "alerts.jsonl").read_text().splitlines())}
    falls = alerts["overoptimization/gold_falls"]
    assert falls["level"] == "critical"
    assert "The gold reward was highest" in falls["evidence"]
    assert "`kl.coefficient`" in falls["advice"]
    assert "`aggregate: wco`" in alerts["overoptimization/disagreement"]["advice"]
    assert "length_growth" in alerts["overoptimization/length"]["evidence"]


@pytest.mark.timeout(300)
@pytest.mark.parametrize("name", known_presets())
def test_every_preset_runs_on_the_playground_with_a_learned_reward(stages: Stages, three_heads: Path, name: str) -> None:
    result = run(
        stages,
        name,
        f"--preset={name}",
        f"--data.reward={three_heads}",
        "--data.num_samples=4",
        "--data.playground.num_rows=16",
        "--trainer.log_every_n_steps=1",
    )
    summary = json.loads((result.folder / "summary.json").read_text())
    updates_of_a_rollout = {"ppo": 4, "dapo": 2, "gspo": 2, "inpo": 2}.get(name, 1)
    assert summary["steps"] == 2 * updates_of_a_rollout
    metrics = result.metrics
    assert {"gold_reward", "reward/mean", "reward/gold", "reward/uncertainty", "response/length", "loss"} <= set(metrics)
    assert all(math.isfinite(metrics[key].last) for key in ("gold_reward", "reward/mean", "reward/uncertainty", "loss"))
    assert metrics["reward/uncertainty"].first > 0, "three members do not quite agree"
    assert 0 <= metrics["gold_reward"].last <= 1
