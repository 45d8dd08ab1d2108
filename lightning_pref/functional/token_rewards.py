"""From one score per response to one reward per token. Flat layout: N response tokens, one response after the other.

Out of padded tensors `[B, T]` with a bool mask made **from lengths** (never from `ids != pad`: the end-of-text token may be
the padding token), the flat ones are `values[mask]`, and `response = torch.arange(B).repeat_interleave(lengths)`.
"""

import torch
from torch import Tensor

from lightning_pref.functional.masked import wide
from lightning_pref.functional.moments import RunningMoments


def shape_scores(
    scores: Tensor,
    ended: Tensor,
    *,
    running: RunningMoments | None = None,
    shift_mean: bool = True,
    clip: float | None = None,
    missing_eos_score: float | None = None,
    missing_eos_penalty: float | None = None,
) -> Tensor:
    """Scores as the policy is to see them. The order is fixed: normalise, clip, then the rule for a missing end.

    Normalising first makes `clip` and the penalty numbers of one unit, standard deviations, whatever the reward model. The
    rule for the end comes last, so that clipping cannot swallow it: a response that scores at the lower bound and did not
    end is worse than one that did.

    Args:
        scores: Raw scores of the responses, [R], already one per response (an ensemble is aggregated before).
        ended: Whether the response stopped by itself, [R], bool; `False` where it ran into the token cap.
        running: Mean and deviation of the scores seen so far; `None` leaves the scale as it is.
        shift_mean: Whether the running mean is subtracted; otherwise only the scale is set.
        clip: Bound on the magnitude, positive; `None` is none. Published runs took 10.
        missing_eos_score: Score that **replaces** that of a response without an end (Ziegler et al., Stiennon et al.: -1).
        missing_eos_penalty: Positive number **subtracted** from it (TRL). At most one of the two.

    Returns:
        [R], float32 or better, without gradient.

    >>> shape_scores(torch.tensor([50.0, -50.0]), torch.tensor([True, False]), clip=10.0, missing_eos_penalty=1.0)
    tensor([ 10., -11.])
    """
    if ended.dtype != torch.bool or ended.shape != scores.shape or scores.ndim != 1:
        raise ValueError(
            f"`scores` must be [R] and `ended` bool [R], got {list(scores.shape)} and {ended.dtype} {list(ended.shape)}."
        )
    if clip is not None and not clip > 0:
        raise ValueError(f"`clip` is a bound on the magnitude and must be positive, got {clip!r}.")
    if missing_eos_score is not None and missing_eos_penalty is not None:
        raise ValueError("Give `missing_eos_score`, which replaces, or `missing_eos_penalty`, which is subtracted, not both.")
    if missing_eos_penalty is not None and missing_eos_penalty < 0:
        raise ValueError(f"`missing_eos_penalty` is subtracted and must not be negative, got {missing_eos_penalty!r}.")
    shaped = wide(scores.detach())
    if running is not None:
        shaped = running.normalized(shaped, shift_mean=shift_mean)
    if clip is not None:
        shaped = shaped.clamp(-clip, clip)
    if missing_eos_score is not None:
        shaped = torch.where(ended, shaped, missing_eos_score)
    if missing_eos_penalty is not None:
        shaped = torch.where(ended, shaped, shaped - missing_eos_penalty)
    return shaped


def token_rewards(scores: Tensor, kl: Tensor, response: Tensor, *, kl_coefficient: float | Tensor) -> Tensor:
    """-kl_coefficient * kl for every token, and the score of a response on its last token and nowhere else.

    The sum over a response is its score less the coefficient times its KL. An empty response has no token to carry its score.

    Args:
        scores: [R], see `shape_scores`.
        kl: Estimated KL of each token to the reference, [N], nats: `kl_estimate(..., "k1")`. Only k1 in the reward gives the
            policy gradient of the KL.
        response: Index of the response of each token, [N], ascending.
        kl_coefficient: Number, or 0-d tensor of a controller.

    Returns:
        [N], float32 or better, without gradient.

    >>> token_rewards(torch.tensor([1.0, 5.0]), torch.tensor([2.0, 4.0, 6.0]), torch.tensor([0, 0, 1]), kl_coefficient=0.5)
    tensor([-1., -1.,  2.])
    """
    if kl.ndim != 1 or kl.shape != response.shape or scores.ndim != 1:
        raise ValueError(
            "`kl` and `response` must be [N] and `scores` [R], the flat layout; got "
            f"{list(kl.shape)}, {list(response.shape)} and {list(scores.shape)}."
        )
    penalty = -kl_coefficient * wide(kl.detach())
    return torch.where(is_last_token(response), penalty + wide(scores.detach())[response], penalty)


def is_last_token(response: Tensor) -> Tensor:
    """Whether a token is the last of its response, [N] -> [N] bool.

    >>> is_last_token(torch.tensor([0, 0, 1, 3]))
    tensor([False,  True,  True,  True])
    """
    is_last = torch.ones_like(response, dtype=torch.bool)
    is_last[:-1] = response[1:] != response[:-1]
    return is_last
