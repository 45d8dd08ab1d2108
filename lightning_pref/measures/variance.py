"""How much rewards differ between the responses to one prompt: what a policy gradient can learn from.

Razin et al. 2025, "What makes a reward model a good teacher?", arXiv 2503.15477. However well a reward model ranks, the
gradient at a prompt is small where the responses that the policy really samples get nearly the same reward.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torchmetrics import Metric
from typing_extensions import override

from lightning_pref.functional.masked import masked_var

# Added to a pooled variance before it divides; a constant reward then has a whitened variance of 0, not nan.
WHITENING_GUARD = 1e-8
# A standard deviation up to here is none: float32 scores of order 1 differ by this much through rounding alone.
STD_FLOOR = 1e-6
# A correlation over fewer degrees of freedom (responses minus prompts) is mostly chance.
MIN_CORRELATION_FREEDOM = 16

# The histogram of standard deviations: logarithmic bins, whose midpoints are off by at most 2 %.
_DECADES = (-8, 8)
_BINS_PER_DECADE = 64
_NUM_BINS = (_DECADES[1] - _DECADES[0]) * _BINS_PER_DECADE
QUANTILES = {"std_q05": 0.05, "std_q50": 0.50, "std_q95": 0.95}

_SUMS = (
    "prompts", "singles", "responses", "squares", "variance", "variance_squared", "zero", "group_size", "not_finite",
    "freedom", "reward_squares", "length_squares", "products",
)  # fmt: skip


def reward_variance(rewards: Tensor, mask: Tensor | None = None) -> Tensor:
    """Unbiased variance of the rewards of each prompt.

    Args:
        rewards: Rewards of n responses to each prompt, [P, n].
        mask: Which responses count, bool [P, n]; all of them if not given.

    Returns:
        Variance per prompt, [P], in squared units of the reward, float32 or better; `nan` where fewer than two responses count.

    >>> reward_variance(torch.tensor([[1.0, 3.0], [5.0, 5.0]]))
    tensor([2., 0.])
    >>> reward_variance(torch.tensor([[1.0, 3.0], [5.0, 5.0]]), torch.tensor([[True, True], [True, False]]))
    tensor([2., nan])
    """
    if rewards.dim() != 2:
        raise ValueError(f"`rewards` must be [P, n], one row per prompt, got the shape {tuple(rewards.shape)}.")
    if mask is not None and (mask.shape != rewards.shape or mask.dtype != torch.bool):
        raise ValueError(
            f"`mask` must be bool of the shape {tuple(rewards.shape)} of the rewards, got {mask.dtype} {tuple(mask.shape)}."
        )
    counted = torch.ones_like(rewards, dtype=torch.bool) if mask is None else mask
    variances = masked_var(rewards.double(), counted, dim=1)
    return variances.to(torch.promote_types(rewards.dtype, torch.float32))


class PromptSlots(NamedTuple):
    """Where each response belongs when responses are sorted by prompt.

    Attributes:
        order: Sorts the responses by prompt, [N]; responses of a prompt keep their order.
        slots: For each response in that order, the number of its prompt, [N], from 0 without gaps.
    """

    order: Tensor
    slots: Tensor


def prompt_slots(prompt_ids: Tensor) -> PromptSlots:
    """Number the prompts of a flat batch, without asking the device how many there are.

    >>> prompt_slots(torch.tensor([7, 3, 7]))
    PromptSlots(order=tensor([1, 0, 2]), slots=tensor([0, 1, 1]))
    """
    ids, order = prompt_ids.sort(stable=True)
    is_first = torch.ones_like(ids, dtype=torch.bool)
    is_first[1:] = ids[1:] != ids[:-1]
    return PromptSlots(order, is_first.cumsum(0) - 1)


class PromptStatistics(NamedTuple):
    """Rewards of each prompt in numbers, float64 [N]: room for a prompt per response, the places behind the last prompt empty.

    Attributes:
        counts: Responses with a finite reward.
        means: Their mean reward; `nan` without one.
        squares: Sum of their squared deviations from it.
    """

    counts: Tensor
    means: Tensor
    squares: Tensor

    @property
    def variances(self) -> Tensor:
        """Unbiased variance, [N]; `nan` where fewer than two responses count."""
        return torch.where(self.counts >= 2, self.squares / (self.counts - 1), torch.nan)


def prompt_statistics(rewards: Tensor, prompt_ids: Tensor) -> PromptStatistics:
    """Count, mean and squared deviations of the rewards of each prompt, in the order of prompt ids.

    Rewards that are not finite are left out. Nothing here asks the device for a value.

    Args:
        rewards: One reward per response, [N].
        prompt_ids: Equal for responses to one prompt, integer [N], in any order.

    >>> prompt_statistics(torch.tensor([1.0, 9.0, 3.0]), torch.tensor([4, 2, 4])).variances
    tensor([nan, 2., nan], dtype=torch.float64)
    """
    order, slots = prompt_slots(prompt_ids)
    return _statistics(rewards.detach().double()[order], slots)


def _statistics(values: Tensor, slots: Tensor) -> PromptStatistics:
    finite = values.isfinite()
    counts = _sum_by(slots, finite.double())
    # Twice over the values: sums of squares minus squares of sums would lose a small variance beside a large mean.
    means = _sum_by(slots, torch.where(finite, values, 0.0)) / counts
    deviations = torch.where(finite, values - means[slots], 0.0)
    return PromptStatistics(counts, means, _sum_by(slots, deviations.square()))


def _sum_by(slots: Tensor, values: Tensor) -> Tensor:
    return torch.zeros_like(values).index_add_(0, slots, values)


class VarianceParts(NamedTuple):
    """The law of total variance over the responses of a set of prompts; total = within + between, exactly.

    All three are mean squares over responses (divided by N). With n responses to every prompt the mean unbiased variance
    of a prompt is n / (n - 1) times `within`.
    """

    within: Tensor
    between: Tensor
    total: Tensor


def variance_parts(statistics: PromptStatistics) -> VarianceParts:
    """Split the variance of all rewards into what lies within prompts and what lies between them.

    >>> parts = variance_parts(prompt_statistics(torch.tensor([0.0, 2.0, 10.0, 12.0]), torch.tensor([0, 0, 1, 1])))
    >>> parts.within.item(), parts.between.item(), parts.total.item()
    (1.0, 25.0, 26.0)
    """
    counts, means, squares = statistics
    means = torch.where(counts > 0, means, 0.0)
    responses = counts.sum()
    mean = (counts * means).sum() / responses
    within = squares.sum() / responses
    between = (counts * (means - mean).square()).sum() / responses
    return VarianceParts(within, between, within + between)


def whitened_variance(within_prompt: Tensor, pooled_variance: Tensor) -> Tensor:
    """A variance within prompts of rewards that are divided by their pooled standard deviation.

    Reward models differ in scale, and a trainer's baseline, clipping and KL term scale along; only whitened rewards compare.

    Args:
        within_prompt: Mean over prompts of the unbiased variance, reward^2.
        pooled_variance: Unbiased variance of all rewards of all prompts, reward^2.
    """
    return within_prompt / (pooled_variance + WHITENING_GUARD)


def zero_variance_share(variances: Tensor, floor: float = STD_FLOOR) -> Tensor:
    """Share of prompts whose responses all get the same reward, so that they teach nothing.

    Args:
        variances: Unbiased variance per prompt, [P]; `nan` where a prompt has fewer than two responses, which is left out.
        floor: A standard deviation up to here is none, in units of the reward.

    >>> zero_variance_share(torch.tensor([0.0, 1.0, float("nan")])).item()
    0.5
    """
    known = ~variances.isnan()
    return (known & (variances <= floor**2)).sum() / known.sum()


def effective_prompts(variances: Tensor) -> Tensor:
    """How many prompts carry the signal: (sum s^2)^2 / sum s^4; P where all variances are equal, 1 where one has it all.

    Args:
        variances: Unbiased variance s^2 per prompt, [P]; `nan` counts as 0.

    >>> effective_prompts(torch.tensor([2.0, 2.0, 0.0])).item()
    2.0
    """
    known = variances.nan_to_num(0.0)
    # Divided by the largest first, since fourth powers leave the range of floats early.
    scaled = known / known.amax().clamp(min=torch.finfo(known.dtype).tiny)
    return scaled.sum().square() / scaled.square().sum().clamp(min=1.0)


def merged_moments(stacked: Tensor) -> Tensor:
    """Count, mean and squared deviations of several parts taken together, [W, 3] -> [3].

    Chan et al. 1983: exact to rounding however far the mean is from 0, which sums of squares are not.
    """
    counts, means, squares = stacked.unbind(1)
    total = counts.sum()
    shifts = torch.where(counts > 0, means - means[0], 0.0)
    mean = means[0] + (counts * shifts).sum() / total.clamp(min=1.0)
    spread = torch.where(counts > 0, counts * (means - mean).square(), 0.0)
    return torch.stack([total, torch.where(total > 0, mean, 0.0), squares.sum() + spread.sum()])


class RewardVariance(Metric):
    """Variance of rewards within prompts over any number of batches and ranks.

    All responses to a prompt must come in one call. Prompts with a single response are counted apart and have no variance.
    States are float64 sums and counts, and the pooled moments, which are merged; standard deviations are kept as counts in
    logarithmic bins, so that memory does not grow and quantiles are the same on every rank. What the first report said is
    kept beside the states and survives `reset`, so that later reports can be compared with it.

    >>> metric = RewardVariance()
    >>> metric.update(torch.tensor([0.0, 2.0, 10.0, 12.0]), torch.tensor([0, 0, 1, 1]))
    >>> report = metric.compute()
    >>> report["within_prompt"].item(), report["between_prompt"].item(), report["zero_share"].item()
    (2.0, 25.0, 0.0)
    """

    full_state_update = False

    def __init__(self, *, floor: float = STD_FLOOR, **metric_kwargs: Any) -> None:  # Any: torchmetrics' own keyword arguments
        if floor < 0:
            raise ValueError(f"`floor` is a standard deviation, 0 or more; got {floor!r}.")
        super().__init__(**metric_kwargs)
        self.floor = floor
        self.sums: Tensor
        self.moments: Tensor
        self.bins: Tensor
        self.first: Tensor
        self.add_state("sums", torch.zeros(len(_SUMS), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("moments", torch.zeros(3, dtype=torch.float64), dist_reduce_fx=merged_moments)
        # One bin in front for a standard deviation of 0.
        self.add_state("bins", torch.zeros(_NUM_BINS + 1, dtype=torch.float64), dist_reduce_fx="sum")
        self.register_buffer("first", torch.full((2,), torch.nan, dtype=torch.float64))  # within_prompt, pooled_variance

    @override
    def update(self, rewards: Tensor, prompt_ids: Tensor, lengths: Tensor | None = None) -> None:
        """Add responses.

        Args:
            rewards: One reward per response, [N]; those that are not finite are counted and left out.
            prompt_ids: Equal for responses to one prompt, integer [N].
            lengths: Tokens of each response, [N].
        """
        order, slots = prompt_slots(prompt_ids)
        values = rewards.detach().double()[order]
        statistics = _statistics(values, slots)
        finite = values.isfinite()
        deviations = torch.where(finite, values - statistics.means[slots], 0.0)
        enough = statistics.counts >= 2
        variances = torch.where(enough, statistics.variances, 0.0)
        is_zero = enough & (variances <= self.floor**2)
        spread = torch.where(is_zero, 0.0, _sum_by(slots, deviations.abs()).square() / statistics.squares)
        found = {
            "prompts": enough.double(),
            "singles": (statistics.counts == 1).double(),
            "responses": statistics.counts,
            "squares": statistics.squares,
            "variance": variances,
            "variance_squared": variances.square(),
            "zero": is_zero.double(),
            "group_size": torch.where(enough, spread, 0.0),
            "not_finite": (~finite).double(),
        }
        if lengths is not None:
            found |= _length_sums(deviations, lengths.detach().double()[order], finite, slots, statistics.counts)
        zeros = torch.zeros_like(values)
        self.sums += torch.stack([found.get(name, zeros).sum() for name in _SUMS])
        self.moments = merged_moments(torch.stack([self.moments, _moments(values, finite)]))
        self.bins.index_add_(0, _bin_of(variances, is_zero), enough.double())

    @override
    def compute(self) -> dict[str, Tensor]:
        """The report, on every rank the same; each entry is float64 [], `nan` where there is nothing to say.

        `within_prompt`: mean over prompts of the unbiased variance; `zero_share`: share of prompts without any.
        `whitened`: `within_prompt` over the pooled variance; `whitened_by_first`: over that of the first report.
        `change`: `within_prompt` over that of the first report.
        `between_prompt`, `within`, `total`: the law of total variance, see `VarianceParts`.
        `pooled_variance`, `mean`: of all rewards.
        `effective_prompts`, `effective_group_size`: how many prompts, and responses to a prompt, carry the signal; of the
        advantages a of a group it is (sum |a|)^2 / sum a^2, the group's size where half are good and half bad.
        `length_correlation`: Pearson's, of deviations from the prompt's means.
        `prompts`, `single_prompts`, `not_finite`: counts. `std_q05`, `std_q50`, `std_q95`: quantiles over prompts.
        """
        sums = dict(zip(_SUMS, self.sums, strict=True))
        count, mean, squares = self.moments
        within_prompt = sums["variance"] / sums["prompts"]
        pooled = squares / (count - 1).clamp(min=0.0)
        several = sums["prompts"] + sums["singles"] >= 2
        # Nothing known yet: this report is the first.
        first_within, first_pooled = torch.where(self.first.isnan(), torch.stack([within_prompt, pooled]), self.first)
        scale = (sums["reward_squares"] * sums["length_squares"]).sqrt()
        return {
            "within_prompt": within_prompt,
            "zero_share": sums["zero"] / sums["prompts"],
            "whitened": whitened_variance(within_prompt, pooled),
            "whitened_by_first": whitened_variance(within_prompt, first_pooled),
            "change": within_prompt / first_within,
            "between_prompt": torch.where(several, (squares - sums["squares"]).clamp(min=0.0) / count, torch.nan),
            "within": sums["squares"] / count,
            "total": squares / count,
            "pooled_variance": pooled,
            "mean": torch.where(count > 0, mean, torch.nan),
            "effective_prompts": _ratio_or_zero(sums["variance"].square(), sums["variance_squared"], sums["prompts"]),
            "effective_group_size": sums["group_size"] / sums["prompts"],
            "length_correlation": torch.where(sums["freedom"] >= MIN_CORRELATION_FREEDOM, sums["products"] / scale, torch.nan),
            "prompts": sums["prompts"],
            "single_prompts": sums["singles"],
            "not_finite": sums["not_finite"],
            **_quantiles(self.bins),
        }

    def remember(self, report: dict[str, Tensor]) -> None:
        """Keep a report as the first, unless there is one; the same on every rank, as the report is."""
        found = torch.stack([report["within_prompt"], report["pooled_variance"]])
        self.first = torch.where(self.first.isnan(), found, self.first)

    @override
    def _apply(self, fn: Callable[[Tensor], Tensor], exclude_state: Sequence[str] = "") -> nn.Module:
        """Go along to another device, but stay in float64: `Module.to(torch.bfloat16)` gets past torchmetrics' own guard."""
        return super()._apply(lambda tensor: tensor.to(fn(tensor).device), exclude_state)


def _moments(values: Tensor, finite: Tensor) -> Tensor:
    """Count, mean and squared deviations of the finite values, [3]."""
    count = finite.sum()
    mean = torch.where(finite, values, 0.0).sum() / count.clamp(min=1)
    return torch.stack([count.double(), mean, torch.where(finite, values - mean, 0.0).square().sum()])


def _length_sums(deviations: Tensor, lengths: Tensor, finite: Tensor, slots: Tensor, counts: Tensor) -> dict[str, Tensor]:
    """What the correlation of rewards and lengths within prompts is made of."""
    means = _sum_by(slots, torch.where(finite, lengths, 0.0)) / counts
    centred = torch.where(finite, lengths - means[slots], 0.0)
    return {
        "freedom": (counts - 1).clamp(min=0.0),
        "reward_squares": deviations.square(),
        "length_squares": centred.square(),
        "products": deviations * centred,
    }


def _ratio_or_zero(numerator: Tensor, denominator: Tensor, prompts: Tensor) -> Tensor:
    """0 where no prompt has any variance, `nan` where there is no prompt."""
    ratio = numerator / torch.where(denominator > 0, denominator, 1.0)
    return torch.where(prompts > 0, ratio, torch.nan)


def _bin_of(variances: Tensor, is_zero: Tensor) -> Tensor:
    lowest, highest = (10.0**decade for decade in _DECADES)
    decades = variances.sqrt().clamp(lowest, highest * (1 - 1e-12)).log10() - _DECADES[0]
    return torch.where(is_zero, 0, 1 + (decades * _BINS_PER_DECADE).long())


def _quantiles(bins: Tensor) -> dict[str, Tensor]:
    """Quantiles of the standard deviation, as the middles of their bins; `nan` without a prompt."""
    reached = bins.cumsum(0)
    places = torch.arange(len(bins), dtype=torch.float64, device=bins.device)
    middles = torch.where(places == 0, 0.0, 10.0 ** (_DECADES[0] + (places - 0.5) / _BINS_PER_DECADE))
    total = reached[-1]
    shares = torch.stack([share * total for share in QUANTILES.values()])
    # The first bin by which enough prompts are counted, one at least.
    found = middles.index_select(0, (reached < shares.clamp(min=0.5)[:, None]).sum(1).clamp(max=len(bins) - 1))
    return dict(zip(QUANTILES, torch.where(total > 0, found, torch.nan), strict=True))
