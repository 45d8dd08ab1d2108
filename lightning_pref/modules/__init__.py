"""LightningModules: supervised fine-tuning and preference optimisation."""

from lightning_pref.modules.dpo import DPOModule
from lightning_pref.modules.sft import SFTModule

__all__ = ["DPOModule", "SFTModule"]
