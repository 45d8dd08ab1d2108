import pytest
import torch
from torch import Tensor

from lightning_pref.functional import log_collision, segment_sum, token_logps
from lightning_pref.losses import PairLogps, ScoredTokens, length_decoupled_sums, preference_loss, wpo_weights

LENGTHS = torch.tensor([4, 2, 3, 3])
RESPONSE = torch.tensor([0, 0, 0, 0, 1, 1, 2, 2, 2, 3, 3, 3])
LOGPS = -torch.arange(1.0, 13.0) / 7
TOKENS = ScoredTokens(LOGPS, RESPONSE, LENGTHS)
CHOSEN, REJECTED = torch.tensor([0, 1, 2]), torch.tensor([1, 0, 3])


def ld_one_by_one(logps: Tensor, own: int, partner: int, alpha: float) -> float:
    mine = logps[own == RESPONSE].tolist()
    shared = min(len(mine), int(LENGTHS[partner]))
    return sum(mine[:shared]) + alpha * sum(mine[shared:])


@pytest.mark.parametrize("alpha", [0.0, 0.4, 1.0])
def test_F2_length_decoupled_sums_match_the_loop_over_tokens(alpha: float) -> None:
    chosen, rejected = length_decoupled_sums(TOKENS, CHOSEN, REJECTED, alpha=alpha)
    pairs = list(zip(CHOSEN.tolist(), REJECTED.tolist(), strict=True))
    torch.testing.assert_close(chosen, torch.tensor([ld_one_by_one(LOGPS, c, r, alpha) for c, r in pairs]))
    torch.testing.assert_close(rejected, torch.tensor([ld_one_by_one(LOGPS, r, c, alpha) for c, r in pairs]))


def test_length_decoupling_with_alpha_one_is_dpo() -> None:
    chosen, rejected = length_decoupled_sums(TOKENS, CHOSEN, REJECTED, alpha=1.0)
    sums = segment_sum(LOGPS, RESPONSE, 4)
    zeros = torch.zeros(3)
    plain = preference_loss("sigmoid", PairLogps(sums[CHOSEN], sums[REJECTED], zeros, zeros))
    torch.testing.assert_close(preference_loss("sigmoid", PairLogps(chosen, rejected, zeros, zeros)), plain)


def test_F2_length_decoupling_of_both_models_keeps_the_margin_zero_at_init() -> None:
    chosen, rejected = length_decoupled_sums(TOKENS, CHOSEN, REJECTED, alpha=0.3)
    both = preference_loss("sigmoid", PairLogps(chosen, rejected, chosen, rejected))
    torch.testing.assert_close(both, torch.full((3,), 0.6931472))
    sums = segment_sum(LOGPS, RESPONSE, 4)
    policy_only = preference_loss("sigmoid", PairLogps(chosen, rejected, sums[CHOSEN], sums[REJECTED]))
    assert not torch.allclose(policy_only, both)


def test_length_decoupled_gradient_is_the_weight_of_each_token() -> None:
    logps = LOGPS.clone().requires_grad_()
    chosen, _ = length_decoupled_sums(ScoredTokens(logps, RESPONSE, LENGTHS), CHOSEN[:1], REJECTED[:1], alpha=0.3)
    chosen.sum().backward()
    torch.testing.assert_close(logps.grad, torch.tensor([1, 1, 0.3, 0.3] + [0.0] * 8))


@pytest.mark.parametrize("alpha", [-0.1, 1.1])
def test_length_decoupling_outside_zero_and_one_raises(alpha: float) -> None:
    with pytest.raises(ValueError, match=r"`alpha` must be in \[0, 1\], got"):
        length_decoupled_sums(TOKENS, CHOSEN, REJECTED, alpha=alpha)


def test_wpo_weight_is_the_geometric_mean_of_the_aligned_probabilities() -> None:
    collision = -torch.rand(12, generator=torch.Generator().manual_seed(0))
    expected = [((LOGPS - collision)[r == RESPONSE]).exp().prod() ** (1 / int(LENGTHS[r])) for r in range(4)]
    torch.testing.assert_close(wpo_weights(TOKENS, collision), torch.stack(expected))


def test_wpo_weight_of_a_one_hot_policy_is_one() -> None:
    logits = torch.full((12, 5), -1e4)
    labels = torch.arange(12) % 5
    logits[torch.arange(12), labels] = 0.0
    weights = wpo_weights(ScoredTokens(token_logps(logits, labels), RESPONSE, LENGTHS), log_collision(logits))
    torch.testing.assert_close(weights, torch.ones(4))


def test_wpo_weights_carry_no_gradient() -> None:
    logps = LOGPS.clone().requires_grad_()
    assert not wpo_weights(ScoredTokens(logps, RESPONSE, LENGTHS), torch.zeros(12, requires_grad=True)).requires_grad
