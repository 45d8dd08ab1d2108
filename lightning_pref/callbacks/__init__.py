"""Callbacks, each usable on any LightningModule."""

from lightning_pref.callbacks.diagnostic import Diagnostic, Key
from lightning_pref.callbacks.displacement import LikelihoodDisplacementTracker
from lightning_pref.callbacks.entanglement import EntanglementMonitor
from lightning_pref.callbacks.exact_resume import ExactResume
from lightning_pref.callbacks.fault_advice import FaultAdvice
from lightning_pref.callbacks.gold_reward import GoldReward
from lightning_pref.callbacks.lost_updates import LostUpdateMeter
from lightning_pref.callbacks.mass_shift import MassShift
from lightning_pref.callbacks.monitor import Monitor
from lightning_pref.callbacks.non_finite import NonFiniteGuard
from lightning_pref.callbacks.observe_outputs import ObserveOutputs
from lightning_pref.callbacks.overoptimization import OveroptimizationMonitor
from lightning_pref.callbacks.probe import Probe
from lightning_pref.callbacks.reward_model_probe import RewardModelProbe
from lightning_pref.callbacks.reward_variance import RewardVarianceMonitor
from lightning_pref.callbacks.spike_reset import SpikeAwareOptimizerReset
from lightning_pref.callbacks.stability_gap import StabilityGapEvaluator
from lightning_pref.callbacks.throughput import Throughput

__all__ = [
    "Diagnostic",
    "EntanglementMonitor",
    "ExactResume",
    "FaultAdvice",
    "GoldReward",
    "Key",
    "LikelihoodDisplacementTracker",
    "LostUpdateMeter",
    "MassShift",
    "Monitor",
    "NonFiniteGuard",
    "ObserveOutputs",
    "OveroptimizationMonitor",
    "Probe",
    "RewardModelProbe",
    "RewardVarianceMonitor",
    "SpikeAwareOptimizerReset",
    "StabilityGapEvaluator",
    "Throughput",
]
