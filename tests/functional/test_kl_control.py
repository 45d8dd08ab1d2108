import pytest
import torch

from lightning_pref.functional.kl_control import AdaptiveKL, FixedKL, KLController


def reference_adaptive(coefficient: float, kl: float, count: int, *, target: float, horizon: float) -> float:
    error = min(max(kl / target - 1, -0.2), 0.2)
    return coefficient * (1 + error * count / horizon)


@pytest.mark.parametrize("kl", [-3.0, 0.0, 5.0, 6.0, 6.5, 7.0, 100.0])
@pytest.mark.parametrize("count", [1, 64, 10_000])
def test_adaptive_control_is_the_published_update(kl: float, count: int) -> None:
    control = AdaptiveKL(initial=0.15)
    after = control.updated(control.start(), kl, count)
    assert after.item() == pytest.approx(reference_adaptive(0.15, kl, count, target=6.0, horizon=10_000.0), rel=1e-6)


def test_adaptive_control_rests_at_its_target() -> None:
    assert AdaptiveKL(target=4.0).updated(torch.tensor(0.3), torch.tensor(4.0), torch.tensor(512)).item() == torch.tensor(0.3)


def test_adaptive_control_brings_a_kl_that_answers_to_it_to_the_target() -> None:
    """A policy whose KL falls as the coefficient rises: kl = 1 / coefficient, which is at 5 nats for 0.2."""
    control = AdaptiveKL(initial=1.0, target=5.0, horizon=100.0)
    coefficient = control.start()
    for _ in range(200):
        coefficient = control.updated(coefficient, 1 / coefficient, 50)
    assert coefficient.item() == pytest.approx(0.2, rel=1e-3)


def test_a_batch_beyond_the_horizon_moves_by_a_fifth_and_never_turns_the_sign() -> None:
    control = AdaptiveKL(horizon=10.0)
    assert control.updated(torch.tensor(1.0), 0.0, 1000).item() == pytest.approx(0.8)
    assert control.updated(torch.tensor(1.0), 1e9, 1000).item() == pytest.approx(1.2)


@pytest.mark.parametrize("kl", [float("nan"), float("inf"), -float("inf")])
def test_a_kl_that_is_not_finite_leaves_the_coefficient_alone(kl: float) -> None:
    assert AdaptiveKL().updated(torch.tensor(0.5), kl, 64).item() == 0.5


@pytest.mark.parametrize("control", [FixedKL(), AdaptiveKL()])
def test_the_state_is_one_tensor_that_is_not_edited(control: KLController) -> None:
    start = control.start()
    before = start.clone()
    after = control.updated(start, 50.0, 64)
    assert torch.equal(start, before)
    assert after.shape == start.shape == ()
    assert (after > start).item() == isinstance(control, AdaptiveKL)


def test_settings_that_cannot_work_raise() -> None:
    with pytest.raises(ValueError, match="`coefficient` must not be negative, got -1.0"):
        FixedKL(coefficient=-1.0)
    for name in ("initial", "target", "horizon"):
        with pytest.raises(ValueError, match=f"`{name}` must be positive, got 0.0; for no control use `FixedKL`"):
            AdaptiveKL(**{name: 0.0})
