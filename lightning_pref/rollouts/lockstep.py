"""Processes that share every forward pass (FSDP, FSDP2, ZeRO stage 3): none may take a step that the others do not take."""

from __future__ import annotations

import torch
import torch.distributed as dist
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy, Strategy

from lightning_pref.models.implicit_rewards import ImplicitReward
from lightning_pref.models.reward_models import has_linear_head
from lightning_pref.models.sharding import is_split, shard
from lightning_pref.rollouts.rewards import ModelReward, Reward, WeightedSum


def needs_lockstep(strategy: Strategy) -> bool:
    """Whether a forward pass of the policy is a joint act of all processes."""
    if isinstance(strategy, DeepSpeedStrategy):
        return bool(strategy.zero_stage_3)
    return isinstance(strategy, FSDPStrategy | ModelParallelStrategy)


def any_process(alive: bool) -> bool:
    """Whether any process says yes; all of them have to ask."""
    if not (dist.is_available() and dist.is_initialized()):
        return alive
    device = torch.device("cpu") if dist.get_backend() == "gloo" else torch.device("cuda", torch.cuda.current_device())
    votes = torch.tensor(float(alive), device=device)
    dist.all_reduce(votes, dist.ReduceOp.MAX)
    return bool(votes.item())


def itself(alive: bool) -> bool:
    """What a process says that shares nothing."""
    return alive


def split_reward(reward: Reward, strategy: Strategy) -> None:
    """Split the models of a reward over the processes where the policy is split by FSDP2; else leave them whole on each.

    Every process scores equally many responses in batches of one size, so that none waits for another. Classifiers that are
    no decoders are read in batches of equal lengths, which differ between processes, and stay whole.
    """
    if not isinstance(strategy, ModelParallelStrategy):
        return
    if isinstance(reward, WeightedSum):
        for _, term in reward.terms:
            split_reward(term, strategy)
    elif isinstance(reward, ModelReward):
        for model in reward.models:
            parts = [model.model, model.reference] if isinstance(model, ImplicitReward) else [model]
            for part in parts:
                if (part is not model or has_linear_head(part)) and not is_split(part):
                    shard(part, strategy.device_mesh["data_parallel"])
