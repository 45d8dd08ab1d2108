"""Running means of 8-bit optimisers against those of float64: which follow, and which cannot."""

from __future__ import annotations

import copy
import io
from importlib.util import find_spec
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim import Optimizer

from lightning_pref.callbacks.optimizer_state import momentum_state
from lightning_pref.modules.optimisation import OptimizerSettings
from lightning_pref.modules.optimizers import OptimizerName, Rounding


def needs(package: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(find_spec(package) is None, reason=f"{package} is not installed")


every_package = pytest.mark.parametrize(
    "name",
    [
        pytest.param("torchao_adamw_8bit", marks=needs("torchao")),
        pytest.param("adamw_8bit", marks=needs("bitsandbytes")),
    ],
)
# Below 4096 weights, and above them but no multiple of a block of 256: torchao quantises neither.
UNQUANTISED = [(8,), (64, 65)]
BETAS = (0.9, 0.999)
SPIKE, UPDATES = 100, 400


def gradient(update: int) -> float:
    """Large at first, small afterwards: the mean of squares has to fall by a thousandth of itself in an update."""
    return 1.0 if update < SPIKE else 0.01


def built(parameter: nn.Parameter, rounding: Rounding, name: OptimizerName = "torchao_adamw_8bit") -> Optimizer:
    settings = OptimizerSettings(name=name, rounding=rounding, betas=BETAS, learning_rate=1e-3, schedule="constant", warmup=0)
    return settings.build([parameter], UPDATES)[0]


def train(parameter: nn.Parameter, optimizer: Optimizer, updates: range) -> None:
    for update in updates:
        parameter.grad = torch.full_like(parameter, gradient(update))
        optimizer.step()


def means(updates: int) -> tuple[float, float]:
    """Oracle: both running means in float64, of the gradients as bfloat16 has them."""
    first = second = 0.0
    for update in range(updates):
        value = torch.tensor(gradient(update), dtype=torch.bfloat16).double().item()
        first = BETAS[0] * first + (1 - BETAS[0]) * value
        second = BETAS[1] * second + (1 - BETAS[1]) * value**2
    return first, second


@needs("torchao")
@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
@pytest.mark.parametrize("shape", UNQUANTISED)
def test_unquantised_moments_follow_those_of_float64_also_after_a_checkpoint(shape: Any, rounding: Rounding) -> None:
    parameter = nn.Parameter(torch.ones(shape, dtype=torch.bfloat16))
    optimizer = built(parameter, rounding)
    train(parameter, optimizer, range(UPDATES // 2))
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    optimizer = built(parameter, rounding)
    optimizer.load_state_dict(torch.load(file, weights_only=True))
    train(parameter, optimizer, range(UPDATES // 2, UPDATES))
    state = optimizer.state[parameter]
    for name, wanted in zip(("exp_avg", "exp_avg_sq"), means(UPDATES), strict=True):
        # The rounding of 400 sums in float32.
        np.testing.assert_allclose(state[name].double().numpy(), wanted, rtol=1e-4)


@every_package
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_block_in_8_bit_falls_as_float64_does_and_an_entry_below_its_largest_hardly(
    name: OptimizerName, dtype: torch.dtype
) -> None:
    """The scale of a block is in float32; the codes below it have two digits, so that a thousandth is rounded away."""
    alike, apart = (nn.Parameter(torch.ones(32, 128, dtype=dtype)) for _ in range(2))
    for parameter in (alike, apart):
        optimizer = built(parameter, "nearest", name)
        for update in range(UPDATES):
            parameter.grad = torch.full_like(parameter, gradient(update))
            if parameter is apart:
                parameter.grad[1::2] = 1.0  # a block of 256 is two rows
            optimizer.step()
        squares = momentum_state(optimizer).squares(parameter)
        assert squares is not None
        falls, stays = squares[0, 0].item(), squares[1, 0].item()
        wanted = means(UPDATES)[1]
        if parameter is alike:
            assert falls == stays == pytest.approx(wanted, rel=0.01)
        else:
            assert stays == pytest.approx(1 - BETAS[1] ** UPDATES, rel=0.01)
            assert falls > 2 * wanted


@needs("torchao")
def test_a_loaded_state_shares_no_memory_with_what_it_was_loaded_from() -> None:
    parameter = nn.Parameter(torch.ones(8, dtype=torch.bfloat16))
    optimizer = built(parameter, "nearest")
    train(parameter, optimizer, range(3))
    saved = optimizer.state_dict()
    kept = copy.deepcopy(saved)
    other = built(parameter, "nearest")
    other.load_state_dict(saved)
    train(parameter, other, range(3, 6))
    for name in ("exp_avg", "exp_avg_sq"):
        assert torch.equal(saved["state"][0][name], kept["state"][0][name])
