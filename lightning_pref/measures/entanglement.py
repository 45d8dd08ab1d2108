"""Gradient entanglement: how far pulling the chosen response up drags the rejected one along, and the other way round.

Yuan et al. 2024, "A Common Pitfall of Margin-based Language Model Alignment: Gradient Entanglement" (arXiv 2410.13828). With
g_c and g_r the gradients of the log-probabilities S_c and S_r of a pair, a = |g_c|^2, b = |g_r|^2 and e = <g_c, g_r>, a gradient
step of size eta on a loss with sensitivities d_c = -dL/dS_c and d_r = dL/dS_r changes them, to first order, by

    dS_c = eta (d_c a - d_r e)        dS_r = eta (d_c e - d_r b)

so the chosen response rises iff e / a <= d_c / d_r and the rejected one falls iff d_c / d_r <= b / e (for e > 0).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from lightning_pref.functional.linear_logps import LowRank, linear_logits


class GradientProducts(NamedTuple):
    """Inner products of the gradients of the two log-probabilities of B pairs, in nats^2 per squared unit of the parameters."""

    chosen: Tensor  # [B], a = |g_c|^2
    rejected: Tensor  # [B], b = |g_r|^2
    cross: Tensor  # [B], e = <g_c, g_r>

    def cosine(self) -> Tensor:
        """Cosine between the gradients, [B]; `nan` where one of them is 0."""
        return self.cross / (self.chosen * self.rejected).sqrt()

    def norm_ratio(self) -> Tensor:
        """|g_r| / |g_c|, [B]: the ratio d_c / d_r in the middle of the band."""
        return (self.rejected / self.chosen).sqrt()


class Head(NamedTuple):
    """What turns hidden states into logits, `softcap * tanh(scale * (W h + bias + up down h) / softcap)`."""

    weight: Tensor  # [V, D]
    bias: Tensor | None = None  # [V]
    low_rank: tuple[Tensor, Tensor] | None = None  # down [r, D] and up [V, r]
    scale: float = 1.0
    softcap: float | None = None

    def rows(self, start: int, stop: int) -> Head:
        """The head of a part of the vocabulary."""
        low_rank = None if self.low_rank is None else (self.low_rank[0], self.low_rank[1][start:stop])
        bias = None if self.bias is None else self.bias[start:stop]
        return self._replace(weight=self.weight[start:stop], bias=bias, low_rank=low_rank)

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits of hidden states, [N, V], float32 or better."""
        low_rank = None if self.low_rank is None else LowRank(*self.low_rank)
        return linear_logits(hidden, self.weight, bias=self.bias, low_rank=low_rank, scale=self.scale, softcap=self.softcap)


class Scored(NamedTuple):
    """The tokens of one response and the hidden states that predict them."""

    hidden: Tensor  # [N, D], after the final norm
    tokens: Tensor  # [N] int64


def head_gradient_products(chosen: Scored, rejected: Scored, head: Head, *, chunk_elements: int = 2**24) -> Tensor:
    """a, b and e of one pair over the output matrix of the head alone, in closed form: no backward pass.

    The gradient of S = sum_t log softmax(W h_t)[y_t] in W is sum_t rho_t h_t^T with residuals rho_t = onehot(y_t) - pi_t. It is
    made of, and forgotten, a part of the vocabulary at a time. Exact for an output matrix that is no input embedding; where
    the two are tied, the part that goes through the embedding is left out. Scale and soft-cap of the logits are accounted for.

    Args:
        chosen: Chosen response; one without tokens has gradient 0.
        rejected: Rejected response.
        head: The head.
        chunk_elements: Upper bound of vocabulary entries times max(N, D) at once.

    Returns:
        [3] float64: |g_c|^2, |g_r|^2, <g_c, g_r>.

    >>> one = Scored(torch.tensor([[1.0]]), torch.tensor([0]))  # p = (1/2, 1/2), gradient (1/2, -1/2)
    >>> other = Scored(torch.tensor([[2.0]]), torch.tensor([1]))
    >>> head_gradient_products(one, other, Head(torch.zeros(2, 1))).tolist()
    [0.5, 2.0, -1.0]
    """
    num_tokens = max(len(chosen.tokens), len(rejected.tokens), head.weight.shape[1], 1)
    rows = max(1, chunk_elements // num_tokens)
    vocabulary = head.weight.shape[0]
    spans = [(start, min(start + rows, vocabulary)) for start in range(0, vocabulary, rows)]
    responses = (chosen, rejected)
    log_norms = [_log_norm(response.hidden, head, spans) for response in responses]
    products = torch.zeros(3, dtype=torch.float64, device=head.weight.device)
    for start, stop in spans:
        up, down = (
            _head_gradient(response, head.rows(start, stop), start, log_norm)
            for response, log_norm in zip(responses, log_norms, strict=True)
        )
        products += torch.stack([up.square().sum(), down.square().sum(), (up * down).sum()])
    return products


def _log_norm(hidden: Tensor, head: Head, spans: list[tuple[int, int]]) -> Tensor:
    """Log of the softmax's denominator at each position, [N]."""
    parts = [head.rows(start, stop).logits(hidden).logsumexp(-1) for start, stop in spans]
    return torch.stack(parts).logsumexp(0)


def _head_gradient(response: Scored, part: Head, start: int, log_norm: Tensor) -> Tensor:
    """Gradient of the log-probability in a part of the output matrix, [v, D] float64."""
    logits = part.logits(response.hidden)
    residual = -(logits - log_norm[:, None]).exp()
    inside = (response.tokens >= start) & (response.tokens < start + part.weight.shape[0])
    columns = (response.tokens - start).clamp(0, part.weight.shape[0] - 1)
    residual = residual.scatter_add(1, columns[:, None], inside[:, None].to(residual.dtype))
    slope = part.scale if part.softcap is None else part.scale * (1 - (logits / part.softcap).square())
    return (residual * slope).double().T @ response.hidden.double()


def predicted_changes(products: GradientProducts, up: Tensor, down: Tensor, step_size: float = 1.0) -> tuple[Tensor, Tensor]:
    """First-order changes of S_c and S_r, [B] each, in one step of plain gradient descent on the loss of that pair alone.

    Args:
        products: Of B pairs.
        up: d_c = -dL/dS_c of each pair, [B].
        down: d_r = dL/dS_r, [B].
        step_size: Learning rate.

    >>> one = torch.ones(1)
    >>> predicted_changes(GradientProducts(one, 4 * one, 1.5 * one), one, one, 0.1)  # both fall
    (tensor([-0.0500]), tensor([-0.2500]))
    """
    chosen = step_size * (up * products.chosen - down * products.cross)
    rejected = step_size * (up * products.cross - down * products.rejected)
    return chosen, rejected


def in_band(products: GradientProducts, up: Tensor, down: Tensor) -> Tensor:
    """Whether a step on the pair lets the chosen response rise and the rejected one fall, [B] bool.

    For e > 0 that is e / a <= d_c / d_r <= b / e; the band is never empty, since e^2 <= a b. For e <= 0 it is always so.
    """
    chosen, rejected = predicted_changes(products, up, down)
    return (chosen >= 0) & (rejected <= 0)


class Regimes(NamedTuple):
    """Which way the two responses of pairs move; of one pair 0 or 1 each, of many the shares."""

    up_down: Tensor  # chosen does not fall, rejected does not rise: what is wanted
    both_down: Tensor
    both_up: Tensor
    down_up: Tensor  # the opposite of what is wanted; no gradient step of one pair alone does this to first order


def regimes(chosen_change: Tensor, rejected_change: Tensor) -> Regimes:
    """The regime of each pair by the signs of its changes, [B] float64 of 0 and 1; `nan` where a change is not finite.

    >>> [regime.tolist() for regime in regimes(torch.tensor([1.0, -1.0]), torch.tensor([-1.0, -2.0]))]
    [[1.0, 0.0], [0.0, 1.0], [0.0, 0.0], [0.0, 0.0]]
    """
    rises, falls = chosen_change >= 0, rejected_change <= 0
    known = chosen_change.isfinite() & rejected_change.isfinite()
    masks = (rises & falls, ~rises & falls, rises & ~falls, ~rises & ~falls)
    return Regimes(*(torch.where(known, mask.double(), torch.nan) for mask in masks))
