"""Models that are split and put together again: the parts that need no other process."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn
from transformers import LlamaForCausalLM

from lightning_pref.models.adapters import LoraSettings, add_lora
from lightning_pref.models.digests import weights_digest
from lightning_pref.models.sharding import filled, layers_of, run_as_forward, skeleton_of, within_forward

MakeModel = Callable[..., LlamaForCausalLM]


def test_layers_are_the_repeated_parts_of_a_model_with_or_without_adapters(tiny_model: MakeModel) -> None:
    model = tiny_model()
    layers = list(model.model.layers)
    assert layers_of(model) == layers
    assert layers_of(add_lora(model, LoraSettings(r=2))) == layers


@pytest.mark.parametrize("is_tied", [False, True])
@pytest.mark.parametrize("has_lora", [False, True])
def test_a_skeleton_holds_no_weights_and_becomes_the_model_again(tiny_model: MakeModel, is_tied: bool, has_lora: bool) -> None:
    model = tiny_model(tie_word_embeddings=is_tied)
    trained = add_lora(model, LoraSettings(r=2)) if has_lora else model
    skeleton = skeleton_of(trained)
    assert all(parameter.is_meta for parameter in skeleton.parameters())
    with torch.no_grad():
        for parameter in trained.parameters():
            parameter.add_(0.1)
    again = filled(skeleton, trained.state_dict())
    ids = torch.tensor([[1, 2, 3]])
    assert torch.equal(again(ids).logits, trained(ids).logits)
    assert weights_digest(again) == weights_digest(trained)


def test_a_function_runs_in_the_place_of_a_forward_pass_once_between_its_hooks() -> None:
    layer = nn.Linear(1, 1)
    order: list[str] = []
    layer.register_forward_pre_hook(lambda *_: order.append("before"))
    layer.register_forward_hook(lambda *_: order.append("after"))
    assert run_as_forward(layer, lambda: order.append("instead") or 3, called=layer) == 3  # type: ignore[func-returns-value]
    assert order == ["before", "instead", "after"]
    assert layer(torch.ones(1)).shape == (1,), "its own forward is back"


def test_a_forward_that_somebody_has_put_on_a_module_is_given_back_also_after_an_error() -> None:
    layer = nn.Linear(1, 1)
    layer.forward = lambda rows: rows + 1  # type: ignore[method-assign]

    def fail() -> None:
        raise KeyError

    with pytest.raises(KeyError):
        run_as_forward(layer, fail, called=layer)
    assert layer(torch.ones(1)).item() == 2.0


def test_a_model_that_is_not_split_is_not_called(tiny_model: MakeModel) -> None:
    model = tiny_model()
    model.register_forward_pre_hook(lambda *_: pytest.fail("called"))
    assert within_forward(model, lambda: 3) == 3
