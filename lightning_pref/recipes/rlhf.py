"""Reinforcement learning from rewards: `python -m lightning_pref.recipes.rlhf`, with nothing else or with models of your own.

On the playground three stages run one after the other: the `sft` recipe, the `reward` recipe on its model, and this one. A stage
is left out where its result is given: `--model.model FOLDER`, `--data.reward FOLDER`. `--preset NAME` sets an algorithm up as it
was published: `grpo`, `dr_grpo`, `dapo`, `gspo`, `rloo`, `ppo`, `reinforce_pp`, `online_dpo`, `inpo`.
"""

from __future__ import annotations

import json
import sys
from argparse import SUPPRESS
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import lightning as L
from jsonargparse import Namespace
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.cli import LightningArgumentParser
from typing_extensions import override

from lightning_pref.callbacks.overoptimization import OveroptimizationMonitor
from lightning_pref.callbacks.reward_variance import RewardVarianceMonitor
from lightning_pref.callbacks.throughput import Work
from lightning_pref.cli import CONFIGS, Recipe, RunResult, run_recipe, trains_on_playground
from lightning_pref.mistakes import end
from lightning_pref.modules.rlhf import RLHFModule
from lightning_pref.modules.rlhf_settings import SurrogateSettings, check_clipping
from lightning_pref.recipes.playground import earlier_stage, fine_tune_first, gold_reward_callbacks
from lightning_pref.rollouts.rewards import is_model_reward
from lightning_pref.rollouts.rollout_data import RolloutData

PRESETS = CONFIGS / "presets"
ACCURACY = "reward_model/accuracy"
# What the reward model learns from: all pairs of four ranked answers to each prompt. It is a log-ratio of the policy: that sees
# at once whether an answer repeats what the prompt says, which a fresh head on two layers does not learn in minutes.
COMPARISONS = (
    "--data.train=playground:ranked",
    "--data.on_bad_row=skip",
    "--data.batch_size=16",
    "--data.playground.num_rows=3200",
    "--model.loss=bradley_terry",
    "--model.head=implicit",
    "--model.beta=0.1",
    "--model.optimizer.learning_rate=1.0e-3",
    "--trainer.max_steps=200",
    "--trainer.val_check_interval=100",
)


def earlier_stages(config: Namespace, folder: Path) -> None:
    """Train what the run on the playground starts from, where it is not given: the policy, and the reward model."""
    from lightning_pref.recipes import reward

    # Known here already; the module, which learns it with the first rollout, would say so after the stages below.
    bounds = {f"surrogate.{field.name}": field for field in fields(SurrogateSettings)}
    changed = [name for name, field in bounds.items() if config.model.surrogate[field.name] != field.default]
    check_clipping(changed, config.data.inner_epochs * config.data.num_minibatches)
    fine_tune_first(config, folder)
    if config.data.reward is None and trains_on_playground(config):
        # The defaults of the playground are looked up by the name of a preset, which the fine-tuned model has no more.
        defaults = CONFIGS / f"{reward.RECIPE.name}_playground.yaml"
        flaw = config.data.playground.flaw
        flags = [f"--config={defaults}", f"--model.model={config.model.model}", *COMPARISONS]
        flags += [] if flaw is None else [f"--data.playground.flaw={flaw}"]
        config.data.reward = earlier_stage(reward.main, reward.RECIPE.name, config, folder, flags)


class StageResults(Callback):
    """Repeats what an earlier stage measured, so that it stands in the summary of the last one.

    Needs: nothing.
    Logs: the numbers it is given, once.
    Changes: nothing.

    Args:
        results: By key.
    """

    def __init__(self, results: dict[str, float]) -> None:
        self.results = results

    @override
    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.global_step == 0:  # a run that goes on has said it
            for logger in trainer.loggers:
                logger.log_metrics(self.results, step=0)


def watching(config: Namespace) -> list[Callback]:
    """The gold reward on the playground, variance and worth of the rewards, and how good the reward model is."""
    monitors: list[Callback] = [RewardVarianceMonitor(), OveroptimizationMonitor()]
    return [*gold_reward_callbacks(config), *monitors, *stage_results(config.data.reward)]


def stage_results(reward: Any) -> list[Callback]:  # Any: whatever `--data.reward` may be
    """The validation accuracy of a reward model that the `reward` recipe trained."""
    if not isinstance(reward, str) or not is_model_reward(reward):
        return []
    summary = Path(reward).parent / "summary.json"
    if not summary.exists():
        return []
    try:
        found = float(json.loads(summary.read_text(encoding="utf-8"))["metrics"]["val/rewards/accuracies"]["last"])
    except (ValueError, KeyError, TypeError):
        return []  # somebody else's file of that name
    return [StageResults({ACCURACY: found})]


def work_of(batch: Any) -> Work:  # Any: batches of RolloutData
    """Work of experience: the tokens that are trained on, every prompt once; the time of the sampling counts."""
    return Work(tokens=batch.num_tokens, rows=batch.num_groups)


def known_presets() -> list[str]:
    """Names that `--preset` takes."""
    return sorted(path.stem for path in PRESETS.glob("*.yaml"))


def explain_presets(parser: LightningArgumentParser) -> None:
    """Let `--help` tell of `--preset`, which `with_preset` has turned into a file before the parser sees it."""
    parser.add_argument(
        "--preset",
        metavar="NAME",
        default=SUPPRESS,
        help=f"Set an algorithm up as it was published; all other flags win. Known: {', '.join(known_presets())}.",
    )


RECIPE = Recipe(
    name="rlhf",
    about=__doc__,
    module=RLHFModule,
    data=RolloutData,
    defaults={"data.train": "playground"},
    headline=(
        "gold_reward",
        "reward/mean",
        "reward/std",
        ACCURACY,
        "reward_variance/within_prompt",
        "reward_variance/zero_share",
        "kl",
        "kl_coefficient",
        "entropy",
        "response/length",
        "response/ended_share",
        "clip_fraction",
        "value/explained_variance",
        "rewards/accuracies",
    ),
    before=earlier_stages,
    callbacks=watching,
    work=work_of,
    explain=explain_presets,
)


def with_preset(args: Sequence[str]) -> list[str]:
    """The command line with `--preset NAME` as the configuration file it stands for, before all else."""
    rest, names, taken = [], [], False
    for i, arg in enumerate(args):
        if taken:
            taken = False
        elif arg == "--preset":
            names.append(args[i + 1] if i + 1 < len(args) else "")
            taken = True
        elif arg.startswith("--preset="):
            names.append(arg.partition("=")[2])
        else:
            rest.append(arg)
    known = known_presets()
    for name in names:
        if name not in known:
            end(f"Unknown preset {name!r}; known: {', '.join(known)}.")
    return [*(f"--config={PRESETS / name}.yaml" for name in names), *rest]


def main(args: Sequence[str] | None = None) -> RunResult:
    """Run the recipe with these command-line arguments, the process's own if not given."""
    return run_recipe(RECIPE, with_preset(sys.argv[1:] if args is None else args))


if __name__ == "__main__":
    main()
