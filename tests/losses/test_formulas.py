"""Every pairwise loss against its formula written a second time, in NumPy, with its gradient twice over.

`ORACLES` has a row for each entry of the registry: the loss, options that are not the defaults, and d_c, d_r where the
formula has a short derivative (else finite differences alone judge the gradient).
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from lightning_pref.losses import PREFERENCE_LOSSES, PairLogps, preference_loss, sensitivities

Array = NDArray[np.float64]


class X(NamedTuple):
    """The pair in the symbols of the table: sums, reference sums, lengths."""

    S_c: Array
    S_r: Array
    R_c: Array
    R_r: Array
    n_c: Array
    n_r: Array

    @property
    def h_c(self) -> Array:
        return self.S_c - self.R_c

    @property
    def h_r(self) -> Array:
        return self.S_r - self.R_r

    @property
    def z(self) -> Array:
        return self.h_c - self.h_r

    @property
    def s_c(self) -> Array:
        return self.S_c / self.n_c

    @property
    def s_r(self) -> Array:
        return self.S_r / self.n_r


class Oracle(NamedTuple):
    loss: Callable[[X], Array]
    options: dict[str, float | bool | str]
    d_c: Callable[[X], Array] | None = None
    d_r: Callable[[X], Array] | None = None


def sig(u: Array) -> Array:
    return 1 / (1 + np.exp(-u))


def sp(u: Array) -> Array:
    return np.logaddexp(0.0, u)


def dsig(u: Array) -> Array:
    return sig(u) * sig(-u)


def log_odds(s: Array) -> Array:
    return s - np.log(1 - np.exp(s))


def orpo_argument(x: X) -> Array:
    return log_odds(x.s_c) - log_odds(x.s_r)


def exo(x: X, b: float, eps: float) -> Array:
    q = sig(b * x.z)
    return q * np.log(q / (1 - eps)) + (1 - q) * np.log((1 - q) / eps)


def exo_slope(x: X, b: float, eps: float) -> Array:
    q = sig(b * x.z)
    return b * q * (1 - q) * (np.log((1 - eps) / eps) - b * x.z)


def discopop(x: X, b: float, tau: float) -> Array:
    u = b * x.z
    m = sig(u / tau)
    return (1 - m) * sp(-u) + m * np.exp(-u)


def smooth(u: Array, eps: float) -> Array:
    return (1 - eps) * sp(-u) + eps * sp(u)


def inpo_argument(x: X, eta: float, tau: float) -> Array:
    previous = PREVIOUS_CHOSEN - PREVIOUS_REJECTED
    return (x.S_c - x.S_r) - tau / eta * (x.R_c - x.R_r) - (eta - tau) / eta * previous - 1 / (2 * eta)


def rho(s: Array, a: float) -> Array:
    return (1 - np.exp(-a * s)) / a


def alphapo_argument(x: X) -> Array:
    return 1.7 * (rho(x.s_c, 0.4) - rho(x.s_r, 0.4)) - 0.3


def dpop_argument(x: X) -> Array:
    return 0.2 * (x.z - 3.0 * np.maximum(0, x.R_c - x.S_c))


def nca_loss(x: X, b: float) -> Array:
    return sp(-b * x.h_c) + 0.5 * sp(b * x.h_c) + 0.5 * sp(b * x.h_r)


PREVIOUS_CHOSEN, PREVIOUS_REJECTED = np.array([-11.0, -4.0, -7.0, -9.0]), np.array([-10.0, -6.0, -5.0, -12.0])

ORACLES: dict[str, Oracle] = {
    "sigmoid": Oracle(lambda x: sp(-0.3 * x.z), {"beta": 0.3}, lambda x: 0.3 * sig(-0.3 * x.z), lambda x: 0.3 * sig(-0.3 * x.z)),
    "cdpo": Oracle(
        lambda x: smooth(0.3 * x.z, 0.2),
        {"beta": 0.3, "label_smoothing": 0.2},
        lambda x: 0.3 * (0.8 - sig(0.3 * x.z)),
        lambda x: 0.3 * (0.8 - sig(0.3 * x.z)),
    ),
    "robust": Oracle(
        lambda x: (0.8 * sp(-0.3 * x.z) - 0.2 * sp(0.3 * x.z)) / 0.6,
        {"beta": 0.3, "label_smoothing": 0.2},
        lambda x: 0.3 * (0.8 * sig(-0.3 * x.z) + 0.2 * sig(0.3 * x.z)) / 0.6,
        lambda x: 0.3 * (0.8 * sig(-0.3 * x.z) + 0.2 * sig(0.3 * x.z)) / 0.6,
    ),
    "hinge": Oracle(
        lambda x: np.maximum(0, 1 - 0.3 * x.z),
        {"beta": 0.3},
        lambda x: 0.3 * (0.3 * x.z < 1),
        lambda x: 0.3 * (0.3 * x.z < 1),
    ),
    "ipo": Oracle(
        lambda x: (x.h_c / x.n_c - x.h_r / x.n_r - 1 / 0.6) ** 2,
        {"beta": 0.3},
        lambda x: 2 * (1 / 0.6 - x.h_c / x.n_c + x.h_r / x.n_r) / x.n_c,
        lambda x: 2 * (1 / 0.6 - x.h_c / x.n_c + x.h_r / x.n_r) / x.n_r,
    ),
    "exo_pair": Oracle(
        lambda x: exo(x, 0.3, 0.01),
        {"beta": 0.3, "label_smoothing": 0.01},
        lambda x: exo_slope(x, 0.3, 0.01),
        lambda x: exo_slope(x, 0.3, 0.01),
    ),
    "nca_pair": Oracle(
        lambda x: nca_loss(x, 0.3),
        {"beta": 0.3},
        lambda x: 0.3 * (1 - 1.5 * sig(0.3 * x.h_c)),
        lambda x: 0.15 * sig(0.3 * x.h_r),
    ),
    "bco_pair": Oracle(
        lambda x: sp(-(0.3 * x.h_c - 0.7)) + sp(0.3 * x.h_r - 0.7),
        {"beta": 0.3, "delta": 0.7},
        lambda x: 0.3 * sig(0.7 - 0.3 * x.h_c),
        lambda x: 0.3 * sig(0.3 * x.h_r - 0.7),
    ),
    "sppo_hard": Oracle(
        lambda x: (x.h_c - 0.4 / 0.3) ** 2 + (x.h_r + 0.4 / 0.3) ** 2,
        {"beta": 0.3, "preference": 0.9},
        lambda x: 2 * (0.4 / 0.3 - x.h_c),
        lambda x: 2 * (x.h_r + 0.4 / 0.3),
    ),
    "apo_zero": Oracle(
        lambda x: sig(-0.3 * x.h_c) + sig(0.3 * x.h_r),
        {"beta": 0.3},
        lambda x: 0.3 * dsig(0.3 * x.h_c),
        lambda x: 0.3 * dsig(0.3 * x.h_r),
    ),
    "apo_down": Oracle(
        lambda x: sig(0.3 * x.h_c) + sig(-0.3 * x.z),
        {"beta": 0.3},
        lambda x: 0.3 * (dsig(0.3 * x.z) - dsig(0.3 * x.h_c)),
        lambda x: 0.3 * dsig(0.3 * x.z),
    ),
    "aot": Oracle(
        lambda x: smooth(0.3 * (np.sort(x.S_c - x.S_r) - np.sort(x.R_c - x.R_r)), 0.2),
        {"beta": 0.3, "label_smoothing": 0.2},
    ),
    "aot_unpaired": Oracle(lambda x: smooth(0.3 * (np.sort(x.h_c) - np.sort(x.h_r)), 0.2), {"beta": 0.3, "label_smoothing": 0.2}),
    "discopop": Oracle(lambda x: discopop(x, 0.3, 0.5), {"beta": 0.3, "tau": 0.5}),
    "sigmoid_norm": Oracle(
        lambda x: sp(-2 * (x.h_c / x.n_c - x.h_r / x.n_r)),
        {"beta": 2.0},
        lambda x: 2 * sig(-2 * (x.h_c / x.n_c - x.h_r / x.n_r)) / x.n_c,
        lambda x: 2 * sig(-2 * (x.h_c / x.n_c - x.h_r / x.n_r)) / x.n_r,
    ),
    "simpo": Oracle(
        lambda x: sp(-1.5 * (x.s_c - x.s_r) + 0.4),
        {"beta": 1.5, "gamma": 0.4},
        lambda x: 1.5 * sig(0.4 - 1.5 * (x.s_c - x.s_r)) / x.n_c,
        lambda x: 1.5 * sig(0.4 - 1.5 * (x.s_c - x.s_r)) / x.n_r,
    ),
    "alphapo": Oracle(
        lambda x: sp(-alphapo_argument(x)),
        {"beta": 1.7, "gamma": 0.3, "alpha": 0.4},
        lambda x: 1.7 * np.exp(-0.4 * x.s_c) * sig(-alphapo_argument(x)) / x.n_c,
        lambda x: 1.7 * np.exp(-0.4 * x.s_r) * sig(-alphapo_argument(x)) / x.n_r,
    ),
    "orpo": Oracle(
        lambda x: -x.s_c + 0.3 * sp(-orpo_argument(x)),
        {"beta": 0.3},
        lambda x: (1 + 0.3 * sig(-orpo_argument(x)) / (1 - np.exp(x.s_c))) / x.n_c,
        lambda x: 0.3 * sig(-orpo_argument(x)) / (1 - np.exp(x.s_r)) / x.n_r,
    ),
    "cpo": Oracle(
        lambda x: sp(-0.3 * (x.S_c - x.S_r)) - 0.6 * x.S_c,
        {"beta": 0.3, "alpha": 0.6},
        lambda x: 0.3 * sig(-0.3 * (x.S_c - x.S_r)) + 0.6,
        lambda x: 0.3 * sig(-0.3 * (x.S_c - x.S_r)),
    ),
    "slic_hf": Oracle(
        lambda x: np.maximum(0, 2 - x.S_c + x.S_r) - 0.3 * x.S_c,
        {"delta": 2.0, "alpha": 0.3},
        lambda x: 1.0 * (2 - x.S_c + x.S_r > 0) + 0.3,
        lambda x: 1.0 * (2 - x.S_c + x.S_r > 0),
    ),
    "rrhf": Oracle(
        lambda x: np.maximum(0, x.s_r - x.s_c) - 0.5 * x.s_c,
        {"alpha": 0.5},
        lambda x: ((x.s_r > x.s_c) + 0.5) / x.n_c,
        lambda x: (x.s_r > x.s_c) / x.n_r,
    ),
    "dpop": Oracle(
        lambda x: sp(-dpop_argument(x)),
        {"beta": 0.2, "penalty": 3.0},
        lambda x: 0.2 * sig(-dpop_argument(x)) * (1 + 3 * (x.S_c < x.R_c)),
        lambda x: 0.2 * sig(-dpop_argument(x)),
    ),
    "rdpo": Oracle(
        lambda x: sp(-(0.3 * x.z + 0.2 * (x.n_c - x.n_r))),
        {"beta": 0.3, "alpha": 0.2},
        lambda x: 0.3 * sig(-(0.3 * x.z + 0.2 * (x.n_c - x.n_r))),
        lambda x: 0.3 * sig(-(0.3 * x.z + 0.2 * (x.n_c - x.n_r))),
    ),
    "rpo": Oracle(
        lambda x: sp(-0.3 * x.z) - 0.005 * x.s_c,
        {"beta": 0.3, "alpha": 0.005},
        lambda x: 0.3 * sig(-0.3 * x.z) + 0.005 / x.n_c,
        lambda x: 0.3 * sig(-0.3 * x.z),
    ),
    "mpo": Oracle(
        lambda x: 0.8 * sp(-0.3 * x.z) + 0.2 * (sp(-0.3 * x.h_c) + sp(0.3 * x.h_r)) - x.s_c,
        {"beta": 0.3},
        lambda x: 0.8 * 0.3 * sig(-0.3 * x.z) + 0.2 * 0.3 * sig(-0.3 * x.h_c) + 1 / x.n_c,
        lambda x: 0.8 * 0.3 * sig(-0.3 * x.z) + 0.2 * 0.3 * sig(0.3 * x.h_r),
    ),
    "flex": Oracle(
        lambda x: sp(-(0.4 * x.h_c - 0.1 * x.h_r)),
        {"beta_chosen": 0.4, "beta_rejected": 0.1},
        lambda x: 0.4 * sig(-(0.4 * x.h_c - 0.1 * x.h_r)),
        lambda x: 0.1 * sig(-(0.4 * x.h_c - 0.1 * x.h_r)),
    ),
    "inpo": Oracle(
        lambda x: inpo_argument(x, 0.5, 0.2) ** 2,
        {"eta": 0.5, "tau": 0.2},
        lambda x: -2 * inpo_argument(x, 0.5, 0.2),
        lambda x: -2 * inpo_argument(x, 0.5, 0.2),
    ),
    "sft": Oracle(lambda x: -x.s_c, {}, lambda x: 1 / x.n_c, lambda x: 0 * x.n_c),
    "kto": Oracle(
        lambda x: 1.2 * (1 - sig(0.3 * (x.h_c - 0.5))) + 0.8 * (1 - sig(0.3 * (0.5 - x.h_r))),
        {"beta": 0.3, "baseline": 0.5, "desirable_weight": 1.2, "undesirable_weight": 0.8},
        lambda x: 1.2 * 0.3 * dsig(0.3 * (x.h_c - 0.5)),
        lambda x: 0.8 * 0.3 * dsig(0.3 * (x.h_r - 0.5)),
    ),
    "npo": Oracle(
        lambda x: 2 / 0.3 * sp(-0.3 * (x.R_r - x.S_r)),
        {"beta": 0.3},
        lambda x: 0 * x.z,
        lambda x: 2 * sig(0.3 * x.h_r),
    ),
    "simnpo": Oracle(
        lambda x: 2 / 1.5 * sp(-1.5 * (-x.s_r - 0.2)),
        {"beta": 1.5, "gamma": 0.2},
        lambda x: 0 * x.z,
        lambda x: 2 * sig(1.5 * (x.s_r + 0.2)) / x.n_r,
    ),
}

# Options that are tensors, and so not part of the rows above.
TENSORS = {
    "inpo": {"previous_chosen": torch.from_numpy(PREVIOUS_CHOSEN), "previous_rejected": torch.from_numpy(PREVIOUS_REJECTED)}
}

# Rows on both sides of every kink: margins above and below 0 and 1 / beta, chosen above and below its reference.
PAIR = X(
    S_c=np.array([-12.0, -5.5, -6.0, -10.0]),
    S_r=np.array([-10.5, -9.0, -4.0, -17.0]),
    R_c=np.array([-11.2, -7.0, -6.9, -9.0]),
    R_r=np.array([-12.5, -8.1, -4.4, -9.5]),
    n_c=np.array([5.0, 3.0, 4.0, 7.0]),
    n_r=np.array([6.0, 3.0, 2.0, 9.0]),
)

# phi(h) and its derivative.
DIVERGENCES: dict[str | float, tuple[Callable[[Array], Array], Callable[[Array], Array]]] = {
    "forward_kl": (lambda h: -np.exp(-h), lambda h: np.exp(-h)),
    "js_divergence": (lambda h: np.log(sig(h)), lambda h: sig(-h)),
    0.3: (lambda h: (np.exp(-0.7 * h) - 1) / -0.7, lambda h: np.exp(-0.7 * h)),
    2.0: (lambda h: np.exp(h) - 1, np.exp),
}


def to_pair(x: X) -> PairLogps:
    return PairLogps(*(torch.from_numpy(values) for values in x))


def finite_difference(loss: Callable[[X], Array], x: X, field: str) -> Array:
    """Derivative of the summed loss with respect to each entry of one field, by central differences."""
    slopes = np.zeros_like(x.S_c)
    for i in range(len(slopes)):
        step = np.zeros_like(slopes)
        step[i] = 1e-6
        up, down = getattr(x, field) + step, getattr(x, field) - step
        slopes[i] = (loss(x._replace(**{field: up})).sum() - loss(x._replace(**{field: down})).sum()) / 2e-6
    return slopes


def test_every_registry_entry_has_an_oracle() -> None:
    assert set(ORACLES) == set(PREFERENCE_LOSSES)


def test_every_option_has_a_value_in_its_oracle() -> None:
    for name, spec in PREFERENCE_LOSSES.items():
        covered = set(ORACLES[name].options) | set(TENSORS.get(name, {})) | {"f_divergence", "length_normalize"}
        assert set(spec.options) <= covered, name


@pytest.mark.parametrize("name", PREFERENCE_LOSSES)
def test_F1_loss_matches_an_independent_derivation(name: str) -> None:
    oracle = ORACLES[name]
    ours = preference_loss(name, to_pair(PAIR), **oracle.options, **TENSORS.get(name, {}))
    np.testing.assert_allclose(ours.numpy(), oracle.loss(PAIR), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", PREFERENCE_LOSSES)
def test_F1_gradient_matches_finite_differences_of_the_derivation(name: str) -> None:
    oracle = ORACLES[name]
    d_c, d_r = sensitivities(name, to_pair(PAIR), **oracle.options, **TENSORS.get(name, {}))
    np.testing.assert_allclose(d_c.numpy(), -finite_difference(oracle.loss, PAIR, "S_c"), atol=1e-6)
    np.testing.assert_allclose(d_r.numpy(), finite_difference(oracle.loss, PAIR, "S_r"), atol=1e-6)


@pytest.mark.parametrize("name", [name for name, oracle in ORACLES.items() if oracle.d_c is not None])
def test_F1_gradient_matches_its_closed_form(name: str) -> None:
    oracle = ORACLES[name]
    assert oracle.d_c is not None and oracle.d_r is not None
    d_c, d_r = sensitivities(name, to_pair(PAIR), **oracle.options, **TENSORS.get(name, {}))
    np.testing.assert_allclose(d_c.numpy(), oracle.d_c(PAIR), rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(d_r.numpy(), oracle.d_r(PAIR), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_f_dpo_matches_an_independent_derivation(divergence: str | float) -> None:
    phi, slope = DIVERGENCES[divergence]
    margin = 0.2 * (phi(PAIR.h_c) - phi(PAIR.h_r))
    ours = preference_loss("sigmoid", to_pair(PAIR), beta=0.2, f_divergence=divergence)
    np.testing.assert_allclose(ours.numpy(), sp(-margin), rtol=1e-10)
    d_c, d_r = sensitivities("sigmoid", to_pair(PAIR), beta=0.2, f_divergence=divergence)
    np.testing.assert_allclose(d_c.numpy(), 0.2 * slope(PAIR.h_c) * sig(-margin), rtol=1e-9)
    np.testing.assert_allclose(d_r.numpy(), 0.2 * slope(PAIR.h_r) * sig(-margin), rtol=1e-9)


@pytest.mark.parametrize("name", [name for name, spec in PREFERENCE_LOSSES.items() if "f_divergence" in spec.options])
def test_f_divergence_replaces_the_log_ratio_in_every_loss_that_takes_it(name: str) -> None:
    """A pair whose log-ratios are phi(h), under the reverse KL, has the loss of the pair with h under the divergence."""
    phi, _ = DIVERGENCES["forward_kl"]
    shaped = PAIR._replace(S_c=PAIR.R_c + 1 + phi(PAIR.h_c), S_r=PAIR.R_r + 1 + phi(PAIR.h_r))
    ours = preference_loss(name, to_pair(PAIR), f_divergence="forward_kl")
    torch.testing.assert_close(ours, preference_loss(name, to_pair(shaped)))


def test_F2_ipo_is_per_token_by_default_and_of_sums_on_request() -> None:
    pair = to_pair(PAIR)
    per_token = (PAIR.h_c / PAIR.n_c - PAIR.h_r / PAIR.n_r - 5.0) ** 2
    np.testing.assert_allclose(preference_loss("ipo", pair).numpy(), per_token)
    np.testing.assert_allclose(preference_loss("ipo", pair, length_normalize=False).numpy(), (PAIR.z - 5.0) ** 2)


def test_alphapo_at_zero_alpha_is_simpo() -> None:
    pair = to_pair(PAIR)
    ours = preference_loss("alphapo", pair, beta=2.0, gamma=0.5, alpha=0.0)
    torch.testing.assert_close(ours, preference_loss("simpo", pair))
