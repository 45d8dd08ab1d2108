"""Where the two responses of a pair part: the model's distribution over the next token there, and each response's own odds.

What a preference loss takes from the chosen response goes to other tokens. At the first position where the responses differ,
the change of the whole distribution says to which (Razin et al. 2024, arXiv 2410.08847, section 4).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, takewhile
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel

from lightning_pref.data.groups import GroupBatch, PromptGroup
from lightning_pref.functional.linear_logps import linear_logits
from lightning_pref.models.forward import Layout, response_logps
from lightning_pref.models.heads import head_of
from lightning_pref.models.pair_scores import counted_pairs
from lightning_pref.models.parity import verified_head
from lightning_pref.models.sharding import whole_head
from lightning_pref.observations import Observation

# In place of a token where the response has ended already.
NO_TOKEN = -1

Ids = Sequence[int] | np.ndarray[Any, np.dtype[np.integer[Any]]]


@dataclass(frozen=True, kw_only=True, eq=False)
class FirstDifferenceObservation(Observation):
    """Next-token distributions where the responses of B pairs first differ, and log-probabilities of whole responses."""

    row_ids: Tensor  # [B] int64
    position: Tensor  # [B] int64, tokens that both responses begin with
    chosen_tokens: Tensor  # [B] int64, the token there, NO_TOKEN where the response has ended
    rejected_tokens: Tensor  # [B]
    token_logps: Tensor  # [B, V] float32, nats
    candidate_logps: Tensor  # [B, K] float32, nats, sums: chosen, rejected, then further responses; nan where there are fewer


def with_candidates(group: PromptGroup, candidates: Sequence[Ids]) -> PromptGroup:
    """A pair with further responses whose probability is to be watched; in rank they stand between chosen and rejected.

    Args:
        group: A prompt with a chosen and a rejected response.
        candidates: Token ids of each further response.
    """
    ranks = group.ranks
    if ranks is None or len(ranks) != 2 or ranks[0] == ranks[1]:
        raise ValueError(
            f"Row {group.row_id}: candidates are added to a chosen and a rejected response, got {len(group.responses)} "
            f"responses with ranks {ranks}."
        )
    chosen, rejected = group.responses if ranks[0] < ranks[1] else reversed(group.responses)
    return PromptGroup(
        row_id=group.row_id,
        prompt=group.prompt,
        responses=(chosen, rejected, *(np.asarray(candidate) for candidate in candidates)),
        source=group.source,
        ranks=(0, 2, *(1 for _ in candidates)),
    )


@torch.no_grad()
def first_differences(
    model: PreTrainedModel | PeftModel, batch: GroupBatch, *, layout: Layout = "auto"
) -> list[FirstDifferenceObservation]:
    """Look at each group's best and worst response where they first differ; equal ones and rows of weight 0 are left out.

    Where one response is the beginning of the other, that is the position after its end. One forward pass for all of it.

    Args:
        model: A decoder-only causal language model; its mode and adapters are as the caller has set them.
        batch: Groups of ranked responses, on the model's device. Responses that are neither best nor worst are candidates.
        layout: As in `response_logps`.

    Returns:
        One observation of B <= G pairs, or none where nothing is left; a score of a `Probe` as it stands.
    """
    out = response_logps(model, batch, layout=layout, want={"hidden"})
    assert out.hidden is not None
    head = whole_head(verified_head(model, head_of(model)))
    starts = [0, *accumulate(batch.response_sizes)]
    pairs = counted_pairs(batch.pairs("best_worst"))
    found: list[tuple[int, int, int, int, int]] = []  # group, position, both tokens, predicting state
    candidates: list[list[int]] = []
    responses = _responses(batch)
    for g, chosen, rejected in zip(pairs.group.tolist(), pairs.chosen.tolist(), pairs.rejected.tolist(), strict=True):
        ids, others = responses[chosen], responses[rejected]
        position = sum(1 for _ in takewhile(lambda both: both[0] == both[1], zip(ids, others, strict=False)))
        if position == len(ids) == len(others):
            continue
        tokens = [response[position] if position < len(response) else NO_TOKEN for response in (ids, others)]
        # What both begin with is the same, so the state is that of whichever goes on.
        state = starts[chosen if position < len(ids) else rejected] + position
        found.append((g, position, *tokens, state))
        own = [r for r, owner in enumerate(_owners(batch)) if owner == g]
        candidates.append([chosen, rejected, *(r for r in own if r not in (chosen, rejected))])
    if not found:
        return []
    columns = torch.tensor(found, device=batch.row_ids.device).T
    logits = linear_logits(
        out.hidden[columns[4]],
        head.weight,
        bias=head.bias,
        low_rank=head.low_rank,
        scale=head.scale,
        softcap=head.softcap,
    )
    observation = FirstDifferenceObservation(
        row_ids=batch.row_ids[columns[0]],
        position=columns[1],
        chosen_tokens=columns[2],
        rejected_tokens=columns[3],
        token_logps=logits.log_softmax(-1).float(),
        candidate_logps=_padded(out.logps, candidates),
    )
    return [observation]


def _owners(batch: GroupBatch) -> list[int]:
    return [g for g, size in enumerate(batch.group_sizes) for _ in range(size)]


def _responses(batch: GroupBatch) -> list[list[int]]:
    """Token ids of every response."""
    ids = batch.input_ids[batch.response >= 0].tolist()
    ends = list(accumulate(batch.response_sizes))
    return [ids[end - size : end] for end, size in zip(ends, batch.response_sizes, strict=True)]


def _padded(logps: Tensor, members: list[list[int]]) -> Tensor:
    """The log-probabilities of the responses in each list, [B, K], `nan` behind the shorter lists."""
    width = max(map(len, members))
    index = torch.tensor([row + [NO_TOKEN] * (width - len(row)) for row in members], device=logps.device)
    return torch.where(index >= 0, logps[index.clamp(min=0)], torch.nan)
