"""Weighted means of many quantities at once, exact over ragged batches and ranks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics import Metric
from typing_extensions import override


class WeightedMeans(Metric):
    """Sums and weights of named quantities; the means are formed once, at the end.

    All names share two state vectors, so that a synchronisation over ranks is two small gathers however many names
    there are. A name that got no weight is `nan`, not 0.

    >>> means = WeightedMeans(["margin", "length"])
    >>> means.update({"margin": torch.tensor([1.0, 4.0])}, torch.tensor([2.0, 1.0]))
    >>> {name: value.item() for name, value in means.compute().items()}
    {'margin': 2.0, 'length': nan}
    """

    full_state_update = False

    def __init__(self, names: Sequence[str], **metric_kwargs: Any) -> None:  # Any: torchmetrics' own keyword arguments
        super().__init__(**metric_kwargs)
        self.names = tuple(names)
        self._slots: dict[tuple[tuple[str, ...], torch.device], Tensor] = {}
        self.sums: Tensor
        self.weights: Tensor
        self.add_state("sums", torch.zeros(len(names), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("weights", torch.zeros(len(names), dtype=torch.float64), dist_reduce_fx="sum")

    @override
    def update(self, values: Mapping[str, Tensor], weights: Tensor) -> None:
        """Add values.

        Args:
            values: Some of the names, each with a tensor of one shape.
            weights: The weight of every entry, same shape.
        """
        slots = self._slots_of(tuple(values))
        stacked = torch.stack([value.detach() for value in values.values()]).double().reshape(len(values), -1)
        flat = weights.detach().double().reshape(1, -1)
        # Zero weight means "not there": it must also silence a nan, which a product would not.
        self.sums.index_add_(0, slots, torch.where(flat > 0, stacked * flat, 0.0).sum(-1))
        self.weights.index_add_(0, slots, flat.sum().expand(len(values)))

    def _slots_of(self, names: tuple[str, ...]) -> Tensor:
        """Places of the names in the state vectors; remembered, since building a tensor on a GPU waits for it."""
        device = self.sums.device
        if (names, device) not in self._slots:
            self._slots[names, device] = torch.tensor([self.names.index(name) for name in names], device=device)
        return self._slots[names, device]

    @override
    def _apply(self, fn: Callable[[Tensor], Tensor], exclude_state: Sequence[str] = "") -> nn.Module:
        """Go along to another device, but stay in float64: `Module.to(torch.bfloat16)` gets past torchmetrics' own guard."""
        return super()._apply(lambda tensor: tensor.to(fn(tensor).device), exclude_state)

    def partial(self) -> dict[str, Tensor]:
        """A copy of what this process has counted so far, on the CPU."""
        return {"sums": self.sums.cpu().clone(), "weights": self.weights.cpu().clone()}

    def take_up(self, counted: Mapping[str, Tensor]) -> None:
        """Go on from what `partial` gave."""
        self.reset()
        self.sums.copy_(counted["sums"])
        self.weights.copy_(counted["weights"])
        self._update_count = 1  # else torchmetrics warns of a mean of nothing

    @override
    def compute(self) -> dict[str, Tensor]:
        """Mean of every name, on every rank the same."""
        means = self.sums / self.weights
        return {name: means[i] for i, name in enumerate(self.names)}
