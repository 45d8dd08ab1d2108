"""Stage 3, the links: from a reward or a difference of rewards to a loss. Element by element, any shape."""

import math
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_pref.functional import capped_expm1

Link = Literal["logistic", "hinge", "square"]


def logistic(reward: Tensor) -> Tensor:
    """-log sigmoid(u) = softplus(-u).

    >>> logistic(torch.tensor([0.0]))
    tensor([0.6931])
    """
    return F.softplus(-reward)


def hinge(reward: Tensor) -> Tensor:
    """max(0, 1 - u).

    >>> hinge(torch.tensor([0.25, 2.0]))
    tensor([0.7500, 0.0000])
    """
    return (1.0 - reward).clamp(min=0.0)


def square(reward: Tensor) -> Tensor:
    """(u - 1/2)^2: with u = beta * z this is IPO times beta squared.

    >>> square(torch.tensor([0.5, 1.0]))
    tensor([0.0000, 0.2500])
    """
    return (reward - 0.5).square()


def smoothed(reward: Tensor, label_smoothing: float) -> Tensor:
    """Logistic loss where a share `label_smoothing` of the labels is believed to be flipped.

    >>> smoothed(torch.tensor([1.0]), 0.0) == logistic(torch.tensor([1.0]))
    tensor([True])
    """
    _check_smoothing(label_smoothing)
    return (1.0 - label_smoothing) * logistic(reward) + label_smoothing * logistic(-reward)


def debiased(reward: Tensor, label_smoothing: float) -> Tensor:
    """Logistic loss whose mean over labels flipped at the rate `label_smoothing` is that of the clean labels.

    >>> debiased(torch.tensor([0.0]), 0.1)
    tensor([0.6931])
    """
    _check_smoothing(label_smoothing)
    clean = (1.0 - label_smoothing) * logistic(reward) - label_smoothing * logistic(-reward)
    return clean / (1.0 - 2.0 * label_smoothing)


def reverse_kl(reward: Tensor, label_smoothing: float) -> Tensor:
    """KL from (sigmoid(u), sigmoid(-u)) to the smoothed label (1 - eps, eps).

    >>> reverse_kl(torch.tensor([3.0]).log(), 0.25).abs() < 1e-7
    tensor([True])
    """
    _check_smoothing(label_smoothing)
    if label_smoothing == 0.0:
        raise ValueError("`label_smoothing` must be above 0 here: the KL to a hard label is infinite. EXO uses 1e-3.")
    right, wrong = torch.sigmoid(reward), torch.sigmoid(-reward)
    log_target, log_rest = math.log1p(-label_smoothing), math.log(label_smoothing)
    return right * (F.logsigmoid(reward) - log_target) + wrong * (F.logsigmoid(-reward) - log_rest)


def log_ratio_modulated(reward: Tensor, tau: float) -> Tensor:
    """DiscoPOP's blend: logistic where the reward is negative, exponential where it is positive, `tau` wide in between.

    >>> log_ratio_modulated(torch.tensor([0.0]), 0.05)
    tensor([0.8466])
    """
    blend = torch.sigmoid(reward / tau)
    return (1.0 - blend) * logistic(reward) + blend * (1.0 + capped_expm1(-reward))


def _check_smoothing(label_smoothing: float) -> None:
    if not 0.0 <= label_smoothing < 0.5:
        raise ValueError(
            f"`label_smoothing` must be in [0, 0.5), got {label_smoothing!r}: it is the share of flipped labels, and from one "
            "half on the labels say nothing or the opposite."
        )
