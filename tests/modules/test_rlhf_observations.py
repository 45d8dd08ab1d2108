"""What RLHF tells callbacks and loggers of a rollout: gold, disagreement, and the distance to the reference."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from rollouts import MOVING, VOCABULARY, fit, rollout_data, speaker
from transformers import LlamaForSequenceClassification
from typing_extensions import override

from lightning_pref import Observation, Observer, RewardObservation
from lightning_pref.data.playground_tokenizer import playground_tokenizer
from lightning_pref.modules.rlhf import RLHFModule
from lightning_pref.modules.rlhf_settings import KLSettings


class Witness(Callback, Observer):
    consumes: Any = (RewardObservation,)

    def __init__(self) -> None:
        self.seen: list[RewardObservation] = []

    @override
    def on_observation(self, trainer: L.Trainer, pl_module: L.LightningModule, observation: Observation, source: str) -> None:
        assert isinstance(observation, RewardObservation)
        self.seen.append(observation)


def judges(folder: Path, count: int) -> list[str]:
    """Reward models that differ."""
    names = []
    for seed in range(count):
        torch.manual_seed(seed)
        config = speaker(seed).config
        config.num_labels = 1
        assert config.vocab_size == VOCABULARY
        LlamaForSequenceClassification(config).save_pretrained(folder / f"judge{seed}")
        playground_tokenizer().save_pretrained(folder / f"judge{seed}")
        names.append(str(folder / f"judge{seed}"))
    return names


@pytest.mark.parametrize("algorithm", ["grpo", "reinforce_pp", "online_dpo"])
def test_an_ensembles_disagreement_is_published_and_logged(tmp_path: Path, algorithm: Any) -> None:
    witness = Witness()
    data = rollout_data(tmp_path, reward=judges(tmp_path, 3), gold="rollouts:likes_vowels", num_prompts=8)
    metrics = fit(tmp_path, RLHFModule(speaker(), algorithm=algorithm, optimizer=MOVING), data, [witness], max_epochs=2).metrics
    first, last = witness.seen
    for seen, logged in ((first, metrics["reward/uncertainty"].first), (last, metrics["reward/uncertainty"].last)):
        assert seen.uncertainty is not None and seen.gold is not None
        assert seen.uncertainty.shape == seen.rewards.shape
        assert (seen.uncertainty > 0).all()
        assert logged == pytest.approx(seen.uncertainty.mean().item(), rel=1e-5)


def test_one_reward_model_does_not_disagree_with_itself(tmp_path: Path) -> None:
    witness = Witness()
    metrics = fit(tmp_path, RLHFModule(speaker()), rollout_data(tmp_path, reward=judges(tmp_path, 1)), [witness]).metrics
    assert "reward/uncertainty" not in metrics
    assert witness.seen[0].uncertainty is None


@pytest.mark.parametrize("place", ["reward", "loss"])
def test_the_distance_to_the_reference_is_published_with_the_rewards(tmp_path: Path, place: Any) -> None:
    witness = Witness()
    module = RLHFModule(speaker(), kl=KLSettings(coefficient=0.01, place=place), optimizer=MOVING)
    data = rollout_data(tmp_path, num_prompts=8)
    metrics = fit(tmp_path, module, data, [witness], max_epochs=4).metrics
    first, *_, last = witness.seen
    assert first.kl is not None and last.kl is not None
    assert first.kl.abs().max() < 1e-4
    # The engine's own log-probs here, those of the training forward there.
    assert last.kl.mean().item() == pytest.approx(metrics["kl"].last, abs=1e-3)
    assert last.kl.mean() > 0.05


def test_without_a_reference_there_is_no_distance(tmp_path: Path) -> None:
    witness = Witness()
    fit(tmp_path, RLHFModule(speaker(), kl=KLSettings(coefficient=0.0)), rollout_data(tmp_path), [witness])
    assert witness.seen[0].kl is None
