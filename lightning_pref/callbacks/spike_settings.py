"""What `SpikeAwareOptimizerReset` can and cannot be told."""

from __future__ import annotations

from collections.abc import Mapping
from inspect import Parameter
from typing import Any

# Arguments that act in one mode only.
SPAM_ONLY = ("reset_every", "threshold", "order", "strict")
EVIDENCE_ONLY = ("watch", "ladder", "horizon", "window", "min_history", "score_limit", "snapshot_every", "snapshot_on", "rows")


def refuse_settings(settings: Mapping[str, Any], defaults: Mapping[str, Parameter]) -> None:
    """Raise for numbers out of range, and for arguments without effect in the chosen mode.

    Args:
        settings: What the constructor was given, by name.
        defaults: Its parameters.
    """
    mode = settings["mode"]
    if mode not in ("spam", "evidence"):
        raise ValueError(f"`mode` is 'spam' or 'evidence', got {mode!r}.")
    for name in EVIDENCE_ONLY if mode == "spam" else SPAM_ONLY:
        if _plain(settings[name]) != _plain(defaults[name].default):
            other = "evidence" if mode == "spam" else "spam"
            raise ValueError(f"`{name}` acts in mode {other!r} only; leave it out in mode {mode!r}, or change the mode.")
    if settings["bias_correction"] not in (None, "keep", "restart"):
        raise ValueError(f"`bias_correction` is 'keep' or 'restart', got {settings['bias_correction']!r}.")
    if settings["order"] not in ("before_norm_clip", "after_norm_clip"):
        raise ValueError(f"`order` is 'before_norm_clip' or 'after_norm_clip', got {settings['order']!r}.")
    for name, least in (("warmup_steps", 0), ("guard_steps", 0), ("threshold", 0), ("max_events", 1)):
        if settings[name] < least:
            raise ValueError(f"`{name}` must be at least {least}, got {settings[name]!r}.")
    for name in ("reset_every", "snapshot_every", "every_n_updates"):
        least = 0 if name == "reset_every" else 1
        if settings[name] is not None and settings[name] < least:
            raise ValueError(f"`{name}` must be at least {least} or None, got {settings[name]!r}.")
    if mode == "spam":
        _refuse_spam_settings(settings)


def _refuse_spam_settings(settings: Mapping[str, Any]) -> None:  # Any: the constructor's arguments
    every, warmup, guard = settings["reset_every"], settings["warmup_steps"], settings["guard_steps"]
    if every and every <= warmup:
        raise ValueError(
            f"`reset_every` must be larger than `warmup_steps`, got {every!r} and {warmup!r}: the learning rate would never "
            f"come back to its full value. SPAM's own numbers are 500 and 150; here `warmup_steps` may be up to {every - 1}."
        )
    if not settings["threshold"]:
        return
    if every and every <= guard:
        raise ValueError(
            f"`guard_steps` must be smaller than `reset_every`, got {guard!r} and {every!r}: nothing would ever be clipped. "
            "Set `threshold=0` if that is what you want."
        )
    if guard == 0 and not settings["strict"]:
        raise ValueError(
            "`guard_steps` must be at least 1: on the update that resets there is no second moment to clip by. (With "
            "`strict=True` 0 is allowed and, as in SPAM's code, freezes every weight at the first reset.)"
        )


def _plain(value: object) -> object:
    """Sequences as lists: a configuration file knows no tuples."""
    return list(value) if isinstance(value, tuple) else value
