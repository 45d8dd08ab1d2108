"""Watch your own classifier: a plain LightningModule gets a guard against spikes and a watch over what it learned before.

Neither needs a preference, a language model or a base class; the module says one thing, when it moves on to a new task.

    python examples/attach_own_classifier.py --out runs/attach_own_classifier
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
import torch
import torch.nn.functional as F
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_pref import TaskSwitch, observe
from lightning_pref.callbacks import SpikeAwareOptimizerReset, StabilityGapEvaluator

Batch = dict[str, Any]


class MyClassifier(L.LightningModule):
    """Your module."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 2))
        self.task = "old"

    def forward(self, points: Tensor) -> Tensor:
        """Logits, [B, 2]."""
        return self.layers(points)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Cross-entropy."""
        if batch["task"] != self.task:
            self.task = batch["task"]
            observe(self, TaskSwitch(task=self.task))  # the one new line
        loss = F.cross_entropy(self(batch["points"]), batch["labels"])
        self.log("loss", loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Adam."""
        return torch.optim.Adam(self.parameters(), lr=1e-2)


def losses(module: MyClassifier, batch: Batch) -> Tensor:
    """What the evaluator measures: the loss of each example, [B]."""
    return F.cross_entropy(module(batch["points"]), batch["labels"], reduction="none")


def batches(task: str, count: int, seed: int) -> list[Batch]:
    """The old task asks for the sign of the first two coordinates together, the new one for that of the next two."""
    generator = torch.Generator().manual_seed(seed)
    first = {"old": 0, "new": 2}[task]
    made = []
    for _ in range(count):
        points = torch.randn(64, 8, generator=generator)
        made.append({"task": task, "points": points, "labels": (points[:, first] + points[:, first + 1] > 0).long()})
    return made


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Train on the old task, then on the new one, with a broken batch in each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/attach_own_classifier"), help="folder of the run")
    parser.add_argument("--updates", type=int, default=60, help="of each task")
    options = parser.parse_args(argv)

    L.seed_everything(0)
    data = [*batches("old", options.updates, seed=1), *batches("new", options.updates, seed=2)]
    for broken in (options.updates * 3 // 4, options.updates * 7 // 4):
        data[broken]["points"] = data[broken]["points"] * 1e3  # somebody forgot to divide

    spikes = SpikeAwareOptimizerReset(mode="evidence")
    gap = StabilityGapEvaluator({"old": batches("old", 4, seed=3), "new": batches("new", 4, seed=4)}, losses, learning="old")
    trainer = L.Trainer(
        max_epochs=1,
        callbacks=[spikes, gap],
        logger=TensorBoardLogger(options.out, name=None, version=""),
        log_every_n_steps=10,
        accelerator="cpu",
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(MyClassifier(), DataLoader(data, batch_size=None))

    for event in spikes.events:
        print(f"spike at update {event['update']}: {event['action']}")
    found = {key: value.item() for key, value in trainer.callback_metrics.items() if key.startswith(("spike/", "stability_gap/"))}
    for key in ("stability_gap/old/depth", "stability_gap/old/worst_step", "stability_gap/min_acc", "stability_gap/forgetting"):
        print(f"{key:35} {found.get(key, float('nan')):8.3f}")
    print(f"tensorboard --logdir {options.out}")
    return {"values": found, "spikes": spikes.events}


if __name__ == "__main__":
    main()
