from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from known_optimizers import (
    BNB,
    DECOUPLED,
    EVERY,
    TORCH,
    TORCHAO,
    Make,
    bnb,
    every_optimizer,
    flat,
    give_gradients,
    needs_bnb,
    needs_optimi,
    needs_torchao,
    only,
    optim,
    optimi,
    optimizers,
    parameters,
    quiet_paging,
    state_tensors,
    trained,
)
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_pref.callbacks.optimizer_state import REFUSED, dequantized, momentum_state, zero_code
from lightning_pref.callbacks.update_parts import ScaledRates

pytestmark = quiet_paging


def eight_bit(name: str) -> Make:
    """An optimiser of bitsandbytes that is looked up when it is built."""

    def build(parameters: Any) -> Optimizer:
        optimizer: Optimizer = getattr(bnb.optim, name)(parameters)
        return optimizer

    return build


def fresh_twin(make: Make, params: list[nn.Parameter]) -> tuple[list[nn.Parameter], Optimizer]:
    twins = [nn.Parameter(parameter.detach().clone()) for parameter in params]
    return twins, make(twins)


@every_optimizer
@pytest.mark.parametrize("ramp", [1.0, 0.01])
def test_O4_updates_after_a_reset_are_those_of_a_fresh_optimizer(name: str, ramp: float) -> None:
    """At the same learning rate times ramp, for several updates, so that counters and maxima are seen to restart."""
    params, optimizer = trained(EVERY[name])
    moments = momentum_state(optimizer)
    moments.reset(first=True, second=True, restart=True)
    twins, fresh = fresh_twin(EVERY[name], params)
    assert torch.equal(flat(params), flat(twins))
    for update in range(4):
        for own, opt in ((params, optimizer), (twins, fresh)):
            give_gradients(own, 50 + update)
            rates = ScaledRates(momentum_state(opt))
            rates.scale(ramp)
            opt.step()
            rates.restore()
        assert torch.equal(flat(params), flat(twins)), update
    start = parameters()
    assert (flat(params) - flat(start)).abs().max() > 1e-6, "there was something to compare"


@every_optimizer
def test_O4_a_reset_without_restart_keeps_the_counters(name: str) -> None:
    _, optimizer = trained(EVERY[name])
    before = state_tensors(optimizer)
    momentum_state(optimizer).reset(first=True, second=True, restart=False)
    after = state_tensors(optimizer)
    for key in [key for key in before if key.endswith(("step", "mu_product"))]:
        assert torch.equal(before[key], after[key]), key


@pytest.mark.parametrize("name", optimizers("SGD", "RMSprop"))
def test_O4_the_first_moment_alone_can_be_reset(name: str) -> None:
    _, optimizer = trained(EVERY[name])
    before = state_tensors(optimizer)
    momentum_state(optimizer).reset(first=True, second=False, restart=False)
    after = state_tensors(optimizer)
    changed = {key.split("/")[1] for key in before if not torch.equal(before[key], after[key])}
    assert changed in ({"exp_avg"}, {"state1"}, {"state1", "absmax1"})


@pytest.mark.parametrize("name", optimizers("SGD"))
def test_O4_the_second_moment_alone_can_be_reset(name: str) -> None:
    _, optimizer = trained(EVERY[name])
    before = state_tensors(optimizer)
    momentum_state(optimizer).reset(first=False, second=True, restart=False)
    after = state_tensors(optimizer)
    changed = {key.split("/")[1] for key in before if not torch.equal(before[key], after[key])}
    assert changed in (
        {"exp_avg_sq"},
        {"exp_avg_sq", "max_exp_avg_sq"},
        {"exp_inf"},
        {"square_avg", "grad_avg"},
        {"state2"},
        {"state2", "absmax2"},
    )


@pytest.mark.parametrize("name", ["AdamW", "AdamW fused", "AdamW amsgrad", "NAdam", "RAdam", "RMSprop"])
def test_the_second_moment_is_the_mean_of_squared_gradients(name: str) -> None:
    params, optimizer = trained(TORCH[name], updates=0)
    moments = momentum_state(optimizer)
    assert moments.squares(params[0]) is None, "no state before the first update, and none made by asking"
    assert not optimizer.state
    mean = torch.zeros(64, 128, dtype=torch.float64)
    decay = moments.betas(optimizer.param_groups[0])[1]
    for update in range(3):
        give_gradients(params, update)
        assert params[0].grad is not None
        mean = decay * mean + (1 - decay) * params[0].grad.double().square()
        optimizer.step()
    squares = moments.squares(params[0])
    assert squares is not None
    assert torch.allclose(squares.double(), mean, rtol=1e-5)


@pytest.mark.parametrize("name", only("AdamW", "AdamW fused", *DECOUPLED))
def test_the_corrected_second_moment_is_free_of_bias(name: str) -> None:
    params = parameters()
    optimizer = EVERY[name](params)
    for _ in range(4):
        give_gradients(params, 0)
        optimizer.step()
    assert params[1].grad is not None
    corrected = momentum_state(optimizer).corrected_squares(params[1], optimizer.param_groups[0])
    assert corrected is not None
    assert torch.allclose(corrected, params[1].grad.square(), rtol=1e-4)


# bitsandbytes.


@needs_bnb
def test_O3_quantised_moments_are_read_as_bitsandbytes_reads_them() -> None:
    params, optimizer = trained(BNB["bnb AdamW8bit"])
    moments = momentum_state(optimizer)
    state = optimizer.state[params[0]]
    assert state["state2"].dtype == torch.uint8
    expected = bnb.functional.dequantize_blockwise(state["state2"], absmax=state["absmax2"], code=state["qmap2"], blocksize=256)
    found = moments.squares(params[0])
    assert found is not None
    assert torch.allclose(found, expected.view_as(found))
    small = moments.squares(params[1])
    assert small is optimizer.state[params[1]]["state2"], "below min_8bit_size moments are plain float32"


@needs_bnb
@pytest.mark.parametrize("size", [(64, 128), (5000,), (4097,)])
def test_O3_values_of_codes_are_map_times_scale_of_the_block(size: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(size, generator=generator)
    codes, quantised = bnb.functional.quantize_blockwise(values, blocksize=256)
    expected = [
        quantised.code[int(code)].item() * quantised.absmax[i // 256].item() for i, code in enumerate(codes.flatten().tolist())
    ]
    found = dequantized(codes, quantised.code, quantised.absmax)
    assert found.shape == values.shape
    assert found.flatten().tolist() == pytest.approx(expected)


@needs_bnb
def test_O3_zero_is_a_code_in_the_middle_of_the_signed_map_and_not_code_zero() -> None:
    signed, unsigned = bnb.functional.create_dynamic_map(signed=True), bnb.functional.create_dynamic_map(signed=False)
    assert signed[zero_code(signed).long()] == 0
    assert unsigned[zero_code(unsigned).long()] == 0
    assert signed[0] < -0.9


@needs_bnb
@pytest.mark.parametrize("name", ["bnb Adam8bit", "bnb PagedAdamW8bit"])
def test_O3_reset_codes_mean_nothing_even_when_a_scale_returns(name: str) -> None:
    params, optimizer = trained(BNB[name])
    state = optimizer.state[params[0]]
    naive = copy.deepcopy({key: value for key, value in state.items() if isinstance(value, Tensor)})
    momentum_state(optimizer).reset(first=True, second=True, restart=True)
    for number in "12":
        assert torch.equal(dequantized(state["state" + number], state["qmap" + number], torch.ones(32)), torch.zeros(64, 128))
        assert (state["absmax" + number] == 0).all()
    assert dequantized(naive["state1"].zero_(), naive["qmap1"], torch.ones(32)).max() < -0.9, "what zeroed codes would mean"
    give_gradients(params, 77)
    optimizer.step()
    assert flat(params).isfinite().all()


@needs_bnb
def test_O3_state_that_went_through_a_checkpoint_can_be_reset() -> None:
    params, optimizer = trained(BNB["bnb AdamW8bit"])
    twins = [nn.Parameter(parameter.detach().clone()) for parameter in params]
    other = BNB["bnb AdamW8bit"](twins)
    other.load_state_dict(optimizer.state_dict())
    for opt in (optimizer, other):
        momentum_state(opt).reset(first=True, second=True, restart=True)
    for own, opt in ((params, optimizer), (twins, other)):
        give_gradients(own, 5)
        opt.step()
    assert torch.equal(flat(params), flat(twins))


@needs_torchao
def test_O3_quantised_moments_are_read_as_torchao_reads_them() -> None:
    params, optimizer = trained(TORCHAO["torchao AdamW8bit"])
    moments = momentum_state(optimizer)
    held = optimizer.state[params[0]]["exp_avg_sq"]
    assert held.codes.dtype == torch.uint8
    found = moments.squares(params[0])
    assert found is not None
    assert torch.equal(found, held.dequantize())
    small = moments.squares(params[1])
    assert small is not None
    assert torch.equal(small, optimizer.state[params[1]]["exp_avg_sq"]), "below 4096 entries moments are plain"


@needs_torchao
def test_O3_codes_of_torchao_that_were_reset_mean_nothing_even_when_a_scale_returns() -> None:
    params, optimizer = trained(TORCHAO["torchao AdamW8bit"])
    momentum_state(optimizer).reset(first=True, second=True, restart=True)
    for key in ("exp_avg", "exp_avg_sq"):
        held = optimizer.state[params[0]][key]
        assert (held.scale == 0).all()
        held.scale.fill_(1.0)
        assert (held.dequantize() == 0).all()


@needs_bnb
def test_O3_state_without_a_scale_per_block_is_refused() -> None:
    params, optimizer = trained(BNB["bnb AdamW8bit"])
    state = optimizer.state[params[0]]
    state["max1"] = state.pop("absmax1")
    moments = momentum_state(optimizer)
    message = r"no scale per block \(`absmax1`\): it comes from a bitsandbytes without blockwise quantisation"
    with pytest.raises(ValueError, match=message):
        moments.reset(first=True, second=True, restart=True)
    with pytest.raises(ValueError, match=message):
        moments.squares(params[0])


# What is refused.


@pytest.mark.parametrize(
    ("make", "why", "nearest"),
    [
        (optim.Adagrad, "learning-rate schedule", "torch.optim.RMSprop"),
        (optim.Adadelta, "would stop training", "torch.optim.RMSprop"),
        (optim.Adafactor, "rows and columns", "torch.optim.AdamW"),
        (optim.LBFGS, "past gradients, not moments", "torch.optim.AdamW"),
        (optim.SparseAdam, "touched rows only", "torch.optim.AdamW"),
        (lambda p: optim.SGD(p, lr=0.1), "without momentum it keeps nothing", "torch.optim.SGD with `momentum`"),
        (optim.Rprop, "how it keeps its momentum is not known", "torch.optim.AdamW"),
        pytest.param(lambda p: optimi.AdamW(p, lr=0.1), "counts updates by group", "torch.optim.AdamW", marks=needs_optimi),
        pytest.param(lambda p: optimi.Lion(p, lr=0.1), "one size whatever the gradient", "torch.optim.AdamW", marks=needs_optimi),
        pytest.param(eight_bit("Lion8bit"), "one size whatever the gradient", "torch.optim.AdamW", marks=needs_bnb),
        pytest.param(eight_bit("PagedLion8bit"), "one size whatever the gradient", "torch.optim.AdamW", marks=needs_bnb),
        pytest.param(eight_bit("AdEMAMix8bit"), "second, slow momentum", "AdamW8bit of bitsandbytes", marks=needs_bnb),
        pytest.param(eight_bit("LAMB8bit"), "by layer after the moments", "AdamW8bit of bitsandbytes", marks=needs_bnb),
    ],
)
def test_other_optimizers_are_refused_with_the_reason_and_what_comes_nearest(make: Make, why: str, nearest: str) -> None:
    optimizer = make(parameters())
    name = type(optimizer).__name__
    with pytest.raises(ValueError, match=rf"cannot reset \S*\.{name}: .*{why}.* It supports Adam, AdamW") as caught:
        momentum_state(optimizer)
    assert str(caught.value).endswith(f"The nearest of these is {nearest}.")


def test_what_is_no_optimizer_of_torch_is_refused() -> None:
    class DeepSpeedZeroOptimizer:
        """Named as the engine's own, which is no subclass of torch's."""

    with pytest.raises(ValueError, match=r"DeepSpeedZeroOptimizer: the engine keeps moments in partitions of its own"):
        momentum_state(DeepSpeedZeroOptimizer())


def test_every_reason_is_given_in_a_test() -> None:
    assert set(REFUSED) == {
        "Adagrad", "Adadelta", "Adafactor", "AdEMAMix", "DeepSpeed", "LAMB", "LBFGS", "Lion", "SGD", "SparseAdam"
    }  # fmt: skip
