"""What every callback of the package promises, checked on each of them; a new one without a case here fails the first test."""

from __future__ import annotations

import copy
import pickle
import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from speakers import MeanChosen, pair_rows, quiet_trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader
from typing_extensions import override

from lightning_pref import (
    PairHiddenObservation,
    PairObservation,
    RewardObservation,
    callbacks,
    observe,
    wants,
)
from lightning_pref.callbacks import (
    Diagnostic,
    EntanglementMonitor,
    ExactResume,
    FaultAdvice,
    GoldReward,
    LikelihoodDisplacementTracker,
    LostUpdateMeter,
    MassShift,
    Monitor,
    NonFiniteGuard,
    ObserveOutputs,
    OveroptimizationMonitor,
    Probe,
    RewardModelProbe,
    RewardVarianceMonitor,
    SpikeAwareOptimizerReset,
    StabilityGapEvaluator,
    Throughput,
)
from lightning_pref.callbacks.entanglement import GradientObservation
from lightning_pref.callbacks.stability_gap import ProbeScores
from lightning_pref.callbacks.throughput import Work
from lightning_pref.models.first_difference import FirstDifferenceObservation
from lightning_pref.reports import RunRecord


class Publisher(L.LightningModule):
    """Somebody's module with dropout that publishes every kind of evidence it has."""

    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Dropout(dropout))
        self.head = nn.Linear(8, 1)

    def pair(self, batch: Tensor) -> tuple[PairObservation, PairHiddenObservation]:
        """Both sides' states and the scores a head gives them."""
        chosen, rejected = self.body(batch[:, :4]), self.body(batch[:, 4:8])
        lengths = torch.full((len(batch),), 3)
        rows = batch[:, 8].long()
        scores = PairObservation(
            chosen_logps=self.head(chosen)[:, 0],
            rejected_logps=self.head(rejected)[:, 0],
            row_ids=rows,
            chosen_lengths=lengths,
            rejected_lengths=lengths,
        )
        hidden = PairHiddenObservation(
            chosen_hidden=chosen, rejected_hidden=rejected, chosen_lengths=lengths, rejected_lengths=lengths, row_ids=rows
        )
        return scores, hidden

    @override
    def training_step(self, batch: Tensor, batch_idx: int) -> dict[str, Tensor]:
        scores, hidden = self.pair(batch)
        observe(self, scores)
        if wants(self, PairHiddenObservation):
            observe(self, hidden)
        rewards = torch.cat([scores.chosen_logps, scores.rejected_logps])
        observe(self, RewardObservation(rewards=rewards, prompt_ids=scores.row_ids.repeat(2)))
        loss = nn.functional.softplus(scores.rejected_logps - scores.chosen_logps).mean()
        return {
            "loss": loss,
            "chosen_logps": scores.chosen_logps,
            "rejected_logps": scores.rejected_logps,
            "row_ids": scores.row_ids,
        }

    @override
    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=0.02)
        schedule = torch.optim.lr_scheduler.LinearLR(optimizer, total_iters=20)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def score_pairs(module: Publisher, batch: Tensor) -> PairObservation:
    torch.rand(3)
    return module.pair(batch)[0]


def score_examples(module: Publisher, batch: Tensor) -> ProbeScores:
    torch.rand(3)
    seen = module.pair(batch)[0]
    margin = seen.chosen_logps - seen.rejected_logps
    return ProbeScores(values=nn.functional.softplus(-margin), weights=torch.ones_like(margin))


def score_gradients(module: Publisher, batch: Tensor) -> list[PairObservation | GradientObservation]:
    seen = module.pair(batch)[0]
    ones = torch.ones_like(seen.chosen_logps)
    return [
        seen,
        GradientObservation(
            row_ids=seen.row_ids,
            chosen_square=ones,
            rejected_square=2 * ones,
            cross=0.5 * ones,
            chosen_logps=seen.chosen_logps,
            rejected_logps=seen.rejected_logps,
        ),
    ]


def score_first_differences(module: Publisher, batch: Tensor) -> FirstDifferenceObservation:
    seen, hidden = module.pair(batch)
    return FirstDifferenceObservation(
        row_ids=seen.row_ids,
        position=torch.zeros_like(seen.row_ids),
        chosen_tokens=torch.zeros_like(seen.row_ids),
        rejected_tokens=torch.ones_like(seen.row_ids),
        token_logps=hidden.chosen_hidden.log_softmax(-1),
        candidate_logps=torch.stack([seen.chosen_logps, seen.rejected_logps], dim=1) - 5.0,
    )


def score_rewards(module: Publisher, batch: Tensor) -> RewardObservation:
    seen = module.pair(batch)[0]
    return RewardObservation(rewards=torch.cat([seen.chosen_logps, seen.rejected_logps]), prompt_ids=seen.row_ids.repeat(2))


def answer(module: L.LightningModule, prompts: Any) -> list[str]:
    return [prompt * 2 for prompt in prompts]


FIXED = pair_rows(6, seed=5)

# Constructors with settings under which a run of a few updates makes the callback do all it can do.
CASES: dict[str, Callable[[], Callback]] = {
    "EntanglementMonitor": EntanglementMonitor,
    "ExactResume": lambda: ExactResume(tempfile.mkdtemp(), every_n_updates=2),
    "FaultAdvice": FaultAdvice,
    "GoldReward": lambda: GoldReward(["a", "bb"], answer, lambda prompt, response: float(len(response)), every_n_updates=2),
    "LikelihoodDisplacementTracker": lambda: LikelihoodDisplacementTracker(every_n_updates=2),
    "LostUpdateMeter": lambda: LostUpdateMeter(every_n_updates=2),
    "MassShift": MassShift,
    "NonFiniteGuard": NonFiniteGuard,
    "ObserveOutputs": ObserveOutputs,
    "OveroptimizationMonitor": lambda: OveroptimizationMonitor(every_n_updates=2),
    "Probe": lambda: Probe("fixed", [FIXED], score_pairs, every_n_updates=2, budget=None),
    "RewardModelProbe": lambda: RewardModelProbe("fixed", [FIXED], score_rewards, every_n_updates=2, budget=None),
    "RewardVarianceMonitor": lambda: RewardVarianceMonitor(every_n_updates=2),
    "SpikeAwareOptimizerReset": lambda: SpikeAwareOptimizerReset(reset_every=4, warmup_steps=2, guard_steps=1, threshold=2.0),
    "SpikeAwareOptimizerReset(evidence)": lambda: SpikeAwareOptimizerReset("evidence", guard_steps=1, min_history=4),
    "StabilityGapEvaluator": lambda: StabilityGapEvaluator(
        tasks={"old": [FIXED]}, score=score_examples, kind="loss", dense_updates=3, budget=None
    ),
    "Throughput": lambda: Throughput(lambda batch: Work(tokens=batch.numel(), rows=len(batch))),
}
# They act on training by their name; everything else must not.
ACTING = {"SpikeAwareOptimizerReset", "SpikeAwareOptimizerReset(evidence)"}
# What consumes observations is fed by the module; a probe alone would have nobody to tell.
COMPANIONS: dict[str, Callable[[], list[Callback]]] = {
    "EntanglementMonitor": lambda: [Probe("pairs", [FIXED], score_gradients, every_n_updates=2, budget=None)],
    "MassShift": lambda: [Probe("pairs", [FIXED], score_first_differences, every_n_updates=2, budget=None)],
    "Probe": lambda: [MeanChosen(every_n_updates=2)],
    "ObserveOutputs": lambda: [MeanChosen(every_n_updates=2)],
}
every_callback = pytest.mark.parametrize("name", sorted(CASES))


def companions(name: str) -> list[Callback]:
    return COMPANIONS.get(name, list)()


def train(callbacks: list[Callback], *, resume: str | None = None, dropout: float = 0.3, **settings: Any) -> Publisher:
    L.seed_everything(11, verbose=False)
    module = Publisher(dropout)
    trainer = quiet_trainer(callbacks=callbacks, **{"max_epochs": 2, "log_every_n_steps": 2, **settings})
    rows: Any = list(pair_rows(24))
    trainer.fit(module, DataLoader(rows, batch_size=4), ckpt_path=resume, weights_only=True if resume else None)
    return module


def weights(module: Publisher) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in module.state_dict().items()}


def assert_equal(a: Any, b: Any, where: str = "state") -> None:
    """Plain data, tensors compared bit for bit; seconds, which differ from run to run, left aside."""
    assert type(a) is type(b), where
    if isinstance(a, Tensor):
        assert torch.equal(torch.nan_to_num(a, nan=-1e30), torch.nan_to_num(b, nan=-1e30)), where
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            if key not in ("spent", "trained", "last_cost"):
                assert_equal(a[key], b[key], f"{where}.{key}")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), where
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_equal(x, y, f"{where}[{i}]")
    else:
        assert a == b or a != a, where


def test_every_callback_has_a_case() -> None:
    classes = {name for name in callbacks.__all__ if issubclass(getattr(callbacks, name), Callback)}
    assert classes - {"Diagnostic", "Monitor"} == {name.split("(")[0] for name in CASES}
    assert isinstance(CASES["RewardVarianceMonitor"](), Monitor)


@every_callback
def test_M4_training_is_bit_identical_with_it(name: str) -> None:
    if name in ACTING:
        pytest.skip("changes training on purpose")
    alone = weights(train([]))
    watched = weights(train([CASES[name](), *companions(name)]))
    assert all(torch.equal(alone[key], watched[key]) for key in alone)


@every_callback
def test_C5_state_is_plain_and_survives_a_round_trip(name: str, tmp_path: Path) -> None:
    callback = CASES[name]()
    train([callback, *companions(name)])
    torch.save(callback.state_dict(), tmp_path / "state")
    state = torch.load(tmp_path / "state", weights_only=True)
    kept = copy.deepcopy(state)
    other = CASES[name]()
    other.load_state_dict(state)
    assert_equal(state, kept)
    assert_equal(other.state_dict(), kept)


@every_callback
@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
def test_C5_a_run_resumed_with_it_ends_as_an_uninterrupted_one(name: str, tmp_path: Path) -> None:
    whole = CASES[name]()
    # No dropout: random states are not part of Lightning's checkpoints.
    expected = weights(train([whole, *companions(name)], dropout=0.0))
    path = tmp_path / "middle.ckpt"
    checkpoint = ModelCheckpoint(dirpath=tmp_path, filename="middle", save_on_train_epoch_end=True)
    train([CASES[name](), *companions(name), checkpoint], dropout=0.0, max_epochs=1, enable_checkpointing=True)
    resumed = CASES[name]()
    found = weights(train([resumed, *companions(name)], dropout=0.0, resume=str(path)))
    assert all(torch.equal(expected[key], found[key]) for key in expected)
    assert_equal(resumed.state_dict(), whole.state_dict())


@every_callback
def test_every_key_it_logs_is_declared(name: str) -> None:
    callback, record = CASES[name](), RunRecord()
    train([callback, *companions(name)], logger=record)
    if isinstance(callback, Diagnostic):
        patterns = [re.sub(r"<\w+>", "[^/]+", key.name) for key in callback.keys]
        own = [key for key in record.metrics if callback.prefix in key.split("/") and "mean" not in key.split("/")]
        undeclared = [key for key in own if not any(re.fullmatch(rf"(probe/\w+/|val/)?{pattern}", key) for pattern in patterns)]
        assert own
        assert undeclared == []


@every_callback
def test_it_can_be_copied_and_pickled_before_and_after_a_run(name: str) -> None:
    callback = CASES[name]()
    copy.deepcopy(callback)
    train([callback, *companions(name)])
    assert_equal(copy.deepcopy(callback).state_dict(), callback.state_dict())
    if name not in ("GoldReward", "Throughput"):  # their functions are lambdas here
        assert_equal(pickle.loads(pickle.dumps(callback)).state_dict(), callback.state_dict())


@every_callback
@pytest.mark.parametrize(
    "settings",
    [{"accumulate_grad_batches": 4}, {"fast_dev_run": True}, {"precision": "bf16-mixed"}, {"limit_train_batches": 1}],
    ids=["accumulation", "fast_dev_run", "bf16", "one_batch"],
)
def test_it_runs_without_a_logger_under_every_setting(name: str, settings: dict[str, Any]) -> None:
    callback = CASES[name]()
    train([callback, *companions(name)], **settings)
    if isinstance(callback, Diagnostic) and "accumulate_grad_batches" in settings:
        assert callback.updates == 4  # 6 batches in windows of 4 and 2, twice
