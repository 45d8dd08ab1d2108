"""What a pairwise loss sees: log-probabilities of a chosen and a rejected response, and nothing of the model behind them."""

from typing import NamedTuple, Self

from torch import Tensor

from lightning_pref.functional import wide


class PairLogps(NamedTuple):
    """Log-probabilities of B pairs, in nats, summed over the response tokens of each response.

    >>> import torch
    >>> pair = PairLogps(torch.tensor([-4.0]), torch.tensor([-9.0]), torch.tensor([-5.0]), torch.tensor([-6.0]))
    >>> pair.log_ratios()
    (tensor([1.]), tensor([-3.]))
    """

    chosen: Tensor  # [B]
    rejected: Tensor  # [B]
    ref_chosen: Tensor | None = None  # [B], under the reference; a constant, it gets no gradient
    ref_rejected: Tensor | None = None  # [B]
    chosen_lengths: Tensor | None = None  # [B], response tokens behind each sum
    rejected_lengths: Tensor | None = None  # [B]

    @property
    def has_reference(self) -> bool:
        return self.ref_chosen is not None and self.ref_rejected is not None

    @property
    def has_lengths(self) -> bool:
        return self.chosen_lengths is not None and self.rejected_lengths is not None

    def swapped(self) -> Self:
        """The same pairs with the opposite preference."""
        return type(self)(
            self.rejected, self.chosen, self.ref_rejected, self.ref_chosen, self.rejected_lengths, self.chosen_lengths
        )

    def checked(self) -> Self:
        """The same pairs, all [B] and in float32 or better, with the reference cut from the graph.

        Raises:
            ValueError: If a field is not [B]. A [B, 1] beside a [B] would quietly make B x B losses.
            TypeError: If a log-probability is not a floating point number.
        """
        for name, values in self._asdict().items():
            if values is None:
                continue
            if values.ndim != 1 or values.shape != self.chosen.shape:
                raise ValueError(
                    f"PairLogps.{name} has shape {list(values.shape)}; every field must be [B] like `chosen`, which has "
                    f"{list(self.chosen.shape)}: one number per pair, no trailing dimension (use `.squeeze(-1)`)."
                )
            if not name.endswith("lengths") and not values.is_floating_point():
                raise TypeError(f"PairLogps.{name} must hold floating point log-probabilities, got {values.dtype}.")
        return type(self)(
            wide(self.chosen),
            wide(self.rejected),
            _constant(self.ref_chosen),
            _constant(self.ref_rejected),
            _constant(self.chosen_lengths),
            _constant(self.rejected_lengths),
        )

    def log_ratios(self) -> tuple[Tensor, Tensor]:
        """h = S - R of both sides, [B] each: how much likelier than under the reference."""
        assert self.ref_chosen is not None and self.ref_rejected is not None, "the loss's LossSpec says `needs_reference`"
        return self.chosen - self.ref_chosen, self.rejected - self.ref_rejected

    def per_token(self, chosen: Tensor, rejected: Tensor) -> tuple[Tensor, Tensor]:
        """Numbers of both sides, [B] each, divided by the tokens of their response."""
        assert self.chosen_lengths is not None and self.rejected_lengths is not None, "the loss's LossSpec says `length`"
        return chosen / self.chosen_lengths.clamp(min=1), rejected / self.rejected_lengths.clamp(min=1)

    def mean_logps(self) -> tuple[Tensor, Tensor]:
        """s = S / n of both sides, [B] each."""
        return self.per_token(self.chosen, self.rejected)


def _constant(values: Tensor | None) -> Tensor | None:
    return None if values is None else wide(values.detach())
