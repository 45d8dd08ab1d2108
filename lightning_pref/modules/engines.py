"""What DeepSpeed, which trains in Lightning's place, may be asked for: settings under which an update stays exact."""

from __future__ import annotations

import lightning as L
from lightning.pytorch.strategies import DeepSpeedStrategy

# What splits a model over processes without these limits.
FSDP2 = "FSDP2 (`--trainer.strategy=fsdp2`)"


def prepare_engine(trainer: L.Trainer) -> None:
    """Raise where DeepSpeed would make another update than the exact mean over all rows, or one that nobody sees.

    Args:
        trainer: Of a module that optimises automatically, with any strategy.
    """
    if not isinstance(trainer.strategy, DeepSpeedStrategy):
        return
    assert isinstance(trainer.strategy.config, dict), "the strategy has read its configuration"
    # For the engine's own log of its speed; Lightning would ask the loader, whose batches come from no batch sampler.
    trainer.strategy.config.setdefault("train_micro_batch_size_per_gpu", 1)
    accumulate: int = trainer.accumulate_grad_batches
    if accumulate != 1:
        raise ValueError(
            f"`trainer.accumulate_grad_batches` is {accumulate}, and under DeepSpeed accumulation is not exact: Lightning and "
            f"the engine each divide the loss by {accumulate}, and the engine keeps the last, shorter window of an epoch for "
            "the next one instead of making an update. Set it to 1 and raise `data.batch_size` (or `data.max_tokens_per_batch`) "
            f"with `model.gradient_checkpointing`; {FSDP2} and DDP accumulate exactly."
        )
    if trainer.strategy.zero_stage_3:
        raise ValueError(
            "DeepSpeed's stage 3 leaves empty tensors in place of parameters, which the exact log-probabilities, the decay of "
            f"matrices alone, and the export read. Use `--trainer.strategy=deepspeed_stage_2`; {FSDP2} splits parameters, too."
        )
    precision = str(trainer.precision)
    if precision.startswith("16"):
        raise ValueError(
            f"`trainer.precision` is {precision}, and DeepSpeed scales the loss itself and does not tell which updates it "
            "skipped, so that schedules and monitors would go on. Use `bf16-mixed` or `32-true`, or `16-mixed` under DDP."
        )
