"""Variance of rewards within prompts, against NumPy over one prompt at a time."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from gloo_ranks import launched
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lightning_pref.measures.variance import (
    RewardVariance,
    effective_prompts,
    merged_moments,
    prompt_slots,
    prompt_statistics,
    reward_variance,
    variance_parts,
    whitened_variance,
    zero_variance_share,
)

Groups = list[list[float]]

reward = st.floats(-100, 100, width=32)
groups_of_rewards = st.lists(st.lists(reward, min_size=1, max_size=6), min_size=1, max_size=8)


def flat(groups: Groups, *, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Rewards and prompt ids of groups, shuffled; ids with gaps and in no order."""
    ids = [17 * ((5 * number) % 1009) for number in range(len(groups))]
    pairs = [(value, prompt) for prompt, group in zip(ids, groups, strict=True) for value in group]
    np.random.default_rng(seed).shuffle(pairs)
    return torch.tensor([v for v, _ in pairs], dtype=torch.float64), torch.tensor([int(p) for _, p in pairs])


def report_of(groups: Groups, **settings: float) -> dict[str, float]:
    metric = RewardVariance(**settings)
    metric.update(*flat(groups))
    return numbers(metric)


def numbers(metric: RewardVariance) -> dict[str, float]:
    return {name: value.item() for name, value in metric.compute().items()}


def expected_report(groups: Groups, floor: float = 1e-6) -> dict[str, float]:
    """The same by the book, group by group."""
    several = [np.array(group) for group in groups if len(group) > 1]
    everything = np.concatenate([np.array(group) for group in groups])
    variances = [group.var(ddof=1) for group in several]
    advantages = [group - group.mean() for group in several]
    sizes = [0.0 if v <= floor**2 else np.abs(a).sum() ** 2 / (a**2).sum() for a, v in zip(advantages, variances, strict=True)]
    pooled = everything.var(ddof=1) if len(everything) > 1 else math.nan
    between = sum(len(g) * (np.mean(g) - everything.mean()) ** 2 for g in groups) / len(everything)
    within_prompt = np.mean(variances) if variances else math.nan
    return {
        "within_prompt": within_prompt,
        "zero_share": np.mean([v <= floor**2 for v in variances]) if variances else math.nan,
        "whitened": within_prompt / (pooled + 1e-8),
        "between_prompt": between if len(groups) > 1 else math.nan,
        "total": everything.var(),
        "mean": everything.mean(),
        "effective_group_size": np.mean(sizes) if variances else math.nan,
        "prompts": len(several),
        "single_prompts": len(groups) - len(several),
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_variance_of_each_prompt_is_torchs_own(dtype: torch.dtype) -> None:
    rewards = torch.randn(7, 5, dtype=dtype, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(reward_variance(rewards), rewards.var(1))
    assert reward_variance(rewards).dtype == dtype


def test_a_mask_leaves_out_what_it_does_not_count_even_if_it_is_nan() -> None:
    rewards = torch.tensor([[1.0, 3.0, math.nan], [2.0, math.inf, 2.0], [5.0, 0.0, 0.0]])
    mask = torch.tensor([[True, True, False], [True, False, True], [True, False, False]])
    assert reward_variance(rewards, mask).tolist() == pytest.approx([2.0, 0.0, math.nan], nan_ok=True)


def test_half_precision_rewards_have_a_float32_variance() -> None:
    found = reward_variance(torch.tensor([[1.0, 2.0]], dtype=torch.bfloat16))
    assert found.dtype == torch.float32
    assert found.item() == 0.5


def test_fewer_than_two_samples_have_no_variance() -> None:
    assert reward_variance(torch.ones(3, 1)).isnan().all()


def test_wrong_shapes_are_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"`rewards` must be \[P, n\], one row per prompt, got the shape \(4,\)"):
        reward_variance(torch.ones(4))
    with pytest.raises(ValueError, match=r"`mask` must be bool of the shape \(2, 3\) of the rewards, got torch.bool \(2, 2\)"):
        reward_variance(torch.ones(2, 3), torch.ones(2, 2, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"`floor` is a standard deviation, 0 or more; got -1"):
        RewardVariance(floor=-1)


def test_the_variance_is_half_the_mean_squared_difference_of_pairs() -> None:
    rewards = torch.randn(4, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    halves = [[(a - b) ** 2 / 2 for i, a in enumerate(row) for b in row[:i]] for row in rewards.tolist()]
    assert reward_variance(rewards).tolist() == pytest.approx([np.mean(row) for row in halves], rel=1e-12)


@given(groups_of_rewards)
def test_flat_prompts_in_any_order_are_the_groups_one_by_one(groups: Groups) -> None:
    rewards, prompt_ids = flat(groups)
    found = prompt_statistics(rewards, prompt_ids)
    order = np.argsort([17 * ((5 * number) % 1009) for number in range(len(groups))])
    used = slice(0, len(groups))
    assert found.counts[used].tolist() == [len(groups[i]) for i in order]
    assert found.counts[len(groups) :].sum() == 0
    assert found.means[used].tolist() == pytest.approx([np.mean(groups[i]) for i in order], rel=1e-9, abs=1e-9)
    expected = [np.var(groups[i], ddof=1) if len(groups[i]) > 1 else math.nan for i in order]
    assert found.variances[used].tolist() == pytest.approx(expected, rel=1e-9, abs=1e-9, nan_ok=True)


@given(groups_of_rewards)
def test_the_report_is_that_of_the_groups_one_by_one(groups: Groups) -> None:
    report = report_of(groups)
    for name, value in expected_report(groups).items():
        assert report[name] == pytest.approx(value, rel=1e-7, abs=1e-7, nan_ok=True), name


@given(groups_of_rewards, st.integers(1, 4))
def test_how_prompts_are_batched_does_not_matter(groups: Groups, size: int) -> None:
    metric = RewardVariance()
    for start in range(0, len(groups), size):
        metric.update(*flat(groups[start : start + size], seed=start))
    whole = report_of(groups)
    for name, value in numbers(metric).items():
        assert value == pytest.approx(whole[name], rel=1e-7, abs=1e-7, nan_ok=True), name


@given(groups_of_rewards)
def test_total_variance_is_within_plus_between(groups: Groups) -> None:
    rewards, prompt_ids = flat(groups)
    parts = variance_parts(prompt_statistics(rewards, prompt_ids))
    assert parts.total.item() == pytest.approx(rewards.numpy().var(), rel=1e-9, abs=1e-9)
    assert parts.total.item() == pytest.approx((parts.within + parts.between).item())


def test_with_n_responses_each_the_unbiased_mean_is_n_over_n_minus_one_times_the_part_within() -> None:
    rewards = torch.randn(5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    parts = variance_parts(prompt_statistics(rewards.flatten(), torch.arange(5).repeat_interleave(4)))
    assert reward_variance(rewards).mean().item() == pytest.approx(4 / 3 * parts.within.item(), rel=1e-12)


def test_a_reward_that_is_the_prompts_number_has_exactly_no_variance_within() -> None:
    prompt_ids = torch.arange(6).repeat(4)  # the layout that reshapes to (k, P), not (P, k)
    metric = RewardVariance()
    metric.update(prompt_ids.float() / 7, prompt_ids)
    report = numbers(metric)
    assert report["within_prompt"] == 0.0
    assert report["zero_share"] == 1.0
    assert report["whitened"] == 0.0
    assert report["effective_prompts"] == 0.0
    assert report["between_prompt"] > 0.05


@given(groups_of_rewards, st.floats(-1000, 1000))
def test_M3_the_raw_variance_does_not_see_a_shift_of_each_prompt(groups: Groups, shift: float) -> None:
    moved = [[value + shift * (number + 1) for value in group] for number, group in enumerate(groups)]
    assert report_of(moved)["within_prompt"] == pytest.approx(report_of(groups)["within_prompt"], rel=1e-6, abs=1e-6, nan_ok=True)


def test_M3_the_whitened_variance_does_not_see_scale_nor_shift_and_the_raw_one_scales_by_the_square() -> None:
    groups: Groups = np.random.default_rng(3).normal(size=(9, 4)).tolist()
    plain, scaled = report_of(groups), report_of([[50.0 * value + 7.0 for value in group] for group in groups])
    assert scaled["within_prompt"] == pytest.approx(2500 * plain["within_prompt"], rel=1e-9)
    # The guard in the divisor is 1e-8 of a variance of about 1.
    assert scaled["whitened"] == pytest.approx(plain["whitened"], rel=1e-7)
    rewards = torch.tensor(groups)
    whitened = (rewards - rewards.mean()) / rewards.std()
    assert plain["whitened"] == pytest.approx(whitened.var(1).mean().item(), rel=1e-5)


def test_W3_a_constant_reward_has_no_variance_far_from_zero_either() -> None:
    report = report_of([[1e6 + 0.3] * 4] * 3)
    # The rounding of a mean at 1e6 is 1e-10; sums of squares minus squares of sums would leave 1e-4 here.
    for name in ("within_prompt", "whitened", "between_prompt"):
        assert 0 <= report[name] < 1e-18
    assert report["zero_share"] == 1.0


def test_a_small_variance_beside_a_large_mean_keeps_its_digits() -> None:
    groups: Groups = (1e7 + 1e-3 * np.random.default_rng(4).normal(size=(6, 4))).tolist()
    # float64 resolves 2e-9 at 1e7, against deviations of 1e-3.
    assert report_of(groups)["whitened"] == pytest.approx(
        np.mean([np.var(g, ddof=1) for g in groups]) / (np.var(groups, ddof=1) + 1e-8), rel=1e-4
    )


def test_prompts_with_one_response_are_counted_and_not_zero() -> None:
    report = report_of([[1.0], [2.0, 4.0], [9.0]])
    assert report["prompts"] == 1
    assert report["single_prompts"] == 2
    assert report["within_prompt"] == 2.0
    assert report["zero_share"] == 0.0
    alone = report_of([[1.0], [2.0]])
    assert math.isnan(alone["within_prompt"]) and math.isnan(alone["zero_share"]) and math.isnan(alone["effective_prompts"])


def test_rewards_that_are_not_finite_are_counted_and_left_out() -> None:
    metric = RewardVariance()
    metric.update(torch.tensor([1.0, 3.0, math.nan, math.inf, 5.0]), torch.tensor([0, 0, 0, 1, 1]))
    report = numbers(metric)
    assert report["not_finite"] == 2
    assert report["within_prompt"] == 2.0
    assert report["single_prompts"] == 1
    assert report["mean"] == 3.0


def test_the_floor_says_what_counts_as_no_variance() -> None:
    groups = [[0.0, 1e-3], [0.0, 1.0]]
    assert report_of(groups)["zero_share"] == 0.0
    assert report_of(groups, floor=1e-2)["zero_share"] == 0.5
    assert zero_variance_share(torch.tensor([1e-6, 1.0, math.nan]), floor=1e-2).item() == 0.5


def test_effective_prompts_and_group_size_count_those_that_carry_the_signal() -> None:
    assert effective_prompts(torch.full((5,), 3.0)).item() == 5.0
    assert effective_prompts(torch.tensor([0.0, 4.0, 0.0, math.nan])).item() == 1.0
    assert effective_prompts(torch.zeros(3)).item() == 0.0
    report = report_of([[0.0, 0.0, 1.0, 1.0], [2.0, 2.0, 2.0, 2.0], [0.0, 0.0, 0.0, 1.0]])
    # Half and half: 4 responses; none; a = (3, -1, -1, -1) / 4: 1.5^2 / 0.75 = 3.
    assert report["effective_group_size"] == pytest.approx((4 + 0 + 3) / 3)
    assert report["effective_prompts"] == pytest.approx((1 / 3 + 1 / 4) ** 2 / (1 / 9 + 1 / 16))


def test_a_constant_reward_whitens_to_zero() -> None:
    assert whitened_variance(torch.tensor(0.0), torch.tensor(0.0)).item() == 0.0


def test_quantiles_of_the_standard_deviation_are_those_of_the_prompts_to_two_percent() -> None:
    rng = np.random.default_rng(5)
    spreads = rng.lognormal(sigma=1.5, size=400)
    groups: Groups = [[0.0, float(spread) * math.sqrt(2)] for spread in spreads]
    report = report_of(groups)
    for name, share in (("std_q05", 0.05), ("std_q50", 0.5), ("std_q95", 0.95)):
        expected = np.quantile(spreads, share, method="inverted_cdf")
        assert report[name] == pytest.approx(expected, rel=0.02)
    assert report_of([[1.0, 1.0]] * 3)["std_q95"] == 0.0


def test_later_reports_are_compared_with_the_first_one_across_resets() -> None:
    metric = RewardVariance()
    for scale in (1.0, 0.5):
        metric.update(torch.tensor([0.0, 2.0, 1.0, 3.0]) * scale, torch.tensor([0, 0, 1, 1]))
        report = metric.compute()
        metric.remember(report)
        metric.reset()
        assert report["change"].item() == scale**2
        # Of 4 rewards 0, 2, 1, 3 the unbiased variance is 5 / 3.
        assert report["whitened_by_first"].item() == pytest.approx(2 * scale**2 / (5 / 3))


def test_the_correlation_with_length_is_that_of_deviations_within_prompts() -> None:
    rng = np.random.default_rng(6)
    rewards, lengths = rng.normal(size=(8, 4)), rng.integers(5, 50, size=(8, 4)).astype(float)
    rewards += 0.05 * lengths + 10 * rng.normal(size=(8, 1))
    metric = RewardVariance()
    metric.update(torch.tensor(rewards).flatten(), torch.arange(8).repeat_interleave(4), torch.tensor(lengths).flatten())
    centred = [(table - table.mean(1, keepdims=True)).ravel() for table in (rewards, lengths)]
    assert numbers(metric)["length_correlation"] == pytest.approx(np.corrcoef(*centred)[0, 1], rel=1e-9)
    few = RewardVariance()
    few.update(torch.tensor([1.0, 2.0]), torch.tensor([0, 0]), torch.tensor([1, 2]))
    assert math.isnan(numbers(few)["length_correlation"])


@given(groups_of_rewards, st.integers(1, 7))
def test_two_ranks_report_what_one_does(groups: Groups, cut: int) -> None:
    parts = [part for part in (groups[:cut], groups[cut:]) if part]
    ranks = []
    for part in parts:
        metric = RewardVariance()
        metric.update(*flat(part))
        ranks.append(metric)
    ranks[0].merge_state(RewardVariance() if len(ranks) == 1 else ranks[1])
    whole = report_of(groups)
    for name, value in numbers(ranks[0]).items():
        assert value == pytest.approx(whole[name], rel=1e-7, abs=1e-7, nan_ok=True), name


def test_merged_moments_are_those_of_all_values_and_empty_parts_add_nothing() -> None:
    rng = np.random.default_rng(7)
    parts = [rng.normal(loc=1e6, size=size) for size in (3, 0, 5)]
    exact = torch.tensor(
        [[len(p), p.mean() if len(p) else 0.0, ((p - p.mean()) ** 2).sum() if len(p) else 0.0] for p in parts],
        dtype=torch.float64,
    )
    whole = np.concatenate(parts)
    assert merged_moments(exact).tolist() == pytest.approx([8, whole.mean(), ((whole - whole.mean()) ** 2).sum()], rel=1e-9)
    assert merged_moments(torch.zeros(2, 3, dtype=torch.float64)).tolist() == [0.0, 0.0, 0.0]


def test_states_stay_in_float64_when_the_module_goes_to_bfloat16() -> None:
    metric = RewardVariance().to(torch.bfloat16)
    assert {state.dtype for state in (metric.sums, metric.moments, metric.bins, metric.first)} == {torch.float64}


def test_a_checkpoint_in_the_middle_changes_nothing(tmp_path: Path) -> None:
    first, second = [[0.0, 1.0], [3.0, 7.0]], [[2.0, 2.5], [9.0, 1.0]]
    whole = RewardVariance()
    whole.persistent(True)
    whole.update(*flat(first))
    whole.remember(whole.compute())
    torch.save(whole.state_dict(), tmp_path / "metric.pt")
    resumed = RewardVariance()
    resumed.persistent(True)
    resumed.load_state_dict(torch.load(tmp_path / "metric.pt", weights_only=True))
    copied = copy.deepcopy(whole)
    for metric in (whole, resumed, copied):
        metric.update(*flat(second))
    expected = pytest.approx(numbers(whole), rel=0, abs=0, nan_ok=True)
    assert numbers(resumed) == expected
    assert numbers(copied) == expected


def test_slots_keep_the_order_within_a_prompt() -> None:
    order, slots = prompt_slots(torch.tensor([9, 2, 9, 2, 9]))
    assert order.tolist() == [1, 3, 0, 2, 4]
    assert slots.tolist() == [0, 0, 1, 1, 1]


def test_M5_an_update_asks_the_device_for_no_value() -> None:
    # Tensors without values: whatever depends on one raises.
    metric = RewardVariance().to("meta")
    rewards, prompt_ids = torch.randn(8, device="meta"), torch.zeros(8, dtype=torch.long, device="meta")
    metric.update(rewards, prompt_ids, torch.ones(8, device="meta"))
    assert metric.sums.device.type == "meta"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_M5_an_update_does_not_wait_for_the_gpu() -> None:
    metric = RewardVariance().to("cuda")
    rewards, prompt_ids = torch.randn(8, device="cuda"), torch.arange(8, device="cuda") // 4
    metric.update(rewards, prompt_ids, rewards)
    torch.cuda.set_sync_debug_mode("error")
    try:
        metric.update(rewards, prompt_ids, rewards)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert metric.compute()["prompts"] == 4


def report_on_rank(parts: Sequence[Groups], _folder: Path, rank: int, _ranks: int) -> dict[str, Tensor]:
    torch.distributed.init_process_group("gloo")
    metric = RewardVariance()
    metric.update(*flat(parts[rank]))
    report = metric.compute()
    torch.distributed.destroy_process_group()
    return report


@pytest.mark.slow
def test_real_ranks_report_what_one_process_does(tmp_path: Path) -> None:
    groups: Groups = (100 + np.random.default_rng(8).normal(size=(7, 3))).tolist()
    found = launched(partial(report_on_rank, (groups[:2], groups[2:])), tmp_path, 2)
    whole = report_of(groups)
    for name, value in whole.items():
        assert found[0][name].item() == pytest.approx(value, rel=1e-9, nan_ok=True), name
        assert torch.equal(found[0][name].nan_to_num(-1.0), found[1][name].nan_to_num(-1.0)), name
