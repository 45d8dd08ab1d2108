"""A reward that is trained on, beside what it stands for, from report to report of one run.

Gao et al. 2022 (arXiv 2210.10760): optimised far enough, the proxy goes on rising while the gold reward falls. Where there is no
gold reward, members of an ensemble that part (Coste et al. 2023, arXiv 2310.02743) and answers that only grow longer tell of it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torchmetrics import Metric
from typing_extensions import override

from lightning_pref.measures.variance import MIN_CORRELATION_FREEDOM, prompt_slots, prompt_statistics

# Reports that are averaged before they are compared: one alone is noisy.
WINDOW = 3

# Of each quantity: number, sum, sum of squares.
_QUANTITIES = ("proxy", "gold", "gold_of_prompt", "uncertainty", "length", "kl")
_WITHIN = ("freedom", "rewards", "lengths", "products")
# What is kept of a report: the mean proxy and gold reward, the squared standard error of the latter, the KL.
_COLUMNS = ("proxy", "gold", "gold_error", "kl")


class Peak(NamedTuple):
    """Where the gold reward stood highest, mean over `WINDOW` reports."""

    proxy: float
    gold: float
    distance: float  # sqrt(KL to the reference), nan where it is not known
    update: int


class ProxyHistory(Metric):
    """The proxy, the gold reward and what hints at their parting, over any number of batches, ranks and reports.

    The sums of a report are reset; how the first report stood, the last `WINDOW` ones and the highest gold reward survive that.

    >>> history = ProxyHistory()
    >>> for proxy in (0.0, 1.0):
    ...     history.update(torch.tensor([proxy, proxy + 2.0]), torch.tensor([0, 0]))
    ...     report = history.compute()
    ...     history.remember(report, update=1)
    ...     history.reset()
    >>> round(report["proxy_gain"].item(), 3)  # 1 over the first standard deviation, sqrt(2)
    0.707
    """

    full_state_update = False

    def __init__(self, **metric_kwargs: Any) -> None:  # Any: torchmetrics' own keyword arguments
        super().__init__(**metric_kwargs)
        self.moments: Tensor
        self.within: Tensor
        self.first: Tensor
        self.recent: Tensor
        self.peak: Tensor
        self.add_state("moments", torch.zeros(len(_QUANTITIES), 3, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("within", torch.zeros(len(_WITHIN), dtype=torch.float64), dist_reduce_fx="sum")
        unknown = torch.tensor(torch.nan, dtype=torch.float64)
        # Means and, in the second column, standard deviations of the first report.
        self.register_buffer("first", unknown.repeat(len(_QUANTITIES), 2))
        self.register_buffer("recent", unknown.repeat(WINDOW, len(_COLUMNS)))
        self.register_buffer("peak", unknown.repeat(len(_COLUMNS) + 1))  # means of the highest window, and its update

    @override
    def update(
        self,
        rewards: Tensor,
        prompt_ids: Tensor,
        lengths: Tensor | None = None,
        gold: Tensor | None = None,
        uncertainty: Tensor | None = None,
        kl: Tensor | None = None,
    ) -> None:
        """Add responses; entries that are not finite are left out.

        Args:
            rewards: What is trained on, [N].
            prompt_ids: Equal for responses to one prompt, integer [N]; all responses to a prompt in one call.
            lengths: Tokens of each response, [N].
            gold: What the responses are really worth, [N].
            uncertainty: Standard deviation between the members of an ensemble, [N].
            kl: Log-ratio of each response to the reference, [N] nats.
        """
        given = {"proxy": rewards, "gold": gold, "uncertainty": uncertainty, "length": lengths, "kl": kl}
        if gold is not None:
            means = prompt_statistics(gold, prompt_ids).means
            given["gold_of_prompt"] = means
        for place, name in enumerate(_QUANTITIES):
            values = given.get(name)
            if values is not None:
                self.moments[place] += _moments(values)
        if lengths is not None:
            self.within += _within_prompts(rewards, lengths, prompt_ids)

    @override
    def compute(self) -> dict[str, Tensor]:
        """The report, on every rank the same; each entry is float64 [], `nan` where there is nothing to say.

        `proxy_gain`, `gold_gain`: change of the mean since the first report, in standard deviations of its responses.
        `gold_drop`: how far gold, mean of the last `WINDOW` reports, has fallen from its highest such mean while the proxy is
        above what it was there, in the same unit; 0 where the proxy is not.
        `gold_drop_errors`: the same in standard errors of that difference, prompts taken as independent.
        `uncertainty_growth`, `length_growth`: mean over that of the first report.
        `length_correlation`: Pearson's, of proxy and length, of deviations from the prompt's means.
        `distance`: square root of the mean KL to the reference, sqrt(nats).
        `proxy`, `gold`, `gold_error`, `kl`, and `means`, `deviations` of all quantities, [6]: for `remember`.
        """
        numbers, totals, squares = self.moments.unbind(1)
        means = totals / numbers
        deviations = ((squares - totals * means).clamp(min=0.0) / (numbers - 1).clamp(min=0.0)).sqrt()
        now = dict(zip(_QUANTITIES, means, strict=True))
        before = torch.where(self.first.isnan(), torch.stack([means, deviations], 1), self.first)
        start = dict(zip(_QUANTITIES, before, strict=True))
        prompts = _QUANTITIES.index("gold_of_prompt")
        error = deviations[prompts].square() / numbers[prompts]
        columns = {"proxy": now["proxy"], "gold": now["gold"], "gold_error": error, "kl": now["kl"]}
        drop, drop_error = self._drop(torch.stack([columns[name] for name in _COLUMNS]))
        freedom, reward_squares, length_squares, products = self.within
        correlation = products / (reward_squares * length_squares).sqrt()
        return {
            "proxy_gain": _over(now["proxy"] - start["proxy"][0], start["proxy"][1]),
            "gold_gain": _over(now["gold"] - start["gold"][0], start["gold"][1]),
            "gold_drop": _over(drop, start["gold"][1]),
            "gold_drop_errors": torch.where(drop > 0, drop / drop_error, drop),
            "uncertainty_growth": _over(now["uncertainty"], start["uncertainty"][0]),
            "length_growth": _over(now["length"], start["length"][0]),
            "length_correlation": torch.where(freedom >= MIN_CORRELATION_FREEDOM, correlation, torch.nan),
            "distance": now["kl"].clamp(min=0.0).sqrt(),
            "means": means,
            "deviations": deviations,
            **columns,
        }

    def remember(self, report: Mapping[str, Tensor], *, update: int) -> None:
        """Add a report to the history; the same on every rank, as the report is.

        Args:
            report: What `compute` gave.
            update: Updates done when it was made.
        """
        found = torch.stack([report["means"], report["deviations"]], 1)
        # Rewards that were all equal at first have no unit yet; that of the first report with a spread counts.
        unknown = torch.stack([self.first[:, 0].isnan(), ~(self.first[:, 1] > 0)], 1)
        self.first = torch.where(unknown, found, self.first)
        self.recent = self._recent_with(torch.stack([report[name] for name in _COLUMNS]))
        smooth = _smoothed(self.recent)
        is_higher = smooth[1].isfinite() & ~(smooth[1] <= self.peak[1])
        self.peak = torch.where(is_higher, torch.cat([smooth, smooth.new_tensor([update])]), self.peak)

    def highest(self) -> Peak | None:
        """Where the gold reward stood highest; `None` where too few reports had one."""
        proxy, gold, _, kl, update = self.peak.tolist()
        if gold != gold:
            return None
        return Peak(proxy, gold, max(kl, 0.0) ** 0.5 if kl == kl else kl, int(update))

    def _recent_with(self, row: Tensor) -> Tensor:
        return torch.cat([self.recent[1:], row[None]])

    def _drop(self, row: Tensor) -> tuple[Tensor, Tensor]:
        """How far gold has fallen from its peak while the proxy rose, and the standard error of that."""
        proxy, gold, error, _ = _smoothed(self._recent_with(row))
        peak_proxy, peak_gold, peak_error = self.peak[:3]
        fell = (gold < peak_gold) & (proxy > peak_proxy)
        drop = torch.where(fell, peak_gold - gold, torch.where(gold.isfinite(), 0.0, torch.nan))
        return drop, (error + peak_error).sqrt()

    @override
    def _apply(self, fn: Callable[[Tensor], Tensor], exclude_state: Sequence[str] = "") -> nn.Module:
        """Go along to another device, but stay in float64: `Module.to(torch.bfloat16)` gets past torchmetrics' own guard."""
        return super()._apply(lambda tensor: tensor.to(fn(tensor).device), exclude_state)


def _smoothed(recent: Tensor) -> Tensor:
    """Means over the window, [4]; of the squared error that of the mean."""
    means = recent.mean(0)
    return torch.cat([means[:2], means[2:3] / len(recent), means[3:]])


def _moments(values: Tensor) -> Tensor:
    """Number, sum and sum of squares of the finite values, [3]."""
    finite = values.isfinite()
    known = torch.where(finite, values.double(), 0.0)
    return torch.stack([finite.sum().double(), known.sum(), known.square().sum()])


def _within_prompts(rewards: Tensor, lengths: Tensor, prompt_ids: Tensor) -> Tensor:
    """What the correlation of rewards and lengths within prompts is made of, [4]."""
    order, slots = prompt_slots(prompt_ids)
    ordered = torch.stack([rewards.double(), lengths.double()])[:, order]
    finite = ordered.isfinite().all(0)
    known = torch.where(finite, ordered, 0.0)
    counts = torch.zeros_like(known[0]).index_add_(0, slots, finite.double())
    means = torch.zeros_like(known).index_add_(1, slots, known) / counts.clamp(min=1.0)
    reward, length = torch.where(finite, known - means[:, slots], 0.0)
    freedom = (counts - 1).clamp(min=0.0).sum()
    return torch.stack([freedom, reward.square().sum(), length.square().sum(), (reward * length).sum()])


def _over(value: Tensor, unit: Tensor) -> Tensor:
    """A value in a unit, `nan` where the unit is 0 or not known."""
    return torch.where(unit > 0, value / unit, torch.nan)
