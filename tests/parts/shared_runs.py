"""Short runs of every module that processes share, whatever the strategy, and the same updates made by hand in one process."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.strategies import FSDPStrategy, Strategy
from rollouts import rollout_data
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM
from typing_extensions import override

from lightning_pref.data.groups import GroupBatch, PromptGroup
from lightning_pref.data.playground_tokenizer import playground_tokenizer
from lightning_pref.data.sampler import GroupBatches, GroupBatchSampler
from lightning_pref.data.store import GroupStore, GroupStoreWriter
from lightning_pref.models.adapters import LoraSettings
from lightning_pref.models.forward import response_logps
from lightning_pref.models.reference import EmaReference, EmaSettings
from lightning_pref.models.reward_models import build_reward_model
from lightning_pref.modules import DPOModule, RewardModule, RLHFModule, SFTModule
from lightning_pref.modules.optimisation import OptimizerSettings
from lightning_pref.modules.rlhf_settings import KLSettings, ValueSettings
from lightning_pref.modules.rlhf_terms import value_terms
from lightning_pref.rollouts.lockstep import any_process
from lightning_pref.rollouts.sampling import Sampling

NUM_ROWS = 13
# A large eps keeps Adam near the gradient; else a rounding error in a gradient of nearly 0 would decide a whole step.
RATE, EPS, DECAY, CLIP = 1e-2, 0.1, 0.1, 0.05
MOVING = OptimizerSettings(learning_rate=RATE, eps=EPS, weight_decay=DECAY, schedule="constant", warmup=0)
VOCABULARY = max(playground_tokenizer().get_vocab().values()) + 1

Result = dict[str, Any]


def model(seed: int = 0, **changes: Any) -> LlamaForCausalLM:
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    special = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        made = LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, initializer_range=0.3, **sizes, **special, **changes))
    # The end of a response is often sure and often impossible, so that lengths are ragged.
    with torch.no_grad():
        made.lm_head.weight[2] *= 8
    return made


def sft(**options: Any) -> SFTModule:
    return SFTModule(model(tie_word_embeddings=True), optimizer=MOVING, **options)


def reward(**options: Any) -> RewardModule:
    return RewardModule(model(), optimizer=MOVING, num_members=2, center=0.01, **options)


def dpo(**options: Any) -> DPOModule:
    return DPOModule(model(), optimizer=MOVING, beta=0.5, **options)


def rlhf(**options: Any) -> RLHFModule:
    return RLHFModule(model(), optimizer=MOVING, kl=KLSettings(coefficient=0.3), **options)


LORA = LoraSettings(r=2)
# Module and accumulated micro-batches.
CASES: dict[str, tuple[Callable[[], Any], int]] = {
    "sft": (sft, 1),
    "sft in parts": (lambda: sft(gradient_checkpointing=True), 2),
    "reward": (reward, 1),
    "reward lora": (lambda: reward(lora=LORA), 2),
    "dpo": (dpo, 2),
    "dpo lora": (lambda: dpo(lora=LORA), 1),
    "dpo ema": (lambda: dpo(ema=EmaSettings(mixing=0.5, every_n_updates=1)), 1),
    "grpo": (rlhf, 1),
    "grpo judged": (rlhf, 1),
    "ppo": (lambda: rlhf(algorithm="ppo", value=ValueSettings(trunk="own")), 2),
    "ppo shared": (lambda: rlhf(algorithm="ppo", value=ValueSettings(trunk="shared")), 1),
}


def is_rlhf(case: str) -> bool:
    return case.startswith(("grpo", "ppo"))


def ragged_pairs() -> list[PromptGroup]:
    generator = np.random.default_rng(0)

    def tokens() -> Any:
        return generator.integers(3, VOCABULARY, size=generator.integers(2, 9))

    return [PromptGroup(row_id=row, prompt=tokens(), responses=(tokens(), tokens()), ranks=(0, 1)) for row in range(NUM_ROWS)]


def rows_for(case: str) -> list[PromptGroup]:
    return [replace(row, ranks=None) for row in ragged_pairs()] if case.startswith("sft") else ragged_pairs()


def write_rows(folder: Path) -> None:
    """What the runs read: demonstrations, pairs, and a reward model."""
    for name in ("sft", "pairs"):
        with GroupStoreWriter(folder / name, vocab_size=VOCABULARY) as writer:
            for group in rows_for(name):
                writer.append(group)
    build_reward_model(model(1)).save_pretrained(folder / "judge")
    playground_tokenizer().save_pretrained(folder / "judge")


class FlatStrategy(FSDPStrategy):
    """FSDP on the CPU, which Lightning names a device by number and so cannot ask torch for."""

    @override
    def _setup_model(self, model: nn.Module) -> nn.Module:
        return FullyShardedDataParallel(
            model, sharding_strategy=self.sharding_strategy, device_id=torch.device("cpu"), **self.kwargs
        )


class Witness(Callback):
    """Keeps the batches of every update of this rank and the gradient, put together, that the update is made with."""

    def __init__(self) -> None:
        self.updates: list[list[Any]] = []
        self.gradients: list[dict[str, Tensor]] = []
        self._window: list[Any] = []

    @override
    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int) -> None:
        self._window.append(batch)

    @override
    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: Any, optimizer: torch.optim.Optimizer) -> None:
        with flat_weights(trainer, with_grads=True):
            self.gradients.append({plain(n): whole(p.grad).clone() for n, p in pl_module.named_parameters() if p.requires_grad})
        self.updates.append(self._window)
        self._window = []


def whole(value: Tensor) -> Tensor:
    return (value.full_tensor() if isinstance(value, DTensor) else value).detach()


def plain(name: str) -> str:
    return name.replace("_fsdp_wrapped_module.", "")


@contextmanager
def flat_weights(trainer: L.Trainer, *, with_grads: bool = False) -> Iterator[None]:
    """With the weights that FSDP has split put together; of others nothing is changed."""
    wrapper = trainer.strategy.model
    if isinstance(wrapper, FullyShardedDataParallel):
        with FullyShardedDataParallel.summon_full_params(wrapper, writeback=False, with_grads=with_grads):
            yield
    else:
        yield


def weights(trainer: L.Trainer, module: nn.Module) -> dict[str, Tensor]:
    with flat_weights(trainer):
        return {plain(name): whole(parameter).clone() for name, parameter in module.named_parameters()}


def trainer_of(folder: Path, strategy: str | Strategy, ranks: int, *callbacks: Callback, **settings: Any) -> L.Trainer:
    return L.Trainer(
        accelerator="cpu",
        devices=ranks,
        strategy=FlatStrategy() if strategy == "fsdp" else strategy,
        default_root_dir=folder,
        logger=False,
        callbacks=list(callbacks),
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **settings,
    )


def shared_run(case: str, strategy: str, folder: Path, rank: int, ranks: int, **settings: Any) -> Result:
    """Two epochs over thirteen ragged rows, or two rollouts over seven prompts, validation in between.

    Args:
        case: Name of the case.
        strategy: Of the trainer.
        folder: What `write_rows` wrote to.
        rank: Of this process.
        ranks: Number of processes.
        settings: More of the trainer.
    """
    make, accumulate = CASES[case]
    # Ranks that were seeded apart: what they hold must not come from there.
    torch.manual_seed(rank)
    module, witness = make(), Witness()
    trainer = trainer_of(
        folder, strategy, ranks, witness, max_epochs=2, accumulate_grad_batches=accumulate, gradient_clip_val=CLIP, **settings
    )
    if is_rlhf(case):
        (folder / f"{rank}").mkdir(exist_ok=True)
        sampling = Sampling(max_new_tokens=12)
        judge = {"reward": str(folder / "judge")} if case == "grpo judged" else {}
        data = rollout_data(folder / f"{rank}", prompts=7, num_prompts=4, num_minibatches=2, sampling=sampling, **judge)
        trainer.fit(module, data)
        sampler: Any = data._instruments(data.sampling).sampler
    else:
        trainer.fit(module, *(loader(case, folder, rank, ranks, accumulate=a) for a in (accumulate, 1)))
    found = {
        "updates": witness.updates,
        "gradients": witness.gradients,
        "weights": weights(trainer, module),
        "metrics": {key: value.item() for key, value in trainer.callback_metrics.items()},
        "digests": module.digests() if rank == 0 else {},
    }
    if is_rlhf(case):
        found["goes along"] = sampler.any_rank is any_process
    place = folder / f"export {strategy} {ranks} {case}"
    exports = rank == 0 or strategy != "ddp"  # the others have nothing to export, and say so
    found["complaint"] = complaint(lambda: module.save_pretrained(place, playground_tokenizer())) if exports else ""
    if strategy == "fsdp":
        found["outside"] = complaint(lambda: response_logps(module.trained, GroupBatch.from_groups(ragged_pairs())))
    return found


def complaint(run: Callable[[], object]) -> str:
    """The error that a call ends with; nothing where it does not."""
    try:
        run()
    except ValueError as error:
        return str(error)
    return ""


def loader(case: str, folder: Path, rank: int, ranks: int, *, accumulate: int) -> DataLoader[Any]:
    batches = GroupBatches(GroupStore(folder / ("sft" if case.startswith("sft") else "pairs")))
    sampler = GroupBatchSampler(batches, num_replicas=ranks, rank=rank, batch_size=2, accumulate=accumulate, shuffle=True)
    return DataLoader(batches, batch_size=None, sampler=sampler)


def by_hand(case: str, updates: list[list[Any]], *, mixed: bool = False) -> Result:
    """The same updates in one process, by torch alone: of each the batches of all ranks and micro-batches as one batch.

    Args:
        case: Of the run.
        updates: By update, the batches of all ranks.
        mixed: Whether matrix products are in bfloat16.
    """
    torch.manual_seed(0)
    module = CASES[case][0]()
    module.configure_model()
    trained = [p for p in module.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(
        [{"params": [p for p in trained if p.dim() > 1]}, {"params": [p for p in trained if p.dim() < 2], "weight_decay": 0.0}],
        lr=RATE,
        eps=EPS,
        weight_decay=DECAY,
    )
    gradients = []
    rows = rows_for(case)
    for batches in updates:
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
            joint = joint_loss(module, batches) if is_rlhf(case) else mean_loss(module, [rows[r] for r in seen_rows(batches)])
        joint.backward()
        gradients.append({name: p.grad.clone() for name, p in module.named_parameters() if p.requires_grad})
        torch.nn.utils.clip_grad_norm_(trained, CLIP)
        optimizer.step()
        reference = getattr(module, "reference", None)
        if isinstance(reference, EmaReference):
            reference.after_update(module.policy)
    module.eval()
    return {
        "gradients": gradients,
        "weights": {name: p.detach() for name, p in module.named_parameters()},
        "module": module,
        "val/loss": None if is_rlhf(case) else mean_loss(module, rows).item(),
    }


def seen_rows(batches: list[GroupBatch]) -> list[int]:
    pairs = (pair for batch in batches for pair in zip(batch.row_ids.tolist(), batch.weights.tolist(), strict=True))
    return [row for row, weight in pairs if weight]


def mean_loss(module: Any, rows: list[PromptGroup]) -> Tensor:
    terms = module.terms(GroupBatch.from_groups(rows))
    mean: Tensor = (terms.losses * terms.weights).sum() / terms.weights.sum()
    return mean


def joint_loss(module: RLHFModule, batches: list[Any]) -> Tensor:
    """Of experience, which ranks sampled apart."""
    counts = {
        "responses": sum(float(each.weights.sum()) for each in batches),
        "response_tokens": sum(float((each.weights * each.groups.response_lengths).sum()) for each in batches),
    }
    total = torch.zeros(())
    for batch in batches:
        out = module.policy_logps(batch.groups, module._wanted())
        terms = module._policy_terms(out, batch)
        total = total + (terms.losses * terms.weights).sum() / counts[terms.unit]
        if module.value is not None:
            missed = value_terms(module.value(batch.groups, out), out.response, batch, clip=module.value_settings.clip)
            share = (missed.losses * missed.weights).sum() / counts[missed.unit]
            total = total + module.value_settings.coefficient * share
    return total
