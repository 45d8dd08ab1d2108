"""Which reference a run gets, and why an impossible wish is refused."""

from __future__ import annotations

from typing import Literal

from peft import PeftModel
from transformers import PreTrainedModel

from lightning_pref.models.adapters import adapter_is_fresh
from lightning_pref.models.reference import AdapterOff, EmaReference, EmaSettings, FrozenCopy, Reference, Score, summed_logps
from lightning_pref.models.reference_cache import CachedReference, ReferenceTable

ReferenceKind = Literal["auto", "copy", "adapter", "ema", "cache", "none"]
ResolvedKind = Literal["copy", "adapter", "ema", "cache", "none"]


def resolve_kind(
    kind: ReferenceKind,
    policy: PreTrainedModel | PeftModel,
    *,
    needs_reference: bool,
    other_model: bool = False,
    ema: EmaSettings | None = None,
) -> ResolvedKind:
    """The reference to use.

    `auto` is none where the loss needs none, an average where its settings are given, the base under a fresh LoRA adapter,
    and else a frozen copy. An adapter that was trained before makes a copy: the base would not be where the run starts.

    Args:
        kind: What the user asked for.
        policy: The policy before its first update.
        needs_reference: Whether a loss of the run reads reference log-probs.
        other_model: Whether a model other than the policy was given as the reference.
        ema: Settings of an average, if given.

    Raises:
        ValueError: For a combination that cannot be meant, with the nearest one that can.
    """
    if kind == "auto":
        kind = _default_kind(policy, needs_reference, other_model, ema)
    if kind == "none" and needs_reference:
        raise ValueError(
            "The reference is 'none', but the loss compares the policy with one. Use the reference 'auto', or a loss without "
            "a reference such as 'simpo', 'orpo' or 'cpo'."
        )
    if kind == "adapter" and not isinstance(policy, PeftModel):
        raise ValueError(
            "The reference 'adapter' is the policy with its LoRA adapter off, but the policy has none. Turn LoRA on, or use "
            "the reference 'copy'."
        )
    if ema is not None and kind == "cache":
        raise ValueError(
            "A cache holds log-probs of a reference that never changes, but the settings of a moving reference are given. "
            "Use the reference 'ema' without a cache, or 'cache' without them."
        )
    if ema is not None and kind != "ema":
        raise ValueError(f"Settings of a moving reference are given, but the reference {kind!r} does not move; use 'ema'.")
    if other_model and kind in ("adapter", "ema", "none"):
        raise ValueError(
            f"Another model is given as the reference, but the reference {kind!r} comes from the policy itself and would "
            "ignore it. Use 'copy' (or 'cache') with that model, or leave it out."
        )
    return kind


def resolve_reference(
    kind: ReferenceKind,
    policy: PreTrainedModel | PeftModel,
    *,
    needs_reference: bool,
    other_model: PreTrainedModel | None = None,
    ema: EmaSettings | None = None,
    table: ReferenceTable | None = None,
    score: Score = summed_logps,
) -> Reference | None:
    """Build the reference that `resolve_kind` settles on; `None` for none.

    Args:
        kind: What the user asked for.
        policy: The policy before its first update.
        needs_reference: Whether a loss of the run reads reference log-probs.
        other_model: A model to use instead of the policy's start; it is taken over and frozen.
        ema: Settings of a moving reference.
        table: Cached log-probs, from `read_reference_cache`; needed for `cache`.
        score: How a response is scored, as in training.
    """
    resolved = resolve_kind(kind, policy, needs_reference=needs_reference, other_model=other_model is not None, ema=ema)
    if resolved == "none":
        return None
    if resolved == "cache":
        if table is None:
            raise ValueError("The reference 'cache' needs its table: compute and read it before the first training step.")
        return CachedReference(table)
    if resolved == "ema":
        return EmaReference(policy, ema or EmaSettings(), score=score)
    if resolved == "adapter":
        assert isinstance(policy, PeftModel)
        return AdapterOff(policy, score=score)
    if other_model is not None:
        return FrozenCopy(other_model, take_over=True, score=score)
    return FrozenCopy(policy, score=score)


def _default_kind(
    policy: PreTrainedModel | PeftModel, needs_reference: bool, other_model: bool, ema: EmaSettings | None
) -> ResolvedKind:
    if ema is not None:
        return "ema"
    if other_model:
        return "copy"
    if not needs_reference:
        return "none"
    return "adapter" if isinstance(policy, PeftModel) and adapter_is_fresh(policy) else "copy"
