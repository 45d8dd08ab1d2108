"""Watches how many updates are lost to the rounding of low-precision weights."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle
from typing_extensions import override

from lightning_pref.callbacks.diagnostic import Diagnostic, Key
from lightning_pref.callbacks.hosts import Host, LightningHost, as_floats
from lightning_pref.callbacks.optimizer_state import local
from lightning_pref.callbacks.update_parts import num_copies, num_flat_shards
from lightning_pref.measures.lost_updates import is_lost, sample_places
from lightning_pref.measures.updates import was_executed

SHARE, STUCK = "lost_updates/share", "lost_updates/stuck_share"
# Those of trained weights; what is quantised further is not trained.
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# Of the elements with a gradient: all, those lost, those seen before, and those that stand where they stood then.
NUM_COUNTS = 4


class Sample(NamedTuple):
    """Some elements of a parameter before a step."""

    name: str  # places of optimiser and parameter
    parameter: Tensor
    places: Tensor
    before: Tensor
    has_gradient: Tensor  # looked at before the step, since some optimisers use the gradient's memory up


class LostUpdateMeter(Diagnostic):
    """Watches which share of the weights an optimiser step leaves bitwise unchanged although their gradient is not zero.

    Needs: an optimiser of torch's interface; nothing of the module.
    Logs: `lost_updates/...` (see `keys`), at every measured update.
    Changes: nothing. A fixed sample of every tensor is compared, without random numbers and with one wait for the device.

    Steps that are rounded away one by one may still arrive together: stochastic rounding lets some through each time, and
    Kahan summation carries the lost part along. `share` does not see that; `stuck_share` does, which compares with the last
    measurement, many updates ago. The alert wants both.

    Args:
        every_n_updates: Updates between two measurements; the trainer's own logging interval if not given.
        elements_per_tensor: Largest number of elements that are looked at in one tensor.
        thresholds: Limits of alerts other than those in `ALERT_RULES`.
    """

    prefix = "lost_updates"
    keys = (
        Key(SHARE, "Share of the weights with a gradient that the last update left bitwise unchanged."),
        Key(STUCK, "Share of them that is also unchanged since the measurement before."),
        Key("lost_updates/<dtype>_share", "The first share among weights of one dtype, where there are several."),
    )

    def __init__(
        self,
        *,
        every_n_updates: int | None = None,
        elements_per_tensor: int = 1024,
        thresholds: Mapping[str, float] | None = None,
    ) -> None:
        for name, value in (("every_n_updates", every_n_updates), ("elements_per_tensor", elements_per_tensor)):
            if value is not None and value < 1:
                raise ValueError(f"`{name}` must be at least 1, got {value!r}.")
        super().__init__(thresholds=thresholds)
        self.every_n_updates = every_n_updates
        self.elements_per_tensor = elements_per_tensor
        self._optimizers: list[Optimizer] = []
        self._handles: list[RemovableHandle] = []
        self._steps: dict[int, int] = {}  # executed, by place of the optimiser
        self._samples: dict[int, list[Sample]] = {}
        self._earlier: dict[str, Tensor] = {}  # values after the last measured step
        self._counts: Tensor | None = None  # [dtypes, counts], of this process
        self._places: dict[tuple[int, torch.device], Tensor] = {}
        self._world_size, self._flat_shards = 1, 1
        self._rate = math.nan

    # Following the optimisers.

    @override
    def watch(self, optimizers: Sequence[object]) -> None:
        super().watch(optimizers)
        for index, optimizer in enumerate(optimizers):
            if not isinstance(optimizer, Optimizer):
                raise ValueError(
                    f"LostUpdateMeter compares weights before and after a step, and a {type(optimizer).__name__} does not tell "
                    "when it makes one. Leave the meter out: engines with an optimiser of their own, such as DeepSpeed, keep a "
                    "copy of the weights in float32, in which small updates are not lost."
                )
            self._optimizers.append(optimizer)
            self._handles.append(optimizer.register_step_post_hook(partial(self._after_step, index)))

    @override
    def unwatch(self) -> None:
        super().unwatch()
        for handle in self._handles:
            handle.remove()
        self._optimizers, self._handles, self._counts = [], [], None
        self._samples.clear()
        self._places.clear()

    @override
    def start(self, host: Host) -> None:
        model = host.trainer.model if isinstance(host, LightningHost) else host.module
        assert model is not None
        self._world_size, self._flat_shards = host.world_size, num_flat_shards(model)

    # Around a step.

    @override
    def before_update(self, host: Host, optimizer: Optimizer) -> None:
        index = next(i for i, mine in enumerate(self._optimizers) if mine is optimizer)
        self._samples.pop(index, None)  # of a step that a loss scaler skipped
        if (self._steps.get(index, 0) + 1) % self.cadence(host, self.every_n_updates):
            return
        self._rate = float(optimizer.param_groups[0]["lr"])
        self._samples[index] = [
            self._sample(f"{index}.{place}", parameter)
            for place, (group, parameter) in enumerate(_parameters(optimizer))
            # At a rate of 0 nothing is meant to move.
            if parameter.grad is not None and parameter.dtype in DTYPES and local(parameter).numel() and float(group["lr"])
        ]

    def _sample(self, name: str, parameter: Tensor) -> Sample:
        assert parameter.grad is not None
        values, gradient = local(parameter), local(parameter.grad)
        key = values.numel(), values.device
        if key not in self._places:
            self._places[key] = sample_places(values.numel(), self.elements_per_tensor).to(values.device)
        places = self._places[key]
        return Sample(name, parameter, places, values.reshape(-1)[places], gradient.reshape(-1)[places] != 0)

    @torch.no_grad()
    def _after_step(self, index: int, optimizer: Optimizer, *_: object) -> None:
        if not was_executed(optimizer):
            return
        self._steps[index] = self._steps.get(index, 0) + 1
        samples = self._samples.pop(index, None)
        if samples is None:
            return
        counts = torch.zeros(len(DTYPES), NUM_COUNTS, dtype=torch.float64)
        # Whoever takes a gradient away has the step leave that weight alone.
        stepped = [sample for sample in samples if sample.parameter.grad is not None]
        if stepped:
            found = torch.stack([self._compare(sample) for sample in stepped]).cpu().double()
            for sample, row in zip(stepped, found, strict=True):
                counts[DTYPES.index(sample.parameter.dtype)] += row * self._elements_per_place(sample)
        self._counts = counts if self._counts is None else self._counts + counts

    def _compare(self, sample: Sample) -> Tensor:
        """The counts of one parameter's sample, [4] int64 on its device."""
        after = local(sample.parameter).reshape(-1)[sample.places]
        lost = is_lost(sample.before, after, sample.has_gradient)
        alive = sample.has_gradient.sum()
        earlier = self._earlier.get(sample.name)
        self._earlier[sample.name] = after
        if earlier is None or earlier.shape != after.shape or earlier.dtype != after.dtype:
            none = torch.zeros((), dtype=torch.int64, device=after.device)
            return torch.stack([alive, lost.sum(), none, none])
        stuck = lost & is_lost(earlier.to(after.device), after, sample.has_gradient)
        return torch.stack([alive, lost.sum(), alive, stuck.sum()])

    def _elements_per_place(self, sample: Sample) -> float:
        """How many elements of the model a looked-at one stands for, seen from this process."""
        size = local(sample.parameter).numel() / len(sample.places)
        return size / num_copies(sample.parameter, self._world_size, self._flat_shards)

    # Telling.

    @override
    def after_batch(self, host: Host, outputs: Any, batch: Any, updated: bool) -> None:
        self._samples.clear()
        if self._counts is None:
            return
        exact = torch.float32 if host.device.type == "mps" else torch.float64
        counts = host.total(self._counts.to(host.device, exact)).cpu().double()
        self._counts = None
        whole = counts.sum(0)
        # Before a second measurement nothing has been seen before, and 0 / 0 is nan.
        values = {SHARE: whole[1] / whole[0], STUCK: whole[3] / whole[2]}
        names = {row: str(dtype).removeprefix("torch.") for row, dtype in enumerate(DTYPES) if counts[row, 0] > 0}
        if len(names) > 1:
            values |= {f"lost_updates/{name}_share": counts[row, 1] / counts[row, 0] for row, name in names.items()}
        numbers = as_floats(values)
        if math.isnan(numbers[SHARE]):
            return
        host.log(numbers)
        where = f"The weights are in {' and '.join(names.values())}, the learning rate is {self._rate:.3g}."
        self.judge(host, numbers, evidence=lambda rule: where)

    # State.

    @override
    def measured_state(self) -> dict[str, Any]:
        return {
            "steps": {str(index): count for index, count in self._steps.items()},
            "earlier": {name: values.to("cpu", copy=True) for name, values in self._earlier.items()},
        }

    @override
    def load_measured_state(self, state: Mapping[str, Any]) -> None:
        self._steps = {int(index): int(count) for index, count in state["steps"].items()}
        self._earlier = {name: values.clone() for name, values in state["earlier"].items()}


def meter_for(precision: object, dtype: str, strategy: object) -> list[LostUpdateMeter]:
    """A meter where a run's weights are in 16 bit, and its optimiser can be watched.

    Args:
        precision: Of Lightning's Trainer, as it is given.
        dtype: That the model is loaded in.
        strategy: Of Lightning's Trainer, by name or as an object.
    """
    is_half = str(precision) in ("bf16-true", "16-true") or dtype in ("bfloat16", "float16")
    return [LostUpdateMeter()] if is_half and "deepspeed" not in str(strategy).lower() else []


def _parameters(optimizer: Optimizer) -> list[tuple[dict[str, Any], Tensor]]:  # Any: options of the optimiser's own
    return [(group, parameter) for group in optimizer.param_groups for parameter in group["params"]]
