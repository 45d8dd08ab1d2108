"""Whether the two responses of a pair can be moved apart at all: the geometry of their gradients, and what they really do."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric
from typing_extensions import override

from lightning_pref.callbacks.diagnostic import Key
from lightning_pref.callbacks.monitor import ProbedMonitor
from lightning_pref.callbacks.probe import Score
from lightning_pref.losses.pair import PairLogps
from lightning_pref.losses.preference import PreferenceLoss, loss_options, sensitivities
from lightning_pref.measures.entanglement import (
    GradientProducts,
    head_gradient_products,
    in_band,
    predicted_changes,
    regimes,
)
from lightning_pref.measures.pair_history import PairChanges, PairHistory, PairQueue
from lightning_pref.models.gradient_inputs import HeadInputs
from lightning_pref.observations import Observation, PairObservation

NAMES = (
    "cosine",
    "norm_ratio",
    "sensitivity_ratio",
    "in_band",
    "predicted_both_down",
    "regime_up_down",
    "regime_both_down",
    "regime_both_up",
)


@dataclass(frozen=True, kw_only=True, eq=False)
class GradientObservation(Observation):
    """Inner products of the gradients of the two log-probabilities of B pairs, and the log-probabilities themselves."""

    row_ids: Tensor  # [B] int64
    chosen_square: Tensor  # [B], |g_c|^2
    rejected_square: Tensor  # [B], |g_r|^2
    cross: Tensor  # [B], <g_c, g_r>
    chosen_logps: Tensor  # [B], nats
    rejected_logps: Tensor  # [B]
    chosen_lengths: Tensor | None = None  # [B]
    rejected_lengths: Tensor | None = None  # [B]
    ref_chosen_logps: Tensor | None = None  # [B], nats; None: the first measurement stands in
    ref_rejected_logps: Tensor | None = None  # [B]


# Any: the module and the batch are the user's own.
HeadInputsOf = Callable[[Any, Any], HeadInputs]


def entanglement_score(head_inputs: HeadInputsOf, *, chunk_elements: int = 2**24) -> Score:
    """A score for `Probe`: the gradients of each pair in the output matrix, in closed form, and its log-probabilities.

    Args:
        head_inputs: `head_inputs(module, batch)`; for a transformers model `models.gradient_inputs` gives it.
        chunk_elements: Numbers of one gradient that exist at once.
    """
    return partial(_score, head_inputs=head_inputs, chunk_elements=chunk_elements)


def _score(module: Any, batch: Any, *, head_inputs: HeadInputsOf, chunk_elements: int) -> Sequence[Observation]:
    inputs = head_inputs(module, batch)
    pairs = zip(inputs.chosen, inputs.rejected, strict=True)
    products = [head_gradient_products(up, down, inputs.head, chunk_elements=chunk_elements) for up, down in pairs]
    if not products:
        return []
    squares = torch.stack(products).unbind(1)
    told = inputs.logps
    observation = GradientObservation(
        row_ids=told.row_ids,
        chosen_square=squares[0],
        rejected_square=squares[1],
        cross=squares[2],
        chosen_logps=told.chosen_logps,
        rejected_logps=told.rejected_logps,
        chosen_lengths=told.chosen_lengths,
        rejected_lengths=told.rejected_lengths,
        ref_chosen_logps=told.ref_chosen_logps,
        ref_rejected_logps=told.ref_rejected_logps,
    )
    return [told, observation]


class EntangledPairs(Metric):
    """Sums and counts of one source since the last report, and where its pairs stood at the first one and at the last."""

    full_state_update = False

    def __init__(self, max_rows: int) -> None:
        super().__init__()
        self.sums: Tensor
        self.counts: Tensor
        self.add_state("sums", torch.zeros(len(NAMES), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("counts", torch.zeros(len(NAMES), dtype=torch.float64), dist_reduce_fx="sum")
        self.moved = PairHistory(anchor="first", max_rows=max_rows)  # of PairObservation
        self.start = PairHistory(anchor="first", max_rows=max_rows)  # of GradientObservation

    @override
    def update(self, values: Mapping[str, Tensor]) -> None:
        """Add [B] values by name; those that are not finite are left out."""
        for name, value in values.items():
            known = value.isfinite()
            self.sums[NAMES.index(name)] += torch.where(known, value, 0.0).sum().to(self.sums)
            self.counts[NAMES.index(name)] += known.sum().to(self.counts)

    @override
    def compute(self) -> dict[str, Tensor]:
        """Mean of every name."""
        return dict(zip(NAMES, (self.sums / self.counts).unbind(), strict=True))


class EntanglementMonitor(ProbedMonitor[EntangledPairs]):
    """Watches whether chosen and rejected responses can move apart, or drag each other along (gradient entanglement).

    Yuan et al. 2024, arXiv 2410.13828. Two things are measured on fixed pairs. What the responses did since the last
    measurement, which holds for any optimiser: `regime_*`, the shares of pairs whose responses parted as wanted, both fell, or
    both rose. And what one step of plain gradient descent on the output matrix would do to them, from the inner products of
    their gradients there: `cosine`, `in_band`, `predicted_both_down`. The latter is a proxy: Adam rescales gradients, the other
    layers have gradients of their own, and where output matrix and embedding are tied a part of it is left out. Where the
    observation has no reference log-probabilities, those of the first measurement stand in.

    Needs: a `Probe` that publishes `GradientObservation` (`entanglement_score`), `PairObservation`, or both.
    Logs: `entanglement/cosine`, `norm_ratio`, `sensitivity_ratio`, `in_band`, `predicted_both_down`, `regime_up_down`,
    `regime_both_down`, `regime_both_up`, all under `probe/<name>/`.
    Changes: nothing.

    Args:
        loss: Name of the preference loss that is trained, or the function; its pull on both responses decides the band.
        loss_options: Options of the loss.
        max_rows: Pairs followed at most.
        silent_after: Raise if nothing was heard within this many training batches, or within the first epoch.
        thresholds: Limits of alerts other than the defaults.
    """

    prefix = "entanglement"
    scored_by = "entanglement_score(lambda module, batch: head_inputs(module.policy, batch))"
    consumes = (PairObservation, GradientObservation)
    keys = (
        Key("entanglement/cosine", "Mean cosine between the gradients of both responses in the output matrix."),
        Key("entanglement/norm_ratio", "Mean norm of the rejected response's gradient by that of the chosen one."),
        Key("entanglement/sensitivity_ratio", "Mean pull on the chosen response by that on the rejected one, d_c / d_r."),
        Key("entanglement/in_band", "Share of pairs that one gradient step lets part as wanted."),
        Key("entanglement/predicted_both_down", "Share of pairs whose responses one gradient step lets both fall."),
        Key("entanglement/regime_up_down", "Share of pairs that parted as wanted since the last measurement."),
        Key("entanglement/regime_both_down", "Share of pairs whose responses both fell since the last measurement."),
        Key("entanglement/regime_both_up", "Share of pairs whose responses both rose since the last measurement."),
    )

    def __init__(
        self,
        *,
        loss: PreferenceLoss = "sigmoid",
        loss_options: Mapping[str, Any] | None = None,  # Any: each loss has options of its own
        max_rows: int = 10_000,
        silent_after: int = 200,
        thresholds: Mapping[str, float] | None = None,
    ) -> None:
        super().__init__(silent_after=silent_after, thresholds=thresholds)
        self.loss = loss
        self.loss_options = checked_options(loss, loss_options or {})
        self.max_rows = max_rows

    @override
    def new_accumulator(self) -> EntangledPairs:
        return EntangledPairs(self.max_rows)

    @override
    def receive(self, observation: Observation, source: str) -> None:
        # Pairs of a training batch are others every time; only a fixed set says how they moved.
        if source.startswith("probe/"):
            super().receive(observation, source)

    @override
    def update(self, accumulator: EntangledPairs, observation: Observation) -> None:
        if isinstance(observation, PairObservation):
            changes = self._seen(accumulator.moved, observation)
            found = regimes(changes.chosen_step, changes.rejected_step)._asdict()
            accumulator.update({f"regime_{name}": value for name, value in found.items() if f"regime_{name}" in NAMES})
        elif isinstance(observation, GradientObservation):
            accumulator.update(self._predicted(self._with_reference(accumulator.start, observation)))

    def _seen(self, history: PairHistory, observation: PairObservation | GradientObservation) -> PairChanges:
        """How the pairs moved since they were seen before; a probe may wait for the device."""
        queue = PairQueue()
        values = (observation.chosen_logps, observation.rejected_logps, None, None, None, None)
        queue.add_pairs(self.updates, observation.row_ids, *values)
        return history.see(*queue.fetch())

    def _with_reference(self, start: PairHistory, observation: GradientObservation) -> GradientObservation:
        """Training begins at the reference unless one is told."""
        if observation.ref_chosen_logps is not None and observation.ref_rejected_logps is not None:
            return observation
        self._seen(start, observation)
        like = observation.chosen_logps
        chosen, rejected = (anchor.to(like) for anchor in start.anchors(observation.row_ids.cpu()))
        return replace(observation, ref_chosen_logps=chosen, ref_rejected_logps=rejected)

    def _predicted(self, observation: GradientObservation) -> dict[str, Tensor]:
        """What a gradient step would do to the pairs."""
        pair = PairLogps(
            observation.chosen_logps,
            observation.rejected_logps,
            observation.ref_chosen_logps,
            observation.ref_rejected_logps,
            observation.chosen_lengths,
            observation.rejected_lengths,
        )
        up, down = (value.double() for value in sensitivities(self.loss, pair, **self.loss_options))
        squares = (observation.chosen_square, observation.rejected_square, observation.cross)
        products = GradientProducts(*(value.double() for value in squares))
        chosen, rejected = predicted_changes(products, up, down)
        return {
            "cosine": products.cosine(),
            "norm_ratio": products.norm_ratio(),
            "sensitivity_ratio": up / down,
            "in_band": in_band(products, up, down).double(),
            "predicted_both_down": ((chosen < 0) & (rejected <= 0)).double(),
        }

    @override
    def summarize(self, accumulator: EntangledPairs) -> Mapping[str, Tensor]:
        return {f"entanglement/{name}": value for name, value in accumulator.compute().items()}

    @override
    def measured_state(self) -> dict[str, Any]:
        histories = {
            source: {"moved": pairs.moved.state(), "start": pairs.start.state()} for source, pairs in self._accumulators.items()
        }
        return {**super().measured_state(), "histories": histories}

    @override
    def load_measured_state(self, state: Mapping[str, Any]) -> None:
        super().load_measured_state(state)
        for source, histories in state["histories"].items():
            self._accumulators[source].moved.load(histories["moved"])
            self._accumulators[source].start.load(histories["start"])


def checked_options(loss: PreferenceLoss, options: Mapping[str, Any]) -> dict[str, Any]:
    """The options of a loss; raises for one it does not have."""  # Any: each loss has options of its own
    loss_options(loss, **options)
    return dict(options)
