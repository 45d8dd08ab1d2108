"""Whether preferred responses lose probability while they are trained to be preferred."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from lightning_pref.callbacks.diagnostic import Key
from lightning_pref.callbacks.hosts import Host
from lightning_pref.callbacks.monitor import TRAIN, Monitor
from lightning_pref.measures.ches import ches_from_sums
from lightning_pref.measures.displacement import Displacement, max_drawdown
from lightning_pref.measures.pair_history import Anchor, PairHistory, PairQueue, PairRecord
from lightning_pref.observations import Observation, PairHiddenObservation, PairObservation

# Pairs that wait on the device at most, 72 bytes each; more are fetched at once, before the next report.
MAX_WAITING = 2**20

DETAILS = (
    "rejected_logp_change_per_token",
    "chosen_logp_change_q05",
    "chosen_logp_change_median",
    "chosen_logp_change_q95",
    "ches_correlation",
)


class FollowedPairs(Displacement):
    """The pairs of one source: the sums since the last report, what waits on the device, and the table of all of them."""

    def __init__(self, history: PairHistory, *, details: bool) -> None:
        super().__init__(details=details)
        self.history = history
        self.queue = PairQueue()
        self.num_scored = 0
        self.peak = 0.0  # nats, of the mean chosen change; 0 is the anchor
        self.drawdown = 0.0

    def absorb(self) -> None:
        """Fetch what waits on the device, and add it to the table and to the sums."""
        sights, scores = self.queue.fetch()
        self.num_scored += len(scores.row_ids)
        self.update(self.history.see(sights, scores))

    def fall(self, change: float) -> float:
        """Largest fall so far of the mean chosen change from its peak, this one included."""
        series = torch.tensor([self.peak, change], dtype=torch.float64)
        self.drawdown = max(self.drawdown, float(max_drawdown(series)))
        self.peak = max(self.peak, change)
        return self.drawdown


class LikelihoodDisplacementTracker(Monitor[FollowedPairs]):
    """Watches how far the log-probabilities of both responses of each pair have moved since training began.

    Preference losses see only the margin, so the preferred response may fall with the other one, and its probability go to
    responses that nobody asked for: likelihood displacement (Razin et al. 2024, arXiv 2410.08847).

    Needs: `PairObservation`; with `ches` also `PairHiddenObservation`.
    Logs: `displacement/chosen_logp_change`, `share`, `rejected_logp_change`, `both_fell`, `margin_change`,
    `chosen_logp_change_per_token`, `late_anchors`, `left_out`; more with `details`; a table of the worst rows as text.
    Changes: nothing.

    Every pair is followed by its row id, in training, in validation and in each probe for itself. With several ranks each keeps
    the table of the rows it sees; means are taken over all ranks, and the worst rows of all ranks are gathered at each report,
    where every rank comes by.

    Args:
        anchor: What a pair is compared with. `reference`: its log-probability under the reference at first sight. `first`: its
            own value at first sight. `auto`: the reference where the observation has it.
        ches: Also score pairs by CHES at first sight, which makes the module hand out hidden states in every step.
        details: Also log quantiles, the drawdown and, with `ches`, the rank correlation between CHES and change.
        num_worst: Rows in tables and alerts.
        max_rows: Pairs followed at most, by source and rank, at 120 bytes each; further ones are counted in `left_out` unless
            their reference is known.
        every_n_updates: Updates between two reports; the trainer's own logging interval if not given.
        silent_after: Raise if nothing was heard within this many training batches, or within the first epoch.
        thresholds: Limits of alerts other than the defaults.
    """

    prefix = "displacement"
    keys = (
        Key("displacement/chosen_logp_change", "Mean log-prob of chosen responses, now minus at the anchor.", "nats"),
        Key("displacement/share", "Share of rows whose chosen response is less likely than at the anchor."),
        Key("displacement/rejected_logp_change", "The same change of rejected responses.", "nats"),
        Key("displacement/both_fell", "Share of rows whose responses are both less likely than at the anchor."),
        Key("displacement/margin_change", "Chosen change minus rejected change.", "nats"),
        Key("displacement/chosen_logp_change_per_token", "Mean of each row's chosen change by its tokens.", "nats/token"),
        Key("displacement/late_anchors", "Share of rows whose anchor is their own value after the first update."),
        Key("displacement/left_out", "Share of rows without a finite log-prob, or without an anchor for want of room."),
        Key("displacement/rejected_logp_change_per_token", "With details: the same of rejected responses.", "nats/token"),
        Key("displacement/chosen_logp_change_q05", "With details: 5 % quantile over rows.", "nats"),
        Key("displacement/chosen_logp_change_median", "With details: median over rows.", "nats"),
        Key("displacement/chosen_logp_change_q95", "With details: 95 % quantile over rows.", "nats"),
        Key("displacement/max_drawdown", "With details: largest fall of chosen_logp_change so far.", "nats"),
        Key("displacement/ches_correlation", "With details and CHES: Spearman, length-normalised CHES and chosen change."),
    )

    def __init__(
        self,
        *,
        anchor: Anchor = "auto",
        ches: bool = False,
        details: bool = False,
        num_worst: int = 10,
        max_rows: int = 200_000,
        every_n_updates: int | None = None,
        silent_after: int = 200,
        thresholds: Mapping[str, float] | None = None,
    ) -> None:
        if num_worst < 1:
            raise ValueError(f"`num_worst` must be at least 1, got {num_worst!r}.")
        super().__init__(every_n_updates=every_n_updates, silent_after=silent_after, thresholds=thresholds)
        PairHistory(anchor=anchor, max_rows=max_rows)  # refuses a wrong setting now, not at the first observation
        self.anchor: Anchor = anchor
        self.ches = ches
        self.details = details
        self.num_worst = num_worst
        self.max_rows = max_rows
        # Of the instance: hidden states cost memory, so that a step makes them only where someone asks.
        self.consumes = (PairObservation, PairHiddenObservation) if ches else (PairObservation,)  # type: ignore[misc]
        self._worst: dict[str, list[PairRecord]] = {}

    @override
    def new_accumulator(self) -> FollowedPairs:
        return FollowedPairs(PairHistory(anchor=self.anchor, max_rows=self.max_rows), details=self.details)

    @override
    def update(self, accumulator: FollowedPairs, observation: Observation) -> None:
        if isinstance(observation, PairHiddenObservation):
            sums = (observation.chosen_hidden, observation.rejected_hidden)
            normalized = ches_from_sums(*sums, observation.chosen_lengths, observation.rejected_lengths)
            accumulator.queue.add_scores(observation.row_ids, ches_from_sums(*sums), normalized)
        elif isinstance(observation, PairObservation):
            references = (observation.ref_chosen_logps, observation.ref_rejected_logps)
            if self.anchor == "reference" and None in references:
                raise ValueError(
                    f"{type(self).__name__}(anchor='reference') received a PairObservation without `ref_chosen_logps` or "
                    "`ref_rejected_logps`. Publish them, or use anchor='auto', which compares such a row with its first value."
                )
            lengths = (observation.chosen_lengths, observation.rejected_lengths)
            values = (observation.chosen_logps, observation.rejected_logps, *lengths, *references)
            accumulator.queue.add_pairs(self.updates, observation.row_ids, *values)
        if accumulator.queue.num_rows > MAX_WAITING:
            accumulator.absorb()

    @override
    def summarize(self, accumulator: FollowedPairs) -> Mapping[str, Tensor]:
        found = accumulator.compute()
        values = {f"displacement/{name}": value for name, value in found.items() if self.details or name not in DETAILS}
        if self.details:
            change = float(found["chosen_logp_change"])
            fall = accumulator.fall(change) if change == change else change
            values["displacement/max_drawdown"] = torch.tensor(fall, dtype=torch.float64)
            if not self.ches:
                del values["displacement/ches_correlation"]
        return values

    @override
    def flush(self, host: Host, source: str) -> None:
        # As in the base: with several ranks all take part, whatever each of them heard.
        if host.world_size == 1 and not self._heard.get(source):
            return
        pairs = self._accumulator(source, host.device)
        pairs.absorb()
        self._worst[source] = gather_worst(host, pairs.history.worst(self.num_worst), self.num_worst)
        super().flush(host, source)

    @override
    def end_epoch(self, host: Host) -> None:
        super().end_epoch(host)
        pairs = self._accumulators.get(TRAIN)
        if self.ches and pairs is not None and len(pairs.history) and not pairs.num_scored:
            raise ValueError(
                f"{type(self).__name__}(ches=True) received no PairHiddenObservation in an epoch of training of "
                f"{type(host.module).__name__}, so no row has a CHES score. Publish one beside each PairObservation, or leave "
                "`ches` out."
            )

    @override
    def finish(self, host: Host) -> None:
        super().finish(host)
        for source, records in self._worst.items():
            if records:
                host.log_text(f"displacement/worst_rows/{source}", worst_table(records))

    @override
    def evidence(self, rule: str, source: str) -> str:
        table = self._accumulators[source].history
        if rule == "displacement/late_anchors":
            late = table.column("anchor_step")[table.column("anchor_step") > 0]
            last = int(late.max()) if len(late) else 0
            return f"Of {len(table)} rows of this process {len(late)} were first seen after an update, the last after {last}."
        if rule == "displacement/left_out":
            return f"In this process {table.num_overflowed} sights found no room, {table.num_undefined} were not finite."
        worst = self._worst.get(source, [])[:3]
        return f"Fell furthest: {'; '.join(map(in_words, worst))}." if worst else ""

    def history(self, source: str = TRAIN) -> PairHistory:
        """The table of the pairs that this process has seen of a source.

        Args:
            source: `train`, `val` or `probe/<name>`.
        """
        if source not in self._accumulators:
            known = ", ".join(sorted(self._accumulators)) or "none yet"
            raise ValueError(f"No pairs were seen of {source!r}; sources with pairs: {known}.")
        self._accumulators[source].absorb()
        return self._accumulators[source].history

    def worst_rows(self, source: str = TRAIN) -> Sequence[PairRecord]:
        """The rows of all ranks whose chosen response had fallen furthest at the last report, furthest first."""
        return tuple(self._worst.get(source, ()))

    @override
    def measured_state(self) -> dict[str, Any]:
        for pairs in self._accumulators.values():
            if pairs.queue.num_rows:
                pairs.absorb()
        own = {
            source: {
                "history": pairs.history.state(),
                "num_scored": pairs.num_scored,
                "peak": pairs.peak,
                "drawdown": pairs.drawdown,
            }
            for source, pairs in self._accumulators.items()
        }
        worst = {source: [list(record) for record in records] for source, records in self._worst.items()}
        return {**super().measured_state(), "pairs": own, "worst": worst}

    @override
    def load_measured_state(self, state: Mapping[str, Any]) -> None:
        super().load_measured_state(state)
        for source, saved in state["pairs"].items():
            pairs = self._accumulators[source]
            pairs.history.load(saved["history"])
            pairs.num_scored, pairs.peak, pairs.drawdown = saved["num_scored"], saved["peak"], saved["drawdown"]
        self._worst = {source: [PairRecord._make(row) for row in rows] for source, rows in state["worst"].items()}


def gather_worst(host: Host, records: Sequence[PairRecord], count: int) -> list[PairRecord]:
    """The worst pairs of all ranks, from the `count` worst of each; every rank must come by."""
    if host.world_size == 1:
        return list(records)
    # Each rank fills its own slots, so that a sum puts them side by side. Ids go in two halves: a float64 holds 53 bits.
    slots = torch.zeros(host.world_size, count, 2 + len(PairRecord._fields), dtype=torch.float64)
    for slot, record in zip(slots[host.rank], records, strict=False):
        high, low = divmod(record.row_id, 2**32)
        slot.copy_(torch.tensor([1.0, high, low, *record[1:]], dtype=torch.float64))
    rows = host.total(slots.to(host.device)).cpu().flatten(0, 1).tolist()
    found = [
        PairRecord._make([int(high) * 2**32 + int(low), int(place), *rest[:5], int(rest[5]), *rest[6:]])
        for present, high, low, place, *rest in rows
        if present
    ]
    return sorted(found, key=lambda record: (record.chosen_change, record.row_id, record.place))[:count]


def in_words(record: PairRecord) -> str:
    """One row as an alert names it."""
    score = "" if record.normalized_ches != record.normalized_ches else f", length-normalised CHES {record.normalized_ches:.3g}"
    return f"row {record.row_id} ({record.chosen_change:+.3g} nats, rejected {record.rejected_change:+.3g}{score})"


def worst_table(records: Sequence[PairRecord]) -> str:
    """The worst rows as a Markdown table."""
    head = "| row | chosen change (nats) | per token | rejected change | lowest chosen change | at update | LN-CHES |"
    lines = [head, "|---:" * 7 + "|"]
    for record in records:
        per_token = record.chosen_change / record.chosen_length if record.chosen_length else float("nan")
        name = f"{record.row_id}" if record.place == 0 else f"{record.row_id}, pair {record.place + 1}"
        lines.append(
            f"| {name} | {record.chosen_change:.3f} | {per_token:.4f} | {record.rejected_change:.3f} "
            f"| {record.lowest_change:.3f} | {record.lowest_step} | {record.normalized_ches:.4g} |"
        )
    return "\n".join(lines)
