"""AdamW and the learning-rate schedules."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal

from torch.nn import Parameter
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR


@dataclass(frozen=True, kw_only=True)
class OptimizerSettings:
    """AdamW with a warmed-up schedule.

    Args:
        learning_rate: Peak learning rate, > 0.
        weight_decay: Decoupled decay of matrices; vectors (norms, biases) never decay.
        betas: Decay rates of the two moments.
        eps: Added to the root of the second moment.
        schedule: Shape after the warm-up.
        warmup: Length of the linear warm-up: a share of the run where below 1, else a number of updates.
        floor: Share of the peak at which a falling schedule ends, in [0, 1].
    """

    learning_rate: float = 1e-6
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    schedule: Literal["constant", "linear", "cosine"] = "cosine"
    warmup: float = 0.1
    floor: float = 0.0

    def __post_init__(self) -> None:
        if not self.learning_rate > 0:
            raise ValueError(f"`learning_rate` must be positive, got {self.learning_rate!r}.")
        if self.warmup < 0:
            raise ValueError(f"`warmup` must be a share below 1 or a number of updates, got {self.warmup!r}.")
        if not 0.0 <= self.floor <= 1.0:
            raise ValueError(f"`floor` is a share of the peak learning rate in [0, 1], got {self.floor!r}.")

    def build(self, parameters: Iterable[Parameter], total_updates: int, *, fused: bool = True) -> tuple[AdamW, LambdaLR]:
        """The optimiser over the trainable parameters and its schedule, to be stepped once per update.

        Args:
            parameters: All parameters of the model.
            total_updates: Length of the run.
            fused: Whether one kernel may update all parameters, where their device has it; the arithmetic is the same.
        """
        trainable = [p for p in parameters if p.requires_grad]
        if not trainable:
            raise ValueError(
                "No parameter is trainable: every `requires_grad` is False. With `lora`, check that its "
                "`target_modules` match layers of the model."
            )
        groups = [
            {"params": [p for p in trainable if p.dim() >= 2], "weight_decay": self.weight_decay},
            {"params": [p for p in trainable if p.dim() < 2], "weight_decay": 0.0},
        ]
        can_fuse = all(p.device.type in ("cpu", "cuda") and p.is_floating_point() for p in trainable)
        optimizer = AdamW(
            [group for group in groups if group["params"]],
            lr=self.learning_rate,
            betas=self.betas,
            eps=self.eps,
            fused=fused and can_fuse,
        )
        return optimizer, LambdaLR(optimizer, self.factor(total_updates))

    def factor(self, total_updates: int) -> Callable[[int], float]:
        """Factor on the peak learning rate at update 0, 1, ...

        The first update already moves (1/warmup) and so does the last: a falling schedule would reach the floor one
        update after the run.

        >>> factor = OptimizerSettings(schedule="linear", warmup=2).factor(5)
        >>> [round(factor(update), 3) for update in range(5)]
        [0.5, 1.0, 1.0, 0.667, 0.333]
        """
        warmup = round(self.warmup * total_updates) if self.warmup < 1 else round(self.warmup)
        if warmup >= total_updates and self.schedule != "constant":
            raise ValueError(
                f"The warm-up of {warmup} updates leaves nothing of a run of {total_updates} for the {self.schedule!r} "
                "schedule; lower `warmup`, train longer, or use `schedule: constant`."
            )

        def factor(update: int) -> float:
            if update < warmup:
                return (update + 1) / warmup
            if self.schedule == "constant":
                return 1.0
            progress = min(1.0, (update - warmup) / (total_updates - warmup))
            shape = 1.0 - progress if self.schedule == "linear" else 0.5 * (1.0 + math.cos(math.pi * progress))
            return self.floor + (1.0 - self.floor) * shape

        return factor
