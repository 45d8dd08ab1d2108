"""How well a reward model in training would teach the playground's policy: its scores of that policy's own answers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import lightning as L
import torch
from jsonargparse import Namespace
from lightning.pytorch.callbacks import Callback

from lightning_pref.callbacks.reward_model_probe import RewardModelProbe
from lightning_pref.cli import trains_on_playground
from lightning_pref.data.groups import GroupBatch, PromptGroup
from lightning_pref.data.playground import gold_reward, playground_rows
from lightning_pref.models.backbones import load_model, load_tokenizer
from lightning_pref.models.generation import sample_responses
from lightning_pref.models.reward_models import is_classifier
from lightning_pref.modules.reward import RewardModule
from lightning_pref.observations import RewardObservation
from lightning_pref.recipes.playground import MAX_NEW_TOKENS

NUM_PROMPTS = 32
NUM_RESPONSES = 4
PROMPTS_PER_BATCH = 8


def policy_probe(config: Namespace) -> list[Callback]:
    """A probe on answers of the language model that training starts from, where the run is on the playground."""
    name = str(config.model.model)
    if not trains_on_playground(config) or is_classifier(name):
        return []
    groups = sampled_groups(name, str(config.data.tokenizer))
    starts = range(0, len(groups), PROMPTS_PER_BATCH)
    batches = [GroupBatch.from_groups(groups[start : start + PROMPTS_PER_BATCH]) for start in starts]
    # No time budget: what a run on the playground measures and warns of must not depend on the clock.
    return [RewardModelProbe("policy", batches, observed_rewards, every_n_updates=25, budget=None)]


def observed_rewards(module: L.LightningModule, batch: Any) -> Sequence[RewardObservation]:  # Any: as probes have it
    """Rewards of a batch, with the gold rewards in its scores."""
    assert isinstance(module, RewardModule) and isinstance(batch, GroupBatch)
    observation = RewardObservation(
        rewards=module.rewards(batch),
        prompt_ids=batch.row_ids[batch.group_of_response],
        lengths=batch.response_lengths,
        gold=batch.scores,
    )
    return [observation]


def sampled_groups(model: str, tokenizer_name: str) -> list[PromptGroup]:
    """Prompts of the playground with sampled answers, EOS included, and their gold rewards as scores."""
    policy, tokenizer = load_model(model), load_tokenizer(tokenizer_name)
    eos = int(tokenizer.eos_token_id)
    texts = [
        str(tokenizer.apply_chat_template(row["prompt"], tokenize=False, add_generation_prompt=True))
        for row in playground_rows("prompts", NUM_PROMPTS, split="val")
    ]
    prompts = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    repeated = [prompt for prompt in prompts for _ in range(NUM_RESPONSES)]
    answers = sample_responses(policy, repeated, eos_token_id=eos, max_new_tokens=MAX_NEW_TOKENS, batch_size=len(repeated))
    groups = []
    for row, (text, prompt) in enumerate(zip(texts, prompts, strict=True)):
        own = answers[row * NUM_RESPONSES : (row + 1) * NUM_RESPONSES]
        # An answer that was cut off at the limit has no EOS to be read at.
        responses = tuple(torch.tensor([*ids, eos] if len(ids) < MAX_NEW_TOKENS else ids).numpy() for ids in own)
        gold = tuple(gold_reward(text, str(tokenizer.decode(ids, skip_special_tokens=True)).strip()) for ids in own)
        groups.append(PromptGroup(row_id=row, prompt=torch.tensor(prompt).numpy(), responses=responses, scores=gold))
    return groups
