"""Which strategies make every forward pass a joint act, and what one process alone says."""

from __future__ import annotations

from typing import Any

import pytest
from lightning.pytorch.strategies import DDPStrategy, FSDPStrategy, ModelParallelStrategy, SingleDeviceStrategy

from lightning_pref.modules.splitting import FSDP2Strategy
from lightning_pref.rollouts.lockstep import any_process, itself, needs_lockstep


@pytest.mark.parametrize(
    ("strategy", "needs"),
    [
        (SingleDeviceStrategy(), False),
        (DDPStrategy(), False),
        (FSDPStrategy(), True),
        (ModelParallelStrategy(), True),
        (FSDP2Strategy(), True),
    ],
    ids=lambda value: type(value).__name__,
)
def test_processes_that_share_a_forward_pass_go_in_lockstep(strategy: Any, needs: bool) -> None:
    assert needs_lockstep(strategy) is needs


@pytest.mark.parametrize("alive", [True, False])
def test_a_process_without_others_asks_nobody(alive: bool) -> None:
    assert any_process(alive) is itself(alive) is alive
