"""Prompts of any preference data as a LightningDataModule that trains on what the policy answers."""

from __future__ import annotations

import logging
import warnings
from functools import partial
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from transformers import PreTrainedTokenizerBase
from typing_extensions import override

from lightning_pref.data.loading import OnBadRow
from lightning_pref.data.playground import Split
from lightning_pref.data.playground_source import PlaygroundRows, PlaygroundSettings, is_playground
from lightning_pref.data.rendering import check_template
from lightning_pref.data.run_place import KeepsPlace, place_of
from lightning_pref.data.source_choice import check_held_out, check_sources
from lightning_pref.data.sources import RowSource, read_rows
from lightning_pref.data.templates import Tokenization
from lightning_pref.domains import check_range, check_seed
from lightning_pref.losses.ensemble import How
from lightning_pref.models.backbones import Dtype, given_tokenizer
from lightning_pref.rollouts.engines.generate import CachedSampler
from lightning_pref.rollouts.experience import Collects, ExperienceLoader, Instruments, UpdatePlan
from lightning_pref.rollouts.experience_state import in_hand_of, in_hand_state
from lightning_pref.rollouts.lockstep import any_process, itself, needs_lockstep, split_reward
from lightning_pref.rollouts.prompts import Prompt, PromptSampler, prompts_digest, read_prompts
from lightning_pref.rollouts.rewards import Reward, RewardSpec, check_reward, load_reward
from lightning_pref.rollouts.sampling import Sampling
from lightning_pref.rollouts.validation import HeldOutLoader, HeldOutSampling, HeldOutTask, hold_out_prompts

log = logging.getLogger(__name__)


class RolloutData(KeepsPlace, L.LightningDataModule):
    """Prompts to be answered by the policy in training, and the reward of its answers.

    A rollout takes `num_prompts` prompts on each rank, samples `num_samples` responses to each, and is trained on for
    `inner_epochs` passes of `num_minibatches` updates. A training epoch takes every prompt once.

    Args:
        train: Rows with prompts: a file (.jsonl, .json, .csv, .parquet, .arrow), a folder saved by `datasets`, a hub id, or
            `playground`; several make one data set. Responses that the rows have are not used.
        val: Rows with prompts for validation, likewise; their rewards are logged as `val/reward/mean` and so on. There is no
            validation without this, `val_split` or `val_size`.
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
        val_sampling: How responses to validation prompts are drawn.
        max_rows: Most responses that are decoded together.
        inner_epochs: Passes over the experience of a rollout.
        num_minibatches: Updates of one pass.
        val_size: Prompts to hold out for validation: a share of them below 1, else their number. Chosen by a hash, so that they
            are the same in every run and no prompt is on both sides.
        split: Split of a folder or hub data set.
        val_split: Split of the validation folder or hub data set; of the training one where `val` is not given.
        subset: Configuration of a hub data set that has several.
        revision: Branch, tag or commit of hub data sets.
        columns: Columns by the names they have there, {name here: name there}; rewards see these only, if given.
        limit_rows: Read only that many training rows.
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
        val: str | list[str] | None = None,
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
        val_sampling: HeldOutSampling = HeldOutSampling(),  # noqa: B008  # frozen
        max_rows: int = 256,
        inner_epochs: int = 1,
        num_minibatches: int = 1,
        val_size: float | None = None,
        split: str | None = None,
        val_split: str | None = None,
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
        self.val_sources = [val] if isinstance(val, str) else val
        self.val_size = val_size
        self.val_split = val_split
        self.val_sampling = val_sampling
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
        self._val_prompts: list[Prompt] | None = None
        self._rewards: tuple[Reward, Reward | None] | None = None
        self._loader: ExperienceLoader | None = None
        self._check()

    def _check(self) -> None:
        for name in ("num_prompts", "num_samples", "inner_epochs", "num_minibatches", "reward_batch_size", "max_rows"):
            check_range(name, getattr(self, name), at_least=1)
        check_range("max_prompt_length", self.max_prompt_length, at_least=1)
        check_range("uwo_coefficient", self.uwo_coefficient, at_least=0)
        check_seed("seed", self.seed)
        check_template(self.chat_template, self.template_date)
        check_reward(self.reward_spec)
        if self.uwo_coefficient != 0.5 and self.aggregate != "uwo":
            raise ValueError(f"`uwo_coefficient` acts on `aggregate: uwo` only; with {self.aggregate!r} it has no effect.")
        if self.sampling.cuts_tokens:
            raise ValueError(
                "Training on samples that leave out tokens (temperature 0, top_k, top_p, min_p) is refused: the log-probs that "
                "the update compares would not be those the tokens were drawn with, so that the ratio to the sampling policy "
                "is not 1 to begin with. Sample from the whole distribution; `temperature` is exact on both sides."
            )
        of_files = {name: getattr(self, name) for name in ("split", "val_split", "subset", "revision", "columns")}
        check_sources(self.train_sources, self.val_sources or [], of_files, self.playground, limit_rows=self.limit_rows)
        if self.val_size and self.val_sources is None and all(map(is_playground, self.train_sources)):
            raise ValueError(
                "`val_size` holds out training rows, but the playground writes rows of its own for validation: leave it out and "
                "give `val: playground`; `playground.num_val_rows` says how many."
            )
        check_held_out(self.train_sources, self.val_sources, self.val_split, self.val_size)
        self.val_sampling.check(self.sampling, is_used=self._validates)

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

    @property
    def tokenizer_digest(self) -> str:
        """Changes whenever prompts would get other token ids."""
        return self._tokenization(self.max_prompt_length).digest()

    @override
    def setup(self, stage: str) -> None:
        """Read and tokenise the prompts, and load the reward, in every process."""
        if self._prompts is not None:
            return
        prompts = self._read("train", self.train_sources, self.split, self.limit_rows)
        if self.val_sources is not None or self.val_split is not None:
            self._val_prompts = self._read("val", self.val_sources or self.train_sources, self.val_split, None)
        elif self.val_size:
            prompts, self._val_prompts = hold_out_prompts(prompts, self.val_size)
        self._prompts = prompts
        self._rewards = self._load_rewards()

    @property
    def _validates(self) -> bool:
        return self.val_sources is not None or self.val_split is not None or bool(self.val_size)

    def _read(self, part: Split, names: list[str], split: str | None, limit_rows: int | None) -> list[Prompt]:
        tokenization = self._tokenization(self.max_prompt_length)
        sources = self._sources(part, names, split)
        found, errors = read_prompts(sources, tokenization, limit_rows=limit_rows, skip_bad=self.on_bad_row == "skip")
        if errors and (self.trainer is None or self.trainer.is_global_zero):
            log.warning("skipped %d rows without a usable prompt; the first: %s", len(errors), errors[0])
        return found

    def _tokenization(self, max_prompt_length: int | None) -> Tokenization:
        return Tokenization(
            self.loaded_tokenizer,
            chat_template=self.chat_template,
            template_date=self.template_date,
            max_prompt_length=max_prompt_length,
        )

    def _sources(self, part: Split, names: list[str], split: str | None) -> list[RowSource]:
        return [
            PlaygroundRows(name, self.playground, part)
            if is_playground(name)
            else read_rows(name, split=split, subset=self.subset, revision=self.revision, columns=self.columns)
            for name in names
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
        plan = self._plan()
        sampler = self._sampler(self.prompts)
        if sampler.fewest * self.num_samples < plan.num_parts:
            raise ValueError(
                f"A rollout of {sampler.fewest} prompts with {self.num_samples} responses on each rank is cut into "
                f"{plan.num_minibatches} minibatches of {plan.accumulate} micro-batches each. Raise `num_prompts` (there are "
                f"{len(self.prompts)}), or lower `num_minibatches` or `accumulate_grad_batches`."
            )
        self._loader = ExperienceLoader(
            self.prompts,
            sampler,
            plan,
            num_samples=self.num_samples,
            instruments=partial(self._instruments, self.sampling),
            collector=self._collector,
        )
        self._goes_on_by(self._loader.resume)
        return self._loader

    def _sampler(self, prompts: list[Prompt]) -> PromptSampler:
        place = None if self.trainer is None else self.trainer.distributed_sampler_kwargs
        ranks = {"rank": place["rank"], "num_replicas": place["num_replicas"]} if place else {}
        return PromptSampler(len(prompts), per_rollout=self.num_prompts, seed=self.seed, **ranks)

    @override
    def val_dataloader(self) -> HeldOutLoader | list[HeldOutLoader]:
        if self._val_prompts is not None:
            sampling, num_samples = self.val_sampling.of(self.sampling), self.val_sampling.num_samples
            return HeldOutLoader(
                self._val_prompts,
                self._sampler(self._val_prompts),
                num_samples=num_samples,
                # A step has as many prompts as a rollout, so that a part of it is about as large as a micro-batch.
                num_parts=-(-self._plan().num_parts * num_samples // self.num_samples),
                instruments=partial(self._instruments, sampling),
            )
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

    def _instruments(self, sampling: Sampling) -> Instruments:
        assert self._rewards is not None and self.trainer is not None
        reward, gold = self._rewards
        for each in (reward, gold):
            if each is not None:
                each.to(self.trainer.strategy.root_device)
                split_reward(each, self.trainer.strategy)
        tokenizer = self.loaded_tokenizer
        any_rank = any_process if needs_lockstep(self.trainer.strategy) else itself
        sampler = CachedSampler(sampling, int(tokenizer.eos_token_id), max_rows=self.max_rows, any_rank=any_rank)
        return Instruments(sampler, sampling, tokenizer, reward, gold)

    @override
    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        # Any: Lightning's own signature. Lightning itself would wait for each copy.
        if isinstance(batch, HeldOutTask):
            return batch  # it holds no tensors
        return batch.to(device, non_blocking=True)

    def rank_state(self) -> dict[str, Any]:  # Any: plain data and tensors
        """The rollout of this process that is being trained on, for an exact resume in its middle."""
        assert self.trainer is not None
        in_hand = None if self._loader is None else self._loader.in_hand_at(place_of(self.trainer))
        return {"is_bound_to_rank": in_hand is not None, "in_hand": None if in_hand is None else in_hand_state(in_hand)}

    def load_rank_state(self, state: dict[str, Any]) -> None:  # Any: as above
        """Take up what `rank_state` gave."""
        if state["in_hand"] is not None:
            assert self.trainer is not None and self._loader is not None, "training has started"
            self._loader.take_up(in_hand_of(state["in_hand"], self.trainer.strategy.root_device))
