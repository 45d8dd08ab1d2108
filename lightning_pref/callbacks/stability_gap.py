"""What happens to old tasks in the updates after training moves on to a new one."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import lightning as L
from torch.optim import Optimizer
from typing_extensions import override

from lightning_pref.callbacks.diagnostic import Diagnostic, Key
from lightning_pref.callbacks.fixed_sets import FixedSets, ScoreExamples
from lightning_pref.callbacks.hosts import Host
from lightning_pref.callbacks.probe import Budget
from lightning_pref.judge import Judge
from lightning_pref.measures.forgetting import ProbeScores, StabilityGap
from lightning_pref.measures.task_traces import Kind, Switch, TaskTraces
from lightning_pref.observations import Observation, Observer, TaskSwitch

EXPENSIVE = "stability_gap/expensive"


class StabilityGapEvaluator(Diagnostic, Observer):
    """Watches fixed sets of old tasks after every update that follows a switch of tasks, and ever more rarely after that.

    Needs: batches of each task, and `score(module, batch)` that gives the loss or correctness of every example. A switch is told
    by `observe(self, TaskSwitch(task="new"))`; the start of training is one too, so that fine-tuning needs to say nothing.
    Logs: `stability_gap/<task>/loss` (or `accuracy`) at each evaluation; its `depth`, `area`, `worst_step`, `recovery_step` and
    `noise_floor`, and over all tasks `min_acc`, `wc_acc`, `forgetting`, `wf_10`, `wf_100`, `wp_10`, `wp_100`, `relative_depth`,
    `lasting_depth` and `time_share`, with dense evaluations at once, else at the trainer's logging cadence.
    Changes: nothing; tasks are scored in eval mode, without gradients, with all random states restored.

    De Lange et al., Continual evaluation for lifelong learning (2023, arXiv 2205.13452), evaluate after every update; here the
    period grows after `dense_updates`, so that minima are upper bounds from there on. For losses, accuracy means exp(-loss).

    With several ranks each scores its share of the batches; every rank makes as many forward passes, and all of them must
    observe a switch.

    Args:
        tasks: The fixed set of each task, by name. Read once; never shuffled.
        score: Gives `ProbeScores` of a batch, or a tensor of values of equal weight.
        kind: Whether values are losses (nats per token, down is better) or accuracies in [0, 1].
        learning: The task that training starts with, if it is one of `tasks`. A task then counts as old once it has been left.
            If not given, all of them are old from the start, as they are for a pretrained model.
        every_n_updates: Updates between two evaluations after the start and after each switch.
        dense_updates: For how many updates that period holds.
        growth: Factor between the updates since the switch of two evaluations after that, at least 1; with 1 the period stays.
        recovery_within: Updates after which a dip that has not ended is called lasting.
        budget: Share of the training time that evaluations may take after the dense part, which is always evaluated; `None` for
            no limit, and no dependence on a clock.
        tolerance: Fall, in the unit of the values, that is no dip yet; twice the standard error of the probe if not given, or
            1 % where that is 0.
        thresholds: Limits of alerts other than the defaults.
    """

    prefix = "stability_gap"
    consumes = (TaskSwitch,)
    keys = (
        Key("stability_gap/<task>/loss", "Mean loss on the task's fixed set.", "nats per token"),
        Key("stability_gap/<task>/accuracy", "Share of the task's fixed set that is right."),
        Key("stability_gap/<task>/depth", "Largest fall below the baseline since the last switch.", "of loss or accuracy"),
        Key("stability_gap/<task>/noise_floor", "Fall that the choice of examples alone would show.", "of loss or accuracy"),
        Key("stability_gap/<task>/area", "Sum of the fall beyond the tolerance over updates.", "of loss or accuracy, x updates"),
        Key("stability_gap/<task>/worst_step", "Update with the largest fall.", "updates"),
        Key("stability_gap/<task>/recovery_step", "Update at which the baseline was reached again; absent before.", "updates"),
        Key("stability_gap/min_acc", "Mean over old tasks of the lowest accuracy since each was left (min-ACC)."),
        Key("stability_gap/wc_acc", "Accuracy of the current task and minima of the old ones, averaged (WC-ACC)."),
        Key("stability_gap/forgetting", "Mean over old tasks of the accuracy lost since each was left."),
        Key("stability_gap/wf_<n>", "Mean over tasks of the largest fall of accuracy within n evaluations."),
        Key("stability_gap/wp_<n>", "Mean over tasks of the largest rise of accuracy within n evaluations."),
        Key("stability_gap/relative_depth", "Depth of the deepest dip over the noise floor of its task.", "noise floors"),
        Key("stability_gap/lasting_depth", "The same over the dips that have not ended in time; 0 without any.", "noise floors"),
        Key("stability_gap/time_share", "Seconds of evaluation per second of training."),
        Key("stability_gap/skipped", "Evaluations left out so far because of the time budget; absent without any."),
    )

    def __init__(
        self,
        tasks: Mapping[str, Iterable[Any]],
        score: ScoreExamples,
        *,
        kind: Kind = "loss",
        learning: str | None = None,
        every_n_updates: int = 1,
        dense_updates: int = 50,
        growth: float = 1.1,
        recovery_within: int = 200,
        budget: float | None = 0.03,
        tolerance: float | None = None,
        thresholds: Mapping[str, float] | None = None,
    ) -> None:
        super().__init__(thresholds=thresholds)
        self.sets = FixedSets(tasks, score, kind)
        self.every_n_updates = every_n_updates
        self.dense_updates = dense_updates
        self.growth = growth
        self.recovery_within = recovery_within
        self._tasks = TaskTraces(self.sets.batches, kind, learning=learning, tolerance=tolerance)
        self.budget = Budget(budget)
        self._check()
        # What a clock says belongs to this process, not to the run: it is no part of the state.
        self._clock_judge = Judge({EXPENSIVE: self._judge.rules.pop(EXPENSIVE)})
        self._dense = Budget(None)  # the clock of what the budget does not bound
        self._latest: dict[str, ProbeScores] = {}  # of the last evaluation
        self._next = 0
        self._reported = 0
        self._wants_baseline = False
        self._waiting: list[str] = []  # switches that were told before the start
        self._running: Host | None = None

    def _check(self) -> None:
        learning, tolerance = self._tasks.learning, self._tasks.tolerance
        if learning is not None and learning not in self.sets.batches:
            raise ValueError(
                f"`learning` is one of the tasks that are watched ({', '.join(self.sets.batches)}), got {learning!r}; leave it "
                "out if training starts with another one."
            )
        for option in ("every_n_updates", "recovery_within"):
            if getattr(self, option) < 1:
                raise ValueError(f"`{option}` must be at least 1, got {getattr(self, option)!r}.")
        if self.dense_updates < 0:
            raise ValueError(f"`dense_updates` must be at least 0, got {self.dense_updates!r}.")
        if self.growth < 1:
            raise ValueError(f"`growth` must be at least 1, got {self.growth!r}.")
        if tolerance is not None and not tolerance >= 0:
            raise ValueError(f"`tolerance` must be at least 0, got {tolerance!r}.")

    @property
    def kind(self) -> Kind:
        """Whether values are losses or accuracies."""
        return self._tasks.kind

    @property
    def switches(self) -> list[Switch]:
        """The start of training and the switches of task since."""
        return self._tasks.switches

    def trace(self, task: str) -> tuple[list[int], list[float]]:
        """Updates before each evaluation of a task, and the mean loss or accuracy found there."""
        trace = self._tasks.traces[task]
        return list(trace.steps), list(trace.values)

    def gaps(self, switch: int = -1) -> dict[str, StabilityGap]:
        """The dip of every task that was old after a switch, up to the next switch; empty before an evaluation follows it.

        Steps are updates. Depths, areas and changes are falls: rises of a loss, or falls of an accuracy.

        Args:
            switch: Which of `switches`; the last one if not given. 0 is the start of training.
        """
        return self._tasks.gaps(switch)

    def noise_floor(self, task: str) -> float:
        """Depth of a dip that the choice of the task's examples alone would show since the last switch."""
        return self._tasks.noise_floor(task)

    # Events.

    @override
    def start(self, host: Host) -> None:
        self._running = host
        self.budget.start()
        self._dense.start()
        if not self.switches:
            self._tasks.begin(self.updates)
            self.evaluate(host)
        while self._waiting:
            self._switch(self._waiting.pop(0))

    @override
    def on_observation(self, trainer: L.Trainer, pl_module: L.LightningModule, observation: Observation, source: str) -> None:
        self.receive(observation, source)

    def receive(self, observation: Observation, source: str) -> None:  # noqa: ARG002  # every observer has it
        """Take note of a switch of tasks."""
        assert isinstance(observation, TaskSwitch), "`consumes` names nothing else"
        if self._running is None:
            self._waiting.append(observation.task)
        else:
            self._switch(observation.task)

    @override
    def before_update(self, host: Host, optimizer: Optimizer) -> None:
        # A switch may be told in the middle of a forward pass. The weights stay what they are up to here, and here no graph
        # is open that an evaluation could get in the way of.
        if self._wants_baseline:
            self.evaluate(host, step=self.switches[-1].step)

    @override
    def after_batch(self, host: Host, outputs: Any, batch: Any, updated: bool) -> None:
        if not updated or self.updates < self._next:
            return
        dense = self.updates - self.switches[-1].step <= self.dense_updates
        if dense or self.budget.allows(host):
            self.evaluate(host, dense=dense)
        else:
            self._plan(self.updates)

    @override
    def finish(self, host: Host) -> None:
        if self._tasks.last_step() < self.updates:
            self.evaluate(host)
        self.report(host, final=True)
        self._running = None

    @override
    def _let_go(self) -> None:
        self._running = None
        super()._let_go()

    # Evaluating.

    def _switch(self, task: str) -> None:
        step = self.updates
        if not self._tasks.switch(task, step):
            return
        self._judge.rearm()  # a dip after this switch is another one
        if self._latest and self._tasks.last_step() == step:  # evaluated already
            for name, scores in self._latest.items():
                self._tasks.append(name, step, scores)
        else:
            self._wants_baseline = True
        self._plan(step)

    def _plan(self, step: int) -> None:
        """Set the update of the next evaluation: a fixed period first, then a growing one."""
        since = step - self.switches[-1].step
        wait = 0 if since < self.dense_updates else math.ceil(since * (self.growth - 1))
        self._next = step + max(self.every_n_updates, wait)

    def evaluate(self, host: Host, *, step: int | None = None, dense: bool = True) -> None:
        """Score every task once and log the result; every rank must come by.

        Args:
            host: What trains.
            step: Updates before the weights that are evaluated; those so far if not given.
            dense: Whether the budget leaves this evaluation alone.
        """
        step = self.updates if step is None else step
        clock = self._dense if dense else self.budget
        with clock.spending(host.device):
            found = self.sets.scores(host)
        for name, scores in found.items():
            self._tasks.append(name, step, scores)
        self._latest = found
        self._wants_baseline = False
        self._plan(step)
        # Dense evaluations are reported at once: that is when dips begin. A report reads whole traces, so the others wait.
        since_report = self.updates - self._reported
        if step - self.switches[-1].step <= self.dense_updates or since_report >= self.cadence(host):
            self.report(host)
        else:
            host.log(self._levels())

    def _levels(self) -> dict[str, float]:
        return {f"{self.prefix}/{name}/{self.kind}": trace.values[-1] for name, trace in self._tasks.traces.items()}

    # Reporting.

    def report(self, host: Host, *, final: bool = False) -> None:
        """Log what the traces say so far and raise alerts."""
        self._reported = self.updates
        gaps = self.gaps()
        floors = {name: self.noise_floor(name) for name in gaps}
        relative = {name: _ratio(gap, floors[name]) for name, gap in gaps.items() if not math.isnan(floors[name])}
        lasting = {
            name: ratio
            for name, ratio in relative.items()
            if gaps[name].duration is None and (final or self.updates - (gaps[name].onset or 0) >= self.recovery_within)
        }
        values = self._tasks.over_tasks()
        if relative:
            values["relative_depth"] = max(relative.values())
            values["lasting_depth"] = max(lasting.values(), default=0.0)
        for name, gap in gaps.items():
            values[f"{name}/depth"] = gap.depth
            values[f"{name}/area"] = gap.area
            values[f"{name}/noise_floor"] = floors[name]
            values[f"{name}/worst_step"] = float(gap.worst_step)
            if gap.recovery_step is not None:
                values[f"{name}/recovery_step"] = float(gap.recovery_step)
        share = self.time_share()
        clock = {} if math.isnan(share) else {f"{self.prefix}/time_share": share}
        if self.budget.skipped:
            values["skipped"] = float(self.budget.skipped)
        numbers = {f"{self.prefix}/{key}": value for key, value in values.items()}
        host.log({**self._levels(), **numbers, **clock})
        deepest = {"dip": relative, "no_recovery": lasting}
        self.judge(host, numbers, evidence=lambda rule: self._evidence(deepest[rule.split("/")[1]], gaps, floors))
        # The dense part costs much and is over soon: what counts is the share once it is spread over the rest.
        if final or self.updates - self.switches[-1].step > self.dense_updates:
            for alert in self._clock_judge.alerts(clock, step=host.step):
                self.raise_alert(host, alert)

    def _evidence(self, depths: Mapping[str, float], gaps: Mapping[str, StabilityGap], floors: Mapping[str, float]) -> str:
        """The deepest dip in words."""
        if not depths:
            return ""
        name = max(depths, key=depths.__getitem__)
        gap, switch = gaps[name], self.switches[-1]
        moved = "training started" if len(self.switches) == 1 else f"the switch to {switch.task!r} at update {switch.step}"
        ended = "has not ended" if gap.recovery_step is None else f"ended at update {gap.recovery_step}"
        fall = "Loss" if self.kind == "loss" else "Accuracy"
        return (
            f"{fall} of {name!r} is worse by {gap.depth:.3g} at update {gap.worst_step} than before {moved} (noise floor "
            f"{floors[name]:.2g}); the dip began at update {gap.onset} and {ended}."
        )

    @property
    def probing_seconds(self) -> float:
        """Time spent on evaluating so far, the dense parts included."""
        return self.budget.spent + self._dense.spent

    def time_share(self) -> float:
        """Seconds of evaluation per second of training, as of the last evaluation; `nan` before any training."""
        wall = max(clock.trained + clock.spent for clock in (self.budget, self._dense))
        spent = self.probing_seconds
        return spent / (wall - spent) if wall > spent else math.nan

    # State.

    @override
    def measured_state(self) -> dict[str, Any]:
        return {
            "tasks": self._tasks.state(),
            "sizes": list(self.sets.sizes),
            "next": self._next,
            "reported": self._reported,
            "wants_baseline": self._wants_baseline,
            "budget": self.budget.state(),
            "dense": self._dense.state(),
        }

    @override
    def load_measured_state(self, state: Mapping[str, Any]) -> None:
        self._tasks.load(state["tasks"])
        self._latest = {}
        self.sets.sizes = list(state["sizes"])
        self._next, self._reported = state["next"], state["reported"]
        self._wants_baseline = state["wants_baseline"]
        self.budget.load(state["budget"])
        self._dense.load(state["dense"])


def _ratio(gap: StabilityGap, floor: float) -> float:
    """Depth in noise floors. Where there is no noise, any dip is beyond it."""
    if floor > 0:
        return gap.depth / floor
    return math.inf if gap.onset is not None else 0.0
