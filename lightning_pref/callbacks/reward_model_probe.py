"""What a reward model in training would teach: its scores of a fixed set of responses, every N updates."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor
from typing_extensions import override

from lightning_pref.callbacks.diagnostic import Key
from lightning_pref.callbacks.hosts import Host, as_floats
from lightning_pref.callbacks.probe import Probe, Score, batches_of_rank
from lightning_pref.callbacks.reward_variance import PREFIX, RewardVarianceMonitor, reported
from lightning_pref.judge import Judge, alert_rules
from lightning_pref.measures.teaching import compare_pairs, end_share, length_correlation, score_drift
from lightning_pref.measures.variance import STD_FLOOR, RewardVariance, prompt_slots
from lightning_pref.observations import Observation, RewardObservation

# Of the monitor's keys those that say most about a reward model.
MAIN = ("within_prompt", "whitened", "change")
TEACHING = (
    Key(f"{PREFIX}/accuracy", "Share of pairs of responses in the order of the gold reward; a tie is not right.", "share"),
    Key(f"{PREFIX}/ties", "Share of pairs of responses with equal scores.", "share"),
    Key(f"{PREFIX}/saturated", "Share of pairs on which the Bradley-Terry loss has a slope below 0.01.", "share"),
    Key(f"{PREFIX}/rank_correlation", "Spearman correlation of the scores with the first measurement.", "[-1, 1]"),
)
TEACHING_DETAILS = (
    Key(f"{PREFIX}/accuracy_with_ties", "Share of pairs whose order, or tie, is that of the gold reward.", "share"),
    Key(f"{PREFIX}/end_share", "Share of scores within 1 % of the ends of their range.", "share"),
    Key(f"{PREFIX}/shift", "Change of the mean score since the first measurement.", "first std"),
    Key(f"{PREFIX}/spread", "Standard deviation of the scores over that of the first measurement.", "ratio"),
    Key(f"{PREFIX}/length_correlation_pooled", "Correlation of score and length over all responses.", "[-1, 1]"),
)


class RewardModelProbe(Probe):
    """Watches a reward model in training: how well it would teach the policy whose responses these are.

    Needs: batches of prompts with K responses each, sampled once from the policy to be taught, and `score(module, batch)`
    that gives a `RewardObservation`; with `gold` in it accuracy is measured, with `lengths` the taste for length.
    Logs: under `probe/<name>/reward_variance/`: `within_prompt`, `whitened`, `change`, `accuracy`, `ties`, `saturated`,
    `rank_correlation`, `length_correlation`; and `probe/<name>/time_share`.
    Changes: nothing; scoring is done in eval mode, without gradients, with all random states restored.

    The same numbers come out on any number of ranks. Alerts are those of the `RewardVarianceMonitor`, raised at the first
    measurement that gives reason, since a fixed set has no sampling noise. Scores that are all 0 before training are none: those
    of an implicit reward are.

    Args:
        name: Part of the keys.
        batches: The fixed set. Responses to one prompt are in one batch.
        score: Scores a batch.
        every_n_updates: Updates between two measurements.
        budget: Share of the training time that measuring may take; `None` for no limit.
        floor: A standard deviation up to here is none, in units of the score.
        details: Also log the other keys of the monitor, the drift's shift and spread, and more on ties and ends.
        thresholds: Limits of alerts other than those in `ALERT_RULES`.
    """

    prefix = PREFIX
    keys: ClassVar[tuple[Key, ...]] = (
        *Probe.keys,
        *(key._replace(name=f"probe/<name>/{key.name}") for key in (*RewardVarianceMonitor.keys, *TEACHING, *TEACHING_DETAILS)),
    )

    def __init__(
        self,
        name: str,
        batches: Sequence[Any],  # Any: of the user's own
        score: Score,
        *,
        every_n_updates: int = 50,
        budget: float | None = 0.03,
        floor: float = STD_FLOOR,
        details: bool = False,
        thresholds: Mapping[str, float] | None = None,
    ) -> None:
        super().__init__(name, batches, self._keep, every_n_updates=every_n_updates, budget=budget)
        rules = alert_rules(self.prefix, thresholds)
        # The first measurement is of a head that was not trained yet: its spread is nothing to compare with.
        rules.pop(f"{PREFIX}/vanishing")
        self._judge = Judge({rule_name: replace(rule, patience=1) for rule_name, rule in rules.items()})
        RewardVariance(floor=floor)  # refuses what is no floor
        self.score_batch = score
        self.floor = floor
        self.details = details
        self._kept: list[list[RewardObservation]] = []  # of the current round, by batch of this rank
        self._first_scores: Tensor | None = None  # [N], of all ranks
        self._first_report: Tensor | None = None

    def _keep(self, module: Any, batch: Any) -> Sequence[Observation]:  # Any: of the user's own
        """Score a batch, and hold the result back from the monitors: they would report on it a second time."""
        found = self.score_batch(module, batch)
        observations = [found] if isinstance(found, Observation) else list(found)
        self._kept.append([_checked(observation, self.name) for observation in observations])
        return ()

    @override
    def measure(self, host: Host) -> None:
        self._kept = []
        super().measure(host)
        indices = batches_of_rank(len(self.batches), host.rank, host.world_size)
        mine = {index: kept for (index, counts), kept in zip(indices, self._kept, strict=True) if counts}
        self._kept = []
        table = _gathered(host, mine, len(self.batches))
        # The log-ratio of an implicit reward to where its training starts is 0 there, which is no fault.
        is_untouched = self._first_scores is None and not bool(table[:, 0].any())
        values = as_floats(self._report(table))
        logged = {key for key in values if self.details or key.removeprefix(f"{PREFIX}/") in MAIN}
        logged |= {key.name for key in TEACHING} | {f"{PREFIX}/length_correlation", f"{PREFIX}/not_finite"}
        host.log({f"{self.source}/{key}": value for key, value in values.items() if key in logged})
        if not is_untouched:
            self.judge(host, values, source=self.source)

    def _report(self, table: Tensor) -> dict[str, Tensor]:
        """Every number about the scores of all responses, [N, 4]."""
        scores, lengths, gold, prompts = table.unbind(1)
        prompt_ids = prompts.long()
        has_lengths, has_gold = (~torch.stack([lengths.isnan().any(), gold.isnan().all()])).tolist()
        # The table is that of all ranks already.
        variance = RewardVariance(floor=self.floor, sync_on_compute=False).to(table.device)
        variance.update(scores, prompt_ids, lengths if has_lengths else None)
        if self._first_report is not None:
            variance.first = self._first_report.to(table.device)
        report = variance.compute()
        if self._first_scores is None:
            variance.remember(report)
            self._first_scores, self._first_report = scores.cpu(), variance.first.cpu()
        if len(self._first_scores) != len(scores):
            raise ValueError(
                f"RewardModelProbe {self.name!r} scored {len(scores)} responses, but {len(self._first_scores)} in its first "
                "measurement (perhaps before a resume). Drift compares the same responses: keep the set, or rename the probe."
            )
        pairs = compare_pairs(scores, prompt_ids, gold if has_gold else None)
        drift = score_drift(scores, self._first_scores.to(table.device))
        found = {
            "ties": pairs.tie_share,
            "saturated": pairs.saturated_share,
            "rank_correlation": drift.rank_correlation,
            "shift": drift.shift,
            "spread": drift.spread,
            "end_share": end_share(scores),
        }
        if has_gold:
            found |= {"accuracy": pairs.accuracy, "accuracy_with_ties": pairs.accuracy_with_ties}
        if has_lengths:
            found["length_correlation_pooled"] = length_correlation(scores, lengths, prompt_ids).pooled
        return reported(report, details=True) | {f"{PREFIX}/{name}": value for name, value in found.items()}

    @override
    def measured_state(self) -> dict[str, Any]:  # Any: plain data for a checkpoint
        first = {} if self._first_scores is None else {"first_scores": self._first_scores, "first_report": self._first_report}
        return {**super().measured_state(), **first}

    @override
    def load_measured_state(self, state: Mapping[str, Any]) -> None:
        super().load_measured_state(state)
        self._first_scores = state.get("first_scores")
        self._first_report = state.get("first_report")


def _checked(observation: Observation, name: str) -> RewardObservation:
    if not isinstance(observation, RewardObservation):
        raise TypeError(
            f"The score function of RewardModelProbe {name!r} gave a {type(observation).__name__}; it has to give a "
            "RewardObservation(rewards=..., prompt_ids=...)."
        )
    return observation


def _gathered(host: Host, mine: Mapping[int, Sequence[RewardObservation]], num_batches: int) -> Tensor:
    """Score, length, gold reward (`nan` where unknown) and prompt of all responses of all ranks, by batch, [N, 4]."""
    sizes = torch.zeros(num_batches, dtype=torch.float64, device=host.device)
    for index, observations in mine.items():
        sizes[index] = sum(len(observation.rewards) for observation in observations)
    ends = host.total(sizes).cumsum(0).long().tolist()
    table = torch.zeros(ends[-1], 4, dtype=torch.float64, device=host.device)
    for index, observations in mine.items():
        row = ends[index - 1] if index else 0
        for observation in observations:
            order, slots = prompt_slots(observation.prompt_ids)
            # Numbered from the first row of the observation on, so that no two prompts share a number.
            numbers = torch.empty_like(slots).index_copy_(0, order, slots) + row
            unknown = torch.full_like(numbers, torch.nan, dtype=torch.float64)
            columns = (observation.rewards, observation.lengths, observation.gold, numbers)
            rows = torch.stack([unknown if c is None else c.detach().double() for c in columns], 1)
            table[row : row + len(rows)] = rows
            row += len(rows)
    return host.total(table)
