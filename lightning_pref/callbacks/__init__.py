"""Callbacks, each usable on any LightningModule."""

from lightning_pref.callbacks.gold_reward import GoldReward
from lightning_pref.callbacks.throughput import Throughput

__all__ = ["GoldReward", "Throughput"]
