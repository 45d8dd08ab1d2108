"""Loaders that tell their place, as torchdata's do: by what was taken from them."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor
from torch.utils.data import DataLoader
from typing_extensions import override


class PlacedLoader(DataLoader[Tensor]):
    """A loader of torch's whose place is the number of batches that were taken."""

    taken = 0

    @override
    def __iter__(self) -> Iterator[Tensor]:  # type: ignore[override]  # torch has a class of its own for it
        self.taken %= len(self)
        start = self.taken
        for number, batch in enumerate(super().__iter__()):
            if number >= start:
                self.taken += 1
                yield batch

    def state_dict(self) -> dict[str, int]:
        return {"taken": self.taken}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.taken = state["taken"]


class RowLoader:
    """The rows of one process in batches of a size of its own; its place is a row, and so another one in every process.

    Args:
        rows: Of this process.
        size: Of a batch.
    """

    def __init__(self, rows: Tensor, size: int) -> None:
        self.rows, self.size, self.row = rows, size, 0

    def __len__(self) -> int:
        return len(self.rows) // self.size

    def __iter__(self) -> Iterator[Tensor]:
        self.row %= len(self) * self.size
        while self.row < len(self) * self.size:
            self.row += self.size
            yield self.rows[self.row - self.size : self.row]

    def state_dict(self) -> dict[str, int]:
        return {"row": self.row}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.row = state["row"]
