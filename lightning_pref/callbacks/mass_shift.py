"""Where the probability goes that chosen and rejected responses lose."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torchmetrics import Metric
from transformers import PreTrainedTokenizerBase
from typing_extensions import override

from lightning_pref.callbacks.diagnostic import Key
from lightning_pref.callbacks.hosts import Host
from lightning_pref.callbacks.monitor import ProbedMonitor
from lightning_pref.measures.mass_shift import MassShiftSummary, mass_shift, probability_change
from lightning_pref.models.first_difference import FirstDifferenceObservation
from lightning_pref.observations import Observation

RESPONSES = ("chosen_response", "rejected_response", "other_responses")
NAMES = (*MassShiftSummary._fields, *RESPONSES)


class TokenShift(NamedTuple):
    """How the probability of a token changed where the responses of pairs first differ."""

    token: int
    text: str  # decoded, empty without a tokenizer
    change: float  # mean over the pairs


class Distributions(NamedTuple):
    """What a pair was at the anchor, and is now; on the CPU."""

    anchor: Tensor  # [V] float32, log-probabilities of the next token, nats
    now: Tensor  # [V]
    anchor_candidates: Tensor  # [K] float32, log-probabilities of whole responses, nats
    now_candidates: Tensor  # [K]


class ShiftedMass(Metric):
    """Sums over the pairs of one source since the last report, and the distributions of each of them by row."""

    full_state_update = False

    def __init__(self) -> None:
        super().__init__()
        self.sums: Tensor
        self.counts: Tensor
        self.add_state("sums", torch.zeros(len(NAMES), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("counts", torch.zeros(len(NAMES), dtype=torch.float64), dist_reduce_fx="sum")
        self.pairs: dict[int, Distributions] = {}

    @override
    def update(self, values: Tensor) -> None:
        """Add [B, names] changes of probability; `nan` is left out."""
        known = ~values.isnan()
        self.sums += torch.where(known, values, 0.0).sum(0).to(self.sums)
        self.counts += known.sum(0).to(self.counts)

    @override
    def compute(self) -> Tensor:
        """Means, [names]."""
        return self.sums / self.counts


class MassShift(ProbedMonitor[ShiftedMass]):
    """Watches, on fixed pairs, which tokens and responses gain what chosen and rejected responses lose.

    At the first position where the two responses of a pair differ, the whole next-token distribution is compared with that of
    the first measurement; beside it the probabilities of whole responses, and of further candidates one wants to watch.

    Needs: `FirstDifferenceObservation`, from `Probe(name, batches, score)` with `models.first_differences` in its score.
    Logs: `mass_shift/chosen_token`, `rejected_token`, `other_tokens`, `largest_gain`, `chosen_response`, `rejected_response`,
    `other_responses`, all under `probe/<name>/`; a table of the tokens that gained and lost most as text.
    Changes: nothing.

    Means are taken over all ranks. Tables, evidence and `gainers` are of the pairs that the own rank scores, which on one device
    are all of them.

    Args:
        tokenizer: Decodes tokens for tables and alerts.
        num_tokens: Tokens in a table, for gains and for losses each.
        max_rows: Pairs kept per source at most, 8 bytes a pair and vocabulary entry, also in every checkpoint.
        silent_after: Raise if nothing was heard within this many training batches, or within the first epoch.
        thresholds: Limits of alerts other than the defaults.
    """

    prefix = "mass_shift"
    scored_by = "lambda module, batch: first_differences(module.policy, batch)"
    consumes = (FirstDifferenceObservation,)
    keys = (
        Key("mass_shift/chosen_token", "Change of the chosen response's token where the responses first differ.", "probability"),
        Key("mass_shift/rejected_token", "Change of the rejected response's token there.", "probability"),
        Key("mass_shift/other_tokens", "Change of all other tokens there together.", "probability"),
        Key("mass_shift/largest_gain", "Mean over pairs of the largest gain of one other token.", "probability"),
        Key("mass_shift/chosen_response", "Change of the probability of whole chosen responses.", "probability"),
        Key("mass_shift/rejected_response", "Change of the probability of whole rejected responses.", "probability"),
        Key("mass_shift/other_responses", "Change of the probability of the other candidates of a pair together.", "probability"),
    )

    def __init__(
        self,
        *,
        tokenizer: PreTrainedTokenizerBase | None = None,
        num_tokens: int = 10,
        max_rows: int = 64,
        silent_after: int = 200,
        thresholds: Mapping[str, float] | None = None,
    ) -> None:
        for name, value in (("num_tokens", num_tokens), ("max_rows", max_rows)):
            if value < 1:
                raise ValueError(f"`{name}` must be at least 1, got {value!r}.")
        super().__init__(silent_after=silent_after, thresholds=thresholds)
        self.tokenizer = tokenizer
        self.num_tokens = num_tokens
        self.max_rows = max_rows

    @override
    def new_accumulator(self) -> ShiftedMass:
        return ShiftedMass()

    @override
    def update(self, accumulator: ShiftedMass, observation: Observation) -> None:
        assert isinstance(observation, FirstDifferenceObservation)
        now, candidates = observation.token_logps.float().cpu(), observation.candidate_logps.float().cpu()
        pairs = accumulator.pairs
        rows: list[int] = observation.row_ids.tolist()
        for row, logps, responses in zip(rows, now, candidates, strict=True):
            first = pairs.get(row, Distributions(logps, logps, responses, responses))
            pairs[row] = first._replace(now=logps, now_candidates=responses)
        if len(pairs) > self.max_rows:
            raise ValueError(
                f"{type(self).__name__} keeps whole distributions of at most {self.max_rows} pairs per source, and got "
                f"{len(pairs)}. Give its Probe fewer pairs, or raise `max_rows`."
            )
        anchors = torch.stack([pairs[row].anchor for row in rows])
        tokens = (observation.chosen_tokens.cpu(), observation.rejected_tokens.cpu())
        shift = mass_shift(probability_change(now, anchors), *tokens)
        # A probe may give the same pair fewer or more candidates in another batch; what has no partner is nan.
        gains = candidates.double().exp() - torch.stack([pairs[row].anchor_candidates for row in rows]).double().exp()
        others = gains[:, 2:]
        other = torch.where(others.isfinite().any(1), others.nansum(1), torch.nan)
        accumulator.update(torch.stack([*shift, gains[:, 0], gains[:, 1], other], dim=1))

    @override
    def summarize(self, accumulator: ShiftedMass) -> Mapping[str, Tensor]:
        return {f"mass_shift/{name}": value for name, value in zip(NAMES, accumulator.compute().unbind(), strict=True)}

    def gainers(self, source: str, count: int | None = None) -> list[TokenShift]:
        """The tokens whose probability rose most since the first measurement, largest first.

        Args:
            source: `probe/<name>`.
            count: How many; `num_tokens` if not given.
        """
        return self._shifts(source, count or self.num_tokens, largest=True)

    def losers(self, source: str, count: int | None = None) -> list[TokenShift]:
        """The tokens whose probability fell most, largest loss first; arguments as in `gainers`."""
        return self._shifts(source, count or self.num_tokens, largest=False)

    def _shifts(self, source: str, count: int, *, largest: bool) -> list[TokenShift]:
        pairs = self._accumulators[source].pairs.values() if source in self._accumulators else ()
        if not pairs:
            return []
        change = torch.stack([probability_change(pair.now, pair.anchor) for pair in pairs]).mean(0)
        found = change.topk(min(count, len(change)), largest=largest)
        moved = zip(found.indices.tolist(), found.values.tolist(), strict=True)
        return [TokenShift(token, self._text(token), value) for token, value in moved if (value > 0) == largest and value != 0]

    def _text(self, token: int) -> str:
        return "" if self.tokenizer is None else str(self.tokenizer.decode([token]))

    @override
    def evidence(self, rule: str, source: str) -> str:
        gained = ", ".join(f"{_name(shift)} {shift.change:+.3f}" for shift in self.gainers(source, 3))
        return f"Most gained {gained}." if gained else ""

    @override
    def finish(self, host: Host) -> None:
        super().finish(host)
        for source in self._accumulators:
            if text := self.report(source):
                host.log_text(f"mass_shift/{source}", text)

    def report(self, source: str) -> str:
        """Tables of tokens and of whole responses in Markdown; empty where nothing was measured."""
        gained, lost = self.gainers(source), self.losers(source)
        if not gained and not lost:
            return ""
        lines = ["| token | mean change of its probability |", "|---|---:|"]
        lines += [f"| {_name(shift)} | {shift.change:+.4f} |" for shift in (*gained, *reversed(lost))]
        lines += ["", "| row | response | log-prob before (nats) | now |", "|---:|---|---:|---:|"]
        for row, pair in self._accumulators[source].pairs.items():
            for k, (before, now) in enumerate(zip(pair.anchor_candidates, pair.now_candidates, strict=True)):
                if not torch.isnan(now):
                    name = ("chosen", "rejected")[k] if k < 2 else f"candidate {k - 1}"
                    lines.append(f"| {row} | {name} | {before.item():.3f} | {now.item():.3f} |")
        return "\n".join(lines)

    @override
    def measured_state(self) -> dict[str, Any]:
        pairs = {
            source: {row: list(pair) for row, pair in accumulator.pairs.items()}
            for source, accumulator in self._accumulators.items()
        }
        return {**super().measured_state(), "pairs": pairs}

    @override
    def load_measured_state(self, state: Mapping[str, Any]) -> None:
        super().load_measured_state(state)
        for source, pairs in state["pairs"].items():
            # Distributions are replaced and never changed in place, so that they can be shared with the checkpoint.
            self._accumulators[source].pairs = {row: Distributions(*pair) for row, pair in pairs.items()}


def _name(shift: TokenShift) -> str:
    """A token in words, fit for a cell of a table."""
    text = repr(shift.text).replace("|", "\\|") if shift.text else ""
    return f"{text} (token {shift.token})" if text else f"token {shift.token}"
