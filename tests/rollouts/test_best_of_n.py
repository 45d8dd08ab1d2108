from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import combinations

import numpy as np
import pytest
import torch
from transformers import LlamaForCausalLM

from lightning_pref.data.playground_tokenizer import playground_tokenizer
from lightning_pref.data.rows import Place, Row
from lightning_pref.measures.overoptimization import best_of_n as estimate
from lightning_pref.measures.overoptimization import kl_of_best_of_n
from lightning_pref.rollouts.best_of_n import best_of_n
from lightning_pref.rollouts.engines.generate import CachedSampler
from lightning_pref.rollouts.prompts import Prompt
from lightning_pref.rollouts.rewards import FunctionReward
from lightning_pref.rollouts.sampling import Sampling
from lightning_pref.rollouts.scoring import Asked, RewardScore, best, best_first, scores_of

END = 0
PROMPTS = [np.array([5, 9, 11, 3]), np.array([7]), np.array([2, 2, 30, 41, 17, 8])]


def sum_of_ids(asked: Sequence[Asked]) -> list[list[float]]:
    return [[float(ids.sum()) for ids in some.responses] for some in asked]


def test_the_best_of_n_is_the_one_with_the_highest_score(tiny_model: Callable[..., LlamaForCausalLM]) -> None:
    model, sampler = tiny_model(), CachedSampler(Sampling(max_new_tokens=6), END)
    found = best_of_n(sampler, model, PROMPTS, 8, sum_of_ids, seed=2)
    plain = sampler.sample(model, PROMPTS, 8, seed=2)
    for chosen, sampled in zip(found, plain, strict=True):
        sums = [int(ids.sum()) for ids in sampled.responses]
        assert chosen.scores == tuple(sums)
        assert chosen.best == sums.index(max(sums))
        assert [ids.tolist() for ids in chosen.sampled.responses] == [ids.tolist() for ids in sampled.responses]
        assert chosen.num_unscored == 0


def test_equal_scores_go_by_number_and_what_has_no_score_is_never_chosen(tiny_model: Callable[..., LlamaForCausalLM]) -> None:
    scores = {0: [1.0, 3.0, 3.0, math.nan], 1: [math.nan, -math.inf, math.nan, math.nan], 2: [math.nan] * 4}
    sampler = CachedSampler(Sampling(max_new_tokens=3), END)
    found = best_of_n(sampler, tiny_model(), PROMPTS, 4, lambda asked: [scores[some.prompt] for some in asked], seed=0)
    assert [chosen.best for chosen in found] == [1, 1, None]
    assert [chosen.num_unscored for chosen in found] == [1, 3, 4]


def test_the_order_of_scores_is_that_of_a_plain_sort() -> None:
    rng = np.random.default_rng(0)
    for _ in range(50):
        scores = [math.nan if rng.random() < 0.2 else float(rng.integers(0, 4)) for _ in range(rng.integers(1, 9))]
        known = [i for i, score in enumerate(scores) if not math.isnan(score)]
        expected = []
        while known:
            top = max(known, key=lambda i: scores[i])
            expected.append(top)
            known.remove(top)
        assert best_first(scores) == expected + [i for i, score in enumerate(scores) if math.isnan(score)]
        assert best(scores) == (expected[0] if expected else None)
    assert best([]) is None


def test_the_scores_of_n_give_the_estimate_for_fewer() -> None:
    scores = torch.tensor([0.3, -1.0, 2.0, 0.7, 1.1], dtype=torch.float64)
    subsets = list(combinations(scores.tolist(), 2))
    assert estimate(scores, scores, 2).item() == pytest.approx(sum(map(max, subsets)) / len(subsets))


def test_the_bound_on_the_divergence_is_reached_by_distinct_scores() -> None:
    """Over a fine grid of quantiles u of the score best-of-n has the density n u^(n-1)."""
    u = (np.arange(200_000) + 0.5) / 200_000
    for n in (1, 2, 7, 64):
        density = n * u ** (n - 1)
        exact = float(np.mean(np.where(density > 0, density * np.log(np.maximum(density, 1e-300)), 0.0)))
        assert kl_of_best_of_n(n) == pytest.approx(exact, abs=1e-4)
    assert kl_of_best_of_n(12500) == pytest.approx(8.43, abs=0.005)
    # With three possible responses the true divergence is smaller.
    p, n = np.array([0.5, 0.3, 0.2]), 4
    chosen = np.diff(np.concatenate([[0.0], p.cumsum()]) ** n)
    assert (chosen * np.log(chosen / p)).sum() < kl_of_best_of_n(n)
    with pytest.raises(ValueError, match="`n` must be at least 1 sample, got 0"):
        kl_of_best_of_n(0)


def test_a_scorer_that_gives_too_few_scores_is_refused() -> None:
    asked = [Asked(0, (np.array([1]), np.array([2])), (False, False)), Asked(3, (np.array([4]),), (True,))]
    with pytest.raises(ValueError, match="gave 1 scores for the 2 responses to prompt 0; expected one for each"):
        scores_of(lambda asked: [[1.0], [1.0]], asked)
    with pytest.raises(ValueError, match="gave 0 scores for the 1 responses to prompt 3"):
        scores_of(lambda asked: [[1.0, 2.0]], asked)
    # A prompt without responses is not shown to the scorer.
    assert scores_of(lambda shown: [[5.0] for _ in shown], [Asked(0, (), ()), asked[1]]) == [[], [5.0]]


def test_a_reward_reads_the_text_of_a_response_as_far_as_it_has_come() -> None:
    tokenizer = playground_tokenizer()
    seen: list[tuple[object, str]] = []

    def length(prompt: object, response: str) -> float:
        seen.append((prompt, response))
        return float(len(response))

    row = Row(place=Place("rows.jsonl", 1), prompt="Hello.")
    prompts = [Prompt(7, np.array(tokenizer("Hello.")["input_ids"]), row, {})]
    ids = np.array(tokenizer(" two words")["input_ids"])
    score = RewardScore(FunctionReward("length", length), prompts, tokenizer)
    whole = np.append(ids, tokenizer.eos_token_id)
    assert score([Asked(0, (ids[:1], whole), (False, True))]) == [[float(len(seen[0][1])), 10.0]]
    assert seen == [("Hello.", tokenizer.decode(ids[:1])), ("Hello.", " two words")]
