"""Prompts of any preference data as a LightningDataModule that trains on what the policy answers."""

from __future__ import annotations

import logging
import warnings
from typing import Any

import lightning as L
import torch
from lightning.fabric.utilities.warnings import PossibleUserWarning
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from transformers import PreTrainedTokenizerBase
from typing_extensions import override

from lightning_pref.data.loading import OnBadRow
from lightning_pref.data.playground_source import PlaygroundRows, PlaygroundSettings, is_playground
from lightning_pref.data.sources import RowSource, read_rows
from lightning_pref.data.templates import Tokenization
from lightning_pref.losses.ensemble import How
from lightning_pref.models.backbones import Dtype, given_tokenizer
from lightning_pref.rollouts.engines.generate import CachedSampler
from lightning_pref.rollouts.experience import Collects, ExperienceLoader, Instruments, UpdatePlan
from lightning_pref.rollouts.prompts import Prompt, PromptSampler, prompts_digest, read_prompts
from lightning_pref.rollouts.rewards import Reward, RewardSpec, load_reward
from lightning_pref.rollouts.sampling import Sampling

log = logging.getLogger(__name__)


class RolloutData(L.LightningDataModule):
    """Prompts to be answered by the policy in training, and the reward of its answers.

    A rollout takes `num_prompts` prompts on each rank, samples `num_samples` responses to each, and is trained on for
    `inner_epochs` passes of `num_minibatches` updates. A training epoch takes every prompt once.

    Args:
        train: Rows with prompts: a file (.jsonl, .json, .csv, .parquet, .arrow), a folder saved by `datasets`, a hub id, or
            `playground`; several make one data set. Responses that the rows have are not used.
        reward: What responses are worth: a folder or hub id of a sequence classifier, a Python function `module:function` of
            (prompt, response) and of columns of the row by their names, `playground:gold`, `playground:proxy` (with the flaw in
            `playground`), `playground:length`; a list of reward models for an ensemble; or weights by name.
        aggregate: How the members of an ensemble become one reward: mean, worst case (`wco`), or mean less variance (`uwo`).
        uwo_coefficient: Weight of the variance in `uwo`.
        gold: A reward that is only watched, never trained on; of the same kinds.
        reward_dtype: Of the weights of reward models.
        reward_batch_size: Most responses that a reward model reads at a time.
        num_prompts: Most prompts of a rollout on each rank.
        num_samples: Responses to each prompt.
        sampling: How they are drawn.
        max_rows: Most responses that are decoded together.
        inner_epochs: Passes over the experience of a rollout.
        num_minibatches: Updates of one pass.
        split: Split of a folder or hub data set.
        subset: Configuration of a hub data set that has several.
        revision: Branch, tag or commit of hub data sets.
        columns: Columns by the names they have there, {name here: name there}; rewards see these only, if given.
        limit_rows: Read only that many rows.
        on_bad_row: `error` stops at the first row that cannot be used, `skip` leaves such rows out and counts them.
        tokenizer: Folder, hub id or object. Recipes fill in that of the model.
        chat_template: Text or file of a Jinja template that replaces the tokenizer's own.
        template_date: The day (ISO) that templates which print a date are told.
        max_prompt_length: Most tokens of a prompt; the start of a longer one is cut.
        seed: Of the order of the prompts and of the sampling.
        playground: What the rows of the playground are like.
    """

    def __init__(
        self,
        train: str | list[str] = "playground",
        *,
        reward: str | list[str] | dict[str, float] | None = None,
        aggregate: How = "mean",
        uwo_coefficient: float = 0.5,
        gold: str | None = None,
        reward_dtype: Dtype = "float32",
        reward_batch_size: int = 64,
        num_prompts: int = 32,
        num_samples: int = 8,
        sampling: Sampling = Sampling(),  # noqa: B008  # frozen
        max_rows: int = 256,
        inner_epochs: int = 1,
        num_minibatches: int = 1,
        split: str | None = None,
        subset: str | None = None,
        revision: str | None = None,
        columns: dict[str, str] | None = None,
        limit_rows: int | None = None,
        on_bad_row: OnBadRow = "error",
        tokenizer: str | PreTrainedTokenizerBase | None = None,
        chat_template: str | None = None,
        template_date: str | None = None,
        max_prompt_length: int | None = None,
        seed: int = 0,
        playground: PlaygroundSettings = PlaygroundSettings(),  # noqa: B008  # frozen
    ) -> None:
        super().__init__()
        self.train_sources = [train] if isinstance(train, str) else train
        self.reward_spec: RewardSpec | None = reward
        self.aggregate: How = aggregate
        self.uwo_coefficient = uwo_coefficient
        self.gold_spec = gold
        self.reward_dtype: Dtype = reward_dtype
        self.reward_batch_size = reward_batch_size
        self.num_prompts = num_prompts
        self.num_samples = num_samples
        self.sampling = sampling
        self.max_rows = max_rows
        self.inner_epochs = inner_epochs
        self.num_minibatches = num_minibatches
        self.split = split
        self.subset = subset
        self.revision = revision
        self.columns = columns
        self.limit_rows = limit_rows
        self.on_bad_row = on_bad_row
        self.tokenizer = tokenizer
        self.chat_template = chat_template
        self.template_date = template_date
        self.max_prompt_length = max_prompt_length
        self.seed = seed
        self.playground = playground
        self._prompts: list[Prompt] | None = None
        self._rewards: tuple[Reward, Reward | None] | None = None
        self._loader: ExperienceLoader | None = None
        self._resume: int = 0
        self._check()

    def _check(self) -> None:
        if not self.train_sources:
            raise ValueError("`train` names no data; give a file, a folder, a hub id or `playground`.")
        for name in ("num_prompts", "num_samples", "inner_epochs", "num_minibatches", "reward_batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be at least 1, got {getattr(self, name)!r}.")
        if self.limit_rows is not None and self.limit_rows < 1:
            raise ValueError(f"`limit_rows` must be at least 1, got {self.limit_rows!r}.")
        if self.uwo_coefficient != 0.5 and self.aggregate != "uwo":
            raise ValueError(f"`uwo_coefficient` acts on `aggregate: uwo` only; with {self.aggregate!r} it has no effect.")
        if self.sampling.cuts_tokens:
            raise ValueError(
                "Training on samples that leave out tokens (temperature 0, top_k, top_p, min_p) is refused: the log-probs that "
                "the update compares would not be those the tokens were drawn with, so that the ratio to the sampling policy "
                "is not 1 to begin with. Sample from the whole distribution; `temperature` is exact on both sides."
            )
        others = [source for source in self.train_sources if not is_playground(source)]
        for name in ("split", "subset", "revision", "columns"):
            if getattr(self, name) is not None and not others:
                raise ValueError(
                    f"`{name}` is for files, folders and hub data sets, and all data is the playground; leave it out."
                )
        if len(others) == len(self.train_sources) and self.playground != PlaygroundSettings():
            raise ValueError(f"`playground` is set, but the data is {others}; leave it out, or train on `playground`.")

    @property
    def loaded_tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer, loaded on first use where it was given by name."""
        self.tokenizer = given_tokenizer(self.tokenizer)
        return self.tokenizer

    @property
    def prompts(self) -> list[Prompt]:
        """All prompts, after `setup`."""
        if self._prompts is None:
            raise RuntimeError("The data is not loaded yet; call `setup('fit')` first, as a Trainer does.")
        return self._prompts

    @property
    def digest(self) -> str:
        """Changes whenever a token of a prompt does."""
        return prompts_digest(self.prompts)

    @override
    def setup(self, stage: str) -> None:
        """Read and tokenise the prompts, and load the reward, in every process."""
        if self._prompts is not None:
            return
        tokenization = self._tokenization(self.max_prompt_length)
        skip_bad = self.on_bad_row == "skip"
        self._prompts, errors = read_prompts(self._sources(), tokenization, limit_rows=self.limit_rows, skip_bad=skip_bad)
        if errors and (self.trainer is None or self.trainer.is_global_zero):
            log.warning("skipped %d rows without a usable prompt; the first: %s", len(errors), errors[0])
        self._rewards = self._load_rewards()

    def _tokenization(self, max_prompt_length: int | None) -> Tokenization:
        return Tokenization(
            self.loaded_tokenizer,
            chat_template=self.chat_template,
            template_date=self.template_date,
            max_prompt_length=max_prompt_length,
        )

    def _sources(self) -> list[RowSource]:
        return [
            PlaygroundRows(name, self.playground, "train")
            if is_playground(name)
            else read_rows(name, split=self.split, subset=self.subset, revision=self.revision, columns=self.columns)
            for name in self.train_sources
        ]

    def _load_rewards(self) -> tuple[Reward, Reward | None]:
        if self.reward_spec is None:
            raise ValueError(
                "`reward` is not set: give the folder of a reward model (the `reward` recipe trains one), or a Python function "
                "`module:function` of (prompt, response)."
            )
        written = self._tokenization(None)
        common: dict[str, Any] = {  # Any: keyword arguments of several types
            "flaw": self.playground.flaw,
            "dtype": self.reward_dtype,
            "batch_size": self.reward_batch_size,
        }
        reward = load_reward(self.reward_spec, written, how=self.aggregate, coefficient=self.uwo_coefficient, **common)
        return reward, None if self.gold_spec is None else load_reward(self.gold_spec, written, **common)

    @override
    def train_dataloader(self) -> ExperienceLoader:
        trainer = self.trainer
        place = None if trainer is None else trainer.distributed_sampler_kwargs
        ranks = {"rank": place["rank"], "num_replicas": place["num_replicas"]} if place else {}
        plan = self._plan()
        sampler = PromptSampler(len(self.prompts), per_rollout=self.num_prompts, seed=self.seed, **ranks)
        if sampler.fewest * self.num_samples < plan.num_parts:
            raise ValueError(
                f"A rollout of {sampler.fewest} prompts with {self.num_samples} responses on each rank is cut into "
                f"{plan.num_minibatches} minibatches of {plan.accumulate} micro-batches each. Raise `num_prompts` (there are "
                f"{len(self.prompts)}), or lower `num_minibatches` or `accumulate_grad_batches`."
            )
        self._loader = ExperienceLoader(
            self.prompts, sampler, plan, num_samples=self.num_samples, instruments=self._instruments, collector=self._collector
        )
        self._loader.resume(self._resume)
        self._resume = 0
        return self._loader

    @override
    def val_dataloader(self) -> list[Any]:  # Any: there are none
        # An empty list is how Lightning is told that there is no validation; it wonders about it all the same.
        warnings.filterwarnings("ignore", message="Total length of `list` across ranks is zero", category=UserWarning)
        return []

    def _plan(self) -> UpdatePlan:
        trainer = self.trainer
        accumulate = 1 if trainer is None else trainer.accumulate_grad_batches
        plan = UpdatePlan(inner_epochs=self.inner_epochs, num_minibatches=self.num_minibatches, accumulate=accumulate)
        if trainer is None:
            return plan
        if trainer.overfit_batches:  # type: ignore[attr-defined]  # Lightning sets it from another file
            raise ValueError("`overfit_batches` has no meaning for sampled experience; set `limit_rows` to repeat a few prompts.")
        if any(isinstance(c, GradientAccumulationScheduler) for c in trainer.callbacks):  # type: ignore[attr-defined]
            raise ValueError(
                "Experience is cut for one number of accumulated batches; leave the GradientAccumulationScheduler out."
            )
        limit = trainer.limit_train_batches
        if isinstance(limit, int) and limit % accumulate:
            raise ValueError(
                f"`limit_train_batches` ({limit}) ends an epoch inside an update of {accumulate} accumulated micro-batches, "
                "whose mean would be wrong; give a multiple."
            )
        return plan

    def _collector(self) -> Collects:
        assert self.trainer is not None
        module: Any = self.trainer.lightning_module  # Any: what a Protocol describes
        if not callable(getattr(module, "collect", None)):
            raise TypeError(
                f"RolloutData asks the module for experience, but {type(module).__name__} has no `collect`; train an RLHFModule."
            )
        collects: Collects = module
        return collects

    def _instruments(self) -> Instruments:
        assert self._rewards is not None and self.trainer is not None
        reward, gold = self._rewards
        for each in (reward, gold):
            if each is not None:
                each.to(self.trainer.strategy.root_device)
        tokenizer = self.loaded_tokenizer
        sampler = CachedSampler(self.sampling, int(tokenizer.eos_token_id), max_rows=self.max_rows)
        return Instruments(sampler, self.sampling, tokenizer, reward, gold)

    @override
    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        # Any: Lightning's own signature. Lightning itself would wait for each copy.
        return batch.to(device, non_blocking=True)

    @override
    def state_dict(self) -> dict[str, Any]:  # Any: Lightning's own type
        done = 0 if self.trainer is None else self.trainer.fit_loop.epoch_loop.batch_progress.current.ready
        return {"version": 1, "batch": 0 if self._loader is None or done >= len(self._loader) else done}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:  # Any: as above
        if state_dict["version"] != 1:
            raise ValueError(f"The checkpoint holds version {state_dict['version']} of the rollout state; this is version 1.")
        # Lightning asks this of the loader; here the data module keeps the place.
        warnings.filterwarnings("ignore", message="You're resuming from a checkpoint that ended", category=PossibleUserWarning)
        self._resume = int(state_dict["batch"])
        if self._loader is not None:
            self._loader.resume(self._resume)
