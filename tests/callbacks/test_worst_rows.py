"""The rows that fell furthest: gathered over ranks, named in alerts, shown as a table."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.loggers import TensorBoardLogger
from paired_vectors import ENTANGLED, PairedVectors, row_loader, same_pairs
from speakers import quiet_trainer
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor

from lightning_pref.callbacks.displacement import LikelihoodDisplacementTracker, gather_worst, in_words, worst_table
from lightning_pref.measures.pair_history import PairRecord


def test_the_worst_rows_are_a_table_in_tensorboard(tmp_path: Path) -> None:
    tracker = LikelihoodDisplacementTracker(num_worst=3)
    logger = TensorBoardLogger(tmp_path, name="", version="")
    trainer = quiet_trainer(callbacks=[tracker], logger=logger, max_epochs=2, default_root_dir=tmp_path)
    trainer.fit(PairedVectors(same_pairs(ENTANGLED)), row_loader(8))
    logger.finalize("success")
    events = EventAccumulator(str(tmp_path)).Reload()
    (tag,) = [tag for tag in events.Tags()["tensors"] if "worst_rows/train" in tag]
    text = events.Tensors(tag)[0].tensor_proto.string_val[0].decode()
    assert len(text.splitlines()) == 5
    assert text == worst_table(tracker.worst_rows())


@dataclass
class Side:
    """One of two processes, as far as gathering goes: a sum over both is the own tensor plus the other's."""

    rank: int
    other: Tensor
    world_size: int = 2
    device: str = "cpu"
    sent: Tensor = field(default_factory=lambda: torch.zeros(0))

    def total(self, values: Tensor) -> Tensor:
        self.sent = values
        return values + self.other


def test_the_worst_rows_of_two_ranks_are_the_worst_of_all_rows() -> None:
    nan = math.nan
    records = [PairRecord(2**60 + row, 0, -float(row), 1.0, 3.0, 4.0, -2.0 * row, row, nan, 0.5) for row in range(1, 8)]
    worst = sorted(records, key=lambda record: record.chosen_change)
    parts = [worst[::2][:3], worst[1::2][:3]]
    sides: list[Any] = [Side(rank, torch.zeros(2, 3, 12, dtype=torch.float64)) for rank in (0, 1)]
    for side, part in zip(sides, parts, strict=True):
        gather_worst(side, part, 3)
    for side, other, part in zip(sides, reversed(sides), parts, strict=True):
        together: Any = Side(side.rank, other.sent)
        assert list(map(str, gather_worst(together, part, 3))) == list(map(str, worst[:3]))


def test_a_row_is_named_with_its_numbers() -> None:
    record = PairRecord(7, 1, -3.25, -5.0, 4.0, 0.0, -4.0, 12, math.nan, math.nan)
    assert in_words(record) == "row 7 (-3.25 nats, rejected -5)"
    assert worst_table([record]).splitlines()[-1] == "| 7, pair 2 | -3.250 | -0.8125 | -5.000 | -4.000 | 12 | nan |"
