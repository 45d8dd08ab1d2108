"""What to do when memory or the disk runs out, with the numbers of the run."""

from __future__ import annotations

import logging
import re
import resource
import shutil
import sys
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.trainer.states import TrainerFn
from peft import PeftModel
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer
from typing_extensions import override

from lightning_pref.advice import advise
from lightning_pref.checkpoints import checkpoints_of, is_write_failure
from lightning_pref.data.datamodule import PreferenceData
from lightning_pref.data.groups import GroupBatch
from lightning_pref.rollouts.experience import ExperienceBatch
from lightning_pref.rollouts.lockstep import needs_lockstep
from lightning_pref.rollouts.rewards import is_model_reward
from lightning_pref.rollouts.rollout_data import RolloutData

GIB = 2**30

logger = logging.getLogger(__name__)

# What torch and the libraries below it write where they raise a plain RuntimeError.
_MEMORY_WORDS = ("out of memory", "not enough memory", "can't allocate memory", "CUBLAS_STATUS_ALLOC_FAILED")
# The share of a GPU that weights and optimiser may hold before smaller batches are of little use.
_MOSTLY_WEIGHTS = 0.7
_HARDLY_SMALLER = 0.9

Phase = Literal["start", "batch", "between", "validation"]
_PLACES: dict[Phase, str] = {
    "start": "before the first batch",
    "batch": "in a training batch",
    "between": "between two training batches",
    "validation": "in validation",
}


class Size(NamedTuple):
    """How large a batch is, as far as the memory it takes goes."""

    tokens: int
    rows: int
    longest: int  # tokens of its longest row, prompt and all responses

    def text(self) -> str:
        rows = "1 row" if self.rows == 1 else f"{self.rows} rows, the longest of {self.longest} tokens"
        return f"{self.tokens} tokens ({rows})"


def group_size(batch: object) -> Size | None:
    """Size of a batch of ours; `None` for any other batch."""
    groups = batch.groups if isinstance(batch, ExperienceBatch) else batch
    if not isinstance(groups, GroupBatch):
        return None
    responses = iter(groups.response_sizes)
    rows = [
        prompt + sum(next(responses) for _ in range(count))
        for prompt, count in zip(groups.prompt_sizes, groups.group_sizes, strict=True)
    ]
    return Size(groups.num_tokens, groups.num_groups, max(rows))


@dataclass
class _Held:
    """Memory of the GPU, in bytes."""

    total: int
    peak: int
    before_batch: int


class FaultAdvice(Callback):
    """Watches the sizes of the batches, for what is said when memory runs out; and for a disk that is full.

    Needs: nothing of the module; a function from batch to `Size`, which for our batches is the default.
    Logs: nothing. The advice is a note on the error itself: Python prints it below the traceback, our command line alone.
    Changes: nothing.

    Args:
        size: Gives the size of a batch.
    """

    def __init__(self, size: Callable[[Any], Size | None] = group_size) -> None:  # Any: a batch of the user's own
        self.size = size
        self._phase: Phase = "start"
        self._phase_before: Phase = "start"  # a validation
        self._batch: Size | None = None
        self._most = 0  # tokens of the largest batch that went through
        self._held_before = 0
        self._former_hook: Callable[[threading.ExceptHookArgs], Any] | None = None  # Any: nothing looks at it

    # Watching.

    @override
    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._phase, self._batch, self._most, self._held_before = "start", None, 0, 0
        if self._former_hook is None:
            self._former_hook = threading.excepthook
            threading.excepthook = self._thread_failed

    @override
    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if self._former_hook is not None:
            threading.excepthook, self._former_hook = self._former_hook, None

    def _thread_failed(self, args: threading.ExceptHookArgs) -> None:
        """TensorBoard writes in a thread of its own; the run hears of a failure with its next event, without a traceback."""
        failed = args.exc_value
        if failed is not None and is_write_failure(failed) and type(args.thread).__module__.startswith("tensorboard."):
            logger.warning("The events for TensorBoard could not be written: %s", failed)
        elif self._former_hook is not None:
            self._former_hook(args)

    @override
    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int) -> None:
        self._phase, self._batch = "batch", self.size(batch)
        if pl_module.device.type == "cuda":
            self._held_before = torch.cuda.memory_allocated(pl_module.device)

    @override
    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._phase = "between"
        self._most = max(self._most, self._batch.tokens if self._batch is not None else 0)

    @override
    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._phase_before, self._phase = self._phase, "validation"

    @override
    def on_validation_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        self._batch = self.size(batch)

    @override
    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._phase = self._phase_before

    # Telling.

    @override
    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        if is_out_of_memory(exception):
            advise(exception, self._memory_text(trainer, pl_module, exception))
        elif (failure := _write_failure(exception)) is not None:
            # One that is explained already is repeated, since closing the loggers may fail next, and hide it.
            is_explained = isinstance(exception, OSError) and failure is not exception
            folder = Path(trainer.default_root_dir)
            advise(exception, str(exception) if is_explained else _disk_text(folder, failure))
        self.teardown(trainer, pl_module, TrainerFn.FITTING)

    def _memory_text(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> str:
        known = self._phase in ("batch", "validation") and self._batch is not None
        size = f" of {self._batch.text()}" if known and self._batch is not None else ""
        held = self._held(pl_module.device)
        went_through = f" The largest training batch that went through had {self._most} tokens." if self._most else ""
        cures = self._smaller(trainer)
        # Only a backward pass needs activations.
        if self._phase == "batch" and not recomputes_activations(pl_module):
            cures.append("switch gradient checkpointing on (`--model.gradient_checkpointing true`)")
        if held is not None and held.before_batch > _MOSTLY_WEIGHTS * held.total:
            cures = [*fewer_weights(pl_module, is_split=needs_lockstep(trainer.strategy)), *cures]
        return (
            f"Out of memory {_PLACES[self._phase]}{size}{_asked(exception)}. {_held_text(held)}{went_through} "
            f"What helps, the likeliest first: {'; '.join(cures)}."
        )

    def _held(self, device: torch.device) -> _Held | None:
        if device.type != "cuda":
            return None
        total = torch.cuda.get_device_properties(device).total_memory
        return _Held(total, torch.cuda.max_memory_allocated(device), self._held_before)

    def _smaller(self, trainer: L.Trainer) -> list[str]:
        """Settings that make a batch smaller, with numbers that are likely to fit, and the update kept as large."""
        data: object = trainer.datamodule  # type: ignore[attr-defined]  # Lightning sets it outside __init__
        accumulate = trainer.accumulate_grad_batches
        if isinstance(data, RolloutData):
            # What a rollout or a validation reads goes by the micro-batches, too.
            smaller = f"cut an update into more micro-batches (`--trainer.accumulate_grad_batches {2 * accumulate}`)"
            return [smaller] if self._phase == "batch" else [*_fewer_samples(data, held_out=self._phase == "validation"), smaller]
        if self._batch is None or not isinstance(data, PreferenceData):
            return ["give smaller batches"]
        batch = self._batch
        # What went through and was hardly smaller is at the edge itself.
        fits = self._most if 0 < self._most < _HARDLY_SMALLER * batch.tokens else -(-batch.tokens // 2)
        found = []
        if batch.rows > 1:
            if data.batch_size is not None and batch.rows >= data.batch_size:
                rows = max(1, batch.rows * fits // batch.tokens)
                setting, parts = f"--data.batch_size {rows}", -(-batch.rows // rows)
            else:
                setting, parts = f"--data.max_tokens_per_batch {max(fits, batch.longest)}", -(-batch.tokens // fits)
            same_update = f"--trainer.accumulate_grad_batches {accumulate * parts}"
            found.append(f"smaller batches, as many rows to an update (`{setting} {same_update}`)")
        if batch.rows == 1 or batch.longest > fits:
            found.append(f"shorter rows (`--data.max_length {max(1, batch.longest // 2)}`)")
        return found


def _fewer_samples(data: RolloutData, *, held_out: bool) -> list[str]:
    """Settings by which fewer responses are decoded or scored at a time, where they would change anything.

    Args:
        data: Whose settings.
        held_out: Whether in validation.
    """
    num_samples, setting, fewest = data.num_samples, "--data.num_samples", 2
    if held_out:
        num_samples, setting, fewest = data.val_sampling.num_samples, "--data.val_sampling.num_samples", 1
    found = []
    # All responses to a prompt are decoded together, even where they are more than `max_rows`.
    if data.max_rows >= 2 * num_samples:
        found.append(f"decode fewer responses together (`--data.max_rows {data.max_rows // 2}`)")
    rewards = [data.reward_spec, data.gold_spec]
    specs = [each for spec in rewards if spec is not None for each in (spec if isinstance(spec, Mapping) else [spec])]
    if data.reward_batch_size > 1 and any(map(is_model_reward, specs)):
        found.append(f"score fewer at a time (`--data.reward_batch_size {data.reward_batch_size // 2}`)")
    if num_samples > fewest:
        found.append(f"sample fewer to a prompt (`{setting} {max(fewest, num_samples // 2)}`)")
    return found


def recomputes_activations(module: nn.Module) -> bool:
    """Whether gradient checkpointing is on in a model of transformers."""
    return any(part.gradient_checkpointing for part in module.modules() if isinstance(part, GradientCheckpointingLayer))


def fewer_weights(module: nn.Module, *, is_split: bool) -> list[str]:
    """What makes weights, gradients and optimiser smaller on each GPU, of what is not done already.

    Args:
        module: That is trained.
        is_split: Whether its weights are split over the processes.
    """
    ways = [] if any(isinstance(part, PeftModel) for part in module.modules()) else ["train adapters (`--model.lora.r 16`)"]
    ways += [] if is_split else ["spread them over several GPUs (`--trainer.strategy fsdp2`)"]
    first = f"the weights, gradients and optimiser alone fill most of the memory, so first {' or '.join(ways)}"
    return [first] if ways else []


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error means that memory, of the GPU or of the machine, ran out."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _MEMORY_WORDS)


def _asked(error: BaseException) -> str:
    """How much was asked for at last, in the words of torch's message."""
    gpu = re.search(r"[Tt]ried to allocate ([\d.]+ [KMGT]iB)", str(error))
    cpu = re.search(r"[Tt]ried to allocate (\d+) bytes", str(error))
    if gpu:
        return f", when {gpu[1]} more were asked for"
    return f", when {int(cpu[1]) / GIB:.2f} GiB more were asked for" if cpu else ""


def _held_text(held: _Held | None) -> str:
    if held is None:
        unit = 1 if sys.platform == "darwin" else 1024
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
        return f"The process held {peak / GIB:.2f} GiB at its peak."
    return (
        f"The GPU has {held.total / GIB:.1f} GiB; tensors held {held.peak / GIB:.1f} GiB at the peak, "
        f"{held.before_batch / GIB:.1f} GiB of it before the batch (weights, gradients, optimiser)."
    )


def _write_failure(error: BaseException) -> BaseException | None:
    """The failure to write that an error is, or was made of: Lightning takes those of TensorBoard for values of a wrong type."""
    found: BaseException | None = error
    while found is not None and not is_write_failure(found):
        found = found.__cause__
    return found


def _disk_text(folder: Path, error: BaseException) -> str:
    place = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
    free = shutil.disk_usage(place).free / 2**20
    saved = checkpoints_of(folder / "checkpoints")
    go_on = f"The newest checkpoint is {saved[0]}; " if saved else "No checkpoint was written yet; "
    reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return (
        f"The run folder {folder} could not be written to ({reason}); {free:.1f} MiB are free there. {go_on}what was logged "
        "after it may be missing. Free space, or give another disk with `--run.root`, then go on with `--run.resume auto`."
    )
