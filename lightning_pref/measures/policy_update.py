"""How far an update has moved the policy and its value function: one value per token, to be averaged by sums and counts."""

from torch import Tensor

from lightning_pref.functional.moments import Moments


def is_clipped(log_ratio: Tensor, advantages: Tensor, *, clip_low: float = 0.2, clip_high: float = 0.2) -> Tensor:
    """Whether `losses.policy.ppo_clip` has stopped pushing a token, bool, any shape. Its mean is the clip fraction.

    Only tokens that moved where their advantage wanted them are stopped.

    >>> import torch
    >>> is_clipped(torch.tensor([0.3, 0.3, -0.3]), torch.tensor([1.0, -1.0, -1.0]))
    tensor([ True, False,  True])
    """
    # Compared as ratios, in the loss's own arithmetic: log(1.2) is not the logarithm of the float 1.2.
    ratio = log_ratio.exp()
    return ((advantages > 0) & (ratio > 1.0 + clip_high)) | ((advantages < 0) & (ratio < 1.0 - clip_low))


def is_value_clipped(values: Tensor, old_values: Tensor, *, clip: float) -> Tensor:
    """Whether a value has moved further than `clip` from the one before the update, bool, any shape.

    >>> import torch
    >>> is_value_clipped(torch.tensor([0.1, -0.3]), torch.zeros(2), clip=0.2)
    tensor([False,  True])
    """
    return (values - old_values).abs() > clip


def explained_variance(errors: Moments, returns: Moments) -> Tensor:
    """1 - Var(returns - values) / Var(returns), []: 1 is a perfect value function, 0 a constant, below 0 worse than that.

    Args:
        errors: Moments of `returns - values`, over all ranks.
        returns: Moments of the returns. Equal returns leave nothing to explain: `nan`.

    >>> import torch
    >>> from lightning_pref.functional.moments import moment_sums
    >>> explained_variance(moment_sums(torch.tensor([0.0, 1.0])), moment_sums(torch.tensor([1.0, 3.0]))).item()
    0.75
    """
    spread = returns.var(0)
    return 1.0 - errors.var(0) / spread.where(spread > 0, spread.new_tensor(float("nan")))
