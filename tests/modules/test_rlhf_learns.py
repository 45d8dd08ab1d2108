"""Every algorithm raises the reward on a small world, and lowers it where the reward has the other sign."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from rollouts import fit, rollout_data, speaker

from lightning_pref.modules.optimisation import OptimizerSettings
from lightning_pref.modules.rlhf import RLHFModule
from lightning_pref.modules.rlhf_settings import AdvantageSettings, KLSettings, SurrogateSettings, ValueSettings

pytestmark = pytest.mark.slow

# Not tied to the reference, which is there to be watched.
FREE: dict[str, Any] = {"kl": KLSettings(coefficient=0.0), "reference": "copy"}
KINDS: dict[str, dict[str, Any]] = {
    "grpo": FREE,
    "dr_grpo": {**FREE, "advantage": AdvantageSettings(scale="none"), "surrogate": SurrogateSettings(aggregation="sequence_sum")},
    "gspo": {**FREE, "surrogate": SurrogateSettings(ratio="sequence_mean")},
    "cispo": {**FREE, "surrogate": SurrogateSettings(form="cispo")},
    "rloo": {**FREE, "algorithm": "rloo"},
    "reinforce": {**FREE, "algorithm": "rloo", "surrogate": SurrogateSettings(form="reinforce")},
    "ppo": {**FREE, "algorithm": "ppo"},
    "ppo shared": {**FREE, "algorithm": "ppo", "value": ValueSettings(trunk="shared")},
    "reinforce_pp": {**FREE, "algorithm": "reinforce_pp"},
    "online_dpo": {"algorithm": "online_dpo"},
    "ipo": {"algorithm": "online_dpo", "pair_loss": "ipo"},
    "inpo": {"algorithm": "online_dpo", "pair_loss": "inpo", "loss_options": {"eta": 0.1, "tau": 0.02}},
}


def learned(folder: Path, reward: str, updates: int = 60, rate: float = 1e-2, **options: Any) -> Any:
    settings = OptimizerSettings(learning_rate=rate, schedule="constant", warmup=0)
    module = RLHFModule(speaker(hidden_size=32, intermediate_size=48), optimizer=settings, **options)
    data = rollout_data(folder, reward=f"rollouts:{reward}", num_prompts=8, num_samples=8)
    return fit(folder, module, data, max_epochs=updates, max_steps=updates, gradient_clip_val=1.0).metrics


@pytest.mark.parametrize("name", KINDS)
def test_an_algorithm_raises_the_reward_and_pays_for_it_in_kl(tmp_path: Path, name: str) -> None:
    metrics = learned(tmp_path, "likes_vowels", **KINDS[name])
    assert metrics["reward/mean"].last > metrics["reward/mean"].first + 0.08
    assert metrics["kl"].last > 0.5


@pytest.mark.parametrize("name", ["grpo", "rloo", "ppo", "reinforce_pp", "online_dpo"])
def test_an_algorithm_attains_nearly_all_there_is_to_attain(tmp_path: Path, name: str) -> None:
    """The share of words with a first vowel can be 1, in many ways; a random policy has 0.15."""
    reward = learned(tmp_path, "begins_words_with_vowels", updates=40, **KINDS[name])["reward/mean"]
    assert reward.first < 0.3
    assert reward.last >= 0.95


@pytest.mark.parametrize("name", ["grpo", "rloo", "ppo", "reinforce_pp", "online_dpo"])
def test_an_algorithm_goes_the_other_way_where_the_reward_does(tmp_path: Path, name: str) -> None:
    metrics = learned(tmp_path, "dislikes_vowels", **KINDS[name])
    assert metrics["reward/mean"].last > metrics["reward/mean"].first + 0.05
    assert metrics["reward/mean"].last <= 0


@pytest.mark.parametrize("place", ["reward", "loss"])
def test_a_stronger_tie_keeps_the_policy_closer(tmp_path: Path, place: Any) -> None:
    spent = [
        learned(tmp_path, "likes_vowels", rate=3e-3, algorithm="rloo", kl=KLSettings(coefficient=c, place=place))["kl"].last
        for c in (0.001, 0.05, 1.0)
    ]
    assert spent[0] > spent[1] > spent[2]


def test_an_adaptive_tie_holds_the_kl_near_its_target(tmp_path: Path) -> None:
    kl = KLSettings(coefficient=0.01, target=1.0, horizon=64.0)
    metrics = learned(tmp_path, "likes_vowels", updates=120, rate=3e-3, algorithm="rloo", kl=kl)
    assert 0.3 < metrics["kl"].last < 2.5
    assert metrics["kl_coefficient"].last > 0.01
