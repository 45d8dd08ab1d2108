"""Experience is data: sampled responses with all that an update needs, cut into minibatches and handed to `training_step`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from typing import NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from lightning_pref.data.groups import GroupBatch, PromptGroup, WindowCounts
from lightning_pref.data.run_place import RunPlace
from lightning_pref.rollouts.prompts import Prompt, PromptSampler
from lightning_pref.rollouts.rewards import Reward
from lightning_pref.rollouts.sampling import Sampler, Sampling

Ints = NDArray[np.int64]


class TokenRecord(NamedTuple):
    """What is known of each of N response tokens, one response after the other; `None` where an algorithm has no use for it."""

    sampled_logps: Tensor  # [N] log-prob under the distribution it was drawn from, by the engine that drew it
    old_logps: Tensor | None = None  # [N] log-prob under the policy that sampled it, by the training forward
    ref_logps: Tensor | None = None  # [N] log-prob under the reference
    advantages: Tensor | None = None  # [N]
    values: Tensor | None = None  # [N] value of the state before the token, when the experience was collected
    returns: Tensor | None = None  # [N] what the value is trained towards

    def map(self, change: Callable[[Tensor], Tensor]) -> TokenRecord:
        """The same change to every tensor that is there."""
        there = {name: change(value) for name, value in self._asdict().items() if value is not None}
        return TokenRecord(**there)


@dataclass(frozen=True, kw_only=True, eq=False)
class Experience:
    """One rollout of one rank, with statistics over all ranks taken already: it may be cut anywhere.

    Attributes:
        groups: Prompts with the responses that are trained on.
        tokens: What is known of each token, in the order of the responses.
        weights: Weight of each response, [R] float32 on the CPU: 0 where it only fills a batch or is left out.
        temperature: Of the sampling; log-probs are those of the tempered policy.
        keeps_groups: Whether the responses of a prompt must stay together (pairs do).
    """

    groups: Sequence[PromptGroup]
    tokens: TokenRecord
    weights: Tensor
    temperature: float
    keeps_groups: bool = False


@dataclass(frozen=True, kw_only=True, eq=False)
class ExperienceBatch:
    """A micro-batch of experience: what `training_step` sees.

    Attributes:
        groups: The responses, with the counts of the whole update.
        tokens: What is known of each of the N response tokens, in the flat order of the batch.
        weights: Weight of each response, [R] float32.
        temperature: Of the sampling.
    """

    groups: GroupBatch
    tokens: TokenRecord
    weights: Tensor
    temperature: float

    @property
    def window(self) -> WindowCounts | None:
        return self.groups.window

    @property
    def num_tokens(self) -> int:
        return self.groups.num_tokens

    @property
    def num_groups(self) -> int:
        return self.groups.num_groups

    def to(self, device: torch.device | str, non_blocking: bool = False) -> ExperienceBatch:
        def moved(tensor: Tensor) -> Tensor:
            return tensor.to(device, non_blocking=non_blocking)

        return ExperienceBatch(
            groups=self.groups.to(device, non_blocking),
            tokens=self.tokens.map(moved),
            weights=moved(self.weights),
            temperature=self.temperature,
        )


# Lightning's precision plugins take every dataclass apart to cast its tensors; without this attribute a batch is one thing.
del ExperienceBatch.__dataclass_fields__


@dataclass(frozen=True, kw_only=True)
class UpdatePlan:
    """How often and in what pieces one rollout is trained on.

    Attributes:
        inner_epochs: Passes over the experience.
        num_minibatches: Updates of one pass.
        accumulate: Micro-batches of one update.
    """

    inner_epochs: int = 1
    num_minibatches: int = 1
    accumulate: int = 1

    @property
    def num_updates(self) -> int:
        return self.inner_epochs * self.num_minibatches

    @property
    def num_parts(self) -> int:
        """Micro-batches of one pass."""
        return self.num_minibatches * self.accumulate

    @property
    def num_batches(self) -> int:
        """Micro-batches that a rollout makes."""
        return self.inner_epochs * self.num_parts


class Instruments(NamedTuple):
    """What rollouts are made with, the same throughout a run."""

    sampler: Sampler
    sampling: Sampling
    tokenizer: PreTrainedTokenizerBase
    reward: Reward
    gold: Reward | None  # only watched, never trained on


class Task(NamedTuple):
    """What a rollout is to collect."""

    instruments: Instruments
    prompts: Sequence[Prompt]
    num_fillers: int  # of the prompts, at the end: they count nowhere
    num_samples: int
    seed: int
    number: int  # rollouts of the run before this one
    plan: UpdatePlan


class InHand(NamedTuple):
    """The rollout that is being trained on."""

    epoch: int
    rollout: int  # its number in the epoch
    experience: Experience


class Collects(Protocol):
    """What the loader asks of a module."""

    def collect(self, task: Task) -> Experience:
        """Sample, score, and work out all that the updates need. Every rank is called, equally often."""
        ...

    def total(self, values: Tensor) -> Tensor:
        """Sum over all ranks, on every one of them."""
        ...


def micro_batches(
    experience: Experience, plan: UpdatePlan, *, seed: int, total: Callable[[Tensor], Tensor]
) -> Iterator[ExperienceBatch]:
    """All micro-batches of a rollout, shuffled anew in every pass.

    Prompts stay whole while there are enough of them; otherwise a cut falls between the responses of a prompt.

    Args:
        experience: What was collected.
        plan: How it is cut.
        seed: Of the shuffling.
        total: Sum over all ranks, for the divisors of exact means; called once.
    """
    sizes = [len(group.responses) for group in experience.groups]
    offsets = np.concatenate([[0], np.cumsum(sizes)])
    orders = [np.random.default_rng([seed, epoch]).permutation(len(sizes)) for epoch in range(plan.inner_epochs)]
    passes = [cut(sizes, plan.num_parts, order) for order in orders]
    counts = _window_counts(experience, passes, plan, total)
    responses = [response for group in experience.groups for response in group.responses]
    token_ends = np.cumsum([len(response) for response in responses])
    for epoch, parts in enumerate(passes):
        for number, part in enumerate(parts):
            window = counts[epoch * plan.num_minibatches + number // plan.accumulate]
            groups = [piece_of(experience.groups[g], own) for g, own in part]
            places = np.concatenate([offsets[g] + np.asarray(own) for g, own in part])
            tokens = np.concatenate([np.arange(token_ends[r] - len(responses[r]), token_ends[r]) for r in places])
            index = torch.from_numpy(tokens)
            yield ExperienceBatch(
                groups=GroupBatch.from_groups(groups, window=window),
                tokens=experience.tokens.map(partial(_taken, index=index)),
                weights=experience.weights[torch.from_numpy(places)],
                temperature=experience.temperature,
            )


def _taken(values: Tensor, index: Tensor) -> Tensor:
    return values[index.to(values.device)]


Part = list[tuple[int, Ints]]  # groups of a micro-batch, and which of its responses


def cut(sizes: Sequence[int], num_parts: int, order: Sequence[int] | Ints) -> list[Part]:
    """Groups in parts as even as can be: whole ones while there are enough of them, else cut between two responses.

    Args:
        sizes: Responses of each group.
        num_parts: No more than there are responses.
        order: Of the groups; the responses of a group stay in theirs.
    """
    if len(sizes) >= num_parts:
        bounds = [i * len(sizes) // num_parts for i in range(num_parts + 1)]
        return [[(int(g), np.arange(sizes[g])) for g in order[start:end]] for start, end in pairwise(bounds)]
    pieces = [(int(g), r) for g in order for r in range(sizes[g])]
    bounds = [i * len(pieces) // num_parts for i in range(num_parts + 1)]
    return [_regrouped(pieces[start:end]) for start, end in pairwise(bounds)]


def _regrouped(pieces: Sequence[tuple[int, int]]) -> Part:
    by_group: dict[int, list[int]] = {}
    for g, r in pieces:
        by_group.setdefault(g, []).append(r)
    return [(g, np.array(own)) for g, own in by_group.items()]


def piece_of(group: PromptGroup, own: Ints) -> PromptGroup:
    """A group with some of its responses."""
    if len(own) == len(group.responses):
        return group
    return replace(group, responses=tuple(group.responses[int(r)] for r in own), ranks=None)


def _window_counts(
    experience: Experience, passes: Sequence[Sequence[Part]], plan: UpdatePlan, total: Callable[[Tensor], Tensor]
) -> list[WindowCounts]:
    """What each update sees over all ranks and micro-batches; 1 where it would be nothing, since a sum of nothing is 0."""
    offsets = np.concatenate([[0], np.cumsum([len(group.responses) for group in experience.groups])])
    weights = experience.weights.double().numpy()
    lengths = np.array([len(response) for group in experience.groups for response in group.responses])
    rows = []
    for parts in passes:
        for start in range(0, plan.num_parts, plan.accumulate):
            update = [piece for part in parts[start : start + plan.accumulate] for piece in part]
            places = np.concatenate([offsets[g] + own for g, own in update])
            num_groups = sum(experience.groups[g].weight * len(own) / len(experience.groups[g].responses) for g, own in update)
            rows.append([num_groups, weights[places].sum(), (weights[places] * lengths[places]).sum()])
    sums = total(torch.tensor(rows, dtype=torch.float64)).tolist()
    return [WindowCounts(*(count if count > 0 else 1.0 for count in row)) for row in sums]


class ExperienceLoader:
    """Hands out the micro-batches of rollout after rollout, and asks for new experience when it runs dry.

    It has a length, so that Lightning does not fetch one batch ahead, which would begin a rollout with weights that the
    update in progress is about to change.

    Args:
        prompts: All prompts.
        sampler: Which of them each rollout takes.
        plan: How each rollout is trained on.
        num_samples: Responses to each prompt.
        instruments: Gives what rollouts are made with, once they are needed.
        collector: Gives the module that collects.
    """

    def __init__(
        self,
        prompts: Sequence[Prompt],
        sampler: PromptSampler,
        plan: UpdatePlan,
        *,
        num_samples: int,
        instruments: Callable[[], Instruments],
        collector: Callable[[], Collects],
    ) -> None:
        self.prompts = prompts
        self.sampler = sampler  # Lightning looks for it here, to tell it the epoch
        self.plan = plan
        self.num_samples = num_samples
        self.instruments = instruments
        self.collector = collector
        self._start = RunPlace(0, 0)
        self._in_hand: InHand | None = None

    def __len__(self) -> int:
        """Micro-batches of this rank in an epoch."""
        return self.sampler.num_rollouts * self.plan.num_batches

    def __iter__(self) -> Iterator[ExperienceBatch]:
        start = self._start.batch if self._start.epoch == self.sampler.epoch else 0
        self._start = RunPlace(0, 0)
        for rollout in range(start // self.plan.num_batches, self.sampler.num_rollouts):
            module = self.collector()
            seed = self.sampler.seed_of(rollout)
            skipped = max(0, start - rollout * self.plan.num_batches)
            experience = self._experience_of(rollout)
            if experience is None:
                experience = module.collect(self._task(rollout, seed))
                self._in_hand = InHand(self.sampler.epoch, rollout, experience)
            for number, batch in enumerate(micro_batches(experience, self.plan, seed=seed, total=module.total)):
                if number >= skipped:
                    yield batch
            self._in_hand = None

    def _experience_of(self, rollout: int) -> Experience | None:
        """The experience in hand, if it is that of this rollout."""
        if self._in_hand is None or self._in_hand[:2] != (self.sampler.epoch, rollout):
            return None
        return self._in_hand.experience

    def resume(self, place: RunPlace) -> None:
        """Let the next pass begin at this micro-batch, if it is one through this epoch.

        Inside a rollout that rollout is collected again, with the weights as they are now, unless `take_up` brings it back.
        Between two rollouts the run goes on as if it had never stopped.
        """
        if not 0 <= place.batch <= len(self):
            raise ValueError(
                f"The checkpoint was written {place.batch} micro-batches into an epoch, and an epoch has {len(self)} of them "
                "now: the prompts, `num_prompts`, the number of updates of a rollout or of processes is another. Resume with "
                "what the run was started with."
            )
        self._start = place

    def take_up(self, in_hand: InHand) -> None:
        """Train on this rollout instead of collecting it."""
        self._in_hand = in_hand

    def in_hand_at(self, place: RunPlace) -> InHand | None:
        """The rollout in hand, if the micro-batch at this place is one of it."""
        there = (place.epoch, place.batch // self.plan.num_batches)
        return self._in_hand if self._in_hand is not None and self._in_hand[:2] == there else None

    def _task(self, rollout: int, seed: int) -> Task:
        drawn = self.sampler.drawn(rollout)
        return Task(
            instruments=self.instruments(),
            prompts=[self.prompts[place] for place in drawn.places],
            num_fillers=drawn.num_fillers,
            num_samples=self.num_samples,
            seed=seed,
            number=self.sampler.epoch * self.sampler.num_rollouts + rollout,
            plan=self.plan,
        )
