"""Mode `evidence`: what is done about a spike, and that nothing is done without a reason."""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from spiky import After, Gradients, Regression, actions, adamw, batches, evidence, fit, weights
from torch.optim import Optimizer

from lightning_pref.callbacks.spike_ladder import Ladder
from lightning_pref.callbacks.spike_reset import SpikeAwareOptimizerReset

# Skipping.


def test_a_skipped_batch_is_one_that_never_came(tmp_path: Path) -> None:
    data = batches(60)
    callback = evidence()
    spiked = Regression(lambda p: adamw(p, weight_decay=0.1), spikes=[31])
    fit(tmp_path, spiked, [callback], data)
    calm = Regression(lambda p: adamw(p, weight_decay=0.1))
    fit(tmp_path, calm, [], [batch for i, batch in enumerate(data) if i != 30])
    assert actions(callback) == [(31, "skip")]
    assert torch.equal(weights(spiked), weights(calm))


@pytest.mark.parametrize("make", [
    lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=0.1),
    lambda p: torch.optim.RMSprop(p, lr=0.01),
    lambda p: torch.optim.NAdam(p, lr=0.01),
    lambda p: torch.optim.RAdam(p, lr=0.01),
    lambda p: torch.optim.Adamax(p, lr=0.01),
    lambda p: adamw(p, fused=True, amsgrad=True),
])  # fmt: skip
def test_a_step_is_skipped_with_every_optimizer(tmp_path: Path, make: Callable[[Any], Optimizer]) -> None:
    data = batches(40)
    spiked, calm = Regression(make, spikes=[31]), Regression(make)
    callback = evidence()
    fit(tmp_path, spiked, [callback], data)
    fit(tmp_path, calm, [], [batch for i, batch in enumerate(data) if i != 30])
    assert [action for _, action in actions(callback)] == ["skip"]
    assert torch.equal(weights(spiked), weights(calm))


def test_the_schedule_goes_on_over_a_skipped_update(tmp_path: Path) -> None:
    seen = {}
    for name, callbacks in {"plain": [], "evidence": [evidence()]}.items():
        gradients = Gradients()
        module = Regression(spikes=[31], schedule=lambda o: torch.optim.lr_scheduler.ExponentialLR(o, 0.95))
        fit(tmp_path, module, [*callbacks, gradients], batches(40))
        seen[name] = gradients.after_batch
    assert seen["plain"] == seen["evidence"]


def test_a_skip_is_safe_with_norm_clipping_and_accumulation(tmp_path: Path) -> None:
    module = Regression(spikes=[31], size=1e5)
    callback = evidence()
    fit(tmp_path, module, [callback], batches(80), gradient_clip_val=1.0, accumulate_grad_batches=2)
    assert actions(callback) == [(31, "skip")]
    assert callback.updates == 39  # executed ones


def test_a_skip_is_safe_where_gradients_are_clipped_by_value_and_the_next_ones_are_clipped_again(tmp_path: Path) -> None:
    data = batches(60)
    clipping: dict[str, Any] = {"gradient_clip_val": 0.05, "gradient_clip_algorithm": "value"}
    spiked, calm, unclipped = Regression(spikes=[31]), Regression(), Regression()
    callback = evidence()
    trainer = fit(tmp_path, spiked, [callback], data, **clipping)
    rest = [batch for i, batch in enumerate(data) if i != 30]
    fit(tmp_path, calm, [], rest, **clipping)
    fit(tmp_path, unclipped, [], rest)
    assert actions(callback) == [(31, "skip")]
    assert trainer.gradient_clip_val == 0.05
    assert torch.equal(weights(spiked), weights(calm))
    assert not torch.equal(weights(calm), weights(unclipped)), "there was something to clip"


def test_a_calm_run_is_left_alone_bit_for_bit(tmp_path: Path) -> None:
    found = []
    for callbacks in ([], [evidence()]):
        module = Regression()
        fit(tmp_path, module, callbacks, batches(400))
        found.append(weights(module))
        for callback in callbacks:
            assert callback.events == []
            assert callback.alerts == []
    assert torch.equal(*found)


# The ladder.


def test_what_is_done_rises_while_spikes_return(tmp_path: Path) -> None:
    callback, after, gradients = evidence(), After(), Gradients()
    data = batches(60)
    fit(tmp_path, Regression(spikes=[31, 34, 37, 40, 43]), [callback, after, gradients], data)
    assert actions(callback) == [(31, "skip"), (34, "reset_first"), (37, "reset_both"), (40, "ramp"), (43, "ramp")]
    # Index u - 1 is after update u.
    assert torch.equal(after.first[30], after.first[29])
    assert (after.first[33] == 0).all() and torch.equal(after.second[33], after.second[32])
    assert (after.first[36] == 0).all() and (after.second[36] == 0).all() and after.steps[36] == 0
    assert (after.first[39] == 0).all() and (after.second[39] == 0).all() and after.steps[39] == 0
    for update in (31, 34, 37, 40, 43):
        assert torch.equal(after.weights[update - 1], after.weights[update - 2])
    ramped = [rate for rate, _ in gradients.rates]
    assert ramped[:40] == [0.01] * 40, "no ramp before its rung"
    expected = [0.01 * (1 - 0.495 * (1 + math.cos(math.pi * c / 7))) for c in range(6)]
    assert ramped[40:42] == pytest.approx(expected[:2])
    assert ramped[43:49] == pytest.approx(expected), "from the beginning after the last spike"
    assert ramped[49:] == [0.01] * 11


def test_O4_the_update_after_a_reset_is_that_of_a_fresh_optimizer_at_the_ramped_rate(tmp_path: Path) -> None:
    after, gradients = After(), Gradients()
    callback = evidence(ladder=("ramp",))
    module = Regression(spikes=[31])
    fit(tmp_path, module, [callback, after, gradients], batches(33))
    start = after.weights[30].clone().requires_grad_()
    fresh = adamw([start], lr=0.01)
    for update, gradient in enumerate(gradients.before_step[31:33]):
        fresh.param_groups[0]["lr"] = 0.01 * (1 - 0.495 * (1 + math.cos(math.pi * update / 7)))
        start.grad = gradient
        fresh.step()
        assert torch.allclose(start, after.weights[31 + update], rtol=1e-6, atol=1e-8)


def test_keeping_the_bias_correction_makes_the_first_update_three_times_as_large(tmp_path: Path) -> None:
    steps = {}
    for correction in ("restart", "keep"):
        after = After()
        callback = evidence(ladder=("reset_both",), bias_correction=correction)
        fit(tmp_path, Regression(spikes=[301]), [callback, after], batches(302))
        steps[correction] = (after.weights[301] - after.weights[300]).abs().median()
        assert after.steps[300] == (0 if correction == "restart" else 300)
    # 0.1 / sqrt(0.001), divided by the correction of update 301, which is sqrt(1 - 0.999^301) for the second moment.
    expected = 0.1 / math.sqrt(0.001) * math.sqrt(1 - 0.999**301)
    assert steps["keep"] / steps["restart"] == pytest.approx(expected, rel=1e-3)


def test_after_the_horizon_the_ladder_begins_at_its_bottom(tmp_path: Path) -> None:
    callback = evidence(horizon=8)
    fit(tmp_path, Regression(spikes=[31, 36, 45, 54]), [callback], batches(60))
    assert actions(callback) == [(31, "skip"), (36, "reset_first"), (45, "skip"), (54, "skip")]


def test_the_ladder_can_be_shorter_and_its_last_rung_stays() -> None:
    ladder = Ladder(("skip", "ramp"), horizon=5)
    assert [ladder.climb(now) for now in (1, 2, 3, 8, 14)] == ["skip", "ramp", "ramp", "ramp", "skip"]
    assert [ladder.recurrence(now) for now in (14, 19, 20)] == [1, 1, 0]


def test_rolling_back_brings_weights_and_moments_of_the_last_snapshot(tmp_path: Path) -> None:
    for where in ("cpu", "device"):
        callback, after, gradients = (
            evidence(ladder=("skip", "roll_back"), snapshot_every=4, snapshot_on=where),
            After(),
            Gradients(),
        )
        fit(tmp_path, Regression(spikes=[31, 34]), [callback, after, gradients], batches(40))
        assert actions(callback) == [(31, "skip"), (34, "roll_back")]
        # Update 31 was skipped, and its horizon lasts: the last snapshot is from update 28.
        for found in (after.weights, after.first, after.second, after.steps):
            assert found[33] == found[27] if isinstance(found[33], int) else torch.equal(found[33], found[27])
        assert gradients.rates[34][0] == pytest.approx(0.0001), "and a ramp follows"


def test_without_a_snapshot_yet_a_roll_back_is_a_ramp(tmp_path: Path) -> None:
    callback = evidence(ladder=("roll_back",), snapshot_every=100)
    fit(tmp_path, Regression(spikes=[31]), [callback], batches(40))
    assert actions(callback) == [(31, "ramp")]


# What is logged, kept and resumed.


def test_eight_values_are_logged_and_say_what_happened(tmp_path: Path) -> None:
    callback = evidence()
    trainer = fit(tmp_path, Regression(spikes=[31, 34, 37]), [callback], batches(40), log_every_n_steps=40)
    values = {key: value.item() for key, value in trainer.callback_metrics.items() if key.startswith("spike/")}
    assert len(values) == 8
    assert set(values) <= {key.name for key in callback.keys}
    assert (values["spike/skipped"], values["spike/reset"], values["spike/recurrence"]) == (3, 1, 3)
    assert values["spike/phi"] == values["spike/effective_lr_multiplier"] == 1
    names = {alert.name for alert in callback.alerts}
    assert {"spike/seen", "spike/returning"} <= names


def test_events_are_bounded_and_the_latest_stay(tmp_path: Path) -> None:
    callback = evidence(max_events=2)
    fit(tmp_path, Regression(spikes=[31, 34, 37]), [callback], batches(40))
    assert [update for update, _ in actions(callback)] == [34, 37]


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
@pytest.mark.parametrize("stop", [5, 30, 31, 33, 36, 41, 44])
def test_C5_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(tmp_path: Path, stop: int) -> None:
    """Stops before, at and between spikes, and on the ramp."""
    data = batches(60)

    def build() -> tuple[Regression, SpikeAwareOptimizerReset]:
        return Regression(lambda p: adamw(p, weight_decay=0.1), spikes=[31, 33, 36, 40, 55]), evidence()

    module, whole = build()
    fit(tmp_path / "whole", module, [whole], data)
    first, begun = build()
    checkpoint = ModelCheckpoint(dirpath=tmp_path / "kept", filename="part", every_n_train_steps=stop)
    fit(tmp_path / "first", first, [begun, checkpoint], data, max_steps=stop, enable_checkpointing=True)
    second, resumed = build()
    fit(tmp_path / "second", second, [resumed], data, ckpt_path=str(tmp_path / "kept" / "part.ckpt"))
    assert actions(whole) == [(31, "skip"), (33, "reset_first"), (36, "reset_both"), (40, "ramp"), (55, "ramp")]
    assert torch.equal(weights(module), weights(second))
    assert whole.state_dict() == resumed.state_dict()


def test_state_is_plain_and_thresholds_are_the_new_ones(tmp_path: Path) -> None:
    callback = evidence()
    fit(tmp_path, Regression(spikes=[31]), [callback], batches(40))
    torch.save(callback.state_dict(), tmp_path / "state")
    state = torch.load(tmp_path / "state", weights_only=True)
    other = evidence(score_limit=1e9)
    other.load_state_dict(state)
    assert other.state_dict() == callback.state_dict() == state
    fit(tmp_path, Regression(spikes=[5]), [other], batches(10))
    assert len(other.events) == 1, "the one from the checkpoint"
    assert pickle.loads(pickle.dumps(callback)).state_dict() == copy.deepcopy(callback).state_dict() == state


def test_what_one_mode_learnt_is_of_no_use_to_the_other_but_counts_are(tmp_path: Path) -> None:
    callback = evidence()
    fit(tmp_path, Regression(), [callback], batches(10))
    other = SpikeAwareOptimizerReset(reset_every=12, warmup_steps=3, guard_steps=2)
    other.load_state_dict(callback.state_dict())
    fit(tmp_path, Regression(), [other], batches(5))
    assert other.state_dict()["measured"]["tracks"][0]["updates"] == 15
    assert other.state_dict()["measured"]["tracks"][0]["since_reset"] == 4


# What is refused.


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"watch": ()}, r"`watch` names some of 'loss', 'grad_norm', 'update_norm', got \[\]"),
        ({"watch": ("gradient",)}, r"`watch` names some of .*, got \['gradient'\]"),
        ({"ladder": ()}, r"`ladder` names some of 'skip', 'reset_first', 'reset_both', 'ramp', 'roll_back', each once"),
        ({"ladder": ("ramp", "skip")}, r"`ladder` names some of .* and in this order, got \['ramp', 'skip'\]"),
        ({"ladder": ("skip", "jump")}, r"`ladder` names some of .*, got \['skip', 'jump'\]"),
        ({"horizon": 0}, r"`horizon` must be at least 1 update, got 0"),
        ({"window": 10}, r"`min_history` must be between 2 and `window`, got 20 with a window of 10"),
        ({"score_limit": 0.0}, r"`limit` must be positive, got 0.0"),
        ({"snapshot_every": 0}, r"`snapshot_every` must be at least 1 or None, got 0"),
        ({"snapshot_every": 10}, r"'roll_back' in `ladder` and `snapshot_every` need each other: .*snapshot_every=10"),
        ({"ladder": ("skip", "roll_back")}, r"need each other: .* got ladder=\['skip', 'roll_back'\] and snapshot_every=None"),
        ({"reset_every": 100}, r"`reset_every` acts in mode 'spam' only; leave it out in mode 'evidence', or change the mode"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        evidence(**settings)
