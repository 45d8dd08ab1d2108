"""Mode `evidence`: what is seen, what is done about it, and that nothing is done without a reason."""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.plugins import MixedPrecision
from spiky import Gradients, Regression, adamw, batches, fit, weights
from torch import Tensor
from torch.optim import Optimizer
from typing_extensions import override

from lightning_pref.callbacks.row_ids import group_rows
from lightning_pref.callbacks.spike_ladder import Ladder
from lightning_pref.callbacks.spike_reset import SpikeAwareOptimizerReset
from lightning_pref.data.groups import GroupBatch, PromptGroup


def evidence(**changes: Any) -> SpikeAwareOptimizerReset:
    return SpikeAwareOptimizerReset("evidence", **{"guard_steps": 3, "warmup_steps": 6, **changes})


def actions(callback: SpikeAwareOptimizerReset) -> list[tuple[int, str]]:
    return [(event["update"], event["action"]) for event in callback.events]


class After(Callback):
    """Weights, moments, step counter and learning rates after every batch."""

    def __init__(self) -> None:
        self.weights: list[Tensor] = []
        self.first: list[Tensor] = []
        self.second: list[Tensor] = []
        self.steps: list[int] = []

    @override
    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        states = list(trainer.optimizers[0].state.values())
        self.weights.append(weights(pl_module))
        self.first.append(torch.cat([state["exp_avg"].flatten() for state in states]))
        self.second.append(torch.cat([state["exp_avg_sq"].flatten() for state in states]))
        self.steps.append(int(states[0]["step"]))


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


# What is seen.


def test_a_batch_with_wrong_labels_is_seen_in_the_loss_and_named(tmp_path: Path) -> None:
    data = batches(40)
    data[32] = torch.cat([data[32][:, :6], 300.0 * torch.ones(8, 1)], -1)
    callback = evidence(watch=("loss",), rows=lambda batch: [1000 + round(float(batch[0, 0]) * 1000)])
    fit(tmp_path, Regression(), [callback], data)
    (event,) = callback.events
    assert event["update"] == 33
    assert list(event["scores"]) == ["loss"]
    row = 1000 + round(float(data[32][0, 0]) * 1000)
    assert event["rows"] == [row]
    (alert,) = [alert for alert in callback.alerts if alert.name == "spike/seen"]
    assert f"Update 33 with rows {row}: score of loss" in alert.evidence
    assert alert.level == "info"


def test_rows_of_all_micro_batches_of_the_update_are_named(tmp_path: Path) -> None:
    data = [torch.cat([batch, torch.full((8, 1), float(i))], -1) for i, batch in enumerate(batches(80))]

    class Numbered(Regression):
        @override
        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            return super().training_step(batch[:, :7], batch_idx)

    callback = evidence(rows=lambda batch: batch[:2, 7].long())
    fit(tmp_path, Numbered(spikes=[31]), [callback], data, accumulate_grad_batches=2)
    assert callback.events[0]["rows"] == [60, 60, 61, 61]


def test_rows_of_our_own_batches_are_known(random_groups: Callable[..., list[PromptGroup]]) -> None:
    rows = group_rows(GroupBatch.from_groups(random_groups(3)))
    assert rows is not None
    assert rows.tolist() == [0, 1, 2]
    assert group_rows(torch.zeros(3)) is None


class EmptiesSecondMoment(Callback):
    """Somebody's mistake that neither loss nor gradient shows: v is gone before an update, and the step is huge."""

    def __init__(self, update: int) -> None:
        self.update = update

    @override
    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Optimizer) -> None:
        if trainer.global_step + 1 == self.update:
            for state in optimizer.state.values():
                state["exp_avg_sq"].mul_(1e-8)


def test_a_step_too_large_for_its_learning_rate_is_undone(tmp_path: Path) -> None:
    after = After()
    callback = evidence(ladder=("reset_both",))
    trainer = fit(tmp_path, Regression(), [EmptiesSecondMoment(41), callback, after], batches(45))
    (event,) = callback.events
    assert (event["update"], list(event["scores"]), event["action"]) == (41, ["update_norm"], "reset_both")
    assert torch.equal(after.weights[40], after.weights[39])
    assert not torch.equal(after.weights[41], after.weights[40])
    alert = next(alert for alert in callback.alerts if alert.name == "spike/update_norm")
    assert "Update 41: score of update_norm" in alert.evidence
    assert trainer.callback_metrics["spike/update_score"] > 6


def test_the_size_of_updates_is_not_judged_right_after_a_reset(tmp_path: Path) -> None:
    """Steps are sign steps then, larger than those from full moments."""
    callback = evidence(guard_steps=10, ladder=("reset_both",), score_limit=8.0)
    fit(tmp_path, Regression(spikes=[60]), [callback], batches(120))
    assert actions(callback) == [(60, "reset_both")]


def test_a_step_is_judged_by_its_size_for_its_learning_rate(tmp_path: Path) -> None:
    callback = evidence(watch=("update_norm",))
    module = Regression(schedule=lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda step: 1e-3 if step < 60 else 1.0))
    fit(tmp_path, module, [callback], batches(90))
    assert callback.events == []


def test_updates_at_a_learning_rate_of_zero_are_not_judged(tmp_path: Path) -> None:
    callback = evidence()
    module = Regression(schedule=lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda step: float(step >= 30)))
    fit(tmp_path, module, [callback], batches(80))
    assert callback.events == []


class Broken(Regression):
    """The loss of some updates is no number."""

    at: tuple[int, ...] = ()

    @override
    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        return loss * math.nan if batch_idx + 1 in self.at else loss


@pytest.mark.parametrize("watch", [("loss", "grad_norm"), ("update_norm",)])
def test_an_update_that_is_no_number_is_skipped_from_the_first_one_on(tmp_path: Path, watch: Any) -> None:
    module = Broken()
    module.at = (1, 20)
    callback = evidence(watch=watch)
    trainer = fit(tmp_path, module, [callback], batches(30), log_every_n_steps=30)
    assert actions(callback) == [(1, "skip"), (20, "reset_first")]
    assert weights(module).isfinite().all()
    assert trainer.callback_metrics["spike/skipped"] == 2
    assert trainer.callback_metrics["spike/grad_norm"].isfinite()


def test_O1_an_overflow_that_the_scaler_skips_is_no_spike(tmp_path: Path) -> None:
    module = Broken()
    module.at = (10, 40)
    callback = evidence()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    trainer = fit(
        tmp_path, module, [callback], batches(50), plugins=[MixedPrecision("16-mixed", "cpu", scaler)], log_every_n_steps=8
    )
    assert callback.events == []
    assert (callback.updates, callback.state_dict()["measured"]["tracks"][0]["updates"]) == (48, 48)
    assert trainer.callback_metrics["spike/grad_norm"].isfinite()


def test_O1_a_growing_loss_scale_is_no_spike_and_a_spike_is_seen_under_it(tmp_path: Path) -> None:
    for watch, spikes, expected in ((("loss",), (), []), (("grad_norm",), (40,), [(40, "skip")])):
        callback = evidence(watch=watch)
        # From 1/64 to 256 after 30 updates: an unscaled loss would be seen to jump by a factor of 2^14.
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**-6, growth_factor=2.0**14, growth_interval=30)
        module = Regression(spikes=spikes)
        fit(tmp_path, module, [callback], batches(45), plugins=[MixedPrecision("16-mixed", "cpu", scaler)])
        assert actions(callback) == expected
        assert scaler.get_scale() == 2.0**8


def test_a_loss_that_stays_high_is_taken_for_the_new_level(tmp_path: Path) -> None:
    data = batches(90)
    data[50:] = [torch.cat([batch[:, :6], batch[:, 6:] + 30.0], -1) for batch in data[50:]]
    callback = evidence(watch=("loss",))
    module = Regression()
    fit(tmp_path, module, [callback], data)
    assert [update for update, _ in actions(callback)] == list(range(51, 60))
    assert callback.updates == 81  # executed ones


def test_each_optimizer_has_a_ladder_of_its_own(tmp_path: Path) -> None:
    class Two(Regression):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False

        @override
        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            loss = super().training_step(batch, batch_idx)
            self.manual_backward(loss)
            if batch_idx in (30, 33):
                for parameter in self.layers[0].parameters():
                    assert parameter.grad is not None
                    parameter.grad.mul_(1e4)
            body, head = self.optimizers()  # type: ignore[misc]
            body.step()
            head.step()
            body.zero_grad()
            head.zero_grad()
            return loss.detach()

        @override
        def configure_optimizers(self) -> Any:
            return [adamw(self.layers[0].parameters()), adamw(self.layers[2].parameters())]

    callback = evidence()
    fit(tmp_path, Two(), [callback], batches(40))
    assert [(event["optimizer"], event["update"], event["action"]) for event in callback.events] == [
        (0, 31, "skip"),
        (0, 34, "reset_first"),
    ]
    assert [track["updates"] for track in callback.state_dict()["measured"]["tracks"]] == [38, 40]


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
