from __future__ import annotations

import random
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from speakers import MeanChosen, PairRegression, pair_loader, pair_rows, quiet_trainer
from torch import Tensor
from typing_extensions import override

from lightning_pref import PairObservation
from lightning_pref.callbacks import Probe
from lightning_pref.callbacks.probe import Budget, batches_of_rank, undisturbed
from lightning_pref.reports import RunRecord


class Noisy(PairRegression):
    """Draws from every random state in its step."""

    @override
    def training_step(self, batch: Tensor, batch_idx: int) -> dict[str, Tensor]:
        scale = 1 + 0.1 * (random.random() + np.random.random() + torch.rand(()).item())
        return super().training_step(batch * scale, batch_idx)


def greedy_score(module: Noisy, batch: Tensor) -> PairObservation:
    """Draws a lot, as a careless user's score function would."""
    random.random(), np.random.random(5), torch.rand(7)
    assert not module.training
    assert not torch.is_grad_enabled()
    return module.pair(batch)


def train(*callbacks: L.Callback, **settings: Any) -> tuple[dict[str, Tensor], L.Trainer]:
    L.seed_everything(3, verbose=False)
    module = Noisy()
    trainer = quiet_trainer(callbacks=list(callbacks), max_epochs=2, limit_val_batches=0, **settings)
    trainer.fit(module, pair_loader())
    return module.state_dict(), trainer


def test_M4_training_is_bit_identical_with_and_without_a_probe() -> None:
    alone, _ = train()
    probe = Probe("fixed", [pair_rows(6, seed=2)], greedy_score, every_n_updates=1, budget=None)
    watched, _ = train(probe, MeanChosen(every_n_updates=2))
    assert probe.updates == 12
    assert all(torch.equal(alone[name], watched[name]) for name in alone)


def test_a_probe_is_measured_before_the_first_update_at_its_cadence_and_after_the_last() -> None:
    record = RunRecord()
    steps: list[int] = []

    def score(module: Noisy, batch: Tensor) -> PairObservation:
        steps.append(module.trainer.global_step)
        return greedy_score(module, batch)

    train(Probe("fixed", [pair_rows(6, seed=2)], score, every_n_updates=5, budget=None), MeanChosen(), logger=record)
    assert steps == [0, 5, 10, 12]
    assert record.metrics["probe/fixed/mean/pairs"] == (6.0, 6.0)
    assert record.metrics["probe/fixed/time_share"].last > 0


def test_a_probe_that_costs_too_much_is_left_out_and_says_so() -> None:
    record = RunRecord()
    probe = Probe("slow", [pair_rows(6)] * 20, greedy_score, every_n_updates=1, budget=1e-6)
    train(probe, MeanChosen(), logger=record)
    assert probe.budget.skipped == 12
    assert record.metrics["probe/slow/skipped"].last == 12.0


def test_undisturbed_restores_random_states_and_modes_after_an_error() -> None:
    module = torch.nn.Sequential(torch.nn.Dropout(0.5), torch.nn.BatchNorm1d(3))
    module[1].eval()
    random.seed(0), np.random.seed(0), torch.manual_seed(0)
    expected = random.random(), np.random.random(), torch.rand(1)
    random.seed(0), np.random.seed(0), torch.manual_seed(0)

    def measure() -> None:
        with undisturbed(module):
            assert not module[0].training
            random.random(), np.random.random(), torch.rand(1)
            raise KeyError("lost")

    with pytest.raises(KeyError, match="lost"):
        measure()
    assert (random.random(), np.random.random(), torch.rand(1)) == expected
    assert module[0].training
    assert not module[1].training


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
@pytest.mark.parametrize("num_batches", [1, 2, 5, 6])
def test_over_all_ranks_every_batch_counts_once_and_all_make_as_many_forwards(num_batches: int, world_size: int) -> None:
    shares = [batches_of_rank(num_batches, rank, world_size) for rank in range(world_size)]
    assert sorted(index for share in shares for index, counts in share if counts) == list(range(num_batches))
    assert len({len(share) for share in shares}) == 1


def test_a_resumed_probe_does_not_measure_its_start_again() -> None:
    probe = Probe("fixed", [pair_rows(6)], greedy_score, every_n_updates=100, budget=None)
    train(probe, MeanChosen())
    other = Probe("fixed", [pair_rows(6)], greedy_score)
    other.load_state_dict(probe.state_dict())
    assert other.measured_state() == probe.measured_state()
    assert other.state_key == "Probe[fixed]"


def test_mistakes_are_named() -> None:
    with pytest.raises(ValueError, match="The probe 'fixed' needs at least one batch, got none"):
        Probe("fixed", [], greedy_score)
    with pytest.raises(ValueError, match=r"`every_n_updates` must be at least 1, got 0"):
        Probe("fixed", [pair_rows(2)], greedy_score, every_n_updates=0)
    with pytest.raises(ValueError, match=r"`budget` is a share of the training time in \(0, 1\), or None for no limit; got 3"):
        Budget(3)
