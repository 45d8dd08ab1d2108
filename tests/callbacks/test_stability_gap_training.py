"""The evaluator leaves the training of a module of one's own alone, and scores the same examples every time."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from clockwork import Clockwork
from lightning.pytorch.callbacks import ModelCheckpoint
from speakers import quiet_trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from typing_extensions import override

from lightning_pref import TaskSwitch, observe
from lightning_pref.callbacks.stability_gap import StabilityGapEvaluator
from lightning_pref.measures.forgetting import ProbeScores


class Classifier(L.LightningModule):
    """Somebody's own classifier with dropout and batch statistics; draws from every random state."""

    def __init__(self, *, manual: bool = False) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.4), nn.Linear(8, 3))
        self.automatic_optimization = not manual

    @override
    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        inputs, labels = batch
        if self.current_epoch == 1 and batch_idx == 2:
            observe(self, TaskSwitch(task="late"))
        noise = random.random() + np.random.random() + torch.rand(()).item()
        loss = nn.functional.cross_entropy(self.layers(inputs * (1 + 0.1 * noise)), labels)
        if not self.automatic_optimization:
            optimizer = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            # Still inside the same autocast region.
            self.manual_backward(nn.functional.cross_entropy(self.layers(inputs), labels))
            optimizer.step()
        return loss

    @override
    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=0.02)


def careless(module: Classifier, batch: list[Tensor]) -> ProbeScores:
    """Draws random numbers, and is right or wrong on each example."""
    random.random(), np.random.random(3), torch.rand(7)
    assert not module.training
    assert not torch.is_grad_enabled()
    right = module.layers(batch[0]).argmax(-1) == batch[1]
    return ProbeScores(right.float(), torch.ones(len(right)))


def rows(count: int, seed: int = 0) -> TensorDataset:
    generator = torch.Generator().manual_seed(seed)
    return TensorDataset(torch.randn(count, 5, generator=generator), torch.randint(3, (count,), generator=generator))


def classify(evaluator: StabilityGapEvaluator | None, *, manual: bool = False, **settings: Any) -> dict[str, Tensor]:
    L.seed_everything(7, verbose=False)
    module = Classifier(manual=manual)
    resume = settings.pop("resume", None)
    callbacks = [*([] if evaluator is None else [evaluator]), *settings.pop("callbacks", [])]
    trainer = quiet_trainer(callbacks=callbacks, **{"max_epochs": 3, "log_every_n_steps": 2, **settings})
    trainer.fit(module, DataLoader(rows(32), batch_size=8, shuffle=True), ckpt_path=resume)
    return {name: value.detach().clone() for name, value in module.state_dict().items()}


def watching(**settings: Any) -> StabilityGapEvaluator:
    # A loader that would shuffle is read once, before training.
    sets = {"early": DataLoader(rows(20, 1), batch_size=8, shuffle=True), "late": [[*rows(9, 2).tensors]]}
    return StabilityGapEvaluator(sets, careless, **{"kind": "accuracy", "budget": None, "dense_updates": 2, **settings})


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("manual", [False, True])
def test_M4_training_is_bit_identical_with_a_classifier_of_ones_own(precision: Any, manual: bool) -> None:
    alone = classify(None, manual=manual, precision=precision)
    evaluator = watching()
    watched = classify(evaluator, manual=manual, precision=precision)
    assert len(evaluator.trace("early")[0]) > 8
    assert len(evaluator.switches) == 2
    assert all(torch.equal(alone[name], watched[name]) for name in alone)


def test_M4_an_evaluation_inside_an_autocast_region_leaves_no_cast_weights_behind() -> None:
    class Eager(Clockwork):
        """Asks for an evaluation inside an autocast region of its own, then changes its weights and goes on."""

        def __init__(self, evaluator: StabilityGapEvaluator | None) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.layer, self.evaluator = nn.Linear(3, 1), evaluator

        @override
        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            with torch.autocast("cpu", torch.bfloat16):  # Lightning's own has no cache
                if self.evaluator is not None:
                    assert self.evaluator._running is not None
                    self.evaluator.evaluate(self.evaluator._running)
                with torch.no_grad():
                    self.layer.weight.mul_(1.5)
                return self.layer(batch).float().square().mean() - self.position

    weights = []
    for evaluator in (None, StabilityGapEvaluator({"old": [torch.ones(2, 3)]}, lambda m, b: m.layer(b)[:, 0], budget=None)):
        module = Eager(evaluator)
        callbacks = [] if evaluator is None else [evaluator]
        data: Any = [torch.ones(1, 3)] * 3
        quiet_trainer(callbacks=callbacks).fit(module, DataLoader(data, batch_size=None))
        weights.append(module.layer.weight.detach().clone())
    assert torch.equal(*weights)


def test_M4_reading_the_sets_leaves_the_random_state_alone() -> None:
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    watching()
    assert torch.equal(torch.rand(3), expected)


def test_the_same_examples_are_scored_every_time() -> None:
    seen: list[Tensor] = []

    def score(module: Classifier, batch: list[Tensor]) -> Tensor:
        seen.append(batch[0].clone())
        return torch.ones(len(batch[0]))

    sets = {"early": DataLoader(rows(20, 1), batch_size=20, shuffle=True)}
    classify(StabilityGapEvaluator(sets, score, budget=None, dense_updates=2))
    assert len(seen) > 5
    assert all(torch.equal(seen[0], other) for other in seen)


def test_the_value_of_a_set_is_that_of_its_examples_one_by_one() -> None:
    L.seed_everything(7, verbose=False)
    fresh = Classifier().eval()
    evaluator = watching()
    classify(evaluator)
    right = [
        int(fresh.layers(inputs[None]).argmax(-1).item() == label.item())
        for batch in evaluator.sets.batches["early"]
        for inputs, label in zip(*batch, strict=True)
    ]
    assert len(right) == 20
    assert evaluator.trace("early")[1][0] == pytest.approx(sum(right) / 20)


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
def test_a_resume_on_other_examples_is_refused(tmp_path: Path) -> None:
    checkpoint = ModelCheckpoint(dirpath=tmp_path, filename="middle", save_on_train_epoch_end=True)
    classify(watching(), max_epochs=1, callbacks=[checkpoint], enable_checkpointing=True)
    fewer = StabilityGapEvaluator(
        {"early": DataLoader(rows(18, 1), batch_size=8), "late": [[*rows(9, 2).tensors]]}, careless, kind="accuracy", budget=None
    )
    with pytest.raises(ValueError, match=r"have other sizes than at the first evaluation, when their batches had \[8, 8, 4, 9\]"):
        classify(fewer, resume=str(tmp_path / "middle.ckpt"))
