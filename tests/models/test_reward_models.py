from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    LlamaForCausalLM,
)

from lightning_pref.data.datamodule import PreferenceData
from lightning_pref.data.groups import GroupBatch, PromptGroup
from lightning_pref.losses.reward import step_rewards
from lightning_pref.models.adapters import LoraSettings, add_lora
from lightning_pref.models.backbones import load_tokenizer
from lightning_pref.models.forward import Layout
from lightning_pref.models.reference import token_logps
from lightning_pref.models.reward_heads import RewardHead, VerbalizerRewardHead
from lightning_pref.models.reward_models import (
    build_reward_model,
    implicit_process_values,
    last_tokens,
    response_scores,
    step_labels,
)

TinyModel = Callable[..., LlamaForCausalLM]
RandomGroups = Callable[..., list[PromptGroup]]

LAYOUTS: tuple[Layout, ...] = ("padded", "packed", "shared")
LAYOUT = pytest.mark.parametrize("layout", LAYOUTS)


def state_by_row(model: Any, prompt: Any, response: Any) -> torch.Tensor:
    """Oracle: one row without padding through the plain backbone, the state at its last token, [D]."""
    ids = torch.tensor([[*prompt.tolist(), *response.tolist()]])
    return model.base_model(ids).last_hidden_state[0, -1]


def scores_by_row(model: Any, groups: Sequence[PromptGroup]) -> torch.Tensor:
    """Oracle: [K, R] in float64 from states of single rows."""
    weight = model.score.weight.double()
    states = [state_by_row(model, group.prompt, response) for group in groups for response in group.responses]
    return weight @ torch.stack(states).double().T


def ragged(random_groups: RandomGroups) -> list[PromptGroup]:
    """Groups with one, two and three responses, one of a single token."""
    groups = random_groups(5)
    first, second = groups[0], groups[1]
    one = replace(first, responses=(first.responses[0][:1],), ranks=(0,))
    three = replace(second, responses=(*second.responses, second.responses[0][::-1].copy()), ranks=(0, 1, 2))
    return [one, three, *groups[2:]]


@LAYOUT
@pytest.mark.parametrize("num_members", [1, 3])
def test_scores_are_read_at_the_last_response_token_in_every_layout(
    tiny_model: TinyModel, random_groups: RandomGroups, layout: Layout, num_members: int
) -> None:
    model, groups = build_reward_model(tiny_model(), num_members=num_members), ragged(random_groups)
    out = response_scores(model, GroupBatch.from_groups(groups), layout=layout)
    assert out.layout == layout
    assert out.members.shape == (num_members, sum(len(group.responses) for group in groups))
    torch.testing.assert_close(out.members.double(), scores_by_row(model, groups), atol=1e-5, rtol=1e-5)


def test_all_layouts_have_the_same_gradients(tiny_model: TinyModel, random_groups: RandomGroups) -> None:
    found = []
    for layout in LAYOUTS:
        model = build_reward_model(tiny_model())
        response_scores(model, GroupBatch.from_groups(ragged(random_groups)), layout=layout).members.square().sum().backward()
        found.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], atol=1e-4, rtol=1e-4)
    assert found[0].abs().max() > 0.1


@LAYOUT
def test_scores_of_tokens_are_those_of_the_prefixes_that_end_there(
    tiny_model: TinyModel, random_groups: RandomGroups, layout: Layout
) -> None:
    model, groups = build_reward_model(tiny_model()), random_groups(3)
    batch = GroupBatch.from_groups(groups)
    out = response_scores(model, batch, layout=layout, want={"tokens", "hidden"})
    prefixes = [
        replace(group, responses=(response[: end + 1],), ranks=None)
        for group in groups
        for response in group.responses
        for end in range(len(response))
    ]
    assert out.token_members is not None and out.hidden is not None
    torch.testing.assert_close(out.token_members.double(), scores_by_row(model, prefixes), atol=1e-5, rtol=1e-5)
    assert torch.equal(out.token_members[:, last_tokens(batch)], out.members)
    expected = torch.stack([state_by_row(model, g.prompt, r) for g in groups for r in g.responses])
    torch.testing.assert_close(out.hidden, expected, atol=1e-5, rtol=1e-5)


@LAYOUT
def test_L9_a_score_does_not_depend_on_the_rest_of_the_batch(
    tiny_model: TinyModel, random_groups: RandomGroups, layout: Layout
) -> None:
    model, groups = build_reward_model(tiny_model()), ragged(random_groups)
    together = response_scores(model, GroupBatch.from_groups(groups), layout=layout).members[0]
    alone = [response_scores(model, GroupBatch.from_groups([group]), layout=layout).members[0] for group in groups]
    backwards = response_scores(model, GroupBatch.from_groups(groups[::-1]), layout=layout).members[0]
    torch.testing.assert_close(torch.cat(alone), together, atol=1e-5, rtol=1e-5)
    counts = [len(group.responses) for group in groups]
    torch.testing.assert_close(torch.cat(backwards.split(counts[::-1])[::-1]), together, atol=1e-5, rtol=1e-5)


@LAYOUT
def test_W1_token_ids_do_not_move_the_place_of_the_score(tiny_model: TinyModel, layout: Layout) -> None:
    """Responses that end with the padding id, or without an EOS, or are one token long are scored at their last token."""
    model = build_reward_model(tiny_model())
    model.config.pad_token_id = model.config.eos_token_id = 2
    prompt = np.array([5, 2, 9])
    responses = tuple(np.array(ids) for ids in ([7, 8, 2], [7, 8, 2, 2], [7, 8], [2], [7, 2, 8, 2]))
    group = PromptGroup(row_id=0, prompt=prompt, responses=responses)
    found = response_scores(model, GroupBatch.from_groups([group]), layout=layout).members
    torch.testing.assert_close(found.double(), scores_by_row(model, [group]), atol=1e-5, rtol=1e-5)
    assert len({round(value, 4) for value in found[0].tolist()}) == len(responses)


def test_W2_a_fresh_head_is_the_same_whatever_the_random_state_and_has_the_documented_spread() -> None:
    torch.manual_seed(5)
    state = torch.get_rng_state()
    first = RewardHead.fresh(4000, 2, seed=3)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(6)
    assert torch.equal(RewardHead.fresh(4000, 2, seed=3).weight, first.weight)
    assert not torch.equal(RewardHead.fresh(4000, 2, seed=4).weight, first.weight)
    assert not torch.equal(first.weight[0], first.weight[1])
    assert first.weight.std().item() == pytest.approx(4001**-0.5, rel=0.05)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_W2_the_head_stays_in_float32_whatever_the_backbone(
    tiny_model: TinyModel, random_groups: RandomGroups, dtype: torch.dtype
) -> None:
    model = build_reward_model(tiny_model())
    weight = model.score.weight.clone()
    model.to(dtype)
    assert {p.dtype for p in model.base_model.parameters()} == {dtype}
    assert torch.equal(model.score.weight, weight)
    out = response_scores(model, GroupBatch.from_groups(random_groups()))
    assert out.members.dtype == torch.float32
    out.members.sum().backward()
    assert model.score.weight.grad is not None
    assert model.score.weight.grad.dtype == torch.float32
    model.double()
    assert model.score.weight.dtype == torch.float64


def test_W2_the_head_computes_in_float32_under_autocast(tiny_model: TinyModel, random_groups: RandomGroups) -> None:
    model, batch = build_reward_model(tiny_model()).eval(), GroupBatch.from_groups(random_groups())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = response_scores(model, batch, want={"hidden"})
        assert out.hidden is not None
        assert out.members.dtype == torch.float32
        expected = torch.nn.functional.linear(out.hidden.double(), model.score.weight.double())[:, 0]
        # bfloat16 would be off by 1e-2.
        assert (out.members[0].double() - expected).abs().max() < 1e-5


def test_W2_with_lora_the_head_is_trained_and_everything_else_of_the_backbone_is_not(
    tiny_model: TinyModel, random_groups: RandomGroups
) -> None:
    model = add_lora(build_reward_model(tiny_model(), num_members=2), LoraSettings(r=2), task="SEQ_CLS")
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert [name for name in trained if "lora_" not in name] == ["base_model.model.score.modules_to_save.default.weight"]
    assert not any("score" in name for name in trained if "lora_" in name), "the head is trained in full"
    response_scores(model, GroupBatch.from_groups(random_groups())).members.sum().backward()
    head = model.get_base_model().score.modules_to_save["default"]  # type: ignore[index, union-attr]
    assert isinstance(head, RewardHead)
    assert head.weight.grad is not None


def test_W6_a_step_is_read_at_the_last_token_of_its_separator_not_at_the_next_one(tiny_model: TinyModel) -> None:
    """Two steps whose separator is the two tokens 3, 4."""
    model = build_reward_model(tiny_model())
    response = np.array([10, 11, 3, 4, 12, 3, 4])
    group = PromptGroup(
        row_id=0, prompt=np.array([5, 6]), responses=(response,), step_ends=((3, 6),), step_labels=((True, False),)
    )
    batch = GroupBatch.from_groups([group])
    labels = step_labels(batch)
    assert labels.tolist() == [-100, -100, -100, 1, -100, -100, 0]
    out = response_scores(model, batch, want={"tokens"})
    assert out.token_members is not None
    prefixes = [replace(group, responses=(response[:end],), step_ends=None, step_labels=None) for end in (4, 7)]
    torch.testing.assert_close(
        out.token_members[0, labels >= 0].double(), scores_by_row(model, prefixes)[0], atol=1e-5, rtol=1e-5
    )


def test_W6_a_separator_of_several_tokens_in_text_is_marked_at_its_last_one(tiny_model: TinyModel, tmp_path: Any) -> None:
    tokenizer = load_tokenizer("playground:tiny")
    separator = " ##\n"
    row = {"prompt": "How?", "completions": ["First this.", "Then that."], "labels": [True, False]}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    data = PreferenceData(
        str(tmp_path / "rows.jsonl"), tokenizer=tokenizer, step_separator=separator, val_size=0, cache_dir=str(tmp_path / "cache")
    )
    data.prepare_data()
    data.setup("fit")
    batch = GroupBatch.from_groups([data.train_table[0]])
    marks = (step_labels(batch) >= 0).nonzero().flatten().tolist()
    response = batch.input_ids[batch.response >= 0].tolist()
    assert len(tokenizer(separator, add_special_tokens=False)["input_ids"]) > 1
    assert tokenizer.decode(response[: marks[0] + 1]) == "First this." + separator
    assert tokenizer.decode(response[: marks[1] + 1]) == "First this." + separator + "Then that." + separator
    assert step_labels(batch)[marks].tolist() == [1, 0]


def test_step_labels_want_step_marks(random_groups: RandomGroups) -> None:
    with pytest.raises(ValueError, match="The rows have no step marks. Steps are scored on stepwise rows"):
        step_labels(GroupBatch.from_groups(random_groups()))


@LAYOUT
def test_a_verbalizer_is_the_difference_of_two_logits_after_the_last_token(
    tiny_model: TinyModel, random_groups: RandomGroups, layout: Layout
) -> None:
    model, groups = tiny_model(), random_groups(3)
    head = VerbalizerRewardHead(positive=7, negative=11)
    found = response_scores(model, GroupBatch.from_groups(groups), layout=layout, head=head).members
    expected = []
    for group in groups:
        for response in group.responses:
            logits = model(torch.tensor([[*group.prompt.tolist(), *response.tolist()]])).logits[0, -1]
            expected.append(logits[7] - logits[11])
    torch.testing.assert_close(found[0], torch.stack(expected), atol=1e-5, rtol=1e-5)


def test_a_verbalizer_reads_an_adapter_on_the_head(tiny_model: TinyModel, random_groups: RandomGroups) -> None:
    model = add_lora(tiny_model(), LoraSettings(r=2, target_modules=["lm_head", "q_proj"]))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    groups = random_groups(2)
    found = response_scores(model, GroupBatch.from_groups(groups), head=VerbalizerRewardHead(positive=7, negative=11)).members
    ids = torch.tensor([[*groups[0].prompt.tolist(), *groups[0].responses[0].tolist()]])
    logits = model(ids).logits[0, -1]
    assert found[0, 0].item() == pytest.approx((logits[7] - logits[11]).item(), rel=1e-4)


def test_label_words_are_single_tokens() -> None:
    tokenizer = load_tokenizer("playground:tiny")
    word = next(token for token, index in tokenizer.get_vocab().items() if index == 300).replace("\u0120", " ")
    other = next(token for token, index in tokenizer.get_vocab().items() if index == 301).replace("\u0120", " ")
    assert VerbalizerRewardHead.from_words(tokenizer, word, other) == VerbalizerRewardHead(positive=300, negative=301)
    with pytest.raises(ValueError, match=r"The label word 'xyzq' is \d+ tokens .* Choose a word that is one token"):
        VerbalizerRewardHead.from_words(tokenizer, "xyzq", word)
    with pytest.raises(ValueError, match="Both label words are token 300: their difference is 0"):
        VerbalizerRewardHead.from_words(tokenizer, word, word)


def test_label_words_out_of_the_vocabulary_are_refused(tiny_model: TinyModel, random_groups: RandomGroups) -> None:
    with pytest.raises(ValueError, match="The label words are tokens 64 and 3, but the model has 64 logits"):
        response_scores(tiny_model(), GroupBatch.from_groups(random_groups()), head=VerbalizerRewardHead(positive=64, negative=3))


def test_implicit_process_values_add_up_the_log_ratios_token_by_token(tiny_model: TinyModel, random_groups: RandomGroups) -> None:
    policy, reference, groups = tiny_model(1), tiny_model(2), random_groups(3)
    batch = GroupBatch.from_groups(groups)
    values = implicit_process_values(policy, batch, token_logps(reference, batch), beta=0.5)
    expected = []
    for group in groups:
        for response in group.responses:
            ids = torch.tensor([[*group.prompt.tolist(), *response.tolist()]])
            own, other = (model(ids).logits[0, len(group.prompt) - 1 : -1].log_softmax(-1) for model in (policy, reference))
            total = 0.0
            for t, token in enumerate(response.tolist()):
                total += 0.5 * (own[t, token] - other[t, token]).item()
                expected.append(total)
    assert values.tolist() == pytest.approx(expected, abs=1e-4)
    ends = torch.zeros(len(values), dtype=torch.bool)
    ends[last_tokens(batch)] = True
    ends[::2] = True
    response = batch.response[batch.response >= 0]
    by_step = step_rewards(values, ends, response)
    sums = torch.zeros(batch.num_responses).index_add_(0, response, by_step)
    torch.testing.assert_close(sums, values[last_tokens(batch)], atol=1e-5, rtol=1e-5)


def test_an_ensemble_makes_one_reward_and_says_how_far_it_disagrees(tiny_model: TinyModel, random_groups: RandomGroups) -> None:
    out = response_scores(build_reward_model(tiny_model(), num_members=3), GroupBatch.from_groups(random_groups()))
    members = out.members.detach().double().numpy()
    np.testing.assert_allclose(out.rewards().detach(), members.mean(0), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(out.rewards("wco").detach(), members.min(0), rtol=1e-5)
    expected = members.mean(0) - 0.25 * members.var(0, ddof=1)
    np.testing.assert_allclose(out.rewards("uwo", coefficient=0.25).detach(), expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(out.uncertainty.detach(), members.std(0, ddof=1), rtol=1e-4)
    single = response_scores(build_reward_model(tiny_model()), GroupBatch.from_groups(random_groups()))
    assert single.uncertainty.tolist() == [0.0] * len(single.lengths)
