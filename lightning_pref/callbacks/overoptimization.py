"""Whether the reward that is trained on and what it stands for part ways."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from typing_extensions import override

from lightning_pref.callbacks.diagnostic import Key
from lightning_pref.callbacks.monitor import Monitor
from lightning_pref.measures.proxy_history import WINDOW, ProxyHistory
from lightning_pref.observations import Observation, RewardObservation

PREFIX = "overoptimization"

PROXY_GAIN = Key(f"{PREFIX}/proxy_gain", "Change of the mean reward since the first report.", "first std")
GOLD_GAIN = Key(f"{PREFIX}/gold_gain", "Likewise of the gold reward.", "first std of gold")
GOLD_DROP = Key(
    f"{PREFIX}/gold_drop",
    f"Fall of the gold reward from its peak, means over {WINDOW} reports, while the reward is above what it was there.",
    "first std of gold",
)
GOLD_DROP_ERRORS = Key(f"{PREFIX}/gold_drop_errors", "The same in standard errors of the difference.", "standard errors")
UNCERTAINTY_GROWTH = Key(
    f"{PREFIX}/uncertainty_growth", "Mean standard deviation between the members of an ensemble over that of the first report.",
    "ratio",
)  # fmt: skip
LENGTH_GROWTH = Key(f"{PREFIX}/length_growth", "Mean length over that of the first report.", "ratio")
LENGTH_CORRELATION = Key(
    f"{PREFIX}/length_correlation", "Correlation of reward and length among responses to the same prompt.", "[-1, 1]"
)
DISTANCE = Key(f"{PREFIX}/distance", "Square root of the mean KL to the reference.", "sqrt(nats)")


class OveroptimizationMonitor(Monitor[ProxyHistory]):
    """Watches whether a reward goes on rising while what it stands for falls.

    Needs: `RewardObservation`; with `gold` in it the fall itself is seen, with `uncertainty` the disagreement of an ensemble,
    with `lengths` a taste for length, with `kl` the distance at which it happens.
    Logs: `overoptimization/proxy_gain`, and where there is something to tell `/gold_gain`, `/gold_drop`, `/gold_drop_errors`,
    `/uncertainty_growth`, `/length_growth`, `/length_correlation`, `/distance`.
    Changes: nothing.

    Args:
        every_n_updates: Updates between two reports; the trainer's own logging interval if not given.
        silent_after: Raise if nothing was heard within this many training batches, or within the first epoch.
        thresholds: Limits of alerts other than those in `ALERT_RULES`.
    """

    prefix = PREFIX
    consumes = (RewardObservation,)
    keys = (
        PROXY_GAIN, GOLD_GAIN, GOLD_DROP, GOLD_DROP_ERRORS, UNCERTAINTY_GROWTH, LENGTH_GROWTH, LENGTH_CORRELATION, DISTANCE,
    )  # fmt: skip

    @override
    def new_accumulator(self) -> ProxyHistory:
        return ProxyHistory()

    @override
    def update(self, accumulator: ProxyHistory, observation: Observation) -> None:
        assert isinstance(observation, RewardObservation)
        accumulator.update(
            observation.rewards,
            observation.prompt_ids,
            observation.lengths,
            observation.gold,
            observation.uncertainty,
            observation.kl,
        )

    @override
    def summarize(self, accumulator: ProxyHistory) -> Mapping[str, Tensor]:
        report = accumulator.compute()
        accumulator.remember(report, update=self.updates)
        values = {key.name: report[key.name.removeprefix(f"{PREFIX}/")] for key in self.keys}
        # Reports are made where values leave the device anyway; one more copy tells which of these do.
        tells = (~torch.stack(list(values.values())).isnan()).tolist()
        return {name: value for (name, value), tell in zip(values.items(), tells, strict=True) if tell}

    @override
    def evidence(self, rule: str, source: str) -> str:
        peak = self._accumulators[source].highest()
        if rule != f"{PREFIX}/gold_falls" or peak is None:
            return ""
        now = self._accumulators[source].recent.nanmean(0).tolist()
        spent = "" if peak.distance != peak.distance else f", at sqrt(KL) {peak.distance:.2f} (now {max(now[3], 0.0) ** 0.5:.2f})"
        return (
            f"The gold reward was highest, {peak.gold:.3g}, by update {peak.update}{spent}, and is {now[1]:.3g}; the reward that "
            f"is trained on went from {peak.proxy:.3g} to {now[0]:.3g} meanwhile."
        )
