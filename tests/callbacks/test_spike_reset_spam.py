"""Mode `spam`: against the published algorithm written down again in NumPy, and what it must leave alone."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from spiky import SHORT_SPAM, Gradients, Regression, TwoOptimizers, adamw, batches, fit, short_spam, weights
from torch import Tensor, nn
from torch.optim import Optimizer
from typing_extensions import override

from lightning_pref.callbacks.spike_reset import SpikeAwareOptimizerReset

SIZE = 30


# The algorithm again.


class Quadratic(L.LightningModule):
    """Loss 0.5 * sum(curvature * (w - target)^2) over coordinates; each batch brings both. In float64."""

    def __init__(self, optimizer: Callable[[Any], Optimizer]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(SIZE, dtype=torch.float64))
        self.make_optimizer = optimizer
        self.path: list[Tensor] = []

    @override
    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        self.path.append(self.weight.detach().clone())
        return 0.5 * (batch[1] * (self.weight - batch[0]).square()).sum()

    @override
    def configure_optimizers(self) -> Optimizer:
        return self.make_optimizer(self.parameters())


def quadratic_batches(num_updates: int, seed: int = 0) -> list[Tensor]:
    """Noisy targets, [2, SIZE]; every 17th update spikes in a third of the coordinates, and two coordinates are rare."""
    generator = np.random.default_rng(seed)
    data = []
    for k in range(1, num_updates + 1):
        target = 1.0 + 0.3 * generator.normal(size=SIZE)
        if k % 17 == 0:
            target[generator.choice(SIZE, SIZE // 3, replace=False)] *= 500.0
        curvature = np.full(SIZE, 0.5)
        curvature[0] = 1.0 if k % 12 in (5, 7, 10) else 0.0  # never in the guard window of a period of 12
        curvature[1] = 1.0 if k > 40 and k % 2 else 0.0
        data.append(torch.tensor(np.stack([target, curvature])))
    return data


def spam_in_numpy(
    data: list[Tensor],
    *,
    reset_every: int | None,
    warmup_steps: int,
    threshold: float,
    guard_steps: int,
    strict: bool = False,
    restart: bool = False,
    norm: float | None = None,
    lr: float = 0.05,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-30,
) -> list[Any]:
    """Oracle: SPAM as published, k counted from 1, on the quadratic; the weights before each update."""
    w, m, v = np.zeros(SIZE), np.zeros(SIZE), np.zeros(SIZE)
    c = warmup_steps + 1
    t = 0
    path = []
    for k, batch in enumerate(data, 1):
        path.append(w.copy())
        target, curvature = batch.numpy()
        g = curvature * (w - target)
        if norm is not None:
            g = g * min(1.0, norm / (np.linalg.norm(g) + 1e-6))
        if reset_every and k % reset_every == 0:
            m, v = np.zeros(SIZE), np.zeros(SIZE)
            t = 0 if restart else t
        j = k % reset_every if reset_every else k
        if threshold and k >= guard_steps and j >= guard_steps:
            limit = threshold * (v / (1 - b2**t) if restart and t else v)
            cut = g**2 > limit if strict else (g**2 > limit) & (v > 0)
            g = np.where(cut, np.sign(g) * np.sqrt(limit), g)
        m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g**2
        t += 1
        phi = 1.0 if c >= warmup_steps else 1 - 0.495 * (1 + np.cos(np.pi * c / (warmup_steps + 1)))
        w = w - lr * phi * (m / (1 - b1**t)) / (np.sqrt(v / (1 - b2**t)) + eps)
        c += 1
        if reset_every and (k + 1) % reset_every == 0:
            c = 0
    return path


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("correction", ["keep", "restart"])
@pytest.mark.parametrize("settings", [SHORT_SPAM, {**SHORT_SPAM, "reset_every": None}, {**SHORT_SPAM, "threshold": 0.0}])
def test_training_follows_the_published_algorithm(
    tmp_path: Path, settings: dict[str, Any], correction: Any, strict: bool, fused: bool
) -> None:
    data = quadratic_batches(80)
    expected = spam_in_numpy(data, **settings, strict=strict, restart=correction == "restart")
    module = Quadratic(lambda p: adamw(p, lr=0.05, eps=1e-30, fused=fused))
    fit(tmp_path, module, [SpikeAwareOptimizerReset(**settings, strict=strict, bias_correction=correction)], data)
    assert np.allclose(torch.stack(module.path).numpy(), np.stack(expected), rtol=1e-9, atol=1e-12)
    plain = spam_in_numpy(data, **{**settings, "reset_every": None, "threshold": 0.0})
    assert settings["threshold"] == settings["reset_every"] or not np.allclose(expected[-1], plain[-1], rtol=1e-3)


def test_keep_is_the_default_of_this_mode(tmp_path: Path) -> None:
    data = quadratic_batches(40)
    paths = []
    for correction in (None, "keep", "restart"):
        module = Quadratic(lambda p: adamw(p, lr=0.05))
        fit(tmp_path, module, [short_spam(bias_correction=correction)], data)
        paths.append(torch.stack(module.path))
    assert torch.equal(paths[0], paths[1])
    assert not torch.allclose(paths[0], paths[2], rtol=1e-2)


def test_norm_clipping_can_come_first_as_in_the_published_script(tmp_path: Path) -> None:
    data = quadratic_batches(60)
    settings = {**SHORT_SPAM, "threshold": 5.0}
    expected = spam_in_numpy(data, **settings, norm=0.8)
    paths = {}
    for order in ("after_norm_clip", "before_norm_clip"):
        module = Quadratic(lambda p: adamw(p, lr=0.05, eps=1e-30))
        fit(tmp_path, module, [SpikeAwareOptimizerReset(**settings, order=order)], data, gradient_clip_val=0.8)  # type: ignore[arg-type]
        paths[order] = torch.stack(module.path).numpy()
    # Lightning's own clipping follows once more and finds a norm of 0.8 at most, up to the 1e-6 in its quotient.
    assert np.allclose(paths["after_norm_clip"], np.stack(expected), rtol=1e-4, atol=1e-6)
    assert not np.allclose(paths["before_norm_clip"], np.stack(expected), rtol=1e-2)


def test_the_scale_of_the_loss_changes_nothing(tmp_path: Path) -> None:
    paths = []
    for scale in (1.0, 1024.0):
        data = [batch * torch.tensor([[1.0], [scale]], dtype=torch.float64) for batch in quadratic_batches(60)]
        module = Quadratic(lambda p: adamw(p, lr=0.05, eps=1e-200))
        fit(tmp_path, module, [short_spam()], data)
        paths.append(torch.stack(module.path))
    assert torch.equal(paths[0], paths[1])


def test_a_coordinate_that_was_quiet_in_the_guard_window_is_frozen_by_the_published_code_only(tmp_path: Path) -> None:
    data = quadratic_batches(60)
    paths = {}
    for strict in (False, True):
        module = Quadratic(lambda p: adamw(p, lr=0.05))
        fit(tmp_path, module, [short_spam(strict=strict)], data)
        paths[strict] = torch.stack(module.path)[:, 0]
    assert (paths[True] == 0).all(), "quiet in every guard window, and frozen for ever"
    assert paths[False][-1] > 0.3


def test_a_guard_of_nothing_freezes_everything_in_strict_mode(tmp_path: Path) -> None:
    module = Quadratic(lambda p: adamw(p, lr=0.05))
    fit(tmp_path, module, [short_spam(guard_steps=0, strict=True)], quadratic_batches(40))
    path = torch.stack(module.path)
    assert (path[-1] == path[12]).all(), "from the first reset on"
    assert not (path[11] == path[5]).all()


# What it leaves alone.


@pytest.mark.parametrize("make", [adamw, lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9), torch.optim.RMSprop])
def test_without_threshold_and_resets_training_is_bit_identical(tmp_path: Path, make: Any) -> None:
    data = batches(20)
    found = []
    for callbacks in ([], [SpikeAwareOptimizerReset(reset_every=None, threshold=0.0)]):
        module = Regression(make, spikes=[7])
        fit(tmp_path, module, callbacks, data)
        found.append(weights(module))
    assert torch.equal(*found)


def test_rates_and_decay_are_the_schedules_outside_the_step(tmp_path: Path) -> None:
    """A chainable schedule multiplies what it finds: had it found a ramped rate, it would never come back."""
    data = batches(30)
    seen = {}
    for name, callbacks in {"plain": [], "spam": [short_spam()]}.items():
        gradients = Gradients()
        module = Regression(
            lambda p: adamw(p, weight_decay=0.1), schedule=lambda o: torch.optim.lr_scheduler.ExponentialLR(o, 0.95)
        )
        fit(tmp_path, module, [*callbacks, gradients], data)
        seen[name] = gradients
    assert seen["spam"].after_batch == seen["plain"].after_batch
    inside, scheduled = seen["spam"].rates[12], seen["plain"].rates[12]  # the 13th update, one after the reset
    assert inside[0] == pytest.approx(scheduled[0] * (1 - 0.495 * (1 + math.cos(math.pi / 6))))
    assert inside[0] * inside[1] == pytest.approx(scheduled[0] * scheduled[1])


class FailsAt(Callback):
    def __init__(self, update: int) -> None:
        self.update = update

    @override
    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Optimizer) -> None:
        if trainer.global_step + 1 == self.update:
            raise RuntimeError("somebody else's mistake")


def test_rates_come_back_when_someone_fails_between_preparation_and_step(tmp_path: Path) -> None:
    held: list[Optimizer] = []

    def make(parameters: Any) -> Optimizer:
        held.append(adamw(parameters, weight_decay=0.1))
        return held[-1]

    callback = short_spam()
    with pytest.raises(RuntimeError, match="somebody else's mistake"):
        fit(tmp_path, Regression(make), [callback, FailsAt(13)], batches(20))
    group = held[0].param_groups[0]
    assert (group["lr"], group["weight_decay"]) == (0.01, 0.1)
    assert callback.state_dict()["measured"]["tracks"][0]["updates"] == 12


def test_rates_come_back_when_clipping_itself_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    held: list[Optimizer] = []

    def make(parameters: Any) -> Optimizer:
        held.append(adamw(parameters))
        return held[-1]

    callback = short_spam()

    def fail(*_: Any) -> None:
        held[0].param_groups[0]["lr"] = 1.0
        callback._tracks[0].rates._kept.append((held[0].param_groups[0], "lr", 0.01))
        raise RuntimeError("out of memory")

    monkeypatch.setattr(callback.policy, "prepare", fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        fit(tmp_path, Regression(make), [callback], batches(3))
    assert held[0].param_groups[0]["lr"] == 0.01


def test_moments_after_a_reset_are_those_of_one_gradient(tmp_path: Path) -> None:
    held: list[Optimizer] = []

    def make(parameters: Any) -> Optimizer:
        held.append(adamw(parameters))
        return held[-1]

    gradients = Gradients()
    fit(tmp_path, Regression(make), [short_spam(), gradients], batches(12))
    states = list(held[0].state.values())
    for key, power, beta in (("exp_avg", 1, 0.9), ("exp_avg_sq", 2, 0.999)):
        found = torch.cat([state[key].flatten() for state in states])
        assert torch.allclose(found, (1 - beta) * gradients.before_step[-1] ** power, rtol=1e-5)
    assert all(state["step"] == 12 for state in states)


def test_gradients_in_the_guard_window_are_left_bit_for_bit_and_signs_always(tmp_path: Path) -> None:
    plain, clipped = Gradients(), Gradients()
    fit(tmp_path, Regression(spikes=[9]), [plain], batches(9))
    fit(tmp_path, Regression(spikes=[9]), [short_spam(guard_steps=9), clipped], batches(9))
    for before, after in zip(plain.before_step[:8], clipped.before_step[:8], strict=True):
        assert torch.equal(before, after)
    assert (clipped.before_step[8].abs() < plain.before_step[8].abs()).float().mean() > 0.9
    assert (clipped.before_step[8].sign() == plain.before_step[8].sign()).all()


# Counting.


def test_micro_batches_count_as_one_update(tmp_path: Path) -> None:
    """Batches of 4 rows, four of them to an update, against batches of 16 rows."""
    large = batches(30, rows=16)
    small = [part for batch in large for part in batch.chunk(4)]
    one, many = Regression(spikes=[8, 20]), Regression(spikes=[8, 20])
    counts = []
    for module, data, settings in ((one, large, {}), (many, small, {"accumulate_grad_batches": 4})):
        callback = short_spam()
        # Spikes are put on whole updates: the hook of the module runs after every micro-batch.
        module.size = 1e4 if module is one else 10.0
        fit(tmp_path, module, [callback], data, **settings)
        counts.append(callback.state_dict()["measured"]["tracks"])
    assert counts[0] == counts[1]
    calm_one, calm_many = Regression(), Regression()
    fit(tmp_path, calm_one, [short_spam()], large)
    fit(tmp_path, calm_many, [short_spam()], small, accumulate_grad_batches=4)
    assert torch.allclose(weights(calm_one), weights(calm_many), rtol=1e-4, atol=1e-6)


def test_each_optimizer_of_a_manual_loop_has_a_count_of_its_own(tmp_path: Path) -> None:
    callback = short_spam()
    trainer = fit(tmp_path, TwoOptimizers(), [callback], batches(30))
    body, head = callback.state_dict()["measured"]["tracks"]
    assert (body["updates"], head["updates"]) == (30, 10)
    assert body["since_reset"] == 7, "of the coming update, the 31st: 7 after that of the reset, the 24th"
    assert (head["since_reset"], head["is_ramping"]) == (11, False)
    assert all(group["lr"] == 0.01 for optimizer in trainer.optimizers for group in optimizer.param_groups)
