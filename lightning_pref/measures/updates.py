"""Which calls of an optimiser's step were updates."""

from __future__ import annotations

from torch.optim import Optimizer


def was_executed(optimizer: Optimizer) -> bool:
    """Whether the step that just ended moved the weights; to be asked by a hook that is called after it.

    Without any gradient an optimiser does nothing: that is how an update is skipped on purpose. A loss scaler that found an
    overflow does not call the step, so that no hook hears of it. A fused optimiser is called all the same: it is told of the
    overflow, and does nothing. Asking it waits for its device, under a scaler only.

    Args:
        optimizer: What a hook of `register_step_post_hook` is given.

    >>> import torch
    >>> weight = torch.zeros(1, requires_grad=True)
    >>> optimizer = torch.optim.SGD([weight], lr=0.1)
    >>> was_executed(optimizer)
    False
    >>> weight.grad = torch.ones(1)
    >>> was_executed(optimizer)
    True
    >>> optimizer.found_inf = torch.ones(1)  # as the scaler leaves it for the length of a step
    >>> was_executed(optimizer)
    False
    """
    overflow = getattr(optimizer, "found_inf", None)
    if overflow is not None and bool(overflow):
        return False
    return any(parameter.grad is not None for group in optimizer.param_groups for parameter in group["params"])
