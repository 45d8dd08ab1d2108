"""The playground as a source of rows: `playground`, or with a kind, a domain or both, as in `playground:preference:kitchen`."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal, get_args

from typing_extensions import override

from lightning_pref.data import playground, playground_reward, playground_text
from lightning_pref.data.files import RawRow
from lightning_pref.data.playground import RowKind, Split, playground_rows
from lightning_pref.data.playground_reward import Flaw
from lightning_pref.data.playground_text import DOMAINS, DomainName
from lightning_pref.data.rows import Place
from lightning_pref.data.sources import RowSource
from lightning_pref.domains import check_range, check_seed

NAME = "playground"


@dataclass(frozen=True, kw_only=True)
class PlaygroundSettings:
    """Rows of the embedded world, where the data is `playground`.

    Args:
        num_rows: Rows to train on.
        num_val_rows: Rows to validate on; no request of them is among the training rows.
        seed: Another seed writes other rows of the same world.
        noise: Probability, in [0, 1], that a pair is swapped, a label flipped, or a row's scores reversed.
        long_prompts: Share of prompts, in [0, 1], with a long context in front.
        num_responses: Responses of a row of the kind `ranked`, 4 if not given.
        conversational: Chat messages; else plain text.
        flaw: Order and score by a proxy reward with this flaw, not by the gold reward.
    """

    num_rows: int = 2000
    num_val_rows: int = 200
    seed: int = 0
    noise: float = 0.0
    long_prompts: float = 0.3
    num_responses: int | None = None
    conversational: bool = True
    flaw: Flaw | None = None

    def __post_init__(self) -> None:
        check_range("playground.num_rows", self.num_rows, at_least=1)
        check_range("playground.num_val_rows", self.num_val_rows, at_least=0)
        check_seed("playground.seed", self.seed)
        check_range("playground.noise", self.noise, at_least=0, at_most=1)
        check_range("playground.long_prompts", self.long_prompts, at_least=0, at_most=1)
        check_range("playground.num_responses", self.num_responses, at_least=2)


def is_playground(source: str) -> bool:
    """Whether a source names the playground."""
    return source.partition(":")[0] == NAME


class PlaygroundRows(RowSource):
    """Rows of the playground, written when they are read.

    Args:
        source: "playground", with ":" and a kind of rows (preference pairs if not given), ":" and a domain (both if not given).
        settings: What the rows are like.
        split: Training or validation rows.
    """

    def __init__(self, source: str, settings: PlaygroundSettings, split: Split) -> None:
        super().__init__(f"{source} ({split})")
        words = source.split(":")[1:]
        kinds: list[RowKind] = [kind for kind in get_args(RowKind) if kind != "prompts"]
        domains: list[DomainName] = list(DOMAINS)
        unknown = [word for word in words if word not in (*kinds, *domains)]
        if unknown:
            raise ValueError(
                f"The playground has no {unknown[0]!r} (in {source!r}); after `{NAME}:` comes a kind of rows "
                f"({', '.join(kinds)}), a domain ({', '.join(domains)}), or both as in `{NAME}:{kinds[0]}:{domains[0]}`."
            )
        self._kind: RowKind = next((kind for kind in kinds if kind in words), "preference")
        self._domain: DomainName | Literal["both"] = next((domain for domain in domains if domain in words), "both")
        self._settings = settings
        self._split = split

    @property
    @override
    def num_rows(self) -> int:
        return self._settings.num_rows if self._split == "train" else self._settings.num_val_rows

    @override
    def digest_parts(self) -> tuple[str, ...]:
        # The rows are a function of the settings and of the code that writes them.
        code = [Path(str(module.__file__)).read_bytes() for module in (playground, playground_reward, playground_text)]
        settings = json.dumps(asdict(self._settings) | {"num_rows": self.num_rows, "num_val_rows": 0}, sort_keys=True)
        return (self._kind, self._domain, self._split, settings, hashlib.sha256(b"".join(code)).hexdigest())

    @override
    def _rows(self) -> Iterator[tuple[Place, RawRow]]:
        rows = playground_rows(
            self._kind,
            self.num_rows,
            self._settings.seed,
            domain=self._domain,
            split=self._split,
            noise=self._settings.noise,
            long_prompts=self._settings.long_prompts,
            num_responses=self._settings.num_responses,
            conversational=self._settings.conversational,
            flaw=self._settings.flaw,
        )
        for number, row in enumerate(rows, start=1):
            yield Place(self.name, number), row
