"""Stage 1, tokens -> one number per response. The plain sum is `functional.segment_sum`; these are the other ways."""

from typing import NamedTuple

import torch
from torch import Tensor

from lightning_pref.functional import masked_sum, segment_sum, wide


class ScoredTokens(NamedTuple):
    """Log-probabilities of the tokens of R responses, one response after the other."""

    token_logps: Tensor  # [N]
    response: Tensor  # [N] index of the response of each token, ascending
    lengths: Tensor  # [R] tokens of each response, N together


def length_decoupled_sums(tokens: ScoredTokens, chosen: Tensor, rejected: Tensor, *, alpha: float) -> tuple[Tensor, Tensor]:
    """Sums that weigh by `alpha` what a response says beyond the length of its partner (LD-DPO, arXiv:2409.06411).

    Use them in any pairwise loss, for the policy **and** for the reference: with plain sums on one side the two differ
    before training has begun. Takes B x N numbers of memory.

    Args:
        tokens: Scored tokens of the batch.
        chosen: Index of the chosen response of each pair, [B].
        rejected: Index of the rejected response of each pair, [B].
        alpha: Weight of the tail, in [0, 1]; 1 is the plain sum, 0 cuts the longer response.

    Returns:
        Sums of the chosen and of the rejected responses, [B] each.

    >>> tokens = ScoredTokens(torch.tensor([-1., -2., -4., -8.]), torch.tensor([0, 0, 0, 1]), torch.tensor([3, 1]))
    >>> length_decoupled_sums(tokens, torch.tensor([0]), torch.tensor([1]), alpha=0.5)
    (tensor([-4.]), tensor([-8.]))
    """
    if not 0.0 <= alpha <= 1.0:
        raise ValueError(f"`alpha` must be in [0, 1], got {alpha!r}: 1 keeps the tail, 0 drops it.")
    starts = tokens.lengths.cumsum(0) - tokens.lengths
    position = torch.arange(len(tokens.token_logps), device=starts.device) - starts[tokens.response]
    shared = torch.minimum(tokens.lengths[chosen], tokens.lengths[rejected])
    is_tail = position >= shared.unsqueeze(1)  # [B, N]

    def weighted_sum(side: Tensor) -> Tensor:
        own = tokens.response == side.unsqueeze(1)
        logps = tokens.token_logps.expand(own.shape)
        return masked_sum(logps, own & ~is_tail, 1) + alpha * masked_sum(logps, own & is_tail, 1)

    return weighted_sum(chosen), weighted_sum(rejected)


def wpo_weights(tokens: ScoredTokens, collision: Tensor) -> Tensor:
    """How on-policy each response is, in (0, ...): geometric mean of p(token) / sum_v p(v)^2 (WPO, arXiv:2406.11827, eq. 2).

    A pair's loss is multiplied by the weights of both of its responses. Around 1 for the policy's own samples; a constant,
    no gradient flows through it. Not for losses that couple the pairs of a batch (`aot`): a sorted slot has no one pair.

    Args:
        tokens: Scored tokens of the batch.
        collision: log sum_v p(v)^2 at the position that predicts each token, [N]; see `functional.log_collision`.

    Returns:
        [R].

    >>> tokens = ScoredTokens(torch.tensor([0.25, 0.5]).log(), torch.tensor([0, 0]), torch.tensor([2]))
    >>> wpo_weights(tokens, torch.tensor([0.5, 0.5]).log())
    tensor([0.7071])
    """
    above_chance = wide(tokens.token_logps.detach()) - wide(collision.detach())
    sums = segment_sum(above_chance, tokens.response, len(tokens.lengths))
    return (sums / tokens.lengths.clamp(min=1)).exp()
