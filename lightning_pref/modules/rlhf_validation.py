"""What the policy's answers to held-out prompts are worth, and how far it has gone for that."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from lightning_pref.data.groups import GroupBatch
from lightning_pref.functional.masked import segment_sum
from lightning_pref.models.forward import ResponseLogps
from lightning_pref.models.reference import Reference
from lightning_pref.modules.rlhf_report import ZERO_SHARE, RolloutMeans
from lightning_pref.rollouts.collecting import Collected, chunks
from lightning_pref.rollouts.experience import Task

KL = "kl"


class HeldOutMeans(RolloutMeans):
    """Means over the responses to held-out prompts, over all ranks; fillers count nowhere."""

    def __init__(self) -> None:
        super().__init__(more=[KL])
        self._tells_ties = True

    def add_validation(self, found: Collected, task: Task, kl: Tensor | None) -> None:
        """Count the responses of one step.

        Args:
            found: The responses and their rewards.
            task: What was asked for.
            kl: Log-ratio of each response to the reference, [R] nats, where that is known.
        """
        self.add(found)
        self._tells_ties = task.num_samples > 1
        if kl is not None:
            self.update({KL: kl}, found.weights)

    def held_out_report(self) -> dict[str, Tensor]:
        """What is logged of a validation, and a new beginning."""
        without = set() if self._tells_ties else {ZERO_SHARE}
        return {f"val/{name}": value for name, value in self.report().items() if name not in without}


def held_out_kl(
    found: Collected, task: Task, logps: Callable[[GroupBatch], ResponseLogps], reference: Reference | None
) -> Tensor | None:
    """Log-ratio of each response to the reference, [R] nats; `None` without one, and of greedy responses, which are no sample.

    Args:
        found: The responses.
        task: What was asked for. Its plan says in how many batches they are read.
        logps: Gives the log-probs of a batch under the policy.
        reference: What the policy is compared with.
    """
    if reference is None or task.instruments.sampling.temperature == 0:
        return None
    parts = []
    for batch in chunks(found.answers.groups, task.plan.num_parts, found.rewards.device):
        out = logps(batch)
        parts.append(segment_sum(out.token_logps - reference.logps(batch), out.response, len(out.lengths)))
    return torch.cat(parts).to(torch.float32)
