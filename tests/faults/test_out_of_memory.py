"""When memory runs out the user is told how large the batch was and what to set, in one paragraph."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from rollouts import speaker
from speakers import quiet_trainer
from spiky import Regression, batches, fit
from torch import nn
from typing_extensions import override

from lightning_pref.advice import advice_of
from lightning_pref.callbacks import FaultAdvice
from lightning_pref.callbacks.fault_advice import (
    Size,
    fewer_weights,
    group_size,
    is_out_of_memory,
    recomputes_activations,
)
from lightning_pref.data import PreferenceData
from lightning_pref.data.groups import GroupBatch, PromptGroup
from lightning_pref.data.playground_tokenizer import playground_tokenizer
from lightning_pref.models.adapters import LoraSettings, add_lora
from lightning_pref.models.backbones import enable_gradient_checkpointing
from lightning_pref.modules import RLHFModule
from lightning_pref.rollouts import RolloutData
from lightning_pref.rollouts.experience import ExperienceBatch
from lightning_pref.rollouts.sampling import Sampling
from lightning_pref.rollouts.validation import HeldOutSampling

RUN = """
import resource, sys
import torch
from lightning.pytorch.callbacks import Callback
from lightning_pref.recipes import sft

class LittleMemory(Callback):
    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        if batch_idx == 1:
            taken = next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmSize")) * 1024
            resource.setrlimit(resource.RLIMIT_AS, (taken + 2**25, taken + 2**25))

torch.set_num_threads(1)
sft.main(sys.argv[1:])
"""


def test_the_size_of_a_batch_is_that_of_its_rows() -> None:
    def row(row_id: int, prompt: int, *responses: int) -> PromptGroup:
        return PromptGroup(row_id=row_id, prompt=np.ones(prompt, int), responses=tuple(np.ones(n, int) for n in responses))

    assert group_size(GroupBatch.from_groups([row(0, 2, 3, 4), row(1, 5, 1), row(2, 1, 1, 1)])) == Size(18, 3, 9)
    assert group_size(torch.zeros(3)) is None


@pytest.mark.parametrize(
    ("error", "is_it"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has a total capacity of ..."), True),
        (MemoryError(), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (ValueError("out of memory"), False),
    ],
)
def test_errors_of_memory_are_known_by_their_kind_or_words(error: Exception, is_it: bool) -> None:
    assert is_out_of_memory(error) is is_it


def test_the_allocator_of_the_cpu_is_understood() -> None:
    with pytest.raises(RuntimeError) as raised:
        torch.empty(2**60, dtype=torch.uint8)
    assert is_out_of_memory(raised.value)


class Greedy(Regression):
    """Asks for more than there is, in the batch of this number."""

    def __init__(self, at: int) -> None:
        super().__init__()
        self.at = at

    @override
    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        if batch_idx == self.at:
            torch.empty(2**60, dtype=torch.uint8)
        return super().training_step(batch, batch_idx)


def test_somebodys_module_gets_the_advice_below_the_error(tmp_path: Path) -> None:
    advice = FaultAdvice(lambda batch: Size(tokens=10 * len(batch), rows=len(batch), longest=12))
    with pytest.raises(RuntimeError) as raised:
        fit(tmp_path, Greedy(2), [advice], batches(4))
    text = advice_of(raised.value)
    assert text is not None
    assert "Out of memory in a training batch of 80 tokens (8 rows, the longest of 12 tokens)" in text
    assert f", when {2**30:.2f} GiB more were asked for." in text
    assert re.search(r"The process held \d+\.\d\d GiB at its peak", text)
    assert "The largest training batch that went through had 80 tokens" in text


def advice_for(data: Any, batch: Size | None, *, most: int = 0, phase: Any = "batch", accumulate: int = 1) -> str:
    """What would be said on a run with this data, for numbers that are hard to provoke."""
    advice = FaultAdvice()
    advice._batch, advice._most, advice._phase = batch, most, phase
    trainer = L.Trainer(accelerator="cpu", devices=1, logger=False, accumulate_grad_batches=accumulate)
    trainer.datamodule = data  # type: ignore[attr-defined]
    return "; ".join(advice._smaller(trainer))


@pytest.fixture
def by_tokens() -> PreferenceData:
    return PreferenceData(max_tokens_per_batch=8000)


def test_numbers_fit_and_keep_the_update_as_large(by_tokens: PreferenceData) -> None:
    batch = Size(tokens=8000, rows=16, longest=600)
    first = advice_for(by_tokens, batch)
    assert "`--data.max_tokens_per_batch 4000 --trainer.accumulate_grad_batches 2`" in first
    later = advice_for(by_tokens, batch, most=6000, accumulate=3)
    assert "`--data.max_tokens_per_batch 6000 --trainer.accumulate_grad_batches 6`" in later


def test_a_batch_of_rows_is_lowered_in_rows() -> None:
    found = advice_for(PreferenceData(batch_size=16), Size(tokens=8000, rows=16, longest=600))
    assert "`--data.batch_size 8 --trainer.accumulate_grad_batches 2`" in found


def test_rows_that_are_too_long_by_themselves_are_to_be_cut(by_tokens: PreferenceData) -> None:
    assert advice_for(by_tokens, Size(tokens=8000, rows=1, longest=8000)) == "shorter rows (`--data.max_length 4000`)"
    both = advice_for(by_tokens, Size(tokens=8000, rows=2, longest=7000))
    assert "--data.max_tokens_per_batch 7000" in both
    assert "--data.max_length 3500" in both


def test_rollouts_have_settings_of_their_own() -> None:
    data = RolloutData(reward="playground:gold", num_samples=8, max_rows=64)
    sampling = advice_for(data, Size(100, 4, 30), phase="between")
    assert "--data.max_rows 32" in sampling
    assert "--data.num_samples 4" in sampling
    assert "--trainer.accumulate_grad_batches 6" in advice_for(data, Size(100, 4, 30), accumulate=3)


def test_a_validation_of_rollouts_is_made_smaller_by_its_own_number_of_samples() -> None:
    data = RolloutData(reward="my/judge", val="x.jsonl", num_samples=32, val_sampling=HeldOutSampling(num_samples=6), max_rows=64)
    found = advice_for(data, None, phase="validation", accumulate=2)
    assert "--data.val_sampling.num_samples 3" in found and "--data.num_samples" not in found
    assert "--data.max_rows 32" in found and "--data.reward_batch_size 32" in found
    assert "--trainer.accumulate_grad_batches 4" in found


def test_no_setting_is_named_that_would_change_nothing() -> None:
    # All 48 responses to a prompt are decoded together whatever `max_rows` is, and a function scores one at a time.
    data = RolloutData(reward="playground:gold", num_samples=48, max_rows=64)
    found = advice_for(data, None, phase="between")
    assert "--data.max_rows" not in found and "--data.reward_batch_size" not in found
    assert "--data.num_samples 24" in found
    weighted = RolloutData(reward={"playground:gold": 1.0, "my/judge": 0.5})
    assert "--data.reward_batch_size 32" in advice_for(weighted, None, phase="between")
    one_each = RolloutData(reward="my/judge", val="x.jsonl")
    assert "num_samples" not in advice_for(one_each, None, phase="validation")


class Crowded(RLHFModule):
    """Has no room for an update."""

    @override
    def training_step(self, batch: ExperienceBatch, batch_idx: int) -> torch.Tensor:
        return torch.empty(2**60, dtype=torch.uint8)


def rollout_advice(folder: Path, module: L.LightningModule, *, training: str = "something", held_out: str = "something") -> str:
    """What is said of a run whose reward needs all memory for some of the rows."""
    sides = {"train": training, "val": held_out}
    for name, answer in sides.items():
        (folder / f"{name}.jsonl").write_text(json.dumps({"prompt": "How much?", "answer": answer}) + "\n")
    data = RolloutData(
        *(str(folder / f"{name}.jsonl") for name in sides),
        reward="bad_rewards:needs_memory",
        num_samples=4,
        val_sampling=HeldOutSampling(num_samples=2),
        sampling=Sampling(max_new_tokens=4),
        tokenizer=playground_tokenizer(),
    )
    trainer = quiet_trainer(default_root_dir=folder, callbacks=[FaultAdvice()])
    with pytest.raises((MemoryError, RuntimeError)) as raised:
        trainer.fit(module, data)
    return advice_of(raised.value) or ""


def test_the_advice_for_rollouts_is_that_for_the_place_where_memory_ran_out(tmp_path: Path) -> None:
    validation = rollout_advice(tmp_path, RLHFModule(speaker()), held_out="everything")
    assert validation.startswith("Out of memory in validation.")
    assert "--data.val_sampling.num_samples 1" in validation
    # Lightning looks at two validation batches before it trains.
    rollout = rollout_advice(tmp_path, RLHFModule(speaker()), training="everything")
    assert rollout.startswith("Out of memory before the first batch.")
    assert "--data.num_samples 2" in rollout
    for text in (validation, rollout):
        assert "gradient_checkpointing" not in text, "nothing is kept for a backward pass"


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradient_checkpointing_is_advised_where_it_is_not_on_yet(tmp_path: Path, checkpointing: bool) -> None:
    text = rollout_advice(tmp_path, Crowded(speaker(), gradient_checkpointing=checkpointing))
    assert text.startswith("Out of memory in a training batch of ")
    assert ("--model.gradient_checkpointing true" in text) is not checkpointing
    assert "--trainer.accumulate_grad_batches 2" in text


def test_gradient_checkpointing_is_seen_in_any_model_of_transformers() -> None:
    model = speaker()
    assert not recomputes_activations(nn.ModuleList([model, Regression()]))
    enable_gradient_checkpointing(model)
    assert recomputes_activations(nn.ModuleList([model, Regression()]))
    assert recomputes_activations(add_lora(model, LoraSettings(r=2)))


def test_where_the_weights_alone_fill_a_gpu_what_is_done_already_is_not_advised() -> None:
    plain = speaker()
    (both,) = fewer_weights(plain, is_split=False)
    assert both.endswith(
        "first train adapters (`--model.lora.r 16`) or spread them over several GPUs (`--trainer.strategy fsdp2`)"
    )
    (adapters,) = fewer_weights(plain, is_split=True)
    assert adapters.endswith("first train adapters (`--model.lora.r 16`)")
    adapted = add_lora(plain, LoraSettings(r=2))
    (spread,) = fewer_weights(adapted, is_split=False)
    assert spread.endswith("first spread them over several GPUs (`--trainer.strategy fsdp2`)")
    assert fewer_weights(adapted, is_split=True) == []


@pytest.mark.slow
def test_a_recipe_that_runs_out_of_memory_ends_with_one_paragraph(tmp_path: Path) -> None:
    script = tmp_path / "run.py"
    script.write_text(RUN, encoding="utf-8")
    args = [
        f"--data.cache_dir={tmp_path / 'cache'}",
        "--run.name=small",
        "--trainer.accelerator=cpu",
        "--data.max_tokens_per_batch=16384",
        "--trainer.callbacks+=lightning_pref.callbacks.FaultAdvice",
        "--trainer.callbacks+=__main__.LittleMemory",
    ]
    # What the first batch has freed goes back at once; else the second may find room in it, and how much is up to the machine.
    returns_memory = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    done = subprocess.run(
        [sys.executable, str(script), *args],
        check=False,
        cwd=tmp_path,
        env=returns_memory,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 2, done.stderr[-3000:]
    said = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(said) == 1, done.stderr[-3000:]
    assert "Traceback" not in done.stderr
    assert re.search(r"Out of memory in a training batch of \d+ tokens \(.*the longest of \d+ tokens\)", said[0])
    assert re.search(r"--data\.max_tokens_per_batch \d+ --trainer\.accumulate_grad_batches 2", said[0])
    assert "--model.gradient_checkpointing true" in said[0]
