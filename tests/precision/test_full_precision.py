"""Whatever the weights and the matrix products are in: log-probabilities, losses, rewards and means are in float32 or better."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.plugins.precision import HalfPrecision, MixedPrecision
from reward_modules import labelled, loader, stepwise, trainer
from rollouts import rollout_data, speaker
from rounding import NarrowLines
from torch import Tensor
from torch.nn import functional as F
from transformers import LlamaForCausalLM
from typing_extensions import override

from lightning_pref.callbacks import LikelihoodDisplacementTracker, RewardVarianceMonitor, SpikeAwareOptimizerReset
from lightning_pref.data.groups import GroupBatch, PromptGroup
from lightning_pref.losses import PREFERENCE_LOSSES
from lightning_pref.models.adapters import LoraSettings
from lightning_pref.models.reward_heads import RewardHead
from lightning_pref.models.reward_models import build_reward_model
from lightning_pref.models.reward_scores import sequence_scores
from lightning_pref.modules import DPOModule, RewardModule, RLHFModule, SFTModule
from lightning_pref.modules.group_module import GroupModule
from lightning_pref.modules.objectives import StepTerms
from lightning_pref.modules.optimisation import OptimizerSettings
from lightning_pref.modules.rlhf_settings import KLSettings, ScoreSettings, ValueSettings
from lightning_pref.rollouts.sampling import Sampling

TinyModel = Callable[..., LlamaForCausalLM]
RandomGroups = Callable[..., list[PromptGroup]]
Groups = Sequence[PromptGroup]

PRECISIONS = ("32-true", "bf16-mixed", "bf16-true", "16-mixed")
every_precision = pytest.mark.parametrize("precision", PRECISIONS)
STEADY = OptimizerSettings(learning_rate=1e-3, schedule="constant", warmup=0)


def how(precision: str) -> dict[str, Any]:
    """Settings of a Trainer on a CPU, where Lightning would turn `16-mixed` into `bf16-mixed`."""
    if precision != "16-mixed":
        return {"precision": precision}
    return {"plugins": [MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=2.0**8))]}


def scored(groups: Groups) -> list[PromptGroup]:
    return [replace(group, scores=(1.0, 0.0)) for group in groups]


def as_they_are(groups: Groups) -> list[PromptGroup]:
    return list(groups)


# What is trained, and what becomes of random ranked pairs before. RLHF makes its own data.
Kind = tuple[type[GroupModule], dict[str, Any], Callable[[Groups], list[PromptGroup]] | None]
KINDS: dict[str, Kind] = {
    "sft": (SFTModule, {}, lambda groups: [replace(group, ranks=None) for group in groups]),
    "dpo": (DPOModule, {"tail_weight": 0.5, "weigh_by_policy": True, "log_entropy": True}, as_they_are),
    "reward": (RewardModule, {"num_members": 2, "aggregate": "uwo", "center": 0.01}, as_they_are),
    "ppo": (RLHFModule, {"algorithm": "ppo", "value": ValueSettings(trunk="shared"), "kl": KLSettings(coefficient=0.1)}, None),
    "online_dpo": (RLHFModule, {"algorithm": "online_dpo"}, None),
}
MORE: dict[str, Kind] = {
    "sft by sequence": (SFTModule, {"normalize": "sequence", "log_entropy": True}, KINDS["sft"][2]),
    **{f"dpo {name}": (DPOModule, {"loss": name}, as_they_are) for name in (*PREFERENCE_LOSSES, "kto", "bco", "npo", "align")},
    "dpo lora": (DPOModule, {"lora": LoraSettings(r=2)}, as_they_are),
    "plackett_luce": (RewardModule, {"loss": "plackett_luce"}, as_they_are),
    "regression": (RewardModule, {"loss": "regression"}, scored),
    "ordinal": (RewardModule, {"loss": "ordinal", "levels": [0.0, 1.0]}, scored),
    "step_bce": (RewardModule, {"loss": "step_bce"}, stepwise),
    "implicit": (RewardModule, {"loss": "implicit_prm", "head": "implicit"}, labelled),
    "verbalizer": (RewardModule, {"head": "verbalizer", "label_words": (3, 4)}, as_they_are),
    "grpo": (RLHFModule, {"kl": KLSettings(coefficient=0.3), "entropy_bonus": 0.01}, None),
    "rloo": (RLHFModule, {"algorithm": "rloo", "scores": ScoreSettings(normalize=True), "kl": KLSettings(target=6.0)}, None),
    "ppo with a trunk": (RLHFModule, {"algorithm": "ppo", "value": ValueSettings(trunk="own")}, None),
    "reinforce_pp": (RLHFModule, {"algorithm": "reinforce_pp"}, None),
}
del MORE["dpo inpo"]  # compares with the policy of a former round, which a fixed data set does not hold


def built(kind: Kind, model: LlamaForCausalLM) -> GroupModule:
    cls, options, change = kind
    return cls(speaker() if change is None else model, optimizer=STEADY, **options)


def fit(
    folder: Path, module: GroupModule, kind: Kind, groups: Groups, precision: str, *callbacks: Any, **settings: Any
) -> L.Trainer:
    change = kind[2]
    trained = trainer(folder, *callbacks, **how(precision), **settings)
    if change is None:
        sampling = Sampling(max_new_tokens=6, temperature=0.9)
        trained.fit(module, rollout_data(folder, sampling=sampling, num_minibatches=2))
    else:
        data = loader(change(groups), folder / "store", batch_size=2)
        trained.fit(module, data, data)
    return trained


# Which numbers are wide.


def narrow_lines(folder: Path, kinds: dict[str, Kind], model: TinyModel, groups: Groups, precision: str) -> set[str]:
    found = set()
    for name, kind in kinds.items():
        watchers: list[Any] = [LikelihoodDisplacementTracker()] if name == "dpo" else []
        watchers += [RewardVarianceMonitor()] if name in ("reward", "ppo") else []
        place = folder / name
        place.mkdir()
        with NarrowLines() as lines:
            fit(place, built(kind, model()), kind, groups, precision, *watchers, SpikeAwareOptimizerReset("evidence"))
        found |= lines.lines
    return found


# The one matrix product that is meant to run in low precision, of hidden states with the rows of the vocabulary.
MEANT = {"functional/linear_logps.py linear"}


def without_numbers(lines: set[str]) -> set[str]:
    return {f"{line.split(':')[0]} {line.split()[-1]}" for line in lines}


@pytest.mark.parametrize("precision", ["bf16-true", "bf16-mixed"])
def test_no_line_of_the_package_makes_16_bit_numbers_of_wider_ones(
    tiny_model: TinyModel, random_groups: RandomGroups, tmp_path: Path, precision: str
) -> None:
    found = narrow_lines(tmp_path, KINDS, tiny_model, random_groups(4), precision)
    assert without_numbers(found) <= (MEANT if precision == "bf16-mixed" else set()), found


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["bf16-true", "bf16-mixed"])
def test_no_line_does_so_for_any_loss_or_algorithm(
    tiny_model: TinyModel, random_groups: RandomGroups, tmp_path: Path, precision: str
) -> None:
    found = narrow_lines(tmp_path, MORE, tiny_model, random_groups(4), precision)
    assert without_numbers(found) <= (MEANT if precision == "bf16-mixed" else set()), found


def test_the_search_finds_what_it_is_looking_for() -> None:
    """A default dtype that slips into a new tensor, and a product that autocast casts."""
    from lightning_pref.losses import unpaired

    source = "import torch\ndef slips(): return torch.ones(3) / torch.ones(3, dtype=torch.int64).sum()\n"
    source += "def casts(x): return x @ x\n"
    scope: dict[str, Any] = {}
    exec(compile(source, unpaired.__file__, "exec"), scope)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with NarrowLines() as lines:
            scope["slips"]()
    finally:
        torch.set_default_dtype(before)
    assert lines.lines == {"losses/unpaired.py:2 ones"}
    with NarrowLines() as lines, torch.autocast("cpu", dtype=torch.bfloat16):
        scope["casts"](torch.eye(2))
    assert lines.lines == {"losses/unpaired.py:3 matmul"}


@every_precision
@pytest.mark.parametrize("name", KINDS)
def test_every_module_trains_and_its_losses_weights_metrics_and_heads_are_wide(
    tiny_model: TinyModel, random_groups: RandomGroups, tmp_path: Path, name: str, precision: str
) -> None:
    module = built(KINDS[name], tiny_model())
    seen: set[torch.dtype] = set()

    def noted(terms: StepTerms) -> StepTerms:
        seen.update(value.dtype for value in (terms.losses, terms.weights))
        seen.update(value.dtype for values, weights in terms.measured for value in (*values.values(), weights))
        return terms

    if isinstance(module, RLHFModule):
        policy_terms, measure = module._policy_terms, module._measure
        module._policy_terms = lambda out, batch: noted(policy_terms(out, batch))  # type: ignore[method-assign]
        module._measure = lambda terms: measure(noted(terms))  # type: ignore[method-assign]
    else:
        terms = module.terms
        module.terms = lambda batch: noted(terms(batch))  # type: ignore[method-assign]
    fit(tmp_path, module, KINDS[name], random_groups(4), precision)
    assert seen == {torch.float32}
    assert module.num_updates > 0
    body = torch.bfloat16 if precision == "bf16-true" else torch.float32
    assert {parameter.dtype for parameter in module.trained.base_model.parameters()} == {body}
    heads = [part for part in module.modules() if isinstance(part, RewardHead)]
    assert len(heads) == (name in ("reward", "ppo"))
    assert all(head.weight.dtype == torch.float32 for head in heads)
    assert {means.sums.dtype for means in (module.train_means, module.val_means)} == {torch.float64}
    if isinstance(module, RLHFModule):
        assert {value.dtype for value in module.state.buffers()} <= {torch.float32, torch.float64}


def test_scores_of_a_reward_model_keep_their_digits_where_half_precision_is_the_default(tiny_model: TinyModel) -> None:
    """Experience is collected inside of the plugin's context, also by reward models in float32 of their own."""
    model = build_reward_model(tiny_model())
    sequences = [[3, 4, 5], [6, 7, 8, 9], [10, 11]]
    expected = sequence_scores(model, sequences)
    with HalfPrecision("bf16-true").forward_context():
        found = sequence_scores(model, sequences)
        assert torch.equal(found, expected)
        assert not torch.equal(found.bfloat16().float(), expected)


# How near the numbers are.


class Watched(DPOModule):
    """Keeps what each step computed."""

    @override
    def terms(self, batch: GroupBatch) -> StepTerms:
        out, reference = self.policy_logps(batch, {"hidden"}), self.reference_logps(batch)
        assert reference is not None and out.hidden is not None
        weight = self.policy.lm_head.weight
        logits = F.linear(out.hidden.to(weight.dtype), weight)
        terms = super().terms(batch)
        self.kept = [value.detach() for value in (out.token_logps, out.logps, reference, terms.losses, logits)]
        return terms


# The unit roundoff of what matrix products are rounded to: half the distance between 1 and the next number.
ROUNDOFF = {"32-true": 2.0**-24, "bf16-mixed": 2.0**-8, "bf16-true": 2.0**-8, "16-mixed": 2.0**-11}


def exact_logps(model: LlamaForCausalLM, group: PromptGroup, response: Any) -> Tensor:
    """Of each token, in float64 throughout, one row at a time."""
    ids = torch.tensor([[*group.prompt.tolist(), *response.tolist()]])
    logps = model(ids).logits[0, len(group.prompt) - 1 : -1].log_softmax(-1)
    return logps.gather(1, ids[0, len(group.prompt) :, None])[:, 0].detach()


def in_double(model: LlamaForCausalLM) -> LlamaForCausalLM:
    wide = LlamaForCausalLM(model.config).double()
    wide.load_state_dict({name: value.double() for name, value in model.state_dict().items()})
    return wide


@every_precision
def test_L3_L4_a_step_comes_as_near_to_float64_as_its_matrix_products_allow(
    tiny_model: TinyModel, random_groups: RandomGroups, tmp_path: Path, precision: str
) -> None:
    groups = random_groups(6)
    still = OptimizerSettings(learning_rate=1e-12, schedule="constant", warmup=0)
    tiny_model(seed=1).save_pretrained(tmp_path / "reference")
    module = Watched(tiny_model(), reference_model=str(tmp_path / "reference"), beta=0.5, optimizer=still)
    data = loader(groups, tmp_path / "store", batch_size=6)
    trainer(tmp_path, **how(precision)).fit(module, data)
    tokens, sums, reference, losses, logits = (value.double() for value in module.kept)
    flat = [(group, response) for group in groups for response in group.responses]
    lengths = torch.tensor([len(response) for _, response in flat])
    labels = torch.cat([torch.as_tensor(response) for _, response in flat])

    # What is reduced is reduced in float32: nothing is left of the step's precision but the rounding of the logits.
    at_label = logits.gather(1, labels[:, None])[:, 0]
    assert torch.allclose(tokens, at_label - logits.logsumexp(-1), atol=1e-5)
    assert torch.allclose(sums, torch.stack([part.sum() for part in tokens.split(lengths.tolist())]), rtol=1e-6)
    margins = 0.5 * ((sums - reference)[::2] - (sums - reference)[1::2])
    assert torch.allclose(losses, F.softplus(-margins), rtol=1e-5, atol=1e-6)

    # And the whole is as far from float64 as rounding some twenty products in a row makes it by chance, about 5 times the
    # roundoff of the logits' spread; errors of the tokens of a response add up as a random walk.
    policy, other = (in_double(part) for part in (module.policy, module.reference.model))  # type: ignore[union-attr, arg-type]
    # What is reduced is then kept in float32.
    bound = 5 * ROUNDOFF[precision] * float(logits.std()) + 2.0**-23 * float(tokens.abs().max())
    for model, found in ((policy, sums), (other, reference)):
        exact = [exact_logps(model, group, response) for group, response in flat]
        for total, each in zip(found, exact, strict=True):
            assert abs(float(total - each.sum())) < 3 * bound * len(each) ** 0.5
    exact = torch.cat([exact_logps(policy, group, response) for group, response in flat])
    assert (tokens - exact).square().mean().sqrt() < bound
    assert precision == "32-true" or (tokens - exact).abs().max() > ROUNDOFF[precision] / 10, "it does compute in 16 bits"


# Going on, and what Lightning does.


@every_precision
@pytest.mark.parametrize("name", ["sft", "dpo", "reward"])
def test_a_run_resumed_in_its_precision_is_the_uninterrupted_one(
    tiny_model: TinyModel, random_groups: RandomGroups, tmp_path: Path, name: str, precision: str
) -> None:
    def run(place: str, epochs: int, resume: Path | None = None) -> GroupModule:
        module = built(KINDS[name], tiny_model())
        (tmp_path / place).mkdir()
        data = loader(KINDS[name][2](random_groups(4)), tmp_path / place / "store", batch_size=2)  # type: ignore[misc]
        fitted = trainer(tmp_path / place, max_epochs=epochs, **how(precision))
        fitted.fit(module, data, ckpt_path=resume, weights_only=True if resume else None)
        fitted.save_checkpoint(tmp_path / place / "end.ckpt")
        return module

    whole = run("whole", 3)
    run("half", 1)
    rest = run("rest", 3, tmp_path / "half" / "end.ckpt")
    ours, theirs = rest.state_dict(), whole.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(v, theirs[key]) if isinstance(v, Tensor) else v == theirs[key] for key, v in ours.items())
    assert rest.num_updates == whole.num_updates == 6


def test_on_a_cpu_lightning_turns_float16_into_bfloat16_and_says_so() -> None:
    with pytest.warns(UserWarning, match="AMP with fp16 is not supported on CPU. Using `precision='bf16-mixed'` instead"):
        made = L.Trainer(accelerator="cpu", precision="16-mixed", logger=False)
    assert made.precision == "bf16-mixed"
    with warnings.catch_warnings():
        given = L.Trainer(accelerator="cpu", **how("16-mixed"), logger=False)
    assert given.precision == "16-mixed"
