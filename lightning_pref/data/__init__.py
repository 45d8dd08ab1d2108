"""Prompt groups: rows of any source become token ids, a memory-mapped store, and batches that are exact over ranks.

The names below are loaded on first use, so that importing this package costs neither transformers nor Lightning.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lightning_pref.data.datamodule import PreferenceData
    from lightning_pref.data.formats import parse_row
    from lightning_pref.data.groups import GroupBatch, Pairs, PromptGroup, WindowCounts
    from lightning_pref.data.loading import load_groups
    from lightning_pref.data.playground import playground_rows
    from lightning_pref.data.playground_source import PlaygroundSettings
    from lightning_pref.data.rows import Place, Row, RowError
    from lightning_pref.data.sampler import GroupBatches, GroupBatchSampler, GroupLoader
    from lightning_pref.data.sources import read_rows
    from lightning_pref.data.store import GroupStore, GroupStoreWriter, GroupSubset, GroupTable
    from lightning_pref.data.templates import Tokenization

_HOMES = {
    "datamodule": ("PreferenceData",),
    "formats": ("parse_row",),
    "groups": ("GroupBatch", "Pairs", "PromptGroup", "WindowCounts"),
    "loading": ("load_groups",),
    "playground": ("playground_rows",),
    "playground_source": ("PlaygroundSettings",),
    "rows": ("Place", "Row", "RowError"),
    "sampler": ("GroupBatchSampler", "GroupBatches", "GroupLoader"),
    "sources": ("read_rows",),
    "store": ("GroupStore", "GroupStoreWriter", "GroupSubset", "GroupTable"),
    "templates": ("Tokenization",),
}

__all__ = [
    "GroupBatch",
    "GroupBatchSampler",
    "GroupBatches",
    "GroupLoader",
    "GroupStore",
    "GroupStoreWriter",
    "GroupSubset",
    "GroupTable",
    "Pairs",
    "Place",
    "PlaygroundSettings",
    "PreferenceData",
    "PromptGroup",
    "Row",
    "RowError",
    "Tokenization",
    "WindowCounts",
    "load_groups",
    "parse_row",
    "playground_rows",
    "read_rows",
]


def __getattr__(name: str) -> object:
    for home, names in _HOMES.items():
        if name in names:
            return getattr(import_module(f"{__name__}.{home}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
