from __future__ import annotations

import json
import math

import pytest

from lightning_pref.alerts import ALERT_RULES, Alert, AlertRule, Limit
from lightning_pref.judge import Judge, alert_rules

HIGH = AlertRule(limits=(Limit("x/value", above=1.0),), patience=3, advice="Lower x.")
BOTH = AlertRule(level="critical", limits=(Limit("x/up", above=1.0), Limit("x/down", below=-1.0)), advice="Look.")


def raised(judge: Judge, values: list[float]) -> list[tuple[int, int]]:
    """(step of the alert, since) over a series, one value per ten steps."""
    found = []
    for i, value in enumerate(values):
        found += [(a.step, a.since_step) for a in judge.alerts({"x/value": value}, step=10 * i)]
    return found


def test_an_alert_waits_for_its_patience_and_says_since_when() -> None:
    assert raised(Judge({"x/high": HIGH}), [0, 2, 2, 2, 2]) == [(30, 10)]


def test_a_healthy_value_in_between_begins_the_count_anew() -> None:
    assert raised(Judge({"x/high": HIGH}), [2, 2, 0, 2, 2, 0]) == []


def test_what_was_said_once_is_not_said_again_but_another_source_has_its_own_say() -> None:
    judge = Judge({"x/high": HIGH})
    assert len(raised(judge, [2] * 10 + [0] + [2] * 10)) == 1
    others = [judge.alerts({"x/value": 5.0}, step=i, source="val") for i in range(3)]
    assert [len(alerts) for alerts in others] == [0, 0, 1]
    assert others[2][0].source == "val"


def test_all_limits_must_be_passed_and_a_missing_or_undefined_value_passes_none() -> None:
    judge = Judge({"x/both": BOTH})
    assert not judge.alerts({"x/up": 2.0, "x/down": 0.0}, step=0)
    assert not judge.alerts({"x/up": 2.0}, step=1)
    assert not judge.alerts({"x/up": 2.0, "x/down": math.nan}, step=2)
    (alert,) = judge.alerts({"x/up": 2.0, "x/down": -3.0}, step=3)
    assert alert.evidence == "x/up is 2 (above 1), x/down is -3 (below -1)."


def test_a_value_that_is_not_measured_does_not_break_a_streak() -> None:
    judge = Judge({"x/high": HIGH})
    found = [judge.alerts(values, step=i) for i, values in enumerate([{"x/value": 2.0}, {"x/value": 2.0}, {}, {"x/value": 2.0}])]
    assert [len(alerts) for alerts in found] == [0, 0, 0, 1]
    assert found[3][0].since_step == 0


def test_a_judge_goes_on_where_another_stopped() -> None:
    one, whole = Judge({"x/high": HIGH}), Judge({"x/high": HIGH})
    first, second = [0.0, 2.0, 2.0], [2.0, 2.0]
    for i, value in enumerate(first):
        one.alerts({"x/value": value}, step=i)
        whole.alerts({"x/value": value}, step=i)
    other = Judge({"x/high": HIGH})
    other.load(json.loads(json.dumps(one.state())))
    for i, value in enumerate(second, start=3):
        assert other.alerts({"x/value": value}, step=i) == whole.alerts({"x/value": value}, step=i)
    assert other.state() == whole.state()


def test_text_has_level_name_since_evidence_and_advice() -> None:
    (alert,) = Judge({"x/both": BOTH}).alerts({"x/up": 2.0, "x/down": -3.0}, step=7, evidence=lambda rule: f"Rows of {rule}.")
    assert alert.text() == ("CRITICAL x/both since step 7: x/up is 2 (above 1), x/down is -3 (below -1). Rows of x/both. Look.")
    assert Alert(**json.loads(json.dumps(alert.as_dict()))) == alert


def test_limits_can_be_set_and_turned_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ALERT_RULES, "x/high", HIGH)
    monkeypatch.setitem(ALERT_RULES, "x/both", BOTH)
    assert alert_rules("x", {"x/high": 5.0})["x/high"].limits == (Limit("x/value", above=5.0),)
    assert alert_rules("x", {"x/both/down": -2.0})["x/both"].limits == (BOTH.limits[0], Limit("x/down", below=-2.0))
    off = Judge(alert_rules("x", {"x/high": math.nan}))
    assert not any(off.alerts({"x/value": 1e9}, step=i) for i in range(9))
    assert ALERT_RULES["x/high"] is HIGH


def test_an_unknown_threshold_is_named_with_the_nearest_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ALERT_RULES, "x/high", HIGH)
    with pytest.raises(ValueError, match=r"Unknown threshold 'x/hihg' of x. Did you mean 'x/high'\? Known: x/high"):
        alert_rules("x", {"x/hihg": 1.0})


def test_every_rule_of_the_table_is_complete() -> None:
    for name, rule in ALERT_RULES.items():
        assert name.count("/") == 1, name
        assert rule.limits, name
        assert all((limit.above is None) != (limit.below is None) for limit in rule.limits), name
        assert rule.patience >= 1, name
        assert rule.advice.endswith("."), name


def test_a_judge_that_is_armed_anew_says_the_same_again() -> None:
    judge = Judge({"x/both": BOTH})
    values = {"x/up": 2.0, "x/down": -3.0}
    assert len(judge.alerts(values, step=0)) == 1
    assert judge.alerts(values, step=1) == []
    judge.rearm()
    (alert,) = judge.alerts(values, step=2)
    assert alert.since_step == 2


@pytest.mark.parametrize("name", sorted(ALERT_RULES))
def test_every_rule_is_raised_beyond_its_limits_and_by_nothing_short_of_them(name: str) -> None:
    """The table and the judge; what makes a monitor log such values is planted in the monitor's own tests."""
    rule = ALERT_RULES[name]
    ill, edge = {}, {}
    for limit in rule.limits:
        bound = limit.above if limit.above is not None else limit.below
        assert bound is not None
        edge[limit.key] = bound  # at the bound is not beyond it
        ill[limit.key] = bound + (1.0 if limit.above is not None else -1.0)
    judge = Judge({name: rule})
    raised_at = [step for step in range(rule.patience + 3) if judge.alerts(ill, step=step)]
    assert raised_at == [rule.patience - 1]
    for limit in rule.limits:  # one limit that holds is enough to stay silent
        judge = Judge({name: rule})
        assert not any(judge.alerts({**ill, limit.key: edge[limit.key]}, step=step) for step in range(rule.patience + 3))
