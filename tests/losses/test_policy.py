import itertools
import math

import numpy as np
import pytest
import torch
from torch import Tensor

from lightning_pref.functional import aggregate, kl_estimate, segment_sum
from lightning_pref.functional.advantages import grpo_advantages, rloo_advantages
from lightning_pref.functional.logprobs import KLEstimator
from lightning_pref.functional.masked import Aggregation
from lightning_pref.functional.moments import moment_sums
from lightning_pref.losses.policy import (
    aggregation_weights,
    cispo,
    kl_loss,
    log_ratios,
    negative_entropy,
    ppo_clip,
    probability_ratio,
    reinforce,
    sequence_log_ratios,
    value_loss,
)
from lightning_pref.measures.policy_update import explained_variance, is_clipped, is_value_clipped

GENERATOR = torch.Generator().manual_seed(0)
OLD = -3 * torch.rand(40, generator=GENERATOR, dtype=torch.float64)
NEW = OLD + 0.5 * torch.randn(40, generator=GENERATOR, dtype=torch.float64)
ADVANTAGES = torch.randn(40, generator=GENERATOR, dtype=torch.float64)
LENGTHS = torch.tensor([7, 1, 0, 20, 12])
RESPONSE = torch.arange(5).repeat_interleave(LENGTHS)

# Five tokens: what the policy and the reference make of them, and the policy that sampled.
POLICY = torch.tensor([0.5, 0.2, 0.15, 0.1, 0.05], dtype=torch.float64)
REFERENCE = torch.tensor([0.1, 0.3, 0.2, 0.25, 0.15], dtype=torch.float64)
SAMPLER = torch.tensor([0.3, 0.3, 0.1, 0.2, 0.1], dtype=torch.float64)
KL = (POLICY * (POLICY / REFERENCE).log()).sum()


def reference_ppo(ratio: float, advantage: float, low: float, high: float, dual: float | None) -> float:
    clipped = min(max(ratio, 1 - low), 1 + high)
    objective = min(ratio * advantage, clipped * advantage)
    if dual is not None and advantage < 0:
        objective = max(objective, dual * advantage)
    return -objective


@pytest.mark.parametrize(("low", "high"), [(0.2, 0.2), (0.2, 0.28), (0.05, 0.6)])
@pytest.mark.parametrize("dual", [None, 1.5])
def test_F1_the_clipped_surrogate_is_the_papers_token_by_token(low: float, high: float, dual: float | None) -> None:
    losses = ppo_clip(log_ratios(NEW, OLD), ADVANTAGES, clip_low=low, clip_high=high, dual_clip=dual)
    ratios = np.exp(NEW.numpy() - OLD.numpy())
    expected = [reference_ppo(r, a, low, high, dual) for r, a in zip(ratios, ADVANTAGES.tolist(), strict=True)]
    np.testing.assert_allclose(losses.numpy(), expected, rtol=1e-12)


@pytest.mark.parametrize("is_sequence_level", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_L12_at_the_first_inner_step_the_ratio_is_one_and_the_gradient_that_of_reinforce(
    dtype: torch.dtype, is_sequence_level: bool
) -> None:
    logps = OLD.to(dtype, copy=True).requires_grad_()
    log_ratio = log_ratios(logps, logps.detach())
    if is_sequence_level:
        log_ratio = sequence_log_ratios(log_ratio, RESPONSE, LENGTHS)
    assert (probability_ratio(log_ratio) == 1).all()
    # One advantage per response, as in GRPO: then the mean of the tokens' gradients is the sequence's.
    advantages = ADVANTAGES[:5][RESPONSE].to(log_ratio.dtype)
    assert not is_clipped(log_ratio, advantages).any()
    weights = aggregation_weights(RESPONSE, LENGTHS, "sequence_mean").to(log_ratio.dtype)
    for losses in (ppo_clip(log_ratio, advantages), ppo_clip(log_ratio, advantages, dual_clip=3.0)):
        (ours,) = torch.autograd.grad((weights * losses).sum(), logps, retain_graph=True)
        (expected,) = torch.autograd.grad((weights * reinforce(logps, advantages)).sum(), logps)
        torch.testing.assert_close(ours, expected)
    loss = (weights * ppo_clip(log_ratio, advantages)).sum()
    torch.testing.assert_close(loss, -(weights * advantages).sum())


def test_L12_cispo_on_fresh_samples_is_reinforce() -> None:
    torch.testing.assert_close(cispo(OLD, log_ratios(OLD, OLD), ADVANTAGES), reinforce(OLD, ADVANTAGES))


def test_clipping_stops_the_gradient_only_of_tokens_that_moved_where_their_advantage_wanted_them() -> None:
    new = NEW.clone().requires_grad_()
    log_ratio = log_ratios(new, OLD)
    ppo_clip(log_ratio, ADVANTAGES, clip_low=0.1, clip_high=0.3).sum().backward()
    stopped = is_clipped(log_ratio.detach(), ADVANTAGES, clip_low=0.1, clip_high=0.3)
    assert new.grad is not None
    assert torch.equal(new.grad == 0, stopped)
    assert 0 < stopped.sum() < 40


def test_cispo_never_drops_a_token() -> None:
    new = NEW.clone().requires_grad_()
    cispo(new, log_ratios(new, OLD), ADVANTAGES, max_weight=1.3).sum().backward()
    expected = -(NEW - OLD).exp().clamp(max=1.3) * ADVANTAGES
    torch.testing.assert_close(new.grad, expected)
    assert (expected != 0).all()


def test_dual_clip_bounds_the_loss_of_a_negative_advantage_and_leaves_others_alone() -> None:
    log_ratio = torch.tensor([10.0, 2.0, 0.5, 10.0]).log()
    advantages = torch.tensor([-1.0, -1.0, -1.0, 1.0])
    assert ppo_clip(log_ratio, advantages, dual_clip=3.0).tolist() == pytest.approx([3.0, 2.0, 0.8, -1.2])


@pytest.mark.parametrize("how", ["mean", "sum"])
def test_sequence_ratio_is_that_of_the_whole_response(how: str) -> None:
    found = sequence_log_ratios(NEW - OLD, RESPONSE, LENGTHS, how=how)  # type: ignore[arg-type]
    for r in range(5):
        own = (NEW - OLD)[r == RESPONSE].numpy()
        if len(own):
            np.testing.assert_allclose(found[r == RESPONSE].numpy(), own.mean() if how == "mean" else own.sum(), rtol=1e-9)


def test_gradient_of_a_sequence_ratio_reaches_all_its_tokens_alike() -> None:
    """GSPO, eq. 10: the gradient of s * A is s * A times the mean of the tokens' gradients."""
    new = NEW.clone().requires_grad_()
    log_ratio = sequence_log_ratios(log_ratios(new, OLD), RESPONSE, LENGTHS)
    weights = aggregation_weights(RESPONSE, LENGTHS, "sequence_mean").double()
    (weights * ppo_clip(log_ratio, torch.full_like(NEW, 2.0), clip_high=1e3)).sum().backward()
    expected = -2.0 * log_ratio.detach().exp() / LENGTHS[RESPONSE]
    torch.testing.assert_close(new.grad, expected)


def reference_value(value: float, target: float, old: float, clip: float) -> float:
    clipped = min(max(value, old - clip), old + clip)
    return 0.5 * max((value - target) ** 2, (clipped - target) ** 2)


def test_P6_value_clipping_is_symmetrical() -> None:
    generator = torch.Generator().manual_seed(1)
    values, returns, old = torch.randn(3, 60, generator=generator, dtype=torch.float64)
    losses = value_loss(values, returns, old, clip=0.3)
    expected = [reference_value(*row, 0.3) for row in zip(values.tolist(), returns.tolist(), old.tolist(), strict=True)]
    np.testing.assert_allclose(losses.numpy(), expected, rtol=1e-12)
    # Everything mirrored at 0, and mirrored at the old value.
    torch.testing.assert_close(value_loss(-values, -returns, -old, clip=0.3), losses)
    torch.testing.assert_close(value_loss(2 * old - values, 2 * old - returns, old, clip=0.3), losses)


def test_P6_a_value_stops_at_the_clip_on_its_way_to_the_return_from_both_sides_but_never_on_its_way_off() -> None:
    old, returns = torch.zeros(4), torch.tensor([1.0, -1.0, 1.0, -1.0])
    values = torch.tensor([0.5, -0.5, -0.5, 0.5], requires_grad=True)
    value_loss(values, returns, old, clip=0.2).sum().backward()
    assert values.grad is not None
    assert values.grad.tolist() == [0.0, 0.0, -1.5, 1.5]
    assert is_value_clipped(values.detach(), old, clip=0.2).all()


def test_an_unclipped_value_loss_is_half_the_squared_error_and_inside_the_clip_they_agree() -> None:
    values, returns = torch.tensor([1.0, 2.0], requires_grad=True), torch.tensor([3.0, 2.5])
    plain, clipped = value_loss(values, returns), value_loss(values, returns, values.detach(), clip=0.2)
    assert plain.tolist() == [2.0, 0.125]
    torch.testing.assert_close(plain, clipped)
    gradients = [torch.autograd.grad(loss.sum(), values)[0] for loss in (plain, clipped)]
    torch.testing.assert_close(*gradients)


def expected_gradient(loss_of: object, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Value and gradient in the logits of a token loss, expected over tokens drawn with `weights`."""
    logits = POLICY.log().clone().requires_grad_()
    value = (weights * loss_of(logits.log_softmax(-1))).sum()  # type: ignore[operator]
    return value.detach(), torch.autograd.grad(value, logits)[0]


def true_gradient() -> Tensor:
    logits = POLICY.log().clone().requires_grad_()
    logps = logits.log_softmax(-1)
    return torch.autograd.grad((logps.exp() * (logps - REFERENCE.log())).sum(), logits)[0]


@pytest.mark.parametrize("value", ["k1", "k2", "k3"])
def test_L14_kl_loss_has_the_value_of_its_estimator_and_the_gradient_of_the_kl(value: KLEstimator) -> None:
    found, gradient = expected_gradient(lambda logps: kl_loss(logps, REFERENCE.log(), value=value), POLICY)
    torch.testing.assert_close(gradient, true_gradient())
    torch.testing.assert_close(found, (POLICY * kl_estimate(POLICY.log(), REFERENCE.log(), value)).sum())
    if value != "k2":  # the two unbiased ones
        torch.testing.assert_close(found, KL)


@pytest.mark.parametrize("value", ["k1", "k2", "k3"])
def test_L14_steps_on_the_kl_loss_alone_lead_to_the_reference(value: KLEstimator) -> None:
    logits, kls = POLICY.log().clone(), [KL.item()]
    for _ in range(200):
        logits.requires_grad_()
        logps = logits.log_softmax(-1)
        loss = (logps.detach().exp() * kl_loss(logps, REFERENCE.log(), value=value)).sum()
        logits = (logits - torch.autograd.grad(loss, logits)[0]).detach()
        kls.append((logits.softmax(-1) * (logits.log_softmax(-1) - REFERENCE.log())).sum().item())
    # Once there, rounding moves it by some 1e-17 either way.
    assert all(after <= before + 1e-15 for before, after in itertools.pairwise(kls))
    assert kls[-1] < 1e-6


@pytest.mark.parametrize("value", ["k1", "k3"])
def test_L14_off_policy_the_ratio_makes_value_and_gradient_those_of_the_kl_again(value: KLEstimator) -> None:
    def corrected(logps: Tensor) -> Tensor:
        ratio = probability_ratio(log_ratios(logps, SAMPLER.log())).detach()
        return ratio * kl_loss(logps, REFERENCE.log(), value=value)

    found, gradient = expected_gradient(corrected, SAMPLER)
    torch.testing.assert_close(found, KL)
    torch.testing.assert_close(gradient, true_gradient())


def test_L14_the_own_gradient_of_k3_is_that_of_the_other_divergence_and_that_of_k1_is_refused() -> None:
    own = expected_gradient(lambda logps: kl_loss(logps, REFERENCE.log(), gradient="own"), POLICY)[1]
    torch.testing.assert_close(own, POLICY - REFERENCE)
    with pytest.raises(ValueError, match="The gradient of 'k1' is zero on average: use `gradient='kl'`"):
        kl_loss(OLD, NEW, value="k1", gradient="own")


def test_L14_k1_in_the_reward_has_the_policy_gradient_of_the_kl() -> None:
    reward = -kl_estimate(POLICY.log(), REFERENCE.log(), "k1")
    gradient = expected_gradient(lambda logps: reinforce(logps, reward), POLICY)[1]
    torch.testing.assert_close(gradient, true_gradient())


def test_sampled_entropy_has_the_value_and_the_gradient_of_the_exact_one() -> None:
    logits = POLICY.log().clone().requires_grad_()
    logps = logits.log_softmax(-1)
    exact = (logps.exp() * logps).sum()
    found, gradient = expected_gradient(negative_entropy, POLICY)
    torch.testing.assert_close(found, exact.detach())
    torch.testing.assert_close(gradient, torch.autograd.grad(exact, logits)[0])


@pytest.mark.parametrize("how", ["token_mean", "sequence_mean", "sequence_sum"])
def test_N1_flat_weights_over_the_global_count_are_the_padded_aggregate_however_the_batch_is_cut(how: Aggregation) -> None:
    lengths = torch.tensor([7, 1, 3, 20, 9])
    response = torch.arange(5).repeat_interleave(lengths)
    mask = torch.arange(20) < lengths.unsqueeze(1)
    losses = ADVANTAGES
    whole = aggregate(torch.zeros(5, 20, dtype=torch.float64).masked_scatter(mask, losses), mask, how)
    count = len(losses) if how == "token_mean" else len(lengths)
    total = torch.zeros((), dtype=torch.float64)
    for first, last in ((0, 2), (2, 5)):
        part = (response >= first) & (response < last)
        weights = aggregation_weights(response[part] - first, lengths[first:last], how)
        total += (weights * losses[part]).sum() / count
    torch.testing.assert_close(total, whole)


def test_dr_grpo_divides_the_sum_of_a_response_by_a_constant() -> None:
    weights = aggregation_weights(RESPONSE, LENGTHS, "sequence_sum", max_length=20)
    torch.testing.assert_close(segment_sum(weights, RESPONSE, 5), LENGTHS / 20)


def test_explained_variance_is_one_for_a_perfect_and_zero_for_a_constant_value_function() -> None:
    returns = moment_sums(ADVANTAGES)
    assert explained_variance(moment_sums(torch.zeros(40)), returns).item() == 1.0
    assert explained_variance(moment_sums(ADVANTAGES - 3.0), returns).item() == pytest.approx(0.0, abs=1e-12)
    expected = 1 - np.var((ADVANTAGES - NEW).numpy()) / np.var(ADVANTAGES.numpy())
    assert explained_variance(moment_sums(ADVANTAGES - NEW), returns).item() == pytest.approx(expected)
    assert explained_variance(returns, moment_sums(torch.ones(3))).isnan()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("change", [1e4, -1e4])
@pytest.mark.parametrize("advantage", [1.0, -1.0, 1e4])
def test_F3_losses_and_gradients_are_finite_at_extreme_ratios(dtype: torch.dtype, change: float, advantage: float) -> None:
    logps = torch.tensor([change, 0.0], dtype=dtype, requires_grad=True)
    other, advantages = torch.zeros(2, dtype=dtype), torch.full((2,), advantage, dtype=dtype)
    log_ratio = log_ratios(logps, other)
    every = [
        ppo_clip(log_ratio, advantages),
        ppo_clip(log_ratio, advantages, dual_clip=3.0),
        cispo(logps, log_ratio, advantages),
        reinforce(logps, advantages),
        value_loss(logps, advantages, other, clip=0.2),
        kl_loss(logps, other),
        kl_loss(logps, other, gradient="own"),
        negative_entropy(logps),
    ]
    for losses in every:
        assert losses.dtype == torch.float32
        assert losses.isfinite().all()
        (gradient,) = torch.autograd.grad(losses.sum(), logps, retain_graph=True)
        # float16 itself ends at 65504: a gradient beyond it is the precision's, and what its loss scaler skips.
        assert gradient.isfinite().all() or dtype == torch.float16
        assert not gradient.isnan().any()


def test_L14_a_token_that_ran_away_keeps_the_gradient_that_brings_it_back() -> None:
    logps = torch.tensor([30.0], requires_grad=True)
    ppo_clip(log_ratios(logps, torch.zeros(1)), torch.tensor([-1.0])).backward()
    assert logps.grad is not None
    assert logps.grad.item() == pytest.approx(math.exp(20), rel=1e-6)


@pytest.mark.parametrize(
    "loss",
    [
        lambda new: ppo_clip(log_ratios(new, OLD[:6]), ADVANTAGES[:6], clip_low=0.1, dual_clip=3.0),
        lambda new: ppo_clip(sequence_log_ratios(log_ratios(new, OLD[:6]), RESPONSE[:6], LENGTHS), ADVANTAGES[:6]),
        lambda new: value_loss(new, ADVANTAGES[:6], OLD[:6], clip=0.2),
        lambda new: kl_loss(new, OLD[:6], gradient="own"),
    ],
)
def test_gradients_are_those_of_finite_differences(loss: object) -> None:
    assert torch.autograd.gradcheck(loss, (NEW[:6].clone().requires_grad_(),))  # type: ignore[arg-type]


def test_F5_shapes_that_would_broadcast_and_settings_that_cannot_work_raise() -> None:
    with pytest.raises(ValueError, match=r"Log-probabilities differ in shape: \[40\] and \[40, 1\]"):
        log_ratios(NEW, OLD[:, None])
    with pytest.raises(ValueError, match=r"have the shape \[40\], got \[40, 1\]"):
        ppo_clip(NEW, ADVANTAGES[:, None])
    with pytest.raises(ValueError, match=r"`clip_low` must be in \(0, 1\] and `clip_high` positive, got 1.5 and 0.2"):
        ppo_clip(NEW, ADVANTAGES, clip_low=1.5)
    with pytest.raises(ValueError, match="`dual_clip` must be above 1, got 1.0"):
        ppo_clip(NEW, ADVANTAGES, dual_clip=1.0)
    with pytest.raises(ValueError, match="`max_weight` must be at least 1, the weight of a fresh sample; got 0.5"):
        cispo(NEW, NEW - OLD, ADVANTAGES, max_weight=0.5)
    with pytest.raises(ValueError, match="`how` must be 'mean' or 'sum', got 'max'"):
        sequence_log_ratios(NEW, RESPONSE, LENGTHS, how="max")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="`clip` must be positive, got 0.0; `None` is no clipping"):
        value_loss(NEW, OLD, OLD, clip=0.0)
    with pytest.raises(ValueError, match="`clip` needs `old_values`"):
        value_loss(NEW, OLD, clip=0.2)
    with pytest.raises(ValueError, match="`gradient` must be 'kl' or 'own', got 'k2'"):
        kl_loss(NEW, OLD, gradient="k2")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="`max_length` divides 'sequence_sum' and must be positive, got 5 with 'token_mean'"):
        aggregation_weights(RESPONSE, LENGTHS, "token_mean", max_length=5)
    with pytest.raises(ValueError, match="`how` must be 'token_mean', 'sequence_mean' or 'sequence_sum', got 'mean'"):
        aggregation_weights(RESPONSE, LENGTHS, "mean")  # type: ignore[arg-type]


def test_only_the_policy_and_the_values_get_a_gradient() -> None:
    new, constant = NEW.clone().requires_grad_(), OLD.clone().requires_grad_()
    every = {
        "ratio": log_ratios(new, constant),
        "advantages": ppo_clip(log_ratios(new, OLD), constant),
        "reinforce": reinforce(new, constant),
        "returns": value_loss(new, constant, OLD, clip=0.2),
        "old values": value_loss(new, OLD, constant, clip=0.2),
        "reference": kl_loss(new, constant),
        "reference of k3": kl_loss(new, constant, gradient="own"),
    }
    for name, losses in every.items():
        policy, given = torch.autograd.grad(losses.sum(), (new, constant), allow_unused=True)
        assert given is None, name
        assert policy is not None, name


@pytest.mark.parametrize(("estimator", "factor"), [("rloo", 1.0), ("grpo", 2 / 3)])
def test_advantages_of_a_group_give_the_policy_gradient_on_average(estimator: str, factor: float) -> None:
    """All 125 groups of three samples out of five tokens, each with its probability, against the gradient of E[r].

    Leaving the sample itself out of its baseline is unbiased; the mean of the whole group shrinks the gradient by 1 - 1/n.
    """
    rewards = torch.tensor([0.0, 3.0, 1.0, -2.0, 5.0], dtype=torch.float64)
    logits = POLICY.log().clone().requires_grad_()
    logps = logits.log_softmax(-1)
    (true,) = torch.autograd.grad(-(logps.exp() * rewards).sum(), logits, retain_graph=True)
    groups = torch.tensor(list(itertools.product(range(5), repeat=3)))
    sampled = rewards[groups]
    advantages = rloo_advantages(sampled) if estimator == "rloo" else grpo_advantages(sampled, scale="none")
    losses = reinforce(logps[groups], advantages).mean(1)
    (found,) = torch.autograd.grad((POLICY[groups].prod(1) * losses).sum(), logits)
    torch.testing.assert_close(found, factor * true)
