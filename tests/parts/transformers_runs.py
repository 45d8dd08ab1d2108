"""Small, real runs of transformers' Trainer on preference pairs, offline."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, Trainer, TrainingArguments
from typing_extensions import override

from lightning_pref.callbacks.diagnostic import Diagnostic
from lightning_pref.callbacks.hosts import Host
from lightning_pref.callbacks.monitor import Monitor
from lightning_pref.integrations.transformers import ObserveForwards, attach, observe
from lightning_pref.measures.means import WeightedMeans
from lightning_pref.observations import Observation, PairObservation

PROMPT = 3  # tokens
Batch = dict[str, Tensor]


def tiny_llama() -> LlamaForCausalLM:
    """A random model, always the same; for processes that have no fixtures."""
    settings = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return LlamaForCausalLM(LlamaConfig(**settings, initializer_range=0.2))


def pair_rows(num_rows: int, seed: int = 0) -> list[dict[str, Any]]:
    """Rows of random tokens, all of one length."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, 60, (num_rows, 2, 8), generator=generator)
    ids[:, 1, :PROMPT] = ids[:, 0, :PROMPT]
    return [{"row_ids": 10 + row, "chosen": ids[row, 0], "rejected": ids[row, 1]} for row in range(num_rows)]


def collate(rows: list[dict[str, Any]]) -> Batch:
    return {key: torch.stack([torch.as_tensor(row[key]) for row in rows]) for key in rows[0]}


def logps(model: torch.nn.Module, ids: Tensor) -> Tensor:
    """Summed over the response, [B]."""
    token_logps = model(input_ids=ids).logits[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None]).squeeze(-1)
    return token_logps[:, PROMPT - 1 :].sum(-1)


def pair_observation(model: torch.nn.Module, batch: Mapping[str, Tensor]) -> PairObservation:
    return PairObservation(
        chosen_logps=logps(model, batch["chosen"]), rejected_logps=logps(model, batch["rejected"]), row_ids=batch["row_ids"]
    )


class PairTrainer(Trainer):
    """Somebody's trainer with a loss of its own."""

    publishes = False

    @override
    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Tensor | tuple[Tensor, dict[str, Tensor]]:
        pair = pair_observation(model, inputs)
        if self.publishes:
            observe(self, pair)
        loss = -torch.nn.functional.logsigmoid(pair.chosen_logps - pair.rejected_logps).mean()
        outputs = {"chosen_logps": pair.chosen_logps, "rejected_logps": pair.rejected_logps}
        return (loss, outputs) if return_outputs else loss

    @override
    def prediction_step(self, model: Any, inputs: Any, prediction_loss_only: bool, ignore_keys: Any = None) -> Any:
        with torch.no_grad():
            return self.compute_loss(model, self._prepare_inputs(inputs)), None, None


class PublishingTrainer(PairTrainer):
    """The same with the one line in it."""

    publishes = True


class Chosen(Monitor[WeightedMeans]):
    """Watches the mean log-probability of chosen responses."""

    prefix = "chosen"
    consumes = (PairObservation,)

    @override
    def new_accumulator(self) -> WeightedMeans:
        return WeightedMeans(["chosen/logps"])

    @override
    def update(self, accumulator: WeightedMeans, observation: Observation) -> None:
        assert isinstance(observation, PairObservation)
        assert not observation.chosen_logps.requires_grad
        accumulator.update({"chosen/logps": observation.chosen_logps}, torch.ones_like(observation.chosen_logps))

    @override
    def summarize(self, accumulator: WeightedMeans) -> dict[str, Tensor]:
        return accumulator.compute()


class Recorder(Diagnostic):
    """Writes down every event."""

    prefix = "recorder"

    def __init__(self) -> None:
        super().__init__()
        self.events: list[str] = []
        self.losses: list[float] = []
        self.norms: list[float] = []
        self.optimizers: list[object] = []

    @override
    def start(self, host: Host) -> None:
        self.events.append("start")

    @override
    def before_backward(self, host: Host, loss: Tensor) -> None:
        self.events.append("backward")
        self.losses.append(loss.item())

    @override
    def before_update(self, host: Host, optimizer: torch.optim.Optimizer) -> None:
        self.events.append(f"update at {host.step}")
        self.optimizers.append(optimizer)
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        self.norms.append(torch.stack([g.norm() for g in gradients]).norm().item())

    @override
    def after_batch(self, host: Host, outputs: Any, batch: Any, updated: bool) -> None:
        rows = batch["row_ids"].tolist()
        self.events.append(f"batch of {len(rows)} {'updated' if updated else 'waits'}, {self.updates} so far")

    @override
    def end_epoch(self, host: Host) -> None:
        self.events.append("epoch")

    @override
    def end_validation(self, host: Host) -> None:
        self.events.append("validation")

    @override
    def finish(self, host: Host) -> None:
        self.events.append("finish")


def arguments(folder: Path, **changes: Any) -> TrainingArguments:
    settings: dict[str, Any] = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 2,
        "per_device_eval_batch_size": 2,
        "num_train_epochs": 1,
        "learning_rate": 1e-2,
        "logging_steps": 2,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "remove_unused_columns": False,
        "disable_tqdm": True,
        "seed": 1,
    }
    return TrainingArguments(**{**settings, **changes})


def run(
    model: LlamaForCausalLM,
    folder: Path,
    *parts: Callback | ObserveForwards,
    trainer_class: type[PairTrainer] = PublishingTrainer,
    num_rows: int = 8,
    eval_dataset: Any = None,
    resume: bool = False,
    **changes: Any,
) -> PairTrainer:
    """Train on pairs, with diagnostics attached if there are any."""
    trainer = trainer_class(
        model=model,
        args=arguments(folder, **changes),
        train_dataset=pair_rows(num_rows),
        eval_dataset=eval_dataset,
        data_collator=collate,
    )
    if parts:
        attach(trainer, *parts)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def logged(trainer: Trainer, key: str) -> dict[int, float]:
    """Values of a key by step."""
    return {entry["step"]: entry[key] for entry in trainer.state.log_history if key in entry}


def weights(model: PreTrainedModel) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}
