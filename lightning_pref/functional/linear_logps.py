"""Log-probabilities of tokens straight from hidden states, without ever holding the logits of a whole batch."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from lightning_pref.functional.logprobs import entropy, log_collision, token_logps
from lightning_pref.functional.masked import wide


class LowRank(NamedTuple):
    """A low-rank addition to a linear map: `down` [r, D] then `up` [V, r]."""

    down: Tensor
    up: Tensor


class LinearLogps(NamedTuple):
    """What the head says about each target; all float32."""

    logps: Tensor  # [N], nats
    entropy: Tensor | None  # [N], nats, of the whole next-token distribution
    collision: Tensor | None  # [N], log sum_v pi(v)^2: log-probability that two draws agree


def linear_logits(
    hidden: Tensor,
    weight: Tensor,
    *,
    bias: Tensor | None = None,
    low_rank: LowRank | None = None,
    scale: float = 1.0,
    softcap: float | None = None,
) -> Tensor:
    """Logits in float32 (float64 for float64 weights): `softcap * tanh(scale * (hidden @ weight.T + ...) / softcap)`.

    Args:
        hidden: Hidden states after the final norm, [N, D].
        weight: Rows of the output vocabulary, [V, D].
        bias: Added to the logits, [V].
        low_rank: Added to `weight` as `up @ down`, without forming that product.
        scale: Factor on the logits, before the soft-cap.
        softcap: Bound of the logits; `None` for none.

    Returns:
        [N, V]. The matrix product runs in the precision of its inputs (or of autocast); all that follows is float32.

    >>> linear_logits(torch.tensor([[1.0, 2.0]]), torch.eye(2), scale=0.5)
    tensor([[0.5000, 1.0000]])
    """
    logits = wide(F.linear(hidden.to(weight.dtype), weight, bias))
    if low_rank is not None:
        logits = logits + wide(F.linear(F.linear(hidden.to(low_rank.down.dtype), low_rank.down), low_rank.up))
    if scale != 1.0:
        logits = logits * scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    return logits


def linear_logps(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    low_rank: LowRank | None = None,
    scale: float = 1.0,
    softcap: float | None = None,
    temperature: float = 1.0,
    want_entropy: bool = False,
    want_collision: bool = False,
    chunk_elements: int = 2**24,
) -> LinearLogps:
    """Log-probability of each target under the softmax of its logits, in chunks of rows.

    At most `chunk_elements` logits exist at once, in the forward pass and in the backward pass, which computes those of
    each chunk again. A batch that fits in one chunk keeps its logits: there, computing them twice saves nothing.

    Args:
        hidden: Hidden states after the final norm, [N, D]; N may be 0.
        weight: Rows of the output vocabulary, [V, D].
        targets: Token ids, [N] int64.
        bias: See `linear_logits`, like the three arguments after it.
        low_rank: Low-rank addition to `weight`.
        scale: Factor on the logits.
        softcap: Bound of the logits.
        temperature: Divisor of the logits, after the soft-cap: the distribution that sampling at this temperature draws from.
        want_entropy: Return the entropy of every position, too.
        want_collision: Return the collision log-probability of every position, too.
        chunk_elements: Upper bound of rows times V in one chunk, at least one row.

    >>> out = linear_logps(torch.zeros(1, 2), torch.ones(4, 2), torch.tensor([3]), want_entropy=True, want_collision=True)
    >>> [round(value.exp().item(), 4) for value in out]
    [0.25, 4.0, 0.25]
    """
    if chunk_elements < 1:
        raise ValueError(f"`chunk_elements` must be at least 1, got {chunk_elements!r}.")
    if temperature <= 0:
        raise ValueError(f"`temperature` must be positive, got {temperature!r}: at 0 every token but one is impossible.")

    def of_rows(hidden: Tensor, targets: Tensor) -> list[Tensor]:
        logits = linear_logits(hidden, weight, bias=bias, low_rank=low_rank, scale=scale, softcap=softcap)
        if temperature != 1.0:
            logits = logits / temperature
        columns = [token_logps(logits, targets)]
        if want_entropy:
            columns.append(entropy(logits))
        if want_collision:
            columns.append(log_collision(logits))
        return columns

    num_rows = max(1, chunk_elements // weight.shape[0])
    if len(hidden) <= num_rows:
        columns = of_rows(hidden, targets)
    else:
        chunks = [
            # The head draws no random numbers, so there is no generator state to put back for the second computation.
            checkpoint(of_rows, rows, target, use_reentrant=False, preserve_rng_state=False)
            for rows, target in zip(torch.split(hidden, num_rows), torch.split(targets, num_rows), strict=True)
        ]
        columns = [torch.cat(column) for column in zip(*chunks, strict=True)]
    rest = iter(columns[1:])
    return LinearLogps(columns[0], next(rest) if want_entropy else None, next(rest) if want_collision else None)
