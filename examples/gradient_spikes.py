"""What gradient spikes do to AdamW, and what `SpikeAwareOptimizerReset` makes of them.

A small transformer learns to continue sequences of a Markov chain. In some updates 30 % of the gradient's coordinates get
noise of a thousand times the gradient's own size. Every arm has the same model, data, spikes, learning rate and cosine schedule:

* `calm`: AdamW without spikes.
* `spikes`: AdamW.
* `norm_clip`: AdamW with the gradient norm clipped to 1, the usual remedy.
* `spam_keep`: the callback in mode `spam` as published, its bias correction kept, which also raises the effective rate.
* `spam_restart`: the same with the bias correction restarted, so that nothing but spikes and resets makes a difference.
* `evidence`: the callback in mode `evidence` with its defaults.

SPAM's interval of 500 updates belongs to runs of ten thousands of updates; here, at 600, it is 100. Its threshold is chosen
such that 75 updates after a reset both arms cut at six times the usual size of a coordinate: 36 on the corrected second
moment, 36 / (1 - 0.999^75) = 500 on the plain one. Half a minute on one core:

    python examples/gradient_spikes.py --out spikes.png
"""

from __future__ import annotations

import argparse
import json
import logging
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import lightning as L
import matplotlib as mpl
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn
from torch.utils.data import DataLoader
from typing_extensions import override

from lightning_pref.callbacks.spike_reset import SpikeAwareOptimizerReset

mpl.use("Agg")
from matplotlib import pyplot as plt  # after the backend is chosen

VOCABULARY, CONTEXT, WIDTH = 24, 16, 32
SPIKE_SHARE, SPIKE_SIZE = 0.3, 1000.0
SPAM: dict[str, Any] = {"reset_every": 100, "warmup_steps": 20, "guard_steps": 10}

ARMS: dict[str, Callable[[], SpikeAwareOptimizerReset] | None] = {
    "calm": None,
    "spikes": None,
    "norm_clip": None,
    "spam_keep": lambda: SpikeAwareOptimizerReset("spam", **SPAM, threshold=500.0, bias_correction="keep"),
    "spam_restart": lambda: SpikeAwareOptimizerReset("spam", **SPAM, threshold=36.0, bias_correction="restart"),
    "evidence": lambda: SpikeAwareOptimizerReset("evidence"),
}


class MarkovModel(L.LightningModule):
    """A two-layer transformer that predicts the next token, with spikes in the gradients of chosen updates."""

    def __init__(self, *, num_updates: int, spikes: Sequence[int], learning_rate: float) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.positions = nn.Parameter(0.02 * torch.randn(CONTEXT, WIDTH))
        layer = nn.TransformerEncoderLayer(WIDTH, nhead=2, dim_feedforward=64, dropout=0.0, batch_first=True, norm_first=True)
        self.body = nn.TransformerEncoder(layer, num_layers=2, enable_nested_tensor=False)
        self.head = nn.Linear(WIDTH, VOCABULARY)
        self.num_updates = num_updates
        self.spikes = frozenset(spikes)
        self.learning_rate = learning_rate
        self.losses: list[float] = []
        self.noise = torch.Generator().manual_seed(1)

    def loss(self, tokens: Tensor) -> Tensor:
        """Mean cross-entropy of the tokens after the first, in nats; tokens are [B, CONTEXT + 1]."""
        mask = nn.Transformer.generate_square_subsequent_mask(CONTEXT)
        states = self.body(self.embedding(tokens[:, :-1]) + self.positions, mask=mask, is_causal=True)
        return nn.functional.cross_entropy(self.head(states).flatten(0, 1), tokens[:, 1:].flatten())

    @override
    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        loss = self.loss(batch)
        self.losses.append(float(loss.detach()))
        return loss

    @override
    def on_after_backward(self) -> None:
        if self.trainer.global_step + 1 not in self.spikes:
            return
        for parameter in self.parameters():
            if parameter.grad is not None:
                size = SPIKE_SIZE * parameter.grad.square().mean().sqrt()
                hit = torch.rand(parameter.shape, generator=self.noise) < SPIKE_SHARE
                parameter.grad += torch.where(hit, size * torch.randn(parameter.shape, generator=self.noise), 0.0)

    @override
    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=self.learning_rate, weight_decay=0.0)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=self.num_updates)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def markov_sequences(num_batches: int, batch_size: int, seed: int) -> list[Tensor]:
    """Batches of sequences of one chain, in which the next token depends on the last two; [batch_size, CONTEXT + 1] each."""
    chain = torch.Generator().manual_seed(0)
    transition = (2.5 * torch.randn(VOCABULARY, VOCABULARY, VOCABULARY, generator=chain)).softmax(-1)
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(VOCABULARY, (num_batches * batch_size, 2), generator=generator)
    for _ in range(CONTEXT - 1):
        following = torch.multinomial(transition[tokens[:, -2], tokens[:, -1]], 1, generator=generator)
        tokens = torch.cat([tokens, following], 1)
    return list(tokens.view(num_batches, batch_size, CONTEXT + 1))


def train(arm: str, *, num_updates: int, spikes: Sequence[int], learning_rate: float, seed: int) -> dict[str, Any]:
    """One arm: its training losses, its loss on held-out sequences, and what the callback did."""
    L.seed_everything(seed, verbose=False)
    module = MarkovModel(num_updates=num_updates, spikes=() if arm == "calm" else spikes, learning_rate=learning_rate)
    make = ARMS[arm]
    callback = make() if make is not None else None
    callbacks: list[Callback] = [] if callback is None else [callback]
    trainer = L.Trainer(
        accelerator="cpu",
        max_epochs=1,
        logger=False,
        callbacks=callbacks,
        gradient_clip_val=1.0 if arm == "norm_clip" else None,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    data: Any = markov_sequences(num_updates, 32, seed=seed + 10)
    trainer.fit(module, DataLoader(data, batch_size=None))
    with torch.no_grad():
        held_out = torch.stack([module.loss(batch) for batch in markov_sequences(16, 64, seed=999)]).mean()
    return {
        "final_loss": float(held_out),
        "losses": module.losses,
        "events": [] if callback is None else [(event["update"], event["action"]) for event in callback.events],
    }


def excess_after_spikes(losses: Sequence[float], calm: Sequence[float], spikes: Sequence[int]) -> float:
    """Mean training loss above that of the calm run on the same batches, 1 to 30 updates after a spike."""
    # A loss is of the weights before its update: entry `spike`, counted from 0, is the first after it.
    places = [place for spike in spikes for place in range(spike, min(spike + 30, len(losses)))]
    return sum(losses[place] - calm[place] for place in places) / len(places)


def plot(runs: dict[str, dict[str, Any]], spikes: Sequence[int], path: Path) -> None:
    """Training losses of all arms, smoothed over 10 updates."""
    figure, axes = plt.subplots(figsize=(9, 5), layout="constrained")
    for arm, run in runs.items():
        smooth = torch.tensor(run["losses"]).unfold(0, 10, 1).mean(-1)
        axes.plot(range(9, len(smooth) + 9), smooth, label=f"{arm}: {run['final_loss']:.3f}", linewidth=1.2)
    for spike in spikes:
        axes.axvline(spike, color="0.85", zorder=0)
    axes.set(
        xlabel="update", ylabel="training loss (nats per token)", title="Gradient spikes (grey), held-out loss in the legend"
    )
    axes.legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Run all arms, print a table, and write a plot if asked for.

    Args:
        argv: Arguments of the command line; those of the process if not given.

    Returns:
        By arm: held-out loss, share above the calm run, excess training loss after spikes, and what was done.
    """
    parser = argparse.ArgumentParser(description="AdamW with and without SpikeAwareOptimizerReset under gradient spikes.")
    parser.add_argument("--updates", type=int, default=600)
    parser.add_argument("--spike-every", type=int, default=75)
    parser.add_argument("--learning-rate", type=float, default=1e-2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=None, help="where the plot goes")
    options = parser.parse_args(argv)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    logging.getLogger("lightning_pref.alerts").setLevel(logging.ERROR)
    # First after 75 updates, last well before the end, so that there is time to recover.
    spikes = range(options.spike_every, options.updates - 50, options.spike_every)
    runs = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Lightning's advice on loaders
        for arm in ARMS:
            runs[arm] = train(
                arm, num_updates=options.updates, spikes=spikes, learning_rate=options.learning_rate, seed=options.seed
            )
    calm = runs["calm"]
    report = {
        arm: {
            "final_loss": run["final_loss"],
            "above_calm": run["final_loss"] / calm["final_loss"] - 1.0,
            "excess_after_spikes": excess_after_spikes(run["losses"], calm["losses"], spikes),
            "events": run["events"],
        }
        for arm, run in runs.items()
    }
    print(f"{'arm':14}{'held-out loss':>14}{'above calm':>12}{'excess after spikes':>21}")
    for arm, row in report.items():
        print(f"{arm:14}{row['final_loss']:14.4f}{row['above_calm']:12.1%}{row['excess_after_spikes']:21.4f}")
    print(json.dumps({"evidence": report["evidence"]["events"]}))
    if options.out is not None:
        plot(runs, spikes, options.out)
        print(f"Plot: {options.out}")
    return report


if __name__ == "__main__":
    main()
