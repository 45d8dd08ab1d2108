"""Callbacks, each usable on any LightningModule."""

from lightning_pref.callbacks.diagnostic import Diagnostic, Key
from lightning_pref.callbacks.gold_reward import GoldReward
from lightning_pref.callbacks.monitor import Monitor
from lightning_pref.callbacks.observe_outputs import ObserveOutputs
from lightning_pref.callbacks.probe import Probe
from lightning_pref.callbacks.throughput import Throughput

__all__ = ["Diagnostic", "GoldReward", "Key", "Monitor", "ObserveOutputs", "Probe", "Throughput"]
