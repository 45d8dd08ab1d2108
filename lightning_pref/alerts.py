"""Alerts: when the numbers of a diagnostic are worth a word, and what the word is.

`ALERT_RULES` is the one table of limits. A `Judge` applies it to the numbers a diagnostic logs and says, once per run and
name, what is wrong, since when, on what evidence, and what to change.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from difflib import get_close_matches
from typing import Any, Literal, NamedTuple

Level = Literal["info", "warning", "critical"]


@dataclass(frozen=True, kw_only=True)
class Alert:
    """Something that goes wrong in a run.

    Attributes:
        level: How bad it is.
        name: Name of the rule in `ALERT_RULES`.
        source: Where the numbers come from: `train`, `val`, or a probe.
        since_step: Optimiser step at which the limit was first passed without a break.
        step: Optimiser step at which the alert was raised.
        evidence: The numbers, and rows where there are any.
        advice: What to change.
    """

    level: Level
    name: str
    source: str = "train"
    since_step: int
    step: int
    evidence: str
    advice: str

    def text(self) -> str:
        """The alert in one paragraph."""
        where = "" if self.source == "train" else f" ({self.source})"
        return f"{self.level.upper()} {self.name}{where} since step {self.since_step}: {self.evidence} {self.advice}"

    def as_dict(self) -> dict[str, Any]:  # Any: strings and integers
        """The fields, for `alerts.jsonl`."""
        return asdict(self)


class Limit(NamedTuple):
    """A bound on one logged value; passed when the value is on the far side of it. `nan` passes no limit."""

    key: str
    above: float | None = None
    below: float | None = None

    def passed(self, values: Mapping[str, float]) -> bool:
        """Whether the value is there and beyond the bound."""
        value = values.get(self.key, math.nan)
        return (self.above is not None and value > self.above) or (self.below is not None and value < self.below)

    def text(self, values: Mapping[str, float]) -> str:
        """The value beside its bound."""
        bound = f"above {self.above:g}" if self.above is not None else f"below {self.below:g}"
        return f"{self.key} is {values[self.key]:.4g} ({bound})"


@dataclass(frozen=True, kw_only=True)
class AlertRule:
    """When an alert is raised: all limits passed, in `patience` measurements in a row."""

    level: Level = "warning"
    limits: tuple[Limit, ...]
    patience: int = 1
    advice: str

    def passed(self, values: Mapping[str, float]) -> bool:
        """Whether every limit is passed."""
        return all(limit.passed(values) for limit in self.limits)


ALERT_RULES: dict[str, AlertRule] = {
    # The reward-variance monitor.
    # The likelihood-displacement tracker.
    # The spike-aware reset.
    # The stability-gap evaluator.
}


def alert_rules(prefix: str, thresholds: Mapping[str, float] | None = None) -> dict[str, AlertRule]:
    """The rules of one diagnostic, with limits of the user's own.

    Args:
        prefix: First part of the rules' names.
        thresholds: `{rule: bound}` for rules of one limit, `{"rule/key": bound}` for one of several limits; the side of the
            bound stays. `nan` turns a rule off.
    """
    rules = {name: rule for name, rule in ALERT_RULES.items() if name.split("/")[0] == prefix}
    for name, bound in (thresholds or {}).items():
        rule_name, key = _addressed(name, rules, prefix)
        rules[rule_name] = _with_bound(rules[rule_name], key, bound)
    return rules


def _addressed(name: str, rules: Mapping[str, AlertRule], prefix: str) -> tuple[str, str]:
    """The rule and the key that a name of `thresholds` means."""
    known = {}
    for rule_name, rule in rules.items():
        if len(rule.limits) == 1:
            known[rule_name] = (rule_name, rule.limits[0].key)
        else:
            known |= {f"{rule_name}/{limit.key.split('/')[-1]}": (rule_name, limit.key) for limit in rule.limits}
    if name in known:
        return known[name]
    near = get_close_matches(name, known, n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    raise ValueError(f"Unknown threshold {name!r} of {prefix}.{hint} Known: {', '.join(sorted(known)) or 'none'}.")


def _with_bound(rule: AlertRule, key: str, bound: float) -> AlertRule:
    def bounded(limit: Limit) -> Limit:
        if limit.key != key:
            return limit
        return limit._replace(above=bound) if limit.above is not None else limit._replace(below=bound)

    return replace(rule, limits=tuple(map(bounded, rule.limits)))


class Judge:
    """Applies rules to measurements and remembers since when a limit is passed and what was said already.

    >>> rules = {"x/high": AlertRule(limits=(Limit("x/value", above=1.0),), patience=2, advice="Lower x.")}
    >>> judge = Judge(rules)
    >>> judge.alerts({"x/value": 3.0}, step=10)
    []
    >>> [(alert.name, alert.since_step) for alert in judge.alerts({"x/value": 2.0}, step=20)]
    [('x/high', 10)]
    >>> judge.alerts({"x/value": 2.0}, step=30)
    []
    """

    def __init__(self, rules: Mapping[str, AlertRule]) -> None:
        self.rules = dict(rules)
        self._streaks: dict[str, tuple[int, int]] = {}  # source and name -> first step, measurements
        self._raised: set[str] = set()

    def alerts(
        self,
        values: Mapping[str, float],
        *,
        step: int,
        source: str = "train",
        evidence: Callable[[str], str] | None = None,
    ) -> list[Alert]:
        """What these values give reason to say, and was not said before.

        Args:
            values: Measurements by key, without the source's prefix.
            step: Optimiser step of the measurement.
            source: Where the values come from.
            evidence: Gives, for a rule's name, more than the numbers: which rows, which tokens.
        """
        found = []
        for name, rule in self.rules.items():
            place = f"{source}:{name}"
            if not all(limit.key in values for limit in rule.limits):
                continue  # not measured this time: neither a reason to raise nor one to forget
            if not rule.passed(values):
                self._streaks.pop(place, None)
                continue
            since, count = self._streaks.get(place, (step, 0))
            self._streaks[place] = (since, count + 1)
            if count + 1 < rule.patience or place in self._raised:
                continue
            self._raised.add(place)
            more = f" {evidence(name)}" if evidence is not None else ""
            numbers = ", ".join(limit.text(values) for limit in rule.limits) + "."
            found.append(
                Alert(
                    level=rule.level,
                    name=name,
                    source=source,
                    since_step=since,
                    step=step,
                    evidence=(numbers + more).strip(),
                    advice=rule.advice,
                )
            )
        return found

    def state(self) -> dict[str, Any]:  # Any: plain data for a checkpoint
        """Everything measured so far, as plain data."""
        return {"streaks": {place: list(streak) for place, streak in self._streaks.items()}, "raised": sorted(self._raised)}

    def load(self, state: Mapping[str, Any]) -> None:
        """Take up the state of another judge."""
        self._streaks = {place: (int(since), int(count)) for place, (since, count) in state["streaks"].items()}
        self._raised = set(state["raised"])


def worst_level(alerts: Iterable[Alert]) -> Level | None:
    """The highest level among alerts."""
    order: tuple[Level, ...] = ("info", "warning", "critical")
    levels = [alert.level for alert in alerts]
    return max(levels, key=order.index) if levels else None
