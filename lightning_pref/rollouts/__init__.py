"""Responses sampled from a policy, and what they are worth."""

from lightning_pref.rollouts.engines.generate import CachedSampler
from lightning_pref.rollouts.processors import processed_logps
from lightning_pref.rollouts.sampling import Sampled, Sampler, Sampling

__all__ = ["CachedSampler", "Sampled", "Sampler", "Sampling", "processed_logps"]
