"""What must hold for every pairwise loss, whatever its formula."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_pref.losses import PREFERENCE_LOSSES, PairLogps, implicit_rewards, preference_loss, sensitivities

LOG2 = math.log(2)
EPS = 1e-3

# Options without a default; INPO's previous policy is its reference here.
REQUIRED: dict[str, dict[str, Any]] = {"inpo": {"eta": 0.5, "tau": 0.5}}

# Loss of a pair whose policy is its reference, under the default options; the losses that are not in it depend on the
# log-probs themselves there.
AT_INIT: dict[str, float] = {
    "sigmoid": LOG2,
    "cdpo": LOG2,
    "robust": LOG2,
    "hinge": 1.0,
    "ipo": 1 / (4 * 0.1**2),
    "exo_pair": -0.5 * math.log(1 - EPS) - 0.5 * math.log(EPS) - LOG2,
    "nca_pair": 2 * LOG2,
    "bco_pair": 2 * LOG2,
    "sppo_hard": 1 / (2 * 0.001**2),
    "apo_zero": 1.0,
    "apo_down": 1.0,
    "aot": LOG2,
    "aot_unpaired": LOG2,
    "discopop": 0.5 * LOG2 + 0.5,
    "sigmoid_norm": LOG2,
    "dpop": LOG2,
    "flex": LOG2,
    "inpo": 1 / (4 * 0.5**2),
    "kto": 1.0,  # one half for each side
    "npo": 2 / 0.1 * LOG2,
}

# Adding one constant to both log-ratios changes nothing, or must change something.
SHIFT_INVARIANT = {"sigmoid", "cdpo", "robust", "hinge", "exo_pair", "discopop", "aot", "aot_unpaired", "rdpo", "inpo"}
SHIFT_SENSITIVE = {"nca_pair", "bco_pair", "sppo_hard", "apo_zero", "apo_down", "kto", "npo", "flex", "dpop", "ipo"}

# The batch is sorted inside.
SORTING = {"aot", "aot_unpaired"}


def options_of(name: str, pair: PairLogps) -> dict[str, Any]:
    previous = {"previous_chosen": pair.ref_chosen, "previous_rejected": pair.ref_rejected} if name == "inpo" else {}
    return REQUIRED.get(name, {}) | previous


def loss(name: str, pair: PairLogps, **options: Any) -> Tensor:
    return preference_loss(name, pair, **options_of(name, pair) | options)


def random_pair(size: int = 16, dtype: torch.dtype = torch.float64, seed: int = 0) -> PairLogps:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 12, (2, size), generator=generator)
    logps = -3 * torch.rand(2, 2, size, generator=generator, dtype=torch.float64) * lengths
    return PairLogps(*logps[0].to(dtype), *logps[1].to(dtype), *lengths)


def at_reference(pair: PairLogps) -> PairLogps:
    return pair._replace(ref_chosen=pair.chosen, ref_rejected=pair.rejected)


def with_margin(z: float, dtype: torch.dtype = torch.float64) -> PairLogps:
    """A pair with log-ratios z / 2 and -z / 2 and one token a side."""
    side = torch.tensor([-abs(z) - 1], dtype=dtype)
    one = torch.ones(1, dtype=torch.int64)
    return PairLogps(side + z / 2, side - z / 2, side, side, one, one)


@pytest.mark.parametrize("name", AT_INIT)
def test_R1_loss_at_the_reference_is_its_textbook_value(name: str) -> None:
    pair = at_reference(random_pair(dtype=torch.float32))
    torch.testing.assert_close(loss(name, pair), torch.full((16,), AT_INIT[name]), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", sorted(SHIFT_INVARIANT | SHIFT_SENSITIVE))
def test_shift_of_both_log_ratios_matters_exactly_where_it_should(name: str) -> None:
    pair = random_pair()
    shifted = pair._replace(chosen=pair.chosen - 1.5, rejected=pair.rejected - 1.5)
    same = torch.allclose(loss(name, pair).sort().values, loss(name, shifted).sort().values, atol=1e-9)
    assert same == (name in SHIFT_INVARIANT)


def test_ipo_of_sums_is_shift_invariant() -> None:
    pair = random_pair()
    shifted = pair._replace(chosen=pair.chosen - 1.5, rejected=pair.rejected - 1.5)
    torch.testing.assert_close(loss("ipo", pair, length_normalize=False), loss("ipo", shifted, length_normalize=False))


def test_swapping_the_sides_of_dpo_changes_it_by_the_reward_margin() -> None:
    pair = random_pair()
    chosen, rejected = implicit_rewards("sigmoid", pair)
    torch.testing.assert_close(loss("sigmoid", pair) - loss("sigmoid", pair.swapped()), rejected - chosen)


@pytest.mark.parametrize("eps", [0.05, 0.3, 0.45])
def test_robust_averaged_over_flipped_labels_is_clean_dpo(eps: float) -> None:
    pair = random_pair()
    flips = (1 - eps) * loss("robust", pair, label_smoothing=eps) + eps * loss("robust", pair.swapped(), label_smoothing=eps)
    torch.testing.assert_close(flips, loss("sigmoid", pair))


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("cdpo", {"label_smoothing": 0.0}),
        ("robust", {"label_smoothing": 0.0}),
        ("sigmoid", {"f_divergence": "reverse_kl"}),
        ("sigmoid", {"f_divergence": 1.0}),
        ("sigmoid", {"f_divergence": 1.0 + 1e-9}),
        ("rdpo", {"alpha": 0.0}),
        ("rpo", {"alpha": 0.0}),
        ("dpop", {"penalty": 0.0, "beta": 0.1}),
        ("flex", {"beta_chosen": 0.1, "beta_rejected": 0.1}),
    ],
)
def test_limits_of_other_losses_are_dpo(name: str, options: dict[str, Any]) -> None:
    pair = random_pair()
    torch.testing.assert_close(loss(name, pair, **options), loss("sigmoid", pair, beta=0.1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_alphapo_tends_to_simpo_as_alpha_vanishes(dtype: torch.dtype) -> None:
    pair = random_pair(dtype=dtype)
    bent = loss("alphapo", pair, alpha=1e-6, beta=2.0, gamma=0.5)
    torch.testing.assert_close(bent, loss("simpo", pair), rtol=0, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_alpha_divergence_tends_to_reverse_kl_as_its_order_goes_to_one(dtype: torch.dtype) -> None:
    pair = random_pair(dtype=dtype)
    torch.testing.assert_close(loss("sigmoid", pair, f_divergence=1 + 1e-5), loss("sigmoid", pair), rtol=1e-3, atol=1e-3)


def test_alpha_divergence_of_order_zero_is_forward_kl() -> None:
    pair = random_pair()
    torch.testing.assert_close(loss("sigmoid", pair, f_divergence=0.0), loss("sigmoid", pair, f_divergence="forward_kl"))


@pytest.mark.parametrize("name", sorted(SORTING))
def test_aot_of_one_pair_is_dpo(name: str) -> None:
    pair = random_pair(size=1)
    torch.testing.assert_close(loss(name, pair), loss("sigmoid", pair, beta=0.01))


def test_aot_of_batches_sorted_alike_is_dpo_of_the_batch() -> None:
    zeros = torch.zeros(3, dtype=torch.float64)
    pair = PairLogps(torch.tensor([-3.0, -2.0, -1.0]).double(), zeros, torch.tensor([-9.0, -5.0, -4.0]).double(), zeros)
    torch.testing.assert_close(loss("aot", pair), loss("sigmoid", pair, beta=0.01))
    ratios = PairLogps(torch.tensor([1.0, 2.0, 3.0]).double(), torch.tensor([-2.0, 0.0, 1.0]).double(), zeros, zeros)
    torch.testing.assert_close(loss("aot_unpaired", ratios), loss("sigmoid", ratios, beta=0.01))


def test_permuting_rejected_rows_changes_paired_aot_only() -> None:
    pair, order = random_pair(), torch.randperm(16, generator=torch.Generator().manual_seed(1))
    assert pair.ref_rejected is not None
    permuted = pair._replace(rejected=pair.rejected[order], ref_rejected=pair.ref_rejected[order])
    torch.testing.assert_close(loss("aot_unpaired", pair), loss("aot_unpaired", permuted))
    assert not torch.allclose(loss("aot", pair).mean(), loss("aot", permuted).mean())


@pytest.mark.parametrize("name", PREFERENCE_LOSSES)
def test_F5_permuting_pairs_permutes_losses(name: str) -> None:
    pair, order = random_pair(), torch.randperm(16, generator=torch.Generator().manual_seed(2))
    permuted = PairLogps(*(values[order] for values in pair if values is not None))
    expected = loss(name, pair)
    torch.testing.assert_close(loss(name, permuted), expected if name in SORTING else expected[order])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("z", [1e4, -1e4])
@pytest.mark.parametrize("name", PREFERENCE_LOSSES)
def test_F3_loss_and_gradient_are_finite_at_extreme_margins(name: str, z: float, dtype: torch.dtype) -> None:
    pair = with_margin(z, dtype)
    values = loss(name, pair)
    assert values.dtype == torch.float32
    assert values.isfinite().all()
    assert all(d.isfinite().all() for d in sensitivities(name, pair, **options_of(name, pair)))


@pytest.mark.parametrize("divergence", ["forward_kl", "js_divergence", 0.5, 2.0])
@pytest.mark.parametrize("z", [1e4, -1e4])
@pytest.mark.parametrize("name", [name for name, spec in PREFERENCE_LOSSES.items() if "f_divergence" in spec.options])
def test_F3_every_divergence_is_finite_at_extreme_margins(name: str, z: float, divergence: str | float) -> None:
    pair = with_margin(z, torch.float32)
    assert loss(name, pair, f_divergence=divergence).isfinite().all()
    assert all(d.isfinite().all() for d in sensitivities(name, pair, f_divergence=divergence))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_F6_orpo_is_finite_for_a_certain_response(dtype: torch.dtype) -> None:
    one = torch.tensor([1])
    pair = PairLogps(torch.tensor([-1e-8], dtype=dtype), torch.tensor([-2.0], dtype=dtype), None, None, one, one)
    for side in (pair, pair.swapped()):
        assert loss("orpo", side).isfinite().all()
        assert all(d.isfinite().all() for d in sensitivities("orpo", side))


@pytest.mark.parametrize("name", PREFERENCE_LOSSES)
def test_half_precision_inputs_are_widened_before_anything_is_computed(name: str) -> None:
    half = random_pair(dtype=torch.bfloat16)
    single = PairLogps(*(values.float() if values is not None else None for values in half))  # type: ignore[arg-type]
    torch.testing.assert_close(loss(name, half), loss(name, single), rtol=0, atol=0)


@pytest.mark.parametrize("name", sorted(set(PREFERENCE_LOSSES) - {"apo_down", "npo", "simnpo", "sft", "discopop", "robust"}))
def test_a_better_margin_from_the_reference_never_costs_more(name: str) -> None:
    """A small step that raises the chosen and lowers the rejected response from equal footing must not raise the loss."""
    before = with_margin(0.0)
    after = before._replace(chosen=before.chosen + 1e-3, rejected=before.rejected - 1e-3)
    assert (loss(name, after) <= loss(name, before)).all()


def test_cdpo_settles_where_its_formula_says() -> None:
    z = torch.linspace(0, 60, 60001, dtype=torch.float64)
    zeros = torch.zeros_like(z)
    values = loss("cdpo", PairLogps(z, zeros, zeros, zeros), label_smoothing=0.1, beta=0.1)
    assert z[values.argmin()].item() == pytest.approx(math.log(0.9 / 0.1) / 0.1, abs=1e-3)


def test_exo_settles_at_the_log_odds_of_its_smoothing_with_zero_loss() -> None:
    z = torch.tensor([6.906754778648554 / 0.1], dtype=torch.float64)
    zeros = torch.zeros_like(z)
    assert loss("exo_pair", PairLogps(z, zeros, zeros, zeros), beta=0.1).item() == pytest.approx(0.0, abs=1e-12)


def test_discopop_has_its_two_known_stationary_points_and_pushes_the_wrong_way_at_zero() -> None:
    z = torch.tensor([-2.3714, 1.4401, 0.0], dtype=torch.float64)
    zeros = torch.zeros_like(z)
    d_c, _ = sensitivities("discopop", PairLogps(z, zeros, zeros, zeros))
    torch.testing.assert_close(d_c[:2], torch.zeros(2, dtype=torch.float64), rtol=0, atol=1e-5)
    assert d_c[2] < 0


def test_apo_down_does_not_move_the_chosen_response_at_init() -> None:
    d_c, d_r = sensitivities("apo_down", at_reference(random_pair()))
    torch.testing.assert_close(d_c, torch.zeros_like(d_c))
    torch.testing.assert_close(d_r, torch.full_like(d_r, 0.1 / 4))


def test_robust_goes_on_falling_without_end() -> None:
    far = loss("robust", with_margin(1e4), label_smoothing=0.1)
    farther = loss("robust", with_margin(2e4), label_smoothing=0.1)
    torch.testing.assert_close(farther - far, torch.tensor([-1e4 * 0.1 * 0.1 / 0.8], dtype=torch.float64))


def test_the_reference_gets_no_gradient() -> None:
    pair = random_pair()
    assert pair.ref_chosen is not None
    reference = pair.ref_chosen.clone().requires_grad_()
    chosen = pair.chosen.clone().requires_grad_()
    loss("sigmoid", pair._replace(chosen=chosen, ref_chosen=reference)).sum().backward()
    assert chosen.grad is not None
    assert reference.grad is None
