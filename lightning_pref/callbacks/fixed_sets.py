"""Fixed sets of several tasks, scored example by example, the same on every rank."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from lightning_pref.callbacks.hosts import Host
from lightning_pref.callbacks.probe import batches_of_rank, undisturbed
from lightning_pref.measures.forgetting import ProbeScores
from lightning_pref.measures.task_traces import Kind

# Any: the user's module and a batch of their own.
ScoreExamples = Callable[[Any, Any], "ProbeScores | Tensor"]


class FixedSets:
    """The batches of each task and how they are scored.

    Scoring leaves no trace on training: it is done in eval mode, without gradients, outside autocast's cache, with all random
    states restored. With several ranks each scores its share, and every rank gets the scores of all examples, in order. Every
    rank makes as many forward passes, since those of a sharded model are collective.

    Args:
        tasks: The batches of each task, by name; read once.
        score: Gives `ProbeScores` of a batch, or a tensor of values of equal weight.
        kind: What the values are.
    """

    def __init__(self, tasks: Mapping[str, Iterable[Any]], score: ScoreExamples, kind: Kind) -> None:
        with torch.random.fork_rng(devices=[]):  # making an iterator of a DataLoader draws from the global state
            self.batches = {name: list(batches) for name, batches in tasks.items()}
        self.score = score
        self.kind = kind
        self.sizes: list[int] = []  # examples of each batch, over all tasks
        if not self.batches:
            raise ValueError("`tasks` is empty; give the batches of at least one task, as in tasks={'summaries': batches}.")
        for name, batches in self.batches.items():
            if not batches:
                raise ValueError(f"The task {name!r} needs at least one batch, got none.")
        if kind not in ("loss", "accuracy"):
            raise ValueError(f"`kind` is 'loss' or 'accuracy', got {kind!r}.")

    def scores(self, host: Host) -> dict[str, ProbeScores]:
        """Values and weights of all examples of each task, float64 on the CPU; every rank must come by."""
        batches = [batch for task in self.batches.values() for batch in task]
        mine = batches_of_rank(len(batches), host.rank, host.world_size)
        with undisturbed(host.module), host.forward_context(), _without_cached_casts():
            scored = [(index, _checked(self.score(host.module, host.move(batches[index]))), counts) for index, counts in mine]
        counted = {index: scores for index, scores, counts in scored if counts}
        self._check_sizes(host, {index: scores.shape[1] for index, scores in counted.items()}, len(batches))
        starts = torch.tensor([0, *self.sizes]).cumsum(0).tolist()
        everything = torch.zeros(2, starts[-1], dtype=torch.float64, device=host.device)
        for index, scores in counted.items():
            everything[:, starts[index] : starts[index + 1]] = scores
        on_host = host.total(everything).cpu()
        found, first = {}, 0
        for name, task in self.batches.items():
            values, weights = on_host[:, starts[first] : starts[first + len(task)]]
            self._check_values(name, values, weights)
            found[name] = ProbeScores(values, weights)
            first += len(task)
        return found

    def _check_sizes(self, host: Host, sizes: Mapping[int, int], num_batches: int) -> None:
        """Learn the size of every batch from the ranks that score it; later, see that none has changed."""
        if not self.sizes:
            mine = torch.tensor([sizes.get(index, 0) for index in range(num_batches)], dtype=torch.float64, device=host.device)
            self.sizes = [int(size) for size in host.total(mine).tolist()]
        if len(self.sizes) != num_batches or any(self.sizes[index] != size for index, size in sizes.items()):
            raise ValueError(
                f"The fixed sets of {', '.join(self.batches)} have other sizes than at the first evaluation, when their batches "
                f"had {self.sizes} examples. Evaluate the same examples throughout, also after a resume."
            )

    def _check_values(self, task: str, values: Tensor, weights: Tensor) -> None:
        if not bool((weights >= 0).all()) or not float(weights.sum()) > 0:
            raise ValueError(f"The weights of the task {task!r} must not be negative, and not all 0.")
        if self.kind == "accuracy" and not bool(((values >= 0) & (values <= 1)).all()):
            raise ValueError(
                f"Accuracies of the task {task!r} must be in [0, 1], got values from {values.min():g} to {values.max():g}. For "
                "losses, say kind='loss'."
            )


def _checked(scores: ProbeScores | Tensor) -> Tensor:
    """Values and weights of one batch, [2, B] float64."""
    values, weights = (scores, None) if isinstance(scores, Tensor) else scores
    weights = torch.ones_like(values) if weights is None else weights
    if values.dim() != 1 or values.shape != weights.shape:
        raise ValueError(
            f"`score` gives one value and one weight per example, [B] and [B], got {list(values.shape)} and "
            f"{list(weights.shape)}. Do not average over the batch: the noise of the set is read off its examples."
        )
    return torch.stack([values.detach().double(), weights.detach().to(values.device).double()])


@contextmanager
def _without_cached_casts() -> Iterator[None]:
    """Leave autocast's cache of cast weights alone.

    What is cached here would be found by a forward pass of the same region later on, also where an optimiser has changed the
    weights in between, as it may under manual optimisation.
    """
    enabled = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(enabled)
