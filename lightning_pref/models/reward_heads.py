"""What turns the hidden state at a token into scores: a linear head, or two words of a language model's own vocabulary."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Protocol, Self

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from typing_extensions import override

from lightning_pref.functional.linear_logps import linear_logits
from lightning_pref.functional.masked import wide
from lightning_pref.models.full_precision import FullPrecision
from lightning_pref.models.heads import LMHead, backbone_of, causal_lm_of, head_of
from lightning_pref.models.parity import verified_head


class RewardHead(FullPrecision, nn.Linear):
    """K scores of a hidden state, one for each member of an ensemble; [n, D] -> [n, K] float32.

    The product runs in float32 also under autocast. It is an `nn.Linear`, so that transformers and peft know what to do with it.
    """

    @classmethod
    def fresh(cls, hidden_size: int, num_members: int, *, seed: int) -> Self:
        """A head with normal weights of standard deviation 1 / sqrt(D + 1) (Ziegler et al., arXiv 1909.08593), without bias.

        The final norm gives states of about sqrt(D), so scores begin with a deviation of about 1. The weights depend on the
        arguments alone: equal on all ranks and devices, and the state of torch's random generators is left as it was.
        """
        generator = torch.Generator().manual_seed(seed)
        weight = torch.randn(num_members, hidden_size, generator=generator, dtype=torch.float32, device="cpu")
        return cls.around(weight * (hidden_size + 1) ** -0.5, None)

    @classmethod
    def around(cls, weight: Tensor, bias: Tensor | None) -> Self:
        """A head with these weights, [K, D], and this bias, [K]."""
        with torch.device("meta"):
            head = cls(weight.shape[1], weight.shape[0], bias=bias is not None)
        head.weight = nn.Parameter(wide(weight.detach()))
        if bias is not None:
            head.bias = nn.Parameter(wide(bias.detach()))
        return head

    @override
    def forward(self, input: Tensor) -> Tensor:
        with torch.autocast(input.device.type, enabled=False):
            return F.linear(input.to(self.weight.dtype), self.weight, self.bias)


class ScoreHead(Protocol):
    """From hidden states to scores."""

    def trunk(self, model: PreTrainedModel | PeftModel) -> PreTrainedModel:
        """The part of the model that makes the hidden states."""
        ...

    def scores(self, model: PreTrainedModel | PeftModel, hidden: Tensor) -> Tensor:
        """Scores of hidden states, [n, D] -> [n, K], float32."""
        ...


class LinearRewardHead:
    """The head named `score` that transformers' sequence classifiers have, one score for each of its labels."""

    def trunk(self, model: PreTrainedModel | PeftModel) -> PreTrainedModel:
        base = causal_lm_of(model)
        trunk = base.base_model
        if not isinstance(trunk, PreTrainedModel) or trunk is base or not callable(getattr(base, "score", None)):
            raise ValueError(
                f"{type(base).__name__} has no reward head called `score`. Build a reward model from it with "
                "`build_reward_model`, or score with a `VerbalizerRewardHead`, which needs a language model's own head."
            )
        return trunk

    def scores(self, model: PreTrainedModel | PeftModel, hidden: Tensor) -> Tensor:
        head: Any = causal_lm_of(model).score  # Any: the head itself, or peft's wrapper around it
        scores: Tensor = head(hidden)
        return wide(scores)


@dataclass(frozen=True, kw_only=True)
class VerbalizerRewardHead:
    """Logit of one word less the logit of another, as the next token after the response: no new weights.

    Attributes:
        positive: Token id of the word that speaks for a response.
        negative: Token id of the word that speaks against it.
    """

    positive: int
    negative: int

    def __post_init__(self) -> None:
        if self.positive == self.negative:
            raise ValueError(f"Both label words are token {self.positive}: their difference is 0 for every response.")

    @classmethod
    def from_words(cls, tokenizer: PreTrainedTokenizerBase, positive: str, negative: str) -> Self:
        """The head of two words, each of which must be one token as written, leading space included."""
        return cls(positive=_single_token(tokenizer, positive), negative=_single_token(tokenizer, negative))

    def trunk(self, model: PreTrainedModel | PeftModel) -> PreTrainedModel:
        return backbone_of(model)

    def scores(self, model: PreTrainedModel | PeftModel, hidden: Tensor) -> Tensor:
        rows = self.rows(verified_head(model, head_of(model)))
        positive, negative = linear_logits(
            hidden, rows.weight, bias=rows.bias, low_rank=rows.low_rank, scale=rows.scale, softcap=rows.softcap
        ).unbind(-1)
        return (positive - negative).unsqueeze(-1)

    def rows(self, head: LMHead) -> LMHead:
        """The head over the two words alone."""
        if max(self.positive, self.negative) >= head.weight.shape[0]:
            raise ValueError(
                f"The label words are tokens {self.positive} and {self.negative}, but the model has {head.weight.shape[0]} "
                "logits. Take the words from the model's own tokenizer."
            )
        pick = torch.tensor([self.positive, self.negative], device=head.weight.device)
        low_rank = None if head.low_rank is None else head.low_rank._replace(up=head.low_rank.up[pick])
        return replace(head, weight=head.weight[pick], bias=None if head.bias is None else head.bias[pick], low_rank=low_rank)


def _single_token(tokenizer: PreTrainedTokenizerBase, word: str) -> int:
    ids: list[int] = tokenizer(word, add_special_tokens=False)["input_ids"]
    if len(ids) != 1:
        pieces = ", ".join(map(repr, tokenizer.convert_ids_to_tokens(ids)))
        raise ValueError(
            f"The label word {word!r} is {len(ids)} tokens ({pieces}), but a score reads one logit. Choose a word that is one "
            "token; a leading space often makes the difference."
        )
    return ids[0]
