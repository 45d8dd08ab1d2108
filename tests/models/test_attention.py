from collections.abc import Callable

import pytest
import torch
from transformers import (
    GPTJConfig,
    GPTJForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    Qwen3NextConfig,
    Qwen3NextForCausalLM,
)

from lightning_pref.data.groups import GroupBatch, PromptGroup
from lightning_pref.models.attention import SCORE_OVERHEAD, mask_obstacle, predicting_hidden, takes_positions, token_costs
from lightning_pref.models.layouts import PlacedLayout, plan_layout

Build = Callable[..., LlamaForCausalLM]


def test_models_with_plain_attention_take_every_layout(tiny_model: Build) -> None:
    assert mask_obstacle(tiny_model().model) is None


def test_state_space_layers_are_an_obstacle() -> None:
    model = MambaForCausalLM(MambaConfig(vocab_size=8, hidden_size=8, num_hidden_layers=1, state_size=2))
    assert "carry a state along the row" in str(mask_obstacle(model.backbone))


def test_a_mixture_of_attention_and_linear_attention_is_an_obstacle() -> None:
    with torch.device("meta"):
        config = Qwen3NextConfig(num_hidden_layers=2, layer_types=["linear_attention", "full_attention"], num_experts=2)
        model = Qwen3NextForCausalLM(config)
    assert "layers (linear_attention)" in str(mask_obstacle(model.model))


def test_attention_outside_the_interface_of_transformers_is_an_obstacle() -> None:
    model = GPTJForCausalLM(GPTJConfig(vocab_size=8, n_embd=8, n_layer=1, n_head=2, rotary_dim=2, bos_token_id=0, eos_token_id=0))
    assert "does not go through transformers' attention interface" in str(mask_obstacle(model.transformer))


def test_backends_without_explicit_masks_are_an_obstacle(tiny_model: Build) -> None:
    backbone = tiny_model().model
    backbone.config._attn_implementation = "flash_attention_2"
    assert "'flash_attention_2' takes no explicit mask. Load the model with attn_implementation='sdpa'" in str(
        mask_obstacle(backbone)
    )


def test_positions_are_passed_to_models_that_name_them(tiny_model: Build) -> None:
    assert takes_positions(tiny_model().model)
    assert not takes_positions(MambaForCausalLM(MambaConfig(vocab_size=8, hidden_size=8, num_hidden_layers=1)).backbone)


def test_costs_count_multiply_adds_of_a_layer() -> None:
    sizes = {"hidden_size": 8, "intermediate_size": 16, "num_attention_heads": 4, "num_key_value_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=8, num_hidden_layers=1))
    projections = sum(module.weight.numel() for module in model.model.layers.modules() if isinstance(module, torch.nn.Linear))
    costs = token_costs(model.model)
    assert costs.slot == projections
    assert costs.score == 4 * (2 * 2 + SCORE_OVERHEAD)


@pytest.mark.parametrize("layout", ["padded", "packed", "shared"])
@pytest.mark.parametrize("backend", ["eager", "sdpa"])
def test_padding_makes_no_nan_in_values_or_gradients(tiny_model: Build, backend: str, layout: PlacedLayout) -> None:
    """Rows of 9, 1 and 2 tokens behind a window of 2: most of two rows is padding out of everyone's sight."""
    model = tiny_model()
    model.set_attn_implementation(backend)
    ids = torch.arange(1, 13).numpy()
    groups = [
        PromptGroup(row_id=0, prompt=ids[:4], responses=(ids[4:9],)),
        PromptGroup(row_id=1, prompt=ids[:1], responses=(ids[1:2], ids[2:4])),
    ]
    batch = GroupBatch.from_groups(groups)
    model.config.sliding_window = 2
    hidden = predicting_hidden(model.model, batch, plan_layout(batch, layout))
    assert hidden.shape == (8, 32)
    hidden.square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.model.parameters())
