from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from speakers import quiet_trainer
from torch import Tensor
from torch.utils.data import DataLoader
from typing_extensions import override

from lightning_pref import Observation, Observer, PairObservation, RewardObservation, observe, wants


class Listener(Callback, Observer):
    consumes = (PairObservation,)

    def __init__(self) -> None:
        self.heard: list[tuple[PairObservation, str, bool, L.LightningModule]] = []

    @override
    def on_observation(self, trainer: L.Trainer, pl_module: L.LightningModule, observation: Observation, source: str) -> None:
        assert isinstance(observation, PairObservation)
        self.heard.append((observation, source, torch.is_grad_enabled(), pl_module))


class Nested(L.LightningModule):
    def publish(self, logps: Tensor) -> None:
        observe(self, PairObservation(chosen_logps=logps, rejected_logps=logps, row_ids=torch.arange(len(logps))))


class Speaker(L.LightningModule):
    def __init__(self, nested: bool = False) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(2, 1)
        self.inner = Nested() if nested else None
        self.wanted: list[tuple[bool, bool]] = []

    def _step(self, batch: Tensor) -> Tensor:
        logps = self.layer(batch)[:, 0]
        self.wanted.append((wants(self, PairObservation), wants(self, RewardObservation)))
        if self.inner is not None:
            self.inner.publish(logps)
        else:
            observe(self, PairObservation(chosen_logps=logps, rejected_logps=logps, row_ids=torch.arange(len(batch))))
        return logps.sum()

    @override
    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self._step(batch)

    @override
    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self._step(batch)

    @override
    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(module: L.LightningModule, callbacks: Sequence[Callback], tmp_path: Any) -> None:
    loader: DataLoader[Any] = DataLoader([torch.ones(2)] * 4, batch_size=2)
    trainer = quiet_trainer(callbacks=list(callbacks), default_root_dir=tmp_path)
    trainer.fit(module, loader, loader)


def test_observations_arrive_detached_without_grad_and_with_their_stage(tmp_path: Any) -> None:
    listener, module = Listener(), Speaker()
    fit(module, [listener], tmp_path)
    # two training batches, then two of validation; the sanity check before them is not heard
    assert [source for _, source, _, _ in listener.heard] == ["train", "train", "val", "val"]
    assert not any(o.chosen_logps.requires_grad for o, _, _, _ in listener.heard)
    assert not any(grad for _, _, grad, _ in listener.heard)


def test_a_nested_module_speaks_for_the_module_the_trainer_runs(tmp_path: Any) -> None:
    listener, module = Listener(), Speaker(nested=True)
    fit(module, [listener], tmp_path)
    assert len(listener.heard) == 4
    assert all(heard is module for _, _, _, heard in listener.heard)


def test_wants_is_true_for_what_a_callback_consumes_and_for_nothing_else(tmp_path: Any) -> None:
    module = Speaker()
    fit(module, [Listener()], tmp_path)
    assert (True, False) in module.wanted
    assert (True, True) not in module.wanted


def test_without_a_trainer_observing_does_nothing() -> None:
    module = Speaker()
    module._step(torch.ones(2, 2))
    assert module.wanted == [(False, False)]


def test_an_observer_that_raises_stops_the_step(tmp_path: Any) -> None:
    class Broken(Listener):
        @override
        def on_observation(self, trainer: L.Trainer, pl_module: L.LightningModule, observation: Observation, source: str) -> None:
            raise RuntimeError("broken diagnostic")

    with pytest.raises(RuntimeError, match="broken diagnostic"):
        fit(Speaker(), [Broken()], tmp_path)


def test_tensors_of_different_lengths_are_refused_with_their_shapes() -> None:
    with pytest.raises(ValueError, match=r"PairObservation share their first dimension.*'row_ids': \(3,\)"):
        PairObservation(chosen_logps=torch.zeros(2), rejected_logps=torch.zeros(2), row_ids=torch.arange(3))


def test_something_that_is_no_lightning_module_is_named_with_what_to_call_instead() -> None:
    with pytest.raises(TypeError, match=r"takes the LightningModule that is running, got a Linear.*transformers"):
        observe(torch.nn.Linear(1, 1), RewardObservation(rewards=torch.ones(1), prompt_ids=torch.zeros(1)))  # type: ignore[arg-type]
