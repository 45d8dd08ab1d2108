from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from known_optimizers import (
    DECOUPLED,
    EVERY,
    TORCH,
    every_optimizer,
    flat,
    give_gradients,
    only,
    optim,
    parameters,
    quiet_paging,
    state_tensors,
    trained,
)
from torch import Tensor

from lightning_pref.callbacks.optimizer_state import momentum_state
from lightning_pref.callbacks.update_parts import ScaledRates, Snapshot, drop_gradients, local_gradients, squared_norm

pytestmark = quiet_paging

# Skipping a step.


@every_optimizer
def test_without_gradients_a_step_changes_neither_weights_nor_state(name: str) -> None:
    params, optimizer = trained(EVERY[name])
    weights, state = flat(params), state_tensors(optimizer)
    give_gradients(params, 9)
    drop_gradients(optimizer)
    optimizer.step()
    assert torch.equal(flat(params), weights)
    after = state_tensors(optimizer)
    assert state.keys() == after.keys()
    assert all(torch.equal(state[key], after[key]) for key in state)


def test_zero_gradients_would_be_no_skip() -> None:
    params, optimizer = trained(TORCH["AdamW"])
    weights = flat(params)
    give_gradients(params, 9, scale=0.0)
    optimizer.step()
    assert not torch.equal(flat(params), weights)


# Learning rates for one step.


@every_optimizer
def test_a_learning_rate_of_nearly_zero_stops_the_weights_whatever_the_optimizer(name: str) -> None:
    """An optimiser that read its learning rate before the closure would go on at full speed."""
    params, optimizer = trained(EVERY[name])
    rates = ScaledRates(momentum_state(optimizer))
    before = flat(params)

    def closure() -> None:
        give_gradients(params, 30)
        rates.scale(1e-12)

    optimizer.step(closure)  # type: ignore[arg-type]
    rates.restore()
    group = optimizer.param_groups[0]
    decay = float(group["lr"]) * group["weight_decay"] if momentum_state(optimizer).decouples_decay(group) else 0.0
    assert torch.allclose(flat(params), before * (1 - decay), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("name", only("AdamW", "Adam decoupled", *DECOUPLED))
def test_decoupled_decay_stays_the_same_while_the_learning_rate_is_scaled(name: str) -> None:
    params, optimizer = trained(EVERY[name])
    rates = ScaledRates(momentum_state(optimizer))
    for factor in (0.01, 1.0):
        before = flat(params)
        for parameter in params:
            parameter.grad = torch.zeros_like(parameter)
        momentum_state(optimizer).reset(first=True, second=True, restart=True)
        rates.scale(factor)
        optimizer.step()
        rates.restore()
        assert torch.allclose(flat(params), before * (1 - 0.01 * 0.1), rtol=1e-6), "lr * weight_decay, without a ramp"


def test_decay_in_the_gradient_is_left_alone() -> None:
    optimizer = optim.Adam(parameters(), lr=0.01, weight_decay=0.1)
    rates = ScaledRates(momentum_state(optimizer))
    rates.scale(0.5)
    assert (optimizer.param_groups[0]["lr"], optimizer.param_groups[0]["weight_decay"]) == (0.005, 0.1)


def test_rates_are_put_back_bit_for_bit_and_once() -> None:
    for make in (TORCH["AdamW"], TORCH["AdamW tensor lr"]):
        optimizer = make(parameters())
        before = copy.deepcopy({key: optimizer.param_groups[0][key] for key in ("lr", "weight_decay")})
        held = optimizer.param_groups[0]["lr"]
        rates = ScaledRates(momentum_state(optimizer))
        rates.scale(0.3)
        rates.restore()
        assert {key: optimizer.param_groups[0][key] for key in before} == before
        assert optimizer.param_groups[0]["lr"] is held or not isinstance(held, Tensor), "a captured step reads this tensor"
        optimizer.param_groups[0]["lr"] = 7.0
        rates.restore()
        assert optimizer.param_groups[0]["lr"] == 7.0, "what was put back is not put back again"


# Norms and snapshots.


def test_the_squared_norm_is_over_all_gradients_and_never_overflows() -> None:
    params, optimizer = trained(TORCH["AdamW"])
    give_gradients(params, 1, scale=1e25)
    owned = [(gradient.parameter, gradient.values) for gradient in local_gradients(optimizer)]
    expected = sum(parameter.grad.double().square().sum().item() for parameter in params if parameter.grad is not None)
    assert squared_norm(owned, world_size=1).item() == pytest.approx(expected)
    assert squared_norm(owned, world_size=4).item() == pytest.approx(expected / 4), "four replicas add up to one"
    assert squared_norm(owned, world_size=4, flat_shards=4).item() == pytest.approx(expected), "four shards each count"


@every_optimizer
@pytest.mark.parametrize("where", ["cpu", "device"])
def test_a_snapshot_brings_back_weights_and_state(name: str, where: Any) -> None:
    params, optimizer = trained(EVERY[name])
    snapshot = Snapshot(optimizer, where)
    assert snapshot.is_empty
    snapshot.take()
    weights, state = flat(params), state_tensors(optimizer)
    for update in range(20, 23):
        give_gradients(params, update, scale=1e3)
        optimizer.step()
    snapshot.restore()
    assert torch.equal(flat(params), weights)
    after = state_tensors(optimizer)
    assert state.keys() == after.keys()
    assert all(torch.equal(state[key], after[key]) for key in state)
    give_gradients(params, 40)
    optimizer.step()
    assert not torch.equal(flat(params), weights), "a snapshot that is used stays as it was"
    snapshot.restore()
    assert torch.equal(flat(params), weights)


def test_a_snapshot_from_before_the_first_update_has_no_state_to_bring_back() -> None:
    params, optimizer = trained(TORCH["AdamW"], updates=0)
    snapshot = Snapshot(optimizer, "cpu")
    snapshot.take()
    give_gradients(params, 0)
    optimizer.step()
    snapshot.restore()
    assert not any(optimizer.state[parameter] for parameter in params)
