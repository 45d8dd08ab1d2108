"""Optimisers over parameters that FSDP2 splits: two real processes over gloo against one."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from gloo_ranks import launched
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from lightning_pref.callbacks.optimizer_state import momentum_state
from lightning_pref.modules.optimisation import OptimizerSettings

pytestmark = pytest.mark.slow

RANKS = 2
# By name: the package, the rounding, and the dtype of the weights.
SPLIT: dict[str, tuple[str, str, torch.dtype]] = {
    "torchao_adamw_8bit": ("torchao", "nearest", torch.float32),
    "adamw": ("optimi", "kahan", torch.bfloat16),
    "lion": ("optimi", "nearest", torch.float32),
}


def model(dtype: torch.dtype, *, split: bool) -> nn.Module:
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 64)).to(dtype)
    if split:
        mesh = init_device_mesh("cpu", (RANKS,))
        for layer in (layers[0], layers[2]):
            fully_shard(layer, mesh=mesh)
        fully_shard(layers, mesh=mesh)
    return layers


def optimizer_of(layers: nn.Module, name: str) -> Optimizer:
    settings = OptimizerSettings(
        name=name,  # type: ignore[arg-type]
        rounding=SPLIT[name][1],  # type: ignore[arg-type]
        learning_rate=0.01,
        betas=(0.9, 0.99),
        weight_decay=0.1,
        schedule="constant",
        warmup=0,
    )
    return settings.build(layers.parameters(), 10)[0]


def train(layers: nn.Module, optimizer: Optimizer, updates: range) -> None:
    """The same rows on every rank, so that the mean over ranks is the gradient of one process."""
    for update in updates:
        rows = torch.randn(8, 64, generator=torch.Generator().manual_seed(update))
        layers(rows.to(next(layers.parameters()).dtype)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def whole(layers: nn.Module) -> list[Tensor]:
    return [p.full_tensor() if isinstance(p, DTensor) else p.detach() for p in layers.parameters()]


def train_split(folder: Path, _rank: int, _ranks: int) -> dict[str, dict[str, Any]]:
    dist.init_process_group("gloo")
    found: dict[str, dict[str, Any]] = {}
    for name in (name for name, (package, _, _) in SPLIT.items() if find_spec(package) is not None):
        dtype = SPLIT[name][2]
        layers = model(dtype, split=True)
        optimizer = optimizer_of(layers, name)
        train(layers, optimizer, range(4))
        found[name] = {"trained": whole(layers)}
        dcp.save({"optimizer": get_optimizer_state_dict(layers, optimizer)}, checkpoint_id=folder / name)
        resumed = model(dtype, split=True)
        resumed.load_state_dict(layers.state_dict())
        other = optimizer_of(resumed, name)
        state = {"optimizer": get_optimizer_state_dict(resumed, other)}
        dcp.load(state, checkpoint_id=folder / name)
        set_optimizer_state_dict(resumed, other, state["optimizer"])
        train(layers, optimizer, range(4, 6))
        train(resumed, other, range(4, 6))
        found[name] |= {"on": whole(layers), "resumed": whole(resumed)}
        if name == "torchao_adamw_8bit":
            momentum_state(optimizer).reset(first=True, second=True, restart=True)
            fresh = optimizer_of(resumed, name)
            train(layers, optimizer, range(6, 8))
            train(resumed, fresh, range(6, 8))
            found[name] |= {"reset": whole(layers), "fresh": whole(resumed)}
    if find_spec("torchao") is not None:
        try:
            optimizer_of(model(torch.bfloat16, split=True), "torchao_adamw_8bit")
        except ValueError as error:
            found["halves"] = {"refused": str(error)}
    if find_spec("bitsandbytes") is not None:
        try:
            OptimizerSettings(name="adamw_8bit").build(model(torch.float32, split=True).parameters(), 10)
        except ValueError as error:
            found["bitsandbytes"] = {"refused": str(error)}
    dist.destroy_process_group()
    return found


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    first, _ = launched(train_split, tmp_path_factory.mktemp("ranks"), RANKS)
    return first  # type: ignore[no-any-return]


def same(ones: list[Tensor], others: list[Tensor]) -> bool:
    return all(torch.equal(one, other) for one, other in zip(ones, others, strict=True))


@pytest.mark.parametrize("name", SPLIT)
def test_split_parameters_are_updated_as_whole_ones_are(name: str, ran: dict[str, dict[str, Any]]) -> None:
    """Bit for bit: a shard holds whole rows, and these sizes whole blocks of 256 codes."""
    if name not in ran:
        pytest.skip(f"{SPLIT[name][0]} is not installed")
    layers = model(SPLIT[name][2], split=False)
    train(layers, optimizer_of(layers, name), range(4))
    assert same(ran[name]["trained"], whole(layers))


@pytest.mark.parametrize("name", SPLIT)
def test_C1_a_sharded_checkpoint_goes_on_bit_for_bit(name: str, ran: dict[str, dict[str, Any]]) -> None:
    if name not in ran:
        pytest.skip(f"{SPLIT[name][0]} is not installed")
    assert same(ran[name]["on"], ran[name]["resumed"])
    assert not same(ran[name]["on"], ran[name]["trained"])


@pytest.mark.skipif(find_spec("torchao") is None, reason="torchao is not installed")
def test_O4_split_moments_of_torchao_are_reset(ran: dict[str, dict[str, Any]]) -> None:
    assert same(ran["torchao_adamw_8bit"]["reset"], ran["torchao_adamw_8bit"]["fresh"])


@pytest.mark.skipif(find_spec("torchao") is None, reason="torchao is not installed")
def test_split_weights_in_16_bit_are_refused_by_torchao(ran: dict[str, dict[str, Any]]) -> None:
    assert "cannot update 16-bit weights that FSDP2 splits" in ran["halves"]["refused"]


@pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed")
def test_split_parameters_are_refused_by_bitsandbytes_whoever_split_them(ran: dict[str, dict[str, Any]]) -> None:
    assert "'adamw_8bit' does not go with FSDP2" in ran["bitsandbytes"]["refused"]
