"""An ensemble of adapters on one frozen backbone: every member has LoRA weights and a head of its own.

Members share less than heads on one trunk do, and so disagree more where they are wrong; each costs a forward pass.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from peft import PeftModel
from peft.utils import ModulesToSaveWrapper
from torch import Tensor
from transformers import PreTrainedModel

from lightning_pref.data.groups import GroupBatch
from lightning_pref.models.adapters import LoraSettings, add_lora, lora_config, without_peft_warnings
from lightning_pref.models.forward import Layout
from lightning_pref.models.heads import causal_lm_of
from lightning_pref.models.reward_heads import RewardHead
from lightning_pref.models.reward_models import ResponseScores, ScoreQuantity, response_scores

MEMBER = "member_"


def add_members(model: PreTrainedModel, settings: LoraSettings, num_members: int, *, head_seed: int) -> PeftModel:
    """Wrap a reward model of one head so that K adapters are trained, each with a fresh head.

    Args:
        model: The plain reward model; its own head is left aside.
        settings: Of every adapter.
        num_members: K, two or more.
        head_seed: Of the heads' weights; those of the adapters come from torch's random state, as in any adapter.
    """
    if num_members < 2:
        raise ValueError(f"An ensemble of adapters needs two members or more, got {num_members!r}; a single one is plain LoRA.")
    adapted = add_lora(model, settings, task="SEQ_CLS", name=f"{MEMBER}0")
    with without_peft_warnings():
        for k in range(1, num_members):
            adapted.add_adapter(f"{MEMBER}{k}", lora_config(settings, "SEQ_CLS"))
    wrapper = causal_lm_of(adapted).score
    assert isinstance(wrapper, ModulesToSaveWrapper), "peft keeps a head for every adapter of a classifier"
    for k, name in enumerate(member_names(adapted)):
        head = wrapper.modules_to_save[name]
        assert isinstance(head, RewardHead)
        fresh = RewardHead.fresh(head.in_features, num_members, seed=head_seed).weight[k : k + 1]
        with torch.no_grad():
            head.weight.copy_(fresh)
        adapted.set_adapter(name)
    adapted.set_adapter(f"{MEMBER}0")
    # peft freezes whatever is not active; here all are trained, one after the other in every step.
    for name, parameter in adapted.named_parameters():
        if f".{MEMBER}" in name:
            parameter.requires_grad_(True)
    return adapted


def member_names(model: PreTrainedModel | PeftModel) -> list[str]:
    """Names of the adapters that are members of an ensemble, in their order; none for any other model."""
    if not isinstance(model, PeftModel):
        return []
    names = [name for name in model.peft_config if name.startswith(MEMBER)]
    return sorted(names, key=lambda name: int(name.removeprefix(MEMBER)))


@contextmanager
def active_member(model: PeftModel, name: str) -> Iterator[None]:
    """One member as the model inside, the first one afterwards; what is trained stays so.

    Args:
        model: An ensemble of adapters.
        name: One of `member_names`.
    """
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        model.set_adapter(name)
        yield
    finally:
        model.set_adapter(f"{MEMBER}0")
        # peft froze the others; a frozen parameter would get no gradient from a graph that is there already.
        for parameter, requires_grad in flags:
            parameter.requires_grad_(requires_grad)


def member_scores(
    model: PeftModel, batch: GroupBatch, *, layout: Layout = "auto", want: Collection[ScoreQuantity] = ()
) -> ResponseScores:
    """Scores by every member, one forward pass after the other; see `response_scores`."""
    found = []
    for name in member_names(model):
        with active_member(model, name):
            found.append(response_scores(model, batch, layout=layout, want=want))
    first = found[0]
    tokens = [own.token_members for own in found if own.token_members is not None]
    return ResponseScores(
        members=torch.cat([own.members for own in found]),
        lengths=first.lengths,
        response=first.response,
        token_members=_joined(tokens),
        hidden=None,  # each member has states of its own
        layout=first.layout,
    )


def _joined(tensors: list[Tensor]) -> Tensor | None:
    return torch.cat(tensors) if tensors else None


def member_folders(name: str) -> list[str]:
    """The reward models that a name stands for: the members of an exported ensemble of adapters, else the name itself."""
    folder = Path(name)
    found = [path.parent for path in folder.glob(f"{MEMBER}*/config.json")]
    if not found or (folder / "config.json").exists():
        return [name]
    return [str(path) for path in sorted(found, key=lambda path: int(path.name.removeprefix(MEMBER)))]
