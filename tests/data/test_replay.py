"""Old rows mixed in and new rows left out: exactly as many as asked for, the same in every epoch, part of the digest."""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from speakers import quiet_trainer
from torch import Tensor

from lightning_pref.data.datamodule import PreferenceData
from lightning_pref.data.groups import GroupBatch, PromptGroup
from lightning_pref.data.playground_source import PlaygroundSettings
from lightning_pref.data.playground_tokenizer import playground_tokenizer
from lightning_pref.data.replay import JoinedTables, kept_by_chance, kept_by_value, num_kept, with_replay
from lightning_pref.data.store import GroupStore, GroupStoreWriter

TOKENIZER = playground_tokenizer()

Data = Callable[..., PreferenceData]


def write_pairs(path: Path, count: int, word: str, **columns: list[Any]) -> str:
    rows = [
        {
            "prompt": f"{word} {i}?",
            "chosen": f" Yes {i}.",
            "rejected": " No.",
            "source": word,
            **{name: values[i] for name, values in columns.items()},
        }
        for i in range(count)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def new(tmp_path: Path) -> str:
    return write_pairs(tmp_path / "new.jsonl", 30, "new")


@pytest.fixture
def old(tmp_path: Path) -> str:
    return write_pairs(tmp_path / "old.jsonl", 50, "old")


@pytest.fixture
def build(tmp_path: Path) -> Data:
    def build(train: str | list[str], **given: Any) -> PreferenceData:
        defaults = {"tokenizer": TOKENIZER, "cache_dir": str(tmp_path / "cache"), "val_size": 0, "batch_size": 4}
        data = PreferenceData(train, **{**defaults, **given})
        data.prepare_data()
        data.setup("fit")
        return data

    return build


def groups(data: PreferenceData) -> list[PromptGroup]:
    return [data.train_table[i] for i in range(len(data.train_table))]


class Recorder(L.LightningModule):
    """Notes the rows of every epoch."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.epochs: dict[int, list[tuple[int, str]]] = {}

    def training_step(self, batch: GroupBatch, batch_idx: int) -> Tensor:
        rows = self.epochs.setdefault(self.current_epoch, [])
        rows += zip(batch.row_ids.tolist(), batch.sources, strict=True)
        return self.weight * 1.0

    def validation_step(self, batch: GroupBatch, batch_idx: int) -> None:
        pass

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(data: PreferenceData, folder: Path) -> Recorder:
    module = Recorder()
    trainer = quiet_trainer(max_epochs=3, default_root_dir=folder)
    trainer.fit(module, data)
    return module


@pytest.mark.parametrize(("share", "expected"), [(0.25, 10), (0.5, 30), (0.1, 3), (0.001, 1)])
def test_a_trainer_sees_exactly_the_wanted_share_of_old_rows_in_every_epoch(
    tmp_path: Path, build: Data, new: str, old: str, share: float, expected: int
) -> None:
    """30 new rows and n old ones: n / (n + 30) is the share."""
    module = fit(build(new, replay=old, replay_share=share), tmp_path)
    assert len(module.epochs) == 3
    for rows in module.epochs.values():
        assert Counter(source for _, source in rows) == {"new": 30, "old": expected}
        assert max(Counter(row for row, _ in rows).values()) == 1, "row ids stay unique"
        assert sorted(rows) == sorted(module.epochs[0])
    assert module.epochs[0] != module.epochs[1] or len(module.epochs[0]) < 3, "in another order"


@pytest.mark.parametrize("ranks", [2, 3])
def test_the_ranks_see_the_old_rows_once_between_them(build: Data, new: str, old: str, ranks: int) -> None:
    data = build(new, replay=old, replay_share=0.4)
    parts = [list(data.every_batch(data.train_table, rank, ranks)) for rank in range(ranks)]
    sources = [
        source
        for part in parts
        for batch in part
        for source, weight in zip(batch.sources, batch.weights.tolist(), strict=True)
        if weight
    ]
    assert Counter(sources) == {"new": 30, "old": 20}


def test_windows_count_replayed_rows_like_all_others(build: Data, new: str, old: str) -> None:
    data = build(new, replay=old, replay_share=0.25)
    batches = list(data.train_dataloader())
    assert sum(batch.num_groups for batch in batches) == 40
    assert all(batch.window is not None and batch.window.groups == batch.num_groups for batch in batches)
    assert sorted(number for batch in batches for number in batch.response_ids.tolist()) == list(range(80))


def test_replayed_rows_are_those_of_their_source_with_ids_after_all_others(build: Data, new: str, old: str) -> None:
    alone = groups(build(old))
    mixed = build(new, replay=old, replay_share=0.25)
    assert isinstance(mixed.train_table, JoinedTables)
    shift = mixed.train_table.row_id_shift
    assert mixed.train_table.row_ids.tolist() == [group.row_id for group in groups(mixed)]
    for group in groups(mixed)[30:]:
        original = alone[group.row_id - shift]
        assert group.row_id >= 30
        assert group.prompt.tolist() == original.prompt.tolist()
        assert [r.tolist() for r in group.responses] == [r.tolist() for r in original.responses]
        assert (group.ranks, group.source) == (original.ranks, "old")


def test_few_old_rows_are_repeated_equally_often(build: Data, new: str, tmp_path: Path) -> None:
    few = write_pairs(tmp_path / "few.jsonl", 7, "few")
    counts = Counter(group.row_id for group in groups(build(new, replay=few, replay_share=0.4)) if group.source == "few")
    assert sum(counts.values()) == 20
    assert sorted(counts.values()) == [2] + [3] * 6


def test_prompts_of_the_validation_are_not_replayed(build: Data, tmp_path: Path) -> None:
    path = write_pairs(tmp_path / "both.jsonl", 40, "both")
    data = build(path, val_size=10, replay=path, replay_share=0.5)
    assert data.val_table is not None
    held = set(data.val_table.prompt_keys.tolist())
    assert len(data.train_table) == 60
    assert not held & set(data.train_table.prompt_keys.tolist())
    with pytest.raises(ValueError, match="All 40 rows to replay have prompts that are held out.*other `replay` data"):
        build(path, val_size=None, val=path, replay=path, replay_share=0.5)


def test_a_domain_of_the_playground_is_replayed_beside_another(build: Data) -> None:
    rows = PlaygroundSettings(num_rows=12, num_val_rows=0)
    data = build(
        "playground:sft:travel",
        replay="playground:sft:kitchen",
        replay_share=0.25,
        playground=rows,
        val_size=None,
    )
    assert Counter(group.source for group in groups(data)) == {"travel": 12, "kitchen": 4}


def test_what_is_replayed_is_said_once(build: Data, new: str, old: str, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="lightning_pref.data"):
        build(new, replay=old, replay_share=0.25)
    assert [r.message for r in caplog.records if "are replayed" in r.message] == [
        f"10 of 40 training rows are replayed from {[old]}"
    ]


def test_a_trainer_sees_a_fixed_part_of_the_rows_in_every_epoch(tmp_path: Path, build: Data, new: str) -> None:
    seen = fit(build(new, keep_rows=0.4), tmp_path).epochs
    kept = {tuple(sorted(rows)) for rows in seen.values()}
    assert len(kept) == 1
    assert len(next(iter(kept))) == 12
    assert len(seen) == 3


def test_the_part_is_chosen_by_the_seed_and_holds_every_smaller_part(build: Data, new: str) -> None:
    def rows(**given: Any) -> list[int]:
        return build(new, **given).train_table.row_ids.tolist()

    assert rows(keep_rows=12) == rows(keep_rows=0.4) == sorted(rows(keep_rows=12))
    assert rows(keep_rows=12) != rows(keep_rows=12, seed=1)
    assert rows(keep_rows=12) != list(range(12))
    assert set(rows(keep_rows=5)) < set(rows(keep_rows=12))
    assert rows(keep_rows=30) == list(range(30))


def test_rows_are_kept_by_the_values_of_a_column(build: Data, tmp_path: Path) -> None:
    quality = [0.1, 0.9, 0.5, 0.9, -2, 7]
    path = write_pairs(tmp_path / "scored.jsonl", 6, "scored", quality=quality)
    assert build(path, keep_rows=3, keep_rows_by="quality").train_table.row_ids.tolist() == [1, 3, 5]
    assert build(path, keep_rows=2, keep_rows_by="quality").train_table.row_ids.tolist() == [1, 5], "the earlier of equals"
    assert build(path, keep_rows=0.5, keep_rows_by="-quality").train_table.row_ids.tolist() == [0, 2, 4]
    names = {"prompt": "prompt", "chosen": "chosen", "rejected": "rejected"}
    assert build(path, columns=names, keep_rows=1, keep_rows_by="quality").train_table.row_ids.tolist() == [5]


def test_values_follow_their_rows_over_files_bad_rows_and_held_out_ones(build: Data, tmp_path: Path) -> None:
    first = tmp_path / "first.csv"
    first.write_text("prompt,chosen,rejected,quality\n" + "".join(f"Q{i}?, Yes., {w}.,{i}\n" for i, w in enumerate("abcd")))
    second = write_pairs(tmp_path / "second.jsonl", 4, "second", quality=[9.5, None, 0.5, 2.5])
    text = Path(second).read_text().replace('" Yes 1."', '""')  # a bad row, which needs no value
    Path(second).write_text("{broken\n" + text)
    data = build([str(first), second], on_bad_row="skip", keep_rows=3, keep_rows_by="quality")
    assert data.train_table.row_ids.tolist() == [3, 5, 8]
    with_held = build([str(first), second], on_bad_row="skip", val_size=2, keep_rows=4, keep_rows_by="quality")
    assert with_held.val_table is not None
    assert not set(with_held.val_table.row_ids.tolist()) & set(with_held.train_table.row_ids.tolist())


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (None, r"row 2, field `quality`: found null; expected a finite number to choose rows by. Fix or remove the row"),
        ("good", r"row 2, field `quality`: found the text 'good'; expected a finite number.*another column in `keep_rows_by`"),
    ],
)
def test_a_row_without_a_value_is_named(build: Data, tmp_path: Path, value: object, message: str) -> None:
    path = write_pairs(tmp_path / "scored.jsonl", 3, "scored", quality=[1.0, value, 2.0])
    with pytest.raises(ValueError, match=message):
        build(path, keep_rows=2, keep_rows_by="quality")


def test_a_column_that_is_not_there_is_named_with_those_that_are(build: Data, new: str) -> None:
    with pytest.raises(
        ValueError, match=r"found no column 'perplexity' but chosen, prompt, rejected, source; expected the one in"
    ):
        build(new, keep_rows=2, keep_rows_by="-perplexity")


def test_more_rows_than_there_are_cannot_be_kept(build: Data, new: str) -> None:
    with pytest.raises(ValueError, match="`keep_rows` is 31, but there are only 30 rows to train on; lower it"):
        build(new, keep_rows=31)


def test_the_part_is_taken_first_and_the_share_is_of_what_is_left(build: Data, new: str, old: str) -> None:
    data = build(new, keep_rows=0.5, replay=old, replay_share=0.25)
    assert Counter(group.source for group in groups(data)) == {"new": 15, "old": 5}


def test_every_choice_changes_the_digest_and_only_a_choice_does(build: Data, new: str, old: str) -> None:
    settings: list[dict[str, Any]] = [
        {},
        {"keep_rows": 10},
        {"keep_rows": 10, "seed": 1},
        {"keep_rows": 11},
        {"replay": old, "replay_share": 0.2},
        {"replay": old, "replay_share": 0.2, "seed": 1},
        {"replay": old, "replay_share": 0.3},
        {"replay": new, "replay_share": 0.2},
    ]
    digests = [build(new, **given).digest for given in settings]
    assert len(set(digests)) == len(settings)
    assert digests == [build(new, **given).digest for given in settings]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"replay": []}, "`replay` names no data; give a source as for `train`"),
        ({"replay_share": 0.2}, "`replay_share` is 0.2, but there is nothing to replay; name the old data by `replay`"),
        ({"replay": "old.jsonl"}, "`replay` needs a `replay_share` in .0, 1., the share of old rows among all, got None"),
        ({"replay": "old.jsonl", "replay_share": 1.0}, "`replay` needs a `replay_share` in .0, 1..* got 1.0"),
        ({"keep_rows": 0}, "`keep_rows` is a share below 1 or a number of rows, got 0"),
        ({"keep_rows": 2.5}, "`keep_rows` is a share below 1 or a number of rows, got 2.5"),
        ({"keep_rows_by": "quality"}, "`keep_rows_by` is 'quality', but all rows are kept; say how many by `keep_rows`"),
    ],
)
def test_a_setting_without_effect_or_sense_raises(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PreferenceData("new.jsonl", **given)


def test_settings_of_files_count_for_what_is_replayed(build: Data, tmp_path: Path) -> None:
    old = tmp_path / "old.jsonl"
    old.write_text("".join(json.dumps({"q": f"Q{i}?", "good": " Yes.", "bad": " No."}) + "\n" for i in range(9)))
    columns = {"prompt": "q", "chosen": "good", "rejected": "bad"}
    data = build(
        "playground",
        val_size=None,
        playground=PlaygroundSettings(num_rows=6, num_val_rows=0),
        replay=str(old),
        replay_share=0.4,
        columns=columns,
        limit_rows=3,
    )
    assert len(data.train_table) == 5, "3 rows, since `limit_rows` is of the training rows, and 2 of the 9 old ones"


def table_of(folder: Path, count: int) -> GroupStore:
    with GroupStoreWriter(folder, vocab_size=100) as writer:
        for row in range(count):
            writer.append(
                PromptGroup(row_id=row * 2, prompt=np.array([1, row % 90]), responses=(np.array([2]), np.array([3, 4])))
            )
    return GroupStore(folder)


@pytest.fixture(scope="module")
def tables(tmp_path_factory: pytest.TempPathFactory) -> tuple[GroupStore, GroupStore]:
    folder = tmp_path_factory.mktemp("tables")
    return table_of(folder / "new", 41), table_of(folder / "old", 17)


@settings(max_examples=50, deadline=None)
@given(share=st.floats(0.01, 0.9), seed=st.integers(0, 5))
def test_the_share_is_met_to_the_nearest_row(tables: tuple[GroupStore, GroupStore], share: float, seed: int) -> None:
    mixed = with_replay(*tables, share, seed)
    count = len(mixed) - 41
    errors = {n: abs(n / (41 + n) - share) for n in (count - 1, count, count + 1) if n > 0}
    # The nearest count is not always the one of the nearest share, since the share is curved in it; it is at most one row off.
    assert abs(count - share * 41 / (1 - share)) <= 0.5 or count == 1
    assert errors[count] <= 1 / (41 + count)
    assert mixed.digest == with_replay(*tables, share, seed).digest
    repeats = Counter(mixed.row_ids[41:].tolist())
    assert max(repeats.values()) - (min(repeats.values()) if len(repeats) == 17 else 0) <= 1


def test_a_joined_table_says_of_every_row_what_its_groups_say(tables: tuple[GroupStore, GroupStore]) -> None:
    joined = JoinedTables(*tables)
    found = [joined[i] for i in range(len(joined))]
    assert len(set(joined.row_ids.tolist())) == 58
    assert joined.row_ids.tolist() == [group.row_id for group in found]
    assert joined.prompt_lengths.tolist() == [len(group.prompt) for group in found]
    assert joined.response_tokens.tolist() == [sum(map(len, group.responses)) for group in found]
    assert joined.num_responses.tolist() == [len(group.responses) for group in found]
    assert joined.response_offsets.tolist() == [0, *np.cumsum(joined.num_responses).tolist()]
    assert joined.weights.tolist() == [1.0] * 58
    assert joined.prompt_keys[41:].tolist() == tables[1].prompt_keys.tolist()
    assert joined.digest != JoinedTables(tables[1], tables[0]).digest


@given(st.lists(st.integers(-3, 3), min_size=41, max_size=41), st.integers(1, 41), st.booleans())
@settings(max_examples=50, deadline=None)
def test_no_row_left_out_has_a_better_value(
    tables: tuple[GroupStore, GroupStore], values: list[int], count: int, lowest: bool
) -> None:
    by_row = {row * 2: float(value) for row, value in enumerate(values)}
    kept = set(kept_by_value(tables[0], count, by_row, lowest=lowest).row_ids.tolist())
    sign = -1 if lowest else 1
    worst = min(sign * by_row[row] for row in kept)
    assert len(kept) == count
    assert all(sign * value <= worst for row, value in by_row.items() if row not in kept)


def test_a_tiny_share_keeps_a_row(tables: tuple[GroupStore, GroupStore]) -> None:
    assert num_kept(0.001, 41) == 1
    assert len(kept_by_chance(tables[0], 0.001, 0)) == 1
