"""Which settings of a reward model go together, and why the others are refused."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, get_args

import torch

from lightning_pref.domains import check_range, check_seed
from lightning_pref.losses.ensemble import How
from lightning_pref.losses.reward import bradley_terry, plackett_luce

RewardLossName = Literal["bradley_terry", "plackett_luce", "regression", "ordinal", "outcome_bce", "step_bce", "implicit_prm"]
HeadKind = Literal["linear", "verbalizer", "implicit"]
EnsembleKind = Literal["heads", "adapters"]

# Settings that act under some losses only.
OF_LOSSES: Mapping[str, tuple[RewardLossName, ...]] = {
    "pairs": ("bradley_terry",),
    "margin_scale": ("bradley_terry",),
    "center": ("bradley_terry",),
    "label_smoothing": ("bradley_terry",),
    "top_k": ("plackett_luce",),
    "levels": ("ordinal",),
}
# Settings that act with some heads only.
OF_HEADS: Mapping[str, tuple[HeadKind, ...]] = {
    "num_members": ("linear",),
    "ensemble": ("linear",),
    "bootstrap": ("linear",),
    "head_seed": ("linear",),
    "aggregate": ("linear",),
    "uwo_coefficient": ("linear",),
    "label_words": ("verbalizer",),
    "beta": ("implicit",),
    "reference": ("implicit",),
    "reference_model": ("implicit",),
}


def check_choice(
    loss: RewardLossName,
    head: HeadKind,
    changed: Mapping[str, Any],  # Any: settings of every type
    *,
    aggregate: How,
    num_members: int | None,
) -> None:
    """Raise for a combination that cannot be meant.

    Args:
        loss: Name of the loss.
        head: Kind of the head.
        changed: The settings that are not at their defaults, by name.
        aggregate: How the scores of an ensemble become one reward.
        num_members: Heads asked for.
    """
    for name, value, known in (("loss", loss, get_args(RewardLossName)), ("head", head, get_args(HeadKind))):
        if value not in known:
            raise ValueError(f"Unknown {name} {value!r} of a reward model; known: {', '.join(known)}.")
    for name in changed:
        if loss not in OF_LOSSES.get(name, (loss,)):
            raise ValueError(
                f"`{name}` acts on the loss {_or(OF_LOSSES[name])} only; with {loss!r} it has no effect. Leave it out, or choose "
                "that loss."
            )
        if head not in OF_HEADS.get(name, (head,)):
            raise ValueError(
                f"`{name}` acts with the head {_or(OF_HEADS[name])} only; with {head!r} it has no effect. Leave it out, or "
                "choose that head."
            )
    if (loss == "implicit_prm") and head != "implicit":
        raise ValueError(
            f"The loss 'implicit_prm' trains the log-ratio to a reference, but the head is {head!r}. Use the head 'implicit', or "
            "the loss 'outcome_bce', which is the same cross-entropy on a head's score."
        )
    if loss in ("step_bce", "outcome_bce") and head == "implicit":
        raise ValueError(
            f"The loss {loss!r} reads a head's score, which the head 'implicit' has not. Use the loss 'implicit_prm', whose "
            "model gives process rewards without labels of steps."
        )
    if loss == "ordinal" and not changed.get("levels"):
        raise ValueError("The loss 'ordinal' needs `levels`, the scores that annotators could give, such as [1, 2, 3, 4, 5].")
    if head == "verbalizer" and "label_words" not in changed:
        raise ValueError(
            "The head 'verbalizer' needs `label_words`: a word for good responses and one for bad ones, such as ' yes' and ' no'."
        )
    if "uwo_coefficient" in changed and aggregate != "uwo":
        raise ValueError(f"`uwo_coefficient` acts on `aggregate: uwo` only; with {aggregate!r} it has no effect.")
    if aggregate != "mean" and num_members == 1:
        raise ValueError(f"`aggregate: {aggregate}` compares the members of an ensemble, but `num_members` is 1.")


def check_ensemble(ensemble: EnsembleKind, num_members: int | None, *, has_lora: bool, gradient_checkpointing: bool) -> None:
    """Raise where an ensemble of adapters cannot be trained.

    Args:
        ensemble: What the members are.
        num_members: How many are asked for.
        has_lora: Whether adapters are to be trained at all.
        gradient_checkpointing: Whether activations are computed again in the backward pass.
    """
    if ensemble not in get_args(EnsembleKind):
        raise ValueError(f"Unknown ensemble {ensemble!r} of a reward model; known: {', '.join(get_args(EnsembleKind))}.")
    if ensemble == "heads":
        return
    if num_members is None or num_members < 2:
        raise ValueError(
            f"`ensemble: adapters` trains one LoRA adapter for each member, but `num_members` is {num_members}. Set it to two or "
            "more, or leave `ensemble` out."
        )
    if not has_lora:
        raise ValueError("`ensemble: adapters` trains LoRA adapters, but `lora` is not set; give `lora.r`, or use heads.")
    if gradient_checkpointing:
        raise ValueError(
            "`gradient_checkpointing` computes activations again in the backward pass, when another member's adapter is active: "
            "the gradients would be wrong. Leave it out, or use `ensemble: heads`."
        )


def check_values(
    *,
    center: float,
    label_smoothing: float,
    top_k: int | None,
    levels: list[float] | None,
    beta: float,
    margin_scale: float = 1.0,
    num_members: int | None = None,
    uwo_coefficient: float = 0.5,
    head_seed: int = 0,
) -> None:
    """Raise for a number out of range, by the losses' own checks where they have them."""
    check_range("margin_scale", margin_scale, at_least=0)
    check_range("num_members", num_members, at_least=1)
    check_range("uwo_coefficient", uwo_coefficient, at_least=0)
    check_seed("head_seed", head_seed)
    for level in levels or ():
        check_range("levels", level)
    zero = torch.zeros(1)
    bradley_terry(zero, zero, None, center, label_smoothing=label_smoothing)
    index = torch.zeros(1, dtype=torch.int64)
    plackett_luce(zero, index, index, 1, top_k=top_k)
    if levels is not None and (len(levels) < 2 or sorted(set(levels)) != levels):
        raise ValueError(f"`levels` must be two or more numbers in ascending order, got {levels!r}.")
    check_range("center", center)
    if not beta > 0:
        raise ValueError(f"`beta` must be positive, got {beta!r}.")
    check_range("beta", beta)


def _or(names: tuple[str, ...]) -> str:
    return " or ".join(map(repr, names))
