from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from transformers import GenerationConfig, LlamaForCausalLM

from lightning_pref.models.adapters import LoraSettings, add_lora
from lightning_pref.models.generation import sample_responses

TinyModel = Callable[..., LlamaForCausalLM]

# No token of the vocabulary of 64, so that nothing ends early.
NEVER = 64
PROMPTS = [[5], [7, 8, 9, 10, 11, 12], [3, 4], [20, 21, 22]]


@torch.no_grad()
def greedy(model: LlamaForCausalLM, prompt: list[int], num_tokens: int) -> list[int]:
    """Oracle: the whole sequence through the model again for every token, no cache and no padding."""
    ids = list(prompt)
    for _ in range(num_tokens):
        ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[len(prompt) :]


def wide_model(tiny_model: TinyModel, **changes: int) -> LlamaForCausalLM:
    """With a 65th row that is never the likeliest, to serve as EOS and as padding."""
    model = tiny_model(vocab_size=65, **changes)
    with torch.no_grad():
        model.lm_head.weight[NEVER] = 0.0
    return model


def test_greedy_answers_do_not_depend_on_the_other_prompts_of_the_batch(tiny_model: TinyModel) -> None:
    model = wide_model(tiny_model)
    expected = [greedy(model, prompt, 6) for prompt in PROMPTS]
    assert len({tuple(answer) for answer in expected}) > 1
    for size in (1, 3, 64):
        found = sample_responses(model, PROMPTS, eos_token_id=NEVER, max_new_tokens=6, temperature=0, batch_size=size)
        assert found == expected


def test_an_answer_ends_before_its_eos_and_an_empty_one_is_empty(tiny_model: TinyModel) -> None:
    model = wide_model(tiny_model)
    whole = greedy(model, PROMPTS[1], 6)
    place = next(i for i, token in enumerate(whole) if i > 0 and token not in whole[:i])
    cut = sample_responses(model, [PROMPTS[1]], eos_token_id=whole[place], max_new_tokens=6, temperature=0)
    assert cut == [whole[:place]]
    assert sample_responses(model, [PROMPTS[1]], eos_token_id=whole[0], max_new_tokens=6, temperature=0) == [[]]


def test_padding_is_told_by_the_mask_even_where_the_prompt_holds_eos(tiny_model: TinyModel) -> None:
    model = wide_model(tiny_model)
    prompts = [[NEVER, 5, NEVER], [1, 2, 3, 4, 5, 6, 7]]
    found = sample_responses(model, prompts, eos_token_id=NEVER, max_new_tokens=4, temperature=0)
    assert found == [greedy(model, prompt, 4) for prompt in prompts]


def test_a_seed_fixes_the_samples_and_the_global_random_state_is_left_alone(tiny_model: TinyModel) -> None:
    model = wide_model(tiny_model)

    def sample(seed: int) -> list[list[int]]:
        return sample_responses(model, PROMPTS, eos_token_id=NEVER, max_new_tokens=8, temperature=1.5, seed=seed)

    before = torch.get_rng_state()
    first = sample(0)
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(3)
    assert sample(0) == first != sample(1)


def test_nothing_is_left_on_the_model(tiny_model: TinyModel) -> None:
    model = wide_model(tiny_model).train()
    model.model.layers[0].eval()
    modes = [module.training for module in model.modules()]
    config, names = model.generation_config, set(vars(model))
    sample_responses(model, PROMPTS, eos_token_id=NEVER, max_new_tokens=2)
    assert [module.training for module in model.modules()] == modes
    assert model.generation_config is config
    assert set(vars(model)) == names
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())


def test_the_generation_config_of_the_checkpoint_does_not_narrow_the_policy(tiny_model: TinyModel) -> None:
    model = wide_model(tiny_model)

    def answers(temperature: float) -> list[list[int]]:
        return sample_responses(model, PROMPTS, eos_token_id=NEVER, max_new_tokens=8, temperature=temperature, seed=3)

    plain = [answers(temperature) for temperature in (0, 1.0)]
    model.generation_config = GenerationConfig(
        top_k=1, top_p=0.1, min_p=0.9, repetition_penalty=5.0, no_repeat_ngram_size=1, num_beams=1, suppress_tokens=[1, 2, 3]
    )
    assert [answers(temperature) for temperature in (0, 1.0)] == plain


def test_temperature_one_draws_from_the_policy_itself(tiny_model: TinyModel) -> None:
    model = tiny_model()
    num_samples = 4000
    drawn = sample_responses(model, [[9, 3]] * num_samples, eos_token_id=63, max_new_tokens=1, batch_size=num_samples)
    counts = torch.zeros(64)
    for response in drawn:
        counts[response[0] if response else 63] += 1
    with torch.no_grad():
        expected = model(torch.tensor([[9, 3]])).logits[0, -1].softmax(-1)
    # four standard deviations of each count
    assert ((counts / num_samples - expected).abs() < 4 * (expected / num_samples).sqrt() + 1e-3).all()
    assert (counts > 0).sum() > 50, "the default top-k of 50 would leave out the rest"


def test_an_adapted_model_answers_with_its_adapter(tiny_model: TinyModel) -> None:
    base = wide_model(tiny_model)
    plain = [greedy(base, prompt, 6) for prompt in PROMPTS]
    model = add_lora(base, LoraSettings(r=4, alpha=64))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(generator=generator)
    names = set(vars(model.base_model))
    found = sample_responses(model, PROMPTS, eos_token_id=NEVER, max_new_tokens=6, temperature=0)
    assert found == [greedy(model, prompt, 6) for prompt in PROMPTS]  # type: ignore[arg-type]
    assert found != plain
    assert set(vars(model.base_model)) == names


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_no_prompts_have_no_answers(tiny_model: TinyModel, temperature: float) -> None:
    assert sample_responses(tiny_model(), [], eos_token_id=0, max_new_tokens=2, temperature=temperature) == []
