"""Reward models: `python -m lightning_pref.recipes.reward`, with nothing else or with your own model and data.

On the playground the backbone is first fine-tuned by the `sft` recipe, and the reward model is compared with the gold reward on
answers of that policy; a model of one's own is taken as it is.
"""

from __future__ import annotations

from collections.abc import Sequence

from lightning_pref.cli import Recipe, RunResult, run_recipe
from lightning_pref.modules.reward import RewardModule
from lightning_pref.recipes.playground import fine_tune_first
from lightning_pref.recipes.playground_rewards import policy_probe

RECIPE = Recipe(
    name="reward",
    about=__doc__,
    module=RewardModule,
    defaults={"data.train": "playground:preference"},
    headline=(
        "rewards/accuracies",
        "rewards/margins",
        "rewards/mean",
        "rewards/std",
        "loss",
        "val/rewards/accuracies",
        "val/rewards/ties",
        "val/rewards/calibration_error",
        "val/rewards/length_correlation",
        "val/rewards/length_balanced_accuracies",
        "val/loss",
        "probe/policy/reward_variance/accuracy",
        "probe/policy/reward_variance/length_correlation",
        "probe/policy/reward_variance/within_prompt",
    ),
    before=fine_tune_first,
    callbacks=policy_probe,
)


def main(args: Sequence[str] | None = None) -> RunResult:
    """Run the recipe with these command-line arguments, the process's own if not given."""
    return run_recipe(RECIPE, args)


if __name__ == "__main__":
    main()
