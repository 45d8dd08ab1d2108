"""LightningModules."""

from lightning_pref.modules.dpo import DPOModule
from lightning_pref.modules.group_module import GroupModule
from lightning_pref.modules.reward import RewardModule
from lightning_pref.modules.rlhf import RLHFModule
from lightning_pref.modules.rlhf_settings import (
    AdvantageSettings,
    KLSettings,
    ScoreSettings,
    SurrogateSettings,
    ValueSettings,
)
from lightning_pref.modules.sft import SFTModule

__all__ = [
    "AdvantageSettings",
    "DPOModule",
    "GroupModule",
    "KLSettings",
    "RLHFModule",
    "RewardModule",
    "SFTModule",
    "ScoreSettings",
    "SurrogateSettings",
    "ValueSettings",
]
