from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from gloo_ranks import launched
from torch import Tensor

from lightning_pref.data.groups import GroupBatch, PromptGroup, WindowCounts
from lightning_pref.data.run_place import RunPlace
from lightning_pref.data.sampler import GroupBatches, GroupBatchSampler, GroupLoader
from lightning_pref.data.store import GroupStore, GroupStoreWriter

Groups = Callable[..., list[PromptGroup]]


def stored(folder: Path, groups: list[PromptGroup]) -> GroupStore:
    with GroupStoreWriter(folder, vocab_size=64) as writer:
        for group in groups:
            writer.append(group)
    return GroupStore(folder)


def loader(store: GroupStore, num_workers: int = 0, **settings: object) -> GroupLoader:
    batches = GroupBatches(store)
    sampler = GroupBatchSampler(batches, **settings)
    return GroupLoader(batches, batch_size=None, sampler=sampler, num_workers=num_workers)


def test_a_batch_holds_the_planned_groups_with_dataset_wide_response_ids(tmp_path: Path, random_groups: Groups) -> None:
    groups = [*random_groups(5, 3), *random_groups(4, 1)]
    groups = [replace(group, row_id=row) for row, group in enumerate(groups)]
    store = stored(tmp_path / "store", groups)
    for batch in loader(store, batch_size=2):
        assert isinstance(batch, GroupBatch)
        expected = []
        for row, found in zip(batch.row_ids.tolist(), batch.groups(), strict=True):
            assert found.prompt.tolist() == groups[row].prompt.tolist()
            assert [r.tolist() for r in found.responses] == [r.tolist() for r in groups[row].responses]
            first = sum(len(group.responses) for group in groups[:row])
            expected += range(first, first + len(groups[row].responses))
        assert batch.response_ids.tolist() == expected


@pytest.mark.parametrize("num_workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_epochs_differ_and_each_sees_every_row_once(tmp_path: Path, random_groups: Groups, num_workers: int) -> None:
    batches = loader(stored(tmp_path / "store", random_groups(21)), num_workers, batch_size=4)
    orders = []
    for epoch in range(3):
        batches.sampler.set_epoch(epoch)
        orders.append([row for batch in batches for row in batch.row_ids.tolist()])
        assert len(batches) == 6
    assert all(sorted(order) == list(range(21)) for order in orders)
    assert len({tuple(order) for order in orders}) == 3


@pytest.mark.slow
def test_workers_begin_with_the_epoch_that_is_set_after_the_iterator_was_made(tmp_path: Path, random_groups: Groups) -> None:
    store = stored(tmp_path / "store", random_groups(21))
    plain, with_workers = loader(store, batch_size=4), loader(store, 2, batch_size=4)
    iterator = iter(with_workers)
    for batches in (plain, with_workers):
        batches.sampler.set_epoch(5)
    assert [b.row_ids.tolist() for b in iterator] == [b.row_ids.tolist() for b in plain]


@pytest.mark.parametrize("num_replicas", [2, 3])
def test_N5_ranks_share_thirteen_pairs_without_repeats(tmp_path: Path, random_groups: Groups, num_replicas: int) -> None:
    store = stored(tmp_path / "store", random_groups(13))
    for shuffle in (True, False):
        loaders = [
            loader(store, num_replicas=num_replicas, rank=rank, batch_size=4, shuffle=shuffle) for rank in range(num_replicas)
        ]
        seen = [row for batches in loaders for batch in batches for row in batch.row_ids.tolist()]
        assert sorted(seen) == list(range(13))
        assert len({len(batches) for batches in loaders}) == 1


def test_a_filler_weighs_nothing(tmp_path: Path, random_groups: Groups) -> None:
    store = stored(tmp_path / "store", random_groups(1))
    batches = [next(iter(loader(store, num_replicas=2, rank=rank, batch_size=4))) for rank in range(2)]
    assert sorted(batch.weights.item() for batch in batches) == [0.0, 1.0]
    assert all(batch.window is not None and batch.window.groups == 1.0 for batch in batches)


def counts(batches: list[GroupBatch]) -> WindowCounts:
    return WindowCounts(
        sum(batch.weights.sum().item() for batch in batches),
        sum(batch.weights[batch.group_of_response].sum().item() for batch in batches),
        sum((batch.weights[batch.group_of_response] * batch.response_lengths).sum().item() for batch in batches),
    )


def test_N3_windows_count_what_all_ranks_really_run(tmp_path: Path, random_groups: Groups) -> None:
    """Two ranks, three batches an update, and a trainer that stops after five of eleven batches: windows of 3 and 2."""
    groups = [replace(group, weight=1.0 + row % 2) for row, group in enumerate(random_groups(41, 2))]
    store = stored(tmp_path / "store", groups)
    settings: dict[str, object] = {"num_replicas": 2, "batch_size": 2, "accumulate": 3, "limit_batches": 5}
    ranks = [list(loader(store, rank=rank, **settings)) for rank in range(2)]
    assert len(ranks[0]) == len(ranks[1]) == 11
    for start, stop in ((0, 3), (3, 5)):
        expected = counts([batch for rank in ranks for batch in rank[start:stop]])
        assert all(batch.window == expected for rank in ranks for batch in rank[start:stop])


def test_a_share_of_batches_is_counted_as_the_trainer_counts(tmp_path: Path, random_groups: Groups) -> None:
    store = stored(tmp_path / "store", random_groups(11))
    assert [loader(store, batch_size=1, limit_batches=limit).sampler.limit_batches for limit in (1.0, 0.5, 3, 99)] == [
        11,
        5,
        3,
        11,
    ]


def test_accumulation_may_change_with_the_epoch(tmp_path: Path, random_groups: Groups) -> None:
    batches = loader(stored(tmp_path / "store", random_groups(8)), batch_size=2, accumulate=lambda epoch: epoch + 1)
    for epoch in range(3):
        batches.sampler.set_epoch(epoch)
        first = next(iter(batches))
        assert first.window is not None
        assert first.window.groups == 2 * (epoch + 1)


def test_resuming_goes_on_with_the_next_batch_and_only_once(tmp_path: Path, random_groups: Groups) -> None:
    store = stored(tmp_path / "store", random_groups(20))
    whole, resumed = loader(store, batch_size=3), loader(store, batch_size=3)
    for batches in (whole, resumed):
        batches.sampler.set_epoch(4)
    expected = [batch.row_ids.tolist() for batch in whole]
    resumed.sampler.resume(RunPlace(4, 3))
    resumed.sampler.set_epoch(4)
    assert [batch.row_ids.tolist() for batch in resumed] == expected[3:]
    assert [batch.row_ids.tolist() for batch in resumed] == expected


def test_a_position_is_forgotten_when_another_epoch_begins(tmp_path: Path, random_groups: Groups) -> None:
    batches = loader(stored(tmp_path / "store", random_groups(9)), batch_size=3)
    batches.sampler.resume(RunPlace(0, 3))
    batches.sampler.set_epoch(1)
    assert len(list(batches)) == 3
    with pytest.raises(ValueError, match="4 micro-batches into an epoch, and an epoch has 3 of them now"):
        batches.sampler.resume(RunPlace(0, 4))


class Recorder(L.LightningModule):
    """Notes the rows it is given; its one parameter moves so that Lightning has something to train."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.rows: list[list[int]] = []
        self.windows: list[WindowCounts | None] = []
        self.val_rows: list[int] = []

    def training_step(self, batch: GroupBatch, batch_idx: int) -> Tensor:
        if batch_idx == 0:
            self.rows.append([])
        self.rows[-1] += batch.row_ids[batch.weights > 0].tolist()
        self.windows.append(batch.window)
        return self.weight * 1.0

    def validation_step(self, batch: GroupBatch, batch_idx: int) -> None:
        self.val_rows += batch.row_ids[batch.weights > 0].tolist()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def quiet_trainer(folder: Path, **settings: object) -> L.Trainer:
    return L.Trainer(
        accelerator="cpu",
        default_root_dir=folder,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        **settings,
    )


@pytest.mark.filterwarnings("ignore:.*does not have many workers")
def test_a_trainer_sees_every_row_once_an_epoch_in_changing_order(tmp_path: Path, random_groups: Groups) -> None:
    store = stored(tmp_path / "store", random_groups(13))
    module = Recorder()
    trainer = quiet_trainer(tmp_path, max_epochs=2, devices=1)
    trainer.fit(module, loader(store, batch_size=4), loader(store, batch_size=4, shuffle=False))
    assert [sorted(rows) for rows in module.rows] == [list(range(13))] * 2
    assert module.rows[0] != module.rows[1]
    assert module.val_rows == list(range(13)) * 2


def seen_rows(folder: Path, rank: int, ranks: int) -> dict[str, list[Any]]:
    store = GroupStore(folder / "store")
    module = Recorder()
    settings: dict[str, object] = {"num_replicas": ranks, "rank": rank, "batch_size": 4}
    trainer = quiet_trainer(folder, max_epochs=2, devices=ranks, strategy="ddp", accumulate_grad_batches=1)
    train, val = loader(store, **settings), loader(store, shuffle=False, **settings)
    trainer.fit(module, train, val)
    return {"rows": module.rows, "val": module.val_rows}


@pytest.mark.slow
def test_N5_two_processes_see_every_row_once_between_them(tmp_path: Path, random_groups: Groups) -> None:
    stored(tmp_path / "store", random_groups(13))
    seen = launched(seen_rows, tmp_path, 2)
    for epoch in range(2):
        assert sorted(seen[0]["rows"][epoch] + seen[1]["rows"][epoch]) == list(range(13))
    assert sorted(seen[0]["val"] + seen[1]["val"]) == sorted([*range(13)] * 2)


def test_the_table_may_hold_rows_of_any_number(tmp_path: Path, random_groups: Groups) -> None:
    groups = [replace(group, row_id=1000 + 7 * row) for row, group in enumerate(random_groups(6))]
    batches = loader(stored(tmp_path / "store", groups), max_tokens_per_batch=60)
    assert sorted(np.concatenate([batch.row_ids for batch in batches])) == [group.row_id for group in groups]
