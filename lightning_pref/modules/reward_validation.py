"""What is said of a reward model after each validation: calibration, accuracy by source, a taste for length, its scale."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_pref.data.groups import GroupBatch, Pairs
from lightning_pref.measures.calibration import LengthBias, PairCalibration, SourceAccuracy
from lightning_pref.models.reward_models import ScoreScale
from lightning_pref.modules.group_module import sum_over_ranks


class ValidationPairs:
    """Keeps the scored pairs of a validation, a few numbers each, and measures them at its end, all ranks together."""

    def __init__(self) -> None:
        self._columns: list[Tensor] = []  # [6, B]: both rewards, both lengths, weight, place of the source
        self._sources: dict[str, int] = {}

    def add(self, rewards: Tensor, pairs: Pairs, batch: GroupBatch) -> None:
        """Add the pairs of a batch.

        Args:
            rewards: Of its responses, [R].
            pairs: Pairs of it.
            batch: Gives lengths and sources.
        """
        places = [self._sources.setdefault(source, len(self._sources)) for source in batch.sources]
        lengths = batch.response_lengths
        columns = (
            rewards[pairs.chosen],
            rewards[pairs.rejected],
            lengths[pairs.chosen],
            lengths[pairs.rejected],
            pairs.weights,
            torch.tensor(places, device=rewards.device)[pairs.group],
        )
        self._columns.append(torch.stack([column.detach().double() for column in columns]))

    def compute(self, device: torch.device) -> dict[str, Tensor]:
        """All numbers by key, and forget the pairs; nothing where no rank has a pair."""
        table = torch.cat(self._columns, 1) if self._columns else torch.empty(6, 0, dtype=torch.float64, device=device)
        # Rows of weight 0 fill batches; they are copies of rows seen elsewhere.
        table = table[:, table[4] > 0]
        own = list(self._sources)
        self._columns, self._sources = [], {}
        sources = sorted({source for names in _of_all_ranks(own) for source in names})
        if not sources:
            return {}
        chosen, rejected, chosen_lengths, rejected_lengths, _, places = table
        calibration, bias, by_source = PairCalibration().to(device), LengthBias().to(device), SourceAccuracy(sources).to(device)
        calibration.update(chosen, rejected)
        bias.update(chosen, rejected, chosen_lengths, rejected_lengths)
        renamed = torch.tensor([sources.index(name) for name in own], dtype=torch.int64, device=device)
        by_source.update(chosen, rejected, renamed[places.long()])
        length = bias.compute()
        values = {
            "rewards/calibration_error": calibration.compute().error,
            "rewards/length_correlation": length["correlation"],
            "rewards/length_balanced_accuracies": length["balanced_accuracy"],
        }
        found = by_source.compute()
        if len(sources) > 1:
            values |= {f"rewards/accuracies/{name or 'unnamed'}": found[f"{name}/accuracy"] for name in sources}
        return values


class ScaleSums:
    """Adds up the scores of each member over a validation, and gives their mean and deviation, all ranks together."""

    def __init__(self) -> None:
        self._sums: Tensor | None = None  # [3, K] float64: weights, scores, squares

    def add(self, members: Tensor, weights: Tensor) -> None:
        """Add scores, [K, R], of responses with these weights, [R]."""
        scores, weights = members.detach().double(), weights.detach().double()
        sums = torch.stack([weights.sum().expand(len(scores)), (scores * weights).sum(1), (scores.square() * weights).sum(1)])
        self._sums = sums if self._sums is None else self._sums + sums

    def compute(self, num_members: int, device: torch.device) -> ScoreScale | None:
        """The scale, and forget the scores; `None` where there were none, or where a member gives every response the same."""
        own = torch.zeros(3, num_members, dtype=torch.float64, device=device) if self._sums is None else self._sums
        self._sums = None
        weights, scores, squares = sum_over_ranks(own).cpu()
        mean = scores / weights
        std = (squares / weights - mean.square()).clamp(min=0.0).sqrt()
        return ScoreScale(mean.float(), std.float()) if bool((std > 0).all()) else None


def _of_all_ranks(own: list[str]) -> Sequence[list[str]]:
    if not (dist.is_available() and dist.is_initialized()):
        return [own]
    gathered: list[list[str]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(gathered, own)
    return gathered
