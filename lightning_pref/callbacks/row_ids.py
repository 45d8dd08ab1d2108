"""Which rows of the data are behind an update."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_pref.callbacks.hosts import Host
from lightning_pref.data.groups import GroupBatch
from lightning_pref.rollouts.experience import ExperienceBatch

Rows = Callable[[Any], "Tensor | Sequence[int] | None"]  # Any: a batch of the user's own


def group_rows(batch: object) -> Tensor | None:
    """Row ids of a batch of ours, [G]; `None` for any other batch."""
    groups = batch.groups if isinstance(batch, ExperienceBatch) else batch
    return groups.row_ids if isinstance(groups, GroupBatch) else None


def rows_of_all_ranks(host: Host, rows: Sequence[Tensor]) -> list[int]:
    """Row ids that the processes know, together; every process must come by.

    Args:
        host: What trains.
        rows: Row ids that this process knows.
    """
    mine = torch.cat([ids.flatten().long() for ids in rows]) if rows else torch.zeros(0, dtype=torch.long)
    counts = torch.zeros(host.world_size, dtype=torch.long, device=host.device)
    counts[host.rank] = len(mine)
    places = [int(count) for count in host.total(counts).tolist()]
    together = torch.zeros(sum(places), dtype=torch.long, device=host.device)
    begin = sum(places[: host.rank])
    together[begin : begin + len(mine)] = mine.to(host.device)
    return [int(row) for row in host.total(together).tolist()] if len(together) else []


def rows_as_text(rows: Sequence[int], most: int = 8) -> str:
    """Row ids for a message.

    >>> rows_as_text([3, 1, 4], most=2)
    '3, 1, ... (3 in all)'
    """
    listed = ", ".join(map(str, rows[:most]))
    return f"{listed}, ... ({len(rows)} in all)" if len(rows) > most else listed
