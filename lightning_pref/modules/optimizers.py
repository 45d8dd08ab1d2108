"""Optimisers by name: the package each comes from, and where it would not do what its name says."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from importlib import import_module
from typing import Any, Literal, NamedTuple

import torch
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from torch.distributed.tensor import DTensor
from torch.nn import Parameter
from torch.optim import Optimizer

OptimizerName = Literal[
    "adamw",
    "adamw_8bit",
    "paged_adamw_8bit",
    "paged_adamw_32bit",
    "torchao_adamw_8bit",
    "lion",
    "lion_8bit",
    "paged_lion_8bit",
    "paged_lion_32bit",
]
Rounding = Literal["nearest", "stochastic", "kahan"]
Sharding = Literal["fsdp", "fsdp2", "deepspeed"]
Group = dict[str, Any]  # Any: parameters, and options of the optimiser's own

HALVES = (torch.bfloat16, torch.float16)


class Source(NamedTuple):
    """Where an optimiser comes from."""

    package: Literal["torch", "bitsandbytes", "torchao", "torch-optimi"]
    kind: str  # name of the class


class Extra(NamedTuple):
    """An optional package."""

    name: str  # of the extra of this package
    module: str


EXTRAS: Mapping[str, Extra] = {
    "bitsandbytes": Extra("bnb", "bitsandbytes.optim"),
    "torchao": Extra("torchao", "lightning_pref.modules.torchao_adamw"),
    "torch-optimi": Extra("optimi", "optimi"),
}

# Every combination that there is.
SOURCES: Mapping[tuple[OptimizerName, Rounding], Source] = {
    ("adamw", "nearest"): Source("torch", "AdamW"),
    ("adamw", "kahan"): Source("torch-optimi", "AdamW"),
    ("adamw_8bit", "nearest"): Source("bitsandbytes", "AdamW8bit"),
    ("paged_adamw_8bit", "nearest"): Source("bitsandbytes", "PagedAdamW8bit"),
    ("paged_adamw_32bit", "nearest"): Source("bitsandbytes", "PagedAdamW32bit"),
    ("torchao_adamw_8bit", "nearest"): Source("torchao", "AdamW8bit"),
    ("torchao_adamw_8bit", "stochastic"): Source("torchao", "AdamW8bit"),
    ("lion", "nearest"): Source("torch-optimi", "Lion"),
    ("lion", "kahan"): Source("torch-optimi", "Lion"),
    ("lion_8bit", "nearest"): Source("bitsandbytes", "Lion8bit"),
    ("paged_lion_8bit", "nearest"): Source("bitsandbytes", "PagedLion8bit"),
    ("paged_lion_32bit", "nearest"): Source("bitsandbytes", "PagedLion32bit"),
}

# Why a package's optimisers are not for parameters that are split over processes, and what comes nearest.
_FLAT = "keeps the state of an optimiser in flat pieces of its own, which was never shown to work with"
_FSDP2 = "the same optimiser under FSDP2 (`ModelParallelStrategy`), or `name: adamw`"
_BNB = "bitsandbytes does not know how its state is split there, so that a checkpoint would not hold all of it"
_TORCHAO = "`name: torchao_adamw_8bit` under FSDP2 (`ModelParallelStrategy`), or `name: adamw`"
UNSHARDED: Mapping[tuple[str, Sharding], tuple[str, str]] = {
    ("bitsandbytes", "fsdp"): (_BNB, _TORCHAO),
    ("bitsandbytes", "fsdp2"): (_BNB, "`name: torchao_adamw_8bit`, or `name: adamw`"),
    ("bitsandbytes", "deepspeed"): (_BNB, _TORCHAO),
    ("torchao", "fsdp"): (f"FSDP {_FLAT} torchao", _FSDP2),
    ("torchao", "deepspeed"): (f"DeepSpeed {_FLAT} torchao", _FSDP2),
    ("torch-optimi", "fsdp"): (f"FSDP {_FLAT} torch-optimi", _FSDP2),
    ("torch-optimi", "deepspeed"): (f"DeepSpeed {_FLAT} torch-optimi", _FSDP2),
}

TITLES: Mapping[Sharding, str] = {"fsdp": "FSDP", "fsdp2": "FSDP2", "deepspeed": "DeepSpeed"}


def source_of(name: OptimizerName, rounding: Rounding) -> Source:
    """Where an optimiser comes from; raises, and says what comes nearest, where there is no such combination."""
    known = sorted({each for each, _ in SOURCES})
    if name not in known:
        raise ValueError(f"Unknown optimiser {name!r}; known: {', '.join(known)}.")
    found = SOURCES.get((name, rounding))
    if found is not None:
        return found
    if rounding == "stochastic":
        cure = "It is for `name: torchao_adamw_8bit`; with `name: adamw` or `lion` use `rounding: kahan`."
    elif rounding == "kahan":
        cure = "It is for `name: adamw` and `name: lion`; with `name: torchao_adamw_8bit` use `rounding: stochastic`."
    else:
        cure = "Known: nearest, stochastic, kahan."
    raise ValueError(f"No package offers the optimiser {name!r} with `rounding: {rounding}`. {cure}")


def import_package(source: Source, name: str) -> Any:  # Any: a module of another package
    """The module that an optimiser is in; raises, and says how to install it, where it is missing."""
    if source.package == "torch":
        return torch.optim
    extra = EXTRAS[source.package]
    try:
        return import_module(extra.module)
    except ImportError as error:
        raise ValueError(
            f"The optimiser {name!r} comes from {source.package}, which cannot be imported ({error}). Install it with "
            f"`pip install 'lightning-pref[{extra.name}]'`, or use `name: adamw` with `rounding: nearest`."
        ) from error


def sharding_of(strategy: object) -> Sharding | None:
    """How a strategy of Lightning splits parameters over processes, if it does."""
    if isinstance(strategy, FSDPStrategy):
        return "fsdp"
    if isinstance(strategy, ModelParallelStrategy):
        return "fsdp2"
    return "deepspeed" if isinstance(strategy, DeepSpeedStrategy) else None


def check_checkpoints(name: OptimizerName, strategy: object) -> None:
    """Raise for a strategy that would write checkpoints which nobody can read.

    Args:
        name: Of the optimiser.
        strategy: Of Lightning.
    """
    if source_of(name, "nearest").package != "torchao" or not isinstance(strategy, ModelParallelStrategy):
        return
    # Lightning tells it nobody.
    if not getattr(strategy, "_save_distributed_checkpoint", True):
        raise ValueError(
            f"The state of the optimiser {name!r} cannot be gathered into the one file that a checkpoint of this run would be. "
            "Let each process write its part: `save_distributed_checkpoint: true` of the strategy, or use `name: adamw`."
        )


def build_optimizer(
    groups: Sequence[Group],
    *,
    name: OptimizerName,
    rounding: Rounding,
    learning_rate: float,
    betas: tuple[float, float],
    eps: float | None,
    fused: bool,
    sharding: Sharding | None,
) -> Optimizer:
    """The optimiser over groups of parameters; raises for parameters that it cannot update as asked.

    Args:
        groups: Parameters and the weight decay of each group.
        name: Of the optimiser.
        rounding: Of the updated weights.
        learning_rate: Of every group.
        betas: Decay rates of the two means.
        eps: Added to the root of the second moment; `None` for an optimiser without one.
        fused: Whether one kernel may update all parameters, where the optimiser and the device have it.
        sharding: How the strategy splits parameters, if it does.
    """
    source = source_of(name, rounding)
    parameters = [parameter for group in groups for parameter in group["params"]]
    _refuse_sharding(name, source, parameters, sharding)
    _refuse_dtypes(name, source, parameters, rounding)
    options: dict[str, Any] = {} if eps is None else {"eps": eps}  # Any: each class has options of its own
    if source.package == "torch":
        options["fused"] = fused and all(p.device.type in ("cpu", "cuda") and p.is_floating_point() for p in parameters)
    if source.package == "torchao":
        options["bf16_stochastic_round"] = rounding == "stochastic"
    if source.package == "torch-optimi":
        _refuse_stalled_means(name, parameters, rounding, betas)
        options["kahan_sum"] = rounding == "kahan"
    kind = getattr(import_package(source, name), source.kind)
    made: Optimizer = kind(groups, lr=learning_rate, betas=betas, **options)
    return made


def _refuse_sharding(name: str, source: Source, parameters: Sequence[Parameter], sharding: Sharding | None) -> None:
    if sharding is None and any(isinstance(parameter, DTensor) for parameter in parameters):
        sharding = "fsdp2"
    if sharding is not None and (source.package, sharding) in UNSHARDED:
        why, nearest = UNSHARDED[source.package, sharding]
        raise ValueError(f"The optimiser {name!r} does not go with {TITLES[sharding]}: {why}. Nearest to it is {nearest}.")
    if source.package == "torchao" and any(isinstance(p, DTensor) and p.dtype != torch.float32 for p in parameters):
        raise ValueError(
            f"The optimiser {name!r} cannot update 16-bit weights that FSDP2 splits: torchao computes in float32 there and "
            "takes its state for 16 bit. Keep the weights in float32 and use the precision 'bf16-mixed', or use `name: adamw` "
            "with `rounding: kahan`."
        )


def _refuse_dtypes(name: str, source: Source, parameters: Sequence[Parameter], rounding: Rounding) -> None:
    """Raise for a rounding that none of the parameters would notice."""
    if rounding == "nearest":
        return
    acts_on = (torch.bfloat16,) if source.package == "torchao" else HALVES
    found = {parameter.dtype for parameter in parameters}
    if not found & set(acts_on):
        raise ValueError(
            f"`rounding: {rounding}` of the optimiser {name!r} acts on trained weights in {_names(acts_on)}, but those of this "
            f"run are in {_names(found)}, where it has no effect. Leave it out, or keep the weights themselves in bfloat16: "
            "`dtype: bfloat16` with the precision 'bf16-true', without LoRA, whose own weights are in float32."
        )


def _refuse_stalled_means(name: str, parameters: Sequence[Parameter], rounding: Rounding, betas: tuple[float, float]) -> None:
    """Raise for a running mean that its own dtype would hold still, since the change of one update is rounded away."""
    slowest = max(betas)
    for dtype in HALVES:
        rounded_away = torch.finfo(dtype).eps / 2
        if 1.0 - slowest < rounded_away and any(parameter.dtype == dtype for parameter in parameters):
            raise ValueError(
                f"The optimiser {name!r} with `rounding: {rounding}` keeps its running means in the dtype of the weights, and "
                f"in {_names([dtype])} one with the decay rate {slowest} would stand still: it changes by {1.0 - slowest:.2g} "
                f"of itself in an update, and less than {rounded_away:.2g} is rounded away. Use `betas: [0.9, 0.99]`."
            )


def _names(dtypes: Iterable[torch.dtype]) -> str:
    return " or ".join(sorted(str(dtype).removeprefix("torch.") for dtype in dtypes))
