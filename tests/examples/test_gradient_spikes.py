from __future__ import annotations

import runpy
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.slow

EXAMPLE = Path(__file__).parents[2] / "examples" / "gradient_spikes.py"


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    main: Callable[[Sequence[str]], dict[str, Any]] = runpy.run_path(str(EXAMPLE))["main"]
    plot = tmp_path_factory.mktemp("plots") / "spikes.png"
    found = main(["--out", str(plot)])
    assert plot.stat().st_size > 10_000
    return found


def test_spikes_hurt_adamw_and_the_callback_keeps_the_harm_away(report: dict[str, Any]) -> None:
    above = {arm: row["above_calm"] for arm, row in report.items()}
    assert above["spikes"] > 0.1
    assert abs(above["evidence"]) < 0.03
    assert abs(above["spam_keep"]) < 0.05
    assert above["spam_restart"] < above["spikes"] / 2


def test_after_a_spike_every_remedy_is_closer_to_the_calm_run(report: dict[str, Any]) -> None:
    excess = {arm: row["excess_after_spikes"] for arm, row in report.items()}
    assert excess["calm"] == 0
    assert excess["evidence"] < excess["spam_restart"] < excess["spikes"]
    assert excess["norm_clip"] < excess["spikes"] / 4, "the usual remedy is a remedy here, and says so"


def test_every_spike_is_seen_and_nothing_else(report: dict[str, Any]) -> None:
    assert [tuple(event) for event in report["evidence"]["events"]] == [(update, "skip") for update in range(75, 550, 75)]
