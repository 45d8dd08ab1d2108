"""L7 and its neighbours: every layout gives the values and gradients of one plain call per sequence, for every architecture."""

import copy
from collections.abc import Sequence
from functools import cache

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import (
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    GPTNeoXConfig,
    Llama4TextConfig,
    LlamaConfig,
    MambaConfig,
    MistralConfig,
    OPTConfig,
    PhiConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)
from transformers.models.auto.modeling_auto import AutoModelForCausalLM

from lightning_pref.data.groups import GroupBatch, PromptGroup
from lightning_pref.models.forward import Layout, response_logps
from lightning_pref.models.parity import layout_obstacle

VOCABULARY = 64
# Shorter than the sequences below, and than a response away from its prompt in a shared row.
WINDOW = 4
# Large enough for attention to matter: with the usual 0.02 a leak between responses would hide in the tolerance.
SPREAD = 0.25
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "initializer_range": SPREAD,
}
GROUPED = {**SIZES, "num_key_value_heads": 2}
ENDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
GEMMA = {"head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": WINDOW, "final_logit_softcapping": 4.0}
MIXED = ["sliding_attention", "full_attention"]

CONFIGS: dict[str, PreTrainedConfig] = {
    "llama": LlamaConfig(**GROUPED),
    "qwen2": Qwen2Config(**GROUPED),
    "qwen2-mixed": Qwen2Config(**GROUPED, use_sliding_window=True, sliding_window=WINDOW, max_window_layers=1),
    "qwen3": Qwen3Config(**GROUPED, head_dim=8),
    "gemma2": Gemma2Config(**GROUPED, **GEMMA, layer_types=MIXED, attn_logit_softcapping=3.0),
    "gemma3": Gemma3TextConfig(**GROUPED, **GEMMA, layer_types=MIXED),
    "mistral": MistralConfig(**GROUPED, sliding_window=WINDOW),
    "gpt2": GPT2Config(**SIZES, **ENDS, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0),
    "gpt-neox": GPTNeoXConfig(**SIZES),
    "phi": PhiConfig(**GROUPED),
    "llama4-chunked": Llama4TextConfig(
        **GROUPED, head_dim=8, intermediate_size_mlp=48, num_local_experts=2, moe_layers=[1], attention_chunk_size=WINDOW
    ),
    "opt": OPTConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        ffn_dim=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
        init_std=SPREAD,
        dropout=0.0,
    ),
    "mamba": MambaConfig(
        **ENDS, vocab_size=VOCABULARY, hidden_size=16, state_size=4, num_hidden_layers=2, initializer_range=SPREAD
    ),
}
# transformers refuses SDPA where attention scores are soft-capped.
EAGER_ONLY = ("gemma2",)
MASKED_CASES = [
    (name, backend)
    for name in CONFIGS
    for backend in ("eager", "sdpa")
    if name != "mamba" and (backend == "eager" or name not in EAGER_ONLY)
]


@cache
def build(name: str, backend: str) -> PreTrainedModel:
    """A random model of the architecture, its norms and biases away from ones and zeros."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        model = AutoModelForCausalLM.from_config(CONFIGS[name], attn_implementation=backend)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim == 1:
                    parameter.add_(0.2 * torch.randn_like(parameter))
    return model.train()


def random_batch(shapes: Sequence[tuple[int, Sequence[int]]], seed: int = 0) -> GroupBatch:
    generator = np.random.default_rng(seed)
    return GroupBatch.from_groups(
        [
            PromptGroup(
                row_id=g,
                prompt=generator.integers(0, VOCABULARY, prompt),
                responses=tuple(generator.integers(0, VOCABULARY, size) for size in responses),
            )
            for g, (prompt, responses) in enumerate(shapes)
        ]
    )


BATCH = random_batch([(6, (7, 3)), (1, (9,)), (3, (1, 5, 2))])


def plain(model: PreTrainedModel, batch: GroupBatch) -> Tensor:
    """The oracle: each sequence by itself through the model as it is, its logits shifted by one."""
    found = []
    for item in batch.groups():
        for response in item.responses:
            ids = torch.from_numpy(np.concatenate([item.prompt, response]))[None]
            table = model(input_ids=ids, use_cache=False).logits.log_softmax(-1)[0, len(item.prompt) - 1 : -1]
            found.append(table.gather(-1, torch.from_numpy(response)[:, None]).squeeze(-1))
    return torch.cat(found)


def gradients(model: PreTrainedModel, token_logps: Tensor) -> dict[str, Tensor]:
    """Of a loss that weighs every token differently, so that no two errors cancel."""
    parameters = dict(model.named_parameters())
    loss = (token_logps * torch.linspace(-1.0, 1.0, len(token_logps))).sum()
    found = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
    return {name: gradient for name, gradient in zip(parameters, found, strict=True) if gradient is not None}


@cache
def oracle(name: str, backend: str) -> tuple[Tensor, dict[str, Tensor]]:
    model = build(name, backend)
    token_logps = plain(model, BATCH)
    return token_logps.detach(), gradients(model, token_logps)


def assert_agrees(model: PreTrainedModel, layout: Layout, expected: Tensor, expected_gradients: dict[str, Tensor]) -> None:
    out = response_logps(model, BATCH, layout=layout, chunk_elements=5 * VOCABULARY)
    torch.testing.assert_close(out.token_logps, expected, rtol=1e-5, atol=1e-5)
    found = gradients(model, out.token_logps)
    assert found.keys() == expected_gradients.keys()
    for name, gradient in found.items():
        # Entries far below the largest of their tensor are sums of large terms that cancel.
        scale = max(1.0, expected_gradients[name].abs().max().item())
        expected_gradient = expected_gradients[name] / scale
        torch.testing.assert_close(
            gradient / scale, expected_gradient, rtol=1e-5, atol=1e-5, msg=lambda text, n=name: f"{n}: {text}"
        )


@pytest.mark.parametrize("layout", ["padded", "packed", "shared"])
@pytest.mark.parametrize(("name", "backend"), MASKED_CASES)
def test_L7_layouts_give_values_and_gradients_of_plain_calls(name: str, backend: str, layout: Layout) -> None:
    assert layout_obstacle(build(name, backend)) is None
    assert_agrees(build(name, backend), layout, *oracle(name, backend))


def test_L7_state_space_models_agree_in_padded_rows() -> None:
    assert_agrees(build("mamba", "eager"), "padded", *oracle("mamba", "eager"))
    assert response_logps(build("mamba", "eager"), BATCH).layout == "padded"


@pytest.mark.parametrize("layout", ["packed", "shared"])
def test_L7_state_space_models_refuse_other_rows(layout: Layout) -> None:
    with pytest.raises(ValueError, match=rf"MambaForCausalLM cannot take {layout} rows: .*state.*Use layout='padded', or 'auto'"):
        response_logps(build("mamba", "eager"), BATCH, layout=layout)


@pytest.mark.parametrize("name", ["mistral", "gemma3", "qwen2-mixed", "llama4-chunked"])
def test_L7_the_window_matters_in_this_test(name: str) -> None:
    """A model that is told of no window gives other numbers, so the agreement above is not that of masks that never bite."""
    model = build(name, "eager")
    wide = AutoModelForCausalLM.from_config(CONFIGS[name], attn_implementation="eager")
    wide.load_state_dict(model.state_dict())
    wide.config.sliding_window = wide.config.attention_chunk_size = 64
    seen = response_logps(wide, BATCH, layout="shared").token_logps
    assert (seen - oracle(name, "eager")[0]).abs().max() > 0.01


@pytest.mark.parametrize(("name", "backend"), MASKED_CASES)
def test_L8_left_padding_would_give_the_same(name: str, backend: str) -> None:
    """Our rows pad on the right; the model's own answer to rows padded on the left is equal, given explicit positions."""
    model = build(name, backend)
    sequences = [(item.prompt, response) for item in BATCH.groups() for response in item.responses]
    length = max(len(prompt) + len(response) for prompt, response in sequences)
    ids, mask = torch.zeros(len(sequences), length, dtype=torch.long), torch.zeros(len(sequences), length, dtype=torch.long)
    for row, (prompt, response) in enumerate(sequences):
        own = torch.from_numpy(np.concatenate([prompt, response]))
        ids[row, -len(own) :] = own
        mask[row, -len(own) :] = 1
    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    with torch.no_grad():
        table = model(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False).logits.log_softmax(-1)
        right = response_logps(model, BATCH, layout="padded").token_logps
    left = torch.cat(
        [
            table[row, -len(response) - 1 : -1].gather(-1, torch.from_numpy(response)[:, None]).squeeze(-1)
            for row, (_, response) in enumerate(sequences)
        ]
    )
    torch.testing.assert_close(right, left, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("layout", ["padded", "packed", "shared"])
@pytest.mark.parametrize(("name", "backend"), MASKED_CASES)
def test_L9_a_group_scores_the_same_alone_and_in_company(name: str, backend: str, layout: Layout) -> None:
    model = build(name, backend)
    with torch.no_grad():
        together = response_logps(model, BATCH, layout=layout).logps
        alone = [response_logps(model, GroupBatch.from_groups([item]), layout=layout).logps for item in BATCH.groups()]
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("layout", ["padded", "packed", "shared"])
@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2"])
def test_bfloat16_layouts_agree_to_its_precision(name: str, layout: Layout) -> None:
    model = build(name, "eager")
    # A copy, because `from_config` writes the dtype into the config it is given.
    rounded = AutoModelForCausalLM.from_config(copy.deepcopy(CONFIGS[name]), attn_implementation="eager", dtype=torch.bfloat16)
    rounded.load_state_dict(model.state_dict())
    with torch.no_grad():
        found = response_logps(rounded, BATCH, layout=layout)
    assert found.token_logps.dtype == torch.float32
    difference = (found.token_logps - oracle(name, "eager")[0]).abs()
    assert difference.mean() < 0.1
    assert difference.max() < 0.6


shapes = st.lists(
    st.tuples(st.integers(1, 9), st.lists(st.integers(1, 9), min_size=1, max_size=4)),
    min_size=1,
    max_size=4,
)


@settings(max_examples=25, deadline=None)
@given(shapes, st.integers(0, 9))
def test_L7_layouts_agree_for_groups_of_any_shape(sizes: list[tuple[int, list[int]]], seed: int) -> None:
    model = build("llama", "sdpa")
    batch = random_batch(sizes, seed)
    expected = plain(model, batch)
    expected_gradient = torch.autograd.grad(expected.square().mean(), model.model.embed_tokens.weight)[0]
    for layout in ("padded", "packed", "shared", "auto"):
        found = response_logps(model, batch, layout=layout)
        torch.testing.assert_close(found.token_logps, expected, rtol=1e-5, atol=2e-5)
        gradient = torch.autograd.grad(found.token_logps.square().mean(), model.model.embed_tokens.weight)[0]
        scale = max(1.0, expected_gradient.abs().max().item())
        torch.testing.assert_close(gradient / scale, expected_gradient / scale, rtol=1e-5, atol=1e-5)
