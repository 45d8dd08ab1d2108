"""From logits to the distribution that tokens are drawn from."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def processed_logps(
    logits: Tensor, *, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0
) -> Tensor:
    """Log-probabilities of the next token after temperature, top-k, top-p and min-p, in this order.

    What is cut off has -inf, the rest is normalised anew. The logits are left as they were.

    >>> logits = torch.log(torch.tensor([[0.5, 0.3, 0.2]]))
    >>> processed_logps(logits, top_k=2).exp()
    tensor([[0.6250, 0.3750, 0.0000]])
    >>> processed_logps(logits, top_p=0.5).exp()
    tensor([[1., 0., 0.]])

    Args:
        logits: Scores of every token, [R, V].
        temperature: Divisor of the logits; 0 puts everything on the likeliest token.
        top_k: Keep that many of the likeliest tokens, more where the last one is tied; 0 keeps all.
        top_p: Keep the fewest tokens, likeliest first, whose probabilities add up to at least this.
        min_p: Keep tokens at least this many times as likely as the likeliest.

    Returns:
        Log-probabilities, [R, V] float32.
    """
    scores = logits.float()
    if temperature == 0:
        best = scores.argmax(-1, keepdim=True)
        return torch.full_like(scores, -torch.inf).scatter_(-1, best, 0.0)
    scores = scores / temperature
    if 0 < top_k < scores.shape[-1]:
        smallest = scores.topk(top_k, dim=-1).values[:, -1:]
        scores = scores.masked_fill(scores < smallest, -torch.inf)
    if top_p < 1.0:
        probabilities, order = scores.softmax(-1).sort(dim=-1, descending=True)
        # A token goes if those before it are enough already; the first always stays.
        enough = probabilities.cumsum(-1) - probabilities >= top_p
        scores = scores.masked_fill(torch.zeros_like(enough).scatter_(-1, order, enough), -torch.inf)
    if min_p > 0.0:
        logps = scores.log_softmax(-1)
        floor = logps.max(-1, keepdim=True).values + math.log(min_p)
        scores = scores.masked_fill(logps < floor, -torch.inf)
    return scores.log_softmax(-1)


def draw(logps: Tensor, noise: Tensor) -> Tensor:
    """One token per row: the one at which the cumulated probability passes the row's noise.

    One number per row is all the chance there is, so that a row draws the same whatever rows are drawn beside it.

    >>> draw(torch.log(torch.tensor([[0.5, 0.3, 0.2], [0.5, 0.3, 0.2]])), torch.tensor([0.49, 0.81], dtype=torch.float64))
    tensor([0, 2])

    Args:
        logps: Log-probabilities, [R, V].
        noise: Uniform in [0, 1), [R] float64.

    Returns:
        Token ids, [R] int64.
    """
    # In float64 the sums over a large vocabulary keep the tokens apart that are least likely.
    cumulated = logps.exp().cumsum(-1, dtype=torch.float64)
    total = cumulated[:, -1:]
    # Rounded, the product may reach the total, behind which there is no token.
    threshold = torch.minimum(noise[:, None] * total, torch.nextafter(total, torch.zeros_like(total)))
    # A token without probability adds nothing to the sum and so cannot be where it passes the threshold. Clamped for `nan`.
    return torch.searchsorted(cumulated, threshold, right=True)[:, 0].clamp(max=logps.shape[-1] - 1)
