from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from lightning_pref.data.groups import GroupBatch, PromptGroup
from lightning_pref.losses import FORGET_LOSSES, GROUP_LOSSES, PREFERENCE_LOSSES, UNPAIRED_LOSSES, PairLogps, preference_loss
from lightning_pref.models.adapters import LoraSettings
from lightning_pref.models.reference import EmaSettings
from lightning_pref.modules import DPOModule

TinyModel = Callable[..., LlamaForCausalLM]
RandomGroups = Callable[..., list[PromptGroup]]

# What a fixed data set of pairs cannot feed.
FROM_ELSEWHERE = {"inpo"}
ALL_LOSSES = sorted((PREFERENCE_LOSSES | UNPAIRED_LOSSES | FORGET_LOSSES | GROUP_LOSSES).keys() - FROM_ELSEWHERE)


def token_logps(model: LlamaForCausalLM, group: PromptGroup) -> list[Tensor]:
    """Oracle: every response alone behind its prompt, through the plain model. One [R_k] per response."""
    found = []
    for response in group.responses:
        ids = torch.tensor([[*group.prompt.tolist(), *response.tolist()]])
        logps = model(ids).logits[0, :-1].log_softmax(-1)
        predicted = logps.gather(1, ids[0, 1:, None])[:, 0]
        found.append(predicted[len(group.prompt) - 1 :])
    return found


def sums(model: LlamaForCausalLM, groups: list[PromptGroup]) -> Tensor:
    """[G, K] summed log-probs."""
    return torch.stack([torch.stack([t.sum() for t in token_logps(model, group)]) for group in groups])


def configured(model: LlamaForCausalLM, **options: Any) -> DPOModule:
    module = DPOModule(model, **options)
    module.configure_model()
    return module


def moved(module: DPOModule, seed: int = 9) -> DPOModule:
    """The same module a random step away from its reference."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.policy.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.05)
    return module


def lengths(groups: list[PromptGroup]) -> Tensor:
    return torch.tensor([[len(response) for response in group.responses] for group in groups])


@pytest.mark.parametrize("options", [{}, {"lora": LoraSettings(r=2)}, {"reference": "ema"}])
def test_R1_the_first_step_of_dpo_has_loss_ln_2_and_no_margin(
    tiny_model: TinyModel, random_groups: RandomGroups, options: dict[str, Any]
) -> None:
    module = configured(tiny_model(), **options)
    terms = module.terms(GroupBatch.from_groups(random_groups()))
    assert torch.allclose(terms.losses, torch.tensor(math.log(2.0)), atol=1e-6)
    assert torch.equal(terms.measured[0].values["rewards/margins"], torch.zeros(4))


@pytest.mark.parametrize(
    "loss", sorted(PREFERENCE_LOSSES.keys() - UNPAIRED_LOSSES.keys() - FORGET_LOSSES.keys() - FROM_ELSEWHERE)
)
def test_every_pairwise_loss_of_a_batch_is_that_of_its_rows_one_by_one(
    tiny_model: TinyModel, random_groups: RandomGroups, loss: str
) -> None:
    groups = random_groups()
    module = moved(configured(tiny_model(), loss=loss))
    policy, reference = sums(module.policy, groups), sums(tiny_model(), groups)
    pair = PairLogps(policy[:, 0], policy[:, 1], reference[:, 0], reference[:, 1], *lengths(groups).T)
    terms = module.terms(GroupBatch.from_groups(groups))
    assert terms.unit == "groups"
    assert torch.allclose(terms.losses, preference_loss(loss, pair), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("loss", ALL_LOSSES)
def test_every_loss_of_the_registry_gives_a_finite_gradient(
    tiny_model: TinyModel, random_groups: RandomGroups, loss: str
) -> None:
    module = moved(configured(tiny_model(), loss=loss))
    terms = module.terms(GroupBatch.from_groups(random_groups()))
    (terms.losses * terms.weights).sum().backward()
    gradients = [p.grad for p in module.policy.parameters() if p.requires_grad]
    assert all(g is not None and g.isfinite().all() for g in gradients)
    assert any(g is not None and g.abs().sum() > 0 for g in gradients)


@pytest.mark.parametrize("loss", ALL_LOSSES)
def test_the_default_dtype_that_half_precision_sets_rounds_no_loss(
    tiny_model: TinyModel, random_groups: RandomGroups, loss: str
) -> None:
    """Lightning's `bf16-true` makes bfloat16 the default of every new tensor while a step runs."""
    batch = GroupBatch.from_groups(random_groups())
    found = []
    for dtype in (torch.float32, torch.bfloat16):
        module = moved(configured(tiny_model(), loss=loss))
        torch.set_default_dtype(dtype)
        try:
            found.append(module.terms(batch))
        finally:
            torch.set_default_dtype(torch.float32)
    assert found[1].losses.dtype == torch.float32
    assert torch.equal(found[0].losses, found[1].losses)
    for first, second in zip(found[0].measured, found[1].measured, strict=True):
        assert torch.equal(first.weights, second.weights)
        assert all(torch.equal(first.values[key], second.values[key]) for key in first.values)


def test_ranked_responses_make_all_pairs_and_share_the_weight_of_their_prompt(
    tiny_model: TinyModel, random_groups: RandomGroups
) -> None:
    groups = random_groups(num_responses=3)
    module = moved(configured(tiny_model()))
    policy, reference = sums(module.policy, groups), sums(tiny_model(), groups)
    terms = module.terms(GroupBatch.from_groups(groups))
    expected = []
    for a, b in [(0, 1), (0, 2), (1, 2)]:
        pair = PairLogps(policy[:, a], policy[:, b], reference[:, a], reference[:, b])
        expected.append(preference_loss("sigmoid", pair))
    assert torch.allclose((terms.losses * terms.weights).sum(), torch.stack(expected).mean(0).sum(), rtol=1e-4)
    best_worst = configured(tiny_model(), pairs="best_worst").terms(GroupBatch.from_groups(groups))
    assert len(best_worst.losses) == len(groups)


def test_kto_takes_its_baseline_from_unrelated_prompts_and_responses(tiny_model: TinyModel, random_groups: RandomGroups) -> None:
    groups = random_groups(num_responses=1, ranked=False)
    labels = [True, False, True, False]
    labelled = [
        PromptGroup(row_id=g.row_id, prompt=g.prompt, responses=g.responses, labels=(y,))
        for g, y in zip(groups, labels, strict=True)
    ]
    module = moved(configured(tiny_model(), loss="kto", beta=0.5))
    unrelated = [PromptGroup(row_id=0, prompt=group.prompt, responses=groups[i - 1].responses) for i, group in enumerate(groups)]
    start = tiny_model()
    baseline = (sums(module.policy, unrelated) - sums(start, unrelated)).mean().clamp(min=0)
    ratio = (sums(module.policy, groups) - sums(start, groups))[:, 0]
    signs = torch.tensor([1.0, -1.0, 1.0, -1.0])
    expected = torch.sigmoid(-signs * 0.5 * (ratio - baseline))
    terms = module.terms(GroupBatch.from_groups(labelled))
    assert terms.unit == "responses"
    assert torch.allclose(terms.losses, expected, atol=1e-5)


def test_bco_compares_with_the_mean_of_all_rewards_it_has_trained_on(tiny_model: TinyModel, random_groups: RandomGroups) -> None:
    groups = random_groups()
    module = moved(configured(tiny_model(), loss="bco", beta=0.5))
    rewards = 0.5 * (sums(module.policy, groups) - sums(tiny_model(), groups)).flatten()
    first = module.terms(GroupBatch.from_groups(groups[:2]))
    module.terms(GroupBatch.from_groups(groups[2:]))
    assert module.bco_threshold is not None
    assert module.bco_threshold.mean.item() == pytest.approx(rewards.mean().item(), rel=1e-4)
    signs = torch.tensor([1.0, -1.0, 1.0, -1.0])
    expected = torch.nn.functional.softplus(-signs * (rewards[:4] - rewards[:4].mean()))
    assert torch.allclose(first.losses, expected, atol=1e-5)
    module.eval()
    before = module.bco_threshold.mean.clone()
    module.terms(GroupBatch.from_groups(groups[:2]))
    assert torch.equal(module.bco_threshold.mean, before)


@pytest.mark.parametrize("loss", ["npo", "simnpo"])
def test_forgetting_acts_on_bad_responses_and_keeps_good_ones_by_their_likelihood(
    tiny_model: TinyModel, random_groups: RandomGroups, loss: str
) -> None:
    groups = random_groups()
    module = moved(configured(tiny_model(), loss=loss, retain_weight=0.25))
    policy, sizes = sums(module.policy, groups), lengths(groups)
    pair = PairLogps(policy[:, 0], policy[:, 1], *sums(tiny_model(), groups).T, *sizes.T)
    forget = preference_loss(loss, pair)
    losses = module.terms(GroupBatch.from_groups(groups)).losses.view(-1, 2)
    assert torch.allclose(losses[:, 0], -0.25 * policy[:, 0] / sizes[:, 0], rtol=1e-4)
    assert torch.allclose(losses[:, 1], forget, rtol=1e-4, atol=1e-5)


def test_a_group_loss_adds_the_likelihood_of_the_best_response(tiny_model: TinyModel, random_groups: RandomGroups) -> None:
    groups = random_groups(num_responses=3)
    module = moved(configured(tiny_model(), loss="align"))
    means = sums(module.policy, groups) / lengths(groups)
    expected = []
    for s in means:
        terms = [s[1] - s[0], s[2] - s[0], s[2] - s[1]]
        expected.append(-s[0] + torch.log1p(torch.stack(terms).exp().sum()))
    assert torch.allclose(module.terms(GroupBatch.from_groups(groups)).losses, torch.stack(expected), rtol=1e-4)


def test_F2_tail_weight_zero_cuts_both_sides_to_the_shorter_length_in_policy_and_reference(
    tiny_model: TinyModel, random_groups: RandomGroups
) -> None:
    groups = random_groups()
    module = moved(configured(tiny_model(), tail_weight=0.0))
    start = tiny_model()

    def cut(model: LlamaForCausalLM) -> Tensor:
        rows = []
        for group in groups:
            scored = token_logps(model, group)
            shared = min(len(t) for t in scored)
            rows.append(torch.stack([t[:shared].sum() for t in scored]))
        return torch.stack(rows)

    policy, reference = cut(module.policy), cut(start)
    pair = PairLogps(policy[:, 0], policy[:, 1], reference[:, 0], reference[:, 1])
    assert torch.allclose(module.terms(GroupBatch.from_groups(groups)).losses, preference_loss("sigmoid", pair), rtol=1e-4)
    # at the start policy and reference are cut alike, so the loss is ln 2
    fresh = configured(tiny_model(), tail_weight=0.5)
    assert torch.allclose(fresh.terms(GroupBatch.from_groups(groups)).losses, torch.tensor(math.log(2.0)), atol=1e-6)


def test_weighing_by_the_policy_multiplies_the_loss_by_both_responses_weights(
    tiny_model: TinyModel, random_groups: RandomGroups
) -> None:
    groups = random_groups()
    batch = GroupBatch.from_groups(groups)
    plain = moved(configured(tiny_model())).terms(batch).losses
    weighed = moved(configured(tiny_model(), weigh_by_policy=True))
    expected = []
    for group in groups:
        weight = torch.tensor(1.0)
        for response in group.responses:
            ids = torch.tensor([[*group.prompt.tolist(), *response.tolist()]])
            logps = weighed.policy(ids).logits[0, len(group.prompt) - 1 : -1].log_softmax(-1)
            own = logps.gather(1, torch.from_numpy(response)[:, None])[:, 0]
            weight = weight * (own - logps.mul(2).logsumexp(-1)).mean().exp()
        expected.append(weight)
    assert torch.allclose(weighed.terms(batch).losses, plain * torch.stack(expected), rtol=1e-4)


def test_a_mix_is_the_weighted_sum_of_its_losses(tiny_model: TinyModel, random_groups: RandomGroups) -> None:
    batch = GroupBatch.from_groups(random_groups())
    mix = moved(configured(tiny_model(), loss={"sigmoid": 0.5, "sft": 2.0}, loss_options={"sigmoid": {"beta": 0.3}}))
    alone = moved(configured(tiny_model(), loss="sigmoid", beta=0.3)).terms(batch).losses
    sft = moved(configured(tiny_model(), loss="sft")).terms(batch).losses
    assert torch.allclose(mix.terms(batch).losses, 0.5 * alone + 2.0 * sft, rtol=1e-5)


def test_rows_of_weight_zero_change_nothing(tiny_model: TinyModel, random_groups: RandomGroups) -> None:
    groups = random_groups()
    filler = PromptGroup(row_id=0, prompt=groups[0].prompt, responses=groups[0].responses, ranks=(0, 1), weight=0.0)
    module = moved(configured(tiny_model()))
    with_filler = module.terms(GroupBatch.from_groups([*groups, filler]))
    without = module.terms(GroupBatch.from_groups(groups))
    total = (with_filler.losses * with_filler.weights).sum()
    assert torch.allclose(total, (without.losses * without.weights).sum(), rtol=1e-5)
    assert with_filler.weights.sum() == 4


def test_R10_a_loss_without_a_reference_runs_the_model_once(tiny_model: TinyModel, random_groups: RandomGroups) -> None:
    batch = GroupBatch.from_groups(random_groups())
    calls: dict[str, int] = {}

    def counting(loss: str) -> int:
        module = configured(tiny_model(), loss=loss)
        module.terms(batch)  # the first call also checks the head
        calls[loss] = 0

        def count(*_: object) -> None:
            calls[loss] += 1

        handles = [m.register_forward_hook(count) for m in module.modules() if type(m).__name__ == "LlamaModel"]
        module.terms(batch)
        for handle in handles:
            handle.remove()
        return calls[loss]

    assert [counting(loss) for loss in ("simpo", "orpo", "cpo", "sigmoid")] == [1, 1, 1, 2]


def test_the_reference_follows_the_policy_where_ema_is_asked_for(tiny_model: TinyModel, random_groups: RandomGroups) -> None:
    module = moved(configured(tiny_model(), ema=EmaSettings(mixing=1.0, every_n_updates=2)))
    batch = GroupBatch.from_groups(random_groups())
    module.after_update()
    assert not torch.allclose(module.terms(batch).losses, torch.tensor(math.log(2.0)), atol=1e-4)
    module.after_update()
    assert torch.allclose(module.terms(batch).losses, torch.tensor(math.log(2.0)), atol=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss": "sigmod"}, "Unknown preference loss 'sigmod'; did you mean 'sigmoid'"),
        ({"loss_options": {"gamma": 1.0}}, "has no option `gamma`"),
        ({"beta": 0.1, "loss_options": {"beta": 0.2}}, "`beta` is given twice"),
        ({"loss": {"sigmoid": 1.0}, "loss_options": {"ipo": {}}}, "not in the mix of sigmoid"),
        ({"loss": {"align": 1.0}}, "'align' is no pairwise loss"),
        ({"loss": "inpo"}, "policy of the previous round"),
        ({"loss": "kto", "loss_options": {"baseline": 1.0}}, "`baseline` of loss 'kto' is measured while training"),
        ({"loss": "kto", "loss_options": {"gamma": 1.0}}, "'kto' has no option `gamma`"),
        ({"loss": "kto", "reference": "cache"}, "unrelated responses, which no cache"),
        ({"loss": "kto", "pairs": "adjacent"}, "`pairs` acts on pairs"),
        ({"loss": "npo", "tail_weight": 0.5}, "`tail_weight` acts on pairs"),
        ({"tail_weight": 0.5, "reference": "cache"}, "but a cache holds sums"),
        ({"loss": "aot", "weigh_by_policy": True}, "'aot' sorts the pairs of a batch"),
        ({"loss": "npo", "beta": -1.0}, "`beta` of loss 'npo' must be positive"),
        ({"retain_weight": 0.5}, "`retain_weight` acts on 'npo' and 'simnpo' only"),
    ],
)
def test_settings_that_cannot_work_are_refused_at_construction(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DPOModule(**options)


def test_a_row_without_a_preference_is_refused_by_its_number(tiny_model: TinyModel, random_groups: RandomGroups) -> None:
    module = configured(tiny_model())
    with pytest.raises(ValueError, match="Row 0 has no ordered pair.*'kto'"):
        module.terms(GroupBatch.from_groups(random_groups(ranked=False)))
