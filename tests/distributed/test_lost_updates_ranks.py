"""The meter of lost updates counts every weight once, whether each process has all of them or a part."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from gloo_ranks import launched
from speakers import quiet_trainer
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader
from typing_extensions import override

from lightning_pref.callbacks import LostUpdateMeter
from lightning_pref.modules.splitting import FSDP2Strategy

pytestmark = pytest.mark.slow

RANKS = 2
# Rows of ones, which do not feel the step; split in two, all are in the first half and half of them in the second.
NUM_ROWS, NUM_LOST = 64, 48


class Ones(L.LightningModule):
    """Somebody's own module in bfloat16: most of its weights lose their updates."""

    @override
    def configure_model(self) -> None:
        self.layer = nn.Linear(8, NUM_ROWS, bias=False, dtype=torch.bfloat16)
        with torch.no_grad():
            self.layer.weight[:NUM_LOST] = 1.0
            self.layer.weight[NUM_LOST:] = 0.0
        if isinstance(self.trainer.strategy, FSDP2Strategy):
            fully_shard(self.layer, mesh=self.device_mesh["data_parallel"])

    @override
    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self.layer(torch.ones(1, 8, dtype=torch.bfloat16)).float().sum()  # type: ignore[no-any-return]

    @override
    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=1e-3)


def both_strategies(folder: Path, _rank: int, ranks: int) -> dict[str, Any]:
    found = {}
    for name, strategy in (("ddp", "ddp"), ("fsdp2", FSDP2Strategy())):
        trainer = quiet_trainer(
            devices=ranks, strategy=strategy, callbacks=[LostUpdateMeter(every_n_updates=1)], default_root_dir=folder
        )
        module = Ones()
        trainer.fit(module, DataLoader(list(torch.zeros(2 * ranks, 1)), batch_size=1))  # type: ignore[arg-type]
        shares = {key: value.item() for key, value in trainer.callback_metrics.items() if key.startswith("lost_updates/")}
        found[name] = shares, isinstance(module.layer.weight, DTensor)
    return found


def test_the_share_is_that_of_all_weights_on_every_rank(tmp_path: Path) -> None:
    for found in launched(both_strategies, tmp_path, RANKS):
        expected = {"lost_updates/share": NUM_LOST / NUM_ROWS, "lost_updates/stuck_share": NUM_LOST / NUM_ROWS}
        assert found["ddp"] == (expected, False)
        assert found["fsdp2"] == (expected, True)
