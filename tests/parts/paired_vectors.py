"""A module whose pairs of responses are pairs of vectors: what training does to them is known in closed form."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import lightning as L
import torch
from lightning.pytorch.loggers import Logger
from torch import Tensor, nn
from torch.utils.data import DataLoader
from typing_extensions import override

from lightning_pref import Observation, Observer, PairHiddenObservation, PairObservation, observe, wants
from lightning_pref.callbacks import Diagnostic

# Features of chosen and rejected responses. `w . chosen` falls under DPO where <c, c> < <c, r>: the gradients are entangled.
ENTANGLED = ((1.0, 0.0), (1.5, 0.5))
APART = ((1.0, 0.0), (-0.5, 1.0))


class PairedVectors(L.LightningModule):
    """Log-probabilities -20 + w . x, trained by DPO with plain gradient descent; a stand-in for a language model.

    Args:
        pairs: Features of chosen and rejected responses by row, [N, 2, D].
        learning_rate: Of gradient descent.
        sign: -1 trains on swapped preferences while publishing the right ones.
        tells_reference: Publish log-probabilities under the reference, which is where training starts.
        tells_hidden: Publish hidden states where someone wants them.
    """

    def __init__(
        self,
        pairs: Tensor,
        *,
        learning_rate: float = 0.5,
        sign: float = 1.0,
        tells_reference: bool = True,
        tells_hidden: bool = True,
    ) -> None:
        super().__init__()
        self.pairs = pairs
        self.learning_rate = learning_rate
        self.sign = sign
        self.tells_reference = tells_reference
        self.tells_hidden = tells_hidden
        self.weight = nn.Parameter(torch.zeros(pairs.shape[-1]))

    def pair(self, rows: Tensor) -> PairObservation:
        """What the module says of rows."""
        chosen, rejected = (self.pairs[rows] @ self.weight - 20.0).unbind(1)
        reference = torch.full_like(chosen, -20.0).detach() if self.tells_reference else None
        return PairObservation(
            chosen_logps=chosen,
            rejected_logps=rejected,
            row_ids=rows + 1000,
            chosen_lengths=rows % 3 + 1,
            rejected_lengths=rows % 2 + 2,
            ref_chosen_logps=reference,
            ref_rejected_logps=reference,
        )

    def _step(self, rows: Tensor) -> Tensor:
        seen = self.pair(rows)
        observe(self, seen)
        if self.tells_hidden and wants(self, PairHiddenObservation):
            chosen, rejected = self.pairs[rows].unbind(1)
            lengths = {"chosen_lengths": rows % 3 + 1, "rejected_lengths": rows % 2 + 2}
            observe(
                self,
                PairHiddenObservation(chosen_hidden=chosen, rejected_hidden=rejected, row_ids=seen.row_ids, **lengths),
            )
        return nn.functional.softplus(-self.sign * (seen.chosen_logps - seen.rejected_logps)).mean()

    @override
    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self._step(batch)

    @override
    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self._step(batch)

    @override
    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=self.learning_rate)


def same_pairs(features: tuple[tuple[float, ...], tuple[float, ...]], num_rows: int = 8) -> Tensor:
    """Rows that are all the same pair, [N, 2, D]."""
    return torch.tensor(features).expand(num_rows, -1, -1).clone()


def random_pairs(num_rows: int = 8, *, seed: int = 0) -> Tensor:
    """Random features, [N, 2, 3]."""
    return torch.randn(num_rows, 2, 3, generator=torch.Generator().manual_seed(seed))


def row_loader(num_rows: int, batch_size: int = 4, *, shuffle_seed: int | None = None) -> DataLoader[Any]:
    """Row numbers in order, or shuffled once."""
    order = torch.arange(num_rows)
    if shuffle_seed is not None:
        order = torch.randperm(num_rows, generator=torch.Generator().manual_seed(shuffle_seed))
    return DataLoader(list(order), batch_size=batch_size)  # type: ignore[arg-type]


class ResumableRows:
    """A loader of row numbers that a run in the middle of an epoch can go on with."""

    def __init__(self, num_rows: int, batch_size: int = 4) -> None:
        self.batches = torch.arange(num_rows).split(batch_size)
        self.position = 0

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Tensor]:
        for batch in self.batches[self.position % len(self) :]:
            self.position += 1
            yield batch

    def state_dict(self) -> dict[str, int]:
        return {"position": self.position}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        self.position = state["position"]


class Notebook(Logger):
    """A logger that keeps everything."""

    def __init__(self) -> None:
        super().__init__()
        self.entries: list[tuple[int | None, dict[str, float]]] = []

    @property
    @override
    def name(self) -> str:
        return "notebook"

    @property
    @override
    def version(self) -> str:
        return ""

    @override
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        self.entries.append((step, dict(metrics)))

    @override
    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """Nothing."""

    def series(self, key: str) -> list[tuple[int | None, float]]:
        """Steps and values of one key."""
        return [(step, metrics[key]) for step, metrics in self.entries if key in metrics]


class Eavesdropper(L.Callback, Observer):
    """Keeps every pair observation with its source and the number of updates before it."""

    consumes: Any = (PairObservation,)

    def __init__(self) -> None:
        self.heard: list[tuple[str, int, Observation]] = []

    @override
    def on_observation(self, trainer: L.Trainer, pl_module: L.LightningModule, observation: Observation, source: str) -> None:
        self.heard.append((source, trainer.global_step, observation))


def names_of(diagnostic: Diagnostic) -> list[tuple[str, str]]:
    """Source and name of every alert."""
    return [(alert.source, alert.name) for alert in diagnostic.alerts]
