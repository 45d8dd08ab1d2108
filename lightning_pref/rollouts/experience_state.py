"""Experience as plain data, for a checkpoint in the middle of a rollout."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_pref.data.groups import PromptGroup
from lightning_pref.rollouts.experience import Experience, InHand, TokenRecord

# Any: what `torch.load(weights_only=True)` takes: tensors, numbers, text, and lists, tuples and dicts of them.


def in_hand_state(in_hand: InHand) -> dict[str, Any]:
    """A rollout that is being trained on as tensors and plain data, on the CPU."""
    experience = in_hand.experience
    return {
        "epoch": in_hand.epoch,
        "rollout": in_hand.rollout,
        "groups": [_group_state(group) for group in experience.groups],
        "tokens": experience.tokens.map(_copied)._asdict(),
        "weights": _copied(experience.weights),
        "temperature": experience.temperature,
        "keeps_groups": experience.keeps_groups,
    }


def in_hand_of(state: Mapping[str, Any], device: torch.device) -> InHand:
    """The rollout that `in_hand_state` took apart, its tokens on this device."""
    experience = Experience(
        groups=[_group_of(group) for group in state["groups"]],
        tokens=TokenRecord(**state["tokens"]).map(lambda values: values.to(device)),
        weights=state["weights"],
        temperature=state["temperature"],
        keeps_groups=state["keeps_groups"],
    )
    return InHand(state["epoch"], state["rollout"], experience)


def _copied(values: Tensor) -> Tensor:
    return values.detach().cpu().clone()


def _group_state(group: PromptGroup) -> dict[str, Any]:
    plain = {field.name: getattr(group, field.name) for field in fields(group)}
    return plain | {
        "prompt": torch.from_numpy(np.array(group.prompt)),
        "responses": [torch.from_numpy(np.array(response)) for response in group.responses],
    }


def _group_of(state: Mapping[str, Any]) -> PromptGroup:
    return PromptGroup(
        **dict(state)
        | {"prompt": state["prompt"].numpy(), "responses": tuple(response.numpy() for response in state["responses"])}
    )
