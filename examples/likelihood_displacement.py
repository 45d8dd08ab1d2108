"""Likelihood displacement in miniature: why preferred answers lose probability, and how CHES tells which pairs will do it.

Two experiments, after Razin et al. 2024 (arXiv 2410.08847):

one token     A softmax over No, Never, Yes and five more tokens, h and W both trained to prefer No to Never. Where the two are
              close in meaning, the loss falls, and the probability of No falls with it: Yes, the opposite, takes all of it. Where
              they are opposed, No rises.
a tiny model  A transformer that answers with synonyms of No or of Yes learns from pairs of which half are two ways to say No. It
              is trained on all of them, on those that are left when the half with the highest length-normalised CHES is dropped,
              and on that half alone; a fixed set of pairs is watched all the time.

    python examples/likelihood_displacement.py --out runs/likelihood_displacement

writes `likelihood_displacement.png` there and takes a few seconds on one CPU core.
"""

from __future__ import annotations

import argparse
import copy
import json
import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import lightning as L
import matplotlib as mpl
import numpy as np
import torch
from lightning.pytorch.loggers.logger import Logger
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM
from typing_extensions import override

from lightning_pref import PairObservation
from lightning_pref.callbacks import LikelihoodDisplacementTracker, Probe
from lightning_pref.data.filtering import highest_rows, parse_share
from lightning_pref.data.groups import GroupBatch, PromptGroup
from lightning_pref.losses import PairLogps, preference_loss
from lightning_pref.models.pair_scores import pair_observation
from lightning_pref.models.pair_table import score_pairs
from lightning_pref.modules import DPOModule, SFTModule
from lightning_pref.modules.optimisation import OptimizerSettings
from lightning_pref.reports.console import readable_terminal

mpl.use("Agg")

import matplotlib.pyplot as plt

NO, NEVER, YES = 0, 1, 2
NUM_TOKENS, WIDTH = 8, 16

# The tiny model's vocabulary: an end, words of questions, and two clusters of answers whose words mean the same.
END, QUESTION = 0, np.arange(1, 25)
REFUSING, AGREEING = np.arange(25, 33), np.arange(33, 41)
VOCABULARY = 41

CHANGE = "probe/pairs/displacement/chosen_logp_change"


class TokenCurves(NamedTuple):
    """One run of the one-token experiment."""

    loss: Tensor  # [updates + 1], nats
    probabilities: Tensor  # [updates + 1, NUM_TOKENS]


def one_token(seed: int, *, similar: bool, updates: int = 400, learning_rate: float = 0.002) -> TokenCurves:
    """Gradient descent on the DPO loss of (No, Never) with logits W h, both trained, in float64.

    Hidden states are short against the rows of W, as in language models with their many more tokens than dimensions in use, so
    that h moves faster than W. With a long h and short rows W would move instead, each token by itself, and nothing is displaced.

    Args:
        seed: Of the directions and of the other tokens.
        similar: Whether the row of Never lies beside that of No, or opposite.
        updates: Steps of gradient descent.
        learning_rate: Of both.
    """
    generator = torch.Generator().manual_seed(seed)

    def draw(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, dtype=torch.float64)

    meaning, nuance = torch.linalg.qr(draw(WIDTH, WIDTH))[0][:2]
    never = (meaning if similar else -meaning) - 0.15 * nuance
    named = torch.stack([meaning + 0.15 * nuance, never, 0.3 * meaning + 1.2 * nuance])
    others = 0.3 * draw(NUM_TOKENS - len(named), WIDTH) / WIDTH**0.5
    unembedding = (8.0 * torch.cat([named, others])).requires_grad_()
    hidden = (2.5 / 8.0 * meaning + 0.02 * draw(WIDTH)).requires_grad_()
    losses, probabilities = [], []
    reference = (unembedding @ hidden).log_softmax(0).detach()
    for _ in range(updates + 1):
        logps = (unembedding @ hidden).log_softmax(0)
        pair = PairLogps(logps[None, NO], logps[None, NEVER], reference[None, NO], reference[None, NEVER])
        loss = preference_loss("sigmoid", pair, beta=1.0).sum()
        losses.append(loss.detach())
        probabilities.append(logps.detach().exp())
        steps = torch.autograd.grad(loss, (unembedding, hidden))
        with torch.no_grad():
            unembedding -= learning_rate * steps[0]
            hidden -= learning_rate * steps[1]
    return TokenCurves(torch.stack(losses), torch.stack(probabilities))


class Curves(Logger):
    """A logger that keeps every value with its step."""

    def __init__(self) -> None:
        super().__init__()
        self.entries: list[tuple[int, dict[str, float]]] = []

    @property
    @override
    def name(self) -> str:
        return "curves"

    @property
    @override
    def version(self) -> str:
        return ""

    @override
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        self.entries.append((step or 0, dict(metrics)))

    @override
    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:  # Any: Lightning's own signature
        """There are none to keep."""

    def series(self, key: str) -> list[tuple[int, float]]:
        """Steps and values of one key."""
        return [(step, metrics[key]) for step, metrics in self.entries if key in metrics]


def build_model(seed: int) -> LlamaForCausalLM:
    """A two-layer Llama whose words of one meaning begin close to each other, as those of a pretrained model are."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=32,
        initializer_range=0.1,
    )
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for weight in (model.lm_head.weight, model.model.embed_tokens.weight):
            for cluster in (REFUSING, AGREEING):
                weight[cluster] = 0.2 * (torch.randn(64) + 0.3 * torch.randn(len(cluster), 64))
    return model


def draw_groups(seed: int, num_demonstrations: int, num_pairs: int) -> tuple[list[PromptGroup], list[PromptGroup]]:
    """Demonstrations that refuse in seven of ten cases, and pairs that prefer a refusal: to another one, or to agreement."""
    generator = np.random.default_rng(seed)

    def prompt() -> NDArray[np.int64]:
        return generator.choice(QUESTION, 3)

    def answer(cluster: NDArray[np.int64]) -> NDArray[np.int64]:
        return np.append(generator.choice(cluster, generator.integers(3, 6)), END)

    demonstrations = [
        PromptGroup(row_id=i, prompt=prompt(), responses=(answer(REFUSING if generator.random() < 0.7 else AGREEING),))
        for i in range(num_demonstrations)
    ]
    pairs = [
        PromptGroup(
            row_id=i,
            prompt=prompt(),
            responses=(answer(REFUSING), answer(AGREEING if i % 2 else REFUSING)),
            ranks=(0, 1),
            source="No over Yes" if i % 2 else "No over Never",
        )
        for i in range(num_pairs)
    ]
    return demonstrations, pairs


def batched(groups: Sequence[PromptGroup], size: int) -> list[GroupBatch]:
    """The groups in batches of `size`, in order."""
    return [GroupBatch.from_groups(groups[start : start + size]) for start in range(0, len(groups), size)]


def observed(module: DPOModule, batch: GroupBatch) -> PairObservation:
    """What the probe measures."""
    return pair_observation(module.policy, batch)


def fit(module: L.LightningModule, batches: list[GroupBatch], **settings: Any) -> None:  # Any: the Trainer's own settings
    """One pass over the batches with a real Trainer."""
    trainer = L.Trainer(
        max_epochs=1,
        accelerator="cpu",
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **settings,
    )
    loader: DataLoader[Any] = DataLoader(batches, batch_size=None)  # type: ignore[arg-type]  # a list is data set enough
    trainer.fit(module, loader)


@torch.no_grad()
def share_of_agreement(model: LlamaForCausalLM, pairs: Sequence[PromptGroup]) -> float:
    """Probability that an answer begins with a word of agreement, mean over the prompts."""
    prompts = torch.from_numpy(np.stack([group.prompt for group in pairs]))
    return float(model(prompts).logits[:, -1].softmax(-1)[:, torch.from_numpy(AGREEING)].sum(-1).mean())


def alerts_of(folder: Path) -> list[str]:
    """Names of the alerts of a run."""
    path = folder / "alerts.jsonl"
    return sorted({json.loads(line)["name"] for line in path.read_text().splitlines()}) if path.exists() else []


@contextmanager
def quietly() -> Iterator[None]:
    """Alerts go to their files only, and Lightning keeps its remarks on every single Trainer to itself."""
    loggers = [logging.getLogger(name) for name in ("lightning_pref.alerts", "lightning.pytorch")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL + 1)
    try:
        with readable_terminal():
            warnings.filterwarnings("ignore", message="You defined a `validation_step` but have no", category=UserWarning)
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def tiny_model(
    seed: int, folder: Path, *, drop_top: str = "50%", updates: int = 60, num_pairs: int = 256
) -> dict[str, Any]:  # Any: numbers, curves and lists by name
    """Fine-tune, score all pairs, then run DPO from the same start on three sets of the same size.

    Args:
        seed: Of weights, rows and their order.
        folder: Where alerts are written, in a folder for each set.
        drop_top: Share of the pairs to drop, as `python -m lightning_pref ches --drop-top` takes it.
        updates: Of each DPO run, 16 pairs each.
        num_pairs: Scored pairs.
    """
    demonstrations, pairs = draw_groups(seed, 3200, num_pairs)
    model = build_model(seed)
    sft_settings = OptimizerSettings(learning_rate=3e-3)
    fit(SFTModule(model, optimizer=sft_settings), batched(demonstrations, 32), logger=False, default_root_dir=folder)
    scores = score_pairs(model, batched(pairs, 64), beta=0.1)
    normalized = scores["length_normalized_ches"]
    top = highest_rows(scores["row_id"].tolist(), normalized.tolist(), parse_share(drop_top))
    generator = np.random.default_rng(seed)
    kept_rows = [row for row in range(num_pairs) if row not in top]
    size = min(len(top), len(kept_rows))  # as many different pairs in every run
    sets = {"kept": kept_rows, "all": list(range(num_pairs)), "top": sorted(top)}
    start, agreement = copy.deepcopy(model.state_dict()), share_of_agreement(model, pairs)
    runs: dict[str, dict[str, Any]] = {}  # Any: a curve and numbers
    for name, rows in sets.items():
        model.load_state_dict(start)
        chosen_rows = generator.choice(rows, size, replace=False)
        order = np.concatenate([generator.permutation(chosen_rows) for _ in range(updates * 16 // size + 1)])[: updates * 16]
        curves = Curves()
        (folder / name / "alerts.jsonl").unlink(missing_ok=True)  # of a run before this one
        fit(
            DPOModule(model, beta=0.1, optimizer=OptimizerSettings(learning_rate=5e-4, schedule="constant")),
            batched([pairs[row] for row in order], 16),
            logger=curves,
            default_root_dir=folder / name,
            callbacks=[
                LikelihoodDisplacementTracker(),
                Probe("pairs", batched(pairs, 64), observed, every_n_updates=5, budget=None),
            ],
        )
        series = curves.series(CHANGE)
        runs[name] = {
            "curve": series,
            "change": series[-1][1],
            "agreement": share_of_agreement(model, pairs),
            "alerts": alerts_of(folder / name),
        }
    is_similar = scores["source"] == "No over Never"
    return {
        "ches": {"No over Never": float(normalized[is_similar].mean()), "No over Yes": float(normalized[~is_similar].mean())},
        "scores": {"No over Never": normalized[is_similar].tolist(), "No over Yes": normalized[~is_similar].tolist()},
        "agreement_before": agreement,
        "runs": runs,
    }


COLORS = {"kept": "tab:green", "all": "tab:gray", "top": "tab:red"}
LABELS = {"kept": "without the top by CHES", "all": "all pairs", "top": "the top by CHES only"}
TOKENS = {"No (chosen)": NO, "Never (rejected)": NEVER, "Yes": YES}


def mean_curve(
    found: Sequence[dict[str, Any]], name: str
) -> tuple[list[int], NDArray[np.float64]]:  # Any: as `tiny_model` returns
    """Updates, and the mean over seeds of the change of chosen log-probabilities."""
    curves = [run["runs"][name]["curve"] for run in found]
    return [step for step, _ in curves[0]], np.array([[value for _, value in curve] for curve in curves]).mean(0)


def plot(tokens: Mapping[str, TokenCurves], found: Sequence[dict[str, Any]], path: Path) -> None:  # Any: as `tiny_model` returns
    """All four panels in one figure."""
    figure, axes = plt.subplots(2, 2, figsize=(10, 7), layout="constrained")
    for axis, (name, curves) in zip(axes[0], tokens.items(), strict=True):
        for label, token in TOKENS.items():
            axis.plot(curves.probabilities[:, token], label=label)
        axis.plot(curves.loss, color="black", linestyle=":", label="DPO loss")
        axis.set(title=f"one token: {name} pair", xlabel="update", ylabel="probability, loss in nats", ylim=(0, 1))
    axes[0, 0].legend()
    for name, scores in found[0]["scores"].items():
        axes[1, 0].hist(scores, bins=30, alpha=0.7, label=name)
    axes[1, 0].set(title="tiny model: scores before training", xlabel="length-normalised CHES", ylabel="pairs")
    axes[1, 0].legend()
    for name, label in LABELS.items():
        axes[1, 1].plot(*mean_curve(found, name), color=COLORS[name], label=label)
    axes[1, 1].axhline(0, color="black", linewidth=0.5)
    axes[1, 1].set(title="tiny model: DPO", xlabel="update", ylabel="change of chosen log-probability, nats")
    axes[1, 1].legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def print_results(tokens: Mapping[str, TokenCurves], found: Sequence[dict[str, Any]], console: Console) -> None:  # Any: as above
    """Both experiments as tables."""
    one = Table("one token", "DPO loss", "p(No)", "p(Never)", "p(Yes)", box=None, pad_edge=False)
    for name, curves in tokens.items():
        probabilities = [
            f"{curves.probabilities[0, token]:.3f} -> {curves.probabilities[-1, token]:.3f}" for token in TOKENS.values()
        ]
        one.add_row(f"{name} pair", f"{curves.loss[0]:.3f} -> {curves.loss[-1]:.3f}", *probabilities)
    console.print(one)
    console.print()
    before = np.mean([run["agreement_before"] for run in found])
    tiny = Table(
        f"tiny model, {len(found)} seeds", "chosen log-prob", "p(agreeing)", "displacement alert", box=None, pad_edge=False
    )
    for name, label in LABELS.items():
        runs = [run["runs"][name] for run in found]
        change, agreement = (np.mean([run[key] for run in runs]) for key in ("change", "agreement"))
        alarmed = sum(any(alert.startswith("displacement/chosen_falls") for alert in run["alerts"]) for run in runs)
        tiny.add_row(label, f"{change:+.2f} nats", f"{before:.2f} -> {agreement:.2f}", f"in {alarmed} of {len(runs)} runs")
    console.print(tiny)


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:  # Any: numbers, curves and lists by name
    """Run both experiments, print and plot them, and return their numbers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--out", type=Path, default=Path("runs/likelihood_displacement"), help="folder of the figure and the alerts"
    )
    parser.add_argument("--seeds", type=int, default=3, help="repetitions of the second experiment")
    parser.add_argument("--drop-top", default="50%", help="share of the pairs to drop by length-normalised CHES")
    asked = parser.parse_args(argv)
    asked.out.mkdir(parents=True, exist_ok=True)
    tokens = {"similar": one_token(0, similar=True), "dissimilar": one_token(0, similar=False)}
    with quietly():
        found = [tiny_model(seed, asked.out / f"seed-{seed}", drop_top=asked.drop_top) for seed in range(asked.seeds)]
    console = Console()
    print_results(tokens, found, console)
    figure = asked.out / "likelihood_displacement.png"
    plot(tokens, found, figure)
    console.print(f"figure: {figure}", highlight=False, soft_wrap=True)
    one = {
        name: {"loss": curves.loss.tolist(), "probabilities": curves.probabilities.tolist()} for name, curves in tokens.items()
    }
    return {"one_token": one, "tiny_model": found, "figure": str(figure)}


if __name__ == "__main__":
    main()
