from __future__ import annotations

import math
import threading
from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch
from transformers import LlamaForCausalLM, MambaConfig, MambaForCausalLM, PreTrainedModel

from lightning_pref.rollouts.engines.generate import CachedSampler
from lightning_pref.rollouts.engines.paged import PagedSampler, check_pageable
from lightning_pref.rollouts.processors import processed_logps
from lightning_pref.rollouts.sampling import Sampling

END = 0
PROMPTS = [np.array([5, 9, 11, 3]), np.array([7]), np.array([2, 2, 30, 41, 17, 8])]


def token_logps(model: PreTrainedModel, prompt: Sequence[int], response: Sequence[int], **how: float) -> np.ndarray:
    """The oracle: one sequence, one forward pass, no cache, no padding."""
    ids = torch.tensor([[*prompt, *response]])
    with torch.no_grad():
        logits = model.eval()(ids).logits[0, len(prompt) - 1 : -1]
    return processed_logps(logits, **how).gather(-1, ids[0, len(prompt) :, None])[:, 0].numpy()


@pytest.mark.parametrize("how", [{}, {"temperature": 0.7, "top_k": 20, "top_p": 0.9, "min_p": 0.02}], ids=["plain", "processed"])
def test_L12_the_log_prob_of_every_paged_token_is_that_of_a_plain_forward(
    how: dict[str, float], tiny_model: Callable[..., LlamaForCausalLM]
) -> None:
    model = tiny_model()
    found = PagedSampler(Sampling(max_new_tokens=12, **how), END, page_size=8).sample(model, PROMPTS, 4, seed=3)
    assert [len(sampled.responses) for sampled in found] == [4, 4, 4]
    assert len({tuple(ids) for sampled in found for ids in sampled.responses}) > 8
    for prompt, sampled in zip(PROMPTS, found, strict=True):
        for ids, logps, ended in zip(*sampled, strict=True):
            np.testing.assert_allclose(logps, token_logps(model, prompt, ids, **how), atol=2e-5)
            assert END not in ids[:-1]
            assert ended == (ids[-1] == END)
            assert ended or len(ids) == 12


def test_greedy_paged_decoding_is_that_of_the_cached_sampler(tiny_model: Callable[..., LlamaForCausalLM]) -> None:
    model, sampling = tiny_model(), Sampling(max_new_tokens=10, temperature=0.0)
    paged = PagedSampler(sampling, END).sample(model, PROMPTS, 1, seed=0)
    cached = CachedSampler(sampling, END).sample(model, PROMPTS, 1, seed=0)
    for ours, theirs in zip(cached, paged, strict=True):
        assert ours.responses[0].tolist() == theirs.responses[0].tolist()
        assert ours.token_logps[0].tolist() == theirs.token_logps[0].tolist()


def test_paged_and_cached_samples_have_the_same_distribution(tiny_model: Callable[..., LlamaForCausalLM]) -> None:
    """First tokens of 2000 samples; the shares differ by less than five standard errors."""
    model, sampling, num = tiny_model(), Sampling(max_new_tokens=1, temperature=0.5), 2000
    (found,) = PagedSampler(sampling, END, max_rows=500).sample(model, PROMPTS[:1], num, seed=0)
    shares = np.bincount([int(ids[0]) for ids in found.responses], minlength=64) / num
    with torch.no_grad():
        logits = model.eval()(torch.tensor(PROMPTS[0])[None]).logits[0, -1:]
    expected = processed_logps(logits, temperature=0.5).exp()[0].numpy()
    assert (np.abs(shares - expected) < 5 * np.sqrt(expected * (1 - expected) / num) + 1 / num).all()


def test_the_same_seed_gives_the_same_paged_responses_and_another_gives_others(
    tiny_model: Callable[..., LlamaForCausalLM],
) -> None:
    model, sampler = tiny_model(), PagedSampler(Sampling(max_new_tokens=8), END, max_rows=4)

    def ids(seed: int) -> list[list[int]]:
        return [r.tolist() for sampled in sampler.sample(model, PROMPTS, 3, seed=seed) for r in sampled.responses]

    assert ids(1) == ids(1)
    assert ids(1) != ids(2)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_P4_paged_sampling_leaves_no_trace(attention: str, tiny_model: Callable[..., LlamaForCausalLM]) -> None:
    model = tiny_model()
    model.set_attn_implementation(attention)
    model.train()
    model.model.layers[0].eval()
    before = {name: module.training for name, module in model.named_modules()}
    config, attributes, threads = model.generation_config.to_dict(), set(vars(model)), threading.active_count()
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    PagedSampler(Sampling(max_new_tokens=6), END).sample(model, PROMPTS, 2, seed=0)
    assert torch.equal(torch.rand(3), expected)
    assert {name: module.training for name, module in model.named_modules()} == before
    assert model.generation_config.to_dict() == config
    assert model.config._attn_implementation == attention
    assert set(vars(model)) == attributes
    assert threading.active_count() == threads
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_cache_without_pages_is_refused_with_the_reason(tiny_model: Callable[..., LlamaForCausalLM]) -> None:
    model = tiny_model()
    model.set_attn_implementation("flex_attention")
    with pytest.raises(ValueError, match=r"no paged form of the attention 'flex_attention'.*attn_implementation='sdpa'"):
        PagedSampler(Sampling(), END).sample(model, PROMPTS, 1, seed=0)
    model.set_attn_implementation("sdpa")
    model.config.layer_types = ["full_attention", "linear_attention"]
    with pytest.raises(ValueError, match=r"LlamaForCausalLM has layers of the kind 'linear_attention'.*`CachedSampler`"):
        check_pageable(model)
    mamba = MambaForCausalLM(MambaConfig(vocab_size=16, hidden_size=8, state_size=4, num_hidden_layers=1))
    with pytest.raises(ValueError, match=r"MambaForCausalLM.*`CachedSampler`"):
        check_pageable(mamba)


def test_an_engine_that_fails_says_so(tiny_model: Callable[..., LlamaForCausalLM]) -> None:
    model = tiny_model()
    with torch.no_grad():
        model.lm_head.weight.fill_(math.nan)
    with pytest.raises(RuntimeError, match=r"Continuous batching failed: probability tensor.*sample with `CachedSampler`"):
        PagedSampler(Sampling(max_new_tokens=4), END).sample(model, PROMPTS, 2, seed=0)


def test_impossible_settings_of_the_paged_sampler_are_refused(tiny_model: Callable[..., LlamaForCausalLM]) -> None:
    with pytest.raises(ValueError, match="`max_rows` must be at least 1, got 0"):
        PagedSampler(Sampling(), END, max_rows=0)
    with pytest.raises(ValueError, match="`page_size` must be at least 4 tokens, got 2"):
        PagedSampler(Sampling(), END, page_size=2)
    with pytest.raises(ValueError, match="`num_samples` must be at least 1, got 0"):
        PagedSampler(Sampling(), END).sample(tiny_model(), PROMPTS, 0, seed=0)
    assert PagedSampler(Sampling(), END).sample(tiny_model(), [], 2, seed=0) == []
