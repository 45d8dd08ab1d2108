"""A run that stops after any update and goes on ends with the same bits as one that never stopped."""

from __future__ import annotations

import logging
import os
import shutil
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from placed_loaders import PlacedLoader
from resumed_runs import MAKERS, checkpoint, checkpoints_by_step, dpo, pair_data, run
from rollouts import MOVING, speaker
from speakers import pair_rows
from torch import Tensor, nn
from torch.utils.data import DataLoader
from typing_extensions import override

from lightning_pref.callbacks import ExactResume
from lightning_pref.checkpoints import check_whole, checkpoints_of, read_manifest
from lightning_pref.commands.differences import first_difference, metrics_rows
from lightning_pref.models.adapters import LoraSettings
from lightning_pref.modules.dpo import DPOModule

ACCUMULATED = {"accumulate_grad_batches": 2}


def cut_off_after(whole: Path, folder: Path, step: int) -> Path:
    """The folder as it would be had the run been killed some time after the checkpoint of this update."""
    shutil.copytree(whole, folder)
    for later, path in checkpoints_by_step(folder).items():
        if later > step:
            path.unlink()
            path.with_name(path.name + ".json").unlink()
    return folder / "checkpoints" / f"step={step}.ckpt"


def check_resumes(tmp_path: Path, name: str, which: slice | Sequence[int], **settings: Any) -> None:
    """Resume a run after some of its updates, counted from the first, and compare the ends."""
    whole = tmp_path / "whole"
    run(whole, MAKERS[name], **settings)
    steps = sorted(checkpoints_by_step(whole))
    assert len(steps) > 4
    expected, rows = checkpoint(whole / "checkpoints" / f"step={steps[-1]}.ckpt"), metrics_rows(whole)
    chosen = steps[:-1][which] if isinstance(which, slice) else [steps[i] for i in which]
    for step in chosen:
        folder = tmp_path / f"from-{step}"
        run(folder, MAKERS[name], resume=cut_off_after(whole, folder, step), **settings)
        assert sorted(checkpoints_by_step(folder)) == steps
        found = checkpoint(folder / "checkpoints" / f"step={steps[-1]}.ckpt")
        assert first_difference(expected, found) is None, f"resumed after update {step}"
        assert metrics_rows(folder) == rows, f"resumed after update {step}"


@pytest.mark.parametrize(
    ("name", "which", "settings"),
    [
        ("sft", [5, 6], {}),  # at the end of an epoch, and after the first update of the next one
        ("reward", [1], ACCUMULATED),
        ("dpo", [0, 3], {}),
        ("dpo", [2], ACCUMULATED),
        ("grpo", [2, 3], {}),  # inside a rollout
        ("ppo", [1], {}),
    ],
)  # fmt: skip
def test_C1_a_run_resumed_inside_an_epoch_ends_with_the_same_bits(
    tmp_path: Path, name: str, which: list[int], settings: dict[str, Any]
) -> None:
    check_resumes(tmp_path, name, which, **settings)


@pytest.mark.slow
@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.parametrize("settings", [{}, ACCUMULATED], ids=["plain", "accumulated"])
def test_C1_a_run_resumed_after_any_update_ends_with_the_same_bits(tmp_path: Path, name: str, settings: dict[str, Any]) -> None:
    check_resumes(tmp_path, name, slice(None), **settings)


def test_C2_no_checkpoint_is_written_inside_a_window_of_accumulation(tmp_path: Path) -> None:
    run(tmp_path / "run", dpo, **ACCUMULATED)
    for path in checkpoints_by_step(tmp_path / "run").values():
        manifest = read_manifest(path)
        assert manifest is not None and manifest.batch % 2 == 0


def test_C1_a_run_that_was_stopped_by_max_steps_goes_on_as_a_longer_one(tmp_path: Path) -> None:
    """A constant schedule, so that the first part is that of the longer run."""
    for steps in (3, 6, 7):  # inside an epoch, at its end, inside the next one
        folder = tmp_path / str(steps)
        run(folder, dpo, max_steps=steps)
        run(folder, dpo, resume=checkpoints_by_step(folder)[steps])
    run(tmp_path / "whole", dpo)
    end = max(checkpoints_by_step(tmp_path / "whole"))
    expected = checkpoint(checkpoints_by_step(tmp_path / "whole")[end])
    for steps in (3, 6, 7):
        found = checkpoint(checkpoints_by_step(tmp_path / str(steps))[end])
        assert first_difference(expected, found) is None, f"after {steps} updates"
        assert metrics_rows(tmp_path / str(steps)) == metrics_rows(tmp_path / "whole")


class Signals(Callback):
    """Sends this process a signal in the middle of an update."""

    def __init__(self, number: int, batch: int) -> None:
        self.number, self.batch, self.sent = number, batch, 0

    @override
    def on_before_backward(self, trainer: L.Trainer, pl_module: L.LightningModule, loss: Tensor) -> None:
        self.sent += 1
        if self.sent == self.batch:
            os.kill(os.getpid(), self.number)


def test_a_run_that_is_told_to_leave_finishes_its_update_and_saves(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run(tmp_path / "whole", dpo, **ACCUMULATED)
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as left, caplog.at_level(logging.WARNING, "lightning_pref"):
        run(tmp_path / "parts", dpo, more=[Signals(signal.SIGTERM, 3)], **ACCUMULATED)
    assert left.value.code == 128 + signal.SIGTERM
    assert "Leaving on SIGTERM after update 2" in caplog.text and "--run.resume auto" in caplog.text
    assert signal.getsignal(signal.SIGTERM) == before
    newest = checkpoints_of(tmp_path / "parts" / "checkpoints")[0]
    assert newest.name == "step=2.ckpt"
    run(tmp_path / "parts", dpo, resume=newest, **ACCUMULATED)
    ends = [checkpoint(checkpoints_of(tmp_path / name / "checkpoints")[0]) for name in ("whole", "parts")]
    assert first_difference(*ends) is None
    assert metrics_rows(tmp_path / "whole") == metrics_rows(tmp_path / "parts")


def test_the_newest_and_the_best_checkpoints_are_kept(tmp_path: Path) -> None:
    keeper = ExactResume(
        str(tmp_path / "kept"), every_n_updates=1, every_n_epochs=None, keep_last=2, monitor="val/loss", keep_best=1
    )
    run(tmp_path / "run", dpo, more=[keeper])
    kept = sorted((tmp_path / "kept").glob("*.ckpt"))
    losses = {path.name: read_manifest(path).value for path in checkpoints_by_step(tmp_path / "run").values()}  # type: ignore[union-attr]
    assert set(losses.values()) == {None}, "nothing is monitored there"
    values = [float(row["val/loss"]) for row in metrics_rows(tmp_path / "run") if "val/loss" in row]
    manifests = {path.name: read_manifest(path) for path in kept}
    assert {manifest.step for manifest in manifests.values() if manifest} >= {11, 12}
    assert len(kept) in (2, 3)
    assert min(manifest.value for manifest in manifests.values() if manifest and manifest.value is not None) == pytest.approx(
        min(values), rel=1e-6
    )


def test_C6_another_number_of_processes_is_refused_inside_an_epoch_and_taken_between_two(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "run"
    run(folder, dpo, max_epochs=1)
    for step, path in checkpoints_by_step(folder).items():
        state = checkpoint(path)
        state["exact_resume"] |= {"world_size": 2, "ranks": state["exact_resume"]["ranks"] * 2}
        torch.save(state, folder / f"two-{step}.ckpt")
    with pytest.raises(
        ValueError, match=r"written by 2 process\(es\), 3 micro-batches into epoch 0, and this run has 1.*Go on with 2"
    ):
        run(folder, dpo, resume=folder / "two-3.ckpt")
    end = max(checkpoints_by_step(folder))
    with caplog.at_level(logging.WARNING, "lightning_pref"):
        run(folder, dpo, resume=folder / f"two-{end}.ckpt")
    assert "rows keep their order" in caplog.text


def test_data_that_has_changed_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "run"

    def keeper(**digests: str) -> ExactResume:
        made = ExactResume(str(folder / "own"), every_n_updates=1)
        made.digests = lambda: digests
        return made

    run(folder, dpo, more=[keeper(data="a", config="b")], max_epochs=1)
    resume = checkpoints_of(folder / "own")[0]
    with pytest.raises(ValueError, match="The data of this run is not what the checkpoint was made with.*--model.model"):
        run(folder, dpo, more=[keeper(data="z", config="b")], resume=resume)


def test_another_configuration_is_taken_and_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = tmp_path / "run"
    keeper = ExactResume(str(folder / "own"), every_n_updates=1)
    keeper.digests = lambda: {"config": "a"}
    run(folder, dpo, more=[keeper], max_epochs=1)
    keeper.digests = lambda: {"config": "b"}
    with caplog.at_level(logging.WARNING, "lightning_pref"):
        run(folder, dpo, more=[keeper], resume=checkpoints_of(folder / "own")[0])
    assert "The configuration is not the one of the checkpoint" in caplog.text


def test_going_back_to_an_earlier_checkpoint_leaves_the_other_branch_behind(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    run(folder, dpo)
    expected = metrics_rows(folder)
    resume = checkpoints_by_step(folder)[4]
    keeper = ExactResume(str(folder / "checkpoints"), every_n_updates=1, every_n_epochs=None, keep_last=1)
    run(folder, dpo, resume=resume, more=[keeper], max_steps=6)
    assert max(checkpoints_by_step(folder)) == 6, "a restart takes the branch that the metrics are of"
    run(folder, dpo, resume=checkpoints_by_step(folder)[6])
    assert metrics_rows(folder) == expected


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
def test_validating_a_checkpoint_is_no_resume(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    run(folder, dpo, max_steps=3)
    module, data, _ = dpo(folder)
    keeper = ExactResume(str(folder / "checkpoints"))
    trainer = L.Trainer(
        accelerator="cpu", logger=False, callbacks=[keeper], enable_progress_bar=False, enable_checkpointing=False, max_steps=2
    )
    trainer.validate(module, data, ckpt_path=str(checkpoints_by_step(folder)[3]), weights_only=True, verbose=False)
    assert keeper._loaded is None and data._place is None


class StopsAfter(Callback):
    """Ends training after so many micro-batches, as a timer does."""

    def __init__(self, batches: int) -> None:
        self.batches = batches

    @override
    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.batches -= 1
        trainer.should_stop = trainer.should_stop or self.batches == 0


def test_C2_training_that_is_stopped_inside_a_window_goes_on_from_before_it(tmp_path: Path) -> None:
    for name, stops in (("whole", []), ("parts", [StopsAfter(3)])):
        run(tmp_path / name, dpo, more=stops, **ACCUMULATED)
    assert sorted(checkpoints_by_step(tmp_path / "parts")) == [1]
    run(tmp_path / "parts", dpo, resume=checkpoints_by_step(tmp_path / "parts")[1], **ACCUMULATED)
    ends = [checkpoint(checkpoints_of(tmp_path / name / "checkpoints")[0]) for name in ("whole", "parts")]
    assert first_difference(*ends) is None


def test_what_a_callback_has_stopped_stays_stopped(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    run(folder, dpo, more=[StopsAfter(3)])
    rows, end = metrics_rows(folder), max(checkpoints_by_step(folder))
    run(folder, dpo, resume=checkpoints_by_step(folder)[end])
    assert max(checkpoints_by_step(folder)) == end == 3
    assert [row for row in metrics_rows(folder) if "loss" in row] == [row for row in rows if "loss" in row]


class AsksForTheLength(Callback):
    """Lightning loads the loaders early to answer, and forgets what it has loaded into them."""

    @override
    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        assert trainer.estimated_stepping_batches == 12


def test_C3_asking_for_the_length_of_the_run_does_not_lose_the_place(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    run(folder, dpo)
    end = max(checkpoints_by_step(folder))
    expected = checkpoint(checkpoints_by_step(folder)[end])
    run(folder, dpo, resume=checkpoints_by_step(folder)[4], more=[AsksForTheLength()])
    assert first_difference(expected, checkpoint(checkpoints_by_step(folder)[end])) is None


def adapted(folder: Path) -> Any:
    module = DPOModule(speaker(), optimizer=MOVING, lora=LoraSettings(r=2))
    return module, pair_data(folder), []


@pytest.mark.parametrize(("first", "second"), [(adapted, dpo), (dpo, adapted)], ids=["adapter-to-whole", "whole-to-adapter"])
def test_C4_a_checkpoint_of_another_model_is_refused_and_nothing_is_loaded_by_half(
    tmp_path: Path, first: Any, second: Any
) -> None:
    folder = tmp_path / "run"
    run(folder, first, max_steps=1)
    with pytest.raises(
        ValueError, match=r"of another model: .* that the model has and it has not .* settings the run was started"
    ):
        run(folder, second, resume=folder / "checkpoints" / "step=1.ckpt")


class Foreign(L.LightningModule):
    """Somebody's module with dropout, which draws from the global random numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(9, 8), nn.Dropout(0.5), nn.Linear(8, 1))

    @override
    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self.body(batch).square().mean()

    @override
    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=0.01)


def foreign(folder: Path, loader: type[DataLoader[Tensor]], resume: Path | None = None) -> dict[str, Tensor]:
    L.seed_everything(3, verbose=False)
    rows: Any = list(pair_rows(20))
    module = Foreign()
    trainer = L.Trainer(
        accelerator="cpu",
        max_epochs=2,
        logger=False,
        callbacks=[ExactResume(str(folder), every_n_updates=1, keep_last=-1)],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, loader(rows, batch_size=4), ckpt_path=None if resume is None else str(resume), weights_only=True)
    return module.state_dict()


def test_C1_somebody_elses_module_and_loader_resume_exactly(tmp_path: Path) -> None:
    expected = foreign(tmp_path / "whole", PlacedLoader)
    places = checkpoints_by_folder(tmp_path / "whole")
    assert sorted(places) == list(range(1, 11))
    for step in range(1, 10):
        found = foreign(tmp_path / f"from-{step}", PlacedLoader, places[step])
        assert all(torch.equal(expected[key], found[key]) for key in expected), f"after update {step}"


def test_a_loader_without_a_place_is_saved_between_epochs_only(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "lightning_pref"):
        expected = foreign(tmp_path / "whole", DataLoader)
    assert "cannot tell where it is" in caplog.text and "StatefulDataLoader" in caplog.text
    places = checkpoints_by_folder(tmp_path / "whole")
    assert sorted(places) == [5, 10]
    found = foreign(tmp_path / "rest", DataLoader, places[5])
    assert all(torch.equal(expected[key], found[key]) for key in expected)


class Endless(torch.utils.data.IterableDataset[Tensor]):
    """Rows without a number of them."""

    @override
    def __iter__(self) -> Any:  # Any: an iterator of rows
        return iter(list(pair_rows(8)))


def test_data_without_a_length_is_refused(tmp_path: Path) -> None:
    trainer = L.Trainer(
        accelerator="cpu", max_epochs=1, logger=False, callbacks=[ExactResume(str(tmp_path))], enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    with pytest.raises(ValueError, match="the training data has no length. Give it one by `limit_train_batches=N`"):
        trainer.fit(Foreign(), DataLoader(Endless(), batch_size=2))


def checkpoints_by_folder(folder: Path) -> dict[int, Path]:
    return {check_whole(path).step: path for path in checkpoints_of(folder)}


def test_settings_that_cannot_be_meant_are_refused() -> None:
    for wrong, message in (
        ({"keep_last": 0}, "`keep_last` must be at least 1, or -1 for all"),
        ({"keep_best": 2}, "`keep_best` .* and `monitor` .* go together"),
        ({"monitor": "val/loss"}, "go together"),
        ({"every_n_updates": 0}, "`every_n_updates` must be at least 1"),
        ({"every_minutes": 0.0}, "`every_minutes` must be more than 0"),
    ):
        with pytest.raises(ValueError, match=message):
            ExactResume(**wrong)  # type: ignore[arg-type]
