"""Implicit rewards: beta times the log-ratio of a language model to its reference, saved with that model and loaded again."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, NamedTuple, get_args

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from typing_extensions import override

from lightning_pref.data.groups import GroupBatch
from lightning_pref.domains import check_seed
from lightning_pref.models.backbones import Dtype, load_model
from lightning_pref.models.digests import weights_digest
from lightning_pref.models.exports import export, plain_model
from lightning_pref.models.forward import response_logps
from lightning_pref.models.full_precision import keeping_tables

# Beside the weights: the config of a model is taken over by whatever is trained from it, and that is no reward any more.
FILE = "implicit_reward.json"
# Where a reference that no name stands for lies in the folder of the reward.
BESIDE = "reference"


class ImplicitSettings(NamedTuple):
    """What makes a language model a reward: beta, and all that decides the model it is measured against."""

    beta: float  # rewards per nat
    reference: str  # folder, hub id or preset
    revision: str | None = None  # of the reference on the hub
    seed: int = 0  # of the reference's weights, where it is a preset
    loaded_in: Dtype | None = None  # in which the digest was taken; that of the reward if not given
    dtype: str | None = None  # that the reference had in training, where the precision has rounded it
    digest: str | None = None  # of the reference's weights; unchecked if not given


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
            self.reference = load_model(
                settings.reference, dtype=settings.loaded_in or dtype, revision=settings.revision, seed=settings.seed
            )
        except (OSError, ValueError) as error:
            raise ValueError(
                f"{name!r} is an implicit reward, measured against {settings.reference!r}, which could not be loaded: {error} "
                f"Write where the reference is now into {FILE!r} in the folder of the reward."
            ) from error
        _check_digest(self.reference, settings, name)
        # Rounded as in training before it gets the wanted dtype.
        for each in (settings.dtype, dtype):
            if each is not None and each != "auto":
                with keeping_tables(self.reference):
                    nn.Module.to(self.reference, getattr(torch, each))

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
        found = _parsed(json.loads(file.read_text(encoding="utf-8")))
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{file} must hold `beta`, in rewards per nat, and `reference`, a folder or hub id, as JSON; reading it gave "
            f"{type(error).__name__}: {error}. Export the reward model again, or correct the file."
        ) from error
    beside = file.parent / found.reference
    return found._replace(reference=str(beside.resolve())) if beside.is_dir() else found


def save_implicit_settings(folder: Path, settings: ImplicitSettings) -> None:
    """Mark the language model in a folder as an implicit reward.

    A reference that is a folder is written as the way there, so that the two can be moved together.
    """
    reference = Path(settings.reference)
    if reference.is_dir():
        settings = settings._replace(reference=os.path.relpath(reference.resolve(), folder.resolve()))
    (folder / FILE).write_text(json.dumps(settings._asdict(), indent=2) + "\n", encoding="utf-8")


def save_reference_beside(
    folder: Path, reference: PreTrainedModel | PeftModel, tokenizer: PreTrainedTokenizerBase, *, beta: float
) -> None:
    """Mark the language model in a folder as an implicit reward, with the reference itself in it.

    For a reference in 4 bit: its values depend on the device that it was quantised on, so that no name stands for it.

    Args:
        folder: Of the exported language model.
        reference: Written without its adapter, and dense.
        tokenizer: Of both.
        beta: Rewards per nat.
    """
    export(plain_model(reference, merged=False), tokenizer, folder / BESIDE)
    save_implicit_settings(folder, ImplicitSettings(beta, str(folder / BESIDE)))


def _parsed(found: Any) -> ImplicitSettings:  # Any: JSON
    settings = ImplicitSettings(**{**found, "beta": float(found["beta"]), "reference": str(found["reference"])})
    if settings.loaded_in not in (None, *get_args(Dtype)):
        raise ValueError(f"`loaded_in` is {settings.loaded_in!r}, known are {', '.join(get_args(Dtype))}")
    if settings.dtype is not None and not isinstance(getattr(torch, str(settings.dtype), None), torch.dtype):
        raise ValueError(f"`dtype` is {settings.dtype!r}, which torch does not have")
    check_seed("seed", settings.seed)
    return settings


def _check_digest(reference: PreTrainedModel, settings: ImplicitSettings, name: str) -> None:
    """Raise for weights other than those the reward was trained against."""
    if settings.digest is None:
        return
    found = weights_digest(reference)
    if found != settings.digest:
        raise ValueError(
            f"{name!r} is an implicit reward, measured against {settings.reference!r}, whose weights are not those it was "
            f"trained against: their digest is {found[:12]}, expected {settings.digest[:12]}. The rewards would be others. Write "
            f"where the reference of its training is (`reference`, `revision`, `seed`) into {FILE!r} in the folder of the "
            "reward, or train it again."
        )
