"""One update, cut in every way: batch, accumulation, processes, layout, precision; and the same update by hand in float64."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import lightning as L
import numpy as np
import torch
import torch.distributed as dist
from gloo_ranks import free_port, launched, take_place
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.plugins.precision import MixedPrecision
from speakers import quiet_trainer
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM
from typing_extensions import override

from lightning_pref.data.groups import PromptGroup
from lightning_pref.data.sampler import GroupBatches, GroupBatchSampler
from lightning_pref.data.store import GroupStore, GroupStoreWriter
from lightning_pref.models.reward_models import build_reward_model
from lightning_pref.modules import DPOModule, RewardModule, SFTModule
from lightning_pref.modules.group_module import GroupModule
from lightning_pref.modules.optimisation import OptimizerSettings

Kind = Literal["dpo", "sft", "reward"]
Precision = Literal["64-true", "32-true", "bf16-mixed", "bf16-true", "16-mixed"]
PRECISIONS: tuple[Precision, ...] = ("64-true", "32-true", "16-mixed", "bf16-mixed", "bf16-true")
# No number of processes and micro-batches divides it.
NUM_ROWS = 11
NUM_UPDATES = 2
RATE, BETA2, CLIP = 1e-2, 0.999, 0.5
# A large eps keeps Adam near the gradient; else a rounding error in a gradient of nearly 0 would decide a whole step.
EPS = 0.1
BETA = 0.5  # of DPO


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One way to cut the update."""

    kind: Kind
    ranks: int
    accumulate: int
    layout: Literal["padded", "packed", "shared"]
    precision: Precision

    @property
    def batch_size(self) -> int:
        """Rows of a micro-batch, so that one window holds all rows."""
        return -(-NUM_ROWS // (self.ranks * self.accumulate))

    @property
    def name(self) -> str:
        return f"{self.kind}, {self.ranks} x {self.accumulate} x {self.batch_size}, {self.layout}, {self.precision}"


def cells() -> list[Cell]:
    """The whole grid for DPO on one and two processes; of the rest, what shows that nothing there depends on the loss."""
    grid: list[Cell] = []
    layouts: tuple[Literal["padded", "packed", "shared"], ...] = ("padded", "packed", "shared")

    def add(kind: Kind, ranks: int, accumulate: Iterable[int], chosen: Iterable[Any], precisions: Iterable[Precision]) -> None:
        grid.extend(
            Cell(kind=kind, ranks=ranks, accumulate=a, layout=layout, precision=precision)
            for a in accumulate
            for layout in chosen
            for precision in precisions
        )

    add("dpo", 1, (1, 3), layouts, PRECISIONS)
    add("dpo", 1, (NUM_ROWS,), ("padded",), PRECISIONS)
    add("dpo", 2, (1, 3), ("padded", "shared"), PRECISIONS)
    add("dpo", 2, (3,), ("packed",), ("64-true", "32-true"))
    add("dpo", 3, (2,), ("padded", "shared"), ("64-true", "32-true"))
    for kind in ("sft", "reward"):
        add(kind, 1, (1, 3), ("padded", "shared"), ("64-true", "bf16-mixed"))
        add(kind, 2, (3,), ("padded", "shared"), ("64-true", "bf16-mixed"))
    return grid


class Outcome(NamedTuple):
    """What an update was: the loss, its gradient, and the weights after all updates."""

    loss: float
    gradient: Tensor
    weights: Tensor


class Deviation(NamedTuple):
    """How far an outcome is from the exact one, each relative to the size of what it deviates from."""

    loss: float
    gradient: float
    change: float  # of the weights


# The package, cut.


class FirstGradient(Callback):
    """Keeps the gradient and the loss of the first update."""

    def __init__(self) -> None:
        self.gradient: Tensor | None = None
        self.loss = float("nan")

    @override
    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Any) -> None:
        if self.gradient is None:
            self.gradient = torch.cat([p.grad.double().flatten() for p in trained(pl_module) if p.grad is not None])

    @override
    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.current_epoch == 0:
            self.loss = float(trainer.callback_metrics["loss"])


def trained(module: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in module.parameters() if parameter.requires_grad]


def flat(parameters: Iterable[Tensor]) -> Tensor:
    return torch.cat([parameter.detach().double().flatten() for parameter in parameters])


def build(cell: Cell, folder: Path) -> GroupModule:
    settings = OptimizerSettings(learning_rate=RATE, betas=(0.9, BETA2), eps=EPS, schedule="constant", warmup=0)
    common: dict[str, Any] = {"layout": cell.layout, "optimizer": settings}
    policy = str(folder / "policy")
    if cell.kind == "dpo":
        return DPOModule(policy, beta=BETA, reference_model=str(folder / "reference"), **common)
    return SFTModule(policy, **common) if cell.kind == "sft" else RewardModule(policy, **common)


def run(cell: Cell, folder: Path, rank: int = 0) -> Outcome:
    """Two epochs of one update each."""
    batches = GroupBatches(GroupStore(folder / ("demonstrations" if cell.kind == "sft" else "pairs")))
    sampler = GroupBatchSampler(
        batches, num_replicas=cell.ranks, rank=rank, batch_size=cell.batch_size, accumulate=cell.accumulate, shuffle=False
    )
    how: dict[str, Any] = {"precision": cell.precision}
    if cell.precision == "16-mixed":  # on a CPU Lightning makes bfloat16 of the name alone
        how = {"plugins": [MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=2.0**8))]}
    first, module = FirstGradient(), build(cell, folder)
    parallel: dict[str, Any] = {"devices": cell.ranks, "strategy": "ddp"} if cell.ranks > 1 else {"devices": 1}
    trainer = quiet_trainer(
        default_root_dir=folder,
        max_epochs=NUM_UPDATES,
        accumulate_grad_batches=cell.accumulate,
        gradient_clip_val=CLIP,
        log_every_n_steps=1,
        callbacks=[first],
        use_distributed_sampler=False,
        **parallel,
        **how,
    )
    trainer.fit(module, DataLoader(batches, batch_size=None, sampler=sampler))
    assert trainer.global_step == module.num_updates == NUM_UPDATES
    assert first.gradient is not None
    return Outcome(first.loss, first.gradient, flat(trained(module)))


# By hand.


def exact(kind: Kind, folder: Path, groups: Sequence[PromptGroup]) -> tuple[Outcome, Tensor, float]:
    """The outcome in float64, one row at a time, without the package; the weights before; the norm of the first gradient."""
    model: Any = LlamaForCausalLM.from_pretrained(folder / "policy", dtype=torch.float32)
    if kind == "reward":
        model = build_reward_model(str(folder / "policy"))  # for its fresh head, which is a matter of its seed
    model = model.double()
    reference = LlamaForCausalLM.from_pretrained(folder / "reference", dtype=torch.float32).double()
    losses: dict[Kind, Callable[[], Tensor]] = {
        "dpo": lambda: torch.stack([_dpo(model, reference, group) for group in groups]).mean(),
        "sft": lambda: _sft(model, groups),
        "reward": lambda: torch.stack([_bradley_terry(model, group) for group in groups]).mean(),
    }
    parameters = trained(model)
    start, first, norm = flat(parameters), None, 0.0
    means, squares = torch.zeros_like(start), torch.zeros_like(start)
    for step in range(1, NUM_UPDATES + 1):
        model.zero_grad()
        loss = losses[kind]()
        loss.backward()  # type: ignore[no-untyped-call]
        gradient = torch.cat([p.grad.flatten() for p in parameters if p.grad is not None])
        if first is None:
            first, norm = (loss.item(), gradient.clone()), gradient.norm().item()
        gradient = gradient * min(1.0, CLIP / (gradient.norm().item() + 1e-6))  # as torch clips
        means = 0.9 * means + 0.1 * gradient
        squares = BETA2 * squares + (1 - BETA2) * gradient.square()
        change = RATE * means / (1 - 0.9**step) / ((squares / (1 - BETA2**step)).sqrt() + EPS)
        with torch.no_grad():
            for parameter, part in zip(parameters, change.split([p.numel() for p in parameters]), strict=True):
                parameter.sub_(part.view_as(parameter))
    assert first is not None
    return Outcome(first[0], first[1], flat(parameters)), start, norm


def _ids(group: PromptGroup, response: Any) -> Tensor:
    return torch.tensor([[*group.prompt.tolist(), *response.tolist()]])


def _logps(model: Any, group: PromptGroup, response: Any) -> Tensor:
    ids = _ids(group, response)
    logps = model(ids).logits[0, len(group.prompt) - 1 : -1].log_softmax(-1)
    found: Tensor = logps.gather(1, ids[0, len(group.prompt) :, None])[:, 0]
    return found


def _dpo(model: Any, reference: Any, group: PromptGroup) -> Tensor:
    with torch.no_grad():
        known = [_logps(reference, group, response).sum() for response in group.responses]
    chosen, rejected = (_logps(model, group, response).sum() for response in group.responses)
    return F.softplus(-BETA * ((chosen - known[0]) - (rejected - known[1])))


def _sft(model: Any, groups: Sequence[PromptGroup]) -> Tensor:
    return -torch.cat([_logps(model, group, response) for group in groups for response in group.responses]).mean()


def _bradley_terry(model: Any, group: PromptGroup) -> Tensor:
    last = [model.base_model(_ids(group, response)).last_hidden_state[0, -1] for response in group.responses]
    chosen, rejected = (model.score.weight[0] @ state for state in last)
    return F.softplus(rejected - chosen)


class Bound(NamedTuple):
    """Largest deviations that a precision explains."""

    loss: float
    gradient: float
    change: float


# Half the distance between 1 and the next number, u, is 1e-16 in float64, 6e-8 in float32, 5e-4 in float16, 4e-3 in bfloat16.
# A gradient goes through dozens of rounded products, whose errors add up by chance to 6 u or so; twice that is allowed, and in
# the wide formats, where it costs nothing, more. The weights change by little of themselves: |weight| / |change| is 350 here, so
# that rounding them adds 350 u at most, and about 150 u by chance. Weights in float32, also those of the mixed precisions, are
# rounded in each of the two updates; those in bfloat16 when they are loaded, too.
BOUNDS: dict[Precision, Bound] = {
    # The loss is logged in float32.
    "64-true": Bound(1e-6, 1e-12, 1e-12),
    "32-true": Bound(2e-6, 5e-6, 6e-5),
    "16-mixed": Bound(6e-3, 6e-3, 6e-3),
    "bf16-mixed": Bound(3e-2, 6e-2, 6e-2),
    "bf16-true": Bound(3e-2, 6e-2, 1.5),
}
# Llama's norms compute in float32, float64 or not, and by hand and in the package round alike as long as every row goes through
# them by itself and its loss is scaled by a power of two. Where a prompt is shared, the gradients of its responses are added up
# before they are rounded; where three processes are averaged, each loss is three times as large.
ROUNDED_BY_NORMS = Bound(1e-6, 1e-6, 1e-6)


def bound_of(cell: Cell) -> Bound:
    by_norms = cell.precision == "64-true" and (cell.layout == "shared" or cell.ranks == 3)
    return ROUNDED_BY_NORMS if by_norms else BOUNDS[cell.precision]


def deviation(found: Outcome, oracle: Outcome, start: Tensor) -> Deviation:
    return Deviation(
        loss=abs(found.loss - oracle.loss) / oracle.loss,
        gradient=float((found.gradient - oracle.gradient).norm() / oracle.gradient.norm()),
        change=float((found.weights - oracle.weights).norm() / (oracle.weights - start).norm()),
    )


# All of it.


def prepare(folder: Path) -> dict[Kind, list[PromptGroup]]:
    """Two models, and ragged rows for every kind."""
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    for name, seed in (("policy", 0), ("reference", 1)):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            config = LlamaConfig(vocab_size=64, max_position_embeddings=128, initializer_range=0.2, **sizes)
            LlamaForCausalLM(config).save_pretrained(folder / name)
    generator = np.random.default_rng(0)

    def tokens() -> Any:
        return generator.integers(1, 64, size=generator.integers(2, 12))

    pairs = [PromptGroup(row_id=row, prompt=tokens(), responses=(tokens(), tokens()), ranks=(0, 1)) for row in range(NUM_ROWS)]
    demonstrations = [PromptGroup(row_id=g.row_id, prompt=g.prompt, responses=g.responses[:1]) for g in pairs]
    for name, groups in (("pairs", pairs), ("demonstrations", demonstrations)):
        with GroupStoreWriter(folder / name, vocab_size=64) as writer:
            for group in groups:
                writer.append(group)
    return {"dpo": pairs, "reward": pairs, "sft": demonstrations}


def run_process(ports: Mapping[int, int], folder: Path, process: int, _processes: int) -> dict[str, Outcome]:
    """The first two do what two processes do, while the third does what one does alone; then all three together."""
    done: dict[str, Outcome] = {}
    if process == 2:
        take_place(0, 1, ports[1])
        done |= {cell.name: run(cell, folder) for cell in cells() if cell.ranks == 1}
    for ranks in (2, 3):
        if process >= ranks:
            continue
        take_place(process, ranks, ports[ranks])
        done |= {cell.name: run(cell, folder, process) for cell in cells() if cell.ranks == ranks}
        dist.destroy_process_group()
    return done


class Matrix(NamedTuple):
    """The whole grid, run."""

    outcomes: dict[str, list[Outcome]]  # by name of the cell, of every process
    oracles: dict[Kind, Outcome]
    starts: dict[Kind, Tensor]
    norms: dict[Kind, float]  # of the first gradient

    def deviation(self, cell: Cell) -> Deviation:
        return deviation(self.outcomes[cell.name][0], self.oracles[cell.kind], self.starts[cell.kind])


def run_matrix(folder: Path) -> Matrix:
    """Run every cell, in one launch of three processes."""
    groups = prepare(folder)
    ports = {ranks: free_port() for ranks in (1, 2, 3)}
    outcomes: dict[str, list[Outcome]] = {}
    for done in launched(partial(run_process, ports), folder, 3):
        for name, outcome in done.items():
            outcomes.setdefault(name, []).append(outcome)
    known = {kind: exact(kind, folder, groups[kind]) for kind in groups}
    parts = [{kind: each[i] for kind, each in known.items()} for i in range(3)]
    return Matrix(outcomes, *parts)  # type: ignore[arg-type]


def table(matrix: Matrix) -> str:
    """All deviations in Markdown, the largest over the layouts in one line."""
    lines = ["| | processes x accumulated x batch | precision | loss | gradient | change of the weights |", "|---" * 6 + "|"]
    merged: dict[tuple[str, ...], list[Deviation]] = {}
    for cell in cells():
        parts = asdict(cell)
        cut = f"{cell.ranks} x {cell.accumulate} x {cell.batch_size}"
        merged.setdefault((parts["kind"], cut, parts["precision"]), []).append(matrix.deviation(cell))
    for (kind, cut, precision), found in merged.items():
        worst = [max(column) for column in zip(*found, strict=True)]
        lines.append(f"| {kind} | {cut} | `{precision}` | " + " | ".join(f"{value:.0e}" for value in worst) + " |")
    return "\n".join(lines)
