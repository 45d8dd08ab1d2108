"""How a module behaves under strategies that split weights over processes: FSDP2 (`ModelParallelStrategy`) and FSDP."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import TypeVar

import lightning as L
import torch
import torch.distributed as dist
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy, Strategy, StrategyRegistry
from peft import PeftModel
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from transformers import PreTrainedModel
from typing_extensions import override

from lightning_pref.models.full_precision import FullPrecision
from lightning_pref.models.heads import causal_lm_of
from lightning_pref.models.reference import EmaReference, FrozenCopy
from lightning_pref.models.sharding import layers_of, shard, shard_alone

FSDP2 = "fsdp2"

Found = TypeVar("Found")


class FSDP2Strategy(ModelParallelStrategy):
    """FSDP2 over all processes, on the command line `--trainer.strategy fsdp2`.

    `ModelParallelStrategy` by itself takes the processes of a node for parts of one layer (tensor parallelism), which would all
    train on the same rows.

    Args:
        save_distributed_checkpoint: Write a folder, each process its part, instead of one file.
        process_group_backend: Such as `nccl` or `gloo`; that of the device if not given.
    """

    def __init__(self, save_distributed_checkpoint: bool = False, process_group_backend: str | None = None) -> None:
        super().__init__(
            tensor_parallel_size=1,
            save_distributed_checkpoint=save_distributed_checkpoint,
            process_group_backend=process_group_backend,
        )

    @override
    def setup_environment(self) -> None:
        # How many processes there are is known from here on only.
        self._data_parallel_size = self.num_nodes * self.num_processes
        super().setup_environment()


if FSDP2 not in StrategyRegistry:
    StrategyRegistry.register(FSDP2, FSDP2Strategy, description=FSDP2Strategy.__doc__ or "")


def strategy_of(module: L.LightningModule) -> Strategy | None:
    """The strategy a module is trained with; `None` for one without a Trainer."""
    try:
        return module.trainer.strategy
    except RuntimeError:
        return None


def wrapper_of(module: L.LightningModule) -> FullyShardedDataParallel | None:
    """What FSDP has put around a module."""
    strategy = strategy_of(module)
    wrapper = None if strategy is None else strategy.model
    return wrapper if isinstance(wrapper, FullyShardedDataParallel) else None


def splits_weights(strategy: Strategy | None) -> bool:
    """Whether a strategy is one that `split` has something to do under."""
    return isinstance(strategy, FSDPStrategy | ModelParallelStrategy)


def split(module: L.LightningModule, strategy: Strategy | None) -> None:
    """Split every model of a module, policy, reference, value function or reward model, over the processes.

    Under FSDP Lightning does it afterwards; here it is told which layers to split.

    Raises:
        ValueError: For what these strategies cannot do exactly; the message says what can.
    """
    models = list(models_in(module))
    if isinstance(strategy, ModelParallelStrategy):
        mesh = _mesh_of(strategy)
        _make_equal(models, strategy.root_device)
        for model in models:
            shard(model, mesh)
        for part in module.children():
            if next(models_in(part), None) is None and not _is_model(part) and any(p.numel() for p in part.parameters()):
                shard_alone(part, mesh)
    elif isinstance(strategy, FSDPStrategy):
        _check_flat(module, strategy)
        _make_equal(models, strategy.root_device)
        kinds = {type(layer) for model in models for layer in layers_of(causal_lm_of(model))}
        # A layer with an adapter; the memory it is about is FSDP's own (docs/ranks.md).
        warnings.filterwarnings("ignore", message=r".*has both parameters with requires_grad=True and False")
        strategy.kwargs.setdefault("auto_wrap_policy", ModuleWrapPolicy(kinds))
    for part in module.modules():
        if isinstance(part, FrozenCopy):
            # FSDP looks for every weight it has split when it writes a checkpoint, and FSDP2 when it reads one.
            part.saves_weights = True


def models_in(module: nn.Module) -> Iterator[PreTrainedModel | PeftModel]:
    """The models inside a module, whole ones only."""
    for child in module.children():
        if isinstance(child, PreTrainedModel | PeftModel):
            yield child
        else:
            yield from models_in(child)


def _is_model(module: nn.Module) -> bool:
    return isinstance(module, PreTrainedModel | PeftModel)


def _mesh_of(strategy: ModelParallelStrategy) -> DeviceMesh:
    mesh = strategy.device_mesh
    parts = mesh["tensor_parallel"].size()
    if parts > 1:
        raise ValueError(
            f"`ModelParallelStrategy` was asked to cut every layer in {parts} parts (tensor parallelism), which these modules do "
            "not do: the processes would repeat each other. Use `--trainer.strategy fsdp2`, or give it `tensor_parallel_size: 1` "
            "and as `data_parallel_size` the number of processes."
        )
    return mesh["data_parallel"]


def _check_flat(module: L.LightningModule, strategy: FSDPStrategy) -> None:
    if not strategy.kwargs.get("use_orig_params", True):
        raise ValueError(
            "FSDP with `use_orig_params: false` makes one parameter of all weights of a layer, so that none could be frozen, "
            "or be left out of weight decay, by itself. Leave the setting out, or use `--trainer.strategy fsdp2`."
        )
    if any(isinstance(part, EmaReference) for part in module.modules()):
        raise ValueError(
            "A moving reference does not go with FSDP, which cuts the weights of policy and reference at different places. Use "
            "FSDP2 (`--trainer.strategy fsdp2`), or a reference that stays ('copy')."
        )
    precision = str(strategy.precision_plugin.precision)
    if precision != "32-true" and any(isinstance(part, FullPrecision) for part in module.modules()):
        raise ValueError(
            f"The head of a reward model or value function stays in float32, but FSDP with the precision {precision!r} would "
            "cast it like everything else. Use FSDP2 (`--trainer.strategy fsdp2`), or the precision '32-true'."
        )


def _make_equal(models: list[PreTrainedModel | PeftModel], device: torch.device) -> None:
    """Give every process the fresh adapters of the first; all other weights come from files or seeds."""
    for model in models:
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                first = parameter.detach().to(device, copy=True)
                dist.broadcast(first, 0)
                with torch.no_grad():
                    parameter.copy_(first)
