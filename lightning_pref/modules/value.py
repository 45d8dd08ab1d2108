"""Value functions: what a response is still worth in the state that each of its tokens is chosen in."""

from __future__ import annotations

import copy

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.optim import Optimizer
from transformers import PreTrainedModel
from typing_extensions import override

from lightning_pref.data.groups import GroupBatch
from lightning_pref.models.attention import predicting_hidden
from lightning_pref.models.forward import Layout, ResponseLogps, place_batch
from lightning_pref.models.heads import causal_lm_of
from lightning_pref.models.layouts import plan_layout
from lightning_pref.models.presets import is_preset
from lightning_pref.models.reward_heads import LinearRewardHead, RewardHead
from lightning_pref.models.reward_models import build_reward_model, is_classifier
from lightning_pref.models.sharding import within_forward
from lightning_pref.modules.group_module import Loading


class OwnTrunk(nn.Module):
    """A model of its own: a sequence classifier whose head is read where each response token is predicted.

    Args:
        model: The classifier, plain or with a LoRA adapter.
        layout: How batches go through it.
    """

    def __init__(self, model: PreTrainedModel | PeftModel, layout: Layout) -> None:
        super().__init__()
        self.model = model
        self.layout = layout

    @override
    def forward(self, batch: GroupBatch, policy: ResponseLogps | None) -> Tensor:  # one shape for both kinds
        """Value of the state that each response token was chosen in, [N] float32."""
        return within_forward(self.model, lambda: self._values(batch))[:, 0]

    def _values(self, batch: GroupBatch) -> Tensor:
        head = LinearRewardHead()
        trunk = head.trunk(self.model)
        placed = place_batch(trunk, batch, self.layout, name=type(causal_lm_of(self.model)).__name__)
        plan = plan_layout(batch, placed).to(batch.input_ids.device)
        return head.scores(self.model, predicting_hidden(trunk, batch, plan))


class SharedTrunk(nn.Module):
    """A head on the states of the policy, which the gradient of the values reaches.

    Args:
        hidden_size: Of the policy.
    """

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.head = RewardHead.around(torch.zeros(1, hidden_size), torch.zeros(1))

    @override
    def forward(self, batch: GroupBatch, policy: ResponseLogps | None) -> Tensor:  # one shape for both kinds
        """Value of the state that each response token was chosen in, [N] float32."""
        assert policy is not None and policy.hidden is not None, "the module asks the forward for it"
        values: Tensor = self.head(policy.hidden)
        # Where the weights are split, hooks hang on what this returns, and views are not for them.
        return values[:, 0].float().clone()


def value_classifier(model: str | PreTrainedModel, loading: Loading) -> PreTrainedModel:
    """A classifier with one label to be a value function: that of a reward model, or a language model with a head that says 0.

    Noise of a fresh head would be taken for knowledge by the first advantages.

    Args:
        model: Folder, hub id or preset; an object is copied.
        loading: How a model given by name is loaded.
    """
    source = model if isinstance(model, str) else copy.deepcopy(model)
    had_head = (
        isinstance(source, str)
        and not is_preset(source)
        and is_classifier(source, trust_remote_code=loading.trust_remote_code, revision=loading.revision)
    )
    built = build_reward_model(source, num_members=1, **loading.dense("a value function with a trunk of its own"))
    head = built.score
    assert isinstance(head, nn.Linear)
    if not had_head:
        nn.init.zeros_(head.weight)
    return built


def with_rate_factor(optimizer: Optimizer, value: nn.Module, factor: float) -> None:
    """Give the parameters of a value function a learning rate of their own, in multiples of that of their group."""
    own = {id(parameter) for parameter in value.parameters()}
    for group in list(optimizer.param_groups):
        moved = [parameter for parameter in group["params"] if id(parameter) in own]
        group["params"] = [parameter for parameter in group["params"] if id(parameter) not in own]
        rates: dict[str, float] = {name: factor * group[name] for name in ("lr", "initial_lr") if name in group}
        optimizer.add_param_group({**group, **rates, "params": moved})
