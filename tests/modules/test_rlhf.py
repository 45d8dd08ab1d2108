"""RLHFModule on rollouts of a tiny world: what it trains on, against what the samples themselves say."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from rollouts import MOVING, STILL, count_of_letters, fit, rollout_data, speaker
from torch import Tensor
from transformers import LlamaForCausalLM
from typing_extensions import override

from lightning_pref import Observation, Observer, RewardObservation
from lightning_pref.data.playground_tokenizer import playground_tokenizer
from lightning_pref.modules.rlhf import RLHFModule
from lightning_pref.modules.rlhf_settings import (
    AdvantageSettings,
    KLSettings,
    ScoreSettings,
    ValueSettings,
)
from lightning_pref.modules.value import OwnTrunk
from lightning_pref.rollouts.experience import ExperienceBatch
from lightning_pref.rollouts.sampling import Sampling

END = playground_tokenizer().eos_token_id
ALGORITHMS: dict[str, dict[str, Any]] = {
    "grpo": {},
    "rloo": {"algorithm": "rloo"},
    "ppo": {"algorithm": "ppo"},
    "ppo shared": {"algorithm": "ppo", "value": ValueSettings(trunk="shared")},
    "reinforce_pp": {"algorithm": "reinforce_pp"},
    "online_dpo": {"algorithm": "online_dpo"},
}


class Witness(Callback, Observer):
    """Keeps the micro-batches, the gradient of every update, and what is published."""

    consumes: Any = (RewardObservation,)

    def __init__(self) -> None:
        self.batches: list[ExperienceBatch] = []
        self.gradients: list[Tensor] = []
        self.losses: list[float] = []
        self.heard: list[Any] = []
        self.sources: set[str] = set()

    @override
    def on_observation(self, trainer: L.Trainer, pl_module: L.LightningModule, observation: Observation, source: str) -> None:
        self.heard.append(observation)
        self.sources.add(source)

    @override
    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int) -> None:
        self.batches.append(batch)

    @override
    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.losses.append(float(outputs["loss"]))

    @override
    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: Any, optimizer: torch.optim.Optimizer) -> None:
        self.gradients.append(flat_gradient(pl_module.policy))


def flat_gradient(model: torch.nn.Module) -> Tensor:
    return torch.cat([p.grad.flatten().clone() for p in model.parameters() if p.grad is not None])


def watch(folder: Path, options: dict[str, Any] | None = None, *, trainer: dict[str, Any] | None = None, **data: Any) -> Any:
    """A run, and what was seen of it."""
    witness = Witness()
    module = RLHFModule(speaker(), **{"optimizer": STILL, **(options or {})})
    record = fit(folder, module, rollout_data(folder, **data), [witness], **(trainer or {}))
    return module, witness, record.metrics


def rows_of(batch: ExperienceBatch) -> list[tuple[np.ndarray, np.ndarray]]:
    """(prompt, response) of every response of a micro-batch."""
    return [(group.prompt, response) for group in batch.groups.groups() for response in group.responses]


def token_logps(model: LlamaForCausalLM, prompt: Any, response: Any, temperature: float = 1.0) -> Tensor:
    """Oracle: one sequence, one forward pass, plain transformers."""
    ids = torch.tensor([[*prompt.tolist(), *response.tolist()]])
    logits = model(ids).logits[0, len(prompt) - 1 : -1] / temperature
    return logits.log_softmax(-1).gather(-1, ids[0, len(prompt) :, None])[:, 0]


def scores_of(batch: ExperienceBatch) -> np.ndarray:
    tokenizer = playground_tokenizer()
    return np.array([count_of_letters("", tokenizer.decode(ids, skip_special_tokens=True)) for _, ids in rows_of(batch)])


def test_L12_the_first_update_has_ratio_one_and_the_gradient_of_reinforce(tmp_path: Path) -> None:
    """GRPO of samples of the policy itself, before anything moved: -A * log pi, summed by hand over plain forwards."""
    kl = KLSettings(coefficient=0.0)
    for data in ({}, {"inner_epochs": 2}):
        _, witness, metrics = watch(tmp_path, {"kl": kl}, **data)
        batch = witness.batches[0]
        assert (batch.tokens.old_logps is None) == (data == {}), "computed only where something may have moved since"
        model = speaker()
        scores = scores_of(batch).reshape(-1, 3)
        advantages = (scores - scores.mean(1, keepdims=True)) / (scores.std(1, ddof=1, keepdims=True) + 1e-4)
        assert batch.tokens.advantages is not None
        total = torch.zeros(())
        position = 0
        for (prompt, response), advantage in zip(rows_of(batch), advantages.flatten(), strict=True):
            logps = token_logps(model, prompt, response)
            own = slice(position, position + len(response))
            position += len(response)
            assert torch.allclose(batch.tokens.sampled_logps[own], logps.detach(), atol=1e-4)
            assert torch.allclose(batch.tokens.advantages[own], torch.full((len(response),), float(advantage)), atol=1e-3)
            total = total - float(advantage) * logps.mean()
        (total / len(rows_of(batch))).backward()
        assert torch.allclose(witness.gradients[0], flat_gradient(model), rtol=1e-3, atol=1e-5)
        assert metrics["clip_fraction"].last == 0.0
        assert metrics["approx_kl"].last == pytest.approx(0.0, abs=1e-8)
        assert metrics["sampling/logp_difference"].last == pytest.approx(0.0, abs=1e-4)


def test_L10_policy_old_and_reference_log_probs_are_all_tempered_once(tmp_path: Path) -> None:
    sampling = Sampling(max_new_tokens=6, temperature=0.6)
    _, witness, metrics = watch(tmp_path, {"log_entropy": False}, sampling=sampling, inner_epochs=2)
    batch, model = witness.batches[0], speaker()
    tempered = torch.cat([token_logps(model, *row, temperature=0.6) for row in rows_of(batch)]).detach()
    tokens = batch.tokens
    for found in (tokens.sampled_logps, tokens.old_logps, tokens.ref_logps):
        assert found is not None
        assert torch.allclose(found, tempered, atol=1e-4)
    assert metrics["approx_kl"].last == pytest.approx(0.0, abs=1e-8), "the update's own forward is tempered, too"
    assert metrics["kl"].last == pytest.approx(0.0, abs=1e-4)


@pytest.mark.parametrize("options", ALGORITHMS.values(), ids=ALGORITHMS)
def test_N1_micro_batches_make_the_update_of_the_whole(tmp_path: Path, options: dict[str, Any]) -> None:
    gradients = []
    for accumulate in (1, 2, 4):
        _, witness, _ = watch(tmp_path, options, trainer={"accumulate_grad_batches": accumulate})
        assert len(witness.batches) == 2 * accumulate
        gradients.append(witness.gradients)
    for other in gradients[1:]:
        assert len(other) == 2
        for mine, whole in zip(other, gradients[0], strict=True):
            assert torch.allclose(mine, whole, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("options", ALGORITHMS.values(), ids=ALGORITHMS)
def test_every_algorithm_trains_and_logs_finite_numbers(tmp_path: Path, options: dict[str, Any]) -> None:
    module, witness, metrics = watch(tmp_path, {**options, "optimizer": MOVING}, inner_epochs=2, num_minibatches=2)
    start = speaker().state_dict()
    assert any(not torch.equal(start[name], value) for name, value in module.policy.state_dict().items())
    assert all(np.isfinite(pair.last) for pair in metrics.values()), metrics
    expected = {
        "loss", "reward/mean", "reward/std", "reward/zero_share", "reward/not_finite", "entropy", "kl",
        "response/length", "response/ended_share", "sampling/logp_difference",
    }  # fmt: skip
    expected |= (
        {"rewards/margins", "rewards/accuracies"} if "dpo" in options.get("algorithm", "") else {"clip_fraction", "approx_kl"}
    )
    if options.get("algorithm") == "ppo":
        expected |= {"value/loss", "value/clip_fraction", "value/explained_variance"}
    assert expected <= set(metrics)
    assert witness.sources == {"train"}


def test_rewards_are_published_whole_group_by_whole_group_once_per_rollout(tmp_path: Path) -> None:
    _, witness, metrics = watch(tmp_path, inner_epochs=2, num_minibatches=2, gold="rollouts:says_the_answer")
    assert len(witness.heard) == 2
    for rollout, observation in enumerate(witness.heard):
        own = witness.batches[4 * rollout : 4 * rollout + 2]
        by_row: dict[int, list[float]] = {}
        for batch in own:
            scores = iter(scores_of(batch))
            for row in batch.groups.row_ids[batch.groups.group_of_response].tolist():
                by_row.setdefault(row, []).append(next(scores))
        told: dict[int, list[float]] = {}
        for row, reward in zip(observation.prompt_ids.tolist(), observation.rewards.tolist(), strict=True):
            told.setdefault(row, []).append(reward)
        assert {row: pytest.approx(values) for row, values in by_row.items()} == told
        assert observation.gold is not None
        assert observation.lengths.min() >= 1
    everything = np.concatenate([observation.rewards.numpy() for observation in witness.heard[1:]])
    assert metrics["reward/mean"].last == pytest.approx(everything.mean(), rel=1e-5)
    assert metrics["reward/std"].last == pytest.approx(everything.std(), rel=1e-5)


@pytest.mark.parametrize("algorithm", ["grpo", "rloo", "online_dpo"])
def test_N4_equal_rewards_teach_nothing_and_are_counted(tmp_path: Path, algorithm: Any) -> None:
    options = (
        {"algorithm": algorithm} if algorithm == "online_dpo" else {"algorithm": algorithm, "kl": KLSettings(coefficient=0.0)}
    )
    _, witness, metrics = watch(tmp_path, options, reward="rollouts:nothing_to_tell")
    assert metrics["reward/zero_share"].last == 1.0
    if algorithm != "online_dpo":
        assert all(float(gradient.abs().max()) == 0.0 for gradient in witness.gradients)


@pytest.mark.parametrize("options", ALGORITHMS.values(), ids=ALGORITHMS)
def test_N4_a_reward_that_is_no_number_is_counted_and_teaches_nothing(tmp_path: Path, options: dict[str, Any]) -> None:
    module, witness, metrics = watch(tmp_path, {**options, "optimizer": MOVING}, reward="rollouts:sometimes_nan")
    assert 0.0 < metrics["reward/not_finite"].last < 1.0
    assert all(torch.isfinite(value).all() for value in module.state_dict().values() if isinstance(value, Tensor))
    assert all(np.isfinite(loss) for loss in witness.losses)
    if options.get("algorithm") == "online_dpo":
        return
    tokenizer = playground_tokenizer()
    seen = 0
    for batch in witness.batches:
        advantages = batch.tokens.advantages
        assert advantages is not None
        for number, (_, ids) in enumerate(rows_of(batch)):
            if len(tokenizer.decode(ids, skip_special_tokens=True)) % 3 == 0:
                seen += 1
                start = int(batch.groups.response_lengths[:number].sum())
                assert advantages[start : start + len(ids)].abs().max() == 0.0
    assert seen > 0


def test_N4_P1_whitened_advantages_have_mean_0_and_variance_1_over_the_whole_rollout(tmp_path: Path) -> None:
    _, witness, _ = watch(tmp_path, {"algorithm": "ppo"}, num_minibatches=4)
    for rollout in range(2):
        advantages = torch.cat([b.tokens.advantages for b in witness.batches[4 * rollout : 4 * rollout + 4]]).double()
        assert float(advantages.mean()) == pytest.approx(0.0, abs=1e-5)
        assert float(advantages.var()) == pytest.approx(1.0, rel=1e-4)


def gae_by_hand(rewards: Sequence[float], values: Sequence[float], gamma: float, lam: float) -> list[float]:
    advantages, following, value = [], 0.0, 0.0
    for reward, now in zip(reversed(rewards), reversed(values), strict=True):
        following = reward + gamma * value - now + gamma * lam * following
        value = now
        advantages.append(following)
    return advantages[::-1]


@pytest.mark.parametrize("trunk", ["own", "shared"])
def test_P1_P2_the_score_lands_on_the_last_token_and_values_are_of_the_state_before_each(tmp_path: Path, trunk: Any) -> None:
    """Against plain forwards: V(s_t) reads the state that predicts token t; the KL of every token is in its reward."""
    speaker(7).save_pretrained(tmp_path / "reference")
    options = {
        "algorithm": "ppo",
        "reference_model": str(tmp_path / "reference"),
        "kl": KLSettings(coefficient=0.3),
        "advantage": AdvantageSettings(gamma=0.9, lam=0.8, whiten=False),
        "value": ValueSettings(trunk=trunk),
    }
    torch.manual_seed(0)
    module = RLHFModule(speaker(), optimizer=STILL, **options)
    module.configure_model()
    head = module.value.model.score if isinstance(module.value, OwnTrunk) else module.value.head  # type: ignore[union-attr]
    torch.nn.init.normal_(head.weight, generator=torch.Generator().manual_seed(0))
    witness = Witness()
    fit(tmp_path, module, rollout_data(tmp_path), [witness])
    policy, reference = speaker(), speaker(7)
    batch = witness.batches[0]
    scores, position = scores_of(batch), 0
    tokens = batch.tokens
    assert tokens.values is not None and tokens.advantages is not None and tokens.returns is not None
    with torch.no_grad():
        for (prompt, response), score in zip(rows_of(batch), scores, strict=True):
            own = slice(position, position + len(response))
            position += len(response)
            ids = torch.tensor([[*prompt.tolist(), *response.tolist()]])
            states = policy.model(ids).last_hidden_state[0, len(prompt) - 1 : -1]
            values = head(states)[:, 0]
            assert torch.allclose(tokens.values[own], values, atol=1e-3)
            kl = token_logps(policy, prompt, response) - token_logps(reference, prompt, response)
            rewards = (-0.3 * kl).tolist()
            rewards[-1] += float(score)
            advantages = torch.tensor(gae_by_hand(rewards, values.tolist(), 0.9, 0.8))
            assert torch.allclose(tokens.advantages[own], advantages, rtol=1e-3, atol=1e-2)
            assert torch.allclose(tokens.returns[own], advantages + values, rtol=1e-3, atol=1e-2)


def test_rloo_and_reinforce_pp_are_what_their_papers_say(tmp_path: Path) -> None:
    speaker(7).save_pretrained(tmp_path / "reference")
    policy, reference = speaker(), speaker(7)
    common = {"reference_model": str(tmp_path / "reference"), "kl": KLSettings(coefficient=0.3)}
    _, witness, _ = watch(tmp_path, {"algorithm": "rloo", **common})
    batch = witness.batches[0]
    assert batch.tokens.advantages is not None
    with torch.no_grad():
        kl = [token_logps(policy, *row) - token_logps(reference, *row) for row in rows_of(batch)]
    rewards = (scores_of(batch) - 0.3 * np.array([float(each.sum()) for each in kl])).reshape(-1, 3)
    expected = (rewards - (rewards.sum(1, keepdims=True) - rewards) / 2).flatten()
    for (start, length), advantage in zip(spans(batch), expected, strict=True):
        assert batch.tokens.advantages[start : start + length].tolist() == pytest.approx([advantage] * length, rel=1e-3, abs=1e-3)
    _, witness, _ = watch(tmp_path, {"algorithm": "reinforce_pp", "advantage": AdvantageSettings(gamma=0.9), **common})
    batch = witness.batches[0]
    returns: list[float] = []
    with torch.no_grad():
        for row, score in zip(rows_of(batch), scores_of(batch), strict=True):
            rewards_of_tokens = (-0.3 * (token_logps(policy, *row) - token_logps(reference, *row))).tolist()
            rewards_of_tokens[-1] += float(score)
            returns += gae_by_hand(rewards_of_tokens, [0.0] * len(rewards_of_tokens), 0.9, 1.0)
    wanted = (np.array(returns) - np.mean(returns)) / np.std(returns)
    assert batch.tokens.advantages is not None
    assert batch.tokens.advantages.numpy() == pytest.approx(wanted, rel=1e-3, abs=1e-3)


def spans(batch: ExperienceBatch) -> list[tuple[int, int]]:
    lengths = batch.groups.response_lengths.tolist()
    return [(sum(lengths[:i]), length) for i, length in enumerate(lengths)]


def test_P3_scores_are_normalised_then_clipped_then_fined_for_a_missing_end(tmp_path: Path) -> None:
    options = {
        "algorithm": "rloo",
        "kl": KLSettings(coefficient=0.0),
        "scores": ScoreSettings(normalize=True, clip=1.0, missing_eos_penalty=5.0),
    }
    model = speaker()
    with torch.no_grad():
        model.lm_head.weight[END] *= 3  # so that some responses end
    witness = Witness()
    module = RLHFModule(model, optimizer=STILL, **options)
    fit(tmp_path, module, rollout_data(tmp_path, num_prompts=8, num_samples=8), [witness])
    (batch,) = witness.batches
    raw = scores_of(batch)
    ended = np.array([response[-1] == END for _, response in rows_of(batch)])
    assert 0 < ended.sum() < len(ended)
    shaped = (((raw - raw.mean()) / raw.std(ddof=1)).clip(-1, 1) - 5.0 * ~ended).reshape(-1, 8)
    expected = ((shaped - shaped.mean(1, keepdims=True)) * 8 / 7).flatten()
    assert batch.tokens.advantages is not None
    for (start, _), advantage in zip(spans(batch), expected, strict=True):
        assert float(batch.tokens.advantages[start]) == pytest.approx(advantage, abs=1e-4)
    assert float(module.state.num_scores) == 64


def test_P4_a_rollout_leaves_modes_checkpointing_and_random_state_alone(tmp_path: Path) -> None:
    module = RLHFModule(speaker(), algorithm="ppo", gradient_checkpointing=True, optimizer=STILL)
    seen: list[bool] = []

    class Looks(Callback):
        @override
        def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
            seen.append(pl_module.policy.training and pl_module.policy.is_activation_checkpointing and pl_module.value.training)
            seen.append(not pl_module.reference.model.training)
            state.append(torch.get_rng_state())

    state: list[Tensor] = []
    torch.manual_seed(3)
    fit(tmp_path, module, rollout_data(tmp_path), [Looks()])
    assert all(seen) and len(seen) == 4
    assert torch.equal(state[0], state[1])


def test_P5_old_log_probs_stay_those_of_the_rollout_while_the_policy_moves(tmp_path: Path) -> None:
    data = {"inner_epochs": 3, "num_minibatches": 2}
    _, witness, metrics = watch(tmp_path, {"optimizer": MOVING}, **data)
    first = witness.batches[:6]
    known: dict[tuple[int, ...], list[float]] = {}
    for batch in first:
        assert batch.tokens.old_logps is not None
        for (prompt, ids), (start, length) in zip(rows_of(batch), spans(batch), strict=True):
            values = batch.tokens.old_logps[start : start + length].tolist()
            assert known.setdefault((*prompt.tolist(), *ids.tolist()), values) == values
    model = speaker()
    with torch.no_grad():
        for batch in first:
            expected = torch.cat([token_logps(model, *row) for row in rows_of(batch)])
            assert batch.tokens.old_logps is not None
            assert torch.allclose(batch.tokens.old_logps, expected, atol=1e-4)
    assert metrics["approx_kl"].last > 1e-4, "it did move"


def test_P6_the_value_loss_is_a_token_mean_of_the_whole_update(tmp_path: Path) -> None:
    """Alone in the loss: the gradient of the head is that of a mean over all tokens, however it is cut."""
    options = {"algorithm": "ppo", "value": ValueSettings(trunk="shared", coefficient=1.0)}
    found = []
    for accumulate in (1, 4):
        seen: list[Tensor] = []

        class Looks(Callback):
            @override
            def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: Any, optimizer: Any, seen: Any = seen) -> None:
                seen.append(pl_module.value.head.bias.grad.clone())

        module, witness = RLHFModule(speaker(), optimizer=STILL, **options), Witness()
        fit(tmp_path, module, rollout_data(tmp_path), [Looks(), witness], accumulate_grad_batches=accumulate)
        returns = torch.cat([b.tokens.returns for b in witness.batches[:accumulate] if b.tokens.returns is not None])
        found.append(float(seen[0]))
        assert float(seen[0]) == pytest.approx(-float(returns.mean()), rel=1e-3), "values are 0, so the slope is -return"
    assert found[0] == pytest.approx(found[1], rel=1e-4)
