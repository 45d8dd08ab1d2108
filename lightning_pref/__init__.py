"""Preference training on PyTorch Lightning: reward models, DPO, RLHF, and monitors that say what goes wrong.

Importing this package costs torch only; the sub-packages are loaded on first use.
"""

from __future__ import annotations

from importlib import import_module
from types import ModuleType

from lightning_pref.observations import (
    Observation,
    Observer,
    PairHiddenObservation,
    PairObservation,
    RewardObservation,
    TaskSwitch,
    observe,
    wants,
)

__version__ = "0.1.0"

_SUBPACKAGES = (
    "callbacks",
    "data",
    "functional",
    "integrations",
    "losses",
    "measures",
    "models",
    "modules",
    "recipes",
    "reports",
    "rollouts",
)

__all__ = [
    "Observation",
    "Observer",
    "PairHiddenObservation",
    "PairObservation",
    "RewardObservation",
    "TaskSwitch",
    "__version__",
    "observe",
    "wants",
]


def __getattr__(name: str) -> ModuleType:
    if name in _SUBPACKAGES:
        return import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*__all__, *_SUBPACKAGES])
