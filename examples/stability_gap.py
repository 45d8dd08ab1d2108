"""The stability gap in miniature: a small network learns two classes, then two more, and forgets the first for a moment.

Three ways to move on: with new examples only, with half of each batch replayed from the first task, and with replay under a
learning rate that is warmed up again. Every update after the switch is evaluated on a fixed set of the first task, as
`StabilityGapEvaluator` does in any run. Takes half a minute on a CPU.

    python examples/stability_gap.py --out stability_gap.png
"""

from __future__ import annotations

import argparse
import logging
import warnings
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import lightning as L
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from typing_extensions import override

from lightning_pref import TaskSwitch, observe
from lightning_pref.callbacks.stability_gap import StabilityGapEvaluator

DIMENSIONS, CLASSES, BATCH = 20, 4, 32
SWITCH, UPDATES = 150, 300
WARMUP = 100  # updates
BUFFER = 200  # examples of the first task that may be replayed
PROBE = 1000  # examples that each task is evaluated on
TOLERANCE = 0.03  # in accuracy

Batch = tuple[Tensor, Tensor, str]


class Way(NamedTuple):
    """How training moves on to the second task."""

    replay: bool = False
    warmup: bool = False


WAYS = {"new data only": Way(), "replay": Way(replay=True), "replay and warm-up": Way(replay=True, warmup=True)}


class Gaussians:
    """One cloud of points per class; the first two classes are the first task, the others the second."""

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.centers = torch.randn(CLASSES, DIMENSIONS, generator=self.generator)

    def draw(self, task: int, count: int) -> tuple[Tensor, Tensor]:
        """Points and classes of a task."""
        labels = 2 * task + torch.randint(2, (count,), generator=self.generator)
        return self.centers[labels] + torch.randn(count, DIMENSIONS, generator=self.generator), labels


class Stream(Dataset[Batch]):
    """The batches of a whole run in order: the first task, then the second, with old examples in half of each batch or not."""

    def __init__(self, data: Gaussians, *, replay: bool) -> None:
        old, old_labels = data.draw(0, BUFFER)
        self.batches: list[Batch] = []
        for update in range(UPDATES):
            task = int(update >= SWITCH)
            points, labels = data.draw(task, BATCH)
            if task and replay:
                rows = torch.randint(BUFFER, (BATCH,), generator=data.generator)
                points, labels = torch.cat([points, old[rows]]), torch.cat([labels, old_labels[rows]])
            self.batches.append((points, labels, ("first", "second")[task]))

    def __len__(self) -> int:
        return len(self.batches)

    @override
    def __getitem__(self, index: int) -> Batch:
        return self.batches[index]


class Classifier(L.LightningModule):
    """A network with one hidden layer; knows nothing of any monitor but for the line that says which task it is on."""

    def __init__(self, *, warmup: bool) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(DIMENSIONS, 32), nn.ReLU(), nn.Linear(32, CLASSES))
        self.warmup = warmup

    @override
    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        points, labels, task = batch
        observe(self, TaskSwitch(task=task))
        return nn.functional.cross_entropy(self.layers(points), labels)

    @override
    def configure_optimizers(self) -> Any:  # Any: Lightning's dictionary
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)

        def factor(update: int) -> float:
            return min(1.0, (update - SWITCH + 1) / WARMUP) if self.warmup and update >= SWITCH else 1.0

        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def correctness(module: Classifier, batch: tuple[Tensor, Tensor]) -> Tensor:
    """1 for every example that is classified rightly, 0 for the others."""
    points, labels = batch
    return (module.layers(points).argmax(-1) == labels).float()


def train(way: Way, seed: int, folder: str) -> StabilityGapEvaluator:
    """One run, watched; its alerts go into the folder."""
    L.seed_everything(seed, verbose=False)
    data = Gaussians(seed)
    evaluator = StabilityGapEvaluator(
        tasks={"first": [data.draw(0, PROBE)], "second": [data.draw(1, PROBE)]},
        score=correctness,
        kind="accuracy",
        learning="first",
        dense_updates=UPDATES,  # for the plot: every update to the end
        tolerance=TOLERANCE,
        budget=None,
        thresholds={"stability_gap/expensive": float("nan")},  # a network this small costs as much to evaluate as to train
    )
    trainer = L.Trainer(
        max_epochs=1,
        accelerator="cpu",
        devices=1,
        default_root_dir=folder,
        logger=False,
        callbacks=[evaluator],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Classifier(warmup=way.warmup), DataLoader(Stream(data, replay=way.replay), batch_size=None))
    return evaluator


def numbers(evaluator: StabilityGapEvaluator) -> dict[str, float | None]:
    """What one run shows."""
    gap = evaluator.gaps()["first"]
    steps, values = evaluator.trace("first")
    after = [value for step, value in zip(steps, values, strict=True) if step >= SWITCH]
    return {
        "before": after[0],
        "minimum": min(after),
        "end": after[-1],
        "depth": gap.depth,
        "worst_step": gap.worst_step - SWITCH,
        "recovery_step": None if gap.recovery_step is None else gap.recovery_step - SWITCH,
        "new_task": evaluator.trace("second")[1][-1],
    }


def averaged(runs: Sequence[dict[str, float | None]]) -> dict[str, float | None]:
    """Means over seeds; `None` for a recovery that some seed never saw."""
    found: dict[str, float | None] = {}
    for key in runs[0]:
        values = [run[key] for run in runs]
        known = [value for value in values if value is not None]
        found[key] = sum(known) / len(known) if len(known) == len(values) else None
    return found


def plot(traces: dict[str, list[tuple[list[int], list[float]]]], path: Path) -> None:
    """Accuracy on the first task after the switch, one line a seed."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    for color, (name, runs) in zip(("tab:red", "tab:blue", "tab:green"), traces.items(), strict=True):
        for number, (steps, values) in enumerate(runs):
            axes.plot(steps, values, color=color, alpha=0.7, label=name if number == 0 else None)
    axes.axvline(SWITCH, color="black", linestyle=":", label="switch to the second task")
    axes.set(xlabel="update", ylabel="accuracy on the first task", xlim=(SWITCH - 20, UPDATES), ylim=(0, 1.03))
    axes.legend(loc="lower right")
    figure.savefig(path, dpi=120)
    plt.close(figure)


def table(results: dict[str, dict[str, float | None]]) -> str:
    """The numbers as text."""
    lines = [f"{'':20}" + "".join(f"{key:>15}" for key in next(iter(results.values())))]
    for name, found in results.items():
        cells = ["never" if value is None else f"{value:.3f}" for value in found.values()]
        lines.append(f"{name:20}" + "".join(f"{cell:>15}" for cell in cells))
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> dict[str, dict[str, float | None]]:
    """Train all ways, print the numbers, draw the plot."""
    parser = argparse.ArgumentParser(description="The stability gap of a small classifier, with and without replay.")
    parser.add_argument("--seeds", type=int, default=5, help="runs of each way")
    parser.add_argument("--out", type=Path, help="file of the plot; none if not given (needs matplotlib)")
    arguments = parser.parse_args(argv)
    warnings.filterwarnings("ignore", message=".*does not have many workers")
    for name in ("lightning.pytorch", "lightning_pref.alerts"):
        logging.getLogger(name).setLevel(logging.ERROR)
    with TemporaryDirectory() as folder:
        runs = {name: [train(way, seed, folder) for seed in range(arguments.seeds)] for name, way in WAYS.items()}
    results = {name: averaged([numbers(evaluator) for evaluator in evaluators]) for name, evaluators in runs.items()}
    print(table(results))
    for name, evaluators in runs.items():
        print(f"\nAlerts of {name!r}, seed 0:", *(f"* {alert.text()}" for alert in evaluators[0].alerts), sep="\n")
    if arguments.out is not None:
        plot({name: [evaluator.trace("first") for evaluator in evaluators] for name, evaluators in runs.items()}, arguments.out)
    return results


if __name__ == "__main__":
    main()
