"""Pairs for online DPO: of the responses to a prompt the best against the worst, and the loss of such a pair."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np

from lightning_pref.data.groups import PromptGroup
from lightning_pref.losses import loss_options
from lightning_pref.modules.loss_choice import choose_loss
from lightning_pref.modules.objectives import PairObjective

# Its comparison is with the policy that sampled, whose log-probs only a rollout has.
INPO = "inpo"


class ChosenObjective(NamedTuple):
    """The loss of pairs, known to work with its options."""

    objective: PairObjective
    needs_reference: bool


def choose_pair_loss(loss: str | Mapping[str, float], beta: float | None, options: Mapping[str, Any]) -> ChosenObjective:
    """Check a pairwise loss with its options.

    Args:
        loss: Name, or weights by name.
        beta: Shorthand for the option `beta`.
        options: Options of the loss; of a mix, options by the name of the loss.
    """  # Any: each loss has options of its own
    if loss == INPO:
        if beta is not None:
            raise ValueError("The loss 'inpo' has no `beta`; its options are `eta` and `tau`, in `loss_options`.")
        loss_options(INPO, previous_chosen=0.0, previous_rejected=0.0, **options)  # raises for a wrong option
        return ChosenObjective(PairObjective(loss=INPO, options=dict(options)), needs_reference=True)
    chosen = choose_loss(loss, beta, options)
    if chosen.kind != "pair":
        raise ValueError(f"`pair_loss` compares two responses, and {loss!r} does not; choose a loss such as 'sigmoid'.")
    return ChosenObjective(PairObjective(loss=chosen.loss, options=chosen.options), chosen.needs_reference)


class ChosenPairs(NamedTuple):
    """A pair of every prompt, and where its responses stood among all R responses."""

    groups: list[PromptGroup]
    places: list[int]  # two per group, the chosen one first


def best_against_worst(groups: Sequence[PromptGroup], scores: Sequence[float], *, seed: int) -> ChosenPairs:
    """The best and the worst response of each prompt by their scores; ties are broken by chance, not by their place.

    A prompt with fewer than two finite scores makes a pair of weight 0.

    Args:
        groups: Prompts with two responses or more.
        scores: Of all responses, prompt by prompt.
        seed: Of the chance.
    """
    rng = np.random.default_rng(seed)
    found, places, start = [], [], 0
    for group in groups:
        own = np.asarray(scores[start : start + len(group.responses)], dtype=np.float64)
        order = rng.permutation(len(own))
        finite = [int(i) for i in order if np.isfinite(own[i])]
        chosen, rejected, weight = 0, 1, 0.0
        if len(finite) >= 2:
            ranked = sorted(finite, key=lambda i: -own[i])  # stable, so that equal scores stay in the order of chance
            chosen, rejected, weight = ranked[0], ranked[-1], group.weight
        pair = (group.responses[chosen], group.responses[rejected])
        found.append(replace(group, responses=pair, ranks=(0, 1), weight=weight))
        places += [start + chosen, start + rejected]
        start += len(own)
    return ChosenPairs(found, places)
