"""Supervised fine-tuning: `python -m lightning_pref.recipes.sft`, with nothing else or with your own model and data."""

from __future__ import annotations

from collections.abc import Sequence

from lightning_pref.cli import Recipe, RunResult, run_recipe
from lightning_pref.modules.sft import SFTModule
from lightning_pref.recipes.playground import gold_reward_callbacks

RECIPE = Recipe(
    name="sft",
    about=__doc__,
    module=SFTModule,
    defaults={"data.train": "playground:sft"},
    headline=("loss", "val/loss", "gold_reward"),
    callbacks=gold_reward_callbacks,
)


def main(args: Sequence[str] | None = None) -> RunResult:
    """Run the recipe with these command-line arguments, the process's own if not given."""
    return run_recipe(RECIPE, args)


if __name__ == "__main__":
    main()
