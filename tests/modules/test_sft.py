from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from lightning_pref.data.groups import GroupBatch, PromptGroup
from lightning_pref.models.adapters import LoraSettings
from lightning_pref.modules import SFTModule

TinyModel = Callable[..., LlamaForCausalLM]
RandomGroups = Callable[..., list[PromptGroup]]


def token_logps(model: Any, prompt: list[int], response: list[int]) -> Tensor:
    """Oracle: one row through the plain model, log-softmax by hand, [R]."""
    logits = model(torch.tensor([[*prompt, *response]])).logits[0, len(prompt) - 1 : -1]
    logps = logits - logits.logsumexp(-1, keepdim=True)
    return torch.stack([logps[i, token] for i, token in enumerate(response)])


def by_row(model: Any, groups: list[PromptGroup]) -> list[Tensor]:
    return [token_logps(model, group.prompt.tolist(), response.tolist()) for group in groups for response in group.responses]


def configured(model: LlamaForCausalLM, **options: Any) -> SFTModule:
    module = SFTModule(model, **options)
    module.configure_model()
    return module


def loss(module: SFTModule, groups: list[PromptGroup]) -> Tensor:
    terms = module.terms(GroupBatch.from_groups(groups))
    return (terms.losses * terms.weights).sum() / terms.weights.sum()


def gradients(module: SFTModule) -> dict[str, Tensor]:
    return {name: parameter.grad for name, parameter in module.policy.named_parameters() if parameter.grad is not None}


@pytest.mark.parametrize("num_responses", [1, 3])
def test_by_token_every_response_token_weighs_the_same(
    tiny_model: TinyModel, random_groups: RandomGroups, num_responses: int
) -> None:
    groups = random_groups(5, num_responses, ranked=False)
    module, plain = configured(tiny_model()), tiny_model()
    expected = -torch.cat(by_row(plain, groups)).mean()
    found = loss(module, groups)
    assert module.terms(GroupBatch.from_groups(groups)).unit == "response_tokens"
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)
    found.backward()
    expected.backward()
    for name, parameter in plain.named_parameters():
        assert torch.allclose(gradients(module)[name], parameter.grad, atol=1e-5)  # type: ignore[arg-type]


def test_by_sequence_every_response_weighs_the_same(tiny_model: TinyModel, random_groups: RandomGroups) -> None:
    groups = random_groups(5, 1, ranked=False)
    module, plain = configured(tiny_model(), normalize="sequence"), tiny_model()
    rows = by_row(plain, groups)
    expected = -torch.stack([row.mean() for row in rows]).mean()
    found = loss(module, groups)
    assert module.terms(GroupBatch.from_groups(groups)).unit == "responses"
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)
    assert abs(found.item() + torch.cat(rows).mean().item()) > 1e-3, "the two ways differ on ragged rows"
    found.backward()
    expected.backward()
    for name, parameter in plain.named_parameters():
        assert torch.allclose(gradients(module)[name], parameter.grad, atol=1e-5)  # type: ignore[arg-type]


@pytest.mark.parametrize("normalize", ["token", "sequence"])
def test_a_row_counts_by_its_weight(tiny_model: TinyModel, random_groups: RandomGroups, normalize: Any) -> None:
    groups = random_groups(3, 1, ranked=False)
    weighed = [replace(groups[0], weight=2.0), groups[1], replace(groups[2], weight=0.0)]
    module = configured(tiny_model(), normalize=normalize)
    assert loss(module, weighed).item() == pytest.approx(loss(module, [groups[0], *groups[:2]]).item(), rel=1e-5)


def test_L2_the_prompt_conditions_but_is_never_scored(tiny_model: TinyModel, random_groups: RandomGroups) -> None:
    """Head rows of tokens that occur in prompts alone get pushed down as alternatives, never up as answers."""
    groups = random_groups(3, 1, ranked=False)
    prompts = {int(token) for group in groups for token in group.prompt}
    answers = {int(token) for group in groups for token in group.responses[0]}
    module = configured(tiny_model(tie_word_embeddings=False))
    batch = GroupBatch.from_groups(groups)
    assert len(module.terms(batch).losses) == sum(len(group.responses[0]) for group in groups)
    first = module.terms(batch).losses[: len(groups[0].responses[0])].sum()
    expected = -token_logps(module.policy, groups[0].prompt.tolist(), groups[0].responses[0].tolist()).sum()
    assert first.item() == pytest.approx(expected.item(), rel=1e-5)
    # A bias on the head shows which labels were scored: its gradient is probability minus label count.
    head = module.policy.lm_head
    head.bias = torch.nn.Parameter(torch.zeros(head.out_features))
    module.terms(batch).losses.sum().backward()
    assert all(head.bias.grad[token] > 0 for token in prompts - answers)
    assert any(head.bias.grad[token] < 0 for token in answers)


def test_the_metrics_are_the_loss_and_the_summed_log_probability(tiny_model: TinyModel, random_groups: RandomGroups) -> None:
    groups = random_groups(4, 1, ranked=False)
    module = configured(tiny_model())
    module._measured_terms(GroupBatch.from_groups(groups), module.train_means)
    rows = by_row(tiny_model(), groups)
    means = module.train_means.compute()
    assert set(means) == {"loss", "logps/response"}
    assert means["loss"].item() == pytest.approx(-torch.cat(rows).mean().item(), rel=1e-5)
    assert means["logps/response"].item() == pytest.approx(torch.stack([row.sum() for row in rows]).mean().item(), rel=1e-5)


def test_the_entropy_is_the_mean_over_response_tokens_where_it_is_asked_for(
    tiny_model: TinyModel, random_groups: RandomGroups
) -> None:
    groups = random_groups(4, 1, ranked=False)
    module, plain = configured(tiny_model(), log_entropy=True), tiny_model()
    module._measured_terms(GroupBatch.from_groups(groups), module.train_means)
    entropies = []
    for group in groups:
        ids = torch.tensor([[*group.prompt.tolist(), *group.responses[0].tolist()]])
        logps = plain(ids).logits[0, len(group.prompt) - 1 : -1].log_softmax(-1)
        entropies.append(-(logps.exp() * logps).sum(-1))
    assert module.train_means.compute()["entropy"].item() == pytest.approx(torch.cat(entropies).mean().item(), rel=1e-5)
    assert loss(module, groups).item() == pytest.approx(loss(configured(tiny_model()), groups).item(), rel=1e-6)


def test_with_lora_only_the_adapter_is_trained(tiny_model: TinyModel, random_groups: RandomGroups) -> None:
    groups = random_groups(3, 1, ranked=False)
    module = configured(tiny_model(), lora=LoraSettings(r=2))
    found = loss(module, groups)
    assert found.item() == pytest.approx(loss(configured(tiny_model()), groups).item(), rel=1e-5), "a fresh adapter adds nothing"
    found.backward()
    assert gradients(module)
    assert all("lora_" in name for name in gradients(module))


@pytest.mark.parametrize("lora", [None, LoraSettings(r=2)])
def test_gradient_checkpointing_changes_no_gradient(
    tiny_model: TinyModel, random_groups: RandomGroups, lora: LoraSettings | None
) -> None:
    groups = random_groups(3, 1, ranked=False)
    runs, calls = [], []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        module = configured(tiny_model().train(), lora=lora, gradient_checkpointing=checkpointing)
        layer = next(m for m in module.modules() if type(m).__name__ == "LlamaMLP")
        count: list[int] = []
        layer.register_forward_pre_hook(lambda *_, count=count: count.append(1))
        value = loss(module, groups)
        forward = len(count)
        value.backward()
        runs.append(gradients(module))
        calls.append(len(count) - forward)
    assert calls == [0, 1], "the layer runs a second time in the backward pass, and only there"
    assert runs[0].keys() == runs[1].keys()
    assert all(torch.allclose(runs[0][name], runs[1][name], atol=1e-6) for name in runs[0])


@pytest.mark.parametrize("layout", ["padded", "packed", "shared"])
def test_the_layout_asked_for_is_the_one_that_is_used(tiny_model: TinyModel, random_groups: RandomGroups, layout: Any) -> None:
    batch = GroupBatch.from_groups(random_groups(3, 2))
    module = configured(tiny_model(), layout=layout)
    assert module.policy_logps(batch).layout == layout


def test_the_export_gives_the_log_probabilities_of_the_module(
    tiny_model: TinyModel, random_groups: RandomGroups, tmp_path: Path
) -> None:
    from lightning_pref.models.backbones import load_tokenizer

    groups = random_groups(2, 1, ranked=False)
    module = configured(tiny_model())
    module.save_pretrained(tmp_path / "export", load_tokenizer("playground:tiny"))
    loaded = LlamaForCausalLM.from_pretrained(tmp_path / "export")
    expected = torch.cat(by_row(loaded, groups))
    assert torch.allclose(-module.terms(GroupBatch.from_groups(groups)).losses, expected, atol=1e-5)


@pytest.mark.parametrize(("change", "finding"), [({"ranks": (0, 1)}, "ranked responses"), ({"labels": (True, False)}, "a label")])
def test_rows_with_bad_responses_are_refused(
    tiny_model: TinyModel, random_groups: RandomGroups, change: dict[str, Any], finding: str
) -> None:
    groups = [replace(group, **change) for group in random_groups(2, 2, ranked=False)]
    with pytest.raises(ValueError, match=f"Row 0 has {finding}, but supervised fine-tuning raises .* `dpo` recipe"):
        configured(tiny_model()).terms(GroupBatch.from_groups(groups))
