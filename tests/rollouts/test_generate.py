from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaForCausalLM, PreTrainedModel
from transformers.generation.logits_process import (
    LogitsProcessorList,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from lightning_pref.models.backbones import enable_gradient_checkpointing
from lightning_pref.rollouts.engines.generate import CachedSampler
from lightning_pref.rollouts.processors import draw, processed_logps
from lightning_pref.rollouts.sampling import Sampling

END = 0
PROMPTS = [np.array([5, 9, 11, 3]), np.array([7]), np.array([2, 2, 30, 41, 17, 8])]


def gpt2() -> GPT2LMHeadModel:
    torch.manual_seed(1)
    return GPT2LMHeadModel(GPT2Config(vocab_size=64, n_positions=64, n_embd=32, n_layer=2, n_head=4, initializer_range=0.2))


def token_logps(model: PreTrainedModel, prompt: Sequence[int], response: Sequence[int], **how: float) -> np.ndarray:
    """The oracle: one sequence, one forward pass, no cache, no padding."""
    ids = torch.tensor([[*prompt, *response]])
    with torch.no_grad():
        logits = model.eval()(ids).logits[0, len(prompt) - 1 : -1]
    return processed_logps(logits, **how).gather(-1, ids[0, len(prompt) :, None])[:, 0].numpy()


@pytest.mark.parametrize("build", ["llama", "gpt2"])
@pytest.mark.parametrize("how", [{}, {"temperature": 0.7, "top_k": 20, "top_p": 0.9, "min_p": 0.02}], ids=["plain", "processed"])
def test_L12_the_log_prob_of_every_token_is_that_of_a_plain_forward(
    build: str, how: dict[str, float], tiny_model: Callable[..., LlamaForCausalLM]
) -> None:
    model = tiny_model() if build == "llama" else gpt2()
    sampler = CachedSampler(Sampling(max_new_tokens=12, **how), END)
    found = sampler.sample(model, PROMPTS, 4, seed=3)
    assert len(found) == len(PROMPTS)
    for prompt, sampled in zip(PROMPTS, found, strict=True):
        assert len(sampled.responses) == 4
        for response, logps in zip(sampled.responses, sampled.token_logps, strict=True):
            np.testing.assert_allclose(logps, token_logps(model, prompt, response, **how), atol=2e-5)


def test_greedy_decoding_is_that_of_transformers(tiny_model: Callable[..., LlamaForCausalLM]) -> None:
    model = tiny_model()
    found = CachedSampler(Sampling(max_new_tokens=10, temperature=0.0), END).sample(model, PROMPTS, 1, seed=0)
    for prompt, sampled in zip(PROMPTS, found, strict=True):
        ids = torch.tensor(prompt)[None]
        expected = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=10, do_sample=False, eos_token_id=END, pad_token_id=END
        )
        assert sampled.responses[0].tolist() == expected[0, len(prompt) :].tolist()


def test_a_response_ends_with_its_end_token_or_at_the_bound(tiny_model: Callable[..., LlamaForCausalLM]) -> None:
    found = CachedSampler(Sampling(max_new_tokens=16), END).sample(tiny_model(), PROMPTS, 64, seed=0)
    responses = [(r.tolist(), e) for sampled in found for r, e in zip(sampled.responses, sampled.ended, strict=True)]
    assert {ended for _, ended in responses} == {True, False}
    for response, ended in responses:
        assert END not in response[:-1]
        assert ended == (response[-1] == END)
        assert ended or len(response) == 16


def test_the_same_seed_gives_the_same_responses_and_another_gives_others(tiny_model: Callable[..., LlamaForCausalLM]) -> None:
    model, sampler = tiny_model(), CachedSampler(Sampling(max_new_tokens=8), END)

    def ids(seed: int) -> list[list[int]]:
        return [r.tolist() for sampled in sampler.sample(model, PROMPTS, 3, seed=seed) for r in sampled.responses]

    assert ids(1) == ids(1)
    assert ids(1) != ids(2)


def test_tokens_are_drawn_as_often_as_they_are_likely() -> None:
    logps = torch.log(torch.tensor([0.6, 0.25, 0.1, 0.05, 0.0]))
    noise = torch.rand(40_000, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    drawn = draw(logps.expand(40_000, 5), noise)
    shares = torch.bincount(drawn, minlength=5) / 40_000
    # Four standard errors of a share, 4 * sqrt(p (1 - p) / n).
    assert torch.allclose(shares, logps.exp(), atol=0.01)
    assert shares[4] == 0


def test_the_token_drawn_is_where_the_sum_passes_the_noise() -> None:
    rng = np.random.default_rng(0)
    logits = np.where(rng.random((200, 11)) < 0.3, -np.inf, 3 * rng.normal(size=(200, 11)))
    logps = torch.from_numpy(logits).float().log_softmax(-1)
    noise = rng.random(200)
    # The largest noise there is meets rows whose last tokens have no probability.
    noise[:50] = np.nextafter(1.0, 0.0)
    drawn = draw(logps, torch.from_numpy(noise)).tolist()
    for row, token in enumerate(drawn):
        probabilities = logps[row].exp().double().numpy()
        assert probabilities[token] > 0
        below, above = probabilities[:token].sum(), probabilities[: token + 1].sum()
        assert below - 1e-12 <= noise[row] * probabilities.sum() <= above + 1e-12


def test_a_sample_does_not_depend_on_the_samples_and_batches_beside_it(tiny_model: Callable[..., LlamaForCausalLM]) -> None:
    model, sampling = tiny_model(), Sampling(max_new_tokens=12)
    many = CachedSampler(sampling, END).sample(model, PROMPTS, 6, seed=4)
    few = CachedSampler(sampling, END, max_rows=2).sample(model, PROMPTS, 2, seed=4)
    short = CachedSampler(Sampling(max_new_tokens=5), END).sample(model, PROMPTS, 2, seed=4)
    for all_six, first_two, cut in zip(many, few, short, strict=True):
        for long, same, start in zip(all_six.responses, first_two.responses, cut.responses, strict=False):
            assert long.tolist() == same.tolist()
            assert long[:5].tolist() == start.tolist()


def test_every_prompt_is_computed_once_and_ended_rows_leave(tiny_model: Callable[..., LlamaForCausalLM]) -> None:
    model = tiny_model()
    sizes: list[tuple[int, int]] = []
    model.register_forward_pre_hook(lambda m, args, kwargs: sizes.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True)
    CachedSampler(Sampling(max_new_tokens=40), END).sample(model, PROMPTS, 16, seed=0)
    assert sizes[0] == (3, 6)  # three prompts, not 48
    assert all(columns == 1 for _, columns in sizes[1:])
    rows = [count for count, _ in sizes[1:]]
    assert rows == sorted(rows, reverse=True)
    assert rows[-1] < rows[0] == 48


def test_what_is_drawn_does_not_depend_on_the_rows_that_left(tiny_model: Callable[..., LlamaForCausalLM]) -> None:
    model = tiny_model()
    for sampled, prompt in zip(
        CachedSampler(Sampling(max_new_tokens=40), END).sample(model, PROMPTS, 16, seed=0), PROMPTS, strict=True
    ):
        for response, logps in zip(sampled.responses, sampled.token_logps, strict=True):
            np.testing.assert_allclose(logps, token_logps(model, prompt, response), atol=5e-5)


def test_groups_beyond_the_bound_on_rows_are_decoded_one_after_the_other(tiny_model: Callable[..., LlamaForCausalLM]) -> None:
    model = tiny_model()
    rows: list[int] = []
    model.register_forward_pre_hook(lambda m, args, kwargs: rows.append(len(kwargs["input_ids"])), with_kwargs=True)
    found = CachedSampler(Sampling(max_new_tokens=4), END, max_rows=4).sample(model, PROMPTS, 3, seed=0)
    assert [len(sampled.responses) for sampled in found] == [3, 3, 3]
    assert max(rows) == 3


def test_P4_sampling_leaves_no_trace(tiny_model: Callable[..., LlamaForCausalLM]) -> None:
    model = tiny_model()
    enable_gradient_checkpointing(model)
    model.train()
    model.model.layers[0].eval()

    def checkpointed() -> list[str]:
        return [name for name, module in model.named_modules() if getattr(module, "gradient_checkpointing", False)]

    before, checkpointing = {name: module.training for name, module in model.named_modules()}, checkpointed()
    config = model.generation_config.to_dict()
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    CachedSampler(Sampling(max_new_tokens=6), END).sample(model, PROMPTS, 2, seed=0)
    assert torch.equal(torch.rand(3), expected)
    assert {name: module.training for name, module in model.named_modules()} == before
    assert checkpointed() == checkpointing != []
    assert model.generation_config.to_dict() == config
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_process_that_is_done_goes_along_until_all_are(tiny_model: Callable[..., LlamaForCausalLM]) -> None:
    model = tiny_model()
    forwards: list[int] = []
    model.register_forward_hook(lambda *args: forwards.append(1))
    alone = CachedSampler(Sampling(max_new_tokens=30), END).sample(model, PROMPTS[:1], 1, seed=8)
    ended_after = len(forwards)
    assert ended_after < 30, "the seed is chosen so that the response ends early"
    forwards.clear()
    together = CachedSampler(Sampling(max_new_tokens=30), END, any_rank=lambda alive: True).sample(model, PROMPTS[:1], 1, seed=8)
    assert len(forwards) == 30
    assert together[0].responses[0].tolist() == alone[0].responses[0].tolist()


@pytest.mark.parametrize(
    "how",
    [
        {"temperature": 0.6},
        {"top_k": 5},
        {"top_p": 0.8},
        {"min_p": 0.1},
        {"temperature": 1.3, "top_k": 30, "top_p": 0.7, "min_p": 0.05},
    ],
)
def test_processing_is_that_of_transformers(how: dict[str, float]) -> None:
    logits = 3 * torch.randn(16, 50, generator=torch.Generator().manual_seed(0))
    kept = logits.clone()
    warpers = LogitsProcessorList()
    for name, kind in [
        ("temperature", TemperatureLogitsWarper),
        ("top_k", TopKLogitsWarper),
        ("top_p", TopPLogitsWarper),
        ("min_p", MinPLogitsWarper),
    ]:
        if name in how:
            warpers.append(kind(how[name]))
    expected = warpers(torch.zeros(16, 1, dtype=torch.long), logits.clone()).log_softmax(-1)
    assert torch.allclose(processed_logps(logits, **how), expected, atol=1e-6)
    assert torch.equal(logits, kept)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"max_new_tokens": 0}, r"`max_new_tokens` must be at least 1, got 0"),
        ({"temperature": -1.0}, r"`temperature` must not be negative, got -1.0"),
        ({"top_k": -1}, r"`top_k` must not be negative \(0 draws from all tokens\), got -1"),
        ({"top_p": 0.0}, r"`top_p` must be in \(0, 1\], got 0.0"),
        ({"min_p": 1.0}, r"`min_p` must be in \[0, 1\), got 1.0"),
    ],
)
def test_impossible_settings_are_refused(setting: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Sampling(**setting)


def test_impossible_counts_are_refused(tiny_model: Callable[..., LlamaForCausalLM]) -> None:
    with pytest.raises(ValueError, match="`max_rows` must be at least 1, got 0"):
        CachedSampler(Sampling(), END, max_rows=0)
    with pytest.raises(ValueError, match="`num_samples` must be at least 1, got 0"):
        CachedSampler(Sampling(), END).sample(tiny_model(), PROMPTS, 0, seed=0)
