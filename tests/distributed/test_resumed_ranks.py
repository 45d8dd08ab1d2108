"""What each of two processes has measured survives a checkpoint that one of them writes."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from gloo_ranks import launched
from lightning.pytorch.callbacks import ModelCheckpoint
from paired_vectors import Notebook, PairedVectors, random_pairs
from speakers import quiet_trainer
from torch.utils.data import DataLoader

from lightning_pref.callbacks.displacement import LikelihoodDisplacementTracker

pytestmark = pytest.mark.slow

SHARES = [[[0, 1, 2], [3, 4]], [[5, 6], [7]]]


def fit(folder: Path, rank: int, epochs: int, *, save: bool = False, resume: Path | None = None) -> dict[str, Any]:
    """Train on this rank's share; the weights move, and no reference says where they began."""
    tracker = LikelihoodDisplacementTracker(details=True, every_n_updates=3)  # a report falls due in the middle of an epoch
    notebook = Notebook()
    trainer = quiet_trainer(
        devices=2,
        strategy="ddp",
        default_root_dir=folder,
        logger=[notebook],
        max_epochs=epochs,
        callbacks=[tracker, *([ModelCheckpoint(dirpath=folder, filename="first")] if save else [])],
        enable_checkpointing=save,
        use_distributed_sampler=False,
    )
    module = PairedVectors(random_pairs(8), tells_reference=False)
    batches: Any = [torch.tensor(batch) for batch in SHARES[rank]]
    trainer.fit(module, DataLoader(batches, batch_size=None), ckpt_path=resume, weights_only=True if resume else None)
    return {
        "reports": {step: values for step, values in notebook.entries if "displacement/share" in values},
        "rows": tracker.history().column("row_ids").tolist(),
        "anchors": tracker.history().column("anchor_step").tolist(),
    }


def whole_and_resumed(folder: Path, rank: int, _ranks: int) -> tuple[dict[str, Any], dict[str, Any]]:
    whole = fit(folder, rank, 3)
    fit(folder, rank, 1, save=True)
    return whole, fit(folder, rank, 3, resume=folder / "first.ckpt")


def test_a_resumed_run_of_two_processes_reports_what_an_uninterrupted_one_does(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for rank, (whole, resumed) in enumerate(launched(whole_and_resumed, tmp_path, 2)):
        assert resumed["rows"] == whole["rows"] == [1000 + row for batch in SHARES[rank] for row in batch]
        assert resumed["anchors"] == whole["anchors"]
        later = {step: values for step, values in whole["reports"].items() if step > 2}
        assert resumed["reports"].keys() == later.keys()
        for step, values in later.items():
            assert resumed["reports"][step] == pytest.approx(values, nan_ok=True)

    saved = torch.load(tmp_path / "first.ckpt", weights_only=True)["callbacks"]["LikelihoodDisplacementTracker"]
    with caplog.at_level(logging.WARNING):
        LikelihoodDisplacementTracker(details=True).load_state_dict(saved)
    assert "measured in 2 process(es), and the run goes on with 1: all go on from what the first one measured" in caplog.text
