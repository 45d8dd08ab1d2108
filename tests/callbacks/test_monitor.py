from __future__ import annotations

import copy
import json
import logging
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.plugins.precision import MixedPrecision
from rewarded import Series
from speakers import MeanChosen, PairRegression, pair_loader, pair_rows, quiet_trainer
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor
from typing_extensions import override

from lightning_pref import Observation, PairObservation, RewardObservation, observe
from lightning_pref.alerts import ALERT_RULES, AlertRule, Limit
from lightning_pref.callbacks import ObserveOutputs, Probe
from lightning_pref.callbacks.hosts import ALERTS_FILE, Host
from lightning_pref.measures.means import WeightedMeans


def fit(monitor: MeanChosen, *, module: L.LightningModule | None = None, **settings: Any) -> Series:
    L.seed_everything(0, verbose=False)
    module = module or PairRegression()
    series = Series()
    trainer = quiet_trainer(callbacks=[monitor], logger=series, **settings)
    trainer.fit(module, pair_loader(), pair_loader(8, seed=1))
    return series


def test_every_pair_is_counted_once_in_the_window_of_its_updates() -> None:
    series = fit(MeanChosen(every_n_updates=2), limit_val_batches=0)
    assert series.series["mean/pairs"] == {2: 8.0, 4: 8.0, 6: 8.0}


def test_under_accumulation_a_window_is_counted_in_updates_and_what_is_left_is_reported_at_the_end() -> None:
    series = fit(MeanChosen(every_n_updates=2), accumulate_grad_batches=2, limit_val_batches=0)
    assert series.series["mean/pairs"] == {2: 16.0, 3: 8.0}


def test_a_module_with_several_updates_per_batch_is_reported_on_as_often_as_asked() -> None:
    class FourUpdates(PairRegression):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False

        @override
        def training_step(self, batch: Tensor, batch_idx: int) -> None:
            optimizer = self.optimizers()
            for _ in range(4):
                optimizer.zero_grad()  # type: ignore[union-attr]
                self.manual_backward(self._step(batch))
                optimizer.step()  # type: ignore[union-attr]

    class CountsPairs(Probe):
        def __init__(self) -> None:
            super().__init__("fixed", [pair_rows(4)], lambda module, batch: module.pair(batch), every_n_updates=6, budget=None)
            self.measured: list[int] = []

        @override
        def measure(self, host: Host) -> None:
            self.measured.append(self.updates)
            super().measure(host)

    probe = CountsPairs()
    monitor, series = MeanChosen(every_n_updates=6), Series()
    trainer = quiet_trainer(callbacks=[probe, monitor], logger=series, limit_val_batches=0)
    trainer.fit(FourUpdates(), pair_loader())
    # Of 6 batches the second, third, fifth and sixth pass a multiple of 6; the last one ends training, too.
    assert list(series.series["mean/pairs"]) == [8, 12, 20, 24]
    assert probe.measured == [0, 8, 12, 20, 24]


def test_the_cadence_is_the_loggers_if_not_given() -> None:
    series = fit(MeanChosen(), log_every_n_steps=3, limit_val_batches=0)
    assert set(series.series["mean/chosen"]) == {3, 6}


def test_validation_has_its_own_accumulator_and_prefix() -> None:
    series = fit(MeanChosen(every_n_updates=6), num_sanity_val_steps=2)
    assert series.series["val/mean/pairs"] == {6: 8.0}
    assert series.series["mean/pairs"] == {6: 24.0}


def test_values_reach_callback_metrics_for_early_stopping() -> None:
    module = PairRegression()
    trainer = quiet_trainer(callbacks=[MeanChosen(every_n_updates=6)])
    trainer.fit(module, pair_loader())
    assert trainer.callback_metrics["mean/pairs"] == 24.0


def test_O1_an_update_that_the_loss_scaler_skips_does_not_count() -> None:
    class Overflows(PairRegression):
        @override
        def training_step(self, batch: Tensor, batch_idx: int) -> dict[str, Tensor]:
            out = super().training_step(batch, batch_idx)
            return {**out, "loss": out["loss"] * (float("inf") if batch_idx == 2 else 1.0)}

    half = MixedPrecision("16-mixed", "cpu", scaler=torch.amp.GradScaler("cpu", init_scale=2.0**4))
    monitor = MeanChosen(every_n_updates=1)
    series = fit(monitor, module=Overflows(), plugins=[half], limit_val_batches=0)
    assert monitor.updates == 5
    # What the skipped batch said belongs to the update that follows.
    assert series.series["mean/pairs"] == {1: 4.0, 2: 4.0, 4: 8.0, 5: 4.0, 6: 4.0}


def test_silence_raises_with_the_lines_that_feed_the_monitor_and_what_was_heard() -> None:
    class SaysOther(PairRegression):
        @override
        def training_step(self, batch: Tensor, batch_idx: int) -> dict[str, Tensor]:
            observe(self, RewardObservation(rewards=batch[:, 0], prompt_ids=batch[:, 8]))
            return super().training_step(batch, batch_idx)

    with pytest.raises(ValueError, match="MeanChosen received no PairObservation in the first 2 training batches") as error:
        fit(MeanChosen(silent_after=2), module=SaysOther(says=False))
    text = str(error.value)
    assert "observe(self, PairObservation(chosen_logps=..., rejected_logps=..., row_ids=...))" in text
    assert "ObserveOutputs(lambda out, batch: PairObservation(" in text
    assert text.endswith("It did receive: RewardObservation.")


def test_silence_of_a_whole_short_epoch_raises_too() -> None:
    with pytest.raises(ValueError, match=r"in the first epoch of training of PairRegression[\s\S]*It did receive: nothing"):
        fit(MeanChosen(), module=PairRegression(says=False), limit_val_batches=0)


@pytest.mark.parametrize("first", [True, False])
def test_outputs_are_read_from_a_module_that_says_nothing_wherever_the_reader_stands(first: bool) -> None:
    def extract(outputs: Any, batch: Tensor) -> PairObservation:
        return PairObservation(chosen_logps=outputs["inputs"], rejected_logps=batch[:, 4], row_ids=batch[:, 8].long())

    monitor, reader = MeanChosen(every_n_updates=6), ObserveOutputs(extract)
    trainer = quiet_trainer(callbacks=[reader, monitor] if first else [monitor, reader], limit_val_batches=0)
    trainer.fit(PairRegression(says=False), pair_loader())
    rows = torch.stack(list(pair_loader(batch_size=24)))[0]
    assert trainer.callback_metrics["mean/pairs"] == 24.0
    assert trainer.callback_metrics["mean/chosen"] == pytest.approx(rows[:, 0].double().mean().item())


def test_an_alert_goes_to_the_console_to_tensorboard_and_to_a_file_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    rule = AlertRule(limits=(Limit("mean/pairs", above=3.0),), patience=2, advice="Use smaller batches.")
    monkeypatch.setitem(ALERT_RULES, "mean/many_pairs", rule)
    monitor = MeanChosen(every_n_updates=1)
    tensorboard = TensorBoardLogger(tmp_path, name="", version="run")
    with caplog.at_level(logging.WARNING, logger="lightning_pref.alerts"):
        quiet_trainer(callbacks=[monitor], logger=tensorboard).fit(PairRegression(), pair_loader())
    assert [alert.since_step for alert in monitor.alerts] == [1]
    assert caplog.text.count("mean/many_pairs since step 1: mean/pairs is 4 (above 3). Use smaller batches.") == 1
    (line,) = (tmp_path / "run" / ALERTS_FILE).read_text().splitlines()
    assert json.loads(line)["name"] == "mean/many_pairs"
    events = EventAccumulator(str(tmp_path / "run"))
    events.Reload()
    assert "alerts/mean/many_pairs/text_summary" in events.Tags()["tensors"]


@pytest.mark.filterwarnings("ignore:Checkpoint directory")
def test_a_resumed_run_reports_what_an_uninterrupted_one_does(tmp_path: Path) -> None:
    class StopsAfter(L.Callback):
        def __init__(self, batches: int) -> None:
            self.batches = batches

        @override
        def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
            if trainer.global_step == self.batches:
                trainer.should_stop = True

    def train(callbacks: list[L.Callback], resume: str | None = None) -> tuple[MeanChosen, L.Trainer]:
        L.seed_everything(0, verbose=False)
        monitor = MeanChosen(every_n_updates=4)
        trainer = quiet_trainer(
            callbacks=[monitor, *callbacks], max_epochs=2, limit_val_batches=0, enable_checkpointing=bool(callbacks)
        )
        trainer.fit(PairRegression(), pair_loader(), ckpt_path=resume, weights_only=True if resume else None)
        return monitor, trainer

    whole, uninterrupted = train([])
    checkpoint = ModelCheckpoint(dirpath=tmp_path, save_last=True)
    first, _ = train([checkpoint, StopsAfter(6)])
    assert first.updates == 6
    second, resumed = train([ModelCheckpoint(dirpath=tmp_path, save_last=True)], str(tmp_path / "last.ckpt"))
    assert second.updates == whole.updates == 12
    assert resumed.callback_metrics["mean/pairs"] == uninterrupted.callback_metrics["mean/pairs"] == 16.0


def test_state_is_plain_survives_a_round_trip_and_refuses_another_version(tmp_path: Path) -> None:
    monitor = MeanChosen(every_n_updates=100)
    fit(monitor, limit_val_batches=0)
    monitor.receive(PairObservation(chosen_logps=torch.ones(3), rejected_logps=torch.zeros(3), row_ids=torch.arange(3)), "train")
    torch.save(monitor.state_dict(), tmp_path / "state")
    state = torch.load(tmp_path / "state", weights_only=True)
    kept = copy.deepcopy(state)
    other = MeanChosen(every_n_updates=1)
    other.load_state_dict(state)
    assert str(state) == str(kept)
    assert str(other.state_dict()) == str(monitor.state_dict())
    assert other.every_n_updates == 1
    with pytest.raises(ValueError, match="holds state of version 7 of MeanChosen; this release reads version 1"):
        other.load_state_dict({**state, "version": 7})


def test_a_monitor_lets_go_of_the_trainer_and_can_be_copied() -> None:
    monitor = MeanChosen(every_n_updates=3)
    fit(monitor)
    assert copy.deepcopy(monitor).updates == monitor.updates


@pytest.mark.parametrize(("name", "value"), [("every_n_updates", 0), ("silent_after", 0)])
def test_impossible_intervals_are_refused(name: str, value: int) -> None:
    with pytest.raises(ValueError, match=rf"`{name}` must be at least 1"):
        MeanChosen(**{name: value})


def test_an_observer_that_raises_raises() -> None:
    class Broken(MeanChosen):
        @override
        def update(self, accumulator: WeightedMeans, observation: Observation) -> None:
            raise ZeroDivisionError("broken monitor")

    with pytest.raises(ZeroDivisionError, match="broken monitor"):
        fit(Broken())


def test_testing_is_reported_at_its_end_and_predicting_is_left_to_its_caller() -> None:
    class Tests(PairRegression):
        @override
        def test_step(self, batch: Tensor, batch_idx: int) -> None:
            self._step(batch)

        @override
        def predict_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            return self._step(batch)

    monitor, series = MeanChosen(), Series()
    trainer = quiet_trainer(callbacks=[monitor], logger=series)
    trainer.test(Tests(), pair_loader(8), verbose=False)
    assert series.series["test/mean/pairs"] == {0: 8.0}
    trainer.predict(Tests(), pair_loader(8), return_predictions=False)
    assert set(monitor.measured_state()["heard"]) == {"test"}
