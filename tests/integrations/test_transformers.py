from __future__ import annotations

import json
import logging
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from speakers import quiet_trainer
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.data import DataLoader
from transformers import LlamaForCausalLM, TrainerCallback
from transformers_runs import (
    Chosen,
    PairTrainer,
    PublishingTrainer,
    Recorder,
    arguments,
    collate,
    logged,
    logps,
    pair_observation,
    pair_rows,
    run,
    weights,
)
from typing_extensions import override

from lightning_pref.alerts import Alert
from lightning_pref.callbacks import Throughput
from lightning_pref.callbacks.diagnostic import Diagnostic
from lightning_pref.callbacks.hosts import Host
from lightning_pref.callbacks.observe_outputs import ObserveOutputs
from lightning_pref.callbacks.probe import Probe
from lightning_pref.integrations.transformers import attach, observe, wants
from lightning_pref.observations import Observer, PairHiddenObservation, PairObservation, RewardObservation

TinyModel = Callable[..., LlamaForCausalLM]


class SameInLightning(L.LightningModule):
    """The step of `PairTrainer`."""

    def __init__(self, model: LlamaForCausalLM) -> None:
        super().__init__()
        self.model = model

    @override
    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        pair = pair_observation(self.model, batch)
        return -torch.nn.functional.logsigmoid(pair.chosen_logps - pair.rejected_logps).mean()

    @override
    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-2, weight_decay=0.0)


def test_events_and_losses_are_those_of_lightnings_trainer(tiny_model: TinyModel, tmp_path: Path) -> None:
    ours, theirs = Recorder(), Recorder()
    rows = pair_rows(12)
    run(
        tiny_model(),
        tmp_path,
        theirs,
        num_rows=12,
        gradient_accumulation_steps=2,
        num_train_epochs=2,
        train_sampling_strategy="sequential",
        lr_scheduler_type="constant",
        optim="adamw_torch",
    )
    trainer = quiet_trainer(
        max_epochs=2, accumulate_grad_batches=2, gradient_clip_val=1.0, callbacks=[ours], default_root_dir=tmp_path
    )
    loader: DataLoader[Any] = DataLoader(rows, batch_size=2, collate_fn=collate)  # type: ignore[arg-type]
    trainer.fit(SameInLightning(tiny_model()), loader)
    assert theirs.events == ours.events
    assert theirs.events[:4] == ["start", "backward", "batch of 2 waits, 0 so far", "backward"]
    assert theirs.losses == pytest.approx(ours.losses, rel=1e-5)
    assert theirs.norms == pytest.approx(ours.norms, rel=1e-5)


def test_the_line_in_compute_loss_reaches_a_monitor(tiny_model: TinyModel, tmp_path: Path) -> None:
    rows = collate(pair_rows(8))
    # Nothing moves at this learning rate, so that the mean over an epoch is that of the untouched model.
    trainer = run(tiny_model(), tmp_path, Chosen(every_n_updates=2), learning_rate=1e-12, save_strategy="no")
    values = logged(trainer, "chosen/logps")
    with torch.no_grad():
        expected = logps(tiny_model(), rows["chosen"]).mean().item()
    assert sorted(values) == [2, 4]
    assert sum(values.values()) / 2 == pytest.approx(expected, rel=1e-4)


def test_an_unedited_trainer_read_through_its_outputs_gives_the_same_numbers(tiny_model: TinyModel, tmp_path: Path) -> None:
    told = run(tiny_model(), tmp_path, Chosen(every_n_updates=1))
    read = run(tiny_model(), tmp_path, Chosen(every_n_updates=1), ObserveOutputs(), trainer_class=PairTrainer)
    assert logged(told, "chosen/logps") == logged(read, "chosen/logps")
    assert len(logged(told, "chosen/logps")) == 4


def test_validation_is_kept_apart_and_spelt_as_transformers_does(tiny_model: TinyModel, tmp_path: Path) -> None:
    recorder, held_out = Recorder(), pair_rows(4, seed=1)
    sets = {"near": held_out[:2], "far": held_out[2:]}
    settings: dict[str, Any] = {"eval_strategy": "epoch", "learning_rate": 1e-12}
    trainer = run(tiny_model(), tmp_path, Chosen(), recorder, eval_dataset=sets, **settings)
    for name, rows in sets.items():
        with torch.no_grad():
            expected = logps(tiny_model(), collate(rows)["chosen"]).mean().item()
        assert logged(trainer, f"eval_{name}_chosen/logps") == {4: pytest.approx(expected, rel=1e-4)}
    assert recorder.events[-4:] == ["epoch", "validation", "validation", "finish"]
    single = run(tiny_model(), tmp_path, Chosen(), eval_dataset=held_out, **settings)
    assert list(logged(single, "eval_chosen/logps")) == [4]


def test_gradients_are_shown_before_they_are_clipped(tiny_model: TinyModel, tmp_path: Path) -> None:
    recorder = Recorder()
    trainer = run(tiny_model(), tmp_path, recorder, max_grad_norm=1e-3, logging_steps=1)
    assert recorder.norms == pytest.approx(list(logged(trainer, "grad_norm").values()), rel=1e-5)
    assert min(recorder.norms) > 1e-2
    assert {type(optimizer) for optimizer in recorder.optimizers} == {torch.optim.AdamW}


def test_gradients_are_shown_where_nothing_is_clipped(tiny_model: TinyModel, tmp_path: Path) -> None:
    recorder = Recorder()
    run(tiny_model(), tmp_path, recorder, max_grad_norm=0.0)
    assert recorder.updates == len(recorder.norms) == 4


def test_diagnostics_change_no_weight(tiny_model: TinyModel, tmp_path: Path) -> None:
    finals = []
    for parts in (
        [],
        [Chosen(every_n_updates=1), Recorder(), Probe("fixed", [collate(pair_rows(2))], _noisy, every_n_updates=1)],
    ):
        model = tiny_model(attention_dropout=0.3)
        run(model, tmp_path, *parts, trainer_class=PairTrainer if not parts else PublishingTrainer, logging_steps=1)
        finals.append(weights(model))
    assert all(torch.equal(value, finals[1][name]) for name, value in finals[0].items())
    assert not torch.equal(finals[0]["lm_head.weight"], tiny_model().lm_head.weight)


def _noisy(model: LlamaForCausalLM, batch: Any) -> PairObservation:
    torch.rand(3)
    return pair_observation(model, batch)


def test_a_probe_measures_the_transformers_model_before_and_after(tiny_model: TinyModel, tmp_path: Path) -> None:
    fixed, model = collate(pair_rows(2, seed=7)), tiny_model()
    probe = Probe("fixed", [fixed], pair_observation, every_n_updates=2, budget=None)
    values = logged(run(model, tmp_path, probe, Chosen()), "probe/fixed/chosen/logps")
    assert sorted(values) == [0, 2, 4]
    with torch.no_grad():
        expected = [logps(m.eval(), fixed["chosen"]).mean().item() for m in (tiny_model(), model)]
    assert [values[0], values[4]] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("told_to_look", [True, False])
def test_a_resumed_run_equals_one_without_interruption(tiny_model: TinyModel, tmp_path: Path, told_to_look: bool) -> None:
    def parts() -> tuple[Chosen, Recorder]:
        return Chosen(every_n_updates=4), Recorder()

    settings: dict[str, Any] = {"num_rows": 16, "save_strategy": "steps", "save_steps": 3}
    whole = run(tiny_model(), tmp_path / "whole", *parts(), **settings)
    for folder in ("checkpoint-6", "checkpoint-8"):  # leaves the one in the middle of a window
        (tmp_path / "whole" / folder).rename(tmp_path / folder)
    resumed_parts = parts()
    resume: Any = True if told_to_look else str(tmp_path / "whole" / "checkpoint-3")
    resumed = run(tiny_model(), tmp_path / "whole", *resumed_parts, resume=resume, **settings)
    assert logged(resumed, "chosen/logps") == logged(whole, "chosen/logps")
    assert resumed_parts[0].updates == resumed_parts[1].updates == 8
    for name, value in weights(whole.model).items():
        assert torch.equal(value, resumed.model.state_dict()[name])


def test_a_checkpoint_without_diagnostics_resumes_with_a_word(
    tiny_model: TinyModel, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run(tiny_model(), tmp_path, save_strategy="steps", save_steps=2, max_steps=2)
    with caplog.at_level(logging.WARNING, logger="lightning_pref"):
        monitor = Chosen()
        run(tiny_model(), tmp_path, monitor, resume=True, max_steps=4)
    assert "holds no diagnostics.pt; the diagnostics begin anew at the step it resumes from" in caplog.text
    assert monitor.updates == 2


def test_silence_raises_with_the_lines_for_this_trainer(tiny_model: TinyModel, tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match="received no PairObservation in the first 3 training batches of LlamaForCausalLM"
    ) as error:
        run(tiny_model(), tmp_path, Chosen(silent_after=3), trainer_class=PairTrainer)
    call = "PairObservation(chosen_logps=..., rejected_logps=..., row_ids=...)"
    assert f"Publish one from your compute_loss:  observe(self, {call})" in str(error.value)
    assert f"attach(trainer, Chosen(...), ObserveOutputs(lambda out, batch: {call}))" in str(error.value)
    assert "It did receive: nothing." in str(error.value)


class Alarm(Recorder):
    """Raises an alert at the second update and one at the very end."""

    @override
    def before_update(self, host: Host, optimizer: torch.optim.Optimizer) -> None:
        host.log({"alarm/updates": torch.tensor(float(self.updates))})
        if self.updates == 1:
            self._raise(host, "early")

    @override
    def finish(self, host: Host) -> None:
        self._raise(host, "late")

    def _raise(self, host: Host, name: str) -> None:
        self.raise_alert(
            host, Alert(level="critical", name=f"alarm/{name}", since_step=1, step=host.step, evidence="Hot.", advice="Run.")
        )


def test_values_and_alerts_reach_tensorboard_console_and_file(
    tiny_model: TinyModel, tmp_path: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "board"))
    with caplog.at_level(logging.WARNING, logger="lightning_pref"):
        trainer = run(tiny_model(), tmp_path, Alarm(), report_to="tensorboard", logging_steps=1)
    assert [json.loads(line)["name"] for line in (tmp_path / "alerts.jsonl").read_text().splitlines()] == [
        "alarm/early",
        "alarm/late",
    ]
    assert caplog.text.count("CRITICAL alarm/early since step 1: Hot. Run.") == 1
    assert len(list((tmp_path / "board").iterdir())) == 1
    board = EventAccumulator(str(tmp_path / "board"))
    board.Reload()
    assert [event.value for event in board.Scalars("train/alarm/updates")] == [0.0, 1.0, 2.0, 3.0]
    assert {"alerts/alarm/early/text_summary", "alerts/alarm/late/text_summary"} <= set(board.Tags()["tensors"])
    # The trainer's own entries are all there, and only they are printed.
    assert sorted(logged(trainer, "loss")) == [1, 2, 3, 4]
    printed = capsys.readouterr().out
    assert "'loss'" in printed
    assert "alarm" not in printed


def test_the_trainer_is_left_as_it_was(tiny_model: TinyModel, tmp_path: Path) -> None:
    trainer = PublishingTrainer(tiny_model(), arguments(tmp_path), train_dataset=pair_rows(4), data_collator=collate)
    attached = attach(trainer, Chosen())
    trainer.train()
    assert "compute_loss" not in vars(trainer)
    assert not {"backward", "unscale_gradients"} & set(vars(trainer.accelerator))
    attached.detach()
    assert "train" not in vars(trainer)
    broken = PairTrainer(tiny_model(), arguments(tmp_path), train_dataset=pair_rows(4), data_collator=collate)
    silent = Chosen(silent_after=1)
    attach(broken, silent)
    with pytest.raises(ValueError, match="received no PairObservation"):
        broken.train()
    assert "compute_loss" not in vars(broken)
    assert not wants(broken, PairObservation)


def test_outside_of_training_nothing_is_observed(tiny_model: TinyModel, tmp_path: Path) -> None:
    trainer = PublishingTrainer(
        tiny_model(), arguments(tmp_path), train_dataset=pair_rows(4), eval_dataset=pair_rows(2), data_collator=collate
    )
    observe(trainer, pair_observation(tiny_model(), collate(pair_rows(2))))  # nothing attached: nothing happens
    monitor = Chosen()
    attach(trainer, monitor)
    trainer.evaluate()
    assert monitor.measured_state()["heard"] == {}
    trainer.train()
    heard = monitor.measured_state()
    trainer.evaluate()
    assert heard["heard"] == monitor.measured_state()["heard"] == {"train": 0}


def test_a_loss_can_ask_what_is_wanted(tiny_model: TinyModel, tmp_path: Path) -> None:
    asked: list[tuple[bool, bool]] = []

    class Asking(PublishingTrainer):
        @override
        def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
            asked.append((wants(self, PairObservation), wants(self, PairHiddenObservation)))
            return super().compute_loss(*args, **kwargs)

    run(tiny_model(), tmp_path, Chosen(), trainer_class=Asking)
    assert set(asked) == {(True, False)}


def test_an_extract_may_make_any_observation(tiny_model: TinyModel, tmp_path: Path) -> None:
    def rewards(outputs: Any, batch: Any) -> RewardObservation:
        return RewardObservation(rewards=outputs["chosen_logps"], prompt_ids=batch["row_ids"])

    with pytest.raises(ValueError, match="It did receive: RewardObservation"):
        run(tiny_model(), tmp_path, Chosen(silent_after=2), ObserveOutputs(rewards), trainer_class=PairTrainer)


def test_return_outputs_may_be_given_by_place(tiny_model: TinyModel, tmp_path: Path) -> None:
    class Terse(PairTrainer):
        @override
        def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> torch.Tensor:
            loss = self.compute_loss(model, inputs, False, num_items_in_batch)
            assert isinstance(loss, torch.Tensor)
            self.accelerator.backward(loss)
            return loss.detach()

    trainer = run(tiny_model(), tmp_path, Chosen(every_n_updates=1), ObserveOutputs(), trainer_class=Terse)
    assert len(logged(trainer, "chosen/logps")) == 4


def test_updates_are_counted_after_a_start_with_too_large_batches(tiny_model: TinyModel, tmp_path: Path) -> None:
    class Crowded(PublishingTrainer):
        @override
        def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            if len(inputs["row_ids"]) > 1:
                raise RuntimeError("CUDA out of memory. Tried to allocate 2 GiB.")
            return super().compute_loss(model, inputs, *args, **kwargs)

    monitor = Chosen()
    trainer = run(tiny_model(), tmp_path, monitor, trainer_class=Crowded, auto_find_batch_size=True)
    assert monitor.updates == trainer.state.global_step == 8


def test_a_compute_loss_that_hands_no_outputs_out_is_named(tiny_model: TinyModel, tmp_path: Path) -> None:
    class Closed(PairTrainer):
        @override
        def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None) -> Any:
            return super().compute_loss(model, inputs)

    with pytest.raises(TypeError, match="that of Closed should return `\\(loss, outputs\\)`, and returned a Tensor"):
        run(tiny_model(), tmp_path, Chosen(), ObserveOutputs(), trainer_class=Closed)


@pytest.mark.slow
def test_the_adapter_and_its_readers_import_without_trl() -> None:
    code = "import sys, lightning_pref.integrations.trl; print('trl' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


class Searching(TrainerCallback):
    """What a hyper-parameter search does to the state of each of its runs."""

    @override
    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        state.is_hyper_param_search = True


def test_a_hyper_parameter_search_is_refused(tiny_model: TinyModel, tmp_path: Path) -> None:
    trainer = PairTrainer(
        tiny_model(), arguments(tmp_path), train_dataset=pair_rows(4), data_collator=collate, callbacks=[Searching()]
    )
    attach(trainer, Chosen())
    with pytest.raises(ValueError, match="Diagnostics follow one run; a hyper-parameter search is many"):
        trainer.train()


class Deaf(Diagnostic, Observer):
    """Hears Lightning only."""

    prefix = "deaf"
    consumes = (PairObservation,)

    @override
    def on_observation(self, trainer: Any, pl_module: Any, observation: Any, source: str) -> None:
        pass


def test_attach_says_what_it_does_not_take(tiny_model: TinyModel, tmp_path: Path) -> None:
    trainer = PairTrainer(tiny_model(), arguments(tmp_path), train_dataset=pair_rows(4), data_collator=collate)
    with pytest.raises(TypeError, match="got a Throughput, which needs Lightning's Trainer"):
        attach(trainer, Throughput())
    with pytest.raises(TypeError, match="Deaf hears observations from Lightning's Trainer only; give it a `receive`"):
        attach(trainer, Deaf())
    with pytest.raises(ValueError, match="Two diagnostics share the name 'Chosen'"):
        attach(trainer, Chosen(), Chosen())
    attach(trainer, Chosen())
    with pytest.raises(ValueError, match="attached to this PairTrainer already"):
        attach(trainer, Recorder())
