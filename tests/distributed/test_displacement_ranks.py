"""The trackers of pairs over two processes: the numbers and the worst rows are those of all rows together."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gloo_ranks import launched
from paired_vectors import Notebook, PairedVectors, random_pairs
from speakers import quiet_trainer
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_pref import PairObservation
from lightning_pref.callbacks import Probe
from lightning_pref.callbacks.displacement import LikelihoodDisplacementTracker

pytestmark = pytest.mark.slow

RANKS = 2
# Of each rank the rows of two batches, of unequal number.
SHARES = [[[0, 1, 2], [3, 4]], [[5, 6], [7]]]
PROBE = [torch.tensor([0, 1]), torch.tensor([2]), torch.tensor([3, 4, 5])]
WEIGHT = [0.7, -0.4, 0.2]

Result = dict[str, Any]


def score(module: PairedVectors, rows: Tensor) -> PairObservation:
    return module.pair(rows)


def still_run(folder: Path, batches: list[list[int]], ranks: int) -> Result:
    """One epoch of a policy that differs from its reference and is not moved."""
    module = PairedVectors(random_pairs(8), learning_rate=0.0)
    module.weight.data = torch.tensor(WEIGHT)
    tracker = LikelihoodDisplacementTracker(ches=True, details=True, num_worst=4)
    probe = Probe("fixed", PROBE, score, every_n_updates=1, budget=None)
    notebook = Notebook()
    parallel: dict[str, Any] = {"devices": ranks, "strategy": "ddp"} if ranks > 1 else {"devices": 1}
    trainer = quiet_trainer(
        default_root_dir=folder,
        logger=[notebook],
        log_every_n_steps=2,
        callbacks=[probe, tracker],
        use_distributed_sampler=False,
        **parallel,
    )
    trainer.fit(module, DataLoader([torch.tensor(batch) for batch in batches], batch_size=None))  # type: ignore[arg-type]
    return {
        "entries": [values for _, values in notebook.entries],
        "worst": {source: list(tracker.worst_rows(source)) for source in ("train", "probe/fixed")},
        "alerts": [(alert.source, alert.name, alert.evidence) for alert in tracker.alerts],
        "table": tracker.history().column("row_ids").tolist(),
    }


def run_share(folder: Path, rank: int, ranks: int) -> Result:
    return still_run(folder, SHARES[rank], ranks)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[Result]:
    """Of rank 0, of rank 1, and of one process with all rows."""
    folder = tmp_path_factory.mktemp("ranks")
    together = [SHARES[0][step] + SHARES[1][step] for step in (0, 1)]
    return [*launched(run_share, folder, RANKS), still_run(folder, together, 1)]


def reports(run: Result, prefix: str) -> list[dict[str, float]]:
    return [values for values in run["entries"] if f"{prefix}displacement/share" in values]


@pytest.mark.parametrize("prefix", ["", "probe/fixed/"])
def test_N5_every_number_is_that_of_one_process_with_all_rows(runs: list[Result], prefix: str) -> None:
    first, second, alone = (reports(run, prefix) for run in runs)
    assert len(first) == len(alone) == (3 if prefix else 1)
    for ours, theirs, expected in zip(first, second, alone, strict=True):
        assert ours == pytest.approx(expected, nan_ok=True)
        assert theirs == pytest.approx(expected, nan_ok=True)


def test_N5_the_numbers_are_those_of_numpy(runs: list[Result]) -> None:
    changes = (random_pairs(8) @ torch.tensor(WEIGHT)).double().numpy()
    (found,) = reports(runs[0], "")
    assert found["displacement/chosen_logp_change"] == pytest.approx(changes[:, 0].mean(), rel=1e-5)
    assert found["displacement/share"] == (changes[:, 0] < 0).mean()
    assert found["displacement/chosen_logp_change_median"] == pytest.approx(np.median(changes[:, 0]), rel=1e-5)


def test_the_worst_rows_are_those_of_all_ranks_on_every_rank(runs: list[Result]) -> None:
    first, second, alone = runs
    for source in ("train", "probe/fixed"):
        assert first["worst"][source] != []
        # As text, in which nan equals nan.
        assert str(first["worst"][source]) == str(second["worst"][source]) == str(alone["worst"][source])
    assert first["alerts"] == second["alerts"]


def test_each_rank_keeps_the_table_of_its_own_rows(runs: list[Result]) -> None:
    assert [run["table"] for run in runs[:2]] == [[1000, 1001, 1002, 1003, 1004], [1005, 1006, 1007]]
