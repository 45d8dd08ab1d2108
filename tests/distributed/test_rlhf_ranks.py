"""Two processes with half the prompts each do what one process does with all their samples: real DDP over gloo."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from gloo_ranks import launched
from lightning.pytorch.callbacks import Callback
from rollouts import STILL, rollout_data, speaker
from speakers import quiet_trainer
from torch import Tensor
from typing_extensions import override

from lightning_pref import Observation, Observer, RewardObservation
from lightning_pref.modules.rlhf import RLHFModule
from lightning_pref.modules.rlhf_settings import AdvantageSettings, KLSettings, ScoreSettings, ValueSettings
from lightning_pref.modules.rlhf_terms import value_terms
from lightning_pref.reports.summary import RunRecord

pytestmark = pytest.mark.slow

RANKS = 2
# Two rollouts, of six and of seven prompts: in the second a filler keeps one rank busy.
NUM_PROMPTS = 13
TIED = {"kl": KLSettings(coefficient=0.3)}
KINDS: dict[str, dict[str, Any]] = {
    "grpo": {"advantage": AdvantageSettings(scale="batch"), **TIED},
    "rloo": {"algorithm": "rloo", "scores": ScoreSettings(normalize=True), **TIED},
    "ppo": {"algorithm": "ppo", "value": ValueSettings(trunk="own"), **TIED},
    "reinforce_pp": {"algorithm": "reinforce_pp", **TIED},
    "online_dpo": {"algorithm": "online_dpo"},
}


class Witness(Callback, Observer):
    """The experience of every update of this rank, the gradient it is made with, and the rewards that are published."""

    consumes: Any = (RewardObservation,)

    def __init__(self) -> None:
        self.updates: list[list[Any]] = []
        self.gradients: list[Tensor] = []
        self.rewards: list[Tensor] = []
        self._window: list[Any] = []

    @override
    def on_observation(self, trainer: L.Trainer, pl_module: L.LightningModule, observation: Observation, source: str) -> None:
        assert isinstance(observation, RewardObservation)
        self.rewards.append(observation.rewards)

    @override
    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int) -> None:
        self._window.append(batch)

    @override
    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: Any, optimizer: torch.optim.Optimizer) -> None:
        self.gradients.append(gradient(pl_module))
        self.updates.append(self._window)
        self._window = []


def gradient(module: torch.nn.Module) -> Tensor:
    return torch.cat([p.grad.flatten().clone() for p in module.parameters() if p.grad is not None])


def run(kind: str, folder: Path, ranks: int) -> dict[str, Any]:
    witness, record = Witness(), RunRecord()
    module = RLHFModule(speaker(), optimizer=STILL, **KINDS[kind])
    data = rollout_data(folder / "prompts", prompts=NUM_PROMPTS, num_prompts=6, num_minibatches=2)
    parallel: dict[str, Any] = {"devices": ranks, "strategy": "ddp"} if ranks > 1 else {"devices": 1}
    trainer = quiet_trainer(
        default_root_dir=folder,
        logger=[record],
        log_every_n_steps=1,
        callbacks=[witness],
        # Pairs are not cut in two, and three prompts make three of them.
        accumulate_grad_batches=1 if kind == "online_dpo" else 2,
        **parallel,
    )
    trainer.fit(module, data)
    return {
        "updates": witness.updates,
        "gradients": witness.gradients,
        "rewards": witness.rewards,
        "metrics": {key: tuple(pair) for key, pair in record.metrics.items()},
        "scores": [float(value) for value in module.state.scores],
    }


def every_kind(folder: Path, _rank: int, ranks: int) -> dict[str, Any]:
    return {kind: run(kind, folder, ranks) for kind in KINDS}


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("ranks")
    (folder / "prompts").mkdir()
    return launched(every_kind, folder, RANKS)


def test_P7_ranks_share_the_prompts_and_sample_by_seeds_of_their_own(ranks: list[dict[str, Any]]) -> None:
    rows: list[int] = []
    texts = []
    for result in ranks:
        for update in result["grpo"]["updates"]:
            for batch in update:
                weights = batch.groups.weights.tolist()
                rows += [row for row, weight in zip(batch.groups.row_ids.tolist(), weights, strict=True) if weight]
                texts.append(batch.groups.input_ids.tolist())
    # A prompt that is cut into two micro-batches is seen in both.
    assert set(rows) == set(range(NUM_PROMPTS))
    assert len({tuple(ids) for ids in texts}) == len(texts)
    rewards = [len(rewards) for result in ranks for rewards in result["grpo"]["rewards"]]
    assert sum(rewards) == 3 * NUM_PROMPTS, "what only fills a batch is not told"


@pytest.mark.parametrize("kind", KINDS)
def test_N2_N3_the_gradient_of_every_update_is_that_of_one_process_on_the_samples_of_both(
    ranks: list[dict[str, Any]], kind: str
) -> None:
    module = RLHFModule(speaker(), optimizer=STILL, **KINDS[kind])
    module.configure_model()
    assert len(ranks[0][kind]["updates"]) == 4
    for number in range(4):
        batches = [batch for result in ranks for batch in result[kind]["updates"][number]]
        module.zero_grad()
        total = torch.zeros(())
        for batch in batches:
            out = module.policy_logps(batch.groups)
            terms = module._policy_terms(out, batch)
            counts = {
                "groups": sum(float(each.groups.weights.sum()) for each in batches),  # of pairs, which are whole
                "responses": sum(float(each.weights.sum()) for each in batches),
                "response_tokens": sum(float((each.weights * each.groups.response_lengths).sum()) for each in batches),
            }
            total = total + (terms.losses * terms.weights).sum() / counts[terms.unit]
            if module.value is not None:
                missed = value_terms(module.value(batch.groups, out), out.response, batch, clip=0.2)
                total = total + 0.1 * (missed.losses * missed.weights).sum() / counts["response_tokens"]
        total.backward()
        for result in ranks:
            assert torch.allclose(result[kind]["gradients"][number], gradient(module), rtol=1e-3, atol=1e-6)


def test_N4_statistics_are_over_both_ranks(ranks: list[dict[str, Any]]) -> None:
    for kind, correction in (("ppo", 1), ("reinforce_pp", 0)):
        for rollout in range(2):
            advantages = torch.cat(advantages_of(ranks, kind, rollout)).double()
            assert float(advantages.mean()) == pytest.approx(0.0, abs=1e-5)
            assert float(advantages.var(correction=correction)) == pytest.approx(1.0, rel=1e-4)
    rewards = torch.cat([result["grpo"]["rewards"][0].reshape(-1, 3) for result in ranks]).double()
    expected = (rewards - rewards.mean(1, keepdim=True)) / (rewards.std() + 1e-4)
    found = torch.cat(advantages_of(ranks, "grpo", 0)).unique().double()
    assert found.numpy() == pytest.approx(expected.unique().numpy(), abs=1e-4)


def advantages_of(ranks: list[dict[str, Any]], kind: str, rollout: int) -> list[Tensor]:
    """Advantages of the tokens of a rollout, over both ranks, without fillers."""
    updates = [update for result in ranks for update in result[kind]["updates"][2 * rollout : 2 * rollout + 2]]
    alive = [
        (batch, batch.weights.repeat_interleave(batch.groups.response_lengths) > 0) for update in updates for batch in update
    ]
    return [batch.tokens.advantages[mask] for batch, mask in alive]


@pytest.mark.parametrize("kind", KINDS)
def test_N5_metrics_are_those_of_all_responses_on_every_rank(ranks: list[dict[str, Any]], kind: str) -> None:
    first, second = (result[kind] for result in ranks)
    # Loggers write on the first rank only.
    assert second["metrics"] == {}
    rewards = torch.cat([rewards for result in (first, second) for rewards in result["rewards"]]).double()
    early = torch.cat([result["rewards"][0] for result in (first, second)]).double()
    assert first["metrics"]["reward/mean"][0] == pytest.approx(float(early.mean()), rel=1e-5)
    assert first["metrics"]["reward/std"][0] == pytest.approx(float(early.std(correction=0)), rel=1e-5)
    assert first["scores"] == second["scores"]
    if kind == "rloo":
        assert first["scores"][0] == pytest.approx(float(rewards.mean()), rel=1e-6)
        assert first["scores"][2] == len(rewards) == 3 * NUM_PROMPTS
