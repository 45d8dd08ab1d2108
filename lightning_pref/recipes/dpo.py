"""Preference optimisation: `python -m lightning_pref.recipes.dpo`, with nothing else or with your own model and data.

On the playground the model is first fine-tuned by the `sft` recipe; a model of one's own is taken as it is.
"""

from __future__ import annotations

from collections.abc import Sequence

from jsonargparse import Namespace
from lightning.pytorch.callbacks import Callback

from lightning_pref.callbacks import LikelihoodDisplacementTracker
from lightning_pref.cli import Recipe, RunResult, run_recipe
from lightning_pref.modules.dpo import DPOModule
from lightning_pref.modules.loss_choice import choose_loss
from lightning_pref.recipes.playground import fine_tune_first, gold_reward_callbacks


def monitors(config: Namespace) -> list[Callback]:
    """The gold reward on the playground, and the displacement tracker where pairs are trained on."""
    kind = choose_loss(config.model.loss, config.model.beta, config.model.loss_options or {}).kind
    return [*gold_reward_callbacks(config), *([LikelihoodDisplacementTracker()] if kind == "pair" else [])]


RECIPE = Recipe(
    name="dpo",
    about=__doc__,
    module=DPOModule,
    defaults={"data.train": "playground:preference"},
    headline=(
        "gold_reward",
        "rewards/margins",
        "rewards/accuracies",
        "logps/chosen",
        "logps/rejected",
        "displacement/chosen_logp_change",
        "displacement/share",
        "loss",
        "val/rewards/margins",
        "val/rewards/accuracies",
        "val/loss",
    ),
    before=fine_tune_first,
    callbacks=monitors,
)


def main(args: Sequence[str] | None = None) -> RunResult:
    """Run the recipe with these command-line arguments, the process's own if not given."""
    return run_recipe(RECIPE, args)


if __name__ == "__main__":
    main()
