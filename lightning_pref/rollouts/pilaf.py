"""PILAF: preference pairs sampled from the policy moved away from and towards its reference.

Feng et al. 2025, "PILAF: Optimal Human Preference Sampling for Reward Modeling" (arXiv 2502.04270). With the implicit reward
r(x, y) = beta log(pi(y|x) / ref(y|x)), half of the pairs are two samples of the policy, and half are one of each
pi+ ~ pi exp(r) and pi- ~ pi exp(-r). The gradient of the DPO loss on such pairs points, to first order, along the gradient of
the expected reward less beta times the divergence from the reference. As in the paper, the tilt is made token by token.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np
import torch
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel
from typing_extensions import override

from lightning_pref.models.backbones import evaluating
from lightning_pref.models.heads import causal_lm_of
from lightning_pref.rollouts.engines.decoding import Decoding, PromptCache, RowIndex, Speaker, sample_noise
from lightning_pref.rollouts.sampling import Sampled, Sampler, Sampling, TokenIds

Branch = Literal["policy", "tilted"]


class SampledPairs(NamedTuple):
    """Two responses to every prompt. Which of them is better is not known: the first of a tilted pair may well lose."""

    pairs: list[Sampled]
    branches: list[Branch]  # of each prompt: both from the policy, or the first from pi+ and the second from pi-
    kl_plus: float  # KL(pi+ || pi), mean nats per token of the first responses of tilted pairs; `nan` without any
    kl_minus: float  # KL(pi || pi-), mean nats per token of the second ones

    @property
    def num_identical(self) -> int:
        """Pairs of the same tokens, which teach nothing."""
        return sum(np.array_equal(pair.responses[0], pair.responses[1]) for pair in self.pairs)


class PilafSampler(Sampler):
    """Samples pairs for preference labels. Temperature and truncation act on the mixed logits; the theory needs neither.

    Args:
        sampling: How tokens are drawn.
        end_token: Id that ends a response.
        reference: The initial model, the same through all iterations, with the policy's tokenizer and on its device.
        beta: As in the DPO loss that the pairs are for, 0 <= beta < 1; 0 samples from the policy alone.
        max_rows: Most responses that are decoded together.
    """

    def __init__(
        self,
        sampling: Sampling,
        end_token: int,
        reference: PreTrainedModel | PeftModel,
        *,
        beta: float = 0.1,
        max_rows: int = 256,
    ) -> None:
        _check_beta(beta)
        if max_rows < 2:
            raise ValueError(f"`max_rows` must be at least 2, a pair of responses, got {max_rows!r}.")
        self.sampling = sampling
        self.end_token = end_token
        self.reference = reference
        self.beta = beta
        self.max_rows = max_rows

    @override
    def sample(
        self, model: PreTrainedModel | PeftModel, prompts: Sequence[TokenIds], num_samples: int, *, seed: int
    ) -> list[Sampled]:
        if num_samples != 2:
            raise ValueError(f"PILAF samples pairs: `num_samples` must be 2, got {num_samples!r}.")
        return self.sample_pairs(model, prompts, seed=seed).pairs

    def sample_pairs(self, model: PreTrainedModel | PeftModel, prompts: Sequence[TokenIds], *, seed: int) -> SampledPairs:
        """A pair for every prompt. Both models are left as they were.

        Args:
            model: The policy.
            prompts: Token ids.
            seed: Of the sampling and the coins.
        """
        policy, reference = causal_lm_of(model), causal_lm_of(self.reference)
        _check_vocabularies(policy, reference)
        branches = [branch_of(prompt, seed) for prompt in prompts]
        pairs: dict[int, Sampled] = {}
        sums = np.zeros(2)
        counts = np.zeros(2)
        with evaluating(model), evaluating(self.reference):
            for branch in ("policy", "tilted"):
                numbers = [number for number, own in enumerate(branches) if own == branch]
                for start in range(0, len(numbers), self.max_rows // 2):
                    some = numbers[start : start + self.max_rows // 2]
                    asked = [prompts[number] for number in some]
                    speaker: Speaker = PromptCache(policy, asked, 2)
                    if branch == "tilted":
                        speaker = Tilted(speaker, PromptCache(reference, asked, 2), self._coefficients(len(some), policy.device))
                    length = self.sampling.max_new_tokens
                    decoding = Decoding(speaker, self.sampling, self.end_token, sample_noise(seed, some, 2, length))
                    decoding.advance(length)
                    for place, number in enumerate(some):
                        pairs[number] = decoding.sampled([2 * place, 2 * place + 1])
                    if isinstance(speaker, Tilted):
                        sums += speaker.divergences(decoding.lengths)
                        counts += decoding.lengths.reshape(-1, 2).sum(0)
        kl_plus, kl_minus = (float(total / count) if count else float("nan") for total, count in zip(sums, counts, strict=True))
        return SampledPairs([pairs[number] for number in range(len(prompts))], branches, kl_plus, kl_minus)

    def _coefficients(self, num_pairs: int, device: torch.device) -> Tensor:
        return torch.tensor([self.beta, -self.beta] * num_pairs, dtype=torch.float32, device=device)


class Tilted(Speaker):
    """Two models that decode the same rows, each with its own cache; the logits are mixed.

    Args:
        policy: Rows of the policy.
        reference: The same rows of the reference.
        coefficients: Of each row, +beta for pi+ and -beta for pi-, [R].
    """

    def __init__(self, policy: Speaker, reference: Speaker, coefficients: Tensor) -> None:
        self.policy = policy
        self.reference = reference
        self.coefficients = coefficients
        self.rows = np.arange(len(coefficients))
        self._divergences: list[tuple[RowIndex, Tensor]] = []  # of each token: rows that were in the batch, nats [R]
        self.logits = self._mixed()

    @override
    def step(self, tokens: Tensor) -> None:
        self.policy.step(tokens)
        self.reference.step(tokens)
        self.logits = self._mixed()

    @override
    def keep(self, rows: RowIndex) -> None:
        self.policy.keep(rows)
        self.reference.keep(rows)
        index = torch.as_tensor(rows, device=self.coefficients.device)
        self.coefficients, self.logits, self.rows = self.coefficients[index], self.logits[index], self.rows[rows]

    def divergences(self, lengths: RowIndex) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
        """KL(pi+ || pi) and KL(pi || pi-), summed over the tokens of the first and of the second responses, [2]."""
        sums = np.zeros(2)
        for position, (rows, nats) in enumerate(self._divergences):
            counted = position < lengths[rows]
            np.add.at(sums, rows[counted] % 2, nats.cpu().double().numpy()[counted])
        return sums

    def _mixed(self) -> Tensor:
        """The logits of all rows, [R, V]; their divergence from the policy is noted."""
        coefficients = self.coefficients[:, None]
        logits = mixed_logits(self.policy.logits, self.reference.logits, coefficients)
        tilted, plain = logits.log_softmax(-1), self.policy.logits.float().log_softmax(-1)
        upper, lower = torch.where(coefficients > 0, tilted, plain), torch.where(coefficients > 0, plain, tilted)
        # Tokens that neither can say count 0, not inf - inf.
        nats = torch.where(upper > -torch.inf, upper.exp() * (upper - lower), 0.0).sum(-1)
        self._divergences.append((self.rows, nats))
        return logits


def mixed_logits(policy: Tensor, reference: Tensor, coefficient: Tensor | float) -> Tensor:
    """(1 + c) policy - c reference: the policy tilted by its implicit reward, for c = beta up and for c = -beta down.

    A token that one of the two models rules out (-inf) stays ruled out, unless c is 0.

    >>> mixed_logits(torch.tensor([1.0, 2.0]), torch.tensor([0.0, 4.0]), 0.5)
    tensor([1.5000, 1.0000])

    Args:
        policy: Logits of the policy, [..., V].
        reference: Logits of the reference, [..., V].
        coefficient: Of the tilt, one number or a shape that broadcasts.

    Returns:
        Logits, [..., V] float32: the difference is a small one of large numbers.
    """
    own, other = policy.float(), reference.float()
    ruled_out = torch.isneginf(own) | torch.isneginf(other)
    # Masked before the difference is taken, which would be inf - inf.
    difference = torch.where(ruled_out, 0.0, own) - torch.where(ruled_out, 0.0, other)
    coefficient = torch.as_tensor(coefficient, dtype=own.dtype, device=own.device)
    mixed = torch.where(ruled_out, -torch.inf, own + coefficient * difference)
    return torch.where(coefficient == 0, own, mixed)


def branch_of(prompt: TokenIds, seed: int) -> Branch:
    """A fair coin that depends on the prompt's tokens and the seed only, however prompts are spread over processes."""
    content = np.asarray(prompt, dtype="<i8").tobytes()
    coin = hashlib.blake2b(content, key=(seed % 2**64).to_bytes(8, "little"), digest_size=1).digest()[0] & 1
    return "tilted" if coin else "policy"


def _check_beta(beta: float) -> None:
    if not 0 <= beta < 1:
        raise ValueError(
            f"`beta` must be in [0, 1), got {beta!r}: from 1 on, pi- would say what the policy finds unlikely. Give the beta of "
            "the DPO loss."
        )


def _check_vocabularies(policy: PreTrainedModel, reference: PreTrainedModel) -> None:
    own, other = (model.config.get_text_config().vocab_size for model in (policy, reference))
    if own != other:
        raise ValueError(
            f"The policy has {own} tokens and the reference {other}; PILAF adds their logits token by token. Give the model that "
            "the policy was trained from as the reference."
        )
