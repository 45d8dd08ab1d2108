"""Whether the reward tells the responses to a prompt apart: what a policy gradient lives on."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from typing_extensions import override

from lightning_pref.callbacks.diagnostic import Key
from lightning_pref.callbacks.monitor import Monitor
from lightning_pref.measures.variance import STD_FLOOR, RewardVariance
from lightning_pref.observations import Observation, RewardObservation

PREFIX = "reward_variance"

WITHIN_PROMPT = Key(f"{PREFIX}/within_prompt", "Mean over prompts of the unbiased variance of their rewards.", "reward^2")
ZERO_SHARE = Key(f"{PREFIX}/zero_share", "Share of prompts whose responses all get the same reward.", "share")
WHITENED = Key(f"{PREFIX}/whitened", "within_prompt of rewards divided by the pooled standard deviation of all of them.", "share")
CHANGE = Key(f"{PREFIX}/change", "within_prompt over that of the first report.", "ratio")
BETWEEN_PROMPT = Key(f"{PREFIX}/between_prompt", "Variance of the prompts' mean rewards, which baselines cancel.", "reward^2")
EFFECTIVE_PROMPTS = Key(f"{PREFIX}/effective_prompts", "How many prompts of a report carry the signal.", "prompts")
MEAN = Key(f"{PREFIX}/mean", "Mean reward of all responses.", "reward")
LENGTH_CORRELATION = Key(
    f"{PREFIX}/length_correlation", "Correlation of reward and length among responses to the same prompt.", "[-1, 1]"
)
# Logged only where there is something to tell.
NOT_FINITE = Key(f"{PREFIX}/not_finite", "Rewards that are nan or infinite; left out of everything else.", "responses")
SINGLE_SHARE = Key(f"{PREFIX}/single_share", "Share of prompts with one response; left out of everything within.", "share")
# Logged on request.
DETAILS = (
    Key(f"{PREFIX}/effective_group_size", "How many responses to a prompt carry its signal.", "responses"),
    Key(f"{PREFIX}/whitened_by_first", "Like whitened, by the pooled standard deviation of the first report.", "ratio"),
    Key(f"{PREFIX}/std_q05", "Standard deviation within a prompt, 5 % quantile over prompts.", "reward"),
    Key(f"{PREFIX}/std_q50", "Standard deviation within a prompt, median over prompts.", "reward"),
    Key(f"{PREFIX}/std_q95", "Standard deviation within a prompt, 95 % quantile over prompts.", "reward"),
)
MAIN = (WITHIN_PROMPT, ZERO_SHARE, WHITENED, CHANGE, BETWEEN_PROMPT, EFFECTIVE_PROMPTS, MEAN)


class RewardVarianceMonitor(Monitor[RewardVariance]):
    """Watches the variance of rewards within a prompt; where it vanishes, so does the policy gradient.

    Needs: `RewardObservation`, all responses of a prompt in one; its `lengths` to see whether length pays.
    Logs: `reward_variance/within_prompt`, `/zero_share`, `/whitened`, `/change`, `/between_prompt`, `/effective_prompts`,
    `/mean`, and `/length_correlation` where lengths are given.
    Changes: nothing.

    Args:
        floor: A standard deviation up to here is none, in units of the reward.
        details: Also log quantiles of the standard deviation, the effective group size, and the variance whitened by the
            first report.
        every_n_updates: Updates between two reports; the trainer's own logging interval if not given.
        silent_after: Raise if nothing was heard within this many training batches, or within the first epoch.
        thresholds: Limits of alerts other than those in `ALERT_RULES`.
    """

    prefix = PREFIX
    consumes = (RewardObservation,)
    keys = (*MAIN, LENGTH_CORRELATION, NOT_FINITE, SINGLE_SHARE, *DETAILS)

    def __init__(
        self,
        *,
        floor: float = STD_FLOOR,
        details: bool = False,
        every_n_updates: int | None = None,
        silent_after: int = 200,
        thresholds: Mapping[str, float] | None = None,
    ) -> None:
        super().__init__(every_n_updates=every_n_updates, silent_after=silent_after, thresholds=thresholds)
        RewardVariance(floor=floor)  # refuses what is no floor, now and not in the first batch
        self.floor = floor
        self.details = details

    @override
    def new_accumulator(self) -> RewardVariance:
        return RewardVariance(floor=self.floor)

    @override
    def update(self, accumulator: RewardVariance, observation: Observation) -> None:
        assert isinstance(observation, RewardObservation)
        accumulator.update(observation.rewards, observation.prompt_ids, observation.lengths)

    @override
    def summarize(self, accumulator: RewardVariance) -> Mapping[str, Tensor]:
        report = accumulator.compute()
        accumulator.remember(report)
        return reported(report, details=self.details)


def reported(report: Mapping[str, Tensor], *, details: bool) -> dict[str, Tensor]:
    """What is logged of the report of a `RewardVariance`, by key."""
    asked = (*MAIN, *DETAILS) if details else MAIN
    values = {key.name: report[key.name.removeprefix(f"{PREFIX}/")] for key in asked}
    single_share = report["single_prompts"] / (report["prompts"] + report["single_prompts"])
    sometimes = {
        LENGTH_CORRELATION.name: (report["length_correlation"], ~report["length_correlation"].isnan()),
        NOT_FINITE.name: (report["not_finite"], report["not_finite"] > 0),
        SINGLE_SHARE.name: (single_share, single_share > 0),
    }
    # Reports are made where values leave the device anyway; one more copy tells which of these do.
    tells = torch.stack([flag for _, flag in sometimes.values()]).tolist()
    return values | {name: value for (name, (value, _)), tell in zip(sometimes.items(), tells, strict=True) if tell}
