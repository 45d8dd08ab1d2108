"""Lightning's DeepSpeed strategy without the question for a GPU: DeepSpeed itself runs on CPUs, over gloo."""

from __future__ import annotations

import torch
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy
from typing_extensions import override


class DeepSpeedOnCPU(DeepSpeedStrategy):
    """ZeRO stage 1 or 2 on CPUs."""

    @override
    def setup_environment(self) -> None:
        DDPStrategy.setup_environment(self)

    @override
    def setup_distributed(self) -> None:
        self.set_world_ranks()
        self._init_deepspeed_distributed()

    @property
    @override
    def root_device(self) -> torch.device:
        return torch.device("cpu", self.local_rank)  # DeepSpeed wants a number
