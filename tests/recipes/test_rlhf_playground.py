"""The rlhf recipe on a small playground: reward hacking on request, and every preset on a learned reward."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import NamedTuple

import pytest

from lightning_pref.cli import CONFIGS, RunResult
from lightning_pref.recipes import reward, rlhf, sft
from lightning_pref.recipes.rlhf import known_presets

pytestmark = pytest.mark.slow

SAMPLING = ["--data.num_prompts=8", "--data.sampling.max_new_tokens=48", "--model.optimizer.learning_rate=1e-3"]


class Stages(NamedTuple):
    """A policy after a short fine-tuning, and a reward model of a judge who takes many words for effort.

    The reward model has three heads, each on rows of its own drawing.
    """

    root: Path
    policy: Path
    judge: Path


@pytest.fixture(scope="module")
def stages(tmp_path_factory: pytest.TempPathFactory) -> Stages:
    root = tmp_path_factory.mktemp("playground")
    common = [f"--run.root={root}", f"--data.cache_dir={root / 'cache'}", "--run.name=small", "--trainer.logger=false"]
    policy = sft.main([*common, "--trainer.max_steps=130", "--data.playground.num_rows=4000"]).export
    assert policy is not None
    judge = reward.main(
        [
            f"--config={CONFIGS / 'reward_playground.yaml'}",
            *common,
            f"--model.model={policy}",
            "--data.train=playground:ranked",
            "--data.on_bad_row=skip",
            "--data.batch_size=16",
            "--data.playground.num_rows=640",
            "--data.playground.num_val_rows=40",
            "--data.playground.flaw=length",
            "--model.loss=regression",
            "--model.num_members=3",
            "--model.bootstrap=true",
            "--trainer.max_steps=40",
            "--trainer.val_check_interval=40",
        ]
    ).export
    assert judge is not None
    return Stages(root, policy, judge)


def run(stages: Stages, name: str, *flags: str) -> RunResult:
    where = [f"--run.root={stages.root}", f"--run.name={name}", f"--model.model={stages.policy}", "--run.export=false"]
    return rlhf.main([*where, "--trainer.accelerator=cpu", "--data.gold=playground:gold", *SAMPLING, *flags])


@pytest.mark.timeout(300)
@pytest.mark.parametrize("name", known_presets())
def test_every_preset_runs_on_the_playground_with_a_learned_reward(stages: Stages, name: str) -> None:
    result = run(
        stages,
        name,
        f"--preset={name}",
        f"--data.reward={stages.judge}",
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
