"""The traces of several tasks over one run, with the switches between them: what the measures of forgetting are read off."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from lightning_pref.measures.forgetting import (
    ProbeScores,
    StabilityGap,
    WindowedSwings,
    average_forgetting,
    bootstrap_deviations,
    minimum_accuracy,
    noise_floor,
    stability_gap,
    standard_error,
    worst_case_accuracy,
)

Kind = Literal["loss", "accuracy"]

# Evaluations of a window of windowed forgetting and plasticity, as in De Lange et al.
WINDOWS = (10, 100)
# Evaluations that make a baseline, and that a recovery has to last.
GAP_WINDOW = 3


class Switch(NamedTuple):
    """Training moves on."""

    step: int  # update after which it does
    task: str | None  # what is learned from there on; None: something that is not watched


class Trace(NamedTuple):
    """The mean of one task's probe over training."""

    steps: list[int]  # updates before each evaluation
    values: list[float]  # mean loss in nats, or accuracy


class TaskTraces:
    """Traces of tasks and the switches between them.

    A task counts from when it is first seen, and is old from when it is left. For losses, accuracy means exp(-loss), which lies
    in (0, 1] as an accuracy does.

    Args:
        tasks: Names of the tasks.
        kind: Whether values are losses (down is better) or accuracies in [0, 1].
        learning: The task that is learned first, if it is one of them. If not given, all are old from the start, as they are
            for a pretrained model.
        tolerance: Fall, in the unit of the values, that is no dip yet; twice the standard error of the probe if not given, or
            1 % where that is 0.
    """

    def __init__(self, tasks: Iterable[str], kind: Kind, *, learning: str | None = None, tolerance: float | None = None) -> None:
        self.kind = kind
        self.learning = learning
        self.tolerance = tolerance
        self.traces = {name: Trace([], []) for name in tasks}
        self.switches: list[Switch] = []
        self._old_since: dict[str, int] = {}
        self._seen_since: dict[str, int] = {}
        self._swings: dict[str, dict[int, WindowedSwings]] = {}
        self._examples: dict[str, tuple[Tensor, Tensor]] = {}  # values and weights of each task at the last switch
        self._deviations: dict[str, Tensor] = {}  # bootstrap of those

    # Events.

    def begin(self, step: int) -> None:
        """The first stretch of training; what it starts from are the first baselines."""
        self.switches = [Switch(step, self.learning)]
        self._old_since = {} if self.learning is not None else dict.fromkeys(self.traces, step)
        self._seen_since = dict.fromkeys(self.traces if self.learning is None else [self.learning], step)

    def switch(self, task: str, step: int) -> bool:
        """Training moves on to a task; whether it was on another one before."""
        left = self.current
        if task == left:
            return False
        if left in self.traces:
            self._old_since[left] = step
        self._old_since.pop(task, None)
        if task in self.traces and task not in self._seen_since:
            self._seen_since[task] = step
            if self.last_step(task) == step:
                self._follow(task, self.traces[task].values[-1])
        self.switches.append(Switch(step, task))
        return True

    def append(self, task: str, step: int, scores: ProbeScores) -> None:
        """Add an evaluation; a second one at the same step is the same, since the weights are."""
        values, weights = scores.values, torch.ones_like(scores.values) if scores.weights is None else scores.weights
        if step == self.switches[-1].step:
            self._examples[task] = (values, weights)
            self._deviations.pop(task, None)
        if self.last_step(task) < step:
            # An example without weight is not there, whatever its value.
            self._add(task, step, float(torch.where(weights > 0, values * weights, 0.0).sum() / weights.sum()))

    def _add(self, task: str, step: int, value: float) -> None:
        self.traces[task].steps.append(step)
        self.traces[task].values.append(value)
        if step >= self._seen_since.get(task, math.inf):
            self._follow(task, value)

    def _follow(self, task: str, value: float) -> None:
        swings = self._swings.setdefault(task, {window: WindowedSwings(window) for window in WINDOWS})
        for swing in swings.values():
            swing.update(self.accuracy(value))

    # What they say.

    @property
    def current(self) -> str | None:
        """The task that is being learned, if it is known."""
        return self.switches[-1].task

    def last_step(self, task: str | None = None) -> int:
        """Step of the last evaluation; -1 before the first."""
        steps = self.traces[next(iter(self.traces)) if task is None else task].steps
        return steps[-1] if steps else -1

    def accuracy(self, value: float) -> float:
        """A value as an accuracy in [0, 1]; of a loss, which may be no number, exp(-loss)."""
        if self.kind == "accuracy":
            return value
        return 0.0 if math.isnan(value) else math.exp(-max(0.0, value))

    def gaps(self, switch: int = -1) -> dict[str, StabilityGap]:
        """The dip of every task that was old after a switch, up to the next switch; empty before an evaluation follows it.

        Depths, areas and changes are falls: rises of a loss, or falls of an accuracy.

        Args:
            switch: Which of `switches`; the last one if not given. 0 is the start of training.
        """
        if not self.switches:
            return {}
        begun = self.switches[switch]
        end = min((other.step for other in self.switches if other.step > begun.step), default=math.inf)
        found = {}
        for name, trace in self.traces.items():
            if name == begun.task or self._seen_since.get(name, math.inf) > begun.step:
                continue
            pairs = [(s, -v if self.kind == "accuracy" else v) for s, v in zip(*trace, strict=True) if s <= end]
            before = [value for step, value in pairs if step <= begun.step][-GAP_WINDOW:]
            if before and pairs[-1][0] > begun.step and all(map(math.isfinite, before)):
                steps, losses = zip(*pairs, strict=True)
                found[name] = stability_gap(steps, losses, begun.step, self._tolerance(name), GAP_WINDOW)
        return found

    def _noise(self, task: str) -> Tensor:
        if task not in self._deviations:
            values, weights = self._examples[task]
            self._deviations[task] = bootstrap_deviations(-values if self.kind == "accuracy" else values, weights)
        return self._deviations[task]

    def _tolerance(self, task: str) -> float | None:
        if self.tolerance is not None or task not in self._examples:
            return self.tolerance
        error = standard_error(self._noise(task))
        return 2 * error if error > 0 else None

    def noise_floor(self, task: str) -> float:
        """Depth of a dip that the choice of the task's examples alone would show since the last switch.

        Where all examples are right no bootstrap finds any noise, so that for accuracies it is at least that of one example.
        A single example says nothing about noise: `nan`.
        """
        if int((self._examples[task][1] > 0).sum()) < 2:
            return math.nan
        evaluations = sum(step > self.switches[-1].step for step in self.traces[task].steps)
        floor = noise_floor(self._noise(task), max(1, evaluations))
        weights = self._examples[task][1]
        return max(floor, float(weights.max() / weights.sum())) if self.kind == "accuracy" else floor

    def old_accuracies(self) -> dict[str, list[float]]:
        """Of every old task, its accuracies since it was left."""
        return {
            name: [self.accuracy(value) for step, value in zip(*self.traces[name], strict=True) if step >= since]
            for name, since in self._old_since.items()
        }

    def over_tasks(self) -> dict[str, float]:
        """The measures of De Lange et al. as of the last evaluation, those that are defined."""
        old = {name: trace for name, trace in self.old_accuracies().items() if trace}
        found: dict[str, float] = {}
        if old:
            found["min_acc"] = minimum_accuracy(old)
            found["forgetting"] = average_forgetting(old)
        if self.current in self.traces:
            found["wc_acc"] = worst_case_accuracy(self.accuracy(self.traces[self.current].values[-1]), old)
        for window in WINDOWS if self._swings else ():
            swings = [of_task[window] for of_task in self._swings.values()]
            found[f"wf_{window}"] = sum(swing.forgetting for swing in swings) / len(swings)
            found[f"wp_{window}"] = sum(swing.plasticity for swing in swings) / len(swings)
        return found

    # State.

    def state(self) -> dict[str, Any]:  # Any: plain data for a checkpoint
        """Everything measured, as plain data and CPU tensors."""
        return {
            "traces": {name: {"steps": list(trace.steps), "values": list(trace.values)} for name, trace in self.traces.items()},
            "switches": [list(switch) for switch in self.switches],
            "old_since": dict(self._old_since),
            "seen_since": dict(self._seen_since),
            "examples": {name: [values.clone(), weights.clone()] for name, (values, weights) in self._examples.items()},
        }

    def load(self, state: Mapping[str, Any]) -> None:
        """Take up what `state` gave for the same tasks."""
        if set(state["traces"]) != set(self.traces):
            raise ValueError(
                f"The checkpoint holds traces of the tasks {', '.join(sorted(state['traces']))}, but those that are watched are "
                f"{', '.join(sorted(self.traces))}; a trace cannot be continued on another set. Resume with the same `tasks`."
            )
        self.switches = [Switch(int(step), task) for step, task in state["switches"]]
        self._old_since, self._seen_since = dict(state["old_since"]), dict(state["seen_since"])
        self._swings = {}
        for name in self.traces:
            self.traces[name] = Trace([], [])
            for step, value in zip(*state["traces"][name].values(), strict=True):
                self._add(name, step, value)
        self._examples = {name: (values.clone(), weights.clone()) for name, (values, weights) in state["examples"].items()}
        self._deviations = {}
