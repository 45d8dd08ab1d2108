"""Every optimiser that can be asked for by name, each from its real package."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any, get_args

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader
from transformers import LlamaForCausalLM

from lightning_pref.data.groups import GroupBatch, PromptGroup
from lightning_pref.modules import SFTModule
from lightning_pref.modules.optimisation import OptimizerSettings
from lightning_pref.modules.optimizers import (
    EXTRAS,
    SOURCES,
    UNSHARDED,
    OptimizerName,
    Rounding,
    Sharding,
    check_checkpoints,
    sharding_of,
)
from lightning_pref.modules.value import with_rate_factor

Combination = tuple[OptimizerName, Rounding]

# The module of each package, to see whether it is there.
MODULES = {"torch": "torch", "bitsandbytes": "bitsandbytes", "torchao": "torchao", "torch-optimi": "optimi"}
# A CPU has no pages to move, which bitsandbytes says once for each optimiser.
pytestmark = pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")


def needs(package: str) -> pytest.MarkDecorator:
    missing = find_spec(MODULES[package]) is None
    return pytest.mark.skipif(missing, reason=f"{package} is not installed")


def those(wanted: Callable[[Combination], bool] = lambda _: True) -> list[Any]:
    """Names and roundings, each skipped where its package is missing."""
    return [
        pytest.param(*combination, marks=needs(source.package), id="-".join(combination))
        for combination, source in SOURCES.items()
        if wanted(combination)
    ]


every_optimizer = pytest.mark.parametrize(("name", "rounding"), those())


def parameters(rounding: Rounding = "nearest") -> list[nn.Parameter]:
    """A matrix that 8-bit optimisers quantise and a vector that they do not, in a dtype that the rounding acts on."""
    generator = torch.Generator().manual_seed(0)
    dtype = torch.float32 if rounding == "nearest" else torch.bfloat16
    return [nn.Parameter(torch.randn(size, generator=generator).to(dtype)) for size in ((64, 128), (10,))]


def give_gradients(params: list[nn.Parameter], seed: int) -> None:
    generator = torch.Generator().manual_seed(100 + seed)
    for parameter in params:
        parameter.grad = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)


def built(params: list[nn.Parameter], name: OptimizerName, rounding: Rounding, **options: Any) -> tuple[Optimizer, LambdaLR]:
    defaults: dict[str, Any] = {"learning_rate": 0.01, "betas": (0.9, 0.99), "schedule": "constant", "warmup": 0}
    return OptimizerSettings(**{"name": name, "rounding": rounding, **defaults, **options}).build(params, 100)


def train(params: list[nn.Parameter], optimizer: Optimizer, schedule: LambdaLR, updates: range) -> None:
    for update in updates:
        give_gradients(params, update)
        optimizer.step()
        schedule.step()


def values_of(params: list[nn.Parameter]) -> list[Tensor]:
    return [parameter.detach().clone() for parameter in params]


def expected(start: Tensor, name: str, updates: int, *, rate: float = 0.01, beta1: float = 0.9, beta2: float = 0.99) -> Any:
    """The vector after some updates by the formulas of the papers, in float64."""
    weights, mean, squares = start.double().numpy().copy(), np.zeros(start.shape), np.zeros(start.shape)
    for update in range(updates):
        stand_ins = [nn.Parameter(torch.zeros(64, 128)), nn.Parameter(torch.zeros(start.shape))]
        give_gradients(stand_ins, update)
        assert stand_ins[1].grad is not None
        gradient = stand_ins[1].grad.to(start.dtype).double().numpy()
        if "lion" in name:
            weights -= rate * np.sign(beta1 * mean + (1 - beta1) * gradient)
            mean = beta2 * mean + (1 - beta2) * gradient
        else:
            mean = beta1 * mean + (1 - beta1) * gradient
            squares = beta2 * squares + (1 - beta2) * gradient**2
            count = update + 1
            weights -= rate * (mean / (1 - beta1**count)) / (np.sqrt(squares / (1 - beta2**count)) + 1e-8)
    return weights


@every_optimizer
def test_updates_are_those_of_the_paper(name: OptimizerName, rounding: Rounding) -> None:
    """On the vector, whose moments no optimiser quantises; in bfloat16 up to a spacing of numbers, by chance one each time."""
    params = parameters(rounding)
    start = values_of(params)[1]
    train(params, *built(params, name, rounding), range(5))
    found = params[1].detach().double().numpy()
    wanted = expected(start, name, 5)
    largest = np.maximum(np.abs(wanted), np.abs(start.double().numpy()))
    spacing = 2.0 ** (np.floor(np.log2(largest)) - 7)
    tolerance = {"nearest": 1e-6, "kahan": spacing, "stochastic": 5 * spacing}[rounding]
    assert (np.abs(found - wanted) <= tolerance).all()
    assert np.abs(found - start.double().numpy()).max() > 0.02, "five steps of up to 0.01 each"


@pytest.mark.parametrize(("name", "rounding"), those(lambda each: "8bit" in each[0] and each[1] == "nearest"))
def test_quantised_moments_lead_almost_where_exact_ones_do(name: OptimizerName, rounding: Rounding) -> None:
    """The codes of a block have two digits at best: of Lion's signs a few per cent may turn."""
    exact, quantised = parameters(), parameters()
    exact_name: OptimizerName = "lion" if "lion" in name else "adamw"
    if exact_name == "lion":
        pytest.importorskip("optimi")
    start = values_of(exact)[0]
    train(exact, *built(exact, exact_name, "nearest"), range(20))
    train(quantised, *built(quantised, name, rounding), range(20))
    moved, error = exact[0].detach() - start, quantised[0].detach() - exact[0].detach()
    assert 0 < error.norm() < 0.1 * moved.norm()


@every_optimizer
def test_schedule_and_decay_act_with_every_optimizer(name: OptimizerName, rounding: Rounding) -> None:
    """Without a gradient only the decay moves matrices: by the rate of each update, and vectors not at all."""
    params = parameters(rounding)
    start = values_of(params)
    options = {"weight_decay": 0.5, "schedule": "linear", "warmup": 2, "learning_rate": 0.1}
    optimizer, schedule = built(params, name, rounding, **options)
    shrunk = 1.0
    for rate in (0.05, 0.1, 0.1, 0.1 * 97 / 98):
        assert float(optimizer.param_groups[0]["lr"]) == pytest.approx(rate)
        for parameter in params:
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        schedule.step()
        shrunk *= 1 - rate * 0.5
    # Of the four roundings to bfloat16 each is off by half a spacing of at most 2^-7, by chance by a whole one.
    tolerance = {"nearest": 1e-6, "kahan": 4 * 2**-8, "stochastic": 4 * 2**-7}[rounding]
    assert torch.allclose(params[0].detach().float(), start[0].float() * shrunk, rtol=tolerance, atol=0)
    assert torch.equal(params[1].detach(), start[1])


@every_optimizer
def test_a_value_function_keeps_its_own_rate(name: OptimizerName, rounding: Rounding) -> None:
    """The first update of AdamW and Lion has the size of the learning rate."""
    params = parameters(rounding)
    with torch.no_grad():
        for parameter in params:
            parameter.zero_()
    optimizer, schedule = built(params, name, rounding)
    own = nn.Module()
    own.register_parameter("head", params[1])
    with_rate_factor(optimizer, own, 4.0)
    schedule = LambdaLR(optimizer, schedule.lr_lambdas[0])
    for update in range(2):
        assert [float(group["lr"]) for group in optimizer.param_groups if group["params"]] == pytest.approx([0.01, 0.04])
        if update == 0:
            give_gradients(params, 0)
            optimizer.step()
            assert params[0].detach().abs().median().item() == pytest.approx(0.01, rel=0.01)
            assert params[1].detach().abs().median().item() == pytest.approx(0.04, rel=0.01)
        schedule.step()


@every_optimizer
def test_C1_a_checkpoint_read_with_weights_only_goes_on_bit_for_bit(name: OptimizerName, rounding: Rounding) -> None:
    torch.manual_seed(0)
    params = parameters(rounding)
    optimizer, schedule = built(params, name, rounding, schedule="cosine")
    train(params, optimizer, schedule, range(3))
    file = io.BytesIO()
    state = {"weights": values_of(params), "optimizer": optimizer.state_dict(), "schedule": schedule.state_dict()}
    torch.save({**state, "chance": torch.get_rng_state()}, file)
    train(params, optimizer, schedule, range(3, 6))

    file.seek(0)
    # A function that says where to, as Lightning gives one: torch then loads nothing but plain tensors.
    saved = torch.load(file, map_location=lambda storage, _: storage, weights_only=True)
    others = [nn.Parameter(values) for values in saved["weights"]]
    optimizer, schedule = built(others, name, rounding, schedule="cosine")
    optimizer.load_state_dict(saved["optimizer"])
    schedule.load_state_dict(saved["schedule"])
    torch.set_rng_state(saved["chance"])
    train(others, optimizer, schedule, range(3, 6))
    assert all(torch.equal(one, other) for one, other in zip(params, others, strict=True))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists")
@pytest.mark.parametrize(("name", "rounding"), those(lambda each: each[1] != "stochastic" and "paged" not in each[0]))
def test_C1_a_trainer_goes_on_bit_for_bit_from_its_checkpoint(
    name: OptimizerName,
    rounding: Rounding,
    tiny_model: Callable[..., LlamaForCausalLM],
    random_groups: Callable[..., list[PromptGroup]],
    tmp_path: Path,
) -> None:
    """Four updates at once, or two and two: by Lightning's own checkpoint, read with `weights_only=True`."""
    batch = GroupBatch.from_groups(random_groups(ranked=False))
    dtype = torch.float32 if rounding == "nearest" else torch.bfloat16

    def trained(**options: Any) -> dict[str, Tensor]:
        settings = OptimizerSettings(name=name, rounding=rounding, betas=(0.9, 0.99), learning_rate=1e-2)
        # Wide enough for moments in 8 bit.
        model = tiny_model(hidden_size=64, intermediate_size=128).to(dtype)
        module = SFTModule(model, optimizer=settings)
        trainer = L.Trainer(
            max_steps=4,
            accelerator="cpu",
            precision="32-true" if rounding == "nearest" else "bf16-true",
            logger=False,
            callbacks=[ModelCheckpoint(dirpath=tmp_path, filename="{step}", every_n_train_steps=1, save_top_k=-1)],
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        loader: DataLoader[Any] = DataLoader([batch] * 2, batch_size=None)  # type: ignore[arg-type]
        trainer.fit(module, loader, weights_only=True, **options)
        return module.policy.state_dict()

    whole = trained()
    resumed = trained(ckpt_path=tmp_path / "step=2.ckpt")
    start = tiny_model(hidden_size=64, intermediate_size=128).to(dtype).state_dict()
    assert all(torch.equal(whole[key], resumed[key]) for key in whole)
    assert not any(torch.equal(whole[key], start[key]) for key in whole)


# Rounding.


def drift(name: OptimizerName, rounding: Rounding, dtype: torch.dtype = torch.bfloat16, updates: int = 200) -> Tensor:
    """How far ones moved under a constant gradient and a learning rate of a tenth of their spacing below 1, [8192]."""
    torch.manual_seed(0)
    parameter = nn.Parameter(torch.ones(64, 128, dtype=dtype))
    optimizer, _ = built([parameter], name, rounding, learning_rate=2**-8 / 10)
    for _ in range(updates):
        parameter.grad = torch.ones_like(parameter)
        optimizer.step()
    return 1.0 - parameter.detach().double().flatten()


def test_small_updates_of_bfloat16_weights_are_lost_to_the_nearest_number() -> None:
    assert (drift("adamw", "nearest") == 0).all()


@needs("torch-optimi")
@pytest.mark.parametrize("name", ["adamw", "lion"])
def test_kahan_summation_keeps_every_small_update(name: OptimizerName) -> None:
    """Each of 8192 weights ends within one spacing (2^-8) of where exact sums end."""
    found = drift(name, "kahan")
    assert (found - 200 * 2**-8 / 10).abs().max() <= 2**-8


@needs("torchao")
def test_stochastic_rounding_keeps_small_updates_on_average() -> None:
    """Each weight is a random walk of 200 steps of 0 or one spacing, so that the mean of 8192 is known to 0.5 % (4 sigma)."""
    found = drift("torchao_adamw_8bit", "stochastic")
    assert found.mean().item() == pytest.approx(200 * 2**-8 / 10, rel=0.01)
    assert found.std() > 0, "by chance"


def test_a_second_moment_in_bfloat16_stands_still_at_the_default_decay() -> None:
    """Why `adamw` on bfloat16 weights wants betas of (0.9, 0.99): at 0.999 the mean of squares never falls again."""

    def squares_after_a_spike(beta2: float) -> float:
        parameter = nn.Parameter(torch.ones(8, dtype=torch.bfloat16))
        optimizer, _ = built([parameter], "adamw", "nearest", betas=(0.9, beta2))
        for update in range(1500):
            parameter.grad = torch.full_like(parameter, 1.0 if update < 500 else 0.01)
            optimizer.step()
        found: float = optimizer.state[parameter]["exp_avg_sq"].max().item()
        return found

    assert squares_after_a_spike(0.999) == pytest.approx(0.25), "as after the spike; exact: 0.145"
    assert squares_after_a_spike(0.99) < 1e-2


@needs("torch-optimi")
@pytest.mark.parametrize("rounding", ["kahan", "nearest"])
def test_means_that_their_own_dtype_would_hold_still_are_refused(rounding: Rounding) -> None:
    name: OptimizerName = "adamw" if rounding == "kahan" else "lion"
    message = (
        r"decay rate 0.999 would stand still: .*0.001 of itself.*less than 0.0039 is rounded away. Use `betas: \[0.9, 0.99\]`"
    )
    with pytest.raises(ValueError, match=message):
        built(parameters("kahan"), name, rounding, betas=(0.9, 0.999))
    halves = [nn.Parameter(torch.zeros(4, dtype=torch.float16))]
    built(halves, name, rounding, betas=(0.9, 0.999))  # float16 has three bits more


# What is refused.


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "adam"}, "Unknown optimiser 'adam'; known: adamw, adamw_8bit, lion"),
        (
            {"name": "lion_8bit", "rounding": "kahan"},
            "'lion_8bit' with `rounding: kahan`. It is for `name: adamw` and `name: lion`",
        ),
        ({"rounding": "stochastic"}, "'adamw' with `rounding: stochastic`. It is for `name: torchao_adamw_8bit`"),
        ({"rounding": "up"}, "'adamw' with `rounding: up`. Known: nearest, stochastic, kahan"),
        ({"name": "lion_8bit", "eps": 1e-8}, "'lion_8bit' divides by nothing and so has no `eps`; leave it out"),
        ({"betas": (0.9, 1.0)}, r"`betas` are two decay rates in \[0, 1\), got \(0.9, 1.0\)"),
    ],
)
def test_settings_that_no_optimizer_has_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        OptimizerSettings(**options)


@pytest.mark.parametrize(
    ("name", "rounding", "dtype", "message"),
    [
        pytest.param("adamw", "kahan", torch.float32, "in bfloat16 or float16, but.* in float32", marks=needs("torch-optimi")),
        pytest.param("lion", "kahan", torch.float32, "in bfloat16 or float16, but.* in float32", marks=needs("torch-optimi")),
        pytest.param("torchao_adamw_8bit", "stochastic", torch.float16, "in bfloat16, but.* in float16", marks=needs("torchao")),
    ],
)
def test_a_rounding_without_effect_is_refused(name: OptimizerName, rounding: Rounding, dtype: torch.dtype, message: str) -> None:
    params = [nn.Parameter(torch.zeros(4, dtype=dtype))]
    with pytest.raises(ValueError, match=f"`rounding: {rounding}` of the optimiser '{name}' acts on trained weights {message}"):
        built(params, name, rounding)


@pytest.mark.parametrize("package", EXTRAS)
def test_a_missing_package_is_named_with_its_extra(package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    name, rounding = next(combination for combination, source in SOURCES.items() if source.package == package)
    for module in {EXTRAS[package].module, "torchao.optim", "bitsandbytes", "optimi"}:
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(
        ValueError, match=rf"'{name}' comes from {package}, which .*`pip install 'lightning-pref\[{EXTRAS[package].name}\]'`"
    ):
        OptimizerSettings(name=name, rounding=rounding)


@pytest.mark.parametrize(("package", "sharding"), UNSHARDED)
def test_optimizers_that_a_strategy_would_tear_apart_are_refused(package: str, sharding: Sharding) -> None:
    name, rounding = next(combination for combination, source in SOURCES.items() if source.package == package)
    if find_spec(MODULES[package]) is None:
        pytest.skip(f"{package} is not installed")
    settings = OptimizerSettings(name=name, rounding=rounding)
    title = {"fsdp": "FSDP", "fsdp2": "FSDP2", "deepspeed": "DeepSpeed"}[sharding]
    with pytest.raises(ValueError, match=rf"'{name}' does not go with {title}: .*Nearest to it is .*`name: adamw`\."):
        settings.build(parameters(rounding), 10, sharding=sharding)
    OptimizerSettings().build(parameters(), 10, sharding=sharding)


def test_how_a_strategy_splits_parameters_is_known() -> None:
    # DeepSpeed's needs its package to be built, not to be told apart.
    deepspeed = DeepSpeedStrategy.__new__(DeepSpeedStrategy)
    strategies = (DDPStrategy(), FSDPStrategy(), ModelParallelStrategy(), deepspeed)
    assert [sharding_of(strategy) for strategy in strategies] == [None, "fsdp", "fsdp2", "deepspeed"]


@needs("torchao")
def test_a_state_that_cannot_be_gathered_is_not_written_into_one_file() -> None:
    with pytest.raises(ValueError, match="'torchao_adamw_8bit' cannot be gathered.*`save_distributed_checkpoint: true`"):
        check_checkpoints("torchao_adamw_8bit", ModelParallelStrategy(save_distributed_checkpoint=False))
    check_checkpoints("torchao_adamw_8bit", ModelParallelStrategy(save_distributed_checkpoint=True))
    check_checkpoints("torchao_adamw_8bit", DDPStrategy())
    check_checkpoints("adamw", ModelParallelStrategy(save_distributed_checkpoint=False))


def test_every_name_has_a_source_and_rounds_to_the_nearest_number_at_least() -> None:
    assert {name for name, _ in SOURCES} == set(get_args(OptimizerName))
    assert {name for name, rounding in SOURCES if rounding == "nearest"} == set(get_args(OptimizerName))
