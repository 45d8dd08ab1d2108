import math

import pytest
import torch

from lightning_pref.losses import npo, simnpo

LOGPS = torch.tensor([-30.0, -12.0, -4.0, -55.0], dtype=torch.float64)
REF_LOGPS = torch.tensor([-28.0, -14.0, -4.0, -40.0], dtype=torch.float64)
LENGTHS = torch.tensor([10, 5, 2, 20])


def ascent_weight(logps: torch.Tensor, ref_logps: torch.Tensor, beta: float) -> torch.Tensor:
    """Derivative of NPO by the log-prob: what gradient ascent would multiply by one."""
    leaf = logps.clone().requires_grad_()
    npo(leaf, ref_logps, beta=beta).sum().backward()
    assert leaf.grad is not None
    return leaf.grad


def test_F1_npo_matches_its_formula() -> None:
    expected = 2 / 0.3 * torch.log1p((LOGPS.exp() / REF_LOGPS.exp()) ** 0.3)
    torch.testing.assert_close(npo(LOGPS, REF_LOGPS, beta=0.3), expected)


def test_npo_at_the_reference_is_two_log_two_over_beta() -> None:
    torch.testing.assert_close(npo(LOGPS, LOGPS, beta=0.1), torch.full_like(LOGPS, 2 / 0.1 * math.log(2)))


def test_npo_weight_is_the_adaptive_weight_of_the_paper() -> None:
    policy, reference = (0.3 * LOGPS).exp(), (0.3 * REF_LOGPS).exp()
    torch.testing.assert_close(ascent_weight(LOGPS, REF_LOGPS, 0.3), 2 * policy / (policy + reference))


def test_npo_with_vanishing_beta_is_gradient_ascent() -> None:
    torch.testing.assert_close(ascent_weight(LOGPS, REF_LOGPS, 1e-4), torch.ones_like(LOGPS), rtol=0, atol=1e-3)


def test_F8_npo_is_bounded_and_its_gradient_vanishes_as_the_response_is_forgotten() -> None:
    forgotten = torch.tensor([-1e2, -1e3, -1e4])
    zeros = torch.zeros(3)
    losses, weights = npo(forgotten, zeros, beta=0.1), ascent_weight(forgotten, zeros, 0.1)
    assert ((losses >= 0) & (losses < 1e-3)).all()
    assert (weights < 1e-4).all()
    assert weights[-1] == 0.0


def test_F8_simnpo_is_bounded_and_its_gradient_vanishes_as_the_response_is_forgotten() -> None:
    forgotten = torch.tensor([-1e2, -1e3, -1e4], requires_grad=True)
    losses = simnpo(forgotten, torch.tensor([10, 10, 10]))
    losses.sum().backward()
    assert ((losses >= 0) & (losses < 1e-3)).all()
    assert forgotten.grad is not None
    assert forgotten.grad[-1] == 0.0


def test_F1_simnpo_matches_its_formula() -> None:
    nll = -LOGPS / LENGTHS
    expected = -2 / 1.5 * torch.log(torch.sigmoid(1.5 * (nll - 0.2)))
    torch.testing.assert_close(simnpo(LOGPS, LENGTHS, beta=1.5, gamma=0.2), expected)


def test_simnpo_of_a_response_said_twice_is_that_of_the_response() -> None:
    torch.testing.assert_close(simnpo(2 * LOGPS, 2 * LENGTHS), simnpo(LOGPS, LENGTHS))


def test_F5_forget_losses_never_broadcast() -> None:
    with pytest.raises(ValueError, match=r"both \[N\]; got \[4, 1\], \[4\]"):
        npo(LOGPS[:, None], REF_LOGPS)
    with pytest.raises(ValueError, match=r"both \[N\]; got \[4\], \[4, 1\]"):
        simnpo(LOGPS, LENGTHS[:, None])
