import pytest
import torch
from torch import Tensor

from lightning_pref.losses import (
    UNPAIRED_LOSSES,
    PairLogps,
    RunningMean,
    apo_zero_unpaired,
    bco,
    kto,
    kto_baseline,
    preference_loss,
)

LOGPS = torch.tensor([-3.0, -8.0, -5.0, -4.0])
REF_LOGPS = torch.tensor([-4.0, -6.0, -5.5, -7.0])
DESIRABLE = torch.tensor([True, False, False, True])
OTHER_VALUES = {"baseline": 1.5, "beta": 0.7, "delta": 0.4, "desirable_weight": 1.3, "undesirable_weight": 1.3}


def reference_kto(baseline: float, beta: float, lambda_d: float, lambda_u: float) -> Tensor:
    """Value function of the paper, row by row."""
    rows = []
    for logp, ref, good in zip(LOGPS, REF_LOGPS, DESIRABLE, strict=True):
        reward = logp - ref
        value = torch.sigmoid(beta * (reward - baseline)) if good else torch.sigmoid(beta * (baseline - reward))
        rows.append((lambda_d if good else lambda_u) * (1 - value))
    return torch.stack(rows)


def test_F1_kto_matches_the_value_function_row_by_row() -> None:
    ours = kto(LOGPS, REF_LOGPS, DESIRABLE, baseline=0.4, beta=0.3, desirable_weight=1.2, undesirable_weight=0.9)
    torch.testing.assert_close(ours, reference_kto(0.4, 0.3, 1.2, 0.9))


def test_kto_at_the_reference_is_half_its_weight() -> None:
    ours = kto(LOGPS, LOGPS, DESIRABLE, baseline=0.0, desirable_weight=1.2, undesirable_weight=0.8)
    torch.testing.assert_close(ours, torch.tensor([0.6, 0.4, 0.4, 0.6]))


def test_apo_zero_unpaired_is_kto_without_baseline() -> None:
    torch.testing.assert_close(apo_zero_unpaired(LOGPS, REF_LOGPS, DESIRABLE, beta=0.3), reference_kto(0.0, 0.3, 1.0, 1.0))


def test_F1_bco_is_the_log_loss_of_a_classifier() -> None:
    logits = 0.3 * (LOGPS - REF_LOGPS) - 0.2
    expected = torch.nn.functional.binary_cross_entropy_with_logits(logits, DESIRABLE.float(), reduction="none")
    torch.testing.assert_close(bco(LOGPS, REF_LOGPS, DESIRABLE, beta=0.3, delta=0.2), expected)


@pytest.mark.parametrize(("unpaired", "paired"), [("bco", "bco_pair"), ("apo_zero_unpaired", "apo_zero")])
def test_unpaired_losses_of_both_sides_add_up_to_the_pairwise_one(unpaired: str, paired: str) -> None:
    single = UNPAIRED_LOSSES[unpaired].fn
    yes = torch.ones(4, dtype=torch.bool)
    sides = single(LOGPS, REF_LOGPS, yes, beta=0.3) + single(LOGPS - 1, REF_LOGPS, ~yes, beta=0.3)
    pair = PairLogps(LOGPS, LOGPS - 1, REF_LOGPS, REF_LOGPS)
    torch.testing.assert_close(sides, preference_loss(paired, pair, beta=0.3))


@pytest.mark.parametrize(
    ("name", "option"), [(name, option) for name, spec in UNPAIRED_LOSSES.items() for option in spec.options]
)
def test_every_option_changes_its_loss(name: str, option: str) -> None:
    spec = UNPAIRED_LOSSES[name]
    defaults = {"baseline": 0.4} if name == "kto" else {}
    changed = spec.fn(LOGPS, REF_LOGPS, DESIRABLE, **defaults | {option: OTHER_VALUES[option]})
    assert not torch.allclose(changed, spec.fn(LOGPS, REF_LOGPS, DESIRABLE, **defaults))


@pytest.mark.parametrize("name", UNPAIRED_LOSSES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_F3_unpaired_losses_are_finite_at_extreme_log_ratios(name: str, dtype: torch.dtype) -> None:
    logps = torch.tensor([-1e4, 0.0, -1e4, 0.0], dtype=dtype, requires_grad=True)
    ref = torch.tensor([0.0, -1e4, 0.0, -1e4], dtype=dtype)
    options = {"baseline": 0.0} if name == "kto" else {}
    losses = UNPAIRED_LOSSES[name].fn(logps, ref, torch.tensor([True, True, False, False]), **options)
    losses.sum().backward()
    assert losses.dtype == torch.float32
    assert losses.isfinite().all()
    assert logps.grad is not None
    assert logps.grad.isfinite().all()


def test_F5_unpaired_shapes_never_broadcast() -> None:
    with pytest.raises(ValueError, match=r"all \[N\]; got \[4, 1\], \[4\] and torch.bool \[4\]"):
        kto(LOGPS[:, None], REF_LOGPS, DESIRABLE, baseline=0.0)
    with pytest.raises(ValueError, match="needs `logps`, `ref_logps` and a bool `desirable`"):
        bco(LOGPS, REF_LOGPS, DESIRABLE.long())


def test_F7_baseline_is_a_mean_that_is_never_negative_and_has_no_gradient() -> None:
    ratios = torch.tensor([2.0, -1.0, 5.0], requires_grad=True)
    baseline = kto_baseline(ratios.sum(), 3)
    assert baseline.item() == 2.0
    assert not baseline.requires_grad
    assert kto_baseline(-ratios.sum(), 3).item() == 0.0


def test_F7_baseline_of_reduced_sums_is_that_of_one_process() -> None:
    ratios = torch.tensor([2.0, -1.0, 5.0, 3.0, -8.0])
    by_rank = [ratios[:2], ratios[2:]]
    reduced = kto_baseline(torch.stack([r.sum() for r in by_rank]).sum(), torch.tensor(sum(len(r) for r in by_rank)))
    torch.testing.assert_close(reduced, kto_baseline(ratios.sum(), 5))
    # The mean of the ranks' own baselines, clamped one by one, is another number.
    assert reduced != torch.stack([kto_baseline(r.sum(), len(r)) for r in by_rank]).mean()


def test_F7_baseline_is_not_scaled_by_beta() -> None:
    at_baseline = kto(torch.tensor([-2.0]), torch.tensor([-5.0]), torch.tensor([True]), baseline=torch.tensor(3.0), beta=0.1)
    assert at_baseline.item() == 0.5


def test_running_mean_is_the_mean_of_everything_seen() -> None:
    values = torch.randn(20, generator=torch.Generator().manual_seed(0)) + 3
    running = RunningMean.empty()
    for part in values.split([3, 1, 9, 7]):
        running = running.updated(part.sum(), torch.tensor(float(len(part))))
    torch.testing.assert_close(running.mean, values.mean())
    assert running.num_seen.item() == 20


def test_running_mean_of_nothing_is_unchanged() -> None:
    running = RunningMean(torch.tensor(2.0), torch.tensor(5.0))
    assert running.updated(torch.tensor(0.0), torch.tensor(0.0)) == running
    assert RunningMean.empty().updated(torch.tensor(0.0), torch.tensor(0.0)).mean.item() == 0.0
