"""A spike on one of two processes is answered alike on both; sharded moments are handled as whole ones are."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from gloo_ranks import launched
from lightning.pytorch.loggers import CSVLogger
from speakers import quiet_trainer
from spiky import Regression, adamw, batches, weights
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader
from typing_extensions import override

from lightning_pref.alerts import Alert
from lightning_pref.callbacks.spike_reset import SpikeAwareOptimizerReset

pytestmark = pytest.mark.slow

RANKS = 2
UPDATES = 50
SPAM: dict[str, Any] = {"reset_every": 12, "warmup_steps": 5, "guard_steps": 3, "threshold": 20.0}
EVIDENCE: dict[str, Any] = {"mode": "evidence", "guard_steps": 3, "warmup_steps": 6}
Result = dict[str, Any]


class SpikesOnOneRank(Regression):
    """Multiplies gradients of one process only, after they were averaged over processes."""

    def __init__(self, rank: int, **settings: Any) -> None:
        super().__init__(**settings)
        self.spiking_rank = rank

    @override
    def on_after_backward(self) -> None:
        if self.trainer.global_rank == self.spiking_rank:
            super().on_after_backward()


def ddp_run(folder: Path, rank: int, settings: Mapping[str, Any], *, bad_batch: bool) -> Result:
    """Real DDP under Lightning; rank 1 alone has the spike, in its gradients or in the labels of one of its batches."""
    data = batches(UPDATES, seed=rank)
    if bad_batch and rank == 1:
        data[32] = torch.cat([data[32][:, :6], torch.full((8, 1), 1e4)], -1)
    module = SpikesOnOneRank(1, spikes=() if bad_batch else (33, 36, 39))
    rows = {"rows": lambda batch: [100 * rank + 7]} if "mode" in settings else {}
    callback = SpikeAwareOptimizerReset(**settings, **rows)
    loader: DataLoader[Any] = DataLoader(data, batch_size=None)  # type: ignore[arg-type]
    trainer = quiet_trainer(
        devices=RANKS,
        strategy="ddp",
        logger=CSVLogger(folder / f"logs-{rank}"),
        log_every_n_steps=10,
        callbacks=[callback],
        default_root_dir=folder,
        use_distributed_sampler=False,
    )
    trainer.fit(module, loader)
    return {
        "weights": weights(module),
        "state": callback.state_dict(),
        "metrics": {key: value.item() for key, value in trainer.callback_metrics.items()},
        "alerts": [alert.name for alert in callback.alerts],
    }


class HandHost:
    """Somebody's own loop."""

    log_every = 10
    scaler = None
    device = torch.device("cpu")

    def __init__(self, module: nn.Module, rank: int, world_size: int) -> None:
        self.module = module
        self.rank = rank
        self.world_size = world_size
        self.step = 0
        self.logged: list[dict[str, float]] = []

    def log(self, values: Mapping[str, float | Tensor]) -> None:
        self.logged.append({key: float(value) for key, value in values.items()})

    def log_text(self, tag: str, text: str) -> None:
        """Nowhere to show it."""

    def say(self, alert: Alert) -> None:
        """Nobody to tell."""

    def move(self, batch: Any) -> Any:
        return batch

    def forward_context(self) -> AbstractContextManager[Any]:
        return nullcontext()

    def total(self, values: Tensor) -> Tensor:
        if self.world_size > 1:
            values = values.clone()
            dist.all_reduce(values)
        return values


def whole(module: nn.Module) -> Tensor:
    """All weights, gathered where they are sharded, in the order of one process."""
    if isinstance(module, FullyShardedDataParallel):
        with FullyShardedDataParallel.summon_full_params(module):
            return torch.cat([p.detach().flatten().clone() for p in module.parameters()])
    return torch.cat([(p.full_tensor() if isinstance(p, DTensor) else p).detach().flatten().clone() for p in module.parameters()])


def by_hand(kind: str, settings: Mapping[str, Any], rank: int, world_size: int) -> Result:
    """A loop on the same batches on every process, so that sharded and whole training are one and the same."""
    module: nn.Module = Regression().layers
    if kind == "fsdp2":
        fully_shard(module, mesh=init_device_mesh("cpu", (world_size,)))
    elif kind.startswith("fsdp1"):
        module = FullyShardedDataParallel(module, use_orig_params=kind == "fsdp1-orig", device_id=torch.device("cpu"))
    optimizer = adamw(module.parameters(), weight_decay=0.1)
    callback = SpikeAwareOptimizerReset(**settings)
    host: Any = HandHost(module, rank, world_size)
    callback.watch([optimizer])
    with torch.no_grad():
        callback.start(host)
    for update, batch in enumerate(batches(UPDATES), 1):
        callback.batch_begins()
        loss = (module(batch[:, :6]) - batch[:, 6:]).square().mean()
        optimizer.zero_grad()
        (loss * (1e4 if update in (33, 36, 39, 42) else 1.0)).backward()
        with torch.no_grad():
            callback.before_backward(host, loss.detach())
            callback.update_begins(host, optimizer)
        optimizer.step()
        host.step += 1
        with torch.no_grad():
            callback.batch_ends(host, None, batch)
    with torch.no_grad():
        callback.finish(host)
    return {"weights": whole(module), "events": [(e["update"], e["action"]) for e in callback.events], "logged": host.logged}


KINDS = ["fsdp2", "fsdp1-orig", "fsdp1-flat"]
MODES: dict[str, dict[str, Any]] = {
    "spam": SPAM,
    "spam-restart": {**SPAM, "bias_correction": "restart"},
    "evidence": {**EVIDENCE, "ladder": ("skip", "reset_first", "ramp", "roll_back"), "snapshot_every": 5},
}


def everything(folder: Path, rank: int, ranks: int) -> dict[str, Any]:
    results: dict[str, Any] = {
        "ddp evidence": ddp_run(folder, rank, EVIDENCE, bad_batch=False),
        "ddp bad batch": ddp_run(folder, rank, EVIDENCE, bad_batch=True),
        "ddp spam": ddp_run(folder, rank, SPAM, bad_batch=True),
    }
    for kind in KINDS:
        for name, settings in MODES.items():
            results[f"{kind} {name}"] = by_hand(kind, settings, rank, ranks)
    return results


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return launched(everything, tmp_path_factory.mktemp("ranks"), RANKS)


def test_O6_gradients_that_spike_on_one_rank_are_skipped_on_all(ranks: list[dict[str, Any]]) -> None:
    first, second = (rank["ddp evidence"] for rank in ranks)
    assert [(e["update"], e["action"]) for e in first["state"]["measured"]["events"]] == [
        (33, "skip"), (36, "reset_first"), (39, "reset_both")
    ]  # fmt: skip
    assert first["state"] == second["state"]
    assert torch.equal(first["weights"], second["weights"])
    assert first["metrics"] == second["metrics"]
    assert first["alerts"] == second["alerts"]


def test_O6_a_bad_batch_of_one_rank_is_seen_by_all_and_rows_of_all_are_named(ranks: list[dict[str, Any]]) -> None:
    first, second = (rank["ddp bad batch"] for rank in ranks)
    (event,) = first["state"]["measured"]["events"]
    assert (event["update"], event["action"]) == (33, "skip")
    assert {"loss", "grad_norm"} == set(event["scores"])
    assert event["rows"] == [7, 107]
    assert first["state"] == second["state"]
    assert torch.equal(first["weights"], second["weights"])


def test_O6_scheduled_resets_and_clipping_keep_the_ranks_equal(ranks: list[dict[str, Any]]) -> None:
    first, second = (rank["ddp spam"] for rank in ranks)
    assert torch.equal(first["weights"], second["weights"])
    assert first["metrics"] == second["metrics"]
    assert first["metrics"]["spike/phi"] < 1


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mode", MODES)
def test_O4_sharded_training_is_that_of_one_process(ranks: list[dict[str, Any]], kind: str, mode: str) -> None:
    alone = by_hand("alone", MODES[mode], 0, 1)
    for rank in ranks:
        found = rank[f"{kind} {mode}"]
        assert found["events"] == alone["events"]
        # Sharded gradients are averaged over processes, which rounds.
        assert torch.allclose(found["weights"], alone["weights"], rtol=1e-4, atol=1e-6)
        for mine, theirs in zip(found["logged"], alone["logged"], strict=True):
            assert mine == pytest.approx(theirs, rel=1e-3, nan_ok=True)
    if mode == "evidence":
        assert alone["events"] == [(33, "skip"), (36, "reset_first"), (39, "ramp"), (42, "roll_back")]
    else:
        assert any(entry["spike/clipped_fraction"] > 0.2 for entry in alone["logged"])
