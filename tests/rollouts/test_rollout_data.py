"""RolloutData under a real Trainer: which prompts a module is asked for, and when."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import Callback, GradientAccumulationScheduler
from rollouts import STILL, fit, rollout_data, speaker, write_prompts
from torch import Tensor
from transformers import LlamaForSequenceClassification
from typing_extensions import override

from lightning_pref.data.playground_source import PlaygroundSettings
from lightning_pref.data.playground_tokenizer import playground_tokenizer
from lightning_pref.data.run_place import RunPlace
from lightning_pref.modules.rlhf import RLHFModule
from lightning_pref.rollouts.experience import Experience, ExperienceBatch, Task
from lightning_pref.rollouts.rewards import ModelReward
from lightning_pref.rollouts.rollout_data import RolloutData
from lightning_pref.rollouts.sampling import Sampling


class Diary(Callback):
    """When rollouts were collected, and what was trained on."""

    def __init__(self) -> None:
        self.tasks: list[Task] = []
        self.at: list[int] = []  # updates done when a rollout began
        self.batches: list[ExperienceBatch] = []

    @override
    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int) -> None:
        self.batches.append(batch)

    @override
    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        assert isinstance(pl_module, RLHFModule)
        collect = pl_module.collect

        def noted(task: Task) -> Experience:
            self.tasks.append(task)
            self.at.append(trainer.global_step)
            return collect(task)

        pl_module.collect = noted  # type: ignore[method-assign]


def run(folder: Path, data: RolloutData | None = None, **settings: Any) -> Diary:
    diary = Diary()
    fit(folder, RLHFModule(speaker(), optimizer=STILL), rollout_data(folder) if data is None else data, [diary], **settings)
    return diary


def test_an_epoch_answers_every_prompt_once_and_the_next_in_another_order(tmp_path: Path) -> None:
    diary = run(tmp_path, rollout_data(tmp_path, num_prompts=3), max_epochs=2)
    rows = [[prompt.row_id for prompt in task.prompts] for task in diary.tasks]
    assert [len(own) for own in rows] == [2, 3, 3, 2, 3, 3], "as even as can be"
    first, second = ([row for own in part for row in own] for part in (rows[:3], rows[3:]))
    assert Counter(first) == Counter(second) == Counter(range(8))
    assert first != second
    assert [task.number for task in diary.tasks] == list(range(6))
    assert len({task.seed for task in diary.tasks}) == 6


def test_a_rollout_begins_when_the_one_before_has_been_trained_on_and_not_earlier(tmp_path: Path) -> None:
    data = rollout_data(tmp_path, inner_epochs=2, num_minibatches=2)
    diary = run(tmp_path, data, accumulate_grad_batches=2)
    assert diary.at == [0, 4]
    assert len(diary.batches) == 16


@pytest.mark.parametrize("name", ["num_prompts", "num_samples", "inner_epochs", "num_minibatches"])
def test_the_shape_of_a_rollout_is_what_was_asked_for(tmp_path: Path, name: str) -> None:
    diary = run(tmp_path, rollout_data(tmp_path, **{name: 2}))
    batches, tasks = len(diary.batches), len(diary.tasks)
    assert tasks == (4 if name == "num_prompts" else 2)
    assert batches == (4 if name == "num_prompts" else 4 if name in ("inner_epochs", "num_minibatches") else 2)
    assert all(batch.groups.group_sizes[0] == (2 if name == "num_samples" else 3) for batch in diary.batches)


def test_sampling_settings_reach_the_samples(tmp_path: Path) -> None:
    short = run(tmp_path, rollout_data(tmp_path, sampling=Sampling(max_new_tokens=2)))
    assert max(int(batch.groups.response_lengths.max()) for batch in short.batches) == 2
    cold = run(tmp_path, rollout_data(tmp_path, sampling=Sampling(max_new_tokens=6, temperature=1e-4)))
    assert all(batch.temperature == 1e-4 for batch in cold.batches)
    for batch in cold.batches:
        for group in batch.groups.groups():
            assert len({tuple(response.tolist()) for response in group.responses}) == 1, "nearly greedy"


def test_the_seed_decides_order_and_samples(tmp_path: Path) -> None:
    ids = [
        [batch.groups.input_ids.tolist() for batch in run(tmp_path, rollout_data(tmp_path, seed=seed)).batches]
        for seed in (0, 1, 0)
    ]
    assert ids[0] == ids[2] != ids[1]


def test_max_rows_bounds_what_is_decoded_together(tmp_path: Path) -> None:
    widths: list[int] = []
    model = speaker()
    model.register_forward_pre_hook(lambda _, args, kwargs: widths.append(len(kwargs["input_ids"])), with_kwargs=True)
    fit(tmp_path, RLHFModule(model, optimizer=STILL), rollout_data(tmp_path, max_rows=6))
    assert max(widths) == 6


def test_several_sources_and_their_settings_are_read(tmp_path: Path) -> None:
    first = write_prompts(tmp_path)
    second = tmp_path / "more.jsonl"
    second.write_text(json.dumps({"question": "Who?", "prompt": "x"}) + "\n" + json.dumps({"question": "Why?"}) + "\n")
    common: dict[str, Any] = {"reward": "rollouts:count_of_letters", "tokenizer": playground_tokenizer()}
    data = RolloutData([str(first), str(second)], limit_rows=9, **common)
    data.setup("fit")
    assert [prompt.text for prompt in data.prompts][-2:] == ["Name the number very 7.", "x"]
    data = RolloutData(str(second), columns={"prompt": "question"}, **common)
    data.setup("fit")
    assert [prompt.text for prompt in data.prompts] == ["Who?", "Why?"]
    digest = data.digest
    data = RolloutData(str(second), columns={"prompt": "question"}, max_prompt_length=2, **common)
    data.setup("fit")
    assert {len(prompt.ids) for prompt in data.prompts} == {2}
    assert data.digest != digest


def test_bad_rows_are_skipped_and_counted_where_that_is_asked(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps({"prompt": "x"}) + "\n" + json.dumps({"text": "y"}) + "\n")
    common: dict[str, Any] = {"reward": "rollouts:count_of_letters", "tokenizer": playground_tokenizer()}
    with pytest.raises(ValueError, match="found a row without a prompt"):
        RolloutData(str(file), **common).setup("fit")
    data = RolloutData(str(file), on_bad_row="skip", **common)
    data.setup("fit")
    assert len(data.prompts) == 1
    assert "skipped 1 rows without a usable prompt; the first: rows.jsonl, row 2" in caplog.text


def test_a_chat_template_of_ones_own_and_its_date_are_used(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps({"prompt": [{"role": "user", "content": "Who?"}]}) + "\n")
    template = "{{ strftime_now('%d') }}{% for message in messages %}{{ message['content'] }}{% endfor %}"
    found = []
    dated = {"chat_template": template, "template_date": "2020-02-03"}
    for settings in ({}, {**dated, "template_date": "2020-02-26"}, dated):
        data = RolloutData(str(file), reward="playground:gold", tokenizer=playground_tokenizer(), **settings)
        data.setup("fit")
        found.append(playground_tokenizer().decode(data.prompts[0].ids))
    assert found == ["<|bos|><|user|>Who?<|assistant|>", "26Who?", "03Who?"]


def test_split_subset_and_revision_reach_the_reader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lightning_pref.rollouts import rollout_data as place

    calls: list[dict[str, Any]] = []
    real = place.read_rows

    def watched(source: str, **settings: Any) -> Any:
        calls.append(settings)
        return real(write_prompts(tmp_path))

    monkeypatch.setattr(place, "read_rows", watched)
    asked = {"split": "train", "subset": "hard", "revision": "v2"}
    RolloutData("owner/name", reward="playground:gold", tokenizer=playground_tokenizer(), **asked).setup("fit")
    assert asked.items() <= calls[0].items()


def test_playground_prompts_are_answered_for_a_reward_with_its_flaw() -> None:
    settings = PlaygroundSettings(num_rows=3, flaw="length")
    data = RolloutData(reward="playground:proxy", tokenizer=playground_tokenizer(), playground=settings)
    data.setup("fit")
    assert len(data.prompts) == 3
    assert data._rewards is not None
    from rollouts import answers_of

    answers = answers_of([["blah " * 80]])._replace(prompts=data.prompts[:1])
    assert data._rewards[0](answers).tolist() == [0.5]


def test_a_gold_reward_is_watched_and_not_trained_on(tmp_path: Path) -> None:
    records = [
        fit(tmp_path, RLHFModule(speaker(), optimizer=STILL), rollout_data(tmp_path, gold=gold))
        for gold in (None, "rollouts:says_the_answer")
    ]
    plain, watched = (record.metrics for record in records)
    assert "reward/gold" in watched
    assert "reward/gold" not in plain
    assert watched["reward/mean"] == plain["reward/mean"]
    assert watched["loss"] == plain["loss"]


def test_how_a_reward_model_is_loaded_and_read_is_as_asked(tmp_path: Path) -> None:
    config = speaker().config
    config.num_labels = 1
    LlamaForSequenceClassification(config).save_pretrained(tmp_path / "model")
    playground_tokenizer().save_pretrained(tmp_path / "model")
    data = rollout_data(tmp_path, reward=str(tmp_path / "model"), reward_dtype="bfloat16", reward_batch_size=3)
    data.setup("fit")
    assert data._rewards is not None
    reward = data._rewards[0]
    assert isinstance(reward, ModelReward)
    (model,) = reward.models
    assert model.dtype == torch.bfloat16
    assert reward.batch_size == 3


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"train": []}, "`train` names no data"),
        ({"num_samples": 0}, "`num_samples` must be at least 1, got 0"),
        ({"limit_rows": 0}, "`limit_rows` must be at least 1, got 0"),
        ({"uwo_coefficient": 0.1}, "`uwo_coefficient` acts on `aggregate: uwo` only; with 'mean' it has no effect"),
        ({"split": "train"}, "`split` is for files, folders and hub data sets, and all data is"),
        ({"train": "my.jsonl", "playground": PlaygroundSettings(num_rows=3)}, "`playground` is set, but the data is"),
    ],
)
def test_settings_that_cannot_be_meant_are_refused(settings: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        RolloutData(**settings)


@pytest.mark.parametrize("how", [{"top_p": 0.9}, {"top_k": 5}, {"min_p": 0.1}, {"temperature": 0.0}])
def test_L11_sampling_that_leaves_out_tokens_is_refused_for_training(how: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="the ratio to the sampling policy is not 1 to begin with"):
        RolloutData(sampling=Sampling(**how))  # type: ignore[arg-type]


def test_a_run_without_a_reward_says_what_to_give(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="`reward` is not set: give the folder of a reward model"):
        rollout_data(tmp_path, reward=None).setup("fit")


def test_a_run_without_a_tokenizer_or_a_setup_says_so(tmp_path: Path) -> None:
    data = RolloutData(str(write_prompts(tmp_path)), reward="playground:gold")
    with pytest.raises(ValueError, match="`tokenizer` is not set; give the folder or hub id of the model"):
        data.setup("fit")
    with pytest.raises(RuntimeError, match="The data is not loaded yet"):
        _ = data.prompts


class Plain(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(1, 1)

    @override
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.layer.weight.sum()

    @override
    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """There is none; without the method Lightning would wonder."""

    @override
    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def test_a_module_that_cannot_collect_is_told_so(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="RolloutData asks the module for experience, but Plain has no `collect`"):
        fit(tmp_path, Plain(), rollout_data(tmp_path))


def test_a_rollout_with_less_than_one_response_for_each_micro_batch_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="A rollout of 4 prompts with 3 responses on each rank is cut into 13 minibatches"):
        run(tmp_path, rollout_data(tmp_path, num_minibatches=13))


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"overfit_batches": 1}, "`overfit_batches` has no meaning for sampled experience"),
        (
            {"limit_train_batches": 3, "accumulate_grad_batches": 2},
            "ends an epoch inside an update of 2 accumulated micro-batches",
        ),
    ],
)
def test_trainer_settings_that_cannot_be_meant_are_refused(tmp_path: Path, settings: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        run(tmp_path, **settings)


def test_changing_accumulation_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="Experience is cut for one number of accumulated batches"):
        fit(tmp_path, RLHFModule(speaker()), rollout_data(tmp_path), [GradientAccumulationScheduler({0: 2})])


def test_a_state_of_another_version_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds version 1 of the state of the data; this release reads version 2"):
        rollout_data(tmp_path).load_state_dict({"version": 1, "batch": 0})


def test_a_place_beyond_the_epoch_is_refused(tmp_path: Path) -> None:
    data = rollout_data(tmp_path)
    data.setup("fit")
    with pytest.raises(ValueError, match="3 micro-batches into an epoch, and an epoch has 2 of them now"):
        data.train_dataloader().resume(RunPlace(0, 3))
