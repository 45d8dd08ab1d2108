"""The nouns that training steps publish and callbacks consume, and the one function that carries them.

A step says what it saw with `observe(self, PairObservation(...))`; every attached `Observer` that lists the class in
`consumes` receives it at once, inside the step, with detached tensors. With no observer attached nothing happens.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import MISSING, dataclass, fields, replace
from typing import TYPE_CHECKING, ClassVar, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer


@dataclass(frozen=True, kw_only=True, eq=False)
class Observation:
    """Evidence from one forward pass. Fields are tensors unless stated; they are detached on their way to observers."""

    def __post_init__(self) -> None:
        tensors = {f.name: getattr(self, f.name) for f in fields(self) if isinstance(getattr(self, f.name), Tensor)}
        sizes = {name: value.shape[0] if value.dim() else None for name, value in tensors.items()}
        if len(set(sizes.values())) > 1 or None in sizes.values():
            shapes = {name: tuple(value.shape) for name, value in tensors.items()}
            raise ValueError(f"All tensors of a {type(self).__name__} share their first dimension, got shapes {shapes}.")


@dataclass(frozen=True, kw_only=True, eq=False)
class PairObservation(Observation):
    """Log-probabilities of preference pairs."""

    chosen_logps: Tensor  # [B], nats, summed over response tokens
    rejected_logps: Tensor  # [B]
    row_ids: Tensor  # [B], integer, stable over epochs, so that a pair can be followed
    chosen_lengths: Tensor | None = None  # [B], scored tokens; needed for per-token values
    rejected_lengths: Tensor | None = None  # [B]
    ref_chosen_logps: Tensor | None = None  # [B]; None: a tracker anchors on the first value it sees per row
    ref_rejected_logps: Tensor | None = None  # [B]


@dataclass(frozen=True, kw_only=True, eq=False)
class PairHiddenObservation(Observation):
    """Hidden states of preference pairs, summed over the positions that predict response tokens."""

    chosen_hidden: Tensor  # [B, D]
    rejected_hidden: Tensor  # [B, D]
    chosen_lengths: Tensor  # [B]
    rejected_lengths: Tensor  # [B]
    row_ids: Tensor  # [B]


@dataclass(frozen=True, kw_only=True, eq=False)
class RewardObservation(Observation):
    """Rewards of sampled responses. All responses of one prompt must be in one observation."""

    rewards: Tensor  # [N], any unit, one entry per response
    prompt_ids: Tensor  # [N], integer; equal ids = responses of one prompt
    lengths: Tensor | None = None  # [N], response tokens; needed to see whether length is what pays
    gold: Tensor | None = None  # [N], what the responses are really worth (any monotone scale, larger is better)
    uncertainty: Tensor | None = None  # [N], standard deviation between the members of an ensemble, unit of the rewards
    kl: Tensor | None = None  # [N], log-ratio of each response to the reference, nats


@dataclass(frozen=True, kw_only=True, eq=False)
class TaskSwitch(Observation):
    """The run moves on to another task: an event, not a tensor."""

    task: str


ObservationT = TypeVar("ObservationT", bound=Observation)


class Observer(ABC):
    """What a callback inherits to receive observations."""

    consumes: ClassVar[tuple[type[Observation], ...]]

    @abstractmethod
    def on_observation(self, trainer: Trainer, pl_module: LightningModule, observation: Observation, source: str) -> None:
        """Called under `no_grad` for every observation whose class is listed in `consumes`.

        Args:
            trainer: The running trainer.
            pl_module: The trainer's module, also where a nested module published the observation.
            observation: Detached, rank-local evidence.
            source: `train`, `val`, `test`, `predict`, or the name a publisher gave.
        """

    def on_round_end(self, trainer: Trainer, pl_module: LightningModule, source: str) -> None:  # noqa: B027  # optional
        """Called when a publisher with a source of its own has published everything that belongs to one measurement."""


# What was published under each trainer, so that an observer that hears nothing can say what there was to hear.
_published: WeakKeyDictionary[Trainer, set[str]] = WeakKeyDictionary()


def published_kinds(trainer: Trainer) -> list[str]:
    """Names of the kinds of observation published so far under this trainer."""
    return sorted(_published.get(trainer, ()))


def required_fields(kind: type[Observation]) -> list[str]:
    """Names of the fields that an observation of this kind cannot do without."""
    return [f.name for f in fields(kind) if f.default is MISSING]


def detached(observation: ObservationT) -> ObservationT:
    """The same observation, its tensors cut off from the graph they came from."""
    values = {f.name: getattr(observation, f.name) for f in fields(observation)}
    return replace(observation, **{name: value.detach() for name, value in values.items() if isinstance(value, Tensor)})


def _attached_trainer(module: LightningModule) -> Trainer | None:
    try:
        trainer = module.trainer
    except RuntimeError:  # Lightning's answer for a module that no Trainer runs
        return None
    except AttributeError:
        raise TypeError(
            f"`observe` takes the LightningModule that is running, got a {type(module).__name__}. In the loss of a transformers "
            "Trainer call `lightning_pref.integrations.transformers.observe(trainer, ...)`."
        ) from None
    return None if trainer.sanity_checking else trainer


def _listeners(trainer: Trainer, kind: type[Observation]) -> Iterator[Observer]:
    for callback in trainer.callbacks:  # type: ignore[attr-defined]  # Lightning sets the list outside __init__
        if isinstance(callback, Observer) and issubclass(kind, callback.consumes):
            yield callback


def _stage(trainer: Trainer) -> str:
    if trainer.validating:
        return "val"
    if trainer.testing:
        return "test"
    return "predict" if trainer.predicting else "train"


@torch.compiler.disable  # type: ignore[untyped-decorator]
def observe(module: LightningModule, observation: Observation, *, source: str | None = None) -> None:
    """Publish an observation to every attached observer that consumes its class.

    Does nothing without a Trainer, during sanity checking, or with no such observer. An observer that raises, raises.

    Args:
        module: The LightningModule that is running, or one nested in it.
        observation: The evidence.
        source: Where it comes from; the trainer's stage if not given.
    """
    trainer = _attached_trainer(module)
    if trainer is None:
        return
    _published.setdefault(trainer, set()).add(type(observation).__name__)
    listeners = list(_listeners(trainer, type(observation)))
    if not listeners:
        return
    evidence = detached(observation)
    with torch.no_grad():
        for listener in listeners:
            listener.on_observation(trainer, trainer.lightning_module, evidence, source or _stage(trainer))


@torch.compiler.disable  # type: ignore[untyped-decorator]
def end_round(module: LightningModule, *, source: str) -> None:
    """Tell every attached observer that all evidence of one measurement has been published under this source."""
    trainer = _attached_trainer(module)
    if trainer is None:
        return
    with torch.no_grad():
        for callback in trainer.callbacks:  # type: ignore[attr-defined]  # Lightning sets the list outside __init__
            if isinstance(callback, Observer):
                callback.on_round_end(trainer, trainer.lightning_module, source)


@torch.compiler.disable  # type: ignore[untyped-decorator]
def wants(module: LightningModule, kind: type[Observation]) -> bool:
    """Whether any attached observer consumes this kind, so that a step can skip evidence nobody asked for."""
    trainer = _attached_trainer(module)
    return trainer is not None and any(True for _ in _listeners(trainer, kind))
