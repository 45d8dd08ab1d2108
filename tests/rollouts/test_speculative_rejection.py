from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from statistics import NormalDist

import numpy as np
import pytest
import torch
from transformers import LlamaForCausalLM

from lightning_pref.measures.overoptimization import best_of_n as estimate
from lightning_pref.rollouts.best_of_n import best_of_n
from lightning_pref.rollouts.engines.generate import CachedSampler
from lightning_pref.rollouts.sampling import Sampling
from lightning_pref.rollouts.scoring import Asked, Score
from lightning_pref.rollouts.speculative_rejection import (
    SpeculativeRejection,
    checkpoints_of_capacity,
    num_kept,
    rank_correlation,
)

END = 0
PROMPTS = [np.array([5, 9, 11, 3]), np.array([7]), np.array([2, 2, 30, 41, 17, 8])]
SAMPLING = Sampling(max_new_tokens=24)


def sum_of_ids(asked: Sequence[Asked]) -> list[list[float]]:
    return [[float(ids.sum()) for ids in some.responses] for some in asked]


def sum_of_first(length: int) -> Score:
    return lambda asked: [[float(ids[:length].sum()) for ids in some.responses] for some in asked]


def spearman(first: Sequence[float], second: Sequence[float]) -> float:
    """The oracle: a rank is one more than the values below it, and half of those beside it."""
    ranks = [[sum((v < value) + (v == value) / 2 for v in values) for value in values] for values in (first, second)]
    with np.errstate(invalid="ignore", divide="ignore"):
        return float(np.corrcoef(*ranks)[0, 1])


def race(alpha: float, checkpoints: tuple[int, ...] = (4, 8, 16), **options: int) -> SpeculativeRejection:
    return SpeculativeRejection(sampling=SAMPLING, end_token=END, alpha=alpha, checkpoints=checkpoints, **options)


def test_alpha_0_is_best_of_n_bit_for_bit(tiny_model: Callable[..., LlamaForCausalLM]) -> None:
    model = tiny_model()
    plain = best_of_n(CachedSampler(SAMPLING, END), model, PROMPTS, 12, sum_of_ids, seed=5)
    for chosen, found in zip(plain, race(0.0).sample(model, PROMPTS, 12, sum_of_ids, seed=5), strict=True):
        assert found.numbers == tuple(range(12))
        assert (found.scores, found.best) == (chosen.scores, chosen.best)
        for ours, theirs in zip(found.sampled[:2], chosen.sampled[:2], strict=True):
            assert [values.tolist() for values in ours] == [values.tolist() for values in theirs]
        assert found.sampled.ended == chosen.sampled.ended
        assert found.num_tokens == found.most_tokens == sum(map(len, chosen.sampled.responses))
        assert [r.num_kept for r in found.rounds] == [12, 12, 12]


@pytest.mark.parametrize("alpha", [0.25, 0.5, 0.9])
def test_what_is_left_is_what_a_slow_race_over_the_whole_responses_leaves(
    alpha: float, tiny_model: Callable[..., LlamaForCausalLM]
) -> None:
    """The oracle decodes everything with the same seed and then cuts at the checkpoints."""
    model = tiny_model()
    whole = CachedSampler(SAMPLING, END).sample(model, PROMPTS, 12, seed=5)
    found = race(alpha).sample(model, PROMPTS, 12, sum_of_ids, seed=5)
    for sampled, left in zip(whole, found, strict=True):
        pool = list(range(12))
        lengths = {number: len(ids) for number, ids in enumerate(sampled.responses)}
        num_tokens = 0
        for position, seen in zip((4, 8, 16), left.rounds, strict=True):
            scores = {i: float(sampled.responses[i][:position].sum()) for i in pool}
            order = sorted(pool, key=lambda i: (-scores[i], i))
            kept = sorted(order[: max(1, int((1 - alpha) * len(pool) + 0.5))])
            num_tokens += sum(min(position, lengths[i]) for i in pool if i not in kept)
            assert (seen.position, seen.num_responses, seen.num_kept) == (position, len(pool), len(kept))
            assert seen.threshold == min(scores[i] for i in kept)
            going_on = [i for i in kept if lengths[i] > position]
            pool = kept
            unfinished_in_the_end = [(scores[i], float(sampled.responses[i].sum())) for i in going_on if i in left.numbers]
            if len(unfinished_in_the_end) > 1:
                assert seen.spearman == pytest.approx(spearman(*zip(*unfinished_in_the_end, strict=True)), nan_ok=True)
            else:
                assert math.isnan(seen.spearman)
        num_tokens += sum(lengths[i] for i in pool)
        assert left.numbers == tuple(pool)
        assert left.num_tokens == num_tokens <= left.fewest_tokens <= sum(lengths.values()) <= left.most_tokens
        assert [ids.tolist() for ids in left.sampled.responses] == [sampled.responses[i].tolist() for i in pool]
        assert left.scores == tuple(float(sampled.responses[i].sum()) for i in pool)
        assert left.best == left.scores.index(max(left.scores)) <= max(sum(ids) for ids in map(list, sampled.responses))
        assert max(left.scores) <= max(float(ids.sum()) for ids in sampled.responses)


def test_a_score_that_the_first_checkpoint_knows_loses_nothing(tiny_model: Callable[..., LlamaForCausalLM]) -> None:
    model = tiny_model()
    plain = best_of_n(CachedSampler(SAMPLING, END), model, PROMPTS, 12, sum_of_first(4), seed=1)
    for chosen, found in zip(plain, race(0.6).sample(model, PROMPTS, 12, sum_of_first(4), seed=1), strict=True):
        assert chosen.best is not None and found.best is not None
        assert found.numbers[found.best] == chosen.best
        assert found.scores[found.best] == chosen.scores[chosen.best]
        assert all(r.spearman == pytest.approx(1.0) for r in found.rounds if not math.isnan(r.spearman))


def test_batches_of_prompts_change_nothing(tiny_model: Callable[..., LlamaForCausalLM]) -> None:
    model = tiny_model()
    together, apart = (
        [(f.numbers, f.scores, f.num_tokens) for f in race(0.5, max_rows=rows).sample(model, PROMPTS, 8, sum_of_ids, seed=3)]
        for rows in (256, 8)
    )
    assert together == apart


def test_given_up_responses_leave_the_batch_at_once(tiny_model: Callable[..., LlamaForCausalLM]) -> None:
    model = tiny_model()
    rows: list[int] = []
    model.register_forward_pre_hook(lambda m, args, kwargs: rows.append(len(kwargs["input_ids"])), with_kwargs=True)
    SpeculativeRejection(sampling=SAMPLING, end_token=63, alpha=0.25, checkpoints=(2, 5)).sample(
        model, PROMPTS[:1], 16, sum_of_ids, seed=0
    )
    # After the prompt: the second token by all 16, tokens 3 to 5 by at most 12, the others by at most 9.
    assert rows[0] == 1
    assert rows[1] == 16
    assert max(rows[2:5]) <= 12
    assert max(rows[5:]) <= 9


def test_responses_without_a_score_go_first_and_are_counted(tiny_model: Callable[..., LlamaForCausalLM]) -> None:
    def score(asked: Sequence[Asked]) -> list[list[float]]:
        return [[math.nan if ids[0] % 2 else float(ids.sum()) for ids in some.responses] for some in asked]

    for found in race(0.25).sample(tiny_model(), PROMPTS, 12, score, seed=5):
        assert found.num_unscored > 0
        assert found.best is not None
        assert not math.isnan(found.scores[found.best])
    nothing = race(0.5).sample(tiny_model(), PROMPTS[:1], 4, lambda a: [[math.nan] * len(s.responses) for s in a], seed=5)
    assert nothing[0].best is None
    assert nothing[0].numbers == (0,)


def test_a_whole_response_is_scored_once_and_a_cut_one_without_an_end_token(tiny_model: Callable[..., LlamaForCausalLM]) -> None:
    asked_for: list[tuple[int, tuple[int, ...], bool]] = []

    def score(asked: Sequence[Asked]) -> list[list[float]]:
        for some in asked:
            asked_for.extend((some.prompt, tuple(ids), e) for ids, e in zip(some.responses, some.ended, strict=True))
        return sum_of_ids(asked)

    found = race(0.25).sample(tiny_model(), PROMPTS, 12, score, seed=5)
    assert sum(f.num_scorings for f in found) == len(asked_for)
    for _, ids, ended in asked_for:
        assert ended == (ids[-1] == END)
        assert ended or len(ids) in (4, 8, 16, 24)
    ended_early = [key for key in asked_for if key[2] and len(key[1]) > 2]
    assert ended_early
    assert len(set(ended_early)) == len(ended_early)


def test_random_walks_lose_little_and_save_much(tiny_model: Callable[..., LlamaForCausalLM]) -> None:
    """512 walks of 16 normal steps, checkpoints 4, 8 and 12: half the tokens buy far more than best-of-n with half the walks."""
    model = tiny_model(num_hidden_layers=1)
    with torch.no_grad():
        model.lm_head.weight.zero_()  # every token is as likely as any other
    steps = np.array([NormalDist().inv_cdf((token + 0.5) / 64) for token in range(64)])
    sampling = Sampling(max_new_tokens=16)
    prompts = [np.array([number + 1]) for number in range(8)]  # the noise of each is its own

    def walk(asked: Sequence[Asked]) -> list[list[float]]:
        return [[float(steps[ids].sum()) for ids in some.responses] for some in asked]

    # No token ends a walk.
    whole = best_of_n(CachedSampler(sampling, 64, max_rows=512), model, prompts, 512, walk, seed=0)
    full = np.mean([max(chosen.scores) for chosen in whole])
    scores = [torch.tensor(chosen.scores, dtype=torch.float64) for chosen in whole]
    final, cost = {}, {}
    for alpha in (0.25, 0.5, 0.75):
        how = SpeculativeRejection(sampling=sampling, end_token=64, alpha=alpha, checkpoints=(4, 8, 12), max_rows=512)
        found = how.sample(model, prompts, 512, walk, seed=0)
        final[alpha] = np.mean([max(f.scores) for f in found])
        cost[alpha] = sum(f.num_tokens for f in found) / sum(f.most_tokens for f in found)
        same_budget = np.mean([estimate(s, s, round(cost[alpha] * 512)).item() for s in scores])
        assert same_budget < final[alpha] <= full
    # 1/4 (1 + a + a^2 + a^3) of the tokens for a = 1 - alpha.
    assert cost == {a: pytest.approx(sum((1 - a) ** r for r in range(4)) / 4, abs=0.005) for a in (0.25, 0.5, 0.75)}
    assert final[0.75] < final[0.5] <= final[0.25] <= full
    assert final[0.5] > 0.97 * full


def test_as_many_are_kept_as_documented() -> None:
    assert [num_kept(0.5, n) for n in range(1, 8)] == [1, 1, 2, 2, 3, 3, 4]
    assert [num_kept(alpha, 10) for alpha in (0.0, 0.24, 0.26, 0.95, 0.96)] == [10, 8, 7, 1, 1]


def test_a_capacity_gives_a_roughly_geometric_schedule() -> None:
    assert checkpoints_of_capacity(1000, 100, 0.5, 1000) == (10, 20, 40, 76, 142, 250, 500)
    assert checkpoints_of_capacity(64, 64, 0.5, 5) == (1, 2, 4)
    # With one response left there is nothing more to give up, though its room will end.
    assert checkpoints_of_capacity(8, 4, 0.75, 100) == (2,)
    # At every checkpoint what is left fills the cache and one token more each would not fit.
    for capacity, n, alpha in [(300, 37, 0.3), (513, 64, 0.1), (90, 90, 0.8)]:
        alive, found = n, checkpoints_of_capacity(capacity, n, alpha, 400)
        for position in found:
            assert position * alive <= capacity < (position + 1) * alive
            alive = num_kept(alpha, alive)
            while capacity // alive == position:
                alive = num_kept(alpha, alive)


def test_rank_correlation_is_that_of_a_slow_count() -> None:
    rng = np.random.default_rng(0)
    for _ in range(20):
        first, second = rng.integers(0, 5, size=(2, 9)).astype(float)
        assert rank_correlation(first, second) == pytest.approx(spearman(first.tolist(), second.tolist()))
    assert math.isnan(rank_correlation(np.array([1.0]), np.array([2.0])))
    assert math.isnan(rank_correlation(np.array([1.0, 1.0]), np.array([2.0, 3.0])))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"alpha": 1.0}, r"`alpha` must be in \[0, 1\), got 1.0"),
        ({"checkpoints": (4, 4)}, r"`checkpoints` must rise from 1 and stay below `max_new_tokens` \(24\).*got \[4, 4\]"),
        ({"checkpoints": (0, 4)}, r"got \[0, 4\]"),
        ({"checkpoints": (4, 24)}, r"got \[4, 24\]"),
        ({"max_rows": 0}, "`max_rows` must be at least 1, got 0"),
    ],
)
def test_impossible_races_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SpeculativeRejection(sampling=SAMPLING, end_token=END, **options)


def test_impossible_counts_and_capacities_are_refused(tiny_model: Callable[..., LlamaForCausalLM]) -> None:
    with pytest.raises(ValueError, match="`n` must be at least 1, got 0"):
        race(0.5).sample(tiny_model(), PROMPTS, 0, sum_of_ids, seed=0)
    with pytest.raises(ValueError, match="A token capacity needs an `alpha` above 0"):
        checkpoints_of_capacity(100, 10, 0.0, 50)
    with pytest.raises(ValueError, match="A capacity of 9 tokens is less than one for each of 10 responses"):
        checkpoints_of_capacity(9, 10, 0.5, 50)
