from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from lightning_pref.data.datamodule import PreferenceData
from lightning_pref.data.playground_source import PlaygroundRows, PlaygroundSettings, is_playground
from lightning_pref.data.playground_tokenizer import playground_tokenizer

TOKENIZER = playground_tokenizer()
SMALL = PlaygroundSettings(num_rows=24, num_val_rows=6)


@pytest.fixture
def set_up(tmp_path: Path) -> Callable[..., PreferenceData]:
    def loaded(train: str = "playground", playground: PlaygroundSettings = SMALL) -> PreferenceData:
        data = PreferenceData(train, tokenizer=TOKENIZER, cache_dir=str(tmp_path / "cache"), playground=playground)
        data.prepare_data()
        data.setup("fit")
        return data

    return loaded


@pytest.mark.parametrize(
    ("source", "responses", "sources"),
    [
        ("playground", 2, {"kitchen", "travel"}),
        ("playground:sft:kitchen", 1, {"kitchen"}),
        ("playground:travel", 2, {"travel"}),
        ("playground:ranked", 4, {"kitchen", "travel"}),
        ("playground:unpaired", 1, {"kitchen", "travel"}),
    ],
)
def test_the_playground_has_kinds_and_domains(
    set_up: Callable[..., PreferenceData], source: str, responses: int, sources: set[str]
) -> None:
    table = set_up(source, playground=SMALL).train_table
    assert set(table.num_responses.tolist()) == {responses}
    assert {table[i].source for i in range(len(table))} == sources


@pytest.mark.parametrize(
    "change",
    [{"seed": 1}, {"noise": 0.5}, {"long_prompts": 1.0}, {"conversational": False}, {"flaw": "length"}, {"num_rows": 23}],
)
def test_every_playground_setting_changes_the_data(set_up: Callable[..., PreferenceData], change: dict[str, object]) -> None:
    settings = [PlaygroundSettings(**{"num_rows": 24, "num_val_rows": 6, **more}) for more in ({}, change)]
    digests = [set_up(playground=setting).digest for setting in settings]
    assert digests[0] != digests[1]


def test_responses_of_ranked_playground_rows_can_be_counted_out(set_up: Callable[..., PreferenceData]) -> None:
    settings = PlaygroundSettings(num_rows=4, num_val_rows=0, num_responses=3)
    assert set(set_up("playground:ranked", playground=settings).train_table.num_responses.tolist()) == {3}


def test_no_validation_rows_of_the_playground_means_no_validation(set_up: Callable[..., PreferenceData]) -> None:
    assert set_up(playground=PlaygroundSettings(num_rows=4, num_val_rows=0)).val_table is None


def test_an_unknown_word_of_the_playground_lists_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"has no 'kichen' .*sft, preference.*kitchen, travel.*`playground:sft:kitchen`"):
        PlaygroundRows("playground:kichen", PlaygroundSettings(), "train")


def test_a_source_is_the_playground_by_its_first_word() -> None:
    assert [is_playground(source) for source in ("playground", "playground:sft", "playground.jsonl", "my/playground")] == [
        True,
        True,
        False,
        False,
    ]


def test_more_validation_rows_leave_the_training_rows_where_they_are() -> None:
    parts = [PlaygroundRows("playground", PlaygroundSettings(num_val_rows=n), "train").digest_parts() for n in (1, 2)]
    assert parts[0] == parts[1]
