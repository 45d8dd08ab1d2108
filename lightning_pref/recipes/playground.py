"""What a run on the playground has that other runs have not: a first SFT stage, and the gold reward of its answers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import lightning as L
from jsonargparse import Namespace
from lightning.pytorch.callbacks import Callback

from lightning_pref.callbacks import GoldReward
from lightning_pref.cli import RunResult, trains_on_playground
from lightning_pref.data.playground import gold_reward, playground_rows
from lightning_pref.models.backbones import load_tokenizer
from lightning_pref.models.generation import sample_responses
from lightning_pref.models.presets import is_preset
from lightning_pref.modules.policy import PolicyModule
from lightning_pref.run_folder import is_first_process, processes_from_outside

NUM_PROMPTS = 64
MAX_NEW_TOKENS = 48


def earlier_stage(main: Callable[[list[str]], RunResult], recipe: str, config: Namespace, folder: Path, flags: list[str]) -> str:
    """Run what a run starts from as a run of its own, `<root>/<recipe>/for-<run's recipe>-<run's name>`; the model it leaves.

    Args:
        main: Of the earlier recipe.
        recipe: Its name.
        config: Of the later run.
        folder: Of the later run.
        flags: Further flags of the earlier run.
    """
    if (processes := processes_from_outside()) > 1:
        raise ValueError(
            f"A run on the playground begins with a first stage, `{recipe}`, which is the work of one process, and this run was "
            f"started as {processes}. Run `python -m lightning_pref.recipes.{folder.parent.name}` once without them; then give "
            "what its first stages leave: `--model.model` is `sft/<run>/export` below the run root (for rlhf, `--data.reward` is "
            "`reward/<run>/export`)."
        )
    own = Path(config.run.root) / recipe / f"for-{folder.parent.name}-{folder.name}"
    resumes = config.run.resume is not None
    # A run that goes on has this behind it, unless it was interrupted here; the summary is what a run writes last. Processes
    # that Lightning starts for further devices begin when the first one has done this.
    if is_first_process() and not (resumes and (own / "summary.json").exists()):
        places = [f"--run.root={config.run.root}", f"--run.name={own.name}", f"--seed_everything={config.seed_everything}"]
        # On one device: Lightning would start processes for the others here, which would take themselves for the later run's.
        main([*flags, *places, "--trainer.devices=1", *(["--run.resume=auto"] if resumes else [])])
    return str(own / "export")


def fine_tune_first(config: Namespace, folder: Path) -> None:
    """Replace a random preset by itself after the `sft` recipe."""
    from lightning_pref.recipes import sft

    preset = str(config.model.model)
    if is_preset(preset):
        cache_dir = config.data.get("cache_dir")  # prompts alone are not cached
        cached = [] if cache_dir is None else [f"--data.cache_dir={cache_dir}"]
        config.model.model = earlier_stage(sft.main, sft.RECIPE.name, config, folder, [f"--model.model={preset}", *cached])


def gold_reward_callbacks(config: Namespace) -> list[Callback]:
    """The gold reward of sampled answers, where the run is on the playground."""
    if not trains_on_playground(config):
        return []
    rows = list(playground_rows("prompts", NUM_PROMPTS, split="val"))
    tokenizer = load_tokenizer(config.data.tokenizer)

    def answer(module: L.LightningModule, prompts: Sequence[str]) -> list[str]:
        assert isinstance(module, PolicyModule)
        ids = [tokenizer(prompt, add_special_tokens=False)["input_ids"] for prompt in prompts]
        eos = tokenizer.eos_token_id
        responses = sample_responses(module.policy, ids, eos_token_id=eos, max_new_tokens=MAX_NEW_TOKENS)
        return [str(tokenizer.decode(response, skip_special_tokens=True)).strip() for response in responses]

    templated = [str(tokenizer.apply_chat_template(row["prompt"], tokenize=False, add_generation_prompt=True)) for row in rows]
    return [GoldReward(templated, answer, gold_reward)]
