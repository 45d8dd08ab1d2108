"""CHES: how similar the two responses of a pair look to a model, which foretells that training on it displaces likelihood.

Razin et al. 2024, "Unintentional Unalignment: Likelihood Displacement in Direct Preference Optimization" (arXiv 2410.08847),
definition 2 and section 5. With h_t the hidden state, after the final norm, from which token t of a response is predicted, and
H = sum_t h_t over its n tokens:

    CHES = <H+, H-> - |H+|^2                      length-normalised: <H+, H-> / (n+ n-) - |H+|^2 / n+^2

The states are those of the last prompt token up to the last response token but one; the state of the last token predicts
nothing. Both forms are computed as <H+, H- - H+>, which loses fewer digits and is exactly 0 for equal responses.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_pref.functional.masked import masked_sum, wide


def ches(
    chosen_hidden: Tensor,
    chosen_mask: Tensor,
    rejected_hidden: Tensor,
    rejected_mask: Tensor,
    length_normalized: bool = False,
) -> Tensor:
    """Centred hidden embedding similarity of each pair, from the states of every position.

    Pairs whose responses are one token each share their one state, the last of the prompt: their score is 0 and says nothing.

    Args:
        chosen_hidden: Hidden states after the final norm, [B, L, D], in any floating type.
        chosen_mask: `True` at the positions that predict a token of the chosen response, [B, L] bool: as many as it has tokens.
        rejected_hidden: Same for the rejected response, [B, L', D].
        rejected_mask: [B, L'] bool.
        length_normalized: Divide each sum of states by the length of its response. The plain score grows with the lengths;
            compare pairs by the normalised one.

    Returns:
        [B], float32 (float64 for float64 states), in units of a squared hidden norm; larger foretells more displacement.
        `nan` where a response is empty.

    >>> chosen, rejected = torch.tensor([[[1.0, 0.0], [1.0, 2.0]]]), torch.tensor([[[1.0, 0.0], [3.0, 0.0]]])
    >>> both = torch.tensor([[True, True]])
    >>> ches(chosen, both, rejected, both)  # <(2, 2), (4, 0)> - 8
    tensor([0.])
    >>> ches(chosen, both, rejected, torch.tensor([[False, True]]), length_normalized=True)  # <(1, 1), (3, 0)> - 2
    tensor([1.])
    """
    chosen, chosen_lengths = _sums(chosen_hidden, chosen_mask, "chosen")
    rejected, rejected_lengths = _sums(rejected_hidden, rejected_mask, "rejected")
    if length_normalized:
        return ches_from_sums(chosen, rejected, chosen_lengths, rejected_lengths)
    is_empty = (chosen_lengths == 0) | (rejected_lengths == 0)
    return ches_from_sums(chosen, rejected).masked_fill(is_empty, torch.nan)


def ches_from_sums(
    chosen_sum: Tensor,
    rejected_sum: Tensor,
    chosen_lengths: Tensor | None = None,
    rejected_lengths: Tensor | None = None,
) -> Tensor:
    """CHES from states that are summed already, as a `PairHiddenObservation` holds them; length-normalised if lengths are given.

    Args:
        chosen_sum: Hidden states summed over the positions that predict the chosen response, [B, D].
        rejected_sum: Same for the rejected response, [B, D].
        chosen_lengths: Tokens of the chosen responses, [B]; give both lengths or neither.
        rejected_lengths: Tokens of the rejected responses, [B].

    Returns:
        [B], float32 (float64 for float64 sums), in units of a squared hidden norm. `nan` where a length is 0.

    >>> chosen, rejected = torch.tensor([[2.0, 2.0]]), torch.tensor([[6.0, 0.0]])
    >>> ches_from_sums(chosen, rejected)  # 12 - 8
    tensor([4.])
    >>> ches_from_sums(chosen, rejected, torch.tensor([2]), torch.tensor([3]))  # <(1, 1), (2, 0)> - 2
    tensor([0.])
    """
    if chosen_sum.ndim != 2 or chosen_sum.shape != rejected_sum.shape:
        raise ValueError(
            f"Sums of hidden states are [B, D] for both responses of B pairs, got {list(chosen_sum.shape)} for the chosen and "
            f"{list(rejected_sum.shape)} for the rejected ones."
        )
    if (chosen_lengths is None) != (rejected_lengths is None):
        given = "chosen" if rejected_lengths is None else "rejected"
        raise ValueError(f"Only `{given}_lengths` is given; normalising needs the lengths of both responses.")
    chosen, rejected = wide(chosen_sum), wide(rejected_sum)
    if chosen_lengths is not None and rejected_lengths is not None:
        chosen, rejected = _per_token(chosen, chosen_lengths), _per_token(rejected, rejected_lengths)
    return (chosen * (rejected - chosen)).sum(-1)


def _sums(hidden: Tensor, mask: Tensor, side: str) -> tuple[Tensor, Tensor]:
    """Sum of the counted states, [B, D], and their number, [B]."""
    if hidden.ndim != 3 or mask.shape != hidden.shape[:2]:
        raise ValueError(
            f"`{side}_hidden` is [B, L, D] and `{side}_mask` [B, L], got {list(hidden.shape)} and {list(mask.shape)}; the mask "
            "marks the positions that predict tokens of the response."
        )
    return masked_sum(hidden, mask.unsqueeze(-1).expand_as(hidden), dim=1), mask.sum(1)


def _per_token(total: Tensor, lengths: Tensor) -> Tensor:
    return (total / lengths.unsqueeze(-1)).masked_fill((lengths == 0).unsqueeze(-1), torch.nan)
