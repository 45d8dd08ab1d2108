"""The ledger of tasks: which of them are old when, and what follows for the measures over all of them."""

from __future__ import annotations

import math

import pytest
import torch

from lightning_pref.measures.forgetting import (
    ProbeScores,
    bootstrap_deviations,
    noise_floor,
    stability_gap,
    standard_error,
    windowed_forgetting,
    windowed_plasticity,
)
from lightning_pref.measures.task_traces import Kind, Switch, TaskTraces


def scores(value: float, spread: float = 0.0) -> ProbeScores:
    """Four examples around a mean."""
    return ProbeScores(value + spread * torch.tensor([-1.0, 1.0, -1.0, 1.0], dtype=torch.float64))


def filled(traces: TaskTraces, **values: list[float]) -> TaskTraces:
    """Values at the steps after the last one."""
    first = traces.last_step() + 1
    for step in range(len(next(iter(values.values())))):
        for name, series in values.items():
            traces.append(name, first + step, scores(series[step]))
    return traces


def begun(kind: Kind = "accuracy", learning: str | None = "a", tolerance: float | None = 0.01) -> TaskTraces:
    traces = TaskTraces(["a", "b"], kind, learning=learning, tolerance=tolerance)
    traces.begin(0)
    return traces


def test_a_task_is_old_once_it_is_left_and_no_more_when_it_comes_back() -> None:
    traces = filled(begun(), a=[0.2, 0.9], b=[0.5, 0.1])
    assert traces.over_tasks() == {
        "wc_acc": 0.9, "wf_10": 0.0, "wf_100": 0.0, "wp_10": pytest.approx(0.7), "wp_100": pytest.approx(0.7),
    }  # fmt: skip
    assert traces.gaps() == {}, "nothing is old yet, and what is still unseen cannot be lost"
    assert traces.switch("b", 1)
    filled(traces, a=[0.4, 0.8], b=[0.5, 0.6])
    assert traces.old_accuracies() == {"a": [0.9, 0.4, 0.8]}
    found = traces.over_tasks()
    assert found["min_acc"] == pytest.approx(0.4)
    assert found["wc_acc"] == pytest.approx((0.6 + 0.4) / 2)
    assert found["forgetting"] == pytest.approx(0.1)
    # Task b counts from the switch at step 1 on; that it had .5 before, and lost it, was before.
    assert found["wf_10"] == pytest.approx((windowed_forgetting([0.2, 0.9, 0.4, 0.8], 10) + 0) / 2)
    assert found["wp_10"] == pytest.approx((0.7 + windowed_plasticity([0.1, 0.5, 0.6], 10)) / 2)
    assert set(traces.gaps()) == {"a"}
    assert traces.switch("a", 3)
    filled(traces, a=[0.9], b=[0.3])
    assert traces.old_accuracies() == {"b": [0.6, 0.3]}
    assert set(traces.gaps()) == {"b"}
    assert set(traces.gaps(1)) == {"a"}, "an earlier dip is still known"
    assert traces.gaps(1)["a"].depth == pytest.approx((0.2 + 0.9) / 2 - 0.4)


def test_a_gap_ends_where_the_next_switch_begins() -> None:
    traces = filled(begun(learning=None), a=[0.9, 0.5, 0.9], b=[0.9] * 3)
    traces.switch("other", 2)
    filled(traces, a=[0.1], b=[0.9])
    assert traces.gaps(0)["a"].depth == pytest.approx(0.4)
    assert traces.gaps()["a"].depth == pytest.approx((0.9 + 0.5 + 0.9) / 3 - 0.1)
    assert traces.switches == [Switch(0, None), Switch(2, "other")]


def test_without_a_first_task_all_are_old_from_the_start() -> None:
    traces = filled(begun(learning=None), a=[0.9, 0.7], b=[0.8, 0.6])
    found = traces.over_tasks()
    assert found["min_acc"] == pytest.approx(0.65)
    assert "wc_acc" not in found, "what is learned is not watched"
    assert set(traces.gaps()) == {"a", "b"}


def test_going_on_with_the_same_task_is_no_switch() -> None:
    traces = begun()
    assert not traces.switch("a", 5)
    assert traces.switches == [Switch(0, "a")]


def test_the_gap_of_losses_is_that_of_the_measure_with_twice_the_standard_error() -> None:
    traces = begun("loss", learning=None, tolerance=None)
    losses = [2.0, 2.9, 3.0, 2.4, 2.1, 2.0, 2.0]
    for step, loss in enumerate(losses):
        for name in "ab":
            traces.append(name, step, scores(loss, spread=0.3))
    deviations = bootstrap_deviations(scores(2.0, 0.3).values)
    tolerance = 2 * standard_error(deviations)
    assert 0.2 < tolerance < 0.4
    assert traces.gaps()["a"] == stability_gap(range(7), losses, 0, tolerance)
    assert traces.noise_floor("a") == noise_floor(deviations, 6)


def test_a_probe_without_noise_is_allowed_one_per_cent_and_one_example() -> None:
    traces = filled(begun(learning=None, tolerance=None), a=[1.0, 0.995, 0.98], b=[1.0] * 3)
    assert traces.gaps()["a"].onset == 2
    assert traces.noise_floor("a") == 0.25, "one of four examples"
    losses = filled(begun("loss", learning=None), a=[1.0, 1.1], b=[1.0, 1.0])
    assert losses.noise_floor("a") == 0.0


def test_the_accuracy_of_a_loss_is_the_likelihood_of_a_token() -> None:
    traces = begun("loss")
    assert [traces.accuracy(loss) for loss in (0.0, 1.0, -3.0, math.inf, math.nan)] == [1.0, math.exp(-1), 1.0, 0.0, 0.0]
    assert begun().accuracy(0.3) == 0.3


def test_weights_make_the_mean_and_examples_without_weight_are_not_there() -> None:
    traces = begun()
    traces.append("a", 0, ProbeScores(torch.tensor([1.0, 0.0, math.nan]), torch.tensor([1.0, 3.0, 0.0])))
    assert traces.traces["a"].values == [0.25]


def test_a_second_evaluation_of_the_same_weights_counts_once() -> None:
    traces = filled(begun(), a=[0.5], b=[0.5])
    traces.append("a", 0, scores(0.5))
    assert traces.traces["a"].steps == [0]


def test_what_is_broken_before_a_switch_has_no_gap() -> None:
    traces = filled(begun("loss", learning=None), a=[math.inf, 1.0], b=[1.0, 2.0])
    assert set(traces.gaps()) == {"b"}


def test_before_anything_is_measured_nothing_is_said() -> None:
    assert TaskTraces(["a"], "loss").gaps() == {}
    traces = TaskTraces(["a"], "loss")
    traces.begin(0)
    assert traces.gaps() == {}
    assert traces.over_tasks() == {}


def test_state_survives_a_round_trip_and_goes_on_as_if_nothing_had_been() -> None:
    first = filled(begun(), a=[0.2, 0.9], b=[0.1, 0.1])
    first.switch("b", 1)
    first.append("a", 1, scores(0.9, spread=0.05))
    filled(first, a=[0.4], b=[0.5])
    other = TaskTraces(["b", "a"], "accuracy", learning="a", tolerance=0.01)
    other.load(first.state())
    for traces in (first, other):
        filled(traces, a=[0.8], b=[0.6])
    assert other.over_tasks() == first.over_tasks()
    assert other.gaps() == first.gaps()
    assert other.noise_floor("a") == first.noise_floor("a")
    assert str(other.state()["switches"]) == str(first.state()["switches"])


def test_traces_of_other_tasks_are_refused() -> None:
    with pytest.raises(ValueError, match="holds traces of the tasks a, b, but those that are watched are a, c; .*same `tasks`"):
        TaskTraces(["a", "c"], "loss").load(begun().state())
