"""Implicit rewards: beta times the log-ratio of a language model to its reference, saved with that model and loaded again."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from typing_extensions import override

from lightning_pref.data.groups import GroupBatch
from lightning_pref.models.backbones import Dtype, load_model
from lightning_pref.models.forward import response_logps

# Beside the weights: the config of a model is taken over by whatever is trained from it, and that is no reward any more.
FILE = "implicit_reward.json"


class ImplicitSettings(NamedTuple):
    """What makes a language model a reward: beta, in rewards per nat, and the model it is measured against."""

    beta: float
    reference: str


class ImplicitReward(nn.Module):
    """Gives a response beta times the log-ratio of its probability to that under a reference; 0 for an empty one.

    Args:
        name: Folder of a language model with an implicit reward.
        dtype: Of the weights of both models.
    """

    def __init__(self, name: str, *, dtype: Dtype = "float32") -> None:
        super().__init__()
        settings = implicit_settings(name)
        assert settings is not None, "`implicit_settings` tells which folders have one"
        self.beta = settings.beta
        self.model = load_model(name, dtype=dtype)
        try:
            self.reference = load_model(settings.reference, dtype=dtype)
        except (OSError, ValueError) as error:
            raise ValueError(
                f"{name!r} is an implicit reward, measured against {settings.reference!r}, which could not be loaded: {error} "
                f"Write where the reference is now into {FILE!r} in the folder of the reward."
            ) from error

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.model.device

    @override
    def forward(self, batch: GroupBatch) -> Tensor:
        """Rewards of the responses, [R] float32."""
        ratio = response_logps(self.model, batch).logps - response_logps(self.reference, batch).logps
        return self.beta * ratio


def implicit_settings(name: str) -> ImplicitSettings | None:
    """What makes the language model in a local folder a reward; `None` for any other model."""
    file = Path(name) / FILE
    if not file.is_file():
        return None
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        beta, reference = float(found["beta"]), str(found["reference"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{file} must hold `beta`, in rewards per nat, and `reference`, a folder or hub id, as JSON; reading it gave "
            f"{type(error).__name__}: {error}. Export the reward model again, or correct the file."
        ) from error
    beside = file.parent / reference
    return ImplicitSettings(beta, str(beside.resolve()) if beside.is_dir() else reference)


def save_implicit_settings(folder: Path, settings: ImplicitSettings) -> None:
    """Mark the language model in a folder as an implicit reward.

    A reference that is a folder is written as the way there, so that the two can be moved together.
    """
    reference = Path(settings.reference)
    place = os.path.relpath(reference.resolve(), folder.resolve()) if reference.is_dir() else settings.reference
    (folder / FILE).write_text(json.dumps({"beta": settings.beta, "reference": place}, indent=2) + "\n", encoding="utf-8")
