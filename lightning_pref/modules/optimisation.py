"""The optimiser of a run and its learning-rate schedule."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from itertools import compress
from operator import not_
from typing import Literal

from torch.nn import Parameter
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from lightning_pref.domains import check_range
from lightning_pref.modules.optimizers import OptimizerName, Rounding, Sharding, build_optimizer, import_package, source_of

ADAMW_BETAS = (0.9, 0.999)
ADAMW_EPS = 1e-8
# Of the paper (Chen et al. 2023, arXiv 2302.06675).
LION_BETAS = (0.9, 0.99)


@dataclass(frozen=True, kw_only=True)
class OptimizerSettings:
    """An optimiser with a warmed-up schedule.

    Args:
        name: `adamw`, or one that keeps less state: in 8 bit (`adamw_8bit`, `lion_8bit`, `torchao_adamw_8bit`), in memory
            that the GPU may page out (`paged_...`), or without a second moment (`lion`, whose learning rate is 3 to 10
            times smaller). docs/optimizers.md says what each needs.
        learning_rate: Peak learning rate, > 0.
        weight_decay: Decoupled decay of matrices; vectors (norms, biases) never decay.
        betas: Decay rates of the two means; (0.9, 0.999) for AdamW and (0.9, 0.99) for Lion if not given.
        eps: Added to the root of AdamW's second moment; 1e-8 if not given.
        rounding: How updated weights in 16 bit are rounded: to the `nearest` number, which loses small updates; up or down by
            chance, so that they are kept on average (`stochastic`); or with the lost part carried along (`kahan`).
        schedule: Shape after the warm-up.
        warmup: Length of the linear warm-up: a share of the run where below 1, else a number of updates.
        floor: Share of the peak at which a falling schedule ends, in [0, 1].
    """

    name: OptimizerName = "adamw"
    learning_rate: float = 1e-6
    weight_decay: float = 0.0
    betas: tuple[float, float] | None = None
    eps: float | None = None
    rounding: Rounding = "nearest"
    schedule: Literal["constant", "linear", "cosine"] = "cosine"
    warmup: float = 0.1
    floor: float = 0.0

    def __post_init__(self) -> None:
        if not self.learning_rate > 0:
            raise ValueError(f"`learning_rate` must be positive, got {self.learning_rate!r}.")
        check_range("learning_rate", self.learning_rate)
        check_range("weight_decay", self.weight_decay, at_least=0)
        check_range("eps", self.eps, at_least=0)
        if not 0 <= self.warmup < math.inf:
            raise ValueError(f"`warmup` must be a share below 1 or a number of updates, got {self.warmup!r}.")
        if not 0.0 <= self.floor <= 1.0:
            raise ValueError(f"`floor` is a share of the peak learning rate in [0, 1], got {self.floor!r}.")
        if self.betas is not None and not all(0.0 <= beta < 1.0 for beta in self.betas):
            raise ValueError(f"`betas` are two decay rates in [0, 1), got {self.betas!r}.")
        if self.is_lion and self.eps is not None:
            raise ValueError(
                f"The optimiser {self.name!r} divides by nothing and so has no `eps`; leave it out, or use `name: adamw`."
            )
        # A missing package is told before a model is loaded.
        import_package(source_of(self.name, self.rounding), self.name)

    @property
    def is_lion(self) -> bool:
        """Whether every update has the size of the learning rate, whatever the gradient."""
        return "lion" in self.name

    def build(
        self,
        parameters: Iterable[Parameter],
        total_updates: int,
        *,
        fused: bool = True,
        sharding: Sharding | None = None,
        matrices: Collection[int] = (),
    ) -> tuple[Optimizer, LambdaLR]:
        """The optimiser over the trainable parameters and its schedule, to be stepped once per update.

        Args:
            parameters: All parameters of the model.
            total_updates: Length of the run.
            fused: Whether one kernel may update all parameters, where their device has it; the arithmetic is the same.
            sharding: How the strategy splits parameters over processes, if it does; from `sharding_of`.
            matrices: Ids of parameters that decay although they do not look like matrices: FSDP shows a flat piece of each.
        """
        trainable = [p for p in parameters if p.requires_grad]
        if not trainable:
            raise ValueError(
                "No parameter is trainable: every `requires_grad` is False. With `lora`, check that its "
                "`target_modules` match layers of the model."
            )
        decaying = [p.dim() >= 2 or id(p) in matrices for p in trainable]
        groups = [
            {"params": [*compress(trainable, decaying)], "weight_decay": self.weight_decay},
            {"params": [*compress(trainable, map(not_, decaying))], "weight_decay": 0.0},
        ]
        default_betas = LION_BETAS if self.is_lion else ADAMW_BETAS
        default_eps = None if self.is_lion else ADAMW_EPS
        optimizer = build_optimizer(
            [group for group in groups if group["params"]],
            name=self.name,
            rounding=self.rounding,
            learning_rate=self.learning_rate,
            betas=default_betas if self.betas is None else self.betas,
            eps=default_eps if self.eps is None else self.eps,
            fused=fused,
            sharding=sharding,
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
