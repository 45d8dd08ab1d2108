"""L5 and T13: the log-probs that the head gives in chunks are those of the model's own logits, gradients included."""

import warnings
from collections.abc import Callable

import pytest
import torch
from peft import LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertModel,
    CohereConfig,
    CohereForCausalLM,
    FalconH1Config,
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaModel,
    OPTConfig,
    OPTForCausalLM,
    PhiConfig,
    PhiForCausalLM,
    PreTrainedModel,
    RecurrentGemmaConfig,
    RecurrentGemmaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from lightning_pref.data.groups import GroupBatch, PromptGroup
from lightning_pref.functional.linear_logps import linear_logits
from lightning_pref.models.forward import response_logps
from lightning_pref.models.heads import backbone_of, causal_lm_of, head_of

Build = Callable[..., LlamaForCausalLM]
Groups = Callable[..., list[PromptGroup]]
VOCABULARY = 64
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.25,
}


def plain(model: PreTrainedModel | PeftModel, batch: GroupBatch) -> Tensor:
    """The oracle: each sequence by itself through the model as it is."""
    found = []
    for item in batch.groups():
        for response in item.responses:
            ids = torch.tensor([[*item.prompt.tolist(), *response.tolist()]])
            table = model(input_ids=ids, use_cache=False).logits.log_softmax(-1)[0, len(item.prompt) - 1 : -1]
            found.append(table.gather(-1, torch.from_numpy(response)[:, None]).squeeze(-1))
    return torch.cat(found)


def assert_parity(model: PreTrainedModel | PeftModel, groups: list[PromptGroup]) -> None:
    """Values and gradients of every trainable parameter equal the oracle's."""
    batch = GroupBatch.from_groups(groups)
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    expected = plain(model, batch)
    weights = torch.linspace(-1.0, 1.0, len(expected))
    expected_gradients = torch.autograd.grad((weights * expected).sum(), trainable, allow_unused=True)
    found = response_logps(model, batch, chunk_elements=7 * VOCABULARY).token_logps
    gradients = torch.autograd.grad((weights * found).sum(), trainable, allow_unused=True)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    for gradient, expected_gradient in zip(gradients, expected_gradients, strict=True):
        assert (gradient is None) == (expected_gradient is None)
        if gradient is not None and expected_gradient is not None:
            scale = max(1.0, expected_gradient.abs().max().item())
            torch.testing.assert_close(gradient / scale, expected_gradient / scale, rtol=1e-5, atol=1e-5)


def adapted(model: PreTrainedModel, **settings: object) -> PeftModel:
    """With LoRA factors away from zero, where an adapter that is dropped would go unnoticed."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, task_type="CAUSAL_LM", **settings))
    torch.manual_seed(1)
    for name, parameter in found.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter, std=0.2)
    return found


def seeded(build: Callable[[], PreTrainedModel]) -> PreTrainedModel:
    torch.manual_seed(2)
    return build()


def test_L5_soft_cap(random_groups: Groups) -> None:
    sizes = {**SIZES, "head_dim": 8}
    for model in (
        seeded(lambda: Gemma2ForCausalLM(Gemma2Config(**sizes, final_logit_softcapping=2.0))),
        seeded(lambda: Gemma3ForCausalLM(Gemma3TextConfig(**sizes, final_logit_softcapping=2.0))),
        seeded(lambda: RecurrentGemmaForCausalLM(RecurrentGemmaConfig(**sizes, lru_width=32, logits_soft_cap=2.0))),
    ):
        assert head_of(model).softcap == 2.0
        assert_parity(model, random_groups())


def test_L5_no_soft_cap_where_the_config_has_none(random_groups: Groups) -> None:
    model = seeded(lambda: Gemma2ForCausalLM(Gemma2Config(**SIZES, head_dim=8, final_logit_softcapping=None)))
    assert head_of(model).softcap is None
    assert_parity(model, random_groups())


def test_L5_logit_scale_multiplies_or_divides(random_groups: Groups) -> None:
    multiplied = seeded(lambda: CohereForCausalLM(CohereConfig(**SIZES, logit_scale=0.25, eos_token_id=1)))
    assert head_of(multiplied).scale == 0.25
    assert_parity(multiplied, random_groups())
    divided = seeded(lambda: GraniteForCausalLM(GraniteConfig(**SIZES, logits_scaling=8.0)))
    assert head_of(divided).scale == 0.125
    assert_parity(divided, random_groups())


def test_L5_logit_multiplier_of_falcon_h1_is_known(tiny_model: Build) -> None:
    model = tiny_model()
    model.config.lm_head_multiplier = FalconH1Config(lm_head_multiplier=0.5).lm_head_multiplier
    assert head_of(model).scale == 0.5


def test_L5_head_bias(random_groups: Groups) -> None:
    model = seeded(lambda: PhiForCausalLM(PhiConfig(**SIZES)))
    nn.init.normal_(model.lm_head.bias)
    assert head_of(model).bias is model.lm_head.bias
    assert_parity(model, random_groups())


def test_L5_tied_embeddings_get_gradients_from_both_ends(tiny_model: Build, random_groups: Groups) -> None:
    model = tiny_model(tie_word_embeddings=True)
    assert head_of(model).weight is model.model.embed_tokens.weight
    assert_parity(model, random_groups())


def test_L5_lora_on_the_head(tiny_model: Build, random_groups: Groups) -> None:
    model = adapted(tiny_model(), target_modules=["q_proj", "lm_head"])
    low_rank = head_of(model).low_rank
    assert low_rank is not None
    assert low_rank.up.shape == (VOCABULARY, 4)
    assert_parity(model, random_groups())


def test_L5_lora_on_the_head_follows_the_active_adapters(tiny_model: Build, random_groups: Groups) -> None:
    model = adapted(tiny_model(), target_modules=["q_proj", "lm_head"])
    model.add_adapter("other", LoraConfig(r=2, lora_alpha=32, target_modules=["lm_head"], init_lora_weights=False))
    for active in ("other", "default"):
        model.set_adapter(active)
        assert_parity(model, random_groups())
    model.base_model.set_adapter(["default", "other"])
    low_rank = head_of(model).low_rank
    assert low_rank is not None
    assert low_rank.up.shape == (VOCABULARY, 6)
    assert_parity(model, random_groups())


def test_L5_lora_with_bias_on_the_head(random_groups: Groups) -> None:
    model = adapted(seeded(lambda: PhiForCausalLM(PhiConfig(**SIZES))), target_modules=["lm_head"], lora_bias=True)
    nn.init.normal_(model.base_model.model.lm_head.lora_B["default"].bias)
    assert_parity(model, random_groups())


def test_L5_disabled_adapters_leave_the_base_model(tiny_model: Build, random_groups: Groups) -> None:
    batch = GroupBatch.from_groups(random_groups())
    base = plain(tiny_model(), batch)
    model = adapted(tiny_model(), target_modules=["q_proj", "lm_head"])
    with model.disable_adapter():
        assert head_of(model).low_rank is None
        torch.testing.assert_close(response_logps(model, batch).token_logps, base, rtol=1e-5, atol=1e-5)
    assert (response_logps(model, batch).token_logps - base).abs().max() > 0.1


def test_L5_merged_adapters_count_once_and_leave_when_disabled(tiny_model: Build, random_groups: Groups) -> None:
    batch = GroupBatch.from_groups(random_groups())
    base = plain(tiny_model(), batch)
    model = adapted(tiny_model(), target_modules=["q_proj", "lm_head"])
    unmerged = response_logps(model, batch).token_logps
    model.merge_adapter()
    torch.testing.assert_close(response_logps(model, batch).token_logps, unmerged, rtol=1e-4, atol=1e-4)
    with model.disable_adapter():
        torch.testing.assert_close(response_logps(model, batch).token_logps, base, rtol=1e-4, atol=1e-4)


def test_L5_a_saved_copy_of_the_head_is_used_while_adapters_are_on(tiny_model: Build, random_groups: Groups) -> None:
    batch = GroupBatch.from_groups(random_groups())
    base = plain(tiny_model(), batch)
    model = adapted(tiny_model(), target_modules=["q_proj"], modules_to_save=["lm_head"])
    wrapper = model.base_model.model.lm_head
    nn.init.normal_(wrapper.modules_to_save["default"].weight)
    assert head_of(model).weight is wrapper.modules_to_save["default"].weight
    assert_parity(model, random_groups())
    with model.disable_adapter():
        assert head_of(model).weight is wrapper.original_module.weight
        torch.testing.assert_close(response_logps(model, batch).token_logps, base, rtol=1e-5, atol=1e-5)


def test_L5_a_frozen_head_passes_gradients_on(tiny_model: Build, random_groups: Groups) -> None:
    model = tiny_model()
    model.lm_head.weight.requires_grad_(False)
    assert_parity(model, random_groups())


def test_L5_an_unknown_kind_of_head_is_refused(tiny_model: Build) -> None:
    model = tiny_model()
    model.lm_head = nn.Sequential(model.lm_head)
    with pytest.raises(
        ValueError, match=r"head of LlamaForCausalLM is a torch.nn.modules.container.Sequential; .*plain torch.nn.Linear"
    ):
        head_of(model)


def test_L5_dropout_on_the_head_is_refused_in_training_only(tiny_model: Build, random_groups: Groups) -> None:
    model = adapted(tiny_model(), target_modules=["lm_head"], lora_dropout=0.1).train()
    with pytest.raises(ValueError, match=r"LlamaForCausalLM carries LoRA with dropout; .*set `lora_dropout=0`"):
        head_of(model)
    assert_parity(model.eval(), random_groups())


def test_L5_lora_variants_on_the_head_are_refused(tiny_model: Build) -> None:
    model = adapted(tiny_model(), target_modules=["lm_head"], use_dora=True)
    with pytest.raises(ValueError, match=r"carries a LoRA variant \(DoraLinearVariant\); .*use plain LoRA on the head"):
        head_of(model)


def test_prompt_tuning_is_refused(tiny_model: Build) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(tiny_model(), PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM"))
    with pytest.raises(ValueError, match=r"PromptTuningConfig that acts on the input sequence.*use LoRA"):
        causal_lm_of(model)


def test_encoder_decoder_models_are_refused() -> None:
    sizes = {"vocab_size": 16, "d_model": 8, "d_ff": 8, "d_kv": 4, "num_layers": 1, "num_heads": 2}
    model = T5ForConditionalGeneration(T5Config(**sizes))
    with pytest.raises(ValueError, match=r"T5ForConditionalGeneration is an encoder-decoder model; .*AutoModelForCausalLM"):
        causal_lm_of(model)


def test_models_that_look_ahead_are_refused() -> None:
    model = seeded(lambda: Gemma3ForCausalLM(Gemma3TextConfig(**SIZES, head_dim=8, use_bidirectional_attention=True)))
    with pytest.raises(ValueError, match=r"Gemma3ForCausalLM is configured to attend to later tokens"):
        causal_lm_of(model)


def test_what_is_no_model_of_transformers_is_refused() -> None:
    with pytest.raises(TypeError, match=r"need a transformers PreTrainedModel or a peft PeftModel, got Linear"):
        causal_lm_of(nn.Linear(2, 2))


@pytest.mark.parametrize(
    "build",
    [
        lambda: LlamaModel(LlamaConfig(**SIZES)),
        lambda: BertModel(
            BertConfig(vocab_size=16, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8)
        ),
    ],
)
def test_a_model_without_a_head_is_refused(build: Callable[[], PreTrainedModel]) -> None:
    with pytest.raises(ValueError, match=r"has no language-model head. Load it with AutoModelForCausalLM"):
        backbone_of(build())


def test_the_backbone_is_what_feeds_the_head() -> None:
    """OPT calls a decoder inside its base model, and projects its hidden states down before the head."""
    sizes = {"vocab_size": 16, "hidden_size": 8, "word_embed_proj_dim": 4, "ffn_dim": 8, "num_hidden_layers": 1}
    model = OPTForCausalLM(OPTConfig(**sizes, num_attention_heads=2, max_position_embeddings=16))
    assert backbone_of(model) is model.model.decoder
    ids = torch.tensor([[3, 4, 5]])
    head = head_of(model.eval())
    hidden = backbone_of(model)(input_ids=ids)[0]
    torch.testing.assert_close(linear_logits(hidden, head.weight), model(input_ids=ids).logits)


def test_T13_every_row_of_a_padded_vocabulary_counts_as_in_the_model(tiny_model: Build, random_groups: Groups) -> None:
    """50 tokens in a table of 64 rows: the model's own softmax runs over 64, and so does ours."""
    model = tiny_model(vocab_size=50)
    model.resize_token_embeddings(50, pad_to_multiple_of=64)
    nn.init.normal_(model.lm_head.weight)
    assert head_of(model).weight.shape[0] == 64
    assert_parity(model, random_groups())


def test_T13_a_vocabulary_that_grows_between_two_calls_counts_in_full(tiny_model: Build, random_groups: Groups) -> None:
    model = tiny_model()
    assert_parity(model, random_groups())
    model.resize_token_embeddings(80)
    nn.init.normal_(model.lm_head.weight)
    assert_parity(model, random_groups())


class CutOff(LlamaForCausalLM):
    """A model that cuts the logits of padded rows off, as some with custom code do."""

    def forward(self, *args: object, **kwargs: object) -> object:
        output = super().forward(*args, **kwargs)
        output.logits = output.logits[..., :60]
        return output


def test_T13_rows_that_the_model_cuts_off_do_not_count(random_groups: Groups) -> None:
    model = seeded(lambda: CutOff(LlamaConfig(**SIZES)))
    groups = [
        PromptGroup(row_id=group.row_id, prompt=group.prompt % 60, responses=tuple(r % 60 for r in group.responses))
        for group in random_groups()
    ]
    assert_parity(adapted(model, target_modules=["lm_head"]), groups)
