"""Any preference data as a LightningDataModule."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Literal

import lightning as L
import numpy as np
import torch
from lightning.fabric.utilities.warnings import PossibleUserWarning
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from transformers import PreTrainedTokenizerBase
from typing_extensions import override

from lightning_pref.data.groups import GroupBatch
from lightning_pref.data.loading import OnBadRow, load_groups
from lightning_pref.data.playground import Split
from lightning_pref.data.playground_source import PlaygroundRows, PlaygroundSettings, is_playground
from lightning_pref.data.rendering import check_template
from lightning_pref.data.replay import check_choice, column_values, kept_by_chance, kept_by_value, with_replay
from lightning_pref.data.run_place import KeepsPlace
from lightning_pref.data.sampler import GroupBatches, GroupBatchSampler, GroupLoader
from lightning_pref.data.source_choice import check_held_out, check_sources, holds_out
from lightning_pref.data.sources import read_rows
from lightning_pref.data.store import GroupStore, GroupSubset, GroupTable
from lightning_pref.data.templates import Tokenization
from lightning_pref.data.truncation import Limits, Truncation
from lightning_pref.domains import check_range, check_seed
from lightning_pref.models.backbones import given_tokenizer

Part = Literal["train", "val", "replay"]

log = logging.getLogger(__name__)

# Where neither bound of a batch is given: four pairs of 2048 tokens, or many short ones.
DEFAULT_MAX_TOKENS = 8192

# Where nothing is said about validation.
DEFAULT_VAL_SIZE = 0.05


class PreferenceData(KeepsPlace, L.LightningDataModule):
    """Preference pairs, ranked lists, labelled answers or demonstrations, from files, the hub or the playground.

    Rows are tokenised once into a memory-mapped cache that is found again by the content of everything it depends on. What a
    row is (a pair, a list, ...) is recognised by its columns.

    Args:
        train: Training data: a file (.jsonl, .json, .csv, .parquet, .arrow), a folder saved by `datasets`, a hub id, or
            `playground`, with a kind and a domain if wanted (`playground:preference:kitchen`). Several make one data set.
        val: Validation data; if not given, training rows are held out (see `val_size`). The playground brings its own.
        val_size: Rows to hold out for validation: a share of the rows below 1, else their number; 0 for none. Chosen by a
            hash of the prompt, so that they are the same in every run and no prompt is on both sides. 0.05 if not given.
        split: Split of the training folder or hub data set.
        val_split: Split of the validation folder or hub data set; of the training one where `val` is not given.
        subset: Configuration of a hub data set that has several.
        revision: Branch, tag or commit of hub data sets.
        columns: Columns by the names they have there, {name here: name there}, such as `{chosen: preferred}`.
        limit_rows: Read only that many training rows.
        on_bad_row: `error` stops at the first row that cannot be used, `skip` leaves such rows out and counts them by reason.
        tokenizer: Folder, hub id or object. Recipes fill in that of the model.
        chat_template: Text or file of a Jinja template that replaces the tokenizer's own.
        template_date: The day (ISO) that templates which print a date are told.
        step_separator: Written after each step of a stepwise-labelled row.
        max_length: Most tokens of prompt and response together.
        max_prompt_length: Most tokens of the prompt.
        truncation: What is kept of longer rows: `keep_start` cuts the ends of responses, `keep_end` the start of the prompt,
            `drop` leaves such rows out. A response is never left empty.
        max_tokens_per_batch: Most tokens of a batch on one device, a prompt that several responses share counted once. 8192 if
            neither this nor `batch_size` is given.
        batch_size: Most rows (prompts with all their responses) of a batch on one device.
        replay: Old data of which a part is mixed into every epoch, so that it is not forgotten; sources as for `train`, read
            with the same settings.
        replay_share: Share of `replay` rows among the rows of an epoch, in (0, 1), met to the nearest row. The same rows in
            every epoch; repeated equally often where there are too few.
        keep_rows: Train on a part of the training rows only: a share of them below 1, else their number.
        keep_rows_by: Column of the source by which the part is chosen: the rows of its highest values, or of its lowest ones
            with a minus in front (`-perplexity`). By chance if not given.
        seed: Seed of the order of the rows, and of what `keep_rows` and `replay` choose by chance.
        num_workers: Processes that prepare batches. A batch takes about a millisecond, so 0 (none) is rarely too slow.
        cache_dir: Folder of the tokenised data; `lightning_pref` in the user's cache folder if not given.
        playground: What the rows of the playground are like.
    """

    def __init__(
        self,
        train: str | list[str] = "playground",
        val: str | list[str] | None = None,
        *,
        val_size: float | None = None,
        split: str | None = None,
        val_split: str | None = None,
        subset: str | None = None,
        revision: str | None = None,
        columns: dict[str, str] | None = None,
        limit_rows: int | None = None,
        on_bad_row: OnBadRow = "error",
        tokenizer: str | PreTrainedTokenizerBase | None = None,
        chat_template: str | None = None,
        template_date: str | None = None,
        step_separator: str = "\n",
        max_length: int | None = None,
        max_prompt_length: int | None = None,
        truncation: Truncation = "keep_start",
        max_tokens_per_batch: int | None = None,
        batch_size: int | None = None,
        replay: str | list[str] | None = None,
        replay_share: float | None = None,
        keep_rows: float | None = None,
        keep_rows_by: str | None = None,
        seed: int = 0,
        num_workers: int = 0,
        cache_dir: str | None = None,
        playground: PlaygroundSettings = PlaygroundSettings(),  # noqa: B008  # frozen
    ) -> None:
        super().__init__()
        self.train_sources = [train] if isinstance(train, str) else train
        self.val_sources = [val] if isinstance(val, str) else val
        self.val_size = val_size
        self.split = split
        self.val_split = val_split
        self.subset = subset
        self.revision = revision
        self.columns = columns
        self.limit_rows = limit_rows
        self.on_bad_row = on_bad_row
        self.tokenizer = tokenizer
        self.chat_template = chat_template
        self.template_date = template_date
        self.step_separator = step_separator
        self.max_length = max_length
        self.max_prompt_length = max_prompt_length
        self.truncation = truncation
        unbounded = max_tokens_per_batch is None and batch_size is None
        self.max_tokens_per_batch = DEFAULT_MAX_TOKENS if unbounded else max_tokens_per_batch
        self.batch_size = batch_size
        self.replay_sources = [replay] if isinstance(replay, str) else replay
        self.replay_share = replay_share
        self.keep_rows = keep_rows
        self.keep_rows_by = keep_rows_by
        self.seed = seed
        self.num_workers = num_workers
        self.cache_folder = Path(cache_dir) if cache_dir is not None else default_cache_folder()
        self.playground = playground
        self._tables: tuple[GroupTable, GroupTable | None] | None = None
        self._check()

    def _check(self) -> None:
        Limits(max_length=self.max_length, max_prompt_length=self.max_prompt_length, truncation=self.truncation)
        check_range("max_tokens_per_batch", self.max_tokens_per_batch, at_least=1)
        check_range("batch_size", self.batch_size, at_least=1)
        check_range("num_workers", self.num_workers, at_least=0)
        check_seed("seed", self.seed)
        check_template(self.chat_template, self.template_date)
        of_files = {name: getattr(self, name) for name in ("split", "val_split", "subset", "revision", "columns")}
        others = (self.val_sources or []) + (self.replay_sources or [])
        check_sources(self.train_sources, others, of_files, self.playground, limit_rows=self.limit_rows)
        check_held_out(self.train_sources, self.val_sources, self.val_split, self.val_size)
        check_choice(self.replay_sources, self.replay_share, self.keep_rows, self.keep_rows_by)

    @property
    def _holds_out(self) -> bool:
        return holds_out(self.train_sources, self.val_sources, self.val_split)

    @property
    def loaded_tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer, loaded on first use where it was given by name."""
        self.tokenizer = given_tokenizer(self.tokenizer)
        return self.tokenizer

    @property
    def tokenization(self) -> Tokenization:
        """How rows become token ids."""
        return Tokenization(
            self.loaded_tokenizer,
            chat_template=self.chat_template,
            template_date=self.template_date,
            max_length=self.max_length,
            max_prompt_length=self.max_prompt_length,
            truncation=self.truncation,
            step_separator=self.step_separator,
        )

    @property
    def tokenizer_digest(self) -> str:
        """Changes whenever rows would get other token ids."""
        return self.tokenization.digest()

    @property
    def train_table(self) -> GroupTable:
        """The training groups, after `setup`."""
        return self._set_up()[0]

    @property
    def val_table(self) -> GroupTable | None:
        """The validation groups, after `setup`; `None` if there is no validation."""
        return self._set_up()[1]

    @property
    def digest(self) -> str:
        """Changes whenever a token, a rank or a weight of the data does."""
        digests = [None if table is None else table.digest for table in self._set_up()]
        return hashlib.sha256(json.dumps(digests).encode()).hexdigest()

    def _set_up(self) -> tuple[GroupTable, GroupTable | None]:
        if self._tables is None:
            raise RuntimeError("The data is not loaded yet; call `prepare_data()` and `setup('fit')` first, as a Trainer does.")
        return self._tables

    @override
    def prepare_data(self) -> None:
        """Tokenise what is not in the cache; Lightning calls it in one process of each machine."""
        self._load("train", announce=False)
        self._load("val", announce=False)
        self._load("replay", announce=False)

    @override
    def setup(self, stage: str) -> None:
        """Open the cache, in every process; it is the same data for all stages."""
        if self._tables is not None:
            return
        announce = self.trainer is None or self.trainer.is_global_zero
        train, val = self._load("train", announce=announce), self._load("val", announce=announce)
        assert train is not None, "`_check` wants training data"
        size = DEFAULT_VAL_SIZE if self.val_size is None else self.val_size
        new, held = hold_out(train, size) if self._holds_out and size else (train, val)
        self._tables = self._mixed(self._kept(new), held, announce=announce), held

    def _kept(self, table: GroupTable) -> GroupTable:
        """The part of the training rows that `keep_rows` leaves."""
        if self.keep_rows is None:
            return table
        if self.keep_rows_by is None:
            return kept_by_chance(table, self.keep_rows, self.seed)
        sources = [
            read_rows(source, split=self.split, subset=self.subset, revision=self.revision) if isinstance(source, str) else source
            for source in self._sources_of("train")
        ]
        column = self.keep_rows_by.removeprefix("-")
        values = column_values(sources, column, table.row_ids)
        return kept_by_value(table, self.keep_rows, values, lowest=column != self.keep_rows_by)

    def _mixed(self, table: GroupTable, held: GroupTable | None, *, announce: bool) -> GroupTable:
        """The training rows, with old ones among them where that is asked for."""
        old = self._load("replay", announce=announce)
        if old is None or self.replay_share is None:
            return table
        mixed = with_replay(table, old, self.replay_share, self.seed, unwanted=held)
        if announce:
            log.info("%d of %d training rows are replayed from %s", len(mixed.second), len(mixed), self.replay_sources)
        return mixed

    def _sources_of(self, part: Part) -> list[str | PlaygroundRows]:
        if part == "replay":
            names = self.replay_sources or []
        else:
            names = self.train_sources if part == "train" or self.val_sources is None else self.val_sources
        split: Split = "val" if part == "val" else "train"
        return [PlaygroundRows(name, self.playground, split) if is_playground(name) else name for name in names]

    def _load(self, part: Part, *, announce: bool) -> GroupStore | None:
        """The store of one part of the data; `None` where there is none, or it is held out of the training data."""
        sources = self._sources_of(part)
        if part == "val" and (self._holds_out or not (self.val_sources or self.val_split or self.playground.num_val_rows)):
            return None
        if not sources:
            return None
        return load_groups(
            sources,
            self.tokenization,
            vocab_size=max(self.loaded_tokenizer.get_vocab().values()) + 1,
            cache_dir=self.cache_folder / "tokens",
            split=self.val_split if part == "val" else self.split,
            subset=self.subset,
            revision=self.revision,
            columns=self.columns,
            limit_rows=self.limit_rows if part == "train" else None,
            on_bad_row=self.on_bad_row,
            announce=announce,
        )

    @override
    def train_dataloader(self) -> GroupLoader:
        accumulate: int | Callable[[int], int] = 1
        limit_batches: int | float = 1.0
        if (trainer := self.trainer) is not None:
            if trainer.overfit_batches:  # type: ignore[attr-defined]  # Lightning sets it from another file
                raise ValueError(
                    "`overfit_batches` makes Lightning replace the sampler, which plans whole batches here. To overfit a few "
                    "rows, set `limit_rows` of the data to their number."
                )
            schedulers = [c for c in trainer.callbacks if isinstance(c, GradientAccumulationScheduler)]  # type: ignore[attr-defined]
            accumulate = schedulers[0].get_accumulate_grad_batches if schedulers else trainer.accumulate_grad_batches
            limit_batches = trainer.limit_train_batches
        loader = self._loader(
            self.train_table, shuffle=True, accumulate=accumulate, limit_batches=limit_batches, **self._own_rank()
        )
        assert isinstance(loader.sampler, GroupBatchSampler), "`_loader` makes it so"
        self._goes_on_by(loader.sampler.resume)
        return loader

    @override
    def val_dataloader(self) -> GroupLoader | list[GroupLoader]:
        if self.val_table is None:
            # An empty list is how Lightning is told that there is no validation; it wonders about it all the same.
            warnings.filterwarnings("ignore", message="Total length of `list` across ranks is zero", category=UserWarning)
            return []
        return self._loader(self.val_table, shuffle=False, **self._own_rank())

    def every_batch(self, table: GroupTable, rank: int = 0, num_replicas: int = 1) -> Iterable[GroupBatch]:
        """All groups of a table in their own order, or one rank's share of them."""
        return self._loader(table, shuffle=False, rank=rank, num_replicas=num_replicas)

    def _own_rank(self) -> dict[str, int]:
        """This rank, and the number of ranks that see different data."""
        trainer = self.trainer
        place = None if trainer is None else trainer.distributed_sampler_kwargs
        return {"rank": place["rank"], "num_replicas": place["num_replicas"]} if place else {}

    def _loader(
        self,
        table: GroupTable,
        *,
        shuffle: bool,
        rank: int = 0,
        num_replicas: int = 1,
        accumulate: int | Callable[[int], int] = 1,
        limit_batches: int | float = 1.0,
    ) -> GroupLoader:
        # Lightning asks for workers wherever it sees fewer than two; see `num_workers`.
        warnings.filterwarnings("ignore", message=".*does not have many workers", category=PossibleUserWarning)
        batches = GroupBatches(table)
        sampler = GroupBatchSampler(
            batches,
            num_replicas=num_replicas,
            rank=rank,
            max_tokens_per_batch=self.max_tokens_per_batch,
            batch_size=self.batch_size,
            accumulate=accumulate,
            limit_batches=limit_batches,
            seed=self.seed,
            shuffle=shuffle,
        )
        return GroupLoader(
            batches,
            batch_size=None,
            sampler=sampler,
            num_workers=self.num_workers,
            generator=torch.Generator().manual_seed(self.seed),
            persistent_workers=self.num_workers > 0,
            pin_memory=self.trainer is not None and self.trainer.strategy.root_device.type == "cuda",
        )

    @override
    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        # Any: Lightning's own signature. Lightning itself would wait for each copy.
        return batch.to(device, non_blocking=True)


def hold_out(table: GroupTable, size: float) -> tuple[GroupSubset, GroupSubset]:
    """Training and validation rows, told apart by a hash of the prompt: rows with equal prompts stay together.

    Args:
        table: All rows.
        size: Share of the rows to hold out where below 1, else their number; a few more where prompts repeat.
    """
    wanted = max(1, round(size * len(table))) if size < 1 else round(size)
    keys = np.asarray(table.prompt_keys)
    held = keys <= np.sort(keys)[min(wanted, len(keys)) - 1]
    if held.all():
        raise ValueError(
            f"Holding out {wanted} of {len(table)} rows for validation leaves none to train on (rows with equal prompts stay "
            f"together; there are {len(np.unique(keys))} prompts). Lower `val_size`, or give validation data by `val`."
        )
    return GroupSubset(table, np.flatnonzero(~held)), GroupSubset(table, np.flatnonzero(held))


def default_cache_folder() -> Path:
    """`lightning_pref` in the user's cache folder."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lightning_pref"
