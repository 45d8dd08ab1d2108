"""Mode `evidence`: which of loss, gradient norm and size of the update is taken for a spike, and which is not."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.plugins import MixedPrecision
from spiky import After, Regression, TwoOptimizers, actions, batches, evidence, fit, weights
from torch import Tensor
from torch.optim import Optimizer
from typing_extensions import override

from lightning_pref.callbacks.row_ids import group_rows
from lightning_pref.data.groups import GroupBatch, PromptGroup


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
    class SpikesInTheBody(TwoOptimizers):
        num_backwards = 0

        @override
        def on_after_backward(self) -> None:
            self.num_backwards += 1
            if self.num_backwards in (31, 34):
                for parameter in self.layers[0].parameters():
                    assert parameter.grad is not None
                    parameter.grad.mul_(1e4)

    callback = evidence()
    fit(tmp_path, SpikesInTheBody(head_every=1), [callback], batches(40))
    assert [(event["optimizer"], event["update"], event["action"]) for event in callback.events] == [
        (0, 31, "skip"),
        (0, 34, "reset_first"),
    ]
    assert [track["updates"] for track in callback.state_dict()["measured"]["tracks"]] == [38, 40]
