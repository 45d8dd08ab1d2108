"""From planned batches to `GroupBatch`es: the dataset and the sampler of a `DataLoader`, exact over ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy as np
from torch.utils.data import DataLoader, Dataset, DistributedSampler
from typing_extensions import override

from lightning_pref.data.groups import GroupBatch
from lightning_pref.data.packing import EpochPlanner, PlannedBatch, window_counts
from lightning_pref.data.run_place import RunPlace
from lightning_pref.data.store import GroupTable


class GroupBatches(Dataset[GroupBatch]):
    """A table as a dataset that is indexed by planned batches: `DataLoader(batches, batch_size=None, sampler=...)`."""

    def __init__(self, table: GroupTable) -> None:
        self.table = table

    def __len__(self) -> int:
        return len(self.table)

    @override
    def __getitem__(self, planned: PlannedBatch) -> GroupBatch:
        groups = [self.table[int(row)] for row in planned.rows]
        if planned.filler:
            groups = [replace(group, weight=0.0) for group in groups]
        offsets = self.table.response_offsets
        ids = np.concatenate([np.arange(offsets[row], offsets[row + 1]) for row in planned.rows])
        return GroupBatch.from_groups(groups, response_ids=ids.tolist(), window=planned.window)


class GroupBatchSampler(DistributedSampler[PlannedBatch]):
    """Yields the planned batches of one rank.

    A `DistributedSampler`, because Lightning replaces any other sampler on several ranks. It hands out whole batches, the
    same number of them in every epoch and on every rank, so nothing is dropped and no rank waits for another at the end.
    Lightning tells it the epoch through `set_epoch`.

    Args:
        batches: The dataset.
        num_replicas: Number of ranks.
        rank: This rank.
        max_tokens_per_batch: Most tokens of a batch, every prompt counted once.
        batch_size: Most groups of a batch.
        accumulate: Batches of one optimiser update, or a function that gives them by epoch.
        limit_batches: Where the trainer ends an epoch: after that many batches, or after that share of them.
        seed: Seed of the shuffling.
        shuffle: Whether the rows are shuffled, differently in every epoch.
    """

    def __init__(
        self,
        batches: GroupBatches,
        *,
        num_replicas: int = 1,
        rank: int = 0,
        max_tokens_per_batch: int | None = None,
        batch_size: int | None = None,
        accumulate: int | Callable[[int], int] = 1,
        limit_batches: int | float = 1.0,
        seed: int = 0,
        shuffle: bool = True,
    ) -> None:
        super().__init__(batches, num_replicas=num_replicas, rank=rank, shuffle=shuffle, seed=seed)
        self.table = batches.table
        self.accumulate = accumulate
        self.planner = EpochPlanner(
            self.table.prompt_lengths + self.table.response_tokens,
            num_replicas=num_replicas,
            max_tokens_per_batch=max_tokens_per_batch,
            batch_size=batch_size,
            seed=seed,
            shuffle=shuffle,
            row_ids=self.table.row_ids,
        )
        # The same arithmetic as the trainer's: an int counts batches, a float is a share of them.
        share = isinstance(limit_batches, float)
        self.limit_batches = int(len(self) * limit_batches) if share else min(int(limit_batches), len(self))
        self._start = 0

    @override
    def __len__(self) -> int:
        """Batches of this rank in an epoch, whatever the epoch and whether or not the trainer ends it early."""
        return self.planner.num_steps

    @override
    def __iter__(self) -> Iterator[PlannedBatch]:
        start, self._start = self._start, 0
        plan = self.planner.plan(self.epoch)
        windows = window_counts(
            plan,
            weights=self.table.weights,
            num_responses=self.table.num_responses,
            response_tokens=self.table.response_tokens,
            accumulate=self.accumulate if isinstance(self.accumulate, int) else self.accumulate(self.epoch),
            limit_steps=self.limit_batches,
        )
        for step in range(start, plan.num_steps):
            rows, filler = plan.batch(step, self.rank)
            yield PlannedBatch(rows, windows[step], filler)

    @override
    def set_epoch(self, epoch: int) -> None:
        if epoch != self.epoch:
            self._start = 0
        self.epoch = epoch

    def resume(self, place: RunPlace) -> None:
        """Let the next pass begin at this micro-batch of this epoch; later passes are whole again.

        A plan depends on nothing but the table, the settings, the seed and the epoch, so these two numbers are all that has
        to be kept to go on inside an epoch.
        """
        if not 0 <= place.batch <= len(self):
            raise ValueError(
                f"The checkpoint was written {place.batch} micro-batches into an epoch, and an epoch has {len(self)} of them "
                "now: the data, the size of a batch or the number of processes is another. Resume with what the run was started "
                "with."
            )
        self.epoch, self._start = place


class GroupLoader(DataLoader[GroupBatch]):
    """Loads planned batches, beginning only when the first one is asked for.

    A plain `DataLoader` with workers asks its sampler for rows as soon as an iterator exists. Lightning makes the iterator
    before it sets the epoch, so a resumed run would begin with batches of another epoch. It also draws from the global random
    numbers with every new iterator; given a generator of its own it does not.
    """

    @override
    def __iter__(self) -> Iterator[GroupBatch]:  # type: ignore[override]  # torch promises its own iterator class
        yield from super().__iter__()
