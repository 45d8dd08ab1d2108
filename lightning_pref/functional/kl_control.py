"""Coefficient of the KL penalty: settings that say how it moves, and one 0-d tensor that is the whole state."""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

# The relative error of the KL counts up to this much, so that one odd batch moves the coefficient by a fifth at most.
MAX_ERROR = 0.2


class KLController(Protocol):
    """What sets the coefficient. Keep the tensor as a buffer; every rank passes the same numbers and keeps the same tensor."""

    def start(self) -> Tensor:
        """The first coefficient, []."""

    def updated(self, coefficient: Tensor, kl: Tensor | float, num_responses: Tensor | int) -> Tensor:
        """The next coefficient, [].

        Args:
            coefficient: The one the responses were collected with, [].
            kl: Mean over **all** those responses of the KL to the reference, summed over tokens, nats.
            num_responses: How many there are, over all ranks.
        """


@dataclass(frozen=True, kw_only=True)
class FixedKL:
    """The same coefficient throughout.

    >>> FixedKL(coefficient=0.05).updated(FixedKL(coefficient=0.05).start(), kl=100.0, num_responses=64)
    tensor(0.0500)
    """

    coefficient: float = 0.05

    def __post_init__(self) -> None:
        if not self.coefficient >= 0:
            raise ValueError(f"`coefficient` must not be negative, got {self.coefficient!r}.")

    def start(self) -> Tensor:
        """The coefficient, []."""
        return torch.tensor(self.coefficient, dtype=torch.float32)

    def updated(self, coefficient: Tensor, kl: Tensor | float, num_responses: Tensor | int) -> Tensor:  # noqa: ARG002
        """The coefficient as it is."""
        return coefficient


@dataclass(frozen=True, kw_only=True)
class AdaptiveKL:
    """Proportional control towards a target KL (Ziegler et al., arXiv:1909.08593, section 2.2).

        error = clip(kl / target - 1, -0.2, 0.2);    coefficient <- coefficient * (1 + error * num_responses / horizon)

    Deviations: a batch larger than the horizon counts as one horizon, since the factor would turn negative from five
    horizons on; and a KL that is not finite leaves the coefficient alone.

    Args:
        initial: First coefficient, positive; a product never leaves 0.
        target: Wanted KL per response in nats, positive.
        horizon: Responses over which an error of 100 % would double the coefficient, positive.

    >>> AdaptiveKL(target=6.0, horizon=100.0).updated(torch.tensor(1.0), kl=60.0, num_responses=50)
    tensor(1.1000)
    """

    initial: float = 0.15
    target: float = 6.0
    horizon: float = 10_000.0

    def __post_init__(self) -> None:
        for name in ("initial", "target", "horizon"):
            if not getattr(self, name) > 0:
                raise ValueError(f"`{name}` must be positive, got {getattr(self, name)!r}; for no control use `FixedKL`.")

    def start(self) -> Tensor:
        """The first coefficient, []."""
        return torch.tensor(self.initial, dtype=torch.float32)

    def updated(self, coefficient: Tensor, kl: Tensor | float, num_responses: Tensor | int) -> Tensor:
        """The coefficient a step closer to what holds the KL at its target."""
        measured = torch.as_tensor(kl, dtype=coefficient.dtype, device=coefficient.device).detach()
        count = torch.as_tensor(num_responses, dtype=coefficient.dtype, device=coefficient.device)
        error = (measured / self.target - 1.0).clamp(-MAX_ERROR, MAX_ERROR)
        moved = coefficient * (1.0 + error * (count / self.horizon).clamp(max=1.0))
        return torch.where(measured.isfinite(), moved, coefficient)
