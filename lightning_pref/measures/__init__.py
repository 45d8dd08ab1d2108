"""What the monitors and modules measure: pure functions, and torchmetrics that accumulate them exactly."""

from lightning_pref.measures.means import WeightedMeans

__all__ = ["WeightedMeans"]
