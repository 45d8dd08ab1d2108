"""What is known of a loss beside its function: what it needs, what it compares, and what others mean by its name."""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

from torch import Tensor

from lightning_pref.losses.rewards import Rewards

# How length enters: not at all, as a divisor of every score, as a divisor or offset of one part, or as the option
# `length_normalize` says.
Length = Literal["sum", "mean", "mixed", "option"]


@dataclass(frozen=True, kw_only=True)
class LossSpec:
    """A loss and its metadata. `fn`'s keyword arguments are the loss's options, its defaults theirs.

    >>> LossSpec(fn=lambda pair, *, beta=0.1: beta * pair.chosen, formula="beta * S_c", source="none").options
    {'beta': 0.1}
    """

    fn: Callable[..., Tensor]  # (batch, *, options) -> one loss per example
    formula: str  # per example, in the symbols of docs/losses.md
    source: str  # paper, arXiv id
    reward: Callable[..., Rewards] | None = None  # (pair, *, some of the options) -> what the loss compares
    needs_reference: bool = False
    length: Length = "sum"
    num_coupled: int = 1  # examples a micro-batch should hold; above 1 a loss belongs to its batch, not to one example
    peers: str = ""  # names of the same loss elsewhere, and what differs there

    @cached_property
    def options(self) -> Mapping[str, Any]:  # Any: an option's default; `inspect.Parameter.empty` where it has none
        return {name: p.default for name, p in inspect.signature(self.fn).parameters.items() if p.kind is p.KEYWORD_ONLY}

    @cached_property
    def reward_options(self) -> frozenset[str]:
        """Options that shape the reward; the others belong to the link."""
        parameters = inspect.signature(self.reward).parameters if self.reward is not None else {}
        return frozenset(parameters) & frozenset(self.options)

    def needs_lengths(self, options: Mapping[str, object]) -> bool:
        """Whether the loss divides by response lengths, given its options."""
        return bool(options["length_normalize"]) if self.length == "option" else self.length != "sum"
