"""The gradient of an update is that of the exact mean over the update, however the update is cut into micro-batches."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from speakers import quiet_trainer
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import LlamaForCausalLM
from typing_extensions import override

from lightning_pref.data.groups import GroupBatch, PromptGroup
from lightning_pref.data.sampler import GroupBatches, GroupBatchSampler
from lightning_pref.data.store import GroupStore, GroupStoreWriter
from lightning_pref.modules import DPOModule, SFTModule
from lightning_pref.modules.optimisation import OptimizerSettings
from lightning_pref.modules.policy import PolicyModule
from lightning_pref.reports import RunRecord

TinyModel = Callable[..., LlamaForCausalLM]
RandomGroups = Callable[..., list[PromptGroup]]

# An update that moves the model hardly at all, so that the updates of differently cut runs see the same model.
STILL = OptimizerSettings(learning_rate=1e-9, schedule="constant", warmup=0)


class Gradients(Callback):
    """Keeps the gradient of every update, before and after clipping."""

    def __init__(self) -> None:
        self.seen: list[Tensor] = []
        self.clipped: list[Tensor] = []

    @staticmethod
    def _flat(module: L.LightningModule) -> Tensor:
        return torch.cat([p.grad.flatten().clone() for p in module.parameters() if p.grad is not None])

    @override
    def on_before_optimizer_step(
        self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        self.seen.append(self._flat(pl_module))

    @override
    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        # Backward pass and clipping happen inside the optimiser's step, and no hook of Lightning's follows on them.
        trainer.optimizers[0].register_step_post_hook(lambda *_: self.clipped.append(self._flat(pl_module)))


def stored(groups: list[PromptGroup], folder: Path) -> GroupBatches:
    with GroupStoreWriter(folder, vocab_size=64) as writer:
        for group in groups:
            writer.append(group)
    return GroupBatches(GroupStore(folder))


def run(
    module: PolicyModule,
    batches: GroupBatches,
    *,
    batch_size: int,
    accumulate: int,
    limit: int | float = 1.0,
    clip: float | None = None,
) -> tuple[Gradients, RunRecord]:
    sampler = GroupBatchSampler(batches, batch_size=batch_size, accumulate=accumulate, shuffle=False, limit_batches=limit)
    gradients, record = Gradients(), RunRecord()
    trainer = quiet_trainer(
        accumulate_grad_batches=accumulate,
        limit_train_batches=limit,
        gradient_clip_val=clip,
        logger=[record],
        log_every_n_steps=1,
        callbacks=[gradients],
    )
    trainer.fit(module, DataLoader(batches, batch_size=None, sampler=sampler))
    return gradients, record


def oracle(module: PolicyModule, groups: list[PromptGroup]) -> Tensor:
    """The gradient of the plain mean over one batch with all rows."""
    module.configure_model()
    module.zero_grad()
    terms = module.terms(GroupBatch.from_groups(groups))
    ((terms.losses * terms.weights).sum() / terms.weights.sum()).backward()
    return torch.cat([p.grad.flatten() for p in module.parameters() if p.grad is not None])


def build(kind: str, model: LlamaForCausalLM) -> PolicyModule:
    if kind == "dpo":
        return DPOModule(model, optimizer=STILL)
    return SFTModule(model, normalize="token" if kind == "sft-token" else "sequence", optimizer=STILL)


@pytest.mark.parametrize("kind", ["dpo", "sft-token", "sft-sequence"])
@pytest.mark.parametrize(("batch_size", "accumulate"), [(8, 1), (4, 2), (2, 4), (1, 8)])
def test_N1_one_update_is_the_mean_over_all_rows_however_it_is_accumulated(
    tiny_model: TinyModel, random_groups: RandomGroups, tmp_path: Path, kind: str, batch_size: int, accumulate: int
) -> None:
    groups = random_groups(8, ranked=kind == "dpo")
    expected = oracle(build(kind, tiny_model()), groups)
    batches = stored(groups, tmp_path / "store")
    gradients, _ = run(build(kind, tiny_model()), batches, batch_size=batch_size, accumulate=accumulate)
    assert len(gradients.seen) == 1
    assert torch.allclose(gradients.seen[0], expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", ["dpo", "sft-token"])
def test_N1_the_last_partial_window_is_divided_by_its_own_rows(
    tiny_model: TinyModel, random_groups: RandomGroups, tmp_path: Path, kind: str
) -> None:
    groups = random_groups(5, ranked=kind == "dpo")
    batches = stored(groups, tmp_path / "store")
    gradients, _ = run(build(kind, tiny_model()), batches, batch_size=1, accumulate=4)
    order = [int(row) for row in _order(batches, batch_size=1)]
    by_row = {group.row_id: group for group in groups}
    for seen, rows in zip(gradients.seen, [order[:4], order[4:]], strict=True):
        expected = oracle(build(kind, tiny_model()), [by_row[row] for row in rows])
        assert torch.allclose(seen, expected, rtol=1e-4, atol=1e-6)


def test_N1_a_limit_on_batches_ends_the_window_where_the_trainer_ends_it(
    tiny_model: TinyModel, random_groups: RandomGroups, tmp_path: Path
) -> None:
    groups = random_groups(8)
    batches = stored(groups, tmp_path / "store")
    gradients, _ = run(build("dpo", tiny_model()), batches, batch_size=1, accumulate=4, limit=6)
    order = _order(batches, batch_size=1)
    by_row = {group.row_id: group for group in groups}
    expected = oracle(build("dpo", tiny_model()), [by_row[row] for row in order[4:6]])
    assert torch.allclose(gradients.seen[1], expected, rtol=1e-4, atol=1e-6)


def _order(batches: GroupBatches, *, batch_size: int) -> list[int]:
    sampler = GroupBatchSampler(batches, batch_size=batch_size, shuffle=False)
    return [int(row) for planned in sampler for row in batches[planned].row_ids]


def test_N3_the_divisor_comes_with_the_batch_and_before_the_backward_pass(
    tiny_model: TinyModel, random_groups: RandomGroups, tmp_path: Path
) -> None:
    groups = random_groups(6)
    batches = stored(groups, tmp_path / "store")
    tokens = sum(len(response) for group in groups for response in group.responses)
    for planned in GroupBatchSampler(batches, batch_size=2, accumulate=3, shuffle=False):
        window = batches[planned].window
        assert window is not None
        assert window == (6.0, 12.0, float(tokens))


def test_N5_logged_means_are_over_rows_and_not_over_batches(
    tiny_model: TinyModel, random_groups: RandomGroups, tmp_path: Path
) -> None:
    groups = random_groups(5)
    batches = stored(groups, tmp_path / "store")
    _, record = run(build("dpo", tiny_model()), batches, batch_size=2, accumulate=3)
    module = build("dpo", tiny_model())
    module.configure_model()
    values = module.terms(GroupBatch.from_groups(groups)).measured[0].values
    for key in ("logps/chosen", "logps/rejected"):
        assert record.metrics[key].last == pytest.approx(values[key].mean().item(), rel=1e-5)


def test_N6_clipping_sees_the_whole_update_and_not_its_micro_batches(
    tiny_model: TinyModel, random_groups: RandomGroups, tmp_path: Path
) -> None:
    groups = random_groups(8)
    batches = stored(groups, tmp_path / "store")
    expected = oracle(build("dpo", tiny_model()), groups)
    gradients, _ = run(build("dpo", tiny_model()), batches, batch_size=2, accumulate=4, clip=0.01)
    assert expected.norm() > 0.01
    assert gradients.clipped[-1].norm().item() == pytest.approx(0.01, rel=1e-4)
    assert torch.allclose(gradients.clipped[-1], expected * (0.01 / expected.norm()), rtol=1e-3, atol=1e-7)


def test_batches_from_elsewhere_are_averaged_exactly_one_by_one(tiny_model: TinyModel, random_groups: RandomGroups) -> None:
    groups = random_groups(4)
    loader: DataLoader[Any] = DataLoader([GroupBatch.from_groups(groups)], batch_size=None)  # type: ignore[arg-type]
    gradients = Gradients()
    trainer = quiet_trainer(callbacks=[gradients])
    trainer.fit(build("dpo", tiny_model()), loader)
    expected = oracle(build("dpo", tiny_model()), groups)
    assert torch.allclose(gradients.seen[0], expected, rtol=1e-4, atol=1e-6)
