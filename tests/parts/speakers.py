"""A module that observes pairs, and monitors that eat them: small parts for tests of the frame."""

from __future__ import annotations

import tempfile
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from typing_extensions import override

from lightning_pref import Observation, PairObservation, observe
from lightning_pref.callbacks.monitor import Monitor
from lightning_pref.measures.means import WeightedMeans


class PairRegression(L.LightningModule):
    """Somebody's own module with dropout: learns a score for pairs of vectors and says what it saw."""

    def __init__(self, *, says: bool = True) -> None:
        super().__init__()
        self.says = says
        self.layer = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.BatchNorm1d(8), nn.Linear(8, 1))

    def pair(self, batch: Tensor) -> PairObservation:
        """Scores of both sides as if they were log-probabilities."""
        scores = self.layer(batch[:, :4])[:, 0], self.layer(batch[:, 4:8])[:, 0]
        return PairObservation(chosen_logps=scores[0], rejected_logps=scores[1], row_ids=batch[:, 8].long())

    def _step(self, batch: Tensor) -> Tensor:
        seen = self.pair(batch)
        if self.says:
            observe(self, seen)
        return -nn.functional.logsigmoid(seen.chosen_logps - seen.rejected_logps).mean()

    @override
    def training_step(self, batch: Tensor, batch_idx: int) -> dict[str, Tensor]:
        return {"loss": self._step(batch), "inputs": batch[:, 0]}

    @override
    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self._step(batch)

    @override
    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=0.01)


class MeanChosen(Monitor[WeightedMeans]):
    """The mean of the chosen log-probabilities and the number of pairs."""

    prefix = "mean"
    consumes = (PairObservation,)

    @override
    def new_accumulator(self) -> WeightedMeans:
        return WeightedMeans(["chosen", "margin"])

    @override
    def update(self, accumulator: WeightedMeans, observation: Observation) -> None:
        assert isinstance(observation, PairObservation)
        margin = observation.chosen_logps - observation.rejected_logps
        accumulator.update({"chosen": observation.chosen_logps, "margin": margin}, torch.ones_like(margin))

    @override
    def summarize(self, accumulator: WeightedMeans) -> dict[str, Tensor]:
        means = accumulator.compute()
        return {"mean/chosen": means["chosen"], "mean/margin": means["margin"], "mean/pairs": accumulator.weights[0]}


def pair_rows(num_rows: int = 24, *, seed: int = 0) -> Tensor:
    """Random pairs of vectors with their row id at the end, [N, 9]."""
    generator = torch.Generator().manual_seed(seed)
    return torch.cat([torch.randn(num_rows, 8, generator=generator), torch.arange(num_rows)[:, None]], dim=1)


def pair_loader(num_rows: int = 24, *, batch_size: int = 4, seed: int = 0) -> DataLoader[Tensor]:
    """Those rows in order."""
    rows = pair_rows(num_rows, seed=seed)
    return DataLoader(list(rows), batch_size=batch_size)  # type: ignore[arg-type]


def quiet_trainer(**settings: Any) -> L.Trainer:
    """A CPU trainer that prints and writes nothing unless asked to."""
    defaults: dict[str, Any] = {
        "accelerator": "cpu",
        "devices": 1,
        "max_epochs": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "default_root_dir": tempfile.gettempdir(),
    }
    return L.Trainer(**{**defaults, **settings})
