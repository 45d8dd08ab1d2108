"""Where probability goes: the change of next-token distributions between two moments of training."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class MassShiftSummary(NamedTuple):
    """Change of probability at one position of each of B pairs, [B] each."""

    chosen_token: Tensor  # of the chosen response's token there; 0 where the response has ended before
    rejected_token: Tensor
    other_tokens: Tensor  # of all tokens else together
    largest_gain: Tensor  # of the one other token that gained most, at least 0


def probability_change(token_logps: Tensor, anchor_logps: Tensor) -> Tensor:
    """Change of every token's probability, in float64; over the vocabulary it adds up to 0.

    Args:
        token_logps: Log-softmax over the vocabulary now, [..., V], nats.
        anchor_logps: The same at the anchor.

    >>> half, quarter = torch.tensor([0.5, 0.5]).log(), torch.tensor([0.25, 0.75]).log()
    >>> [round(value, 6) for value in probability_change(quarter, half).tolist()]
    [-0.25, 0.25]
    """
    # Normalised once more: in float32 the tokens of a large vocabulary miss 1 by more than what is looked for.
    now, anchor = token_logps.double().log_softmax(-1), anchor_logps.double().log_softmax(-1)
    return now.exp() - anchor.exp()


def mass_shift(change: Tensor, chosen_tokens: Tensor, rejected_tokens: Tensor) -> MassShiftSummary:
    """Split the change of each position into chosen token, rejected token, and all others.

    Args:
        change: Of every token's probability, [B, V], adding up to 0.
        chosen_tokens: [B] int64; a negative number where there is none.
        rejected_tokens: [B] int64.

    >>> shift = mass_shift(torch.tensor([[-0.25, -0.5, 0.75, 0.0]]), torch.tensor([0]), torch.tensor([1]))
    >>> [value.item() for value in shift]
    [-0.25, -0.5, 0.75, 0.75]
    """
    sides = [_at(change, tokens) for tokens in (chosen_tokens, rejected_tokens)]
    others = change.clone()
    for tokens in (chosen_tokens, rejected_tokens):
        # A gain of nothing where the token is one of the pair's own.
        named = torch.where(tokens >= 0, 0.0, _at(others, tokens.clamp(min=0))).to(others.dtype)
        others = others.scatter(1, tokens.clamp(min=0)[:, None], named[:, None])
    return MassShiftSummary(sides[0], sides[1], -(sides[0] + sides[1]), others.max(1).values.clamp(min=0))


def _at(change: Tensor, tokens: Tensor) -> Tensor:
    """The change of one token of each row, 0 for none."""
    values = change.gather(1, tokens.clamp(min=0)[:, None])[:, 0]
    return torch.where(tokens >= 0, values, 0.0)
