"""Preference losses: tensors in, one loss per example out. Torch only.

A pairwise loss is made in three stages, one file each, and named in one place:

    aggregate.py   tokens -> one number per response
    rewards.py     that number, the reference and the length -> the reward the loss compares
    links.py       rewards -> loss
    margins.py, absolute.py, reference_free.py    the losses, each a line or two of the above
    registry.py    names, formulas, sources
    preference.py  the door: `preference_loss(name, pair, **options)`

Beside them `reward.py` (reward models), `ensemble.py` (what several of them say together) and `policy.py` (RLHF).
"""

from lightning_pref.losses.aggregate import ScoredTokens, length_decoupled_sums, wpo_weights
from lightning_pref.losses.ensemble import ensemble_reward, ensemble_variance, standardized_members, uncertainty_discounted
from lightning_pref.losses.finetuning import align, align_boundary, align_detached
from lightning_pref.losses.logic import PreferenceStructure, compile_structure
from lightning_pref.losses.pair import PairLogps
from lightning_pref.losses.policy import (
    aggregation_weights,
    cispo,
    kl_loss,
    log_ratios,
    negative_entropy,
    ppo_clip,
    probability_ratio,
    reinforce,
    sequence_log_ratios,
    value_loss,
)
from lightning_pref.losses.preference import (
    LossMix,
    PreferenceLoss,
    implicit_rewards,
    loss_options,
    preference_loss,
    sensitivities,
)
from lightning_pref.losses.registry import FORGET_LOSSES, GROUP_LOSSES, PREFERENCE_LOSSES, UNPAIRED_LOSSES
from lightning_pref.losses.reward import (
    REWARD_LOSSES,
    bradley_terry,
    implicit_prm,
    ordinal,
    plackett_luce,
    process_values,
    regression,
    step_bce,
    step_rewards,
)
from lightning_pref.losses.rewards import FDivergence
from lightning_pref.losses.spec import LossSpec
from lightning_pref.losses.unlearning import npo, simnpo
from lightning_pref.losses.unpaired import RunningMean, apo_zero_unpaired, bco, kto, kto_baseline

__all__ = [
    "FORGET_LOSSES",
    "GROUP_LOSSES",
    "PREFERENCE_LOSSES",
    "REWARD_LOSSES",
    "UNPAIRED_LOSSES",
    "FDivergence",
    "LossMix",
    "LossSpec",
    "PairLogps",
    "PreferenceLoss",
    "PreferenceStructure",
    "RunningMean",
    "ScoredTokens",
    "aggregation_weights",
    "align",
    "align_boundary",
    "align_detached",
    "apo_zero_unpaired",
    "bco",
    "bradley_terry",
    "cispo",
    "compile_structure",
    "ensemble_reward",
    "ensemble_variance",
    "implicit_prm",
    "implicit_rewards",
    "kl_loss",
    "kto",
    "kto_baseline",
    "length_decoupled_sums",
    "log_ratios",
    "loss_options",
    "negative_entropy",
    "npo",
    "ordinal",
    "plackett_luce",
    "ppo_clip",
    "preference_loss",
    "probability_ratio",
    "process_values",
    "regression",
    "reinforce",
    "sensitivities",
    "sequence_log_ratios",
    "simnpo",
    "standardized_members",
    "step_bce",
    "step_rewards",
    "uncertainty_discounted",
    "value_loss",
    "wpo_weights",
]
