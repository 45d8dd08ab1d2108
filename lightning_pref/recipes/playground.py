"""What a run on the playground has that other runs have not: a first SFT stage, and the gold reward of its answers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import lightning as L
from jsonargparse import Namespace
from lightning.pytorch.callbacks import Callback

from lightning_pref.callbacks import GoldReward
from lightning_pref.cli import trains_on_playground
from lightning_pref.data.playground import gold_reward, playground_rows
from lightning_pref.models.backbones import load_tokenizer
from lightning_pref.models.generation import sample_responses
from lightning_pref.models.presets import is_preset
from lightning_pref.modules.policy import PolicyModule

NUM_PROMPTS = 64
MAX_NEW_TOKENS = 48


def fine_tune_first(config: Namespace, folder: Path) -> None:
    """Replace a random preset by itself after the `sft` recipe, a run of its own in `<root>/sft/for-<recipe>-<name>`."""
    from lightning_pref.recipes import sft

    preset = str(config.model.model)
    if not is_preset(preset):
        return
    name = f"for-{folder.parent.name}-{folder.name}"
    export = Path(config.run.root) / sft.RECIPE.name / name / "export"
    # A run that is resumed has its first stage behind it.
    if config.run.resume is None or not export.exists():
        seed = f"--seed_everything={config.seed_everything}"
        args = [f"--run.root={config.run.root}", f"--run.name={name}", f"--model.model={preset}", seed]
        cache_dir = config.data.cache_dir
        sft.main([*args, *([f"--data.cache_dir={cache_dir}"] if cache_dir is not None else [])])
    config.model.model = str(export)


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
