"""What every module that trains on group batches shares: the optimiser, exact normalisation, metrics, hooks, export."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import lightning as L
import torch.distributed as dist
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from typing_extensions import override

from lightning_pref.data.groups import GroupBatch
from lightning_pref.measures.means import WeightedMeans
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
from lightning_pref.modules.objectives import StepTerms
from lightning_pref.modules.optimisation import OptimizerSettings


@dataclass(frozen=True, kw_only=True)
class Loading:
    """How a model is loaded when it is given by name.

    Args:
        dtype: Of the weights. Keep `float32` with mixed precision; `bfloat16` goes with `--trainer.precision bf16-true`.
        attn_implementation: transformers' attention; `None` lets it choose.
        revision: Commit or tag on the hub.
        trust_remote_code: Run code that comes with the model. Off unless you have read it.
        seed: Of the initialisation of a preset.
    """

    dtype: Dtype = "float32"
    attn_implementation: AttentionImplementation | None = None
    revision: str | None = None
    trust_remote_code: bool = False
    seed: int = 0


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
        self._logged_at = 0

    @property
    @abstractmethod
    def trained(self) -> PreTrainedModel | PeftModel:
        """The model that is trained, once it is configured."""

    def load(self, name: str) -> PreTrainedModel:
        """A language model by name, loaded as the module's settings say."""
        return load_model(name, **asdict(self.loading))

    def made_ready(self, model: PreTrainedModel) -> PreTrainedModel:
        """A loaded model, ready for training; LoRA is added by the module itself."""
        # `from_pretrained` leaves eval mode, which Lightning keeps; adapters' dropout and checkpointing would be off.
        model.train()
        disable_dropout(model)
        if self.gradient_checkpointing:
            enable_gradient_checkpointing(model)
        return model

    @override
    def configure_optimizers(self) -> OptimizerLRScheduler:
        total = self.trainer.estimated_stepping_batches
        if total == float("inf"):
            raise ValueError(
                "The run has no end, so the schedule has no length; set `trainer.max_epochs` or `trainer.max_steps`."
            )
        # Under mixed precision a fused AdamW unscales gradients itself, so Lightning refuses to clip them.
        clips_mixed = bool(self.trainer.gradient_clip_val) and str(self.trainer.precision).endswith("-mixed")
        optimizer, schedule = self.optimizer_settings.build(self.parameters(), int(total), fused=not clips_mixed)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def digests(self) -> dict[str, str]:
        """Digests of what this run ended with, for its summary."""
        return {"weights": weights_digest(self.trained)}

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
        """Called once after every update."""

    @override
    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:  # Any: handed on as Lightning gives them
        super().optimizer_step(*args, **kwargs)
        # Not in `on_train_batch_end`: a checkpoint is written there before the module's own hook runs.
        self.after_update()

    @override
    def on_train_start(self) -> None:
        self._logged_at = self.trainer.global_step

    @override
    def on_train_batch_end(self, outputs: Any, batch: GroupBatch, batch_idx: int) -> None:
        # Any: Lightning's own type for step outputs
        updates = self.trainer.global_step
        every: int = self.trainer.log_every_n_steps  # type: ignore[attr-defined]  # Lightning sets it outside __init__
        if every and updates % every == 0 and updates != self._logged_at:
            self._logged_at = updates
            self.log_dict(self._flush(self.train_means))

    @override
    def on_train_end(self) -> None:
        # `log` is not allowed here; without this the updates since the last logged one would go unseen.
        if self.trainer.global_step != self._logged_at:
            means = {name: value.item() for name, value in self._flush(self.train_means).items()}
            for logger in self.trainer.loggers:
                logger.log_metrics(means, step=self.trainer.global_step)

    @override
    def on_validation_epoch_end(self) -> None:
        means = self._flush(self.val_means)
        # They are the same on every rank already; without `sync_dist` Lightning would advise it in every run.
        self.log_dict({f"val/{name}": value for name, value in means.items()}, sync_dist=True)

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
