"""A bad batch of one process is skipped by all of them, with plain, replicated and sharded weights."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from gloo_ranks import launched
from lightning.pytorch.strategies import ModelParallelStrategy
from speakers import quiet_trainer
from spiky import Regression, adamw, batches
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.optim.lr_scheduler import LinearLR
from torch.utils.data import DataLoader
from typing_extensions import override

from lightning_pref.callbacks import NonFiniteGuard

pytestmark = pytest.mark.slow

RANKS = 2
UPDATES = 8
BAD = 3
STRATEGIES = ("ddp", "fsdp2")


class Sharded(Regression):
    """Split over the processes where the strategy does not do it by itself."""

    @override
    def configure_model(self) -> None:
        mesh = getattr(self, "device_mesh", None)
        if mesh is not None and not isinstance(next(self.parameters()), DTensor):
            fully_shard(self.layers, mesh=mesh["data_parallel"])


def decaying(parameters: Any) -> Any:
    return adamw(parameters, weight_decay=0.1)


def strategy_named(name: str) -> Any:
    return ModelParallelStrategy(data_parallel_size=RANKS, tensor_parallel_size=1) if name == "fsdp2" else name


def whole(trainer: L.Trainer, module: nn.Module) -> Tensor:
    if any(isinstance(p, DTensor) for p in module.parameters()):
        parts = [p.full_tensor() if isinstance(p, DTensor) else p for p in module.parameters()]
        return torch.cat([part.detach().flatten() for part in parts])
    state = trainer.strategy.lightning_module_state_dict()
    return torch.cat([value.flatten() for value in state.values()]) if state else torch.zeros(0)


def train(folder: Path, rank: int, name: str, *, leave_out: bool) -> dict[str, Any]:
    """Rank 1 has a label that is no number in one batch; or no process has that batch."""
    data = batches(UPDATES, seed=rank)
    if leave_out:
        del data[BAD]
    elif rank == 1:
        data[BAD][3, 6] = math.nan
    module = Sharded(decaying, schedule=lambda made: LinearLR(made, total_iters=UPDATES))
    guard = NonFiniteGuard(rows=lambda batch: [100 * rank + 7])
    trainer = quiet_trainer(
        devices=RANKS, strategy=strategy_named(name), callbacks=[guard], default_root_dir=folder, use_distributed_sampler=False
    )
    loader: DataLoader[Any] = DataLoader(data, batch_size=None)  # type: ignore[arg-type]
    trainer.fit(module, loader)
    return {
        "weights": whole(trainer, module),
        "events": guard.events,
        "updates": guard.updates,
        "schedule": trainer.lr_scheduler_configs[0].scheduler.last_epoch,
    }


def everything(folder: Path, rank: int, ranks: int) -> dict[Any, Any]:
    assert ranks == RANKS
    return {
        (name, leave_out): train(folder, rank, name, leave_out=leave_out) for name in STRATEGIES for leave_out in (False, True)
    }


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[Any, Any]]:
    return launched(everything, tmp_path_factory.mktemp("ranks"), RANKS)


@pytest.mark.parametrize("name", ["ddp", "fsdp2"])
def test_M6_a_bad_batch_of_one_rank_is_skipped_on_all(ranks: list[dict[Any, Any]], name: str) -> None:
    first, second = (rank[name, False] for rank in ranks)
    without = ranks[0][name, True]
    assert torch.equal(first["weights"], without["weights"])
    assert torch.equal(second["weights"], without["weights"])
    assert first["events"] == second["events"]
    (event,) = first["events"]
    assert event["update"] == BAD + 1
    assert event["rows"] == [107]  # the batch whose loss it was
    assert event["finding"].startswith("the loss in 1 of 2 micro-batches is nan or infinite")
    assert event["finding"].endswith("the first of them layers.0.weight")
    assert first["updates"] == first["schedule"] == UPDATES - 1
