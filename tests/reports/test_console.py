from __future__ import annotations

import io
import logging
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch
from lightning.fabric.utilities.rank_zero import rank_zero_info
from rich.console import Console
from rich.progress import BarColumn
from transformers.utils.logging import disable_progress_bar, enable_progress_bar, is_progress_bar_enabled

from lightning_pref.reports.console import BAR_WIDTH, LIGHTNING_LOG, RunProgressBar, StartLine, readable_terminal


def test_idle_talk_is_kept_back_inside_and_only_there(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger=LIGHTNING_LOG)
    with readable_terminal():
        rank_zero_info("TPU available: False, using: 0 TPU cores")
        rank_zero_info("GPU available: True (cuda), used: True")
    assert [record.getMessage() for record in caplog.records] == ["GPU available: True (cuda), used: True"]
    rank_zero_info("TPU available: False, using: 0 TPU cores")
    assert len(caplog.records) == 2


def test_warnings_that_someone_can_act_on_come_through() -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with readable_terminal():
            warnings.warn("The dirpath has changed from a to b", UserWarning, stacklevel=1)
            warnings.warn("the learning rate is odd", UserWarning, stacklevel=1)
    assert [str(warning.message) for warning in caught] == ["the learning rate is odd"]


def fail_in_a_readable_terminal() -> None:
    with readable_terminal():
        assert not is_progress_bar_enabled()
        raise KeyError


def test_what_was_set_before_is_set_again_afterwards_also_after_an_error() -> None:
    ours, lightning, enabled = logging.getLogger("lightning_pref"), logging.getLogger(LIGHTNING_LOG), is_progress_bar_enabled()
    before = (ours.level, list(ours.handlers), list(lightning.filters))
    try:
        enable_progress_bar()
        with pytest.raises(KeyError):
            fail_in_a_readable_terminal()
        assert is_progress_bar_enabled()
        assert (ours.level, list(ours.handlers), list(lightning.filters)) == before
    finally:
        (enable_progress_bar if enabled else disable_progress_bar)()


def test_the_bar_shows_speed_loss_and_margin_under_short_names() -> None:
    logged = {
        "rewards/margins": torch.tensor(0.51234),
        "loss": torch.tensor(0.25),
        "throughput/rows_per_second": torch.tensor(153.3),
        "logps/chosen": torch.tensor(-3.0),
    }
    trainer: Any = SimpleNamespace(logged_metrics=logged)
    assert RunProgressBar().get_metrics(trainer, L.LightningModule()) == {"rows/s": "153", "loss": "0.250", "margin": "0.512"}


def test_the_bar_leaves_room_for_its_numbers() -> None:
    columns = RunProgressBar().configure_columns(L.Trainer(logger=False, accelerator="cpu"))
    assert [column.bar_width for column in columns if isinstance(column, BarColumn)] == [BAR_WIDTH]


class Linear(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(3, 2)
        self.layer.bias.requires_grad_(False)


@pytest.mark.parametrize("is_first", [True, False])
def test_the_start_line_tells_the_first_process_what_is_trained_and_where(is_first: bool) -> None:
    out = io.StringIO()
    trainer: Any = SimpleNamespace(is_global_zero=is_first)
    StartLine("dpo", Path("runs/dpo/x"), console=Console(file=out, width=40)).on_fit_start(trainer, Linear())
    expected = "dpo: 6 of 8 parameters are trained (75.00%); run folder runs/dpo/x\n"
    assert out.getvalue() == (expected if is_first else "")
