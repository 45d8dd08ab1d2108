"""Fingerprints of what a reference log-prob depends on."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass

import torch
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel

from lightning_pref.models.adapters import adapter_is_fresh, plain_state

# What "the log-prob of a response" means. Change it with any change of that meaning.
LOGP_DEFINITION = "sum over response tokens of float32 log-softmax; version 1"

# Config entries that change no log-prob.
SILENT_CONFIG = frozenset(
    {"_name_or_path", "transformers_version", "architectures", "dtype", "torch_dtype", "use_cache", "auto_map",
     "bos_token_id", "eos_token_id", "pad_token_id", "initializer_range"}
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class ReferenceDigest:
    """Everything that a stored reference log-prob depends on, each part by its digest or name.

    Attributes:
        weights: Of the reference model, from `weights_digest`.
        config: Of its architecture, from `config_digest`.
        tokenizer: Of the tokenizer and its chat template.
        data: Of the tokenised dataset, with its length limits and truncation.
        precision: That the forward computes in, such as `32-true` or `bf16-mixed`.
        attention: Attention implementation of transformers.
        definition: What a log-prob means.
    """

    weights: str
    config: str
    tokenizer: str
    data: str
    precision: str
    attention: str
    definition: str = LOGP_DEFINITION

    @property
    def key(self) -> str:
        """One digest of all parts."""
        return _text_digest(asdict(self))

    def changed_parts(self, stored: Mapping[str, str]) -> list[str]:
        """Names of the parts that differ from a stored digest."""
        return [name for name, value in asdict(self).items() if stored.get(name) != value]


def reference_digest(model: PreTrainedModel | PeftModel, *, tokenizer: str, data: str, precision: str) -> ReferenceDigest:
    """The digest of a model as a reference, with the given digests of tokenizer and data."""
    return ReferenceDigest(
        weights=weights_digest(model),
        config=config_digest(model),
        tokenizer=tokenizer,
        data=data,
        precision=precision,
        attention=str(model.config._attn_implementation),  # noqa: SLF001  # it has no public name
    )


def weights_digest(model: PreTrainedModel | PeftModel) -> str:
    """Digest of all weights by name, shape, dtype and bytes, the same on every device; of an unsharded model.

    A fresh LoRA adapter changes no output, so it is left out: a cache made without one stays good.
    """
    if isinstance(model, PeftModel) and adapter_is_fresh(model):
        return tensors_digest(plain_state(model, merged=False))
    return tensors_digest(model.state_dict())


def tensors_digest(state: Mapping[str, Tensor]) -> str:
    """Digest of named tensors by name, shape, dtype and bytes, the same on every device."""
    names = sorted(state)
    # hashlib lets go of the interpreter lock; four threads outrun the memory of most machines.
    with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as threads:
        digests = list(threads.map(lambda name: _tensor_digest(state[name]), names))
    return _text_digest(dict(zip(names, digests, strict=True)))


def config_digest(model: PreTrainedModel | PeftModel) -> str:
    """Digest of what the config says about the computation (rotary base, soft-caps, windows, ...), dropout aside."""
    entries = model.config.to_diff_dict()
    return _text_digest({name: value for name, value in entries.items() if name not in SILENT_CONFIG and "drop" not in name})


def _tensor_digest(tensor: Tensor) -> str:
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    header = f"{tuple(tensor.shape)} {tensor.dtype} ".encode()
    content = hashlib.sha256(header)
    content.update(flat.view(torch.uint8).numpy().data)
    return content.hexdigest()


def _text_digest(entries: Mapping[str, object]) -> str:
    text = json.dumps(entries, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:32]
