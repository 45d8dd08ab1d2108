"""What DeepSpeed may not be asked for; what its engine does with the rest is tested where it is installed."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy

from lightning_pref.modules.engines import prepare_engine


class Asked(NamedTuple):
    """What is read of a trainer."""

    strategy: object
    accumulate_grad_batches: int = 1
    precision: str = "32-true"


def deepspeed(stage: int) -> DeepSpeedStrategy:
    # Its constructor needs the package; a configuration is all that is read of it.
    strategy = DeepSpeedStrategy.__new__(DeepSpeedStrategy)
    strategy.config = {"zero_optimization": {"stage": stage}}
    return strategy


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (Asked(deepspeed(2), 4), r"`trainer\.accumulate_grad_batches` is 4, .*raise `data\.batch_size`.*accumulate exactly\."),
        (Asked(deepspeed(3)), r"stage 3 leaves empty tensors.*`--trainer\.strategy=deepspeed_stage_2`.*fsdp2"),
        (Asked(deepspeed(2), precision="16-mixed"), r"`trainer\.precision` is 16-mixed, .*Use `bf16-mixed` or `32-true`"),
    ],
)
def test_N7_what_deepspeed_would_do_inexactly_is_refused(asked: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        prepare_engine(asked)


@pytest.mark.parametrize("asked", [Asked(deepspeed(1)), Asked(deepspeed(2), precision="bf16-mixed")])
def test_the_rest_is_prepared_and_keeps_its_stage(asked: Any) -> None:
    stage = asked.strategy.config["zero_optimization"]["stage"]
    prepare_engine(asked)
    assert asked.strategy.config == {"zero_optimization": {"stage": stage}, "train_micro_batch_size_per_gpu": 1}


def test_another_strategy_may_accumulate_in_half_precision_and_is_left_alone() -> None:
    strategy = DDPStrategy()
    before = dict(vars(strategy))
    asked: Any = Asked(strategy, 4, "16-mixed")
    prepare_engine(asked)
    assert vars(strategy) == before


def test_the_engine_is_told_a_batch_size_that_lightning_would_not_find() -> None:
    asked: Any = Asked(deepspeed(2))
    prepare_engine(asked)
    assert asked.strategy.config["train_micro_batch_size_per_gpu"] == 1
    asked.strategy.config["train_micro_batch_size_per_gpu"] = 8
    prepare_engine(asked)
    assert asked.strategy.config["train_micro_batch_size_per_gpu"] == 8
