"""Held-out prompts, handed to the module that answers them, the same ones with the same seeds in every validation."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from lightning_pref.rollouts.experience import Instruments, Task, UpdatePlan
from lightning_pref.rollouts.prompts import Prompt, PromptSampler
from lightning_pref.rollouts.sampling import Sampling


@dataclass(frozen=True, kw_only=True)
class HeldOutSampling:
    """How responses to validation prompts are drawn.

    Args:
        num_samples: Responses to each prompt.
        temperature: Divisor of the logits; 0 decodes greedily. That of the training if not given.
    """

    num_samples: int = 1
    temperature: float | None = None

    def of(self, training: Sampling) -> Sampling:
        """The sampling of training with what is different here."""
        return training if self.temperature is None else replace(training, temperature=self.temperature)

    def check(self, training: Sampling, *, is_used: bool) -> None:
        """Raise for what cannot be meant, or has no effect.

        Args:
            training: How responses are drawn in training.
            is_used: Whether there is any validation.
        """
        if not is_used and self != HeldOutSampling():
            raise ValueError("`val_sampling` is set, but there is no validation; give `val`, `val_split` or `val_size`.")
        if self.num_samples < 1:
            raise ValueError(f"`val_sampling.num_samples` must be at least 1, got {self.num_samples!r}.")
        if self.of(training).temperature == 0 and self.num_samples > 1:
            raise ValueError(
                f"`val_sampling` asks for {self.num_samples} greedy responses to each prompt, which are all the same; leave "
                "`num_samples` at 1, or give a temperature above 0."
            )


class HeldOutTask:
    """What one step of a validation samples and scores.

    Neither tuple nor dataclass, which Lightning's precision plugins would take apart to look for tensors.

    Args:
        task: Prompts of this rank and what they are answered and scored with.
    """

    def __init__(self, task: Task) -> None:
        self.task = task


class HeldOutLoader:
    """Hands out the held-out prompts, all ranks equally many; repeated ones that fill a place are marked as fillers.

    Args:
        prompts: All held-out prompts.
        places: Which of them each step of this rank takes. It is asked for one epoch only, so that all validations are alike.
        num_samples: Responses to each prompt.
        num_parts: Batches in which the responses of a step are read after they are sampled.
        instruments: Gives what they are sampled and scored with, once that is needed.
    """

    def __init__(
        self,
        prompts: Sequence[Prompt],
        places: PromptSampler,
        *,
        num_samples: int,
        num_parts: int,
        instruments: Callable[[], Instruments],
    ) -> None:
        self.prompts = prompts
        self.places = places
        self.num_samples = num_samples
        self.num_parts = num_parts
        self.instruments = instruments

    def __len__(self) -> int:
        return self.places.num_rollouts

    def __iter__(self) -> Iterator[HeldOutTask]:
        instruments = self.instruments()
        for step in range(len(self)):
            drawn = self.places.drawn(step)
            yield HeldOutTask(
                Task(
                    instruments=instruments,
                    prompts=[self.prompts[place] for place in drawn.places],
                    num_fillers=drawn.num_fillers,
                    num_samples=self.num_samples,
                    seed=self.places.seed_of(step),
                    number=step,
                    plan=UpdatePlan(accumulate=self.num_parts),
                )
            )


def hold_out_prompts(prompts: Sequence[Prompt], size: float) -> tuple[list[Prompt], list[Prompt]]:
    """Training and held-out prompts, told apart by a hash of their tokens: equal prompts stay together, in every run.

    Args:
        prompts: All of them.
        size: Share of the prompts to hold out where below 1, else their number; a few more where prompts repeat.
    """
    wanted = max(1, round(size * len(prompts))) if size < 1 else round(size)
    keys = [hashlib.sha256(np.asarray(prompt.ids, dtype=np.int64).tobytes()).digest() for prompt in prompts]
    last = sorted(keys)[min(wanted, len(keys)) - 1]
    held = [prompt for prompt, key in zip(prompts, keys, strict=True) if key <= last]
    kept = [prompt for prompt, key in zip(prompts, keys, strict=True) if key > last]
    if not kept:
        raise ValueError(
            f"Holding out {wanted} of {len(prompts)} prompts for validation leaves none to train on (there are {len(set(keys))} "
            "different ones). Lower `val_size`, or give validation prompts by `val`."
        )
    return kept, held
