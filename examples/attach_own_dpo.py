"""Watch your own DPO: a hand-written LightningModule gets the likelihood-displacement tracker.

Two ways lead there, and both give the same numbers: one line in the training step, or no edit at all and a function that reads
what the step returns.

    python examples/attach_own_dpo.py --out runs/attach_own_dpo
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import lightning as L
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_pref import PairObservation, observe
from lightning_pref.callbacks import LikelihoodDisplacementTracker, ObserveOutputs

VOCABULARY, PROMPT, RESPONSE = 50, 4, 6


class TinyLM(nn.Module):
    """Your model."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, 32)
        self.mix = nn.GRU(32, 32, batch_first=True)
        self.head = nn.Linear(32, VOCABULARY)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits, [B, T, V]."""
        return self.head(self.mix(self.embed(tokens))[0])


class MyDPO(L.LightningModule):
    """Your module: its own batch layout, its own names, no base class and no import of ours."""

    def __init__(self) -> None:
        super().__init__()
        self.policy = TinyLM()
        self.frozen = deepcopy(self.policy).requires_grad_(False)

    def answer_logps(self, model: nn.Module, tokens: Tensor) -> Tensor:
        """Log-probability of each answer behind its question, [2B]."""
        token_logps = model(tokens[:, :-1]).log_softmax(-1).gather(-1, tokens[:, 1:, None]).squeeze(-1)
        return token_logps[:, PROMPT - 1 :].sum(-1)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> dict[str, Tensor]:
        """Good answers first, then the bad ones."""
        tokens = torch.cat([batch["good"], batch["bad"]])
        now, before = self.answer_logps(self.policy, tokens), self.answer_logps(self.frozen, tokens)
        good, bad = (now - before).chunk(2)
        loss = -F.logsigmoid(0.5 * (good - bad)).mean()
        self.log("loss", loss)
        return {"loss": loss, "now": now, "before": before}

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Adam."""
        return torch.optim.Adam(self.policy.parameters(), lr=1e-2)


def pairs_of(outputs: dict[str, Tensor], batch: dict[str, Tensor]) -> PairObservation:
    """What the tracker needs, from what the step has."""
    chosen, rejected = outputs["now"].chunk(2)
    ref_chosen, ref_rejected = outputs["before"].chunk(2)
    lengths = torch.full_like(batch["number"], RESPONSE)
    return PairObservation(
        chosen_logps=chosen,
        rejected_logps=rejected,
        ref_chosen_logps=ref_chosen,
        ref_rejected_logps=ref_rejected,
        chosen_lengths=lengths,
        rejected_lengths=lengths,
        row_ids=batch["number"],
    )


class MyDPOWithOneLine(MyDPO):
    """The same module, if you may edit it."""

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> dict[str, Tensor]:
        """As before, and one line."""
        outputs = super().training_step(batch, batch_idx)
        observe(self, pairs_of(outputs, batch))  # the one new line
        return outputs


def questions(count: int = 64) -> list[dict[str, Any]]:
    """Pairs whose answers differ in one token only, as when a fact is corrected: such pairs displace."""
    generator = torch.Generator().manual_seed(0)
    good = torch.randint(VOCABULARY, (count, PROMPT + RESPONSE), generator=generator)
    bad = good.clone()
    bad[:, -1] = torch.randint(VOCABULARY, (count,), generator=generator)
    return [{"good": good[row], "bad": bad[row], "number": row} for row in range(count)]


def train(module: MyDPO, callbacks: list[Callback], folder: Path, epochs: int) -> dict[str, float]:
    """A usual run; the last values of the tracker."""
    trainer = L.Trainer(
        max_epochs=epochs,
        callbacks=callbacks,
        logger=TensorBoardLogger(folder.parent, folder.name, version=""),
        log_every_n_steps=4,
        accelerator="cpu",
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, DataLoader(questions(), batch_size=16, shuffle=True))
    return {key: value.item() for key, value in trainer.callback_metrics.items() if key.startswith("displacement/")}


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Train the same module twice, told and read."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/attach_own_dpo"), help="folder of the run")
    parser.add_argument("--epochs", type=int, default=15)
    options = parser.parse_args(argv)

    L.seed_everything(0)
    told = train(MyDPOWithOneLine(), [LikelihoodDisplacementTracker()], options.out / "one_line", options.epochs)
    L.seed_everything(0)
    read = train(MyDPO(), [LikelihoodDisplacementTracker(), ObserveOutputs(pairs_of)], options.out / "unedited", options.epochs)

    for key, value in told.items():
        print(f"{key:40} {value:8.3f}  read from outside: {read[key]:8.3f}")
    print(f"tensorboard --logdir {options.out}")
    return {"one_line": told, "unedited": read}


if __name__ == "__main__":
    main()
