from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, logsigmoid
from transformers import LlamaForCausalLM

from lightning_pref.rollouts.engines.generate import CachedSampler
from lightning_pref.rollouts.pilaf import PilafSampler, branch_of, mixed_logits
from lightning_pref.rollouts.processors import processed_logps
from lightning_pref.rollouts.sampling import Sampling

END = 0
PROMPTS = [np.array([5, 9, 11, number + 1, *([7] * (number % 3))]) for number in range(10)]


def logits_after(model: LlamaForCausalLM, prompt: np.ndarray, response: np.ndarray) -> Tensor:
    """The oracle: one sequence, one forward pass, no cache, no padding; [T, V]."""
    ids = torch.tensor([[*prompt.tolist(), *response.tolist()]])
    with torch.no_grad():
        return model.eval()(ids).logits[0, len(prompt) - 1 : -1]


def test_the_two_tilts_lie_on_both_sides_of_the_policy() -> None:
    policy, reference = torch.randn(2, 7, 11, generator=torch.Generator().manual_seed(0))
    up, down = mixed_logits(policy, reference, 0.3), mixed_logits(policy, reference, -0.3)
    assert torch.allclose(up + down, 2 * policy, atol=1e-6)
    assert torch.allclose(up, 1.3 * policy - 0.3 * reference, atol=1e-6)
    # pi exp(beta log(pi / ref)) / Z, by definition.
    pi, ref = policy.double().softmax(-1), reference.double().softmax(-1)
    for mixed, sign in ((up, 0.3), (down, -0.3)):
        tilted = pi * (pi / ref) ** sign
        assert torch.allclose(mixed.double().softmax(-1), tilted / tilted.sum(-1, keepdim=True), atol=1e-6)
    assert torch.equal(mixed_logits(policy, reference, 0.0), policy)
    assert torch.equal(mixed_logits(policy, policy, 0.3), policy)


def test_a_constant_on_the_logits_of_either_model_changes_nothing() -> None:
    policy, reference = torch.randn(2, 7, 11, generator=torch.Generator().manual_seed(0))
    plain = mixed_logits(policy, reference, -0.4).softmax(-1)
    assert torch.allclose(mixed_logits(policy + 3.0, reference - 5.0, -0.4).softmax(-1), plain, atol=1e-6)


def test_each_row_has_its_own_tilt_and_half_precision_is_mixed_in_float32() -> None:
    policy, reference = torch.randn(2, 2, 11, generator=torch.Generator().manual_seed(0)).bfloat16()
    mixed = mixed_logits(policy, reference, torch.tensor([[0.5], [-0.5]]))
    assert mixed.dtype == torch.float32
    assert torch.equal(mixed[0], mixed_logits(policy[0].float(), reference[0].float(), 0.5))
    assert torch.equal(mixed[1], mixed_logits(policy[1].float(), reference[1].float(), -0.5))


def test_ruled_out_tokens_stay_ruled_out() -> None:
    inf = torch.inf
    policy = torch.tensor([1.0, -inf, 2.0, -inf])
    reference = torch.tensor([0.5, -inf, -inf, 1.0])
    for coefficient in (0.5, -0.5):
        mixed = mixed_logits(policy, reference, coefficient)
        assert mixed.tolist() == [1.0 + coefficient * 0.5, -inf, -inf, -inf]
    assert torch.equal(mixed_logits(policy, reference, 0.0), policy)


def gradients(h: Tensor, ref: Tensor, beta: float, noise: Tensor, eps: float, how: str) -> tuple[Tensor, Tensor]:
    """Exact gradients of the expected DPO loss and of -J for a one-token policy, by enumeration of all pairs."""
    theta = h.clone().requires_grad_()
    logpi, logref = theta.log_softmax(-1), ref.log_softmax(-1)
    implicit = beta * (logpi - logref)
    true = implicit.detach() + eps * noise
    pi = logpi.detach().exp()
    up, down = (mixed_logits(h, ref, sign * beta).double().softmax(-1) for sign in (1, -1))
    z = (pi * implicit.detach().exp()).sum() * (pi * (-implicit.detach()).exp()).sum()
    share = {"theory": z / (1 + z), "practice": torch.tensor(0.5), "policy": torch.tensor(0.0)}[how]
    pairs = (1 - share) * pi[:, None] * pi + share * up[:, None] * down
    wins = (true[:, None] - true).sigmoid()
    delta = implicit[:, None] - implicit
    loss = -(pairs * (wins * logsigmoid(delta) + (1 - wins) * logsigmoid(-delta))).sum()
    objective = (logpi.exp() * (true - beta * (logpi - logref))).sum()
    # r* is fixed, so that J depends on theta through pi alone.
    return torch.autograd.grad(loss, theta, retain_graph=True)[0], torch.autograd.grad(-objective, theta)[0]


def test_the_dpo_gradient_on_tilted_pairs_points_along_the_objective() -> None:
    generator = torch.Generator().manual_seed(0)
    cosines: dict[str, list[float]] = {"theory": [], "practice": [], "policy": []}
    for _ in range(50):
        h, ref, noise = torch.randn(3, 6, generator=generator, dtype=torch.float64)
        for how, found in cosines.items():
            found.append(cosine_similarity(*gradients(h, ref, 0.5, noise, 1e-3, how), dim=0).item())
    assert min(cosines["theory"]) > 1 - 1e-6
    # The angle stays finite where the samples are the policy's, and half-half pairs come near.
    theory, practice, policy = (1 - np.mean(cosines[how]) for how in ("theory", "practice", "policy"))
    assert 100 * theory < practice < policy / 4
    assert policy > 1e-3
    # To first order: ten times the error in the reward, a hundred times the deviation of the cosine.
    h, ref, noise = torch.randn(3, 6, generator=generator, dtype=torch.float64)
    far, near = (1 - cosine_similarity(*gradients(h, ref, 0.5, noise, eps, "theory"), dim=0).item() for eps in (0.1, 0.01))
    assert far / near == pytest.approx(100, rel=0.3)


@pytest.mark.parametrize("how", [{}, {"temperature": 0.8, "top_k": 30, "min_p": 0.01}], ids=["plain", "processed"])
def test_L12_the_log_prob_of_every_token_of_a_pair_is_that_of_two_plain_forwards(
    how: dict[str, float], tiny_model: Callable[..., LlamaForCausalLM]
) -> None:
    policy, reference = tiny_model(), tiny_model(1)
    found = PilafSampler(Sampling(max_new_tokens=20, **how), END, reference, beta=0.4).sample_pairs(policy, PROMPTS, seed=3)
    assert set(found.branches) == {"policy", "tilted"}
    nats: dict[int, list[float]] = {0: [], 1: []}
    for prompt, pair, branch in zip(PROMPTS, found.pairs, found.branches, strict=True):
        for side, (ids, logps) in enumerate(zip(pair.responses, pair.token_logps, strict=True)):
            own, other = logits_after(policy, prompt, ids), logits_after(reference, prompt, ids)
            tilt = 0.0 if branch == "policy" else (0.4, -0.4)[side]
            mixed = own + tilt * (own - other)
            expected = processed_logps(mixed, **how).gather(-1, torch.tensor(ids, dtype=torch.int64)[:, None])[:, 0]
            np.testing.assert_allclose(logps, expected.numpy(), atol=5e-5)
            if branch == "tilted":
                tilted, plain = mixed.double().log_softmax(-1), own.double().log_softmax(-1)
                upper, lower = (tilted, plain) if side == 0 else (plain, tilted)
                nats[side] += (upper.exp() * (upper - lower)).sum(-1).tolist()
    assert found.kl_plus == pytest.approx(np.mean(nats[0]), rel=1e-4)
    assert found.kl_minus == pytest.approx(np.mean(nats[1]), rel=1e-4)


def test_pairs_of_the_policy_branch_are_those_of_plain_sampling(tiny_model: Callable[..., LlamaForCausalLM]) -> None:
    policy, sampling = tiny_model(), Sampling(max_new_tokens=12)
    plain = CachedSampler(sampling, END).sample(policy, PROMPTS, 2, seed=3)
    found = PilafSampler(sampling, END, tiny_model(1), max_rows=6).sample_pairs(policy, PROMPTS, seed=3)
    same = PilafSampler(sampling, END, tiny_model()).sample_pairs(policy, PROMPTS, seed=3)
    none = PilafSampler(sampling, END, tiny_model(1), beta=0.0).sample_pairs(policy, PROMPTS, seed=3)
    for number, expected in enumerate(plain):
        ids = [response.tolist() for response in expected.responses]
        # Where the reference is the policy, or beta is 0, the other branch is no different.
        for pairs in (same, none, *([found] if found.branches[number] == "policy" else [])):
            assert [response.tolist() for response in pairs.pairs[number].responses] == ids
    assert found.branches == same.branches
    assert (same.kl_plus, same.kl_minus) == (0.0, 0.0)
    assert found.kl_plus > 0 < found.kl_minus


def test_batches_change_no_pair(tiny_model: Callable[..., LlamaForCausalLM]) -> None:
    policy, reference = tiny_model(), tiny_model(1)
    one, many = (
        PilafSampler(Sampling(max_new_tokens=8), END, reference, max_rows=rows).sample_pairs(policy, PROMPTS, seed=0)
        for rows in (2, 256)
    )
    for first, second in zip(one.pairs, many.pairs, strict=True):
        assert [r.tolist() for r in first.responses] == [r.tolist() for r in second.responses]
    # Kernels add up in another order for another number of rows, and the divergence is a small difference.
    assert one.kl_plus == pytest.approx(many.kl_plus, rel=1e-4)


def test_the_coin_is_fair_and_knows_the_prompt_and_the_seed_only() -> None:
    prompts = [np.array([number % 50, number // 50, 3]) for number in range(2000)]
    coins = {seed: [branch_of(prompt, seed) for prompt in prompts] for seed in (0, 1, -1)}
    for found in coins.values():
        assert abs(found.count("tilted") - 1000) < 4 * math.sqrt(500)
    agree = sum(a == b for a, b in zip(coins[0], coins[1], strict=True))
    assert abs(agree - 1000) < 4 * math.sqrt(500)
    assert branch_of(np.array([3, 4], dtype=np.int32), 5) == branch_of(np.array([3, 4], dtype=np.int64), 5)


def test_identical_pairs_are_counted(tiny_model: Callable[..., LlamaForCausalLM]) -> None:
    greedy = Sampling(max_new_tokens=5, temperature=0.0)
    found = PilafSampler(greedy, END, tiny_model(), beta=0.5).sample_pairs(tiny_model(), PROMPTS, seed=0)
    assert found.num_identical == len(PROMPTS)
    sampled = PilafSampler(Sampling(max_new_tokens=12), END, tiny_model(1)).sample_pairs(tiny_model(), PROMPTS, seed=0)
    assert sampled.num_identical == sum(p.responses[0].tolist() == p.responses[1].tolist() for p in sampled.pairs)
    assert math.isnan(PilafSampler(greedy, END, tiny_model()).sample_pairs(tiny_model(), [], seed=0).kl_plus)


def test_P4_pilaf_leaves_no_trace_on_either_model(tiny_model: Callable[..., LlamaForCausalLM]) -> None:
    policy, reference = tiny_model(), tiny_model(1)
    policy.train()
    policy.model.layers[0].eval()
    reference.train()
    before = [[module.training for module in model.modules()] for model in (policy, reference)]
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    PilafSampler(Sampling(max_new_tokens=6), END, reference).sample(policy, PROMPTS, 2, seed=0)
    assert torch.equal(torch.rand(3), expected)
    assert [[module.training for module in model.modules()] for model in (policy, reference)] == before


def test_what_pilaf_cannot_do_is_refused(tiny_model: Callable[..., LlamaForCausalLM]) -> None:
    for beta in (1.0, -0.1):
        with pytest.raises(ValueError, match=rf"`beta` must be in \[0, 1\), got {beta}: from 1 on, pi-"):
            PilafSampler(Sampling(), END, tiny_model(), beta=beta)
    with pytest.raises(ValueError, match="`max_rows` must be at least 2, a pair of responses, got 1"):
        PilafSampler(Sampling(), END, tiny_model(), max_rows=1)
    with pytest.raises(ValueError, match="PILAF samples pairs: `num_samples` must be 2, got 4"):
        PilafSampler(Sampling(), END, tiny_model()).sample(tiny_model(), PROMPTS, 4, seed=0)
    with pytest.raises(ValueError, match="The policy has 64 tokens and the reference 80; PILAF adds their logits token by token"):
        PilafSampler(Sampling(), END, tiny_model(vocab_size=80)).sample(tiny_model(), PROMPTS, 2, seed=0)
