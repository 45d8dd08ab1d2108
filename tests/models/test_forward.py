import inspect
import math
import warnings
from collections.abc import Callable
from typing import get_args

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from lightning_pref.data.groups import GroupBatch, PromptGroup
from lightning_pref.models.backbones import enable_gradient_checkpointing
from lightning_pref.models.forward import Layout, response_logps
from lightning_pref.models.layouts import PlacedLayout

Build = Callable[..., LlamaForCausalLM]
Groups = Callable[..., list[PromptGroup]]
LAYOUTS: tuple[PlacedLayout, ...] = get_args(PlacedLayout)
VOCABULARY = 64
every_layout = pytest.mark.parametrize("layout", LAYOUTS)


def plain_tables(model: PreTrainedModel | PeftModel, batch: GroupBatch) -> tuple[Tensor, Tensor]:
    """The oracle: log-softmax rows [N, V] that predict the response tokens, each sequence run by itself; and those tokens."""
    tables, tokens = [], []
    for item in batch.groups():
        for response in item.responses:
            ids = torch.tensor([[*item.prompt.tolist(), *response.tolist()]])
            tables.append(model(input_ids=ids, use_cache=False).logits.float().log_softmax(-1)[0, len(item.prompt) - 1 : -1])
            tokens.append(torch.from_numpy(response))
    return torch.cat(tables), torch.cat(tokens)


def plain(model: PreTrainedModel | PeftModel, batch: GroupBatch) -> Tensor:
    tables, tokens = plain_tables(model, batch)
    return tables.gather(-1, tokens[:, None]).squeeze(-1)


def gradients(model: nn.Module, token_logps: Tensor) -> list[Tensor]:
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return list(torch.autograd.grad((token_logps * torch.linspace(-1, 1, len(token_logps))).sum(), trainable))


def assert_same_gradients(found: list[Tensor], expected: list[Tensor]) -> None:
    for gradient, reference in zip(found, expected, strict=True):
        scale = max(1.0, reference.abs().max().item())
        torch.testing.assert_close(gradient / scale, reference / scale, rtol=1e-5, atol=1e-5)


def bigram_model(table: list[list[float]]) -> LlamaForCausalLM:
    """A model whose next-token probabilities after token i are row i of the table, whatever stands before."""
    size = len(table)
    config = LlamaConfig(
        vocab_size=size,
        hidden_size=size,
        num_hidden_layers=0,
        num_attention_heads=1,
        head_dim=2,
        intermediate_size=2,
        rms_norm_eps=0.0,
    )
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        model.model.embed_tokens.weight.copy_(torch.eye(size))
        # The norm makes each unit vector sqrt(size) long.
        model.model.norm.weight.fill_(size**-0.5)
        model.lm_head.weight.copy_(torch.tensor(table).log().T)
    return model


BIGRAMS = [[0.2, 0.5, 0.3], [0.6, 0.3, 0.1], [0.25, 0.25, 0.5]]


def group(prompt: list[int], *responses: list[int], row_id: int = 0) -> PromptGroup:
    return PromptGroup(
        row_id=row_id, prompt=torch.tensor(prompt).numpy(), responses=tuple(torch.tensor(r).numpy() for r in responses)
    )


@every_layout
def test_L1_logps_of_three_tokens_against_a_table_made_by_hand(layout: Layout) -> None:
    """After prompt 0: response (1, 2) has P(1|0) P(2|1) = 0.5 * 0.1, response (2) has P(2|0) = 0.3."""
    out = response_logps(bigram_model(BIGRAMS), GroupBatch.from_groups([group([0], [1, 2], [2])]), layout=layout)
    torch.testing.assert_close(out.token_logps.exp(), torch.tensor([0.5, 0.1, 0.3]))
    torch.testing.assert_close(out.logps.exp(), torch.tensor([0.05, 0.3]))
    assert out.response.tolist() == [0, 0, 1]
    assert out.lengths.tolist() == [2, 1]


@every_layout
def test_L2_what_the_prompt_tokens_would_score_does_not_enter(layout: Layout) -> None:
    """A bigram model sees only the token before; so only the last prompt token may matter."""
    model = bigram_model(BIGRAMS)
    first = response_logps(model, GroupBatch.from_groups([group([0, 0, 1], [2, 0])]), layout=layout)
    second = response_logps(model, GroupBatch.from_groups([group([2, 0, 1], [2, 0])]), layout=layout)
    assert torch.equal(first.token_logps, second.token_logps)
    torch.testing.assert_close(first.logps.exp(), torch.tensor([0.1 * 0.25]))


@every_layout
def test_L2_hidden_states_of_other_positions_get_no_gradient(tiny_model: Build, layout: Layout) -> None:
    """Of prompt (3 tokens), responses (2) and (1): the last prompt token and the first of two response tokens predict."""
    model = tiny_model()
    outputs: list[Tensor] = []
    batch = GroupBatch.from_groups([group([5, 6, 7], [8, 9], [10])])
    response_logps(model, batch, layout=layout)
    model.model.register_forward_hook(lambda _module, _inputs, output: outputs.append(output[0]))
    loss = response_logps(model, batch, layout=layout).logps.sum()
    (gradient,) = torch.autograd.grad(loss, outputs)
    touched = (gradient.abs().sum(-1) > 0).int().tolist()
    expected = {
        "padded": [[0, 0, 1, 1, 0], [0, 0, 1, 0, 0]],
        "packed": [[0, 0, 1, 1, 0], [0, 0, 1, 0, 0]],
        "shared": [[0, 0, 1, 1, 0, 0]],
    }
    assert touched == expected[layout]


@every_layout
def test_L6_entropy_collision_and_hidden_states_are_those_of_the_predicting_positions(
    tiny_model: Build, random_groups: Groups, layout: Layout
) -> None:
    model = tiny_model()
    batch = GroupBatch.from_groups(random_groups())
    tables, _ = plain_tables(model, batch)
    out = response_logps(model, batch, layout=layout, want=("entropy", "collision", "hidden"), chunk_elements=200)
    assert out.entropy is not None
    assert out.collision is not None
    assert out.hidden is not None
    torch.testing.assert_close(out.entropy, -(tables.exp() * tables).sum(-1), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(out.collision, (2 * tables).exp().sum(-1).log(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(model.lm_head(out.hidden).log_softmax(-1), tables, rtol=1e-5, atol=1e-5)
    expected = gradients(model, -(tables.exp() * tables).sum(-1))
    assert_same_gradients(gradients(model, out.entropy), expected)


def test_L13_entropy_does_not_depend_on_the_company_in_a_batch(tiny_model: Build, random_groups: Groups) -> None:
    """A long neighbour pads the short rows; their entropies stay, and no entry is added for padding or prompts."""
    model, groups = tiny_model(), random_groups()
    alone = response_logps(model, GroupBatch.from_groups(groups), layout="padded", want=["entropy"])
    neighbour = group(list(range(20)), list(range(30)), row_id=9)
    together = response_logps(model, GroupBatch.from_groups([*groups, neighbour]), layout="padded", want=["entropy"])
    assert alone.entropy is not None
    assert together.entropy is not None
    assert len(together.entropy) == len(alone.entropy) + 30
    torch.testing.assert_close(together.entropy[:-30], alone.entropy, rtol=1e-5, atol=1e-5)


@every_layout
@pytest.mark.parametrize("chunk_elements", [1, 3 * VOCABULARY, 2**24])
def test_L6_the_chunk_size_changes_neither_values_nor_gradients(
    tiny_model: Build, random_groups: Groups, chunk_elements: int, layout: Layout
) -> None:
    model = tiny_model()
    batch = GroupBatch.from_groups(random_groups())
    expected = plain(model, batch)
    found = response_logps(model, batch, layout=layout, chunk_elements=chunk_elements).token_logps
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert_same_gradients(gradients(model, found), gradients(model, expected))


@every_layout
def test_L6_gradient_checkpointing_changes_neither_values_nor_gradients(
    tiny_model: Build, random_groups: Groups, layout: Layout
) -> None:
    model = tiny_model().train()
    batch = GroupBatch.from_groups(random_groups())
    expected = plain(model, batch)
    expected_gradients = gradients(model, expected)
    response_logps(model, batch, layout=layout)
    enable_gradient_checkpointing(model)
    calls: list[int] = []
    model.model.layers[0].mlp.register_forward_pre_hook(lambda *_: calls.append(1))
    found = response_logps(model, batch, layout=layout).token_logps
    found_gradients = gradients(model, found)
    assert len(calls) == 2
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert_same_gradients(found_gradients, expected_gradients)


@every_layout
def test_L6_adapters_on_and_off(tiny_model: Build, random_groups: Groups, layout: Layout) -> None:
    batch = GroupBatch.from_groups(random_groups())
    base = plain(tiny_model(), batch)
    with warnings.catch_warnings():
        # peft asks transformers by a name that is going away.
        warnings.simplefilter("ignore", FutureWarning)
        model = get_peft_model(tiny_model(), LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.constant_(parameter, 0.05)
    expected = plain(model, batch)
    found = response_logps(model, batch, layout=layout).token_logps
    assert (expected - base).abs().max() > 0.1
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert_same_gradients(gradients(model, found), gradients(model, expected))
    with model.disable_adapter(), torch.no_grad():
        torch.testing.assert_close(response_logps(model, batch, layout=layout).token_logps, base, rtol=1e-5, atol=1e-5)


@every_layout
@pytest.mark.parametrize("backend", ["eager", "sdpa"])
def test_L6_autocast_gives_float32_logps_close_to_exact_ones(
    tiny_model: Build, random_groups: Groups, backend: str, layout: Layout
) -> None:
    model = tiny_model()
    model.set_attn_implementation(backend)
    batch = GroupBatch.from_groups(random_groups())
    exact = plain(model, batch)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = response_logps(model, batch, layout=layout, want=["hidden"])
        own = plain(model, batch)
    assert out.token_logps.dtype == torch.float32
    assert (out.token_logps - exact).abs().mean() < 2 * (own - exact).abs().mean() + 1e-3
    assert all(gradient.isfinite().all() for gradient in gradients(model, out.token_logps))


@every_layout
def test_L10_log_probs_at_a_temperature_are_those_of_the_divided_logits(
    tiny_model: Build, random_groups: Groups, layout: Layout
) -> None:
    model, groups = tiny_model(), random_groups(2, 1)
    out = response_logps(model, GroupBatch.from_groups(groups), layout=layout, temperature=0.7)
    expected = []
    for item in groups:
        ids = torch.from_numpy(np.concatenate([item.prompt, *item.responses]))[None]
        logps = torch.log_softmax(model(ids).logits[0].double() / 0.7, dim=-1)
        first = len(item.prompt)
        expected.append(logps[first - 1 : -1].gather(-1, ids[0, first:, None]).sum())
    torch.testing.assert_close(out.logps.double(), torch.stack(expected), atol=1e-4, rtol=1e-5)


def test_L6_every_option_has_a_test_above() -> None:
    options = ["model", "batch", "layout", "want", "temperature", "chunk_elements"]
    assert list(inspect.signature(response_logps).parameters) == options


def test_dropout_follows_the_mode_of_the_model(tiny_model: Build, random_groups: Groups) -> None:
    model = tiny_model(attention_dropout=0.5)
    batch = GroupBatch.from_groups(random_groups())
    model.eval()
    assert torch.equal(response_logps(model, batch).logps, response_logps(model, batch).logps)
    model.train()
    assert not torch.equal(response_logps(model, batch).logps, response_logps(model, batch).logps)


def test_auto_takes_the_cheapest_layout_and_says_which(tiny_model: Build) -> None:
    model = tiny_model()
    long_prompt = GroupBatch.from_groups([group(list(range(40)), [1, 2], [3, 4], [5, 6])])
    assert response_logps(model, long_prompt).layout == "shared"
    ragged = GroupBatch.from_groups([group([1], list(range(n)), row_id=n) for n in (40, 4, 4, 5, 6, 7)])
    assert response_logps(model, ragged).layout == "packed"
    even = GroupBatch.from_groups([group([1, 2], [3, 4, 5], row_id=row) for row in range(3)])
    assert response_logps(model, even).layout == "padded"


def test_quantities_nobody_wants_are_not_returned(tiny_model: Build, random_groups: Groups) -> None:
    out = response_logps(tiny_model(), GroupBatch.from_groups(random_groups()))
    assert (out.entropy, out.collision, out.hidden) == (None, None, None)


def test_sums_of_long_bfloat16_responses_are_float32() -> None:
    """2,000 times log 0.3: bfloat16 could not even count to it."""
    model = bigram_model([[0.3, 0.7], [0.7, 0.3]]).to(torch.bfloat16)
    out = response_logps(model, GroupBatch.from_groups([group([0], [0] * 2000)]))
    assert out.logps.dtype == torch.float32
    assert out.logps.item() == pytest.approx(2000 * math.log(0.3), rel=1e-2)
    assert out.logps.item() == pytest.approx(out.token_logps.double().sum().item(), rel=1e-6)


def test_flash_attention_takes_padded_rows_only_for_now(tiny_model: Build, random_groups: Groups) -> None:
    model = tiny_model()
    batch = GroupBatch.from_groups(random_groups())
    response_logps(model, batch, layout="padded")
    model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(
        ValueError, match=r"LlamaForCausalLM cannot take shared rows: .*'flash_attention_2' takes no explicit mask"
    ):
        response_logps(model, batch, layout="shared")


def test_unknown_words_are_refused_with_the_known_ones(tiny_model: Build, random_groups: Groups) -> None:
    batch = GroupBatch.from_groups(random_groups())
    with pytest.raises(ValueError, match=r"Unknown layout 'folded'; known: auto, padded, packed, shared\."):
        response_logps(tiny_model(), batch, layout="folded")
    with pytest.raises(ValueError, match=r"Unknown quantity 'logits' in `want`; known: entropy, collision, hidden\."):
        response_logps(tiny_model(), batch, want=["logits"])
