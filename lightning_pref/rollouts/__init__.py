"""Responses sampled from a policy, and what they are worth.

Names are loaded on first use, because some engines take seconds to import.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lightning_pref.rollouts.best_of_n import Chosen
    from lightning_pref.rollouts.engines.generate import CachedSampler
    from lightning_pref.rollouts.engines.paged import PagedSampler
    from lightning_pref.rollouts.pilaf import PilafSampler, SampledPairs, mixed_logits
    from lightning_pref.rollouts.processors import processed_logps
    from lightning_pref.rollouts.rollout_data import RolloutData
    from lightning_pref.rollouts.sampling import Sampled, Sampler, Sampling
    from lightning_pref.rollouts.scoring import Asked, RewardScore, Score
    from lightning_pref.rollouts.speculative_rejection import Speculated, SpeculativeRejection, checkpoints_of_capacity

# Public name -> the file it lives in.
_HOMES = {
    "Asked": "scoring",
    "CachedSampler": "engines.generate",
    "Chosen": "best_of_n",
    "PagedSampler": "engines.paged",
    "PilafSampler": "pilaf",
    "RewardScore": "scoring",
    "RolloutData": "rollout_data",
    "Sampled": "sampling",
    "SampledPairs": "pilaf",
    "Sampler": "sampling",
    "Sampling": "sampling",
    "Score": "scoring",
    "Speculated": "speculative_rejection",
    "SpeculativeRejection": "speculative_rejection",
    "checkpoints_of_capacity": "speculative_rejection",
    "mixed_logits": "pilaf",
    "processed_logps": "processors",
}

__all__ = [
    "Asked",
    "CachedSampler",
    "Chosen",
    "PagedSampler",
    "PilafSampler",
    "RewardScore",
    "RolloutData",
    "Sampled",
    "SampledPairs",
    "Sampler",
    "Sampling",
    "Score",
    "Speculated",
    "SpeculativeRejection",
    "checkpoints_of_capacity",
    "mixed_logits",
    "processed_logps",
]


def __getattr__(name: str) -> object:
    if name in _HOMES:
        return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
