"""Preference losses as logic (arXiv:2412.17696): a loss is a choice of which joint outcomes are good and which are bad.

Each atom is a statement such as "the model accepts the chosen response", true with the response's probability and
independent of the others. With n atoms there are 2^n joint outcomes (rows of a truth table). A structure marks every row as
good, bad, both or neither, and its loss is a link on log(probability of the good rows / probability of the bad rows).
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from lightning_pref.functional import log1mexp
from lightning_pref.losses import links
from lightning_pref.losses.pair import PairLogps
from lightning_pref.losses.rewards import MAX_MEAN_LOGP
from lightning_pref.losses.spec import LossSpec


@dataclass(frozen=True)
class PreferenceStructure:
    """Good and bad rows of a truth table as bit masks: bit r stands for the row where atom k is true iff bit k of r is set.

    >>> structure = PreferenceStructure.of(good={"10"}, bad={"01"})
    >>> ratio = structure.log_ratio(torch.tensor([0.5, 0.25]).log()).exp()  # odds of 1/2 over odds of 1/4
    >>> round(ratio.item(), 4)
    3.0
    """

    good: int
    bad: int
    num_atoms: int = 2

    @classmethod
    def of(cls, good: set[str], bad: set[str]) -> "PreferenceStructure":
        """From rows written out, first atom first: "10" is the row where only the first of two atoms is true."""
        rows = good | bad
        if not rows or len({len(row) for row in rows}) != 1 or any(set(row) - {"0", "1"} for row in rows):
            raise ValueError(f"Rows must be words of one length over 0 and 1, got good={good!r} and bad={bad!r}.")

        def mask(side: set[str]) -> int:
            return sum(1 << sum(1 << atom for atom, value in enumerate(row) if value == "1") for row in side)

        return cls(mask(good), mask(bad), len(next(iter(rows))))

    @property
    def is_constant(self) -> bool:
        """Whether the ratio is the same for all probabilities: equal or empty sets of rows, and no others."""
        return self.good == self.bad or self.good == 0 or self.bad == 0

    def log_ratio(self, logps: Tensor) -> Tensor:
        """log P(good) - log P(bad), from the log-probability of each atom, [..., n] -> [...]; all below 0."""
        rows = torch.stack([_row_logp(logps, row) for row in range(2**self.num_atoms)], dim=-1)
        return _logsumexp_of(rows, self.good) - _logsumexp_of(rows, self.bad)

    def entails(self, other: "PreferenceStructure") -> bool:
        """Whether every good row of this one is good in the other, and every bad row of the other is bad in this one.

        The other's ratio is then never smaller, and its loss never larger, whatever the probabilities and falling link.
        """
        return self.good & ~other.good == 0 and other.bad & ~self.bad == 0

    def neighbours(self) -> Iterator["PreferenceStructure"]:
        """The structures that differ in one mark of one row."""
        for row in range(2**self.num_atoms):
            yield PreferenceStructure(self.good ^ 1 << row, self.bad, self.num_atoms)
            yield PreferenceStructure(self.good, self.bad ^ 1 << row, self.num_atoms)


# Two atoms: the chosen response is accepted, the rejected response is accepted.
STRUCTURES: dict[str, PreferenceStructure] = {
    "cpo": PreferenceStructure.of(good={"11", "10"}, bad={"11", "01"}),
    "orpo": PreferenceStructure.of(good={"10"}, bad={"01"}),
    "constrained_cpo": PreferenceStructure.of(good={"11", "10"}, bad={"01"}),
    "implication": PreferenceStructure.of(good={"11", "10", "00"}, bad={"01"}),
    "chosen_only": PreferenceStructure.of(good={"11", "10"}, bad={"01", "00"}),
    "rejected_only": PreferenceStructure.of(good={"10", "00"}, bad={"11", "01"}),
    "both": PreferenceStructure.of(good={"10"}, bad={"11", "01", "00"}),
}

LINKS: dict[links.Link, Callable[[Tensor], Tensor]] = {
    "logistic": links.logistic,
    "hinge": links.hinge,
    "square": links.square,
}


def all_structures(num_atoms: int = 2) -> Iterator[PreferenceStructure]:
    """The 4^(2^n) structures over n atoms.

    >>> sum(not structure.is_constant for structure in all_structures())
    210
    """
    num_masks = 2 ** (2**num_atoms)
    return (PreferenceStructure(good, bad, num_atoms) for good in range(num_masks) for bad in range(num_masks))


def compile_structure(structure: PreferenceStructure, *, link: links.Link = "logistic") -> LossSpec:
    """A two-atom structure as a pairwise loss with the option `beta`, for use in `preference_loss`.

    A response's probability is that of its mean token: with the probability of a whole response, e^-200, "not accepted" is
    certain in float32, and structures that differ there are one.
    """
    if structure.num_atoms != 2 or structure.is_constant:
        raise ValueError(
            f"{structure} makes no loss of pairs: it needs two atoms (chosen, rejected), good rows, bad rows, and a difference "
            "between them."
        )
    return LossSpec(
        fn=partial(_structure_loss, structure, LINKS[link]),
        formula=f"{link}(beta * log(P(good) / P(bad)))",
        source="arXiv:2412.17696",
        length="mean",
    )


def _structure_loss(
    structure: PreferenceStructure, link: Callable[[Tensor], Tensor], pair: PairLogps, *, beta: float = 1.0
) -> Tensor:
    logps = torch.stack(pair.mean_logps(), dim=-1).clamp(max=MAX_MEAN_LOGP)
    return link(beta * structure.log_ratio(logps))


def _row_logp(logps: Tensor, row: int) -> Tensor:
    is_true = torch.tensor([bool(row >> atom & 1) for atom in range(logps.shape[-1])], device=logps.device)
    return torch.where(is_true, logps, log1mexp(logps)).sum(-1)


def _logsumexp_of(rows: Tensor, mask: int) -> Tensor:
    picked = [row for row in range(rows.shape[-1]) if mask >> row & 1]
    return rows[..., picked].logsumexp(-1)
