"""Whether a model gives the preferred response the higher likelihood, and whether training could be expected to make it so.

Chen et al. 2024, "Preference Learning Algorithms Do Not Learn Preference Rankings" (arXiv 2405.19534). With S the
log-probability of a response under the policy and R under the reference, in nats:

    ranking accuracy      mean of [S+ >= S-]                                              definition 2.3
    implicit accuracy     mean of [S+ - R+ > S- - R-]     `rewards/accuracies` of DPO trainers: another quantity
    idealised accuracy    mean of [R+ - R- + log(alpha / (1 - alpha)) / beta > 0]         corollary 3.3
    flip threshold        -log sigmoid(beta * (R- - R+))                                  theorem 4.1

alpha is the proportion of raters who prefer the chosen response. With lengths, S / n and R / n take the places of S and R.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_pref.functional.masked import wide


def ranking_accuracy(
    chosen: Tensor, rejected: Tensor, chosen_lengths: Tensor | None = None, rejected_lengths: Tensor | None = None
) -> Tensor:
    """Share of pairs whose chosen response is at least as likely as the rejected one.

    Args:
        chosen: Log-probabilities of the chosen responses, [B], nats, summed over tokens.
        rejected: Of the rejected responses, [B].
        chosen_lengths: Tokens of the chosen responses, [B]; with both lengths, log-probabilities per token are compared.
        rejected_lengths: Tokens of the rejected responses, [B].

    Returns:
        [], in [0, 1]; `nan` of no pairs, and where a value is `nan` or an empty response has no mean.

    >>> chosen, rejected = torch.tensor([-4.0, -9.0, -5.0]), torch.tensor([-4.0, -3.0, -8.0])
    >>> round(ranking_accuracy(chosen, rejected).item(), 3)
    0.667
    >>> ranking_accuracy(chosen, rejected, torch.tensor([1, 9, 1]), torch.tensor([4, 1, 4]))
    tensor(0.3333)
    """
    margin = _margin(chosen, rejected, chosen_lengths, rejected_lengths)
    return _share(margin >= 0, margin)


def implicit_accuracy(chosen: Tensor, rejected: Tensor, ref_chosen: Tensor, ref_rejected: Tensor) -> Tensor:
    """Share of pairs whose chosen response gained more than the rejected one against the reference; a tie is none.

    This is what DPO trainers log as the accuracy of rewards. It reaches 1 while the ranking is still wrong.

    Args:
        chosen: Log-probabilities under the policy, [B], nats, summed over tokens.
        rejected: [B].
        ref_chosen: Log-probabilities under the reference, [B].
        ref_rejected: [B].

    Returns:
        [], in [0, 1]; `nan` of no pairs and where a value is `nan`.

    >>> policy, reference = torch.tensor([-4.0, -8.0]), torch.tensor([-5.0, -8.0])
    >>> implicit_accuracy(policy, torch.tensor([-3.0, -3.0]), reference, torch.tensor([-3.0, -3.0]))
    tensor(0.5000)
    """
    margin = _margin(chosen, rejected) - _margin(ref_chosen, ref_rejected)
    return _share(margin > 0, margin)


def idealized_ranking_accuracy(
    ref_chosen: Tensor,
    ref_rejected: Tensor,
    preference: float | Tensor,
    beta: float,
    chosen_lengths: Tensor | None = None,
    rejected_lengths: Tensor | None = None,
) -> Tensor:
    """Ranking accuracy of the policy that minimises the DPO loss perfectly, which need not be 1.

    Its log-odds of a pair are those of the reference plus those of the raters divided by `beta`; it ranks rightly where
    they are above 0 (a tie is no right ranking here, unlike in `ranking_accuracy`).

    Args:
        ref_chosen: Log-probabilities under the reference, [B], nats, summed over tokens.
        ref_rejected: [B].
        preference: Proportion of raters who prefer the chosen response, in [0, 1]: one number or [B]. At 1 every pair is
            ranked rightly whatever the reference; the paper puts 0.999 for unanimous votes.
        beta: Strength of the tie to the reference, above 0.
        chosen_lengths: Tokens of the chosen responses, [B]; with both lengths, the reference's log-probabilities are per token.
        rejected_lengths: Tokens of the rejected responses, [B].

    Returns:
        [], in [0, 1]; `nan` of no pairs, where a value is `nan`, and where a proportion in a tensor is outside [0, 1].

    >>> ref_chosen, ref_rejected = torch.tensor([-10.0, -30.0]), torch.tensor([-12.0, -10.0])
    >>> idealized_ranking_accuracy(ref_chosen, ref_rejected, preference=0.75, beta=0.1)  # log 3 / 0.1 = 11 < 20
    tensor(0.5000)
    """
    _check_beta(beta)
    if not isinstance(preference, Tensor) and not 0.0 <= preference <= 1.0:
        raise ValueError(f"`preference` is the proportion of raters for the chosen response, in [0, 1], got {preference!r}.")
    margin = _margin(ref_chosen, ref_rejected, chosen_lengths, rejected_lengths)
    # In float64: in float32 the log-odds of 0.999 already miss their fourth digit.
    proportion = torch.as_tensor(preference, dtype=torch.float64, device=margin.device)
    if proportion.ndim and proportion.shape != margin.shape:
        raise ValueError(f"`preference` is one number or one per pair, {list(margin.shape)}, got {list(proportion.shape)}.")
    ideal = margin + torch.logit(proportion) / beta
    return _share(ideal > 0, ideal).to(margin.dtype)


def flip_threshold(ref_chosen: Tensor, ref_rejected: Tensor, beta: float) -> Tensor:
    """DPO loss of each pair at or below which, and only there, the policy ranks the pair rightly.

    The loss is -log sigmoid(beta * (S+ - S- + c)) with c = R- - R+, and falls as S+ - S- grows; at S+ = S- it is the threshold.
    At c = 30 and beta = 0.1 that is 0.049, far below what training runs end with.

    Args:
        ref_chosen: Log-probabilities under the reference, [B], nats, summed over tokens.
        ref_rejected: [B].
        beta: Of the DPO loss, above 0.

    Returns:
        [B], nats; log 2, the loss before training, or more where the reference ranks the pair rightly.

    >>> flip_threshold(torch.tensor([-10.0, -10.0]), torch.tensor([-5.0, -10.0]), beta=0.1)
    tensor([0.4741, 0.6931])
    """
    _check_beta(beta)
    return -F.logsigmoid(beta * _margin(ref_rejected, ref_chosen))


def _margin(
    chosen: Tensor, rejected: Tensor, chosen_lengths: Tensor | None = None, rejected_lengths: Tensor | None = None
) -> Tensor:
    """Difference of the two sides, per token where lengths are given, [B]."""
    if (chosen_lengths is None) != (rejected_lengths is None):
        given = "chosen" if rejected_lengths is None else "rejected"
        raise ValueError(f"Only `{given}_lengths` is given; a comparison per token needs the lengths of both responses.")
    sides = {
        "chosen": chosen,
        "rejected": rejected,
        "chosen_lengths": chosen_lengths,
        "rejected_lengths": rejected_lengths,
    }
    for name, values in sides.items():
        # A [B, 1] beside a [B] would quietly compare every pair with every other.
        if values is not None and (values.ndim != 1 or values.shape != chosen.shape):
            raise ValueError(
                f"Log-probabilities and lengths are one number per pair, [B]; `{name}` has shape {list(values.shape)}, "
                f"`chosen` {list(chosen.shape)}."
            )
    if chosen_lengths is None or rejected_lengths is None:
        return wide(chosen) - wide(rejected)
    return wide(chosen) / chosen_lengths - wide(rejected) / rejected_lengths


def _share(is_right: Tensor, margin: Tensor) -> Tensor:
    """Mean of a comparison, `nan` where a margin is: a comparison with `nan` is false, and would pass for a wrong ranking."""
    return torch.where(margin.isnan(), torch.nan, is_right.to(margin.dtype)).mean()


def _check_beta(beta: float) -> None:
    if not beta > 0:
        raise ValueError(f"`beta` must be above 0, got {beta!r}.")
