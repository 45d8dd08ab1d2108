"""A reward model and an ensemble of five, optimised until it hurts: python examples/overoptimization.py --out figure.png.

A miniature of "Reward model ensembles help mitigate overoptimization" (Coste et al. 2023, arXiv 2310.02743). A response is a
point in four dimensions, and the gold reward a direction in it less a quadratic cost of leaving the origin. In each of 64
independent worlds, with a direction of its own, five reward models are trained with the Bradley-Terry loss on bootstrapped
samples of the same 60 pairs, a quarter of them labelled wrongly. Their rewards, standardised on responses of the initial
policy, become four proxies: one member (single), their mean, their minimum (wco), and their mean less half their variance
(uwo). Each proxy is optimised in two ways, over the same 4000 responses:

* best-of-n, n from 1 to 4000, by the unbiased estimator;
* policy gradient, by a small softmax policy that begins uniform, without a KL penalty.

Both times every proxy rises and rises. The gold reward of the single model passes a peak and falls, to where it began or
below; the mean loses most of its gain, too. The two that mistrust responses over which the members disagree keep most of it.
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

from lightning_pref.functional.advantages import rloo_advantages
from lightning_pref.losses.ensemble import How, ensemble_reward, standardized_members
from lightning_pref.losses.policy import reinforce
from lightning_pref.losses.reward import bradley_terry
from lightning_pref.measures.overoptimization import best_of_n_curve, fit_gao, kl_of_best_of_n, past_peak
from lightning_pref.reports.console import readable_terminal

WORLDS, MEMBERS, DIMENSIONS, PAIRS = 64, 5, 4, 60
# Of leaving the origin: its weight in the gold reward, against 1 of the direction.
COST = 0.65
LABEL_NOISE = 0.25
MEMBER_UPDATES, MEMBER_LEARNING_RATE = 200, 0.05
# Of the uwo proxy: weight of the variance between the members.
COEFFICIENT = 0.5
RESPONSES, REFERENCES = 4000, 2000
GRID = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4000)
# Of the policy: responses it samples in each world and update.
SAMPLES, LEARNING_RATE = 64, 0.01
EVERY_N_UPDATES = 5
# By how much a mean gold reward must have fallen for its peak to have passed, in standard deviations of the gold reward.
TOLERANCE = 0.1
PROXIES = ("single", "mean", "wco", "uwo")


class Gold(NamedTuple):
    """What responses are really worth: a direction per world, [W, 1, D], of length 1."""

    direction: Tensor

    def __call__(self, responses: Tensor) -> Tensor:
        """[W, M, D] -> [W, M], mean 0 and variance 1 over the responses of the initial policy, a standard normal."""
        squares = (responses.square().sum(-1) - DIMENSIONS) / (2 * DIMENSIONS) ** 0.5
        # Uncorrelated, and of variance 1 each.
        return ((responses * self.direction).sum(-1) - COST * squares) / (1 + COST**2) ** 0.5


def features(responses: Tensor) -> Tensor:
    """What reward models and policies see: the coordinates and their squares, [..., D] -> [..., 2 D].

    Of mean 0 and variance 1 each under the initial policy.
    """
    return torch.cat([responses, (responses.square() - 1) / 2**0.5], -1)


class RewardModels(L.LightningModule):
    """Five reward models in each world, linear in the coordinates and their squares, [W, K, 2 D]."""

    def __init__(self) -> None:
        super().__init__()
        self.weights = nn.Parameter(torch.zeros(WORLDS, MEMBERS, 2 * DIMENSIONS))

    @override
    def forward(self, responses: Tensor) -> Tensor:
        """The members' scores, [W, K, M, D] or [W, 1, M, D] -> [W, K, M]."""
        return (features(responses) @ self.weights[..., None]).squeeze(-1)

    @override
    def training_step(self, pairs: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        chosen, rejected = (self(responses).flatten() for responses in pairs)
        # A sum over the models and a mean over the pairs of each: every model is trained as if it were alone.
        return bradley_terry(chosen, rejected).sum() / PAIRS

    @override
    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=MEMBER_LEARNING_RATE)


class Scored(NamedTuple):
    """Responses of the initial policy, scored."""

    responses: Tensor  # [W, M, D]
    gold: Tensor  # [W, M]
    proxies: dict[str, Tensor]  # [W, M] each
    accuracy: float  # of the members, on fresh pairs without label noise


class LinearPolicy(L.LightningModule):
    """A softmax over the responses of each world, its logits linear in their features; uniform at first.

    Responses share the features, so that what is learnt from one changes the others, as in a language model. With a logit of
    its own for each, the first that does well would take all.
    """

    def __init__(self, responses: Tensor, reward: Tensor) -> None:
        super().__init__()
        self.features, self.reward = features(responses), reward
        self.weights = nn.Parameter(torch.zeros(WORLDS, 2 * DIMENSIONS))

    @override
    def forward(self) -> Tensor:
        """Log-probabilities of all responses, [W, M]."""
        return (self.features @ self.weights[..., None]).squeeze(-1).log_softmax(-1)

    @override
    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        logps = self()
        sampled = torch.multinomial(logps.exp(), SAMPLES, replacement=True)
        advantages = rloo_advantages(self.reward.gather(1, sampled))
        return reinforce(logps.gather(1, sampled), advantages).mean(1).sum()

    @override
    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=LEARNING_RATE)


class Curve(NamedTuple):
    """Means over the worlds while a proxy is optimised, [M] each."""

    distance: Tensor  # square root of the KL to the initial policy, in nats
    proxy: Tensor
    gold: Tensor


class Recorder(Callback):
    """Keeps how far the policy has come and what that is worth, exactly and not from samples."""

    def __init__(self, gold: Tensor) -> None:
        self.gold = gold
        self.rows: list[tuple[float, float, float]] = []

    @override
    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.record(pl_module)

    @override
    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any) -> None:  # Any: of the hook
        if trainer.global_step % EVERY_N_UPDATES == 0:
            self.record(pl_module)

    def record(self, policy: L.LightningModule) -> None:
        assert isinstance(policy, LinearPolicy)
        logps = policy().detach()
        # The initial policy is uniform.
        kl = (logps.exp() * logps).sum(-1).mean() + torch.tensor(RESPONSES).log()
        proxy, gold = ((logps.exp() * reward).sum(-1).mean() for reward in (policy.reward, self.gold))
        self.rows.append((kl.clamp(min=0.0).sqrt().item(), proxy.item(), gold.item()))

    def curve(self) -> Curve:
        return Curve(*torch.tensor(self.rows).T)


def fit(module: L.LightningModule, batch: Any, updates: int, *callbacks: Callback) -> None:  # Any: tensors or tuples of them
    """Train on the same batch again and again."""
    with tempfile.TemporaryDirectory() as folder:
        trainer = L.Trainer(
            accelerator="cpu",
            max_steps=updates,
            callbacks=list(callbacks),
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=folder,
        )
        batches: Any = [batch] * updates  # Any: a list is a data set
        trainer.fit(module, DataLoader(batches, batch_size=None))


def noisy_pairs(gold: Gold, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Chosen and rejected responses for each member, [W, K, B, D]: drawn with replacement from the pairs of its world."""
    first, second = torch.randn(2, WORLDS, PAIRS, DIMENSIONS, generator=generator)
    is_flipped = torch.rand(WORLDS, PAIRS, generator=generator) < LABEL_NOISE
    first_wins = ((gold(first) > gold(second)) ^ is_flipped)[..., None]
    drawn = torch.randint(PAIRS, (WORLDS, MEMBERS, PAIRS), generator=generator)
    world = torch.arange(WORLDS)[:, None, None]
    chosen, rejected = torch.where(first_wins, first, second), torch.where(first_wins, second, first)
    return chosen[world, drawn], rejected[world, drawn]


@torch.no_grad()
def score(models: RewardModels, gold: Gold, generator: torch.Generator) -> Scored:
    """Sample from the initial policy and score what comes by the gold reward and all proxies."""
    reference, responses = torch.randn(WORLDS, REFERENCES + RESPONSES, DIMENSIONS, generator=generator).split(
        [REFERENCES, RESPONSES], dim=1
    )
    known = models(reference[:, None])
    is_right = (known[..., ::2] > known[..., 1::2]) == (gold(reference)[:, ::2] > gold(reference)[:, 1::2])[:, None]
    # Members first: a world's models are members of their own, [W K, M].
    flat = models(responses[:, None]).flatten(0, 1)
    standardized = standardized_members(flat, known.mean(-1).flatten(), known.std(-1).flatten())
    members = standardized.unflatten(0, (WORLDS, MEMBERS)).transpose(0, 1)
    ensembles: tuple[How, ...] = ("mean", "wco", "uwo")
    proxies = {how: ensemble_reward(members, how, coefficient=COEFFICIENT) for how in ensembles}
    return Scored(responses, gold(responses), {"single": members[0], **proxies}, is_right.double().mean().item())


def by_best_of_n(proxy: Tensor, gold: Tensor) -> Curve:
    """Proxy and gold reward of the best of n, mean over the worlds."""
    risen, worth = (
        torch.stack([best_of_n_curve(*rewards, GRID) for rewards in zip(proxy, values, strict=True)]).mean(0)
        for values in (proxy, gold)
    )
    return Curve(torch.tensor([kl_of_best_of_n(n) for n in GRID]).sqrt(), risen, worth)


def by_policy_gradient(name: str, scored: Scored, updates: int, seed: int) -> Curve:
    """Proxy and gold reward of a policy that learns from the proxy, mean over the worlds."""
    L.seed_everything(seed, verbose=False)
    recorder = Recorder(scored.gold)
    fit(LinearPolicy(scored.responses, scored.proxies[name]), torch.zeros(1), updates, recorder)
    return recorder.curve()


def summary(curve: Curve, form: str) -> dict[str, Any]:  # Any: numbers, a verdict and the curve itself
    """Where a curve peaks and ends, and what the fit makes of it."""
    peak = int(curve.gold.argmax())
    fitted = fit_gao(curve.distance, curve.gold - curve.gold[0], "bon" if form == "bon" else "rl")
    return {
        "distance": curve.distance.tolist(),
        "proxy": curve.proxy.tolist(),
        "gold": curve.gold.tolist(),
        "peak": curve.gold[peak].item(),
        "peak_distance": curve.distance[peak].item(),
        "end": curve.gold[-1].item(),
        # Means over thousands of responses, or exact: nothing to smooth.
        "past_peak": past_peak(curve.proxy, curve.gold, tolerance=TOLERANCE, window=1),
        "alpha": fitted.alpha,
        "beta": fitted.beta,
        "fitted_optimum": fitted.optimum()[0],
    }


def plot(results: dict[str, dict[str, Any]], out: Path) -> None:  # Any: summaries
    """Gold reward, and the proxy that believes in itself, over the distance to the initial policy."""
    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(10, 4), layout="constrained", sharey=True)
    for panel, (form, title) in zip(axes, {"bon": "best-of-n", "rl": "policy gradient"}.items(), strict=True):
        for number, (name, found) in enumerate(results[form].items()):
            panel.plot(found["distance"], found["gold"], color=f"C{number}", label=name)
            panel.plot(found["distance"], found["proxy"], color=f"C{number}", linestyle=":", linewidth=1)
        panel.axhline(0.0, color="grey", linewidth=0.5)
        panel.set(xlabel="sqrt(KL to the initial policy)", title=title, ylim=(-1.5, 3.0))
        panel.legend()
    axes[0].set(ylabel="gold reward (dotted: proxy), standard deviations")
    figure.savefig(out, dpi=120)
    plt.close(figure)


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:  # Any: numbers and curves
    """Train the reward models, optimise each proxy in both ways, and compare.

    Args:
        argv: Command line; the process's own if not given.

    Returns:
        `accuracy` of the members; under `bon` and `rl` by proxy: `distance` (square root of the KL), `proxy` and `gold` along
        it, gold at the `peak` (at `peak_distance`) and the `end`, whether it is `past_peak`, and `alpha`, `beta` and
        `fitted_optimum` of the fit.
    """
    parser = argparse.ArgumentParser(description="A reward model and an ensemble of five, optimised until it hurts.")
    parser.add_argument("--updates", type=int, default=300, help="of each policy")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("overoptimization.png"), help="figure to write")
    args = parser.parse_args(argv)
    generator = torch.Generator().manual_seed(args.seed)
    gold = Gold(nn.functional.normalize(torch.randn(WORLDS, 1, DIMENSIONS, generator=generator), dim=-1))
    models = RewardModels()
    with readable_terminal():
        fit(models, noisy_pairs(gold, generator), MEMBER_UPDATES)
        scored = score(models, gold, generator)
        results: dict[str, Any] = {"bon": {}, "rl": {}}  # Any: as returned
        for name in PROXIES:
            results["bon"][name] = summary(by_best_of_n(scored.proxies[name], scored.gold), "bon")
            results["rl"][name] = summary(by_policy_gradient(name, scored, args.updates, args.seed), "rl")
    plot(results, args.out)
    results["accuracy"] = scored.accuracy
    console = Console()
    console.print(f"accuracy of the members: {scored.accuracy:.2f}", soft_wrap=True)
    for form, title in {"bon": "best-of-n", "rl": "policy gradient"}.items():
        for name, found in results[form].items():
            console.print(
                f"{title}, {name}: gold reward {found['gold'][0]:.2f} -> peak {found['peak']:.2f} at sqrt(KL) "
                f"{found['peak_distance']:.2f} -> {found['end']:.2f} at {found['distance'][-1]:.2f} "
                f"(proxy {found['proxy'][-1]:.2f}), past its peak: {'yes' if found['past_peak'] else 'no'}, "
                f"fit alpha {found['alpha']:.2f}, beta {found['beta']:.2f}",
                soft_wrap=True,
            )
    console.print(f"figure: {args.out}", soft_wrap=True)
    return results


if __name__ == "__main__":
    main()
