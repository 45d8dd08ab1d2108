"""Losses of reward models: pairs, ranked lists, scored responses, steps of a solution. One loss per example, not reduced."""

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_pref.functional.logprobs import log1mexp
from lightning_pref.functional.masked import segment_sum, wide
from lightning_pref.functional.moments import widest
from lightning_pref.functional.token_rewards import is_last_token
from lightning_pref.losses import links, unpaired
from lightning_pref.losses.spec import LossSpec


def bradley_terry(
    chosen: Tensor,
    rejected: Tensor,
    margin: Tensor | None = None,
    center: float = 0.0,
    *,
    label_smoothing: float = 0.0,
) -> Tensor:
    """Pairwise logistic loss (Bradley and Terry, 1952), with the margin of Llama 2 (arXiv:2307.09288, eq. 2).

    Without centring only the difference of the scores matters, whatever the margin: a reward model is free to drift. `center`
    holds the mean of each pair near 0 (arXiv:2312.09244); as it does not touch the difference, it does not fight the margin.

    Args:
        chosen: Scores of the chosen responses, [B].
        rejected: Scores of the rejected ones, [B].
        margin: By how much the chosen score has to be ahead, in the unit of the score, [B]; 0 if `None`.
        center: Weight of (chosen + rejected)^2, not negative; published runs took 0.01.
        label_smoothing: Share of labels believed to be flipped, in [0, 0.5). A flipped label asks for the same margin the
            other way.

    Returns:
        [B], float32 or better.

    >>> bradley_terry(torch.tensor([1.0]), torch.tensor([1.0]))
    tensor([0.6931])
    >>> bradley_terry(torch.tensor([1.0]), torch.tensor([1.0]), center=0.25) - bradley_terry(torch.zeros(1), torch.zeros(1))
    tensor([1.])
    """
    margin = torch.zeros_like(wide(chosen)) if margin is None else margin
    if not chosen.shape == rejected.shape == margin.shape or chosen.ndim != 1:
        raise ValueError(
            "`chosen`, `rejected` and `margin` must all be [B], got "
            f"{list(chosen.shape)}, {list(rejected.shape)} and {list(margin.shape)}."
        )
    if center < 0:
        raise ValueError(f"`center` must not be negative, got {center!r}: it would drive the scores away from 0.")
    if not 0.0 <= label_smoothing < 0.5:
        raise ValueError(f"`label_smoothing` must be in [0, 0.5), got {label_smoothing!r}.")
    chosen, rejected = wide(chosen), wide(rejected)
    losses = links.logistic(chosen - rejected - margin)
    if label_smoothing:
        losses = (1.0 - label_smoothing) * losses + label_smoothing * links.logistic(rejected - chosen - margin)
    return losses + center * (chosen + rejected).square() if center else losses


def plackett_luce(scores: Tensor, ranks: Tensor, group: Tensor, num_groups: int, *, top_k: int | None = None) -> Tensor:
    """Minus the log-likelihood of ranked lists (Plackett, 1975): the best is drawn first, then the best of what is left.

    Ties: responses of one rank are drawn from the same remainder, themselves included (Breslow's rule). Those on the last
    rank are what is left over and add no term, which is exact: a list whose first places are known has the likelihood of
    those places. A group whose responses all tie has loss 0.

    Args:
        scores: Of R responses, [R].
        ranks: Place of each in its group, [R], 0 is best.
        group: Index of the group of each, [R], in any order.
        num_groups: Groups of the result, G.
        top_k: Only places below this one add terms; all if `None`.

    Returns:
        [G], float32 or better. Takes R x R numbers of memory.

    >>> plackett_luce(torch.zeros(3), torch.tensor([0, 1, 2]), torch.tensor([0, 0, 0]), 1).exp()  # one order of 3! = 6
    tensor([6.])
    """
    if not scores.shape == ranks.shape == group.shape or scores.ndim != 1:
        raise ValueError(
            "`scores`, `ranks` and `group` must all be [R], the flat layout; got "
            f"{list(scores.shape)}, {list(ranks.shape)} and {list(group.shape)}."
        )
    if top_k is not None and top_k < 1:
        raise ValueError(f"`top_k` must be at least 1, got {top_k!r}; `None` takes all places.")
    scores = wide(scores)
    same_group = group.unsqueeze(1) == group
    remains = same_group & (ranks >= ranks.unsqueeze(1))  # (i, j): j is still there when i is drawn
    terms = torch.where(remains, scores, -torch.inf).logsumexp(1) - scores
    is_placed = (same_group & (ranks > ranks.unsqueeze(1))).any(1)
    if top_k is not None:
        is_placed = is_placed & (ranks < top_k)
    return segment_sum(torch.where(is_placed, terms, 0.0), group, num_groups)


def regression(scores: Tensor, targets: Tensor) -> Tensor:
    """Squared error of scores against annotated ones, [B] each -> [B].

    >>> regression(torch.tensor([1.0]), torch.tensor([3.0]))
    tensor([4.])
    """
    _check_same(scores, targets)
    return (wide(scores) - wide(targets)).square()


def ordinal(scores: Tensor, levels: Tensor, thresholds: Tensor) -> Tensor:
    """Cumulative logits (McCullagh, 1980): P(level > k) = sigmoid(score - threshold_k), and minus the log of P(level).

    For annotations in steps of unknown size, where the mean of two levels means nothing: 1 to 5 stars.

    Args:
        scores: [B].
        levels: Annotated levels, [B], int64, in [0, L).
        thresholds: Ascending, [L - 1], trained with the model: a first one and the cumulated softplus of the gaps.

    Returns:
        [B], float32 or better.

    >>> ordinal(torch.zeros(3), torch.tensor([0, 1, 2]), torch.tensor([-1.0, 1.0])).neg().exp()
    tensor([0.2689, 0.4621, 0.2689])
    """
    _check_same(scores, levels)
    if thresholds.ndim != 1:
        raise ValueError(f"`thresholds` must be [L - 1], ascending, got {list(thresholds.shape)}.")
    scores, thresholds = wide(scores), wide(thresholds)
    # Beyond the outer levels there is nothing, at a distance that any sigmoid takes for infinite but whose gradient is not nan.
    outside = torch.full_like(scores[:1], 1e30)
    bounds = torch.cat([-outside, thresholds, outside])
    lower, upper = bounds[levels], bounds[levels + 1]
    # log(sigmoid(a) - sigmoid(b)) without the difference of two numbers near 1.
    return links.logistic(scores - lower) + links.logistic(upper - scores) - log1mexp(lower - upper)


def step_bce(logits: Tensor, labels: Tensor) -> Tensor:
    """Binary cross-entropy of a process reward model at the marks of the steps; 0, without gradient, everywhere else.

    Args:
        logits: Of the tokens, [N]: each from the hidden state **at** that token, so that a step's last token has seen the step.
        labels: On the last token of each step 1 or 0, or a share in between; negative on all other tokens, [N].

    Returns:
        [N]. The mean is over marks: divide by the number of labels that are not negative.

    >>> step_bce(torch.tensor([5.0, 0.0]), torch.tensor([-100, 1]))
    tensor([0.0000, 0.6931])
    """
    _check_same(logits, labels)
    is_mark = labels >= 0
    logits = torch.where(is_mark, wide(logits), 0.0)
    losses = F.binary_cross_entropy_with_logits(logits, labels.clamp(min=0).to(logits.dtype), reduction="none")
    return torch.where(is_mark, losses, 0.0)


def implicit_prm(logps: Tensor, ref_logps: Tensor, correct: Tensor, *, beta: float = 0.05) -> Tensor:
    """Cross-entropy of an outcome label whose logit is beta * log-ratio (arXiv:2412.01981, eq. 5).

    That is `bco` without its baseline; the model so trained gives process rewards for free: `process_values`.

    Args:
        logps: Summed log-probabilities, [R], the response's tokens only: a prompt would not cancel here as it does in DPO.
        ref_logps: Same under the reference, [R].
        correct: Outcome, [R], bool.
        beta: Positive.

    >>> implicit_prm(torch.zeros(2), torch.zeros(2), torch.tensor([True, False]))
    tensor([0.6931, 0.6931])
    """
    return unpaired.bco(logps, ref_logps, correct, beta=beta)


def process_values(token_logps: Tensor, ref_logps: Tensor, response: Tensor, *, beta: float) -> Tensor:
    """Value of each prefix under an implicit reward: beta * log-ratios summed up to and with the token (arXiv:2412.01981).

    The value at the last token is the outcome reward of the response.

    Args:
        token_logps: Under the trained model, [N].
        ref_logps: Under its reference, [N].
        response: Index of the response of each token, [N], ascending.
        beta: The one it was trained with.

    >>> process_values(torch.tensor([1.0, 2.0, 4.0]), torch.zeros(3), torch.tensor([0, 0, 1]), beta=0.5)
    tensor([0.5000, 1.5000, 2.0000])
    """
    _check_same(token_logps, ref_logps)
    _check_same(token_logps, response)
    log_ratio = wide(token_logps) - wide(ref_logps)
    # A running sum over the whole batch, less what it was before the response began; in float64 nothing is lost by that.
    running = widest(log_ratio).cumsum(0)
    previous = _previous_mark(is_last_token(response))
    before = torch.where(previous >= 0, running[previous.clamp(min=0)], 0.0)
    return (beta * (running - before)).to(log_ratio.dtype)


def step_rewards(values: Tensor, is_step_end: Tensor, response: Tensor) -> Tensor:
    """Reward of each step, the rise of the value over it, at the step's last token and 0 elsewhere.

    The rewards of a response add up to its value at its last mark. Tokens after that belong to no step.

    Args:
        values: `process_values`, [N].
        is_step_end: Last token of a step, [N], bool.
        response: Index of the response of each token, [N], ascending.

    >>> values, ends = torch.tensor([0.5, 1.5, 1.0]), torch.tensor([True, False, True])
    >>> step_rewards(values, ends, torch.zeros(3, dtype=torch.int64))
    tensor([0.5000, 0.0000, 0.5000])
    """
    _check_same(values, is_step_end)
    _check_same(values, response)
    previous = _previous_mark(is_step_end)
    begins_inside = (previous >= 0) & (response[previous.clamp(min=0)] == response)
    begun = torch.where(begins_inside, values[previous.clamp(min=0)], 0.0)
    return torch.where(is_step_end, values - begun, 0.0)


def _previous_mark(mark: Tensor) -> Tensor:
    """Index of the last marked token strictly before each token, [N]; -1 where there is none."""
    position = torch.arange(len(mark), device=mark.device)
    latest = torch.where(mark, position, -1).cummax(0).values
    return torch.cat([torch.full_like(latest[:1], -1), latest[:-1]])


def _check_same(first: Tensor, second: Tensor) -> None:
    if first.shape != second.shape or first.ndim != 1:
        raise ValueError(
            f"Tensors that belong together must be flat and alike, got {list(first.shape)} and {list(second.shape)}."
        )


# One loss per pair, group, response or token. Symbols: r score, m margin, d = r_c - r_r, y level or label.
REWARD_LOSSES: dict[str, LossSpec] = {
    "bradley_terry": LossSpec(
        fn=bradley_terry,
        formula="(1 - eps) * softplus(m - d) + eps * softplus(m + d) + center * (r_c + r_r)^2",
        source="Bradley and Terry (1952); margin arXiv:2307.09288; centring arXiv:2312.09244",
        peers="TRL's RewardTrainer, where `center` is `center_rewards_coefficient`.",
    ),
    "plackett_luce": LossSpec(
        fn=plackett_luce,
        formula="sum over places i of log(sum of exp(r_j) over j not before i) - r_i",
        source="Plackett (1975); two responses make it Bradley-Terry",
    ),
    "regression": LossSpec(fn=regression, formula="(r - y)^2", source="least squares"),
    "ordinal": LossSpec(
        fn=ordinal,
        formula="-log(sigmoid(r - t_(y-1)) - sigmoid(r - t_y)), t_(-1) = -inf, t_(L-1) = inf",
        source="McCullagh (1980), proportional odds",
    ),
    "step_bce": LossSpec(
        fn=step_bce,
        formula="y * softplus(-r) + (1 - y) * softplus(r) at the last token of each step",
        source="arXiv:2305.20050",
        peers="TRL's PRMTrainer.",
    ),
    "implicit_prm": LossSpec(
        fn=implicit_prm,
        formula="y * softplus(-beta * h) + (1 - y) * softplus(beta * h)",
        source="arXiv:2412.01981",
        needs_reference=True,
        peers="Its README prints the formula without the minus of the logarithm.",
    ),
}
