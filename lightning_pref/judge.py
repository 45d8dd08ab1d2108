"""Judges what a diagnostic logs by the rules of `alerts.py`: what is wrong, since when, on what evidence, what to change."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from difflib import get_close_matches
from typing import Any

from lightning_pref.alerts import ALERT_RULES, Alert, AlertRule, Limit


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

    def rearm(self) -> None:
        """Forget what was said and since when: something new begins, about which the same may be said again."""
        self._streaks.clear()
        self._raised.clear()

    def state(self) -> dict[str, Any]:  # Any: plain data for a checkpoint
        """Everything measured so far, as plain data."""
        return {"streaks": {place: list(streak) for place, streak in self._streaks.items()}, "raised": sorted(self._raised)}

    def load(self, state: Mapping[str, Any]) -> None:
        """Take up the state of another judge."""
        self._streaks = {place: (int(since), int(count)) for place, (since, count) in state["streaks"].items()}
        self._raised = set(state["raised"])
