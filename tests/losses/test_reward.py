import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lightning_pref.functional import segment_sum
from lightning_pref.losses.pair import PairLogps
from lightning_pref.losses.preference import preference_loss
from lightning_pref.losses.reward import (
    REWARD_LOSSES,
    bradley_terry,
    implicit_prm,
    ordinal,
    plackett_luce,
    process_values,
    regression,
    step_bce,
    step_rewards,
)

GENERATOR = torch.Generator().manual_seed(0)
CHOSEN, REJECTED, MARGIN = torch.randn(3, 12, generator=GENERATOR, dtype=torch.float64).unbind()
MARGIN = MARGIN.abs()


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("center", [0.0, 0.01])
def test_F1_bradley_terry_is_its_formula_row_by_row(smoothing: float, center: float) -> None:
    found = bradley_terry(CHOSEN, REJECTED, MARGIN, center, label_smoothing=smoothing)
    expected = []
    for c, r, m in zip(CHOSEN.tolist(), REJECTED.tolist(), MARGIN.tolist(), strict=True):
        right, flipped = 1 / (1 + math.exp(-(c - r - m))), 1 / (1 + math.exp(-(r - c - m)))
        expected.append(-(1 - smoothing) * math.log(right) - smoothing * math.log(flipped) + center * (c + r) ** 2)
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-12)


def test_W4_an_offset_of_all_scores_changes_nothing_with_or_without_a_margin_and_something_with_centring() -> None:
    for margin in (None, MARGIN):
        torch.testing.assert_close(
            bradley_terry(CHOSEN + 5.0, REJECTED + 5.0, margin), bradley_terry(CHOSEN, REJECTED, margin), rtol=1e-9, atol=1e-12
        )
    shifted = bradley_terry(CHOSEN + 5.0, REJECTED + 5.0, center=0.01) - bradley_terry(CHOSEN, REJECTED, center=0.01)
    torch.testing.assert_close(shifted, 0.01 * ((CHOSEN + REJECTED + 10) ** 2 - (CHOSEN + REJECTED) ** 2))


def test_W4_centring_moves_the_sum_of_a_pair_and_never_its_difference_whatever_the_margin() -> None:
    for margin in (None, MARGIN, 100 * MARGIN):
        chosen, rejected = CHOSEN.clone().requires_grad_(), REJECTED.clone().requires_grad_()
        plain = torch.autograd.grad(bradley_terry(chosen, rejected, margin).sum(), (chosen, rejected))
        centred = torch.autograd.grad(bradley_terry(chosen, rejected, margin, 0.25).sum(), (chosen, rejected))
        # On the difference (chosen up, rejected down) the same force, on the sum only that of the centring term.
        torch.testing.assert_close(centred[0] - centred[1], plain[0] - plain[1])
        torch.testing.assert_close(plain[0] + plain[1], torch.zeros(12, dtype=torch.float64))
        torch.testing.assert_close(centred[0] + centred[1], 4 * 0.25 * (CHOSEN + REJECTED))


def test_W4_training_with_margin_and_centring_ends_centred_with_the_difference_of_the_uncentred_run() -> None:
    """One pair, a label wrong in one case of four: the optimum is d - m = log 3, and the scores lie around 0."""
    scores = torch.tensor([9.0, 8.0], dtype=torch.float64)
    for _ in range(4000):
        scores.requires_grad_()
        chosen, rejected = scores[:1], scores[1:]
        loss = 0.75 * bradley_terry(chosen, rejected, torch.tensor([0.5]), 0.1) + 0.25 * bradley_terry(
            rejected, chosen, torch.tensor([-0.5]), 0.1
        )
        scores = (scores - 0.3 * torch.autograd.grad(loss.sum(), scores)[0]).detach()
    assert (scores[0] - scores[1]).item() == pytest.approx(0.5 + math.log(3), abs=1e-6)
    assert (scores[0] + scores[1]).item() == pytest.approx(0.0, abs=1e-6)


def test_W3_equal_scores_cost_log_two_and_push_apart() -> None:
    chosen, rejected = torch.zeros(1, requires_grad=True), torch.zeros(1, requires_grad=True)
    loss = bradley_terry(chosen, rejected)
    loss.backward()
    assert loss.item() == pytest.approx(math.log(2))
    assert (chosen.grad, rejected.grad) == (torch.tensor([-0.5]), torch.tensor([0.5]))


def reference_plackett_luce(scores: list[float], ranks: list[int]) -> float:
    """Breslow's rule by loops: one draw for each response that is not on the last rank."""
    total = 0.0
    for score, rank in zip(scores, ranks, strict=True):
        if rank < max(ranks):
            total -= math.log(math.exp(score) / sum(math.exp(s) for s, r in zip(scores, ranks, strict=True) if r >= rank))
    return total


RANKED = st.lists(st.tuples(st.floats(-5, 5), st.integers(0, 4)), min_size=1, max_size=6)


@given(st.lists(RANKED, min_size=1, max_size=4), st.randoms(use_true_random=False))
def test_F1_plackett_luce_of_ragged_groups_in_any_order_is_the_loop(
    groups: list[list[tuple[float, int]]], random: object
) -> None:
    rows = [(g, score, rank) for g, group in enumerate(groups) for score, rank in group]
    random.shuffle(rows)  # type: ignore[attr-defined]
    group, scores, ranks = (torch.tensor(column) for column in zip(*rows, strict=True))
    found = plackett_luce(scores.double(), ranks, group, len(groups) + 1)
    expected = [reference_plackett_luce([s for s, _ in g], [r for _, r in g]) for g in groups]
    np.testing.assert_allclose(found.numpy(), [*expected, 0.0], rtol=1e-5, atol=1e-5)  # scores are float32 on their way


def likelihood_of_order(strengths: np.ndarray, order: tuple[int, ...]) -> float:
    remaining, probability = list(order), 1.0
    while remaining:
        probability *= strengths[remaining[0]] / strengths[remaining].sum()
        remaining = remaining[1:]
    return probability


def test_plackett_luce_is_a_distribution_over_all_orders_and_top_k_its_marginal() -> None:
    scores = torch.tensor([0.3, -1.2, 2.0, 0.7], dtype=torch.float64)
    group, strengths = torch.zeros(4, dtype=torch.int64), scores.exp().numpy()
    orders = list(itertools.permutations(range(4)))
    for order in orders:
        ranks = torch.empty(4, dtype=torch.int64)
        ranks[list(order)] = torch.arange(4)
        expected = likelihood_of_order(strengths, order)
        assert plackett_luce(scores, ranks, group, 1).exp().item() == pytest.approx(1 / expected)
        # The first two places known, the rest in any order: the sum over those orders, by both ways of saying so.
        top_two = -math.log(sum(likelihood_of_order(strengths, o) for o in orders if o[:2] == order[:2]))
        assert plackett_luce(scores, ranks, group, 1, top_k=2).item() == pytest.approx(top_two)
        assert plackett_luce(scores, ranks.clamp(max=2), group, 1).item() == pytest.approx(top_two)
    assert sum(likelihood_of_order(strengths, order) for order in orders) == pytest.approx(1.0)


def test_plackett_luce_of_two_is_bradley_terry_and_ties_of_all_teach_nothing() -> None:
    group = torch.arange(12).repeat_interleave(2)
    scores = torch.stack([CHOSEN, REJECTED], 1).flatten()
    torch.testing.assert_close(plackett_luce(scores, torch.tensor([0, 1] * 12), group, 12), bradley_terry(CHOSEN, REJECTED))
    tied = scores.clone().requires_grad_()
    loss = plackett_luce(tied, torch.zeros(24), group, 12)
    loss.sum().backward()
    assert (loss == 0).all()
    assert tied.grad is not None
    assert (tied.grad == 0).all()


def test_regression_is_the_squared_error() -> None:
    torch.testing.assert_close(regression(CHOSEN, REJECTED), (CHOSEN - REJECTED) ** 2)


def test_F1_ordinal_levels_are_a_distribution_of_differences_of_sigmoids() -> None:
    thresholds = torch.tensor([-2.0, -0.3, 1.1], dtype=torch.float64)
    for score in (-3.0, 0.0, 2.5):
        scores = torch.full((4,), score, dtype=torch.float64)
        found = (-ordinal(scores, torch.arange(4), thresholds)).exp()
        above = [1.0, *(1 / (1 + math.exp(-(score - t))) for t in thresholds.tolist()), 0.0]
        np.testing.assert_allclose(found.numpy(), [a - b for a, b in itertools.pairwise(above)], rtol=1e-9)
        assert found.sum().item() == pytest.approx(1.0)


def test_ordinal_of_two_levels_is_logistic_regression() -> None:
    levels = (CHOSEN > 0).long()
    expected = torch.nn.functional.binary_cross_entropy_with_logits(REJECTED - 0.5, levels.double(), reduction="none")
    torch.testing.assert_close(ordinal(REJECTED, levels, torch.tensor([0.5], dtype=torch.float64)), expected)


def test_W6_a_step_is_judged_at_its_last_token_and_nowhere_else() -> None:
    logits = torch.tensor([9.0, 1.0, float("nan"), -2.0, 7.0], requires_grad=True)
    labels = torch.tensor([-100, 1, -100, 0, -100])
    losses = step_bce(logits, labels)
    losses.sum().backward()
    expected = [0.0, math.log1p(math.exp(-1.0)), 0.0, math.log1p(math.exp(-2.0)), 0.0]
    assert losses.tolist() == pytest.approx(expected)
    assert logits.grad is not None
    assert logits.grad.tolist() == pytest.approx([0.0, 1 / (1 + math.exp(-1.0)) - 1, 0.0, 1 / (1 + math.exp(2.0)), 0.0])


def test_soft_labels_of_steps_are_cross_entropies() -> None:
    loss = step_bce(torch.tensor([0.4]), torch.tensor([0.3]))
    right = 1 / (1 + math.exp(-0.4))
    assert loss.item() == pytest.approx(-0.3 * math.log(right) - 0.7 * math.log(1 - right))


def test_F1_implicit_prm_is_the_cross_entropy_of_the_outcome_and_log_two_at_the_reference() -> None:
    correct = MARGIN > 0.5
    reward = 0.3 * (CHOSEN - REJECTED).numpy()
    right = 1 / (1 + np.exp(-reward))
    expected = -np.where(correct.numpy(), np.log(right), np.log(1 - right))
    np.testing.assert_allclose(implicit_prm(CHOSEN, REJECTED, correct, beta=0.3).numpy(), expected)
    torch.testing.assert_close(implicit_prm(CHOSEN, CHOSEN, correct), torch.full((12,), math.log(2), dtype=torch.float64))


LENGTHS = torch.tensor([4, 0, 1, 5, 2])
RESPONSE = torch.arange(5).repeat_interleave(LENGTHS)
LOGPS, REF_LOGPS = -torch.rand(2, 12, generator=GENERATOR, dtype=torch.float64)
ENDS = torch.tensor([0, 1, 0, 1, 1, 0, 0, 1, 0, 1, 1, 1], dtype=torch.bool)


def reference_steps(beta: float) -> tuple[list[float], list[float]]:
    values, rewards = [], []
    for r in range(5):
        value, open_step = 0.0, 0.0
        for t in torch.nonzero(r == RESPONSE).flatten().tolist():
            change = beta * (LOGPS[t] - REF_LOGPS[t]).item()
            value, open_step = value + change, open_step + change
            values.append(value)
            rewards.append(open_step if ENDS[t] else 0.0)
            open_step = 0.0 if ENDS[t] else open_step
    return values, rewards


def test_F1_process_values_and_step_rewards_are_the_loop() -> None:
    values = process_values(LOGPS, REF_LOGPS, RESPONSE, beta=0.7)
    expected_values, expected_rewards = reference_steps(0.7)
    np.testing.assert_allclose(values.numpy(), expected_values, rtol=1e-12)
    np.testing.assert_allclose(step_rewards(values, ENDS, RESPONSE).numpy(), expected_rewards, rtol=1e-9, atol=1e-12)


def test_step_rewards_telescope_to_the_outcome_however_the_solution_is_cut() -> None:
    values = process_values(LOGPS, REF_LOGPS, RESPONSE, beta=0.05)
    outcome = 0.05 * segment_sum(LOGPS - REF_LOGPS, RESPONSE, 5)
    is_last = torch.cat([RESPONSE[1:] != RESPONSE[:-1], torch.tensor([True])])
    for ends in (is_last, ENDS | is_last, torch.ones(12, dtype=torch.bool)):
        torch.testing.assert_close(segment_sum(step_rewards(values, ends, RESPONSE), RESPONSE, 5), outcome)


def test_tokens_after_the_last_mark_and_the_response_before_belong_to_no_step() -> None:
    response, ends = torch.tensor([0, 0, 1, 1]), torch.tensor([True, False, False, True])
    values = torch.tensor([1.0, 3.0, 10.0, 30.0])
    assert step_rewards(values, ends, response).tolist() == [1.0, 0.0, 0.0, 30.0]


def test_process_value_is_the_log_mean_exponential_reward_of_what_may_follow() -> None:
    """q(prefix) = beta * log E_ref[exp(r / beta) | prefix], enumerated: two tokens out of three, policy and reference tabular."""
    generator = torch.Generator().manual_seed(3)
    policy, reference = torch.randn(2, 4, 3, generator=generator, dtype=torch.float64).log_softmax(-1)  # row 0: first token
    beta = 0.4
    for first in range(3):
        outcomes = []
        for second in range(3):
            tokens = (torch.stack([table[0, first], table[1 + first, second]]) for table in (policy, reference))
            values = process_values(*tokens, torch.zeros(2, dtype=torch.int64), beta=beta)
            outcomes.append(values[1] / beta + reference[1 + first, second])
        expected = beta * torch.stack(outcomes).logsumexp(0)
        torch.testing.assert_close(values[0], expected)


def test_an_implicit_reward_model_trained_on_pairs_is_plain_dpo() -> None:
    outcomes = [segment_sum(x, RESPONSE, 5)[[0, 3]] for x in (LOGPS, REF_LOGPS)]
    rewards = 0.1 * (outcomes[0] - outcomes[1])
    pair = PairLogps(outcomes[0][:1], outcomes[0][1:], outcomes[1][:1], outcomes[1][1:])
    torch.testing.assert_close(bradley_terry(rewards[:1], rewards[1:]), preference_loss("sigmoid", pair, beta=0.1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_F3_losses_and_gradients_are_finite_at_extreme_scores(dtype: torch.dtype) -> None:
    scores = torch.tensor([1e4, -1e4, 1e4, 0.0], dtype=dtype, requires_grad=True)
    other, index = torch.tensor([-1e4, 1e4, 1e4, 0.0], dtype=dtype), torch.tensor([0, 1, 1, 0])
    every = [
        bradley_terry(scores, other, other.abs(), label_smoothing=0.1),
        bradley_terry(scores, other) + bradley_terry(other, scores),
        plackett_luce(scores, torch.tensor([1, 0, 2, 3]), torch.zeros(4, dtype=torch.int64), 1),
        ordinal(scores, index, torch.tensor([0.5], dtype=dtype)),
        ordinal(scores, torch.tensor([0, 2, 1, 1]), torch.tensor([-0.5, 0.5], dtype=dtype)),
        step_bce(scores, index),
        implicit_prm(scores, other, index > 0),
    ]
    for losses in every:
        assert losses.dtype == torch.float32
        assert losses.isfinite().all()
        (gradient,) = torch.autograd.grad(losses.sum(), scores, retain_graph=True)
        assert gradient.isfinite().all()
    # Squares: the value is in float32, and the gradient that of a float32 model's score.
    for losses in (bradley_terry(scores.float(), other, center=0.01), regression(scores.float(), other)):
        assert losses.isfinite().all()
        assert torch.autograd.grad(losses.sum(), scores, retain_graph=True)[0].isfinite().all()


SMALL = CHOSEN[:6].clone().requires_grad_()
OTHER = REJECTED[:6].clone().requires_grad_()


@pytest.mark.parametrize(
    "loss",
    [
        lambda a, b: bradley_terry(a, b, MARGIN[:6], 0.01, label_smoothing=0.1),
        lambda a, b: plackett_luce(torch.cat([a, b]), torch.tensor([0, 1, 1, 2, 0, 3] * 2), torch.arange(12) // 6, 2),
        lambda a, b: ordinal(a, torch.tensor([0, 1, 2, 0, 1, 2]), torch.cat([b[:1], b[:1] + 1.0])),
        lambda a, b: process_values(a, b, torch.tensor([0, 0, 1, 1, 1, 2]), beta=0.3),
    ],
)
def test_gradients_are_those_of_finite_differences(loss: object) -> None:
    assert torch.autograd.gradcheck(loss, (SMALL, OTHER))  # type: ignore[arg-type]


def test_every_entry_of_the_registry_says_what_it_is() -> None:
    for name, spec in REWARD_LOSSES.items():
        assert spec.fn.__name__ == name
        assert spec.fn.__doc__
        assert spec.formula
        assert spec.source


def test_F5_permuting_rows_permutes_losses_and_shapes_that_would_broadcast_raise() -> None:
    order = torch.randperm(12, generator=GENERATOR)
    permuted = bradley_terry(CHOSEN[order], REJECTED[order], MARGIN[order], 0.01)
    torch.testing.assert_close(permuted, bradley_terry(CHOSEN, REJECTED, MARGIN, 0.01)[order])
    with pytest.raises(ValueError, match=r"must all be \[B\], got \[12\], \[12\] and \[12, 1\]"):
        bradley_terry(CHOSEN, REJECTED, MARGIN[:, None])


def broken_calls() -> list[tuple[object, str]]:
    def index(*values: int) -> Tensor:
        return torch.tensor(values)

    return [
        (lambda: bradley_terry(CHOSEN, REJECTED, center=-1.0), "`center` must not be negative, got -1.0"),
        (lambda: bradley_terry(CHOSEN, REJECTED, label_smoothing=0.5), r"`label_smoothing` must be in \[0, 0.5\), got 0.5"),
        (lambda: plackett_luce(CHOSEN, index(0), index(0), 1), r"the flat layout; got \[12\], \[1\] and \[1\]"),
        (lambda: plackett_luce(CHOSEN[:1], index(0), index(0), 1, top_k=0), "`top_k` must be at least 1, got 0"),
        (lambda: ordinal(CHOSEN[:1], index(0), torch.zeros(())), r"`thresholds` must be \[L - 1\], ascending, got \[\]"),
        (lambda: regression(CHOSEN, MARGIN[:, None]), r"must be flat and alike, got \[12\] and \[12, 1\]"),
    ]


@pytest.mark.parametrize(("call", "message"), broken_calls())
def test_mistakes_raise(call: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()  # type: ignore[operator]
