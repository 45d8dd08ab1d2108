"""Where each token of a batch sits when it goes through a model: padded, packed, or with its prompt shared."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from lightning_pref.data.groups import GroupBatch

PlacedLayout = Literal["padded", "packed", "shared"]
Ints = np.ndarray[Any, np.dtype[np.int64]]

PADDING = -1


@dataclass(frozen=True)
class LayoutPlan:
    """A batch as rows of slots. Made from Python sizes on the CPU; says nothing about how attention is computed."""

    layout: PlacedLayout
    source: Tensor  # [rows, L] index into the flat batch of the token in each slot; 0 in padding slots
    unit: Tensor  # [rows, L] which run of tokens a slot belongs to, PADDING for none
    branch: Tensor  # [rows, L] index of the response, -1 for prompt and padding
    predictor: Tensor  # [N] slot, counted over rows * L, whose hidden state predicts each response token
    predicted: Tensor  # [N] index into the flat batch of that response token
    place: Tensor  # [N] slot, counted likewise, in which that response token itself sits

    def to(self, device: torch.device) -> "LayoutPlan":
        tensors = (self.source, self.unit, self.branch, self.predictor, self.predicted, self.place)
        return LayoutPlan(self.layout, *(tensor.to(device, non_blocking=True) for tensor in tensors))


class Rows(NamedTuple):
    """The shape of a layout: slots are `num_rows * length`, attention scores `num_rows * length**2`."""

    num_rows: int
    length: int


class TokenCosts(NamedTuple):
    """What a model pays, in any one unit."""

    slot: float  # for a slot, wherever it stands
    score: float  # for one attention score, over all layers and heads


def plan_layout(batch: GroupBatch, layout: PlacedLayout) -> LayoutPlan:
    """Assign a slot to every token of a batch.

    `padded` gives each response a row with its own copy of the prompt. `packed` puts several such sequences into a row.
    `shared` puts several groups into a row, each with its prompt once and then every response. Rows of the last two are as
    long as the longest sequence or group, so that attention costs a row length, not the batch length, per token.
    """
    units = _groups(batch) if layout == "shared" else _sequences(batch)
    sizes = [sum(len(span) for span in spans) for spans in units]
    length = max(sizes)
    bins = [[u] for u in range(len(units))] if layout == "padded" else fold(sizes, length)

    source = np.zeros((len(bins), length), dtype=np.int64)
    unit = np.full((len(bins), length), PADDING, dtype=np.int64)
    slot_of_unit = [0] * len(units)
    for row, members in enumerate(bins):
        column = 0
        for u in members:
            slot_of_unit[u] = row * length + column
            end = column + sizes[u]
            source[row, column:end] = np.concatenate([np.arange(span.start, span.stop) for span in units[u]])
            unit[row, column:end] = u
            column = end

    responses, prompts = _response_spans(batch), _prompt_spans(batch)
    predicted = np.concatenate([np.arange(span.start, span.stop) for span in responses])
    response_of_token = np.full(batch.num_tokens, -1, dtype=np.int64)
    response_of_token[predicted] = np.repeat(np.arange(len(responses)), batch.response_sizes)
    branch = np.where(unit == PADDING, -1, response_of_token[source])

    predictors, places = [], []
    for r, (g, response) in enumerate(zip(_owners(batch), responses, strict=True)):
        start = slot_of_unit[g if layout == "shared" else r]
        last_of_prompt = start + len(prompts[g]) - 1
        # In a shared group the earlier responses stand between the prompt and this one.
        gap = response.start - prompts[g].stop if layout == "shared" else 0
        first = last_of_prompt + 1 + gap
        own = np.arange(first, first + len(response))
        predictors.append(np.concatenate([[last_of_prompt], own[:-1]]))
        places.append(own)
    return LayoutPlan(
        layout=layout,
        source=torch.from_numpy(source),
        unit=torch.from_numpy(unit),
        branch=torch.from_numpy(branch),
        predictor=torch.from_numpy(np.concatenate(predictors).astype(np.int64)),
        predicted=torch.from_numpy(predicted),
        place=torch.from_numpy(np.concatenate(places).astype(np.int64)),
    )


def layout_rows(batch: GroupBatch, layout: PlacedLayout) -> Rows:
    """The shape that `plan_layout` gives, without the plan."""
    units = _groups(batch) if layout == "shared" else _sequences(batch)
    sizes = [sum(len(span) for span in spans) for spans in units]
    num_rows = len(sizes) if layout == "padded" else len(fold(sizes, max(sizes)))
    return Rows(num_rows, max(sizes))


def layout_cost(rows: Rows, costs: TokenCosts) -> float:
    """`slots * costs.slot + scores * costs.score`: every slot pays, padding too, and every pair of slots in a row."""
    return rows.num_rows * rows.length * (costs.slot + rows.length * costs.score)


def choose_layout(batch: GroupBatch, costs: TokenCosts) -> PlacedLayout:
    """The cheapest layout; the plainer one where two cost the same."""
    layouts: tuple[PlacedLayout, ...] = ("padded", "packed", "shared")
    return min(layouts, key=lambda layout: layout_cost(layout_rows(batch, layout), costs))


def fold(sizes: Sequence[int], capacity: int) -> list[list[int]]:
    """First-fit decreasing: indices of the items in each bin, no bin filled above `capacity`.

    >>> fold([2, 5, 3, 4], 5)
    [[1], [3], [2, 0]]
    """
    bins: list[list[int]] = []
    room: list[int] = []
    for item in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        for b, free in enumerate(room):
            if sizes[item] <= free:
                bins[b].append(item)
                room[b] -= sizes[item]
                break
        else:
            bins.append([item])
            room.append(capacity - sizes[item])
    return bins


def _owners(batch: GroupBatch) -> list[int]:
    return [g for g, size in enumerate(batch.group_sizes) for _ in range(size)]


def _group_starts(batch: GroupBatch) -> list[int]:
    ends = [0, *accumulate(batch.response_sizes)]
    firsts = [0, *accumulate(batch.group_sizes)]
    response_tokens = [ends[b] - ends[a] for a, b in pairwise(firsts)]
    sizes = [prompt + tokens for prompt, tokens in zip(batch.prompt_sizes, response_tokens, strict=True)]
    return [0, *accumulate(sizes)]


def _prompt_spans(batch: GroupBatch) -> list[range]:
    starts = _group_starts(batch)
    return [range(start, start + size) for start, size in zip(starts, batch.prompt_sizes, strict=False)]


def _response_spans(batch: GroupBatch) -> list[range]:
    """Where each response lies in the flat batch: all prompts up to its own and all responses before it come first."""
    prompts = list(accumulate(batch.prompt_sizes))
    starts = [0, *accumulate(batch.response_sizes)]
    return [
        range(prompts[g] + start, prompts[g] + start + size)
        for g, start, size in zip(_owners(batch), starts, batch.response_sizes, strict=False)
    ]


def _groups(batch: GroupBatch) -> list[tuple[range, ...]]:
    starts = _group_starts(batch)
    return [(range(start, stop),) for start, stop in pairwise(starts)]


def _sequences(batch: GroupBatch) -> list[tuple[range, ...]]:
    prompts = _prompt_spans(batch)
    return [(prompts[g], response) for g, response in zip(_owners(batch), _response_spans(batch), strict=True)]
