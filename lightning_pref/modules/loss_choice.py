"""From the `loss` of a configuration to a checked loss with its options and kind."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

from lightning_pref.losses import (
    FORGET_LOSSES,
    GROUP_LOSSES,
    PREFERENCE_LOSSES,
    UNPAIRED_LOSSES,
    LossMix,
    LossSpec,
    PreferenceLoss,
    loss_options,
)

# `pair`: ordered pairs; `unpaired`: labelled responses; `forget`: bad responses; `group`: all responses of a prompt.
LossKind = Literal["pair", "unpaired", "forget", "group"]

# These go by their rows: KTO and the forgetting losses take labelled responses and pairs alike, so they are looked up before
# the pairwise form of the same name.
BY_RESPONSE: Mapping[str, tuple[LossKind, LossSpec]] = {
    **{name: ("unpaired", spec) for name, spec in UNPAIRED_LOSSES.items()},
    **{name: ("forget", spec) for name, spec in FORGET_LOSSES.items()},
    **{name: ("group", spec) for name, spec in GROUP_LOSSES.items()},
}

# Options that the module itself supplies for every batch.
SUPPLIED = {"kto": frozenset({"baseline"}), "bco": frozenset({"delta"})}


class ChosenLoss(NamedTuple):
    """A loss that is known to work with its options."""

    kind: LossKind
    loss: PreferenceLoss  # a name, or a mix of pairwise losses
    options: dict[str, Any]  # Any: each loss has options of its own
    needs_reference: bool


def choose_loss(loss: str | Mapping[str, float], beta: float | None, options: Mapping[str, Any]) -> ChosenLoss:
    """Check a loss, or the weights of several, with its options.

    Args:
        loss: Name, or weights by name.
        beta: Shorthand for the option `beta`; in a mix, of every loss that has one.
        options: Options of the loss; of a mix, options by the name of the loss.
    """
    if isinstance(loss, str):
        return _single(loss, _with_beta(options, beta))
    for name in options:
        if name not in loss:
            raise ValueError(
                f"`loss_options` names {name!r}, which is not in the mix of {', '.join(loss)}. For a mix, options go by the "
                "name of the loss: `loss_options: {sigmoid: {beta: 0.1}}`."
            )
    terms = []
    for name, weight in loss.items():
        if name in BY_RESPONSE and name not in PREFERENCE_LOSSES:
            raise ValueError(f"{name!r} is no pairwise loss, so it cannot be mixed; known: {', '.join(PREFERENCE_LOSSES)}.")
        has_beta = name in PREFERENCE_LOSSES and "beta" in PREFERENCE_LOSSES[name].options
        terms.append((name, float(weight), _with_beta(options.get(name, {}), beta if has_beta else None)))
    mix = LossMix(terms)
    return ChosenLoss("pair", mix, {}, mix.needs_reference)


def coupled_losses(chosen: ChosenLoss) -> list[str]:
    """Names of the pairwise losses in the choice that look at several pairs at once."""
    names = [name for name, _, _ in chosen.loss.terms] if isinstance(chosen.loss, LossMix) else [str(chosen.loss)]
    return [name for name in names if name in PREFERENCE_LOSSES and PREFERENCE_LOSSES[name].num_coupled > 1]


def _with_beta(options: Mapping[str, Any], beta: float | None) -> dict[str, Any]:
    if beta is None:
        return dict(options)
    if "beta" in options:
        raise ValueError(f"`beta` is given twice: {beta!r}, and {options['beta']!r} in `loss_options`. Give it once.")
    return {**options, "beta": beta}


def _single(name: str, options: dict[str, Any]) -> ChosenLoss:
    if name not in BY_RESPONSE:
        if name == "inpo":
            raise ValueError(
                "The loss 'inpo' compares with the policy of the previous round as well, whose log-probabilities a fixed data "
                "set does not hold. Call `lightning_pref.losses.preference_loss('inpo', ...)` with them, or choose 'ipo'."
            )
        loss_options(name, **options)  # raises for an unknown name or option
        return ChosenLoss("pair", name, options, PREFERENCE_LOSSES[name].needs_reference)
    kind, spec = BY_RESPONSE[name]
    supplied = SUPPLIED.get(name, frozenset())
    if given := sorted(supplied & set(options)):
        raise ValueError(f"Option `{given[0]}` of loss {name!r} is measured while training; leave it out.")
    loss_options(spec, **dict.fromkeys(supplied, 0.0), **options)  # raises for an unknown option or a value out of range
    return ChosenLoss(kind, name, options, spec.needs_reference)
