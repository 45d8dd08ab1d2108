"""Settings of RLHF: each changes what is trained, and one without effect is refused."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import TensorBoardLogger
from rollouts import MOVING, STILL, fit, rollout_data, speaker
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor
from transformers import LlamaForSequenceClassification
from typing_extensions import override

from lightning_pref.data.groups import GroupBatch, PromptGroup
from lightning_pref.losses import PREFERENCE_LOSSES
from lightning_pref.models.adapters import LoraSettings
from lightning_pref.models.reference import AdapterOff, EmaReference, EmaSettings, FrozenCopy
from lightning_pref.modules.optimisation import OptimizerSettings
from lightning_pref.modules.rlhf import RLHFModule
from lightning_pref.modules.rlhf_settings import (
    AdvantageSettings,
    KLSettings,
    ScoreSettings,
    SurrogateSettings,
    ValueSettings,
)
from lightning_pref.modules.value import OwnTrunk, SharedTrunk


class Weights(Callback):
    """The policy after every update."""

    def __init__(self) -> None:
        self.seen: list[Tensor] = []

    @override
    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.seen.append(torch.cat([p.detach().flatten().clone() for p in pl_module.policy.parameters()]))


def weights_after(folder: Path, *, inner_epochs: int = 3, **options: Any) -> list[Tensor]:
    """Weights after every update of two rollouts, some of whose responses end."""
    model = speaker()
    with torch.no_grad():
        model.lm_head.weight[2] *= 3
    weights = Weights()
    module = RLHFModule(model, **{"optimizer": MOVING, **options})
    fit(folder, module, rollout_data(folder, inner_epochs=inner_epochs), [weights])
    return weights.seen


GRPO: dict[str, Any] = {}
RLOO: dict[str, Any] = {"algorithm": "rloo"}
PPO: dict[str, Any] = {"algorithm": "ppo"}
RPP: dict[str, Any] = {"algorithm": "reinforce_pp"}
DPO: dict[str, Any] = {"algorithm": "online_dpo"}
TIED: dict[str, Any] = {"kl": KLSettings(coefficient=0.5)}

# By setting: what it is compared with, and with it.
EFFECTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "algorithm": (GRPO, RLOO),
    "surrogate.form": (GRPO, {"surrogate": SurrogateSettings(form="reinforce")}),
    "surrogate.ratio": (GRPO, {"surrogate": SurrogateSettings(ratio="sequence_mean")}),
    "surrogate.clip_low": (GRPO, {"surrogate": SurrogateSettings(clip_low=0.01)}),
    "surrogate.clip_high": (GRPO, {"surrogate": SurrogateSettings(clip_high=0.01)}),
    "surrogate.dual_clip": (GRPO, {"surrogate": SurrogateSettings(dual_clip=1.001)}),
    "surrogate.max_weight": (
        {"surrogate": SurrogateSettings(form="cispo")},
        {"surrogate": SurrogateSettings(form="cispo", max_weight=1.01)},
    ),
    "surrogate.aggregation": (GRPO, {"surrogate": SurrogateSettings(aggregation="token_mean")}),
    "surrogate.max_length": (
        {"surrogate": SurrogateSettings(aggregation="sequence_sum")},
        {"surrogate": SurrogateSettings(aggregation="sequence_sum", max_length=100)},
    ),
    "kl.coefficient": (GRPO, TIED),
    "kl.place": (TIED, {"kl": KLSettings(coefficient=0.5, place="reward")}),
    "kl.gradient": (TIED, {"kl": KLSettings(coefficient=0.5, gradient="own")}),
    "kl.target": (TIED, {"kl": KLSettings(coefficient=0.5, target=1e-3, horizon=1.0)}),
    "kl.horizon": (
        {"kl": KLSettings(coefficient=0.5, target=1e-3, horizon=1.0)},
        {"kl": KLSettings(coefficient=0.5, target=1e-3, horizon=50.0)},
    ),
    "advantage.scale": (GRPO, {"advantage": AdvantageSettings(scale="batch")}),
    "advantage.gamma": (RPP, {**RPP, "advantage": AdvantageSettings(gamma=0.5)}),
    "advantage.lam": (PPO, {**PPO, "advantage": AdvantageSettings(lam=0.1)}),
    "advantage.whiten": (PPO, {**PPO, "advantage": AdvantageSettings(whiten=False)}),
    "advantage.group_baseline": (RPP, {**RPP, "advantage": AdvantageSettings(group_baseline=True)}),
    "value.trunk": (PPO, {**PPO, "value": ValueSettings(trunk="shared")}),
    "value.coefficient": (
        {**PPO, "value": ValueSettings(trunk="shared")},
        {**PPO, "value": ValueSettings(trunk="shared", coefficient=3.0)},
    ),
    "value.clip": (
        {**PPO, "value": ValueSettings(trunk="shared", clip=None)},
        {**PPO, "value": ValueSettings(trunk="shared", clip=1e-4)},
    ),
    "value.rate_factor": (PPO, {**PPO, "value": ValueSettings(rate_factor=10.0)}),
    "scores.normalize": (RLOO, {**RLOO, "scores": ScoreSettings(normalize=True)}),
    "scores.shift_mean": (
        {**PPO, "scores": ScoreSettings(normalize=True)},
        {**PPO, "scores": ScoreSettings(normalize=True, shift_mean=False)},
    ),
    "scores.clip": (RLOO, {**RLOO, "scores": ScoreSettings(clip=1.0)}),
    "scores.missing_eos_score": (RLOO, {**RLOO, "scores": ScoreSettings(missing_eos_score=-3.0)}),
    "scores.missing_eos_penalty": (RLOO, {**RLOO, "scores": ScoreSettings(missing_eos_penalty=3.0)}),
    "scores.skip_unfinished": (RLOO, {**RLOO, "scores": ScoreSettings(skip_unfinished=True)}),
    "pair_loss": (DPO, {**DPO, "pair_loss": "ipo"}),
    "pair_loss mix": (DPO, {**DPO, "pair_loss": {"sigmoid": 1.0, "sft": 1.0}}),
    "pair_loss inpo": (DPO, {**DPO, "pair_loss": "inpo", "loss_options": {"eta": 0.5, "tau": 0.1}}),
    "beta": (DPO, {**DPO, "beta": 1.0}),
    "loss_options": (DPO, {**DPO, "loss_options": {"f_divergence": "forward_kl"}}),
    "ema": (TIED, {**TIED, "ema": EmaSettings(mixing=1.0, every_n_updates=1)}),
    "entropy_bonus": (GRPO, {"entropy_bonus": 1.0}),
}


@pytest.mark.parametrize("name", EFFECTS)
def test_a_setting_changes_where_the_policy_goes(tmp_path: Path, name: str) -> None:
    without, with_it = (weights_after(tmp_path, **options) for options in EFFECTS[name])
    assert len(without) == len(with_it) == 6
    assert not torch.allclose(without[-1], with_it[-1], rtol=0, atol=1e-5)


def test_every_setting_of_a_group_has_a_check() -> None:
    groups = {
        "surrogate": SurrogateSettings,
        "kl": KLSettings,
        "advantage": AdvantageSettings,
        "value": ValueSettings,
        "scores": ScoreSettings,
    }
    named = {f"{group}.{field.name}" for group, kind in groups.items() for field in fields(kind)}
    assert named - set(EFFECTS) == {"kl.estimator", "value.model"}, "these two have tests of their own"


def test_the_estimator_of_the_kl_in_the_loss_is_what_the_loss_shows(tmp_path: Path) -> None:
    """Its gradient is that of the KL whichever it is, so the weights go the same way and the loss does not."""
    speaker(7).save_pretrained(tmp_path / "reference")
    losses, ends = [], []
    for estimator in ("k1", "k3"):
        weights = Weights()
        kl = KLSettings(coefficient=0.5, estimator=estimator)  # type: ignore[arg-type]
        module = RLHFModule(speaker(), kl=kl, reference_model=str(tmp_path / "reference"), optimizer=MOVING)
        losses.append(fit(tmp_path, module, rollout_data(tmp_path), [weights]).metrics["loss"].first)
        ends.append(weights.seen[-1])
    assert abs(losses[0] - losses[1]) > 1e-2
    assert torch.allclose(*ends, atol=1e-6)


def test_a_value_model_starts_from_a_reward_model_with_its_head_and_else_from_0(tmp_path: Path) -> None:
    config = speaker().config
    config.num_labels = 1
    LlamaForSequenceClassification(config).save_pretrained(tmp_path / "rewards")
    given = RLHFModule(speaker(), algorithm="ppo", value=ValueSettings(model=str(tmp_path / "rewards")))
    fresh = RLHFModule(speaker(), algorithm="ppo")
    batch = GroupBatch.from_groups(
        [PromptGroup(row_id=0, prompt=torch.tensor([5, 6]).numpy(), responses=(torch.tensor([7, 8, 2]).numpy(),))]
    )
    values = []
    for module in (given, fresh):
        module.configure_model()
        assert isinstance(module.value, OwnTrunk)
        values.append(module.value(batch, None).detach())
    model = LlamaForSequenceClassification.from_pretrained(tmp_path / "rewards")
    with torch.no_grad():
        states = model.model(torch.tensor([[5, 6, 7, 8, 2]])).last_hidden_state[0, 1:4]
        assert torch.allclose(values[0], model.score(states)[:, 0], atol=1e-5)
    assert values[1].tolist() == [0.0, 0.0, 0.0]


def test_a_value_model_has_the_learning_rate_of_its_factor(tmp_path: Path) -> None:
    module = RLHFModule(speaker(), algorithm="ppo", value=ValueSettings(rate_factor=10.0), optimizer=MOVING)
    fit(tmp_path, module, rollout_data(tmp_path))
    assert module.value is not None
    of_values = {id(parameter) for parameter in module.value.parameters()}
    rates = {
        (id(parameter) in of_values, round(group["lr"], 9))
        for group in module.trainer.optimizers[0].param_groups
        for parameter in group["params"]
    }
    assert rates == {(False, 1e-2), (True, 1e-1)}


def configured(**options: Any) -> RLHFModule:
    module = RLHFModule(speaker(), **options)
    module.configure_model()
    return module


def test_the_reference_is_what_was_asked_for(tmp_path: Path) -> None:
    speaker(7).save_pretrained(tmp_path)
    assert isinstance(configured().reference, FrozenCopy)
    assert configured(kl=KLSettings(coefficient=0.0)).reference is None
    assert isinstance(configured(lora=LoraSettings(r=2)).reference, AdapterOff)
    assert isinstance(configured(ema=EmaSettings()).reference, EmaReference)
    assert configured(algorithm="online_dpo", pair_loss="simpo").reference is None
    watched = configured(kl=KLSettings(coefficient=0.0), reference="copy")
    assert isinstance(watched.reference, FrozenCopy)
    assert "kl" in watched.train_means.names
    other = configured(reference_model=str(tmp_path)).reference
    assert isinstance(other, FrozenCopy)
    assert torch.equal(other.model.lm_head.weight, speaker(7).lm_head.weight)  # type: ignore[union-attr, arg-type]


def test_policy_and_value_model_are_adapted_and_laid_out_alike() -> None:
    module = configured(algorithm="ppo", lora=LoraSettings(r=2), layout="padded", gradient_checkpointing=True)
    trained = [name for name, parameter in module.named_parameters() if parameter.requires_grad]
    assert all("lora_" in name or "score" in name for name in trained)
    assert any(name.startswith("value.") for name in trained)
    assert module.policy_logps(GroupBatch.from_groups(groups())).layout == "padded"
    assert isinstance(configured(algorithm="ppo", value=ValueSettings(trunk="shared")).value, SharedTrunk)


def groups() -> list[PromptGroup]:
    ids = torch.tensor([5, 6, 7]).numpy()
    return [PromptGroup(row_id=0, prompt=ids, responses=(ids, ids[:2]))]


def test_the_entropy_is_logged_unless_it_is_not_wanted(tmp_path: Path) -> None:
    for wanted in (True, False):
        module = RLHFModule(speaker(), log_entropy=wanted, optimizer=STILL)
        assert ("entropy" in fit(tmp_path, module, rollout_data(tmp_path)).metrics) == wanted


@pytest.mark.parametrize(("every", "tables"), [(0, 0), (1, 2), (2, 1)])
def test_samples_are_shown_every_so_many_rollouts(tmp_path: Path, every: int, tables: int) -> None:
    logger = TensorBoardLogger(tmp_path, name="", version="log")
    module = RLHFModule(speaker(), log_samples_every=every, optimizer=STILL)
    fit(tmp_path, module, rollout_data(tmp_path), logger=logger)
    logger.experiment.flush()
    events = EventAccumulator(str(tmp_path / "log"), size_guidance={"tensors": 0})
    events.Reload()
    tags = [tag for tag in events.Tags()["tensors"] if "samples" in tag]
    assert len(tags) == (tables > 0)
    if tables:
        shown = events.Tensors(tags[0])
        assert len(shown) == tables
        text = shown[0].tensor_proto.string_val[0].decode()
        assert text.startswith("| prompt | answer | reward |")
        assert "Name the number" in text


def test_INPO_compares_with_the_policy_that_sampled(tmp_path: Path) -> None:
    """At the first update policy, previous policy and reference agree, so h = 0 and the loss is 1 / (4 eta^2)."""
    options = {"pair_loss": "inpo", "loss_options": {"eta": 0.5, "tau": 0.1}}
    module = RLHFModule(speaker(), algorithm="online_dpo", optimizer=STILL, **options)  # type: ignore[arg-type]
    metrics = fit(tmp_path, module, rollout_data(tmp_path, inner_epochs=2)).metrics
    assert metrics["loss"].last == pytest.approx(1.0, rel=1e-3)


@pytest.mark.parametrize("name", sorted(set(PREFERENCE_LOSSES) - {"inpo"}))
def test_online_dpo_takes_every_pairwise_loss_that_names_no_single_responses(name: str) -> None:
    if name in ("kto", "npo", "simnpo"):
        with pytest.raises(ValueError, match="`pair_loss` compares two responses, and"):
            RLHFModule(speaker(), algorithm="online_dpo", pair_loss=name)
    else:
        assert RLHFModule(speaker(), algorithm="online_dpo", pair_loss=name).pairs is not None


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"algorithm": "a2c"}, "Unknown algorithm 'a2c'; known: ppo, rloo, grpo, reinforce_pp, online_dpo"),
        ({"advantage": AdvantageSettings(lam=0.5)}, "`advantage.lam` acts under 'ppo' only; with the algorithm 'grpo'"),
        ({**RLOO, "advantage": AdvantageSettings(scale="none")}, "`advantage.scale` acts under 'grpo' only"),
        ({"value": ValueSettings(clip=None)}, "`value.clip` acts under 'ppo' only"),
        ({"beta": 0.1}, "`beta` acts under 'online_dpo' only"),
        ({**DPO, "entropy_bonus": 0.1}, "`entropy_bonus` acts under 'ppo' or 'rloo' or 'grpo' or 'reinforce_pp' only"),
        ({**DPO, "kl": KLSettings(coefficient=0.1)}, "`kl.coefficient` acts under"),
        ({**DPO, "pair_loss": "inpo", "beta": 0.1}, "The loss 'inpo' has no `beta`"),
        ({"surrogate": SurrogateSettings(form="reinforce", clip_low=0.1)}, "`surrogate.clip_low` acts on the form 'clip' only"),
        ({"surrogate": SurrogateSettings(max_weight=2.0)}, "`surrogate.max_weight` acts on the form 'cispo' only"),
        ({"surrogate": SurrogateSettings(form="reinforce", ratio="token")}, "`surrogate.ratio` has no effect on the form"),
        ({"surrogate": SurrogateSettings(max_length=5)}, "`surrogate.max_length` divides the aggregation 'sequence_sum'"),
        ({"surrogate": SurrogateSettings(clip_low=1.5)}, r"`surrogate.clip_low` must be in \(0, 1\]"),
        ({"surrogate": SurrogateSettings(dual_clip=0.5)}, "`surrogate.dual_clip` must be above 1, got 0.5"),
        ({"surrogate": SurrogateSettings(form="cispo", max_weight=0.5)}, "`surrogate.max_weight` must be at least 1"),
        ({"kl": KLSettings(coefficient=-1.0)}, "`kl.coefficient` must not be negative, got -1.0"),
        ({**RLOO, "kl": KLSettings(estimator="k1")}, "`kl.estimator` acts on `kl.place: loss` only"),
        ({"kl": KLSettings(horizon=5.0)}, "`kl.horizon` acts with `kl.target` only"),
        ({"kl": KLSettings(coefficient=0.0, target=5.0)}, "`kl.target` has no effect with `kl.coefficient: 0`"),
        ({"kl": KLSettings(estimator="k1", gradient="own")}, "The gradient of 'k1' is zero on average"),
        ({"scores": ScoreSettings(shift_mean=False)}, "`scores.shift_mean` acts on `scores.normalize` only"),
        ({"scores": ScoreSettings(missing_eos_score=-1.0, missing_eos_penalty=1.0)}, "not both"),
        ({**PPO, "value": ValueSettings(trunk="shared", model="x")}, "`value.model` starts a trunk of the value model's own"),
        ({**PPO, "value": ValueSettings(rate_factor=0.0)}, "`value.coefficient` and `value.rate_factor` must be positive"),
    ],
)
def test_what_cannot_be_meant_is_refused(options: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        RLHFModule(speaker(), **options)


@pytest.mark.parametrize("algorithm", ["grpo", "rloo", "online_dpo"])
def test_one_sample_for_each_prompt_is_refused_where_samples_are_compared(tmp_path: Path, algorithm: Any) -> None:
    with pytest.raises(ValueError, match=f"'{algorithm}' compares the responses to one prompt, but `num_samples` is 1"):
        fit(tmp_path, RLHFModule(speaker(), algorithm=algorithm), rollout_data(tmp_path, num_samples=1))


def test_a_group_baseline_of_one_sample_is_refused(tmp_path: Path) -> None:
    module = RLHFModule(speaker(), advantage=AdvantageSettings(group_baseline=True), **RPP)
    with pytest.raises(ValueError, match="`advantage.group_baseline` is a mean over a prompt's responses"):
        fit(tmp_path, module, rollout_data(tmp_path, num_samples=1))


def test_pairs_are_not_cut_in_two(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="makes as many pairs, which cannot be cut into 6 micro-batches"):
        fit(tmp_path, RLHFModule(speaker(), **DPO), rollout_data(tmp_path, num_minibatches=6))


def test_rows_of_data_are_refused(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="An RLHFModule trains on experience, which `RolloutData` has it collect"):
        configured().terms(GroupBatch.from_groups(groups()))


def test_the_optimizer_is_the_one_that_was_asked_for(tmp_path: Path) -> None:
    module = RLHFModule(speaker(), optimizer=OptimizerSettings(learning_rate=0.0123, schedule="constant", warmup=0))
    fit(tmp_path, module, rollout_data(tmp_path))
    assert module.trainer.optimizers[0].param_groups[0]["lr"] == 0.0123


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"surrogate": SurrogateSettings(clip_low=0.1)}, "surrogate.clip_low"),
        ({"surrogate": SurrogateSettings(clip_high=0.3)}, "surrogate.clip_high"),
        ({"surrogate": SurrogateSettings(dual_clip=3.0)}, "surrogate.dual_clip"),
        ({"surrogate": SurrogateSettings(form="cispo", max_weight=2.0)}, "surrogate.max_weight"),
        ({"algorithm": "ppo", "value": ValueSettings(clip=0.5)}, "value.clip"),
    ],
)
def test_a_bound_on_the_ratio_is_refused_where_a_rollout_makes_one_update(
    tmp_path: Path, options: dict[str, Any], name: str
) -> None:
    with pytest.raises(ValueError, match=f"`{name}` bounds how far the policy may move .* but a rollout makes one update"):
        fit(tmp_path, RLHFModule(speaker(), **options), rollout_data(tmp_path))
    fit(tmp_path, RLHFModule(speaker(), **options), rollout_data(tmp_path, num_minibatches=2))
