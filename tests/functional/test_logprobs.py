import math

import pytest
import torch
from torch import Tensor

from lightning_pref.functional import (
    KLEstimator,
    capped_expm1,
    entropy,
    kl_estimate,
    log1mexp,
    log_collision,
    masked_mean,
    next_token_logps,
    token_logps,
)

# A model over three tokens that has learnt a table: row = last token, column = next token.
TABLE = torch.tensor([[0.5, 0.3, 0.2], [0.1, 0.6, 0.3], [0.25, 0.25, 0.5]])


def random_logits(*shape: int) -> Tensor:
    return 3 * torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def test_L1_each_token_is_scored_by_the_position_before_it() -> None:
    ids = torch.tensor([[0, 1, 2], [2, 2, 0]])
    logits = TABLE.log()[ids]
    by_hand = torch.tensor([[0.3, 0.3], [0.5, 0.25]])  # 0 then 1, 1 then 2; 2 then 2, 2 then 0
    torch.testing.assert_close(next_token_logps(logits, ids).exp(), by_hand)


def test_L1_the_last_positions_logits_score_nothing() -> None:
    ids, logits = torch.tensor([[0, 1, 2]]), random_logits(1, 3, 3)
    changed = logits.clone()
    changed[:, -1] += random_logits(3)
    assert torch.equal(next_token_logps(logits, ids), next_token_logps(changed, ids))


def test_token_logps_are_log_softmax_at_the_label_with_its_gradient() -> None:
    logits, labels = random_logits(4, 6, 11).requires_grad_(), torch.arange(24).view(4, 6) % 11
    ours = token_logps(logits, labels)
    oracle = logits.log_softmax(-1).gather(-1, labels[..., None])[..., 0]
    torch.testing.assert_close(ours, oracle)
    weights = random_logits(4, 6)
    (gradient,) = torch.autograd.grad((ours * weights).sum(), logits)
    (expected,) = torch.autograd.grad((oracle * weights).sum(), logits)
    torch.testing.assert_close(gradient, expected)


def test_token_logps_ignore_an_offset_of_the_logits() -> None:
    logits, labels = random_logits(5, 7), torch.arange(5)
    torch.testing.assert_close(token_logps(logits + 100, labels), token_logps(logits, labels), rtol=0, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_L4_half_precision_logits_are_reduced_in_float32(dtype: torch.dtype) -> None:
    logits, labels = random_logits(8, 5000).to(dtype), torch.arange(8)
    ours = token_logps(logits, labels)
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours, token_logps(logits.double(), labels).float(), rtol=1e-6, atol=1e-6)


def test_L10_logits_are_not_changed() -> None:
    logits = random_logits(3, 5)
    before = logits.clone()
    token_logps(logits / 0.7, torch.arange(3))
    entropy(logits)
    log_collision(logits)
    assert torch.equal(logits, before)


def test_labels_of_another_shape_raise() -> None:
    with pytest.raises(ValueError, match=r"Logits of shape \[3, 5\] need labels of shape \[3\], got \[3, 1\]"):
        token_logps(random_logits(3, 5), torch.zeros(3, 1, dtype=torch.int64))


def test_entropy_is_its_definition_and_at_most_log_v() -> None:
    logits = random_logits(6, 9)
    p = logits.softmax(-1)
    torch.testing.assert_close(entropy(logits), -(p * p.log()).sum(-1))
    torch.testing.assert_close(entropy(torch.zeros(9)), torch.tensor(math.log(9)))


def test_entropy_with_banned_tokens_is_that_of_the_rest_with_a_finite_gradient() -> None:
    logits = random_logits(4, 9)
    banned = logits.masked_fill(torch.arange(9) >= 5, -torch.inf).requires_grad_()
    values = entropy(banned)
    torch.testing.assert_close(values, entropy(logits[:, :5]))
    values.sum().backward()
    assert banned.grad is not None
    assert banned.grad.isfinite().all()


def test_L13_mean_entropy_ignores_prompts_and_padding() -> None:
    logits, mask = random_logits(2, 6, 9), torch.tensor([[False, True, True, True, False, False], [False] + [True] * 5])
    mean = masked_mean(entropy(logits), mask)
    changed = logits.masked_fill(~mask[..., None], 17.0)
    padded = torch.nn.functional.pad(changed, (0, 0, 0, 4), value=-torch.inf)
    torch.testing.assert_close(masked_mean(entropy(padded), torch.nn.functional.pad(mask, (0, 4))), mean)
    torch.testing.assert_close(entropy(logits)[mask].mean(), mean)


def test_collision_is_the_sum_of_squared_probabilities() -> None:
    logits = random_logits(6, 9)
    torch.testing.assert_close(log_collision(logits).exp(), logits.softmax(-1).square().sum(-1))


POLICY, REFERENCE = torch.tensor([0.4, 0.25, 0.2, 0.1, 0.05]).double(), torch.tensor([0.1, 0.3, 0.2, 0.25, 0.15]).double()
KL = (POLICY * (POLICY / REFERENCE).log()).sum()


@pytest.mark.parametrize("kind", ["k1", "k3"])
def test_L14_k1_and_k3_are_unbiased(kind: KLEstimator) -> None:
    torch.testing.assert_close((POLICY * kl_estimate(POLICY.log(), REFERENCE.log(), kind)).sum(), KL)


def test_L14_k2_is_close_for_close_policies_and_not_for_others() -> None:
    nearby = POLICY + 0.01 * torch.tensor([1, -1, 1, -1, 0]).double()
    small = (nearby * (nearby / POLICY).log()).sum()
    torch.testing.assert_close((nearby * kl_estimate(nearby.log(), POLICY.log(), "k2")).sum(), small, rtol=0.05, atol=0)
    assert not torch.isclose((POLICY * kl_estimate(POLICY.log(), REFERENCE.log(), "k2")).sum(), KL, rtol=0.05)


@pytest.mark.parametrize("kind", ["k2", "k3"])
def test_k2_and_k3_are_never_negative_and_zero_at_equality(kind: KLEstimator) -> None:
    differences = torch.linspace(-50, 50, 201, dtype=torch.float64)
    estimates = kl_estimate(torch.zeros(201).double(), differences, kind)
    assert (estimates >= 0).all()
    assert estimates[100] == 0.0
    assert (estimates[:100] > 0).all()
    assert (estimates[101:] > 0).all()


def sampled_gradient(kind: KLEstimator) -> tuple[Tensor, Tensor, Tensor]:
    """Expected gradient of an estimator over samples of the policy, the true gradient of the KL, and the logits."""
    logits = POLICY.log().clone().requires_grad_()
    logps = logits.log_softmax(-1)
    (estimate,) = torch.autograd.grad((POLICY * kl_estimate(logps, REFERENCE.log(), kind)).sum(), logits)
    logps = logits.log_softmax(-1)
    (true,) = torch.autograd.grad((logps.exp() * (logps - REFERENCE.log())).sum(), logits)
    return estimate, true, logits.detach()


def test_L14_gradient_of_k2_is_that_of_the_kl_and_that_of_k1_is_nothing() -> None:
    estimate, true, _ = sampled_gradient("k2")
    torch.testing.assert_close(estimate, true)
    torch.testing.assert_close(sampled_gradient("k1")[0], torch.zeros(5).double())
    assert not torch.allclose(sampled_gradient("k3")[0], true)


@pytest.mark.parametrize("kind", ["k2", "k3"])
def test_L14_a_step_on_the_estimate_alone_reduces_the_kl(kind: KLEstimator) -> None:
    gradient, _, logits = sampled_gradient(kind)
    after = (logits - 0.1 * gradient).softmax(-1)
    assert (after * (after / REFERENCE).log()).sum() < KL


def test_gradient_of_k3_is_that_of_the_reverse_divergence() -> None:
    logits = POLICY.log().clone().requires_grad_()
    (expected,) = torch.autograd.grad(-(REFERENCE * logits.log_softmax(-1)).sum(), logits)
    torch.testing.assert_close(sampled_gradient("k3")[0], expected)


@pytest.mark.parametrize("kind", ["k1", "k2", "k3"])
@pytest.mark.parametrize("difference", [1e4, -1e4, 25.0])
def test_L14_the_cap_keeps_value_and_gradient_finite_and_pointing_back(kind: KLEstimator, difference: float) -> None:
    logps = torch.tensor([-difference], requires_grad=True)
    estimate = kl_estimate(logps, torch.zeros(1), kind)
    estimate.backward()
    assert estimate.isfinite().all()
    assert logps.grad is not None
    assert logps.grad.isfinite().all()
    if kind != "k1":
        assert logps.grad.sign().item() == -math.copysign(1, difference)


def test_unknown_estimator_and_unequal_shapes_raise() -> None:
    with pytest.raises(ValueError, match="`kind` must be 'k1', 'k2' or 'k3', got 'k4'"):
        kl_estimate(torch.zeros(1), torch.zeros(1), "k4")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"differ in shape: \[2\] and \[2, 1\]"):
        kl_estimate(torch.zeros(2), torch.zeros(2, 1), "k1")


def test_capped_expm1_is_expm1_below_and_its_tangent_above_the_cap() -> None:
    x = torch.tensor([-50.0, 0.0, 1.9, 3.0, 1e4], dtype=torch.float64, requires_grad=True)
    values = capped_expm1(x, cap=2.0)
    e2 = math.exp(2.0)
    expected = [math.expm1(-50), 0.0, math.expm1(1.9), e2 * (1 + 3 - 2) - 1, e2 * (1 + 1e4 - 2) - 1]
    torch.testing.assert_close(values, torch.tensor(expected, dtype=torch.float64))
    values.sum().backward()
    torch.testing.assert_close(x.grad, torch.tensor([math.exp(-50), 1.0, math.exp(1.9), e2, e2], dtype=torch.float64))


def test_log1mexp_keeps_its_digits_and_a_finite_gradient_from_tiny_to_certain() -> None:
    logps = [-1e-8, -1e-3, -0.5, -math.log(2), -0.7, -5.0, -80.0, -1e4]
    x = torch.tensor(logps, requires_grad=True)
    exact = torch.tensor([math.log(-math.expm1(p)) if p > -30 else -math.exp(p) for p in logps])
    values = log1mexp(x)
    torch.testing.assert_close(values, exact, rtol=1e-6, atol=1e-37)
    values.sum().backward()
    assert x.grad is not None
    assert x.grad.isfinite().all()
