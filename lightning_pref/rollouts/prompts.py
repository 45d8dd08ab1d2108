"""Prompts as token ids, and which of them each rollout of each rank takes: every prompt once per epoch."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import NamedTuple

import numpy as np

from lightning_pref.data.formats import parse_row
from lightning_pref.data.rows import Messages, Place, Row, RowError
from lightning_pref.data.sources import RowSource
from lightning_pref.data.templates import Tokenization
from lightning_pref.rollouts.sampling import TokenIds


@dataclass(frozen=True, eq=False)
class Prompt:
    """One prompt to be answered.

    Attributes:
        row_id: Number of the row over all sources, stable over epochs and runs.
        ids: Token ids, [P], P >= 1.
        row: The row it comes from; its own responses, if it has any, are not used.
        columns: All columns of the row as they were read, for rewards that need more than the prompt.
    """

    row_id: int
    ids: TokenIds
    row: Row
    columns: Mapping[str, object]

    @property
    def text(self) -> str | Messages:
        """The prompt as the row has it: plain text or chat messages."""
        return self.row.prompt


class Drawn(NamedTuple):
    """The prompts of one rollout of one rank, as places in the list of all prompts."""

    places: tuple[int, ...]
    num_fillers: int  # of them at the end, repeated so that every rank has equally many; they count nowhere


def read_prompts(
    sources: Iterable[RowSource], tokenization: Tokenization, *, limit_rows: int | None = None, skip_bad: bool = False
) -> tuple[list[Prompt], list[RowError]]:
    """The prompts of all rows, and what was wrong with the rows that were left out.

    Args:
        sources: Where the rows come from; row numbers run on from one to the next.
        tokenization: Writes the prompt as the policy is to see it.
        limit_rows: Read this many rows at most, over all sources.
        skip_bad: Leave bad rows out; otherwise the first one raises.
    """
    found: list[Prompt] = []
    errors: list[RowError] = []
    for row_id, (place, raw) in enumerate(islice(_rows(sources), limit_rows)):
        try:
            row = parse_row(raw, place)
            if not row.prompt:
                raise RowError(
                    "no_prompt", place, "prompt", "a row without a prompt", "a column `prompt`, as text or as chat messages",
                    "Rename the column with `columns`, or remove the row.",
                )  # fmt: skip
            ids = tokenization.prompt_ids(row)
        except RowError as error:
            if not skip_bad:
                raise
            errors.append(error)
        else:
            assert isinstance(raw, Mapping), "`parse_row` refuses anything else"
            found.append(Prompt(row_id, ids, row, raw))
    if not found:
        raise ValueError(f"None of the {len(errors)} rows has a usable prompt. The first: {errors[0]}")
    return found, errors


def _rows(sources: Iterable[RowSource]) -> Iterator[tuple[Place, object]]:
    for source in sources:
        yield from source


def prompts_digest(prompts: Sequence[Prompt]) -> str:
    """Changes whenever a token of a prompt does."""
    digest = hashlib.sha256()
    for prompt in prompts:
        digest.update(np.asarray([prompt.row_id, len(prompt.ids), *prompt.ids], dtype=np.int64).tobytes())
    return digest.hexdigest()


class PromptSampler:
    """Which prompts each rollout of this rank takes. A pure function of the seed and the epoch, so nothing is communicated.

    The prompts of an epoch are spread as evenly as possible: rollouts differ by one prompt, over all ranks together, instead
    of the last one being small. Ranks get equally many; where one would go without, a repeated prompt fills its place.

    Lightning tells it the epoch through `set_epoch`.

    Args:
        num_prompts: Prompts there are.
        per_rollout: Most prompts of one rollout on one rank.
        num_replicas: Number of ranks.
        rank: This rank.
        seed: Seed of the shuffling.
    """

    def __init__(self, num_prompts: int, *, per_rollout: int, num_replicas: int = 1, rank: int = 0, seed: int = 0) -> None:
        self.num_prompts = num_prompts
        self.num_replicas = num_replicas
        self.rank = rank
        self.seed = seed
        self.num_rollouts = -(-num_prompts // (per_rollout * num_replicas))
        self.epoch = 0

    @property
    def fewest(self) -> int:
        """Fewest prompts that a rank takes in a rollout, fillers among them."""
        return -(-(self.num_prompts // self.num_rollouts) // self.num_replicas)

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def drawn(self, rollout: int) -> Drawn:
        """The prompts of a rollout, counted from 0 within the epoch."""
        order = np.random.default_rng([self.seed, self.epoch]).permutation(self.num_prompts)
        start, end = (i * self.num_prompts // self.num_rollouts for i in (rollout, rollout + 1))
        together = order[start:end]
        width = -(-len(together) // self.num_replicas)
        own = together[self.rank :: self.num_replicas]
        num_fillers = width - len(own)
        filled = np.concatenate([own, np.resize(together, num_fillers)])
        return Drawn(tuple(int(place) for place in filled), num_fillers)

    def seed_of(self, rollout: int) -> int:
        """Seed of what is random in a rollout of this rank: another one for every rollout, epoch and rank."""
        entropy = np.random.SeedSequence([self.seed, self.epoch, rollout, self.rank])
        return int(entropy.generate_state(1, np.uint64)[0] >> 1)
