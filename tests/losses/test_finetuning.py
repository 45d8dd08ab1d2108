import math
from collections.abc import Callable
from itertools import product

import pytest
import torch
from torch import Tensor

from lightning_pref.losses import GROUP_LOSSES, align, align_boundary, align_detached

SCORES = torch.tensor([[-1.0, -0.4, -1.3, -0.2], [-0.7, -2.0, -0.1, 9.0]], dtype=torch.float64)
RANKS = torch.tensor([[0, 0, 1, 1], [2, 0, 1, 0]])
MASK = torch.tensor([[True, True, True, True], [True, True, True, False]])

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


def ordered_pairs(row: int) -> list[tuple[int, int]]:
    exists = [i for i in range(4) if MASK[row, i]]
    return [(i, j) for i, j in product(exists, exists) if RANKS[row, i] < RANKS[row, j]]


def boundary_loss(scores: list[float], pairs: list[tuple[int, int]], beta: float) -> float:
    """The double sum of the paper, written out."""
    total = 1.0
    for i, j in pairs:
        boundary = min(scores[a] for a, b in pairs if b == j) - beta
        total += math.exp(scores[j] - scores[i]) + math.exp(2 * boundary - scores[i] - scores[j])
    return math.log(total)


@pytest.mark.parametrize("loss", [align, align_detached])
def test_F1_align_is_the_double_sum_written_out(loss: Loss) -> None:
    for row, value in enumerate(loss(SCORES, RANKS, MASK).tolist()):
        s = SCORES[row].tolist()
        assert value == pytest.approx(math.log(1 + sum(math.exp(s[j] - s[i]) for i, j in ordered_pairs(row))))


def test_F1_align_boundary_is_the_double_sum_written_out() -> None:
    for row, value in enumerate(align_boundary(SCORES, RANKS, MASK, beta=0.3).tolist()):
        assert value == pytest.approx(boundary_loss(SCORES[row].tolist(), ordered_pairs(row), 0.3))


def test_detached_constraint_never_moves_a_worse_response() -> None:
    scores = SCORES.clone().requires_grad_()
    align_detached(scores, RANKS, MASK)[0].backward()
    assert scores.grad is not None
    assert (scores.grad[0, 2:] == 0).all()
    assert (scores.grad[0, :2] < 0).all()


@pytest.mark.parametrize(("offset", "sign"), [(0.2, 1), (-0.2, -1)])
def test_boundary_pushes_from_above_and_pulls_from_below(offset: float, sign: int) -> None:
    boundary = -1.0 - 0.5
    scores = torch.tensor([[-1.0, boundary + offset]], requires_grad=True)
    align_boundary(scores, torch.tensor([[0, 1]]), torch.ones(1, 2, dtype=torch.bool), beta=0.5).backward()
    assert scores.grad is not None
    assert scores.grad[0, 1].sign() == sign


def test_boundary_far_below_is_no_constraint() -> None:
    torch.testing.assert_close(align_boundary(SCORES, RANKS, MASK, beta=50.0), align(SCORES, RANKS, MASK))


def test_align_is_at_least_the_worst_violation() -> None:
    worst = torch.tensor([max(0.0, *(SCORES[r, j] - SCORES[r, i] for i, j in ordered_pairs(r))) for r in range(2)])
    assert (align(SCORES, RANKS, MASK) >= worst).all()


@pytest.mark.parametrize("name", GROUP_LOSSES)
def test_order_of_the_responses_does_not_matter(name: str) -> None:
    loss, order = GROUP_LOSSES[name].fn, torch.tensor([3, 1, 0, 2])
    torch.testing.assert_close(loss(SCORES[:, order], RANKS[:, order], MASK[:, order]), loss(SCORES, RANKS, MASK))


@pytest.mark.parametrize("name", GROUP_LOSSES)
def test_prompt_without_an_ordered_pair_gives_zero_with_a_zero_gradient(name: str) -> None:
    scores = torch.tensor([[-1.0, -2.0], [-1.0, -2.0]], requires_grad=True)
    mask = torch.tensor([[True, True], [True, False]])
    losses = GROUP_LOSSES[name].fn(scores, torch.tensor([[1, 1], [0, 1]]), mask)
    losses.sum().backward()
    torch.testing.assert_close(losses, torch.zeros(2))
    torch.testing.assert_close(scores.grad, torch.zeros(2, 2))


@pytest.mark.parametrize("name", GROUP_LOSSES)
def test_what_the_mask_leaves_out_has_no_influence_even_if_nan(name: str) -> None:
    dirty = SCORES.clone()
    dirty[1, 3] = torch.nan
    dirty.requires_grad_()
    losses = GROUP_LOSSES[name].fn(dirty, RANKS, MASK)
    losses.sum().backward()
    torch.testing.assert_close(losses, GROUP_LOSSES[name].fn(SCORES, RANKS, MASK))
    assert dirty.grad is not None
    assert dirty.grad.isfinite().all()


@pytest.mark.parametrize("name", GROUP_LOSSES)
def test_F3_group_losses_do_not_overflow(name: str) -> None:
    scores = torch.tensor([[-1e4, 0.0], [0.0, -1e4]], requires_grad=True)
    losses = GROUP_LOSSES[name].fn(scores, torch.tensor([[0, 1], [0, 1]]), torch.ones(2, 2, dtype=torch.bool))
    losses.sum().backward()
    assert losses.isfinite().all()
    assert scores.grad is not None
    assert scores.grad.isfinite().all()


def test_every_option_changes_its_loss() -> None:
    assert [(name, *spec.options) for name, spec in GROUP_LOSSES.items() if spec.options] == [("align_boundary", "beta")]
    assert not torch.allclose(align_boundary(SCORES, RANKS, MASK, beta=0.1), align_boundary(SCORES, RANKS, MASK, beta=0.5))


def test_mask_of_another_shape_raises() -> None:
    with pytest.raises(ValueError, match=r"`ranks` and a bool `mask` must both be \[P, K\], got \[2, 4\] and torch.bool \[2\]"):
        align(SCORES, RANKS, MASK[:, 0])


def test_F5_scores_of_another_shape_raise() -> None:
    with pytest.raises(ValueError, match=r"`scores` must be \[P, K\] like `mask`, \[2, 4\]; got \[2, 4, 1\]"):
        align(SCORES[:, :, None], RANKS, MASK)
