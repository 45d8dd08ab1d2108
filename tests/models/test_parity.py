from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.modeling_outputs import CausalLMOutput
from transformers.models.llama.modeling_llama import LlamaModel

from lightning_pref.data.groups import GroupBatch, PromptGroup
from lightning_pref.models.forward import response_logps
from lightning_pref.models.heads import head_of
from lightning_pref.models.parity import layout_obstacle, verified_head

Build = Callable[..., LlamaForCausalLM]
Groups = Callable[..., list[PromptGroup]]
CONFIG = LlamaConfig(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    max_position_embeddings=64,
    initializer_range=0.25,
)


class ExtraTemperature(LlamaForCausalLM):
    """Does something to its logits that no config tells of."""

    def forward(self, *args: object, **kwargs: object) -> object:
        output = super().forward(*args, **kwargs)
        output.logits = output.logits * 0.9
        return output


class MoreLogits(LlamaForCausalLM):
    """Answers with more logits than its head has rows."""

    def forward(self, *args: object, **kwargs: object) -> object:
        output = super().forward(*args, **kwargs)
        output.logits = torch.cat([output.logits, output.logits[..., :1]], dim=-1)
        return output


class RoundTheBackbone(LlamaForCausalLM):
    """Makes its logits without its backbone."""

    def forward(self, input_ids: Tensor, **kwargs: object) -> object:
        return CausalLMOutput(logits=self.lm_head(self.model.embed_tokens(input_ids)))


class PlacesForPositions(LlamaModel):
    """Counts places in the row, whatever positions it is given."""

    def forward(self, input_ids: Tensor, position_ids: Tensor | None = None, **kwargs: object) -> object:
        places = torch.arange(input_ids.shape[1])[None].expand_as(input_ids)
        return super().forward(input_ids=input_ids, position_ids=places, **kwargs)


class NoExplicitMasks(LlamaModel):
    """Knows two-dimensional masks only."""

    def forward(self, attention_mask: Tensor | None = None, position_ids: Tensor | None = None, **kwargs: object) -> object:
        if attention_mask is not None:
            _rows, _length = attention_mask.shape
        return super().forward(attention_mask=attention_mask, position_ids=position_ids, **kwargs)


def with_backbone(kind: type[LlamaModel]) -> LlamaForCausalLM:
    torch.manual_seed(0)
    model = LlamaForCausalLM(CONFIG)
    model.model = kind(CONFIG)
    return model


def test_L5_a_model_that_changes_its_logits_is_refused(random_groups: Groups) -> None:
    batch = GroupBatch.from_groups(random_groups())
    with pytest.raises(ValueError, match=r"logits of ExtraTemperature are not those of its head: .* differ by 0\.11 .*heads\.py"):
        response_logps(ExtraTemperature(CONFIG), batch)


def test_L5_a_model_with_other_logits_than_its_head_has_rows_is_refused() -> None:
    model = MoreLogits(CONFIG)
    with pytest.raises(ValueError, match=r"logits of MoreLogits are not those of its head"):
        verified_head(model, head_of(model))


def test_L5_a_model_that_goes_round_its_backbone_is_refused() -> None:
    model = RoundTheBackbone(CONFIG)
    with pytest.raises(ValueError, match=r"RoundTheBackbone makes its logits without calling its LlamaModel"):
        verified_head(model, head_of(model))


def test_a_model_that_counts_places_gets_padded_rows(random_groups: Groups) -> None:
    model = with_backbone(PlacesForPositions)
    batch = GroupBatch.from_groups(random_groups())
    assert response_logps(model, batch).layout == "padded"
    with pytest.raises(
        ValueError, match=r"cannot take shared rows: its hidden states in shared rows differ by .* layout='padded'"
    ):
        response_logps(model, batch, layout="shared")


def test_a_model_that_fails_on_explicit_masks_gets_padded_rows(random_groups: Groups) -> None:
    model = with_backbone(NoExplicitMasks)
    batch = GroupBatch.from_groups(random_groups())
    assert response_logps(model, batch).layout == "padded"
    with pytest.raises(ValueError, match=r"its forward pass fails on explicit masks \(ValueError: too many values to unpack"):
        response_logps(model, batch, layout="packed")


def test_checks_run_once_per_model_and_attention_backend(tiny_model: Build, random_groups: Groups) -> None:
    model = tiny_model()
    batch = GroupBatch.from_groups(random_groups())
    calls: list[int] = []
    model.model.register_forward_hook(lambda *_: calls.append(1))
    response_logps(model, batch, layout="padded")
    # One for the logits of the head, one for the batch; nobody asked for packed or shared rows yet.
    assert len(calls) == 2
    response_logps(model, batch, layout="packed")
    assert len(calls) == 2 + 3 + 1
    response_logps(model, batch)
    assert len(calls) == 7
    model.set_attn_implementation("eager")
    assert layout_obstacle(model) is None
    assert len(calls) == 7 + 3


def test_checks_leave_no_trace(tiny_model: Build, random_groups: Groups) -> None:
    """Random state, training flags (also mixed ones) and gradients are as before the first call."""
    model = tiny_model(attention_dropout=0.5).train()
    model.model.layers[0].eval()
    flags = [module.training for module in model.modules()]
    state = torch.get_rng_state()
    verified_head(model, head_of(model))
    assert layout_obstacle(model) is None
    assert torch.equal(torch.get_rng_state(), state)
    assert [module.training for module in model.modules()] == flags
    assert all(parameter.grad is None for parameter in model.parameters())


def test_checks_are_exact_under_autocast_too(tiny_model: Build) -> None:
    """Inside the check autocast is off; a float32 model is held to float32 tolerance."""
    model = tiny_model()
    seen: list[torch.dtype] = []
    model.lm_head.register_forward_hook(lambda _module, _inputs, output: seen.append(output.dtype))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        verified_head(model, head_of(model))
    assert seen == [torch.float32]


def test_checks_allow_for_tf32_where_it_is_switched_on(tiny_model: Build) -> None:
    """A head off by 0.1 % is an error in full float32 and within the precision of TensorFloat-32."""
    model = tiny_model()
    model.config.logit_scale = 1.001
    with pytest.raises(ValueError, match="are not those of its head"):
        verified_head(model, head_of(model))
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        assert verified_head(model, head_of(model)).scale == 1.001
    finally:
        torch.set_float32_matmul_precision(before)
