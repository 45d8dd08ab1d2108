"""Two processes that share the fixed sets measure what one process measures with all of them: real DDP over gloo."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from gloo_ranks import launched
from speakers import quiet_trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader
from typing_extensions import override

from lightning_pref import TaskSwitch, observe
from lightning_pref.callbacks.stability_gap import StabilityGapEvaluator
from lightning_pref.measures.forgetting import ProbeScores
from lightning_pref.reports import RunRecord

pytestmark = pytest.mark.slow

RANKS = 2
TASKS = {"old": (4, 3, 2), "new": (5,), "other": (2,)}  # sizes of batches: five in all, so that one rank has one to spare


class Regression(L.LightningModule):
    """The same rows on every rank, so that training does not depend on their number."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(3, 6), nn.Dropout(0.0), nn.Tanh(), nn.Linear(6, 1))

    @override
    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        if batch_idx == 4:
            observe(self, TaskSwitch(task="new"))
        return (self.layers(batch[:, :3]) - batch[:, 3:]).square().mean()

    @override
    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.3)


def rows(count: int, seed: int) -> Tensor:
    return torch.randn(count, 4, generator=torch.Generator().manual_seed(seed))


def run(folder: Path, ranks: int) -> dict[str, Any]:
    calls: list[int] = []

    def score(module: Regression, batch: Tensor) -> ProbeScores:
        calls.append(len(batch))
        losses = (module.layers(batch[:, :3]) - batch[:, 3:]).square()[:, 0]
        return ProbeScores(losses, batch[:, 0].abs())

    tasks = {name: [rows(size, 10 * i + j) for j, size in enumerate(sizes)] for i, (name, sizes) in enumerate(TASKS.items())}
    evaluator = StabilityGapEvaluator(tasks, score, dense_updates=3, growth=1.5, budget=None)
    torch.manual_seed(0)
    module, record = Regression(), RunRecord()
    trainer = quiet_trainer(
        default_root_dir=folder,
        logger=[record],
        log_every_n_steps=1,
        callbacks=[evaluator],
        use_distributed_sampler=False,
        **{"devices": ranks, "strategy": "ddp"} if ranks > 1 else {"devices": 1},
    )
    data: Any = [rows(8, 100 + i) for i in range(12)]
    trainer.fit(module, DataLoader(data, batch_size=None))
    return {
        "calls": len(calls),
        "traces": {name: evaluator.trace(name) for name in TASKS},
        "gaps": {name: gap._asdict() for name, gap in evaluator.gaps().items()},
        "floors": {name: {"floor": evaluator.noise_floor(name)} for name in evaluator.gaps()},
        "alerts": [(alert.name, alert.since_step) for alert in evaluator.alerts if "expensive" not in alert.name],
        "metrics": {key: value.last for key, value in record.metrics.items()},
        "weights": {name: value.detach().clone() for name, value in module.state_dict().items()},
    }


def run_shared(folder: Path, _rank: int, ranks: int) -> dict[str, Any]:
    return run(folder, ranks)


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Of both ranks, and of one process."""
    folder = tmp_path_factory.mktemp("ranks")
    return [*launched(run_shared, folder, RANKS), run(folder, 1)]


def test_M6_all_ranks_measure_the_same_and_what_one_process_does(results: list[dict[str, Any]]) -> None:
    first, second, alone = results
    assert alone["traces"]["old"][0] == [0, 1, 2, 3, 4, 5, 6, 7, 9, 12]
    for name in TASKS:
        assert first["traces"][name] == second["traces"][name]
        assert first["traces"][name][0] == alone["traces"][name][0]
        assert first["traces"][name][1] == pytest.approx(alone["traces"][name][1], rel=1e-5)
    assert set(alone["gaps"]) == {"old", "other"}
    for part in ("gaps", "floors"):
        assert first[part] == second[part]
        for name, expected in alone[part].items():
            for field, value in expected.items():
                close = None if value is None else pytest.approx(value, rel=1e-4, abs=1e-6)
                assert first[part][name][field] == close, (name, field)
    assert first["alerts"] == second["alerts"] == alone["alerts"]


def test_every_rank_makes_as_many_forward_passes_and_both_together_hardly_more(results: list[dict[str, Any]]) -> None:
    first, second, alone = results
    evaluations = len(alone["traces"]["old"][0])
    assert alone["calls"] == 5 * evaluations
    assert first["calls"] == second["calls"] == 3 * evaluations


def test_what_is_logged_is_that_of_one_process(results: list[dict[str, Any]]) -> None:
    first, _, alone = results
    keys = {key for key in alone["metrics"] if key.startswith("stability_gap/") and "time_share" not in key}
    assert "stability_gap/min_acc" in keys
    assert "stability_gap/old/depth" in keys
    for key in keys:
        assert first["metrics"][key] == pytest.approx(alone["metrics"][key], rel=1e-4), key


def test_R7_the_weights_of_the_ranks_stay_equal(results: list[dict[str, Any]]) -> None:
    first, second, alone = (result["weights"] for result in results)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert all(torch.allclose(first[name], alone[name], atol=1e-6) for name in first)
