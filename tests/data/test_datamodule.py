from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import datasets
import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from torch import Tensor

import lightning_pref.data as data_package
from lightning_pref.data.datamodule import DEFAULT_MAX_TOKENS, PreferenceData, hold_out
from lightning_pref.data.groups import GroupBatch
from lightning_pref.data.playground_source import PlaygroundSettings
from lightning_pref.data.playground_tokenizer import playground_tokenizer

TOKENIZER = playground_tokenizer()
SMALL = PlaygroundSettings(num_rows=24, num_val_rows=6)


def write_pairs(path: Path, count: int, prompts: int | None = None) -> str:
    rows = [{"prompt": f"Question {i % (prompts or count)}?", "chosen": f" Yes {i}.", "rejected": " No."} for i in range(count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def preference_data(tmp_path: Path) -> Callable[..., PreferenceData]:
    def build(train: str | list[str] = "playground", val: str | None = None, **settings: object) -> PreferenceData:
        return PreferenceData(train, val, **{"tokenizer": TOKENIZER, "cache_dir": str(tmp_path / "cache"), **settings})

    return build


def set_up(data: PreferenceData) -> PreferenceData:
    data.prepare_data()
    data.setup("fit")
    return data


class Recorder(L.LightningModule):
    """Notes what it is given; its one parameter moves so that Lightning has something to train."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.train_batches: list[GroupBatch] = []
        self.val_batches: list[GroupBatch] = []
        self.updates: list[list[GroupBatch]] = [[]]

    def training_step(self, batch: GroupBatch, batch_idx: int) -> Tensor:
        self.train_batches.append(batch)
        self.updates[-1].append(batch)
        return self.weight * 1.0

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        self.updates.append([])

    def validation_step(self, batch: GroupBatch, batch_idx: int) -> None:
        self.val_batches.append(batch)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(data: PreferenceData, folder: Path, **settings: object) -> Recorder:
    module = Recorder()
    trainer = L.Trainer(
        accelerator="cpu",
        devices=1,
        default_root_dir=folder,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        **settings,
    )
    trainer.fit(module, data)
    return module


def rows(batches: list[GroupBatch]) -> list[int]:
    return [row for batch in batches for row in batch.row_ids.tolist()]


def test_a_trainer_sees_every_row_of_the_playground_once_an_epoch(
    tmp_path: Path, preference_data: Callable[..., PreferenceData]
) -> None:
    module = fit(preference_data(playground=SMALL, batch_size=5), tmp_path, max_epochs=2)
    assert sorted(rows(module.train_batches)) == sorted([*range(24)] * 2)
    assert rows(module.val_batches) == [*range(6)] * 2
    assert {source for batch in module.train_batches for source in batch.sources} == {"kitchen", "travel"}
    assert all(batch.ranks == ((0, 1),) * batch.num_groups for batch in module.train_batches)


@pytest.mark.parametrize("limit", [1.0, 7, 0.5])
def test_N1_windows_hold_exactly_what_each_update_saw(
    tmp_path: Path, preference_data: Callable[..., PreferenceData], limit: float
) -> None:
    data = preference_data(playground=SMALL, batch_size=2)
    module = fit(data, tmp_path, max_epochs=2, accumulate_grad_batches=3, limit_train_batches=limit)
    updates = [update for update in module.updates if update]
    batches_an_epoch = {1.0: 12, 7: 7, 0.5: 6}[limit]
    assert [len(update) for update in updates] == [
        size for _ in range(2) for size in [3] * (batches_an_epoch // 3) + [batches_an_epoch % 3] * (batches_an_epoch % 3 > 0)
    ]
    for update in updates:
        expected = (
            sum(batch.num_groups for batch in update),
            sum(batch.num_responses for batch in update),
            sum(int(batch.response_lengths.sum()) for batch in update),
        )
        assert all(batch.window == expected for batch in update)


def test_windows_follow_an_accumulation_schedule(tmp_path: Path, preference_data: Callable[..., PreferenceData]) -> None:
    data = preference_data(playground=SMALL, batch_size=4)
    module = fit(data, tmp_path, max_epochs=2, callbacks=[GradientAccumulationScheduler({0: 1, 1: 3})])
    for update in module.updates:
        for batch in update:
            assert batch.window is not None
            assert batch.window.groups == sum(other.num_groups for other in update)


def test_half_precision_trains_on_whole_batches(tmp_path: Path, preference_data: Callable[..., PreferenceData]) -> None:
    module = fit(preference_data(playground=SMALL, batch_size=4), tmp_path, max_epochs=1, precision="bf16-true")
    assert all(batch.weights.dtype == torch.float32 for batch in module.train_batches)


def test_neither_bound_means_a_token_budget(preference_data: Callable[..., PreferenceData]) -> None:
    data = set_up(preference_data(playground=PlaygroundSettings(num_rows=120, num_val_rows=0)))
    batches = list(data.train_dataloader())
    assert data.max_tokens_per_batch == DEFAULT_MAX_TOKENS
    assert max(batch.num_groups for batch in batches) > 8
    assert all(batch.num_tokens <= DEFAULT_MAX_TOKENS for batch in batches)


def test_both_bounds_hold_at_once(preference_data: Callable[..., PreferenceData]) -> None:
    data = set_up(preference_data(playground=SMALL, batch_size=3, max_tokens_per_batch=500))
    for loader in (data.train_dataloader(), data.val_dataloader()):
        for batch in loader:
            assert batch.num_groups <= 3
            assert batch.num_tokens <= 500


def test_a_row_over_the_budget_names_both_settings(preference_data: Callable[..., PreferenceData]) -> None:
    data = set_up(preference_data(playground=SMALL, max_tokens_per_batch=20))
    with pytest.raises(ValueError, match=r"Row \d+ .*Raise `max_tokens_per_batch` to at least \d+, or shorten.*`max_length`"):
        data.train_dataloader()


def test_the_seed_changes_the_order_and_nothing_else(preference_data: Callable[..., PreferenceData]) -> None:
    orders = []
    for seed in (0, 0, 1):
        data = set_up(preference_data(playground=SMALL, batch_size=4, seed=seed))
        orders.append(rows(list(data.train_dataloader())))
    assert orders[0] == orders[1] != orders[2]
    assert sorted(orders[0]) == sorted(orders[2])


def test_held_out_rows_are_the_same_for_every_seed_and_none_is_trained_on(
    tmp_path: Path, preference_data: Callable[..., PreferenceData]
) -> None:
    path = write_pairs(tmp_path / "pairs.jsonl", 40)
    held = []
    for seed in (0, 1):
        data = set_up(preference_data(path, val_size=8, seed=seed))
        assert data.val_table is not None
        assert sorted([*data.train_table.row_ids, *data.val_table.row_ids]) == list(range(40))
        held.append(data.val_table.row_ids.tolist())
    assert held[0] == held[1]
    assert len(held[0]) == 8
    assert held[0] != list(range(8))


def test_rows_with_the_same_prompt_stay_on_one_side(tmp_path: Path, preference_data: Callable[..., PreferenceData]) -> None:
    data = set_up(preference_data(write_pairs(tmp_path / "pairs.jsonl", 60, prompts=12), val_size=0.2))
    assert data.val_table is not None
    sides = [{row % 12 for row in table.row_ids.tolist()} for table in (data.train_table, data.val_table)]
    assert not sides[0] & sides[1]
    assert len(data.val_table) >= 12


def test_a_share_is_held_out_unless_said_otherwise(tmp_path: Path, preference_data: Callable[..., PreferenceData]) -> None:
    path = write_pairs(tmp_path / "pairs.jsonl", 40)
    whole = set_up(preference_data(path, val_size=0))
    assert whole.val_table is None
    assert whole.val_dataloader() == []
    assert len(whole.train_table) == 40
    default = set_up(preference_data(path)).val_table
    assert default is not None
    assert len(default) == 2


def test_holding_out_everything_is_refused(tmp_path: Path, preference_data: Callable[..., PreferenceData]) -> None:
    data = preference_data(write_pairs(tmp_path / "pairs.jsonl", 6, prompts=1), val_size=2)
    with pytest.raises(ValueError, match=r"leaves none to train on.*there are 1 prompts.*Lower `val_size`"):
        set_up(data)


def test_response_ids_of_a_held_out_part_count_from_zero(tmp_path: Path, preference_data: Callable[..., PreferenceData]) -> None:
    data = set_up(preference_data(write_pairs(tmp_path / "pairs.jsonl", 20), val_size=5, batch_size=3))
    for table, loader in ((data.train_table, data.train_dataloader()), (data.val_table, data.val_dataloader())):
        assert table is not None
        ids = [number for batch in loader for number in batch.response_ids.tolist()]
        assert sorted(ids) == list(range(2 * len(table)))


def test_validation_data_of_its_own_is_used_whole(tmp_path: Path, preference_data: Callable[..., PreferenceData]) -> None:
    val = write_pairs(tmp_path / "val.jsonl", 5)
    data = set_up(preference_data(write_pairs(tmp_path / "train.jsonl", 9), val, batch_size=2))
    assert data.val_table is not None
    assert (len(data.train_table), len(data.val_table)) == (9, 5)
    assert rows(list(data.val_dataloader())) == list(range(5))


def test_a_split_of_the_training_folder_can_be_the_validation(
    tmp_path: Path, preference_data: Callable[..., PreferenceData]
) -> None:
    from datasets import Dataset, DatasetDict

    def part(count: int) -> Dataset:
        return Dataset.from_list([{"prompt": f"Q{i}?", "chosen": " Yes.", "rejected": " No."} for i in range(count)])

    DatasetDict({"fit": part(7), "judge": part(3)}).save_to_disk(tmp_path / "saved")
    data = set_up(preference_data(str(tmp_path / "saved"), split="fit", val_split="judge"))
    assert data.val_table is not None
    assert (len(data.train_table), len(data.val_table)) == (7, 3)


def test_several_sources_make_one_data_set(tmp_path: Path, preference_data: Callable[..., PreferenceData]) -> None:
    paths = [write_pairs(tmp_path / f"{name}.jsonl", 4) for name in "ab"]
    data = set_up(preference_data(paths, val_size=0))
    assert data.train_table.row_ids.tolist() == list(range(8))


def test_every_batch_of_all_ranks_covers_the_table(preference_data: Callable[..., PreferenceData]) -> None:
    data = set_up(preference_data(playground=SMALL, batch_size=4))
    parts = [list(data.every_batch(data.train_table, rank, 3)) for rank in range(3)]
    assert sorted(row for part in parts for row in rows(part)) == list(range(24))


def test_settings_of_the_tokenisation_reach_the_tokens(tmp_path: Path, preference_data: Callable[..., PreferenceData]) -> None:
    path = write_pairs(tmp_path / "pairs.jsonl", 4)
    plain = set_up(preference_data(path, val_size=0))
    short = set_up(preference_data(path, val_size=0, max_length=14))
    prompt = set_up(preference_data(path, val_size=0, max_prompt_length=3))
    tail = set_up(preference_data(path, val_size=0, max_length=14, truncation="keep_end"))
    assert (plain.train_table.prompt_lengths + plain.train_table.response_tokens / 2).max() > 14
    assert short.train_table.response_tokens.sum() < plain.train_table.response_tokens.sum()
    assert prompt.train_table.prompt_lengths.max() == 3
    assert tail.train_table.prompt_lengths.max() < plain.train_table.prompt_lengths.max()
    assert len({data.digest for data in (plain, short, prompt, tail)}) == 4
    assert len({data.tokenizer_digest for data in (plain, short, prompt, tail)}) == 4


def test_a_chat_template_of_ones_own_is_used(preference_data: Callable[..., PreferenceData]) -> None:
    template = "{{ bos_token }}{% for m in messages %}!{{ m['content'] }}{% endfor %}{% if add_generation_prompt %}!{% endif %}"
    own = set_up(preference_data(playground=SMALL, chat_template=template)).train_table[0]
    assert TOKENIZER.decode(own.prompt).startswith("<|bos|>!")


def test_a_template_that_prints_the_date_is_told_the_day(preference_data: Callable[..., PreferenceData]) -> None:
    template = (
        "{{ bos_token }}{{ strftime_now('%Y') }}{% for m in messages %}!{{ m['content'] }}{% endfor %}"
        "{% if add_generation_prompt %}!{% endif %}"
    )
    data = set_up(preference_data(playground=SMALL, chat_template=template, template_date="2031-02-03"))
    assert TOKENIZER.decode(data.train_table[0].prompt).startswith("<|bos|>2031!")


def test_the_step_separator_stands_after_each_step(tmp_path: Path, preference_data: Callable[..., PreferenceData]) -> None:
    path = tmp_path / "steps.jsonl"
    path.write_text(json.dumps({"prompt": "2+2+2?", "completions": ["2+2=4", "4+2=7"], "labels": [True, False]}) + "\n")
    group = set_up(preference_data(str(path), val_size=0, step_separator=" ;")).train_table[0]
    assert group.step_ends is not None
    assert [TOKENIZER.decode(group.responses[0][end]) for end in group.step_ends[0]] == [";", ";"]
    assert group.step_labels == ((True, False),)


def test_columns_and_limit_rows_choose_what_is_read(tmp_path: Path, preference_data: Callable[..., PreferenceData]) -> None:
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps({"q": f"Q{i}?", "good": " Yes.", "bad": " No."}) + "\n" for i in range(9)))
    columns = {"prompt": "q", "chosen": "good", "rejected": "bad"}
    data = set_up(preference_data(str(path), columns=columns, limit_rows=4, val_size=0))
    assert data.train_table.row_ids.tolist() == [0, 1, 2, 3]


def test_bad_rows_are_skipped_where_that_is_asked(tmp_path: Path, preference_data: Callable[..., PreferenceData]) -> None:
    path = tmp_path / "pairs.jsonl"
    write_pairs(path, 5)
    path.write_text("{broken\n" + path.read_text())
    assert len(set_up(preference_data(str(path), val_size=0, on_bad_row="skip")).train_table) == 5
    with pytest.raises(ValueError, match=r"pairs.jsonl, row 1"):
        set_up(preference_data(str(path), val_size=0))


@pytest.mark.slow
def test_workers_change_nothing(preference_data: Callable[..., PreferenceData]) -> None:
    orders = [
        rows(list(set_up(preference_data(playground=SMALL, batch_size=4, num_workers=workers)).train_dataloader()))
        for workers in (0, 2)
    ]
    assert orders[0] == orders[1]


def test_the_tokenizer_may_be_a_folder(tmp_path: Path, preference_data: Callable[..., PreferenceData]) -> None:
    TOKENIZER.save_pretrained(tmp_path / "model")
    data = preference_data(playground=SMALL, tokenizer=str(tmp_path / "model"))
    assert data.tokenizer_digest == preference_data(playground=SMALL).tokenizer_digest
    assert data.loaded_tokenizer is data.loaded_tokenizer


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"train": []}, "`train` names no data"),
        ({"split": "x"}, "`split` is for files, folders and hub data sets"),
        ({"columns": {"chosen": "a"}}, "`columns` is for files, folders and hub data sets"),
        ({"train": "a.jsonl", "playground": SMALL}, "`playground` is set, but the data is"),
        ({"val_size": 3}, "comes from `playground.num_val_rows`; leave one of them out"),
        ({"train": "a.jsonl", "val": "b.jsonl", "val_size": 3}, "comes from `val` or `val_split`; leave one of them out"),
        ({"train": "a.jsonl", "val_size": -1}, "`val_size` is a share below 1 or a number of rows, got -1"),
        ({"limit_rows": 0}, "`limit_rows` must be at least 1, got 0"),
    ],
)
def test_a_setting_without_effect_or_sense_raises(
    preference_data: Callable[..., PreferenceData], settings: dict[str, object], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        preference_data(**settings)


@pytest.mark.parametrize("option", ["revision", "subset"])
def test_revision_and_subset_are_refused_for_files(
    tmp_path: Path, preference_data: Callable[..., PreferenceData], option: str
) -> None:
    with pytest.raises(ValueError, match=f"`{option}` is for datasets on the hub"):
        set_up(preference_data(write_pairs(tmp_path / "pairs.jsonl", 3), **{option: "main"}))


def test_subset_and_revision_reach_the_hub(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, preference_data: Callable[..., PreferenceData]
) -> None:
    asked: list[tuple[str | None, ...]] = []

    def load_dataset(name: str, subset: str | None, *, split: str | None, revision: str | None) -> datasets.Dataset:
        asked.append((name, subset, split, revision))
        return datasets.Dataset.from_list([{"prompt": "a?", "chosen": "yes", "rejected": "no"}])

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    set_up(preference_data("owner/pairs", val_size=0, subset="helpful", revision="v1"))
    assert set(asked) == {("owner/pairs", "helpful", None, "v1")}


def test_a_missing_tokenizer_is_asked_for(preference_data: Callable[..., PreferenceData]) -> None:
    with pytest.raises(ValueError, match="`tokenizer` is not set; give the folder or hub id of the model"):
        set_up(preference_data(tokenizer=None))


def test_tables_before_setup_are_refused(preference_data: Callable[..., PreferenceData]) -> None:
    with pytest.raises(RuntimeError, match=r"call `prepare_data\(\)` and `setup\('fit'\)` first"):
        _ = preference_data().train_table


def test_overfit_batches_is_refused_with_the_setting_to_use(
    tmp_path: Path, preference_data: Callable[..., PreferenceData]
) -> None:
    with pytest.raises(ValueError, match="`overfit_batches` makes Lightning replace the sampler.*set `limit_rows`"):
        fit(preference_data(playground=SMALL), tmp_path, max_epochs=1, overfit_batches=2)


def test_the_cache_lies_in_the_users_cache_folder_unless_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert PreferenceData().cache_folder == tmp_path / "lightning_pref"
    assert PreferenceData(cache_dir="here").cache_folder == Path("here")


def test_hold_out_takes_whole_prompts_by_their_key(preference_data: Callable[..., PreferenceData]) -> None:
    table = set_up(preference_data(playground=PlaygroundSettings(num_rows=30, num_val_rows=0))).train_table
    train, val = hold_out(table, 0.1)
    assert max(val.prompt_keys) < min(train.prompt_keys)
    assert sorted(np.concatenate([train.row_ids, val.row_ids])) == list(range(30))


def test_the_package_lists_what_it_gives_and_imports_it_when_asked() -> None:
    assert all(getattr(data_package, name) is not None for name in data_package.__all__)
    assert sorted(name for names in data_package._HOMES.values() for name in names) == sorted(data_package.__all__)
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        _ = data_package.nothing


@pytest.mark.slow
def test_the_package_and_its_groups_cost_neither_lightning_nor_transformers() -> None:
    code = (
        "import sys, lightning_pref.data as d; d.PromptGroup; print({'lightning', 'transformers', 'datasets'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
