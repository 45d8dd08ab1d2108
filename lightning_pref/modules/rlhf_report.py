"""What is logged of a rollout as a whole: rewards, lengths, how well the values foretold, and a table of samples."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from lightning.pytorch.loggers import Logger, TensorBoardLogger
from torch import Tensor

from lightning_pref.escaping import in_markdown
from lightning_pref.functional.advantages import has_equal_group
from lightning_pref.functional.moments import Moments
from lightning_pref.measures.means import WeightedMeans
from lightning_pref.measures.policy_update import explained_variance
from lightning_pref.rollouts.collecting import Collected
from lightning_pref.rollouts.experience import Task

GOLD = "reward/gold"
UNCERTAINTY = "reward/uncertainty"
ZERO_SHARE = "reward/zero_share"
_SQUARE = "reward/square"
_OF_VALUES = ("value/return", "value/return_square", "value/error", "value/error_square")
_SHOWN_PROMPTS = 4


class RolloutMeans(WeightedMeans):
    """Means over the responses, or tokens, of the rollouts since the last report, over all ranks."""

    def __init__(self, *, has_values: bool = False, more: Sequence[str] = ()) -> None:
        names = ["reward/mean", _SQUARE, ZERO_SHARE, "reward/not_finite", "response/length", "response/ended_share"]
        self._sometimes = (GOLD, UNCERTAINTY, *more)
        super().__init__([*names, *self._sometimes, *(_OF_VALUES if has_values else ())])
        self.has_values = has_values

    def add(self, found: Collected) -> None:
        """Count the responses of a rollout of this rank."""
        finite = found.rewards.isfinite()
        known = torch.where(finite, found.rewards, 0.0)
        of_rewards = {"reward/mean": known, _SQUARE: known.double().square(), ZERO_SHARE: has_equal(found)}
        self.update(of_rewards, found.weights * finite)
        of_all = {
            "reward/not_finite": (~finite).float(),
            "response/length": found.lengths.float(),
            "response/ended_share": found.ended.float(),
        }
        self.update(of_all, found.weights)
        if found.gold is not None:
            self.update({GOLD: found.gold}, found.weights * found.gold.isfinite())
        if found.uncertainty is not None:
            self.update({UNCERTAINTY: found.uncertainty}, found.weights * found.uncertainty.isfinite())

    def add_values(self, values: Tensor, returns: Tensor, weights: Tensor) -> None:
        """Count the values of the tokens of a rollout, and what they were to foretell; [N] each."""
        known = torch.where(returns.isfinite(), returns, 0.0).double()
        error = known - values.double()
        of_tokens = dict(zip(_OF_VALUES, (known, known.square(), error, error.square()), strict=True))
        self.update(of_tokens, weights * returns.isfinite())

    def report(self) -> dict[str, Tensor]:
        """What is logged, and a new beginning."""
        means = self.compute()
        one = torch.ones_like(means["reward/mean"])
        values = {name: value for name, value in means.items() if name != _SQUARE and name not in _OF_VALUES}
        for name in self._sometimes:
            if values[name].isnan():  # nobody counted anything
                del values[name]
        values["reward/std"] = Moments(one, means["reward/mean"], means[_SQUARE]).var(0).sqrt()
        if self.has_values:
            returned, squared, missed, missed_squared = (means[name] for name in _OF_VALUES)
            values["value/explained_variance"] = explained_variance(
                Moments(one, missed, missed_squared), Moments(one, returned, squared)
            )
        self.reset()
        return {name: value.float() for name, value in values.items()}


def has_equal(found: Collected) -> Tensor:
    """Whether all rewards of a response's prompt are equal, [R] float32."""
    return has_equal_group(found.rewards, found.row_of_response).float()


def show_samples(found: Collected, task: Task, loggers: Sequence[Logger], step: int) -> None:
    """Write a table of samples to TensorBoard, where a run has it."""
    for logger in loggers:
        if isinstance(logger, TensorBoardLogger):
            logger.experiment.add_text("samples", sample_table(found, task), step)


def sample_table(found: Collected, task: Task) -> str:
    """The best and the worst answers to a few prompts, as a Markdown table."""
    lines = ["| prompt | answer | reward |", "|---|---|---|"]
    rewards = found.rewards.reshape(-1, task.num_samples).tolist()
    for prompt, texts, scores in list(zip(task.prompts, found.answers.texts, rewards, strict=True))[:_SHOWN_PROMPTS]:
        asked = prompt.text if isinstance(prompt.text, str) else " / ".join(str(m.get("content", "")) for m in prompt.text)
        order = sorted(range(len(texts)), key=lambda i: -scores[i])
        shown = dict.fromkeys((order[0], order[-1]))
        lines += [f"| {in_markdown(asked)} | {in_markdown(texts[i])} | {scores[i]:.3f} |" for i in shown]
    return "\n".join(lines)
