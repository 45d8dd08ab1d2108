"""Two perfectly accurate reward models, of which one hardly teaches: python examples/reward_variance.py --out figure.png.

A miniature of "What makes a reward model a good teacher?" (Razin et al. 2025, arXiv 2503.15477). A softmax policy over 50
responses to each of 20 prompts learns by policy gradient from one of three rewards, all whitened by the same rule:

* spread: grows evenly with the rank of the response, a little higher for some prompts than for others;
* flat: the same order, squeezed into a narrow band around a level that differs from prompt to prompt; only the very best
  response stands out, and the policy hardly ever samples it;
* noisy: spread, with so much noise that it orders a quarter of all pairs wrongly.

Spread and flat order every pair of responses rightly. What tells them apart is the variance of the reward among the
responses to one prompt: `RewardVarianceMonitor` reports it in the first updates, long before the curves part. Even the
noisy reward teaches more than the flat one.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import lightning as L
import matplotlib as mpl
import torch
from lightning.pytorch.callbacks import Callback
from rich.console import Console
from torch import Tensor, nn
from torch.utils.data import DataLoader
from typing_extensions import override

from lightning_pref import RewardObservation, observe
from lightning_pref.callbacks.reward_variance import WHITENED, RewardVarianceMonitor
from lightning_pref.measures.teaching import compare_pairs, relative_speed
from lightning_pref.reports.console import readable_terminal

PROMPTS, RESPONSES, SAMPLES = 20, 50, 8
# Of the initial policy: how uneven it is, and how much less likely than others the best response is to it, in nats.
LOGIT_STD, BEST_LOGIT = 1.5, -6.0
# Of the flat reward: width of the band that holds all responses but the best, against levels of prompts with a spread of 1.
BAND, STANDS_OUT = 0.1, 1.0
NOISE = 0.35
LEARNING_RATE = 2.0
EARLY_UPDATES = 5


class Teachers(NamedTuple):
    """The world: what responses are worth, rewards for them, and the policy to be taught, each [P, V]."""

    gold: Tensor
    rewards: dict[str, Tensor]
    logits: Tensor


def build_world(seed: int) -> Teachers:
    """A random policy, two rewards that agree on the order of all responses, and a noisy one."""
    generator = torch.Generator().manual_seed(seed)
    ranks = torch.stack([torch.randperm(RESPONSES, generator=generator) for _ in range(PROMPTS)])
    gold = ranks / (RESPONSES - 1)
    is_best = ranks == RESPONSES - 1
    logits = LOGIT_STD * torch.randn(PROMPTS, RESPONSES, generator=generator)
    logits = torch.where(is_best, BEST_LOGIT, logits)
    levels = torch.randn(PROMPTS, 1, generator=generator)
    rewards = {
        "spread": gold + 0.1 * levels,
        "noisy": gold + 0.1 * levels + NOISE * torch.randn(PROMPTS, RESPONSES, generator=generator),
        "flat": levels + BAND * gold + STANDS_OUT * is_best,
    }
    return Teachers(gold, {name: whitened(reward, logits) for name, reward in rewards.items()}, logits)


def whitened(reward: Tensor, logits: Tensor) -> Tensor:
    """The reward with mean 0 and variance 1 over the responses that the policy gives, all prompts together."""
    weights = logits.softmax(-1) / len(logits)
    mean = (weights * reward).sum()
    return (reward - mean) / (weights * (reward - mean).square()).sum().sqrt()


class TabularPolicy(L.LightningModule):
    """A policy with a logit for every response, trained by policy gradient with a leave-one-out baseline."""

    def __init__(self, reward: Tensor, world: Teachers) -> None:
        super().__init__()
        self.reward, self.gold = reward, world.gold
        self.logits = nn.Parameter(world.logits.clone())

    def gold_reward(self) -> float:
        """What the policy's responses are really worth in the mean, exactly."""
        return (self.logits.softmax(-1) * self.gold).sum(-1).mean().item()

    @override
    def training_step(self, prompts: Tensor, batch_idx: int) -> Tensor:
        logps = self.logits[prompts].log_softmax(-1)
        sampled = torch.multinomial(logps.exp(), SAMPLES, replacement=True)
        rewards = self.reward[prompts].gather(1, sampled)
        observe(self, RewardObservation(rewards=rewards.flatten(), prompt_ids=prompts.repeat_interleave(SAMPLES)))
        advantages = (rewards - rewards.mean(1, keepdim=True)) * SAMPLES / (SAMPLES - 1)
        return -(advantages * logps.gather(1, sampled)).mean()

    @override
    def configure_optimizers(self) -> torch.optim.Optimizer:
        # Plain steps: Adam would divide the size of the gradient out again, at least for a policy without noise.
        return torch.optim.SGD(self.parameters(), lr=LEARNING_RATE)


class Curves(Callback):
    """Keeps what the policy is worth and what the monitor says, by update."""

    def __init__(self, policy: TabularPolicy) -> None:
        self.gold = [policy.gold_reward()]
        self.whitened: list[float] = []

    @override
    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any) -> None:  # Any: of the hook
        assert isinstance(pl_module, TabularPolicy)
        self.gold.append(pl_module.gold_reward())
        self.whitened.append(trainer.callback_metrics[WHITENED.name].item())


class Run(NamedTuple):
    """One policy taught by one reward."""

    accuracy: float
    gold: list[float]
    whitened: list[float]
    alerts: dict[str, int]  # name -> update at which it was raised


def teach(name: str, world: Teachers, *, updates: int, seed: int, folder: Path) -> Run:
    """Train a policy by one of the rewards, watched by the monitor."""
    L.seed_everything(seed, verbose=False)
    policy = TabularPolicy(world.rewards[name], world)
    monitor, curves = RewardVarianceMonitor(every_n_updates=1), Curves(policy)
    trainer = L.Trainer(
        accelerator="cpu",
        max_steps=updates,
        callbacks=[monitor, curves],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder / name,
    )
    prompts: Any = [torch.arange(PROMPTS)] * updates  # Any: a list is a data set
    trainer.fit(policy, DataLoader(prompts, batch_size=None))
    prompt_ids = torch.arange(PROMPTS).repeat_interleave(RESPONSES)
    pairs = compare_pairs(world.rewards[name].flatten(), prompt_ids, world.gold.flatten())
    alerts = {alert.name: alert.step for alert in monitor.alerts}
    return Run(pairs.accuracy.item(), curves.gold, curves.whitened, alerts)


def plot(runs: dict[str, Run], out: Path) -> None:
    """What the monitor said, and what came of it."""
    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, (said, learned) = plt.subplots(1, 2, figsize=(9, 3.5), layout="constrained")
    for name, run in runs.items():
        said.plot(range(1, len(run.whitened) + 1), run.whitened, label=name)
        learned.plot(run.gold, label=f"{name} (accuracy {run.accuracy:.2f})")
    said.axhline(0.05, color="grey", linestyle=":", label="alert below")
    said.set(xlabel="update", ylabel=WHITENED.name, yscale="log", title="What the monitor says")
    learned.set(xlabel="update", ylabel="gold reward", title="What the policy learns")
    for axes in (said, learned):
        axes.legend()
    figure.savefig(out, dpi=120)
    plt.close(figure)


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:  # Any: numbers and names
    """Teach the policy by each reward and compare.

    Args:
        argv: Command line; the process's own if not given.

    Returns:
        By reward: accuracy, whitened variance of the first updates, gold reward at the start and the end, alerts; and the
        largest relative speed that the monitor's first numbers leave the flat reward.
    """
    parser = argparse.ArgumentParser(description="Two perfectly accurate reward models, of which one hardly teaches.")
    parser.add_argument("--updates", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("reward_variance.png"), help="figure to write")
    args = parser.parse_args(argv)
    world = build_world(args.seed)
    with readable_terminal(), tempfile.TemporaryDirectory() as folder:
        runs = {name: teach(name, world, updates=args.updates, seed=args.seed, folder=Path(folder)) for name in world.rewards}
    plot(runs, args.out)
    results: dict[str, Any] = {  # Any: as returned
        name: {
            "accuracy": run.accuracy,
            "whitened_at_start": sum(run.whitened[:EARLY_UPDATES]) / EARLY_UPDATES,
            "gold_at_start": run.gold[0],
            "gold_at_end": run.gold[-1],
            "alerts": run.alerts,
        }
        for name, run in runs.items()
    }
    _, results["flat_speed_bound"] = relative_speed([results[name]["whitened_at_start"] for name in ("spread", "flat")])
    console = Console()
    for name in runs:
        found = results[name]
        console.print(
            f"{name}: accuracy {found['accuracy']:.2f}, whitened variance of the first {EARLY_UPDATES} updates "
            f"{found['whitened_at_start']:.4f}, gold reward {found['gold_at_start']:.3f} -> {found['gold_at_end']:.3f}, "
            f"alerts {found['alerts'] or 'none'}",
            soft_wrap=True,
        )
    console.print(f"figure: {args.out}", soft_wrap=True)
    return results


if __name__ == "__main__":
    main()
