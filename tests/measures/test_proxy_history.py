"""What is kept of a proxy and its gold reward from report to report, against plain NumPy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from lightning_pref.measures.overoptimization import past_peak
from lightning_pref.measures.proxy_history import WINDOW, ProxyHistory

PROMPTS, RESPONSES = 6, 5
N = PROMPTS * RESPONSES


def rollout(number: int, *, proxy: float = 0.0, gold: float = 0.0) -> dict[str, Tensor]:
    """Rewards around given means, with everything else that can be known of responses."""
    generator = torch.Generator().manual_seed(number)
    of_prompt = torch.randn(PROMPTS, 1, generator=generator).expand(-1, RESPONSES).flatten()
    return {
        "rewards": proxy + torch.randn(N, generator=generator),
        "prompt_ids": torch.arange(PROMPTS).repeat_interleave(RESPONSES),
        "lengths": torch.randint(3, 20, (N,), generator=generator),
        "gold": gold + 0.1 * of_prompt + 0.1 * torch.randn(N, generator=generator),
        "uncertainty": torch.rand(N, generator=generator) + 0.1,
        "kl": torch.rand(N, generator=generator) * 4,
    }


def reports(rollouts: list[list[dict[str, Tensor]]]) -> tuple[list[dict[str, float]], ProxyHistory]:
    """The report on each window of rollouts."""
    history, found = ProxyHistory(), []
    for number, window in enumerate(rollouts):
        for own in window:
            history.update(**own)
        report = history.compute()
        history.remember(report, update=number)
        history.reset()
        found.append({name: value.item() for name, value in report.items() if value.ndim == 0})
    return found, history


def test_gains_growth_and_distance_are_those_of_all_responses_of_a_report() -> None:
    windows = [[rollout(3 * i + j, proxy=0.3 * i, gold=0.1 * i) for j in range(3)] for i in range(4)]
    found, _ = reports(windows)
    joined = [{name: np.concatenate([own[name].numpy() for own in window]) for name in window[0]} for window in windows]
    for report, own in zip(found, joined, strict=True):
        first = joined[0]
        expected = {
            "proxy_gain": (own["rewards"].mean() - first["rewards"].mean()) / first["rewards"].std(ddof=1),
            "gold_gain": (own["gold"].mean() - first["gold"].mean()) / first["gold"].std(ddof=1),
            "uncertainty_growth": own["uncertainty"].mean() / first["uncertainty"].mean(),
            "length_growth": own["lengths"].mean() / first["lengths"].mean(),
            "distance": own["kl"].mean() ** 0.5,
        }
        assert {name: report[name] for name in expected} == pytest.approx(expected, rel=1e-5, abs=1e-6)
        rewards, lengths = (own[name].reshape(-1, RESPONSES) for name in ("rewards", "lengths"))
        centred = [(values - values.mean(1, keepdims=True)).flatten() for values in (rewards, lengths)]
        assert report["length_correlation"] == pytest.approx(np.corrcoef(*centred)[0, 1], rel=1e-5)


def test_the_drop_is_the_fall_of_smoothed_gold_since_its_peak_while_the_proxy_rises() -> None:
    gold = [0.0, 0.5, 1.0, 0.9, 0.6, 0.2, 0.1, 0.0, 0.3]
    windows = [[rollout(i, proxy=0.5 * i, gold=value)] for i, value in enumerate(gold)]
    found, history = reports(windows)
    means = np.array([[own[0][name].mean().item() for name in ("rewards", "gold")] for own in windows])
    smooth = np.array([means[i - WINDOW + 1 : i + 1].mean(0) for i in range(WINDOW - 1, len(means))])
    errors = np.array([own[0]["gold"].numpy().reshape(PROMPTS, RESPONSES).mean(1).var(ddof=1) / PROMPTS for own in windows])
    smooth_errors = np.array([errors[i - WINDOW + 1 : i + 1].sum() / WINDOW**2 for i in range(WINDOW - 1, len(errors))])
    unit = windows[0][0]["gold"].std().item()
    assert all(np.isnan(report["gold_drop"]) for report in found[: WINDOW - 1])
    for i, report in enumerate(found[WINDOW - 1 :]):
        peak = smooth[: i + 1, 1].argmax()
        drop = smooth[peak, 1] - smooth[i, 1]
        assert report["gold_drop"] == pytest.approx(drop / unit, abs=1e-5)
        error = (smooth_errors[i] + smooth_errors[peak]) ** 0.5
        assert report["gold_drop_errors"] == pytest.approx(drop / error, rel=1e-4, abs=1e-5)
        so_far = torch.from_numpy(means[: i + WINDOW])
        assert past_peak(so_far[:, 0], so_far[:, 1], tolerance=0.25 * unit) == (report["gold_drop"] > 0.25)
    peak = smooth[:, 1].argmax()
    highest = history.highest()
    assert highest is not None
    assert highest.gold == pytest.approx(smooth[peak, 1], rel=1e-5)
    assert highest.proxy == pytest.approx(smooth[peak, 0], rel=1e-5)
    assert highest.update == peak + WINDOW - 1


def test_a_policy_that_loses_both_rewards_has_no_drop() -> None:
    found, _ = reports([[rollout(i, proxy=-i, gold=-0.3 * i)] for i in range(6)])
    assert [report["gold_drop"] for report in found[WINDOW - 1 :]] == [0.0] * (6 - WINDOW + 1)


def test_what_is_not_known_is_nan_and_what_is_not_finite_is_left_out() -> None:
    bare = [{name: own[name] for name in ("rewards", "prompt_ids")} for own in map(rollout, range(3))]
    bare[1]["rewards"][4] = torch.nan
    found, history = reports([[own] for own in bare])
    assert np.isnan([found[-1][name] for name in ("gold_gain", "gold_drop", "uncertainty_growth", "length_growth")]).all()
    assert np.isnan([found[-1][name] for name in ("length_correlation", "distance")]).all()
    assert found[1]["proxy"] == pytest.approx(bare[1]["rewards"].nanmean().item())
    assert history.highest() is None


def test_two_ranks_report_what_one_does() -> None:
    rollouts = [[rollout(2 * i, proxy=i), rollout(2 * i + 1, proxy=i, gold=-i)] for i in range(5)]
    together, _ = reports(rollouts)
    history = ProxyHistory()
    for number, (first, second) in enumerate(rollouts):
        other = ProxyHistory()
        history.update(**first)
        other.update(**second)
        history.merge_state(other)
        report = history.compute()
        history.remember(report, update=number)
        history.reset()
        values = {name: value.item() for name, value in report.items() if value.ndim == 0}
        assert values == pytest.approx(together[number], rel=1e-9, nan_ok=True)
