"""What the four monitors cost at their default cadence, as a share of the time of a training step.

    python benchmarks/monitor_overhead.py                       # DPO of the `small` preset on the playground
    python benchmarks/monitor_overhead.py --model playground:tiny --blocks 20 --steps 10

One run trains with the monitors attached in every other block of steps and without them in the rest (A B A B ...), so that a
machine that speeds up or slows down does so for both. Two numbers come of it:

* `hooks`: the time that passes inside the callbacks' own code, summed per monitor and divided by the median step without
  monitors. It is exact, and blind to what an observation costs the module that makes it.
* `steps`: the mean step with monitors over the mean step without, probes taken out. It sees everything, the machine's noise too.

Probes (a fixed set of pairs scored every N updates, the old task of the stability gap) have a time budget of their own and are
listed apart.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import TensorBoardLogger

from lightning_pref import RewardObservation, observe
from lightning_pref.callbacks import (
    Diagnostic,
    LikelihoodDisplacementTracker,
    Probe,
    RewardVarianceMonitor,
    SpikeAwareOptimizerReset,
    StabilityGapEvaluator,
)
from lightning_pref.data import GroupBatch, PreferenceData
from lightning_pref.data.playground_source import PlaygroundSettings
from lightning_pref.models.pair_scores import pair_observation
from lightning_pref.models.probe_scores import response_losses
from lightning_pref.modules import DPOModule


class Rewarded(DPOModule):
    """DPO that also says what its implicit rewards are, so that all four monitors have something to eat."""

    def training_step(self, batch: GroupBatch, batch_idx: int) -> torch.Tensor:
        rewards = torch.linspace(0, 1, batch.num_responses, device=batch.weights.device)
        observe(self, RewardObservation(rewards=rewards, prompt_ids=batch.group_of_response))
        return super().training_step(batch, batch_idx)


class Stopwatch:
    """Adds up the time inside a diagnostic's hooks."""

    def __init__(self, diagnostic: Diagnostic) -> None:
        self.seconds = 0.0
        self._depth = 0
        for name in dir(diagnostic):
            if name.startswith("on_") and callable(getattr(diagnostic, name)):
                setattr(diagnostic, name, self._timed(getattr(diagnostic, name)))

    def _timed(self, hook: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            started = time.perf_counter()
            self._depth += 1
            try:
                return hook(*args, **kwargs)
            finally:
                self._depth -= 1
                if not self._depth:
                    self.seconds += time.perf_counter() - started

        return timed


class Blocks(Callback):
    """Attaches and detaches the monitors by turns and notes how long every step takes."""

    def __init__(self, monitors: list[Diagnostic], steps: int, probe_seconds: Callable[[], float]) -> None:
        self.monitors = monitors
        self.steps = steps
        self.probe_seconds = probe_seconds
        self.durations: dict[bool, list[float]] = defaultdict(list)
        self._attached = True
        self._started = 0.0
        self._probed = 0.0

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int) -> None:  # noqa: ARG002
        now, probed = time.perf_counter(), self.probe_seconds()
        # The first step of a block pays for what the last one left behind (caches, lazily made state).
        # The first two blocks warm up, and hold the stability gap's dense evaluations.
        if batch_idx > 2 * self.steps and batch_idx % self.steps > 1:
            self.durations[self._attached].append(now - self._started - (probed - self._probed))
        if batch_idx and batch_idx % self.steps == 0:
            self._attached = not self._attached
            others = [c for c in trainer.callbacks if c not in self.monitors]
            trainer.callbacks = [*others, *(self.monitors if self._attached else [])]
        self._started, self._probed = time.perf_counter(), self.probe_seconds()


def seconds_of_probing(diagnostic: Diagnostic) -> float:
    """Time a diagnostic has spent on fixed sets so far."""
    return float(getattr(diagnostic, "probing_seconds", 0.0))


def fixed_batches(data: PreferenceData, num_batches: int) -> list[GroupBatch]:
    """The first validation batches, the same every time."""
    loader = data.every_batch(data.val_table)
    return [batch for batch, _ in zip(loader, range(num_batches), strict=False)]


def main() -> None:
    """Train in blocks and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="playground:small")
    parser.add_argument("--blocks", type=int, default=10, help="blocks of steps, half of them with the monitors")
    parser.add_argument("--steps", type=int, default=20, help="steps of a block")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--accelerator", default="cpu")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--only", nargs="+", default=[], help="names of monitors, to find out which one costs what")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    L.seed_everything(0, verbose=False)

    data = PreferenceData(
        "playground:preference",
        tokenizer=args.model,
        batch_size=args.batch_size,
        playground=PlaygroundSettings(num_rows=args.batch_size * args.steps * args.blocks, num_val_rows=32),
    )
    data.prepare_data()
    data.setup("fit")
    pairs = fixed_batches(data, 1)

    probes: list[Diagnostic] = [
        Probe("fixed", pairs, lambda module, batch: pair_observation(module.policy, batch)),
        StabilityGapEvaluator(
            tasks={"old": pairs}, score=lambda module, batch: response_losses(module.policy, batch), kind="loss"
        ),
    ]
    watching: list[Diagnostic] = [
        RewardVarianceMonitor(),
        LikelihoodDisplacementTracker(),
        SpikeAwareOptimizerReset(),
    ]
    if args.only:
        probes = [probe for probe in probes if type(probe).__name__ in args.only]
        watching = [monitor for monitor in watching if type(monitor).__name__ in args.only]
    stopwatches = {type(d).__name__: Stopwatch(d) for d in [*watching, *probes]}

    def probe_seconds() -> float:
        return sum(map(seconds_of_probing, probes))

    blocks = Blocks([*watching, *probes], args.steps, probe_seconds)
    with TemporaryDirectory() as folder:
        trainer = L.Trainer(
            accelerator=args.accelerator,
            devices=1,
            max_steps=args.blocks * args.steps,
            limit_val_batches=0,
            logger=TensorBoardLogger(Path(folder)),
            callbacks=[blocks, *watching, *probes],
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(Rewarded(args.model), data)

    without, attached = blocks.durations[False], blocks.durations[True]
    median = statistics.median(without)
    num_attached = args.blocks * args.steps // 2
    print(f"\n{args.model}, batch of {args.batch_size} pairs, {len(without)} + {len(attached)} timed steps, {args.accelerator}")
    print(f"median step without monitors {1000 * median:.1f} ms, with {1000 * statistics.median(attached):.1f} ms")
    total = 0.0
    for name, stopwatch in stopwatches.items():
        spent = sum(seconds_of_probing(probe) for probe in probes if type(probe).__name__ == name)
        own = (stopwatch.seconds - spent) / num_attached
        total += own
        probed = f"   + probing {1000 * spent / num_attached:7.2f} ms a step" if spent else ""
        print(f"  {name:32} {1000 * own:7.3f} ms a step  {100 * own / median:6.2f} %{probed}")
    print(f"  {'hooks of all':32} {1000 * total:7.3f} ms a step  {100 * total / median:6.2f} %")
    ratio = statistics.mean(attached) / statistics.mean(without) - 1
    medians = statistics.median(attached) / median - 1
    print(f"  steps, probes taken out: mean {100 * ratio:+.2f} %, median {100 * medians:+.2f} %")


if __name__ == "__main__":
    main()
