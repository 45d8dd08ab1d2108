"""Language models: loaded, adapted, scored, compared with a reference, exported.

Names are loaded on first use, because transformers and peft take seconds to import.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lightning_pref.models.adapters import LoraSettings, ParameterCount, add_lora, count_parameters
    from lightning_pref.models.backbones import (
        check_vocabulary,
        disable_dropout,
        enable_gradient_checkpointing,
        load_model,
        load_tokenizer,
    )
    from lightning_pref.models.digests import ReferenceDigest, reference_digest
    from lightning_pref.models.exports import export
    from lightning_pref.models.first_difference import FirstDifferenceObservation, first_differences, with_candidates
    from lightning_pref.models.forward import Layout, ResponseLogps, response_logps
    from lightning_pref.models.generation import sample_responses
    from lightning_pref.models.gradient_inputs import HeadInputs, head_inputs
    from lightning_pref.models.pair_scores import pair_evidence, pair_hidden_observation, pair_observation
    from lightning_pref.models.pair_table import score_pairs
    from lightning_pref.models.presets import build_preset
    from lightning_pref.models.probe_scores import pair_accuracies, response_losses
    from lightning_pref.models.reference import AdapterOff, EmaReference, EmaSettings, FrozenCopy, Reference
    from lightning_pref.models.reference_cache import CachedReference, compute_reference_cache, read_reference_cache
    from lightning_pref.models.reference_choice import ReferenceKind, resolve_kind, resolve_reference
    from lightning_pref.models.reward_exports import export_reward_model
    from lightning_pref.models.reward_heads import RewardHead, VerbalizerRewardHead
    from lightning_pref.models.reward_models import ResponseScores, ScoreScale, build_reward_model, response_scores
    from lightning_pref.models.reward_scores import load_reward_model, sequence_scores

# Public name -> the file it lives in.
_HOMES = {
    "AdapterOff": "reference",
    "CachedReference": "reference_cache",
    "EmaReference": "reference",
    "EmaSettings": "reference",
    "FirstDifferenceObservation": "first_difference",
    "FrozenCopy": "reference",
    "HeadInputs": "gradient_inputs",
    "Layout": "forward",
    "LoraSettings": "adapters",
    "ParameterCount": "adapters",
    "Reference": "reference",
    "ReferenceDigest": "digests",
    "ReferenceKind": "reference_choice",
    "ResponseLogps": "forward",
    "ResponseScores": "reward_models",
    "RewardHead": "reward_heads",
    "ScoreScale": "reward_models",
    "VerbalizerRewardHead": "reward_heads",
    "add_lora": "adapters",
    "build_preset": "presets",
    "build_reward_model": "reward_models",
    "check_vocabulary": "backbones",
    "compute_reference_cache": "reference_cache",
    "count_parameters": "adapters",
    "disable_dropout": "backbones",
    "enable_gradient_checkpointing": "backbones",
    "export": "exports",
    "export_reward_model": "reward_exports",
    "first_differences": "first_difference",
    "head_inputs": "gradient_inputs",
    "load_model": "backbones",
    "load_reward_model": "reward_scores",
    "load_tokenizer": "backbones",
    "pair_accuracies": "probe_scores",
    "pair_evidence": "pair_scores",
    "pair_hidden_observation": "pair_scores",
    "pair_observation": "pair_scores",
    "read_reference_cache": "reference_cache",
    "reference_digest": "digests",
    "resolve_kind": "reference_choice",
    "resolve_reference": "reference_choice",
    "response_logps": "forward",
    "response_losses": "probe_scores",
    "response_scores": "reward_models",
    "sample_responses": "generation",
    "score_pairs": "pair_table",
    "sequence_scores": "reward_scores",
    "with_candidates": "first_difference",
}

__all__ = [
    "AdapterOff",
    "CachedReference",
    "EmaReference",
    "EmaSettings",
    "FirstDifferenceObservation",
    "FrozenCopy",
    "HeadInputs",
    "Layout",
    "LoraSettings",
    "ParameterCount",
    "Reference",
    "ReferenceDigest",
    "ReferenceKind",
    "ResponseLogps",
    "ResponseScores",
    "RewardHead",
    "ScoreScale",
    "VerbalizerRewardHead",
    "add_lora",
    "build_preset",
    "build_reward_model",
    "check_vocabulary",
    "compute_reference_cache",
    "count_parameters",
    "disable_dropout",
    "enable_gradient_checkpointing",
    "export",
    "export_reward_model",
    "first_differences",
    "head_inputs",
    "load_model",
    "load_reward_model",
    "load_tokenizer",
    "pair_accuracies",
    "pair_evidence",
    "pair_hidden_observation",
    "pair_observation",
    "read_reference_cache",
    "reference_digest",
    "resolve_kind",
    "resolve_reference",
    "response_logps",
    "response_losses",
    "response_scores",
    "sample_responses",
    "score_pairs",
    "sequence_scores",
    "with_candidates",
]


def __getattr__(name: str) -> object:
    if name in _HOMES:
        return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
