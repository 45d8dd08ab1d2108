"""What one process of a run has for itself, for a checkpoint that one of them writes; and what all of them agree on."""

from __future__ import annotations

import logging
import random
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import lightning as L
import numpy as np
import torch
import torch.distributed as dist
from lightning.pytorch.strategies import FSDPStrategy
from torch import Tensor, nn
from torch.utils.data import RandomSampler

from lightning_pref.data.run_place import RunPlace

logger = logging.getLogger(__name__)


@runtime_checkable
class Carrier(Protocol):
    """A part of a run that keeps something of its own process which Lightning does not put into checkpoints."""

    def rank_state(self) -> dict[str, Any]:  # Any: plain data and tensors
        """What it keeps, as plain data and CPU tensors; called on every rank between two updates."""

    def load_rank_state(self, state: dict[str, Any]) -> None:  # Any: as above
        """Take up what `rank_state` gave on the same rank, before the first batch."""


def carriers_of(trainer: L.Trainer) -> dict[str, Carrier]:
    """The module, the data and the loggers that keep something, by a name that a resumed run finds again."""
    parts: dict[str, object] = {"module": trainer.lightning_module, "data": trainer.datamodule}  # type: ignore[attr-defined]
    parts |= {f"logger {type(sink).__name__}": sink for sink in trainer.loggers}
    return {name: part for name, part in parts.items() if isinstance(part, Carrier)}


def keeps_place(trainer: L.Trainer) -> bool:
    """Whether the data goes on inside an epoch: the data module keeps its place, or each loader does. Warns where not."""
    datamodule, loaders = trainer.datamodule, trainer.fit_loop._combined_loader  # type: ignore[attr-defined]  # noqa: SLF001
    if datamodule is not None and type(datamodule).state_dict is not L.LightningDataModule.state_dict:
        return True
    flat = [] if loaders is None else loaders.flattened
    # Of a loader without a length Lightning takes a batch ahead, which its state counts as done.
    if flat and all(callable(getattr(loader, "load_state_dict", None)) and hasattr(loader, "__len__") for loader in flat):
        return True
    # No generator of its own: the order is drawn from the global random numbers when an epoch begins.
    shuffles = any(isinstance(s := getattr(loader, "sampler", None), RandomSampler) and s.generator is None for loader in flat)
    logger.warning(
        "The training data cannot tell where it is, so that checkpoints are written between epochs only%s. Give a loader with "
        "`state_dict` and `load_state_dict` (torchdata's StatefulDataLoader), or a data module that keeps its place.",
        ", and the order of the rows after a resume is another, since it is drawn from the global random numbers"
        if shuffles
        else "",
    )
    return False


def check_parts(trainer: L.Trainer) -> None:
    """Raise where checkpoints would be written in parts that torch cannot put together again."""
    if not isinstance(trainer.strategy, FSDPStrategy) or trainer.strategy._state_dict_type != "sharded":  # noqa: SLF001  # no public way
        return
    module = trainer.lightning_module
    others = (each for each in module.modules() if type(each).get_extra_state is not nn.Module.get_extra_state)
    if (other := next((each for each in others if not isinstance(each.get_extra_state(), Tensor)), None)) is not None:
        raise ValueError(
            "FSDP is to write checkpoints in parts (`state_dict_type: sharded`), and torch can read such a checkpoint only if it "
            f"holds nothing but tensors: {type(other).__name__} of {type(module).__name__} adds something else. Set "
            "`state_dict_type: full`, or use FSDP2 (`--trainer.strategy=fsdp2`), which reads both kinds."
        )


def random_state(device: torch.device) -> dict[str, Any]:  # Any: the formats of four libraries
    """The random states of Python, NumPy, torch, and this process's GPU."""
    kind, keys, place, has_gauss, gauss = np.random.get_state(legacy=True)  # noqa: NPY002  # the global one is what users draw from
    state: dict[str, Any] = {
        "python": random.getstate(),
        "numpy": [str(kind), [int(key) for key in keys], int(place), int(has_gauss), float(gauss)],
        "torch": torch.get_rng_state(),
    }
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def load_random_state(state: dict[str, Any] | None, device: torch.device) -> None:  # Any: as above
    """Put all random states where they were, where that is known."""
    if state is None:
        return
    version, keys, gauss = state["python"]
    random.setstate((version, tuple(keys), gauss))
    kind, numbers, place, has_gauss, cached = state["numpy"]
    np.random.set_state((kind, np.array(numbers, dtype=np.uint32), place, has_gauss, cached))  # noqa: NPY002  # as above
    torch.set_rng_state(state["torch"].cpu())
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"].cpu(), device)


def state_of_process(trainer: L.Trainer, loaders: list[Any]) -> dict[str, Any]:  # Any: plain data and tensors
    """All that this process has for itself.

    Args:
        trainer: Of the run.
        loaders: What the user's own loaders told of their place.
    """
    # Lightning's checkpoints leave the metrics out, and a schedule or a callback that goes by one would not find it.
    seen: Mapping[str, Any] = trainer.callback_metrics  # users put numbers beside the tensors
    metrics = {
        name: value.detach().cpu().clone() if isinstance(value, Tensor) else value
        for name, value in seen.items()
        if isinstance(value, Tensor | int | float)
    }
    return {
        "random": random_state(trainer.strategy.root_device),
        "parts": {name: part.rank_state() for name, part in carriers_of(trainer).items()},
        "metrics": metrics,
        "loaders": loaders,
    }


def load_parts(trainer: L.Trainer, own: Mapping[str, Any]) -> None:  # Any: as above
    """Hand back what `state_of_process` kept, but for the random numbers and the loaders, which have their moments."""
    for name, part in carriers_of(trainer).items():
        if name in own["parts"]:
            part.load_rank_state(own["parts"][name])
    device = trainer.strategy.root_device
    metrics = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in own["metrics"].items()}
    trainer.callback_metrics.update(metrics)


def own_state(state: Mapping[str, Any], place: RunPlace, trainer: L.Trainer) -> dict[str, Any]:  # Any: as above
    """The state of this rank, where the run goes on with as many processes, or between two epochs with others."""
    ranks: list[dict[str, Any]] = state["ranks"]
    if state["world_size"] == trainer.world_size:
        return ranks[trainer.global_rank]
    if place.batch or any(part.get("is_bound_to_rank") for rank in ranks for part in rank["parts"].values()):
        raise ValueError(
            f"The checkpoint was written by {state['world_size']} process(es), {place.batch} micro-batches into epoch "
            f"{place.epoch}, and this run has {trainer.world_size}. Which rows a process takes inside an epoch (and, in "
            "reinforcement learning, what it has sampled) depends on their number, so that rows would be left out or trained on "
            f"twice. Go on with {state['world_size']}, or from a checkpoint that was written when an epoch had ended."
        )
    logger.warning(
        "The checkpoint was written by %d process(es), and the run goes on with %d: rows keep their order, other random numbers "
        "begin anew, and the first report counts what the first process had half counted.",
        state["world_size"],
        trainer.world_size,
    )
    if trainer.global_rank == 0:
        return ranks[0]
    return {"random": None, "parts": {}, "metrics": ranks[0]["metrics"], "loaders": []}


class Processes:
    """The processes of a run, talking about small things on the host: the GPU need not be waited for.

    Making one is collective where there are several processes.
    """

    def __init__(self) -> None:
        self._group: dist.ProcessGroup | None = None
        self.world_size = 1
        if dist.is_available() and dist.is_initialized():
            self.world_size = dist.get_world_size()
            if self.world_size > 1 and "gloo" not in dist.get_backend():
                self._group = dist.new_group(backend="gloo")

    def largest(self, numbers: Sequence[int]) -> list[int]:
        """The largest that any rank has of each of these, on every rank the same."""
        if self.world_size == 1:
            return list(numbers)
        votes = torch.tensor(numbers)
        dist.all_reduce(votes, op=dist.ReduceOp.MAX, group=self._group)
        return [int(vote) for vote in votes.tolist()]

    def gathered(self, own: dict[str, Any]) -> list[dict[str, Any]]:  # Any: plain data and tensors
        """What every rank has, on the first one; its own alone on the others."""
        if self.world_size == 1:
            return [own]
        found: list[Any] = [None] * self.world_size
        first = dist.get_rank() == 0
        dist.gather_object(own, found if first else None, dst=0, group=self._group)
        return found if first else [own]
