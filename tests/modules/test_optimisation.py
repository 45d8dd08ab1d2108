from __future__ import annotations

import pytest
import torch

from lightning_pref.modules.optimisation import OptimizerSettings


def test_cosine_starts_moving_at_once_peaks_after_the_warmup_and_never_reaches_its_floor() -> None:
    factor = OptimizerSettings(schedule="cosine", warmup=0.2, floor=0.1).factor(10)
    values = [factor(i) for i in range(10)]
    assert values[:3] == [0.5, 1.0, 1.0]
    assert values[2:] == sorted(values[2:], reverse=True)
    assert 0.1 < values[-1] < 0.2
    assert factor(10) == pytest.approx(0.1)


def test_constant_stays_at_the_peak() -> None:
    factor = OptimizerSettings(schedule="constant", warmup=0).factor(3)
    assert [factor(i) for i in range(5)] == [1.0] * 5


def test_a_warmup_below_one_is_a_share_and_from_one_on_a_number_of_updates() -> None:
    assert OptimizerSettings(warmup=0.5).factor(8)(0) == 1 / 4
    assert OptimizerSettings(warmup=2).factor(8)(0) == 1 / 2


def test_a_warmup_as_long_as_the_run_is_refused() -> None:
    with pytest.raises(ValueError, match="warm-up of 8 updates leaves nothing of a run of 8.*lower `warmup`"):
        OptimizerSettings(warmup=8).factor(8)


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"learning_rate": 0.0}, "must be positive"), ({"warmup": -1}, "`warmup` must be"), ({"floor": 2.0}, "`floor`")],
)
def test_settings_out_of_range_are_refused(settings: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        OptimizerSettings(**settings)  # type: ignore[arg-type]


def test_matrices_decay_and_vectors_do_not() -> None:
    layer = torch.nn.Linear(3, 2)
    optimizer, _ = OptimizerSettings(learning_rate=0.1, weight_decay=0.5).build(layer.parameters(), 10)
    decays = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert decays == {id(layer.weight): 0.5, id(layer.bias): 0.0}


def test_a_model_without_trainable_parameters_is_refused() -> None:
    layer = torch.nn.Linear(3, 2).requires_grad_(False)
    with pytest.raises(ValueError, match="No parameter is trainable"):
        OptimizerSettings().build(layer.parameters(), 10)


def test_the_scheduler_applies_the_factor_update_by_update() -> None:
    layer = torch.nn.Linear(2, 1)
    settings = OptimizerSettings(learning_rate=1.0, schedule="linear", warmup=2)
    optimizer, scheduler = settings.build(layer.parameters(), 5)
    seen = []
    for _ in range(5):
        seen.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    assert seen == pytest.approx([0.5, 1.0, 1.0, 2 / 3, 1 / 3])
