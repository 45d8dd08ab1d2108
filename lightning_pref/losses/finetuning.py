"""Alignment fine-tuning (AFT, arXiv:2309.02144): the responses of one prompt in the order of their quality.

Scores are mean log-probabilities. Each loss is log(1 + sum of exp(term)) over the ordered pairs of a prompt; with right
answers at rank 0 and wrong ones at rank 1 the pairs are right x wrong, with ranks 0, 1, 2, ... they are those of a ranked list.
Add the NLL of the reference answer yourself: AFT's total is `nll + align_boundary(...)`.
"""

import torch
from torch import Tensor

from lightning_pref.functional import wide


def align(scores: Tensor, ranks: Tensor, mask: Tensor) -> Tensor:
    """log(1 + sum exp(s_worse - s_better)): no constraint, so the worse responses are pushed down without end.

    Args:
        scores: Mean log-probabilities of the responses, [P, K].
        ranks: Place of each response, [P, K], 0 is best; equal ranks are ties and make no term.
        mask: Responses that exist, [P, K], bool.

    Returns:
        [P]; 0 with a zero gradient for a prompt without an ordered pair.

    >>> align(torch.tensor([[-1.0, -1.0]]), torch.tensor([[0, 1]]), torch.tensor([[True, True]]))
    tensor([0.6931])
    """
    scores, is_better = _ordered(scores, ranks, mask)
    return _log_one_plus_sum(_worse(scores) - _better(scores), is_better)


def align_detached(scores: Tensor, ranks: Tensor, mask: Tensor) -> Tensor:
    """`align` where only the better response of each pair moves: no gradient reaches the worse one through it.

    >>> scores = torch.tensor([[-1.0, -1.0]], requires_grad=True)
    >>> align_detached(scores, torch.tensor([[0, 1]]), torch.tensor([[True, True]])).sum().backward()
    >>> scores.grad
    tensor([[-0.5000,  0.0000]])
    """
    scores, is_better = _ordered(scores, ranks, mask)
    return _log_one_plus_sum(_worse(scores.detach()) - _better(scores), is_better)


def align_boundary(scores: Tensor, ranks: Tensor, mask: Tensor, *, beta: float = 0.15) -> Tensor:
    """`align` that stops pushing a response at a boundary, `beta` below the least of those better than it.

    The added term exp(2 B - s_better - s_worse), B a constant, balances the other one exactly at s_worse = B: above B a
    worse response is pushed down, below it is pulled up.

    Args:
        scores: Mean log-probabilities of the responses, [P, K].
        ranks: Place of each response, [P, K], 0 is best.
        mask: Responses that exist, [P, K], bool.
        beta: Distance of the boundary in nats per token, positive.

    >>> scores = torch.tensor([[-1.0, -1.5]], requires_grad=True)
    >>> align_boundary(scores, torch.tensor([[0, 1]]), torch.tensor([[True, True]]), beta=0.5).sum().backward()
    >>> scores.grad[0, 1].abs() < 1e-6
    tensor(True)
    """
    scores, is_better = _ordered(scores, ranks, mask)
    better, worse = _better(scores), _worse(scores)
    lowest_better = torch.where(is_better, better, torch.inf).amin(1, keepdim=True).detach()
    # Responses with nothing above them have no boundary; any finite number will do, their terms are not counted.
    boundary = lowest_better.nan_to_num(posinf=0.0) - beta
    terms = torch.stack([worse - better, 2 * boundary - better - worse])
    return _log_one_plus_sum(torch.logsumexp(terms, 0), is_better)


def better_than(ranks: Tensor, mask: Tensor) -> Tensor:
    """Which response is better than which, [P, K, K] bool: entry (i, j) says that i ranks before j and both exist.

    >>> better_than(torch.tensor([[0, 1]]), torch.tensor([[True, True]]))
    tensor([[[False,  True],
             [False, False]]])
    """
    if mask.dtype != torch.bool or mask.shape != ranks.shape or ranks.ndim != 2:
        raise ValueError(
            f"`ranks` and a bool `mask` must both be [P, K], got {list(ranks.shape)} and {mask.dtype} {list(mask.shape)}."
        )
    return (ranks.unsqueeze(2) < ranks.unsqueeze(1)) & mask.unsqueeze(2) & mask.unsqueeze(1)


def _ordered(scores: Tensor, ranks: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """The scores, 0 where there is no response, and their order."""
    is_better = better_than(ranks, mask)
    if scores.shape != mask.shape:
        raise ValueError(f"`scores` must be [P, K] like `mask`, {list(mask.shape)}; got {list(scores.shape)}.")
    # A logsumexp hands nan on to its neighbours' gradients even where its result is not used.
    return torch.where(mask, wide(scores), 0.0), is_better


def _better(scores: Tensor) -> Tensor:
    return scores.unsqueeze(2)


def _worse(scores: Tensor) -> Tensor:
    return scores.unsqueeze(1)


def _log_one_plus_sum(terms: Tensor, counted: Tensor) -> Tensor:
    """log(1 + sum of exp over the counted terms), [P, K, K] -> [P]. The 1 is a term of its own: nothing overflows."""
    exponents = torch.where(counted, terms, -torch.inf).flatten(1)
    return torch.cat([exponents.new_zeros(len(exponents), 1), exponents], 1).logsumexp(1)
