"""What every module that trains on group batches shares: the optimiser, exact normalisation, metrics, hooks, export."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Self, TypeVar

import lightning as L
import torch
import torch.distributed as dist
from lightning.pytorch.utilities.types import LRSchedulerTypeUnion, OptimizerLRScheduler
from peft import PeftModel
from torch import Tensor, nn
from torch.optim import Optimizer
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from typing_extensions import override

from lightning_pref.checkpoints import check_same_weights
from lightning_pref.data.groups import GroupBatch
from lightning_pref.domains import check_seed
from lightning_pref.measures.means import WeightedMeans
from lightning_pref.measures.updates import was_executed
from lightning_pref.models.adapters import LoraSettings
from lightning_pref.models.backbones import (
    AttentionImplementation,
    Dtype,
    disable_dropout,
    enable_gradient_checkpointing,
    load_model,
)
from lightning_pref.models.digests import weights_digest
from lightning_pref.models.forward import Layout
from lightning_pref.models.full_precision import keeping_tables
from lightning_pref.models.heads import causal_lm_of
from lightning_pref.models.quantised import QuantizationSettings, is_quantized, made_exact
from lightning_pref.models.sharding import filled, run_as_forward, skeleton_of, whole_state, whole_state_within
from lightning_pref.modules.engines import prepare_engine
from lightning_pref.modules.objectives import StepTerms
from lightning_pref.modules.optimisation import OptimizerSettings
from lightning_pref.modules.optimizers import TITLES, Sharding, check_checkpoints, sharding_of
from lightning_pref.modules.splitting import split, splits_weights, strategy_of, wrapper_of

NUM_UPDATES = "num_updates"  # in a checkpoint

Found = TypeVar("Found")


@dataclass(frozen=True, kw_only=True)
class Loading:
    """How a model is loaded when it is given by name.

    Args:
        dtype: Of the weights. Keep `float32` with mixed precision; `bfloat16` goes with `--trainer.precision bf16-true`.
        attn_implementation: transformers' attention; `None` lets it choose.
        revision: Commit or tag on the hub.
        trust_remote_code: Run code that comes with the model. Off unless you have read it.
        seed: Of the initialisation of a preset.
        quantization: Keep the frozen base of LoRA in 4 bit (QLoRA).
    """

    dtype: Dtype = "float32"
    attn_implementation: AttentionImplementation | None = None
    revision: str | None = None
    trust_remote_code: bool = False
    seed: int = 0
    quantization: QuantizationSettings | None = None

    def __post_init__(self) -> None:
        check_seed("seed", self.seed)

    def options(self) -> dict[str, Any]:  # Any: options of several types
        """All of them by name."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    def dense(self, what: str) -> dict[str, Any]:  # Any: options of several types
        """Those for a model that stays dense; raises where one in 4 bit is asked for.

        Args:
            what: Kind of the model, for the message.
        """
        if self.quantization is not None:
            raise ValueError(
                f"`quantization` keeps the base of a language model in 4 bit, but this run has {what}, for which that was never "
                "tried. Leave it out and load the model with `dtype: bfloat16` under LoRA."
            )
        return {name: value for name, value in self.options().items() if name != "quantization"}


class GroupModule(L.LightningModule):
    """A model trained on group batches. Automatic optimisation, any strategy and precision plugin.

    The weighted sum of the losses is divided by the count of the whole update, over all ranks and accumulated
    micro-batches, which every batch of `PreferenceData` carries. Batches from elsewhere carry none: their loss is the
    exact mean of each micro-batch over the ranks.
    """

    def __init__(
        self,
        model: str | PreTrainedModel,
        *,
        metric_names: Sequence[str],
        layout: Layout,
        lora: LoraSettings | None,
        optimizer: OptimizerSettings,
        loading: Loading,
        gradient_checkpointing: bool,
    ) -> None:
        super().__init__()
        # In a tuple, since a model assigned to a module is registered, and would be saved a second time beside the trained one.
        self._given = (model,)
        self.layout = layout
        self.lora = lora
        self.optimizer_settings = optimizer
        self.loading = loading
        self.gradient_checkpointing = gradient_checkpointing
        self.train_means = WeightedMeans(metric_names)
        self.val_means = WeightedMeans(metric_names)
        self._is_built = False
        self._skeleton: tuple[PreTrainedModel | PeftModel, ...] = ()  # of the trained model, where its weights are split
        self._whole: tuple[PreTrainedModel | PeftModel, ...] = ()  # the same with the weights that were gathered last
        self._matrices: frozenset[int] = frozenset()  # ids of parameters that were matrices before they were split
        self.num_updates = 0  # executed; a step that a loss scaler skips is none
        self._last_step_updated = True
        self._logged_at = 0
        self._goes_on_from: int | None = None  # where a run that goes on had logged last
        self._sharding: Sharding | None = None

    @property
    @abstractmethod
    def trained(self) -> PreTrainedModel | PeftModel:
        """The model that is trained, once it is configured."""

    @abstractmethod
    def build_models(self) -> None:
        """Load and adapt the models, whole; afterwards they are split where the strategy does that."""

    def load(self, name: str) -> PreTrainedModel:
        """A language model by name, loaded as the module's settings say."""
        return load_model(name, **self.loading.options())

    def made_ready(self, model: PreTrainedModel) -> PreTrainedModel:
        """A loaded model, ready for training; LoRA is added by the module itself."""
        if is_quantized(model):
            self._check_quantized(model)
            made_exact(model)
        # `from_pretrained` leaves eval mode, which Lightning keeps; adapters' dropout and checkpointing would be off.
        model.train()
        disable_dropout(model)
        if self.gradient_checkpointing:
            enable_gradient_checkpointing(model)
        return model

    def _check_quantized(self, model: nn.Module) -> None:
        if self.lora is None and not isinstance(model, PeftModel):
            raise ValueError(
                "The weights of the model are in 4 bit, which cannot be trained. Train an adapter on them with `lora: {r: 16}`, "
                "or load the model without `quantization`."
            )
        if self._sharding is not None:
            raise ValueError(
                f"A base in 4 bit does not go with {TITLES[self._sharding]}: bitsandbytes keeps the scales of a weight beside "
                "it, where the strategy would not split them with it. The nearest that does is LoRA on a base with "
                "`dtype: bfloat16`, or the strategy 'ddp' with the base in 4 bit."
            )

    @override
    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        with keeping_tables(self):
            return super()._apply(fn, recurse)  # type: ignore[no-untyped-call, no-any-return]

    @override
    def setup(self, stage: str) -> None:
        prepare_engine(self.trainer)
        self._sharding = sharding_of(self.trainer.strategy)

    @override
    def configure_model(self) -> None:
        """Load and adapt the models, once; Lightning calls it inside the strategy's and precision's context."""
        if self._is_built:
            return
        self.build_models()
        self._is_built = True
        strategy = strategy_of(self)
        if splits_weights(strategy):
            self._skeleton = (skeleton_of(self.trained),)
            self._matrices = frozenset(id(parameter) for parameter in self.parameters() if parameter.dim() >= 2)
            split(self, strategy)

    def run_whole(self, compute: Callable[[], Found]) -> Found:
        """Run a function outside of steps in which models of this module are used; every process has to come by."""
        wrapper = wrapper_of(self)
        return compute() if wrapper is None else run_as_forward(self, compute, called=wrapper)

    @property
    def whole(self) -> PreTrainedModel | PeftModel:
        """The trained model with whole weights; where they are split, as `gather` found them."""
        if not self._skeleton:
            return self.trained
        if not self._whole:
            raise ValueError(
                "The weights of the model are split over several processes. Call `module.gather()` in every process, then export "
                "in the first. At the end of training it is done already, for the first process."
            )
        return self._whole[0]

    def gather(self) -> None:
        """Put the weights of the trained model together in the memory of the first process; all have to call it."""
        if not self._skeleton:
            return
        (skeleton,) = self._skeleton
        keep = self.trainer.is_global_zero
        wrapper = wrapper_of(self)
        state = whole_state(self.trained, keep=keep) if wrapper is None else whole_state_within(wrapper, self.trained, keep=keep)
        if keep:
            self._whole = (filled(skeleton, state),)
            # It learns during training, too: the scale of scores.
            causal_lm_of(skeleton).config = causal_lm_of(self.trained).config

    @override
    def configure_gradient_clipping(
        self,
        optimizer: Optimizer,
        gradient_clip_val: int | float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        wrapper = wrapper_of(self)
        if wrapper is None or not gradient_clip_val or gradient_clip_algorithm == "value":
            super().configure_gradient_clipping(optimizer, gradient_clip_val, gradient_clip_algorithm)
            return
        # Each process has a part of the gradient, and only the wrapper knows the norm of all parts.
        wrapper.clip_grad_norm_(gradient_clip_val)

    @override
    def configure_optimizers(self) -> OptimizerLRScheduler:
        total = self.trainer.estimated_stepping_batches
        if total == float("inf"):
            raise ValueError(
                "The run has no end, so the schedule has no length; set `trainer.max_epochs` or `trainer.max_steps`."
            )
        check_checkpoints(self.optimizer_settings.name, self.trainer.strategy)
        # Under mixed precision a fused AdamW unscales gradients itself, so Lightning refuses to clip them. And under a loss
        # scaler it does so within its step, so that nobody could look at them before.
        clips_mixed = bool(self.trainer.gradient_clip_val) and str(self.trainer.precision).endswith("-mixed")
        scales_loss = getattr(self.trainer.precision_plugin, "scaler", None) is not None
        optimizer, schedule = self.optimizer_settings.build(
            self.parameters(),
            int(total),
            fused=not (clips_mixed or scales_loss),
            sharding=self._sharding,
            matrices=self._matrices,
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def digests(self) -> dict[str, str]:
        """Digests of what this run ended with, for its summary."""
        return {"weights": weights_digest(self.whole)}

    @abstractmethod
    def save_pretrained(self, folder: str | Path, tokenizer: PreTrainedTokenizerBase, *, merge: bool = True) -> None:
        """Write what was trained as a plain transformers folder, LoRA merged unless `merge` is off."""

    @abstractmethod
    def terms(self, batch: GroupBatch) -> StepTerms:
        """Losses and metrics of one micro-batch."""

    @override
    def training_step(self, batch: GroupBatch, batch_idx: int) -> Tensor:
        terms = self._measured_terms(batch, self.train_means)
        return self.exact_mean((terms.losses * terms.weights).sum(), terms, batch)

    @override
    def validation_step(self, batch: GroupBatch, batch_idx: int) -> None:
        self._measured_terms(batch, self.val_means)

    def _measured_terms(self, batch: GroupBatch, means: WeightedMeans) -> StepTerms:
        terms = self.terms(batch)
        means.update({"loss": terms.losses}, terms.weights)
        for values, weights in terms.measured:
            means.update(values, weights)
        return terms

    def exact_mean(self, total: Tensor, terms: StepTerms, batch: GroupBatch) -> Tensor:
        """The share of this micro-batch in the mean over the whole update.

        Lightning divides each micro-batch by the accumulation count and averages gradients over ranks, whatever they
        hold; multiplying by both makes the sum over micro-batches and ranks an exact weighted mean.
        """
        if batch.window is None:
            return total * self.trainer.world_size / sum_over_ranks(terms.weights.sum())
        count: float = getattr(batch.window, terms.unit)
        return total * (self.trainer.world_size * self.trainer.accumulate_grad_batches / count)

    def after_update(self) -> None:
        """Called once after every update that was executed."""

    @override
    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:  # Any: handed on as Lightning gives them
        optimizer: object = self.trainer.optimizers[0]
        executed: list[bool] = []
        if isinstance(optimizer, Optimizer):
            handle = optimizer.register_step_post_hook(lambda stepped, *_: executed.append(was_executed(stepped)))
            try:
                super().optimizer_step(*args, **kwargs)
            finally:
                handle.remove()
        else:  # an engine's own, which tells nobody
            super().optimizer_step(*args, **kwargs)
            executed.append(True)
        self._last_step_updated = any(executed)
        # Not in `on_train_batch_end`: a checkpoint is written there before the module's own hook runs.
        if self._last_step_updated:
            self.num_updates += 1
            self.after_update()

    @override
    def lr_scheduler_step(self, scheduler: LRSchedulerTypeUnion, metric: Any | None) -> None:  # Any: of a plateau schedule
        # Lightning counts a step that the loss scaler skipped like any other.
        if self._last_step_updated:
            super().lr_scheduler_step(scheduler, metric)

    @override
    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:  # Any: Lightning's own
        checkpoint[NUM_UPDATES] = self.num_updates

    @override
    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:  # Any: Lightning's own
        self.num_updates = checkpoint.get(NUM_UPDATES, checkpoint["global_step"])
        # A strategy that splits weights reads them by itself.
        if "state_dict" in checkpoint and not self._skeleton:
            check_same_weights(checkpoint["state_dict"].keys(), self.state_dict().keys())

    @override
    def on_train_start(self) -> None:
        self._logged_at = self.num_updates if self._goes_on_from is None else self._goes_on_from
        self._goes_on_from = None
        self._whole = ()

    @override
    def on_train_batch_end(self, outputs: Any, batch: GroupBatch, batch_idx: int) -> None:
        # Any: Lightning's own type for step outputs
        every: int = self.trainer.log_every_n_steps  # type: ignore[attr-defined]  # Lightning sets it outside __init__
        if every and self.num_updates // every > self._logged_at // every:
            self._log_train_means()

    @override
    def on_train_end(self) -> None:
        # Without this the updates since the last logged one would go unseen.
        if self.num_updates != self._logged_at:
            self._log_train_means()
        self.gather()

    def _log_train_means(self) -> None:
        """Straight to the loggers: `log` hands on by the trainer's own count of steps, in which skipped ones count, too."""
        self._logged_at = self.num_updates
        means = self._flush(self.train_means)
        numbers = dict(zip(means, torch.stack(list(means.values())).tolist(), strict=True))
        for logger in self.trainer.loggers:
            logger.log_metrics(numbers, step=self.trainer.global_step)
        # Beside it for those who watch them: early stopping, checkpoints by a monitored value, the progress bar.
        for shown in (self.trainer.callback_metrics, self.trainer.logged_metrics):
            shown.update({name: torch.tensor(value) for name, value in numbers.items()})

    @override
    def on_validation_epoch_end(self) -> None:
        means = self._flush(self.val_means)
        # They are the same on every rank already; without `sync_dist` Lightning would advise it in every run.
        self.log_dict({f"val/{name}": value for name, value in means.items()}, sync_dist=True)

    def rank_state(self) -> dict[str, Any]:  # Any: plain data and tensors
        """What this process has counted since the last report, for an exact resume."""
        return {"train_means": self.train_means.partial(), "logged_at": self._logged_at}

    def load_rank_state(self, state: dict[str, Any]) -> None:  # Any: as above
        """Take up what `rank_state` gave."""
        self.train_means.take_up(state["train_means"])
        self._goes_on_from = int(state["logged_at"])

    def reported(self, means: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What is logged of the means of the metrics."""
        return dict(means)

    def _flush(self, means: WeightedMeans) -> dict[str, Tensor]:
        values = {name: value.float() for name, value in self.reported(means.compute()).items()}
        means.reset()
        return values


def sum_over_ranks(values: Tensor) -> Tensor:
    """The sum over all processes, on every one of them; every rank must come by."""
    if not (dist.is_available() and dist.is_initialized()):
        return values
    total = values.detach().clone()
    dist.all_reduce(total)
    return total
