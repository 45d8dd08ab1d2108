"""Reward models as transformers saves them: loaded, and read at the last real token whatever else is in the batch."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForSequenceClassification, PreTrainedModel

from lightning_pref.models.backbones import Dtype, _explaining, _resolved, evaluating
from lightning_pref.models.reward_models import has_linear_head


def load_reward_model(
    name_or_path: str, *, dtype: Dtype = "float32", trust_remote_code: bool = False, revision: str | None = None
) -> PreTrainedModel:
    """Load a model that gives a text one number, in evaluation mode.

    Args:
        name_or_path: A folder written by `save_pretrained`, or a hub id.
        dtype: Of the weights; bfloat16 alone keeps three digits of a score, so that the head runs in float32 either way.
        trust_remote_code: Run Python code that comes with the checkpoint.
        revision: Branch, tag or commit on the hub.
    """
    place = _resolved(name_or_path, wanted=("config.json",))
    with _explaining(place, trust_remote_code):
        config = AutoConfig.from_pretrained(place, trust_remote_code=trust_remote_code, revision=revision)
    if config.num_labels != 1 and any("SequenceClassification" in kind for kind in config.architectures or []):
        raise ValueError(
            f"The checkpoint {name_or_path!r} tells {config.num_labels} classes apart; a reward model gives one number "
            "(num_labels=1). Give a reward model, or wrap this one in a function: `module:function`."
        )
    with _explaining(place, trust_remote_code):
        # Any: with `output_loading_info` the untyped auto class returns a pair.
        loaded: Any = AutoModelForSequenceClassification.from_pretrained(
            place, num_labels=1, dtype=dtype, trust_remote_code=trust_remote_code, revision=revision, output_loading_info=True
        )
    model, report = loaded
    assert isinstance(model, PreTrainedModel)
    if report["missing_keys"]:
        missing = sorted(report["missing_keys"])
        raise ValueError(
            f"The checkpoint {name_or_path!r} lacks {', '.join(map(repr, missing[:3]))}, without which its scores would be "
            "random. It was probably saved from a language model; give a checkpoint of AutoModelForSequenceClassification."
        )
    model.train(False)
    return model


def sequence_scores(model: PreTrainedModel, sequences: Sequence[Sequence[int]], *, batch_size: int = 16) -> Tensor:
    """Score of each sequence, float32 [N] on the CPU; the same in any batch up to rounding.

    A decoder's score is read at the last token of the sequence. transformers looks for it by the id of the padding token,
    which reads a wrong one where responses end with that id; here it is told by the length. Other models score batches of
    equally long sequences, without any padding.

    Args:
        model: As `load_reward_model` gives it.
        sequences: Token ids of prompt and response, EOS included, none empty.
        batch_size: Sequences of a forward pass.
    """
    order = sorted(range(len(sequences)), key=lambda i: len(sequences[i]))
    score = _decoder_scores if has_linear_head(model) else _plain_scores
    found = torch.zeros(len(sequences), dtype=torch.float32)
    with evaluating(model):
        for batch in _batches(order, sequences, batch_size, may_pad=has_linear_head(model)):
            found[batch] = score(model, [sequences[i] for i in batch]).float().cpu()
    return found


def _batches(order: Sequence[int], sequences: Sequence[Sequence[int]], batch_size: int, *, may_pad: bool) -> Sequence[list[int]]:
    alike = [list(order)] if may_pad else [list(group) for _, group in groupby(order, key=lambda i: len(sequences[i]))]
    return [group[start : start + batch_size] for group in alike for start in range(0, len(group), batch_size)]


def _decoder_scores(model: PreTrainedModel, sequences: Sequence[Sequence[int]]) -> Tensor:
    device = next(model.parameters()).device
    lengths = torch.tensor([len(sequence) for sequence in sequences], device=device)
    width = int(lengths.max())
    ids = torch.tensor([[*sequence, *([0] * (width - len(sequence)))] for sequence in sequences], device=device)
    mask = torch.arange(width, device=device) < lengths[:, None]
    states = model.base_model(ids, attention_mask=mask.long()).last_hidden_state
    last = states[torch.arange(len(sequences), device=device), lengths - 1].float()
    head = model.score
    assert isinstance(head, nn.Linear)
    bias: Tensor | None = head.bias  # typed as if it were always there
    return F.linear(last, head.weight.float(), None if bias is None else bias.float())[:, 0]


def _plain_scores(model: PreTrainedModel, sequences: Sequence[Sequence[int]]) -> Tensor:
    ids = torch.tensor([list(sequence) for sequence in sequences], device=next(model.parameters()).device)
    logits = model(ids, attention_mask=torch.ones_like(ids)).logits
    assert isinstance(logits, Tensor)
    return logits[:, 0]
