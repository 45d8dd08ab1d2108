"""The one data shape: a prompt with K responses, and a flat, padding-free batch of many of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from itertools import accumulate, pairwise
from typing import Any, Literal, NamedTuple, Self

import numpy as np
import torch
from torch import Tensor

PairSelection = Literal["all", "best_worst", "adjacent"]

# Ignored by every loss over step marks; the value transformers uses for "no label here".
NO_STEP = -100


@dataclass(frozen=True, kw_only=True, eq=False)
class PromptGroup:
    """One prompt and its K >= 1 responses, as token ids.

    Attributes:
        row_id: Number of the row in the dataset, stable over epochs, runs and filters.
        prompt: Prompt token ids, [P], P >= 1 (a bare BOS counts).
        responses: Response token ids, K arrays, none of them empty.
        source: Where the row came from (a file or domain name), for reports by source.
        ranks: Place of each response, 0 is best, equal numbers are ties; `None` where the responses have no order.
        scores: A number per response (annotator score, reward), larger is better.
        labels: Unpaired feedback per response: `True` desirable, `False` undesirable.
        margin: How much better the chosen response is, in the unit of the annotation.
        weight: Factor of the row in every mean; 0 means "fills a batch, counts nowhere".
        step_ends: Per response, the index inside the response of the last token of each reasoning step.
        step_labels: Per response, whether each of those steps is right.
    """

    row_id: int
    prompt: np.ndarray[Any, np.dtype[np.integer[Any]]]
    responses: tuple[np.ndarray[Any, np.dtype[np.integer[Any]]], ...]
    source: str = ""
    ranks: tuple[int, ...] | None = None
    scores: tuple[float, ...] | None = None
    labels: tuple[bool, ...] | None = None
    margin: float | None = None
    weight: float = 1.0
    step_ends: tuple[tuple[int, ...], ...] | None = None
    step_labels: tuple[tuple[bool, ...], ...] | None = None

    def __post_init__(self) -> None:
        if len(self.prompt) == 0:
            raise ValueError(f"Row {self.row_id}: the prompt is empty; give at least a BOS token to condition on.")
        if not self.responses or any(len(response) == 0 for response in self.responses):
            lengths = [len(response) for response in self.responses]
            raise ValueError(f"Row {self.row_id}: every response needs at least one token, got lengths {lengths}.")
        for name in ("ranks", "scores", "labels", "step_ends", "step_labels"):
            values = getattr(self, name)
            if values is not None and len(values) != len(self.responses):
                raise ValueError(f"Row {self.row_id}: `{name}` has {len(values)} entries for {len(self.responses)} responses.")

    @property
    def num_tokens(self) -> int:
        """Tokens of the group with the prompt counted once: P + sum of R."""
        return len(self.prompt) + sum(len(response) for response in self.responses)

    def num_pairs(self, how: PairSelection = "all") -> int:
        """Number of ordered pairs the group yields; 0 where it has no order or only ties."""
        return len(select_pairs(self.ranks, how)) if self.ranks is not None else 0


def select_pairs(ranks: Sequence[int], how: PairSelection = "all") -> list[tuple[int, int]]:
    """Index pairs (better, worse) of one group's responses; ties yield no pair.

    >>> select_pairs([0, 1, 1])
    [(0, 1), (0, 2)]
    >>> select_pairs([0, 1, 2], "adjacent")
    [(0, 1), (1, 2)]
    """
    order = sorted(range(len(ranks)), key=lambda i: ranks[i])
    if how == "best_worst":
        candidates = [(order[0], order[-1])]
    elif how == "adjacent":
        candidates = list(pairwise(order))
    else:
        candidates = [(a, b) for i, a in enumerate(order) for b in order[i + 1 :]]
    return [(a, b) for a, b in candidates if ranks[a] < ranks[b]]


class WindowCounts(NamedTuple):
    """What one optimiser update sees over all ranks and accumulated micro-batches; the divisors of exact means."""

    groups: float  # sum of row weights
    responses: float
    response_tokens: float


class Pairs(NamedTuple):
    """Ordered pairs of a batch. `weights` of one group's pairs add up to the group's weight."""

    chosen: Tensor  # [B] index into the responses of the batch
    rejected: Tensor  # [B]
    group: Tensor  # [B] index into the groups of the batch
    weights: Tensor  # [B] float32


@dataclass(frozen=True, kw_only=True, eq=False)
class GroupBatch:
    """Many groups as one flat run of T tokens: for each group its prompt, then its responses one after the other.

    The sizes are also kept as Python integers, so that nothing on the hot path has to ask the device for a shape.
    """

    input_ids: Tensor  # [T] int64
    position_ids: Tensor  # [T] int64; every response goes on counting where its prompt ends
    group: Tensor  # [T] int64, index of the group in this batch
    response: Tensor  # [T] int64, index of the response in this batch, -1 = prompt token
    response_lengths: Tensor  # [R] int64
    group_of_response: Tensor  # [R] int64
    row_ids: Tensor  # [G] int64
    response_ids: Tensor  # [R] int64, index of the response in the whole dataset
    weights: Tensor  # [G] float32
    prompt_sizes: tuple[int, ...]  # G entries
    response_sizes: tuple[int, ...]  # R entries
    group_sizes: tuple[int, ...]  # G entries, responses of each group
    ranks: tuple[tuple[int, ...] | None, ...]  # G entries
    sources: tuple[str, ...]  # G entries
    scores: Tensor | None = None  # [R] float32
    labels: Tensor | None = None  # [R] bool
    margins: Tensor | None = None  # [G] float32
    step_labels: Tensor | None = None  # [T] int64, 0 or 1 on the last token of a step, NO_STEP elsewhere
    window: WindowCounts | None = None

    @classmethod
    def from_groups(
        cls,
        groups: Sequence[PromptGroup],
        *,
        response_ids: Sequence[int] | None = None,
        window: WindowCounts | None = None,
    ) -> Self:
        """Lay the groups end to end.

        Args:
            groups: At least one group.
            response_ids: Dataset-wide index of every response; counted from 0 inside the batch if not given.
            window: Counts of the optimiser update this batch belongs to.
        """
        if not groups:
            raise ValueError("A GroupBatch needs at least one group.")
        pieces: list[np.ndarray[Any, Any]] = []
        positions, group_index, response_index, sizes = [], [], [], []
        num_responses = 0
        for g, item in enumerate(groups):
            prompt_size = len(item.prompt)
            pieces.append(np.asarray(item.prompt))
            positions.append(np.arange(prompt_size))
            response_index.append(np.full(prompt_size, -1))
            for response in item.responses:
                pieces.append(np.asarray(response))
                positions.append(np.arange(prompt_size, prompt_size + len(response)))
                response_index.append(np.full(len(response), num_responses))
                sizes.append(len(response))
                num_responses += 1
            group_index.append(np.full(item.num_tokens, g))
        owners = [g for g, item in enumerate(groups) for _ in item.responses]
        ids = range(num_responses) if response_ids is None else response_ids
        return cls(
            input_ids=_flat(pieces),
            position_ids=_flat(positions),
            group=_flat(group_index),
            response=_flat(response_index),
            response_lengths=torch.tensor(sizes, dtype=torch.int64),
            group_of_response=torch.tensor(owners, dtype=torch.int64),
            row_ids=torch.tensor([item.row_id for item in groups], dtype=torch.int64),
            response_ids=torch.tensor(list(ids), dtype=torch.int64),
            weights=torch.tensor([item.weight for item in groups], dtype=torch.float32),
            prompt_sizes=tuple(len(item.prompt) for item in groups),
            response_sizes=tuple(sizes),
            group_sizes=tuple(len(item.responses) for item in groups),
            ranks=tuple(item.ranks for item in groups),
            sources=tuple(item.source for item in groups),
            scores=_per_response(groups, "scores", torch.float32),
            labels=_per_response(groups, "labels", torch.bool),
            margins=_margins(groups),
            step_labels=_step_labels(groups),
            window=window,
        )

    @property
    def num_groups(self) -> int:
        return len(self.prompt_sizes)

    @property
    def num_responses(self) -> int:
        return len(self.response_sizes)

    @property
    def num_tokens(self) -> int:
        """Real tokens, every prompt counted once."""
        return sum(self.prompt_sizes) + sum(self.response_sizes)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Self:
        return self._map(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> Self:
        return self._map(Tensor.pin_memory)

    def _map(self, change: Callable[[Tensor], Tensor]) -> Self:
        fields_of_all: dict[str, Any] = {name: getattr(self, name) for name in _BATCH_FIELDS}  # Any: each has its own type
        changed = {name: change(value) for name, value in fields_of_all.items() if isinstance(value, Tensor)}
        return type(self)(**(fields_of_all | changed))

    def pairs(self, how: PairSelection = "all") -> Pairs:
        """Ordered pairs of the batch, those of one group sharing the group's weight equally.

        Raises:
            ValueError: If a group has no ordered pair; leaving it out would quietly change the mean.
        """
        device = self.row_ids.device
        starts = [0, *accumulate(self.group_sizes)]
        found: list[tuple[int, int, int, float]] = []
        for g, ranks in enumerate(self.ranks):
            chosen = select_pairs(ranks, how) if ranks is not None else []
            if not chosen:
                raise ValueError(
                    f"Row {int(self.row_ids[g])} has no ordered pair: its responses have no order, or are all tied. A pairwise "
                    "loss needs `chosen` and `rejected`, or scored responses, in every row; for labelled single responses "
                    "choose an unpaired loss such as 'kto'."
                )
            found += [(starts[g] + a, starts[g] + b, g, 1.0 / len(chosen)) for a, b in chosen]
        chosen_index, rejected_index, group_index, shares = zip(*found, strict=True)
        group = torch.tensor(group_index, device=device)
        return Pairs(
            chosen=torch.tensor(chosen_index, device=device),
            rejected=torch.tensor(rejected_index, device=device),
            group=group,
            weights=torch.tensor(shares, dtype=torch.float32, device=device) * self.weights[group],
        )

    def groups(self) -> list[PromptGroup]:
        """The groups back again, on the CPU, without step marks; a margin that was missing beside others is 0."""
        ids = self.input_ids.cpu().numpy()
        weights, rows = self.weights.tolist(), self.row_ids.tolist()
        found, token, response = [], 0, 0
        for g, prompt_size in enumerate(self.prompt_sizes):
            prompt = ids[token : token + prompt_size]
            token += prompt_size
            pieces = []
            for size in self.response_sizes[response : response + self.group_sizes[g]]:
                pieces.append(ids[token : token + size])
                token += size
            span = slice(response, response + self.group_sizes[g])
            response = span.stop
            found.append(
                PromptGroup(
                    row_id=rows[g],
                    prompt=prompt,
                    responses=tuple(pieces),
                    source=self.sources[g],
                    ranks=self.ranks[g],
                    scores=None if self.scores is None else tuple(self.scores[span].tolist()),
                    labels=None if self.labels is None else tuple(self.labels[span].tolist()),
                    margin=None if self.margins is None else float(self.margins[g]),
                    weight=weights[g],
                )
            )
        return found

    def mismatched(self) -> Self:
        """Each prompt with the responses of the group before it: the unrelated pairs that KTO's baseline is made of.

        Neighbours with the same prompt are not unrelated and get weight 0. No cache of a data set holds these rows, so their
        `response_ids` count inside the batch.
        """
        if self.num_groups < 2:
            raise ValueError("Mismatched pairs need at least two groups in a batch; raise the batch size or token budget.")
        own = self.groups()
        rolled = [
            PromptGroup(
                row_id=group.row_id,
                prompt=group.prompt,
                responses=before.responses,
                source=group.source,
                weight=0.0 if np.array_equal(group.prompt, before.prompt) else group.weight,
            )
            for group, before in zip(own, [own[-1], *own[:-1]], strict=True)
        ]
        return type(self).from_groups(rolled).to(self.input_ids.device)


_BATCH_FIELDS = tuple(field.name for field in fields(GroupBatch))

# Lightning's precision plugins take every dataclass apart to cast its tensors: a frozen one raises there (bf16-true, 64-true,
# FSDP, DeepSpeed), another would get its weights and scores rounded. Without this attribute a batch is one thing to them.
del GroupBatch.__dataclass_fields__


def _flat(pieces: Sequence[np.ndarray[Any, Any]]) -> Tensor:
    return torch.from_numpy(np.concatenate(pieces).astype(np.int64, copy=False))


def _per_response(groups: Sequence[PromptGroup], name: str, dtype: torch.dtype) -> Tensor | None:
    """One value per response, or `None` unless every group of the batch has them."""
    values = [getattr(item, name) for item in groups]
    if any(value is None for value in values):
        return None
    return torch.tensor([entry for value in values for entry in value], dtype=dtype)


def _margins(groups: Sequence[PromptGroup]) -> Tensor | None:
    if all(item.margin is None for item in groups):
        return None
    return torch.tensor([0.0 if item.margin is None else item.margin for item in groups], dtype=torch.float32)


def _step_labels(groups: Sequence[PromptGroup]) -> Tensor | None:
    if all(item.step_ends is None for item in groups):
        return None
    marks = np.full(sum(item.num_tokens for item in groups), NO_STEP, dtype=np.int64)
    start = 0
    for item in groups:
        start += len(item.prompt)
        for k, response in enumerate(item.responses):
            if item.step_ends is not None and item.step_labels is not None:
                for end, label in zip(item.step_ends[k], item.step_labels[k], strict=True):
                    marks[start + end] = int(label)
            start += len(response)
    return torch.from_numpy(marks)
