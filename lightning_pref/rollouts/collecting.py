"""The part of a rollout that knows nothing of an algorithm: sample responses, read them, have them scored."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel

from lightning_pref.data.groups import GroupBatch, PromptGroup
from lightning_pref.functional.masked import segment_sum
from lightning_pref.observations import RewardObservation
from lightning_pref.rollouts.experience import Task, cut, piece_of
from lightning_pref.rollouts.rewards import Answers, judged


class Collected(NamedTuple):
    """Sampled responses of one rank and what they are worth; R responses, N tokens, prompt by prompt."""

    answers: Answers
    sampled_logps: Tensor  # [N] float32
    rewards: Tensor  # [R] float32, `nan` where a reward could not be told
    gold: Tensor | None  # [R] float32
    uncertainty: Tensor | None  # [R] float32, of the rewards, where an ensemble gave them
    ended: Tensor  # [R] bool
    lengths: Tensor  # [R] int64
    row_of_response: Tensor  # [R] int64, row ids of the prompts
    weights: Tensor  # [R] float32, 0 for fillers

    @property
    def response(self) -> Tensor:
        """Index of the response of each token, [N]."""
        index = torch.arange(len(self.lengths), device=self.lengths.device)
        return index.repeat_interleave(self.lengths, output_size=len(self.sampled_logps))

    def observation(self, num_fillers: int, ref_logps: Tensor | None) -> RewardObservation | None:
        """What callbacks are told; `None` where nothing counts.

        Args:
            num_fillers: Responses at the end that count nowhere.
            ref_logps: Of each token under the reference, [N] nats.
        """
        real = len(self.rewards) - num_fillers
        if not real:
            return None
        kl = None if ref_logps is None else segment_sum(self.sampled_logps - ref_logps, self.response, len(self.rewards))[:real]
        return RewardObservation(
            rewards=self.rewards[:real],
            prompt_ids=self.row_of_response[:real],
            lengths=self.lengths[:real],
            gold=None if self.gold is None else self.gold[:real],
            uncertainty=None if self.uncertainty is None else self.uncertainty[:real],
            kl=kl,
        )


def sample_and_score(model: PreTrainedModel | PeftModel, task: Task) -> Collected:
    """Sample `num_samples` responses to every prompt of a task and score them.

    The global random state, and the modes of the model, are left as they were. Precision is as the caller has set it.
    """
    tools = task.instruments
    prompts = task.prompts
    sampled = tools.sampler.sample(model, [prompt.ids for prompt in prompts], task.num_samples, seed=task.seed)
    num_real = len(prompts) - task.num_fillers
    groups = [
        PromptGroup(
            row_id=prompt.row_id,
            prompt=prompt.ids,
            responses=found.responses,
            source=prompt.row.source,
            weight=float(number < num_real),
        )
        for number, (prompt, found) in enumerate(zip(prompts, sampled, strict=True))
    ]
    texts = [[str(tools.tokenizer.decode(ids, skip_special_tokens=True)) for ids in found.responses] for found in sampled]
    answers = Answers(prompts=prompts, texts=texts, groups=groups, ended=[found.ended for found in sampled])
    device = next(model.parameters()).device

    def on_device(values: list[float] | list[int] | list[bool], dtype: torch.dtype) -> Tensor:
        return torch.tensor(values, dtype=dtype).to(device, non_blocking=True)

    verdict = judged(tools.reward, answers)
    spread = verdict.uncertainty
    logps = np.concatenate([logps for found in sampled for logps in found.token_logps])
    return Collected(
        answers=answers,
        sampled_logps=torch.from_numpy(logps).to(device),
        rewards=checked_rewards(verdict.rewards, answers).to(device),
        gold=None if tools.gold is None else checked_rewards(tools.gold(answers), answers).to(device),
        uncertainty=None if spread is None else checked_rewards(spread, answers).to(device),
        ended=on_device([ended for found in sampled for ended in found.ended], torch.bool),
        lengths=on_device([len(ids) for group in groups for ids in group.responses], torch.int64),
        row_of_response=on_device([group.row_id for group in groups for _ in group.responses], torch.int64),
        weights=on_device([group.weight for group in groups for _ in group.responses], torch.float32),
    )


def checked_rewards(rewards: Tensor, answers: Answers) -> Tensor:
    """The rewards as float32, one for each response."""
    if rewards.shape != (answers.num_responses,):
        raise ValueError(
            f"The reward gave a tensor of shape {list(rewards.shape)} for {answers.num_responses} responses; expected one number "
            f"for each, [{answers.num_responses}]."
        )
    return rewards.detach().float()


def chunks(groups: Sequence[PromptGroup], num_chunks: int, device: torch.device) -> Iterator[GroupBatch]:
    """The responses in order, in a number of batches as even as the micro-batches of an update; one response at least in each."""
    sizes = [len(group.responses) for group in groups]
    for part in cut(sizes, min(num_chunks, sum(sizes)), range(len(sizes))):
        yield GroupBatch.from_groups([piece_of(groups[g], own) for g, own in part]).to(device)
