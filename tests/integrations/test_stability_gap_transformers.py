"""The stability-gap evaluator on a transformers trainer."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaForCausalLM
from transformers_runs import PairTrainer, arguments, collate, logps, pair_rows
from typing_extensions import override

from lightning_pref.callbacks.stability_gap import StabilityGapEvaluator
from lightning_pref.integrations.transformers import attach, observe
from lightning_pref.observations import TaskSwitch


class Switching(PairTrainer):
    """Moves on to another task at its third update."""

    @override
    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        if self.state.global_step == 2:
            observe(self, TaskSwitch(task="new"))
        return super().compute_loss(*args, **kwargs)


def losses(model: torch.nn.Module, batch: dict[str, Tensor]) -> Tensor:
    torch.rand(5)
    return -logps(model, batch["chosen"]) / 4


def test_M4_it_watches_a_transformers_trainer_and_changes_nothing(
    tiny_model: Callable[..., LlamaForCausalLM], tmp_path: Path
) -> None:
    weights = []
    for watched in (False, True):
        trainer = Switching(
            tiny_model(attention_dropout=0.2), arguments(tmp_path), train_dataset=pair_rows(10), data_collator=collate
        )
        evaluator = StabilityGapEvaluator({"old": [collate(pair_rows(4, seed=3))]}, losses, budget=None)
        if watched:
            attach(trainer, evaluator)
        trainer.train()
        weights.append(trainer.model.state_dict())
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert evaluator.trace("old")[0] == [0, 1, 2, 3, 4, 5]
    assert [tuple(switch) for switch in evaluator.switches] == [(0, None), (2, "new")]
    assert set(evaluator.gaps()) == {"old"}
    found = {key: value for entry in trainer.state.log_history for key, value in entry.items()}
    assert found["stability_gap/old/loss"] == evaluator.trace("old")[1][-1]
    assert found["stability_gap/old/depth"] == evaluator.gaps()["old"].depth
    assert "stability_gap/min_acc" in found
