"""Losses of responses a model should forget: preference losses that only know the rejected side."""

from torch import Tensor

from lightning_pref.functional import wide
from lightning_pref.losses import links


def npo(logps: Tensor, ref_logps: Tensor, *, beta: float = 0.1) -> Tensor:
    """NPO (arXiv:2404.05868), (2 / beta) * softplus(beta * h): gradient ascent that fades as a response is forgotten.

    The weight of the ascent is 2 sigmoid(beta h), in (0, 2): 1 at the start, 0 once forgotten. beta -> 0 is plain ascent.

    Args:
        logps: Summed log-probabilities of the responses to forget, [N].
        ref_logps: Same under the model before unlearning, [N].
        beta: Positive.

    >>> import torch
    >>> npo(torch.tensor([-3.0]), torch.tensor([-3.0]), beta=0.1)
    tensor([13.8629])
    """
    if logps.ndim != 1 or logps.shape != ref_logps.shape:
        raise ValueError(f"NPO needs `logps` and `ref_logps`, both [N]; got {list(logps.shape)}, {list(ref_logps.shape)}.")
    log_ratio = wide(logps) - wide(ref_logps.detach())
    return 2.0 / beta * links.logistic(-beta * log_ratio)


def simnpo(logps: Tensor, lengths: Tensor, *, beta: float = 2.5, gamma: float = 0.0) -> Tensor:
    """SimNPO (arXiv:2410.07163), (2 / beta) * softplus(-beta * (nll - gamma)), nll the mean over tokens; no reference.

    The paper writes gamma outside the product with beta; here it is in nats per token, as in the authors' code.

    Args:
        logps: Summed log-probabilities of the responses to forget, [N].
        lengths: Their tokens, [N].
        beta: Positive.
        gamma: Mean NLL at which half of the ascent's weight is left, nats per token.

    >>> import torch
    >>> simnpo(torch.tensor([0.0]), torch.tensor([4]), beta=2.0)
    tensor([0.6931])
    """
    if logps.ndim != 1 or logps.shape != lengths.shape:
        raise ValueError(f"SimNPO needs `logps` and `lengths`, both [N]; got {list(logps.shape)}, {list(lengths.shape)}.")
    nll = -wide(logps) / lengths.clamp(min=1)
    return 2.0 / beta * links.logistic(beta * (nll - gamma))
