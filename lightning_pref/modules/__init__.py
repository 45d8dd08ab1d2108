"""LightningModules."""

from lightning_pref.modules.dpo import DPOModule
from lightning_pref.modules.group_module import GroupModule
from lightning_pref.modules.reward import RewardModule
from lightning_pref.modules.sft import SFTModule

__all__ = ["DPOModule", "GroupModule", "RewardModule", "SFTModule"]
