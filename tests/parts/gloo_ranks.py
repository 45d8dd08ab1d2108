"""Real processes that gloo joins: each is told its rank as a launcher would tell it."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as mp


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def take_place(rank: int, ranks: int, port: int) -> None:
    """Make this process one of several that meet at a port, of which none takes more than a thread."""
    place = {"MASTER_PORT": port, "WORLD_SIZE": ranks, "LOCAL_RANK": rank, "RANK": rank, "NODE_RANK": 0}
    os.environ.update(MASTER_ADDR="127.0.0.1", **{name: str(value) for name, value in place.items()})
    torch.set_num_threads(1)


def on_a_rank(rank: int, work: Callable[[Path, int, int], Any], folder: Path, ranks: int, port: int) -> None:
    take_place(rank, ranks, port)
    torch.save(work(folder, rank, ranks), folder / f"{rank}-of-{ranks}.pt")


def launched(work: Callable[[Path, int, int], Any], folder: Path, ranks: int) -> list[Any]:
    """What a function of (folder, rank, ranks) gives in each of several processes; it lives in a module, to be found there."""
    mp.spawn(on_a_rank, args=(work, folder, ranks, free_port()), nprocs=ranks)  # type: ignore[no-untyped-call]
    return [torch.load(folder / f"{rank}-of-{ranks}.pt", weights_only=False) for rank in range(ranks)]
