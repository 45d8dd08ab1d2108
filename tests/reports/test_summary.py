from __future__ import annotations

import io
import json
from pathlib import Path

from rich.console import Console

from lightning_pref.alerts import Alert
from lightning_pref.callbacks.gold_reward import Sample
from lightning_pref.callbacks.hosts import record_alert
from lightning_pref.reports.summary import (
    FirstLast,
    RunRecord,
    print_alerts,
    print_samples,
    print_summary,
    read_alerts,
    write_summary,
)


def test_a_record_keeps_the_first_and_the_last_value_of_every_metric() -> None:
    record = RunRecord()
    record.log_metrics({"loss": 3.0, "epoch": 0}, step=1)
    record.log_metrics({"loss": 2.0, "reward": 1.0}, step=2)
    record.log_metrics({"loss": 1.0}, step=3)
    assert record.metrics == {"loss": (3.0, 1.0), "reward": (1.0, 1.0)}


def test_the_summary_is_json_with_null_where_a_metric_is_undefined(tmp_path: Path) -> None:
    path = tmp_path / "summary.json"
    write_summary(
        path,
        recipe="dpo",
        steps=7,
        seconds=1.23456,
        metrics={"b": FirstLast(float("nan"), 1.0), "a": FirstLast(0.0, 2.0)},
        alerts=0,
        digests={"data": "abc"},
    )
    summary = json.loads(path.read_text())
    assert {key: summary[key] for key in ("recipe", "steps", "seconds", "alerts", "digests")} == {
        "recipe": "dpo",
        "steps": 7,
        "seconds": 1.235,
        "alerts": 0,
        "digests": {"data": "abc"},
    }
    assert list(summary["metrics"]) == ["a", "b"]
    assert summary["metrics"]["b"] == {"first": None, "last": 1.0}
    assert {"python", "torch", "lightning", "transformers"} <= set(summary["versions"])


def test_the_closing_table_shows_first_last_and_change_of_the_headline_that_was_logged() -> None:
    out = io.StringIO()
    print_summary(
        title="dpo: 7 updates",
        metrics={"gold_reward": FirstLast(0.25, 0.75), "loss": FirstLast(1.0, 0.5)},
        headline=["gold_reward", "never_logged"],
        places={"model": Path("runs/dpo/x/export")},
        console=Console(file=out, width=100),
    )
    text = out.getvalue()
    assert "gold_reward" in text
    assert "0.25" in text
    assert "+0.5" in text
    assert "runs/dpo/x/export" in text
    assert "never_logged" not in text
    assert "loss" not in text


def test_the_shown_answers_are_those_whose_reward_changed_by_the_median_amount() -> None:
    first = [Sample(f"prompt {i}", f"before {i}", 0.0) for i in range(3)]
    last = [Sample(f"prompt {i}", f"after {i} [x]", reward) for i, reward in enumerate([1.0, 0.5, -1.0])]
    out = io.StringIO()
    print_samples(first, last, console=Console(file=out, width=100))
    assert [line.split() for line in out.getvalue().splitlines()] == [
        ["prompt", "prompt", "1"],
        ["answer", "before", "(0.00)", "before", "1"],
        ["answer", "after", "(0.50)", "after", "1", "[x]"],
    ]


def test_a_resumed_run_with_nothing_left_to_do_says_so_instead_of_an_empty_table() -> None:
    out = io.StringIO()
    console = Console(file=out, width=100)
    print_samples([], [], console=console)
    print_summary(title="dpo: 4 updates", metrics={}, headline=["loss"], places={"config": "c.yaml"}, console=console)
    assert out.getvalue() == "dpo: 4 updates, nothing new was measured\n  config  c.yaml\n"


def test_alerts_are_read_back_and_named_once_more_at_the_end(tmp_path: Path) -> None:
    alert = Alert(
        level="warning", name="x/high", source="val", since_step=20, step=30, evidence="x is 3 (above 1).", advice="Lower x."
    )
    record_alert(alert, tmp_path)
    record_alert(alert, tmp_path)
    assert read_alerts(tmp_path / "alerts.jsonl") == [alert, alert]
    assert read_alerts(tmp_path / "missing.jsonl") == []
    page = io.StringIO()
    print_alerts([alert], console=Console(file=page, width=200))
    assert page.getvalue() == "  warning x/high (val) since step 20\n"
