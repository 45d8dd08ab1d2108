"""What sampled responses are worth: Python functions, reward models, ensembles and weighted sums of them, by name.

| on the command line | is |
|---|---|
| `playground:gold`, `playground:length`, `playground:proxy` | rewards of the playground; `proxy` has the flaw of the data |
| `module:function` | a Python function of (prompt, response), and of columns of the row by their names |
| a folder or hub id | a sequence classifier of transformers with one label, or one per member of an ensemble |
| a list of folders, or the export of an ensemble of adapters | an ensemble of reward models |
| a folder with the export of an implicit reward | beta times the log-ratio of that language model to its reference |
| `{name: weight}` | the weighted sum of any of the above |
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor
from transformers import AutoConfig, PreTrainedModel, PreTrainedTokenizerBase

from lightning_pref.data.groups import GroupBatch, PromptGroup
from lightning_pref.data.playground_reward import Flaw
from lightning_pref.data.rows import Row
from lightning_pref.data.templates import Tokenization
from lightning_pref.domains import check_range
from lightning_pref.losses.ensemble import How, ensemble_reward, ensemble_variance, standardized_members
from lightning_pref.models.backbones import Dtype, _explaining, check_vocabulary, evaluating, load_tokenizer
from lightning_pref.models.implicit_rewards import ImplicitReward, implicit_settings
from lightning_pref.models.reward_members import member_folders
from lightning_pref.models.reward_models import ScoreScale, build_reward_model, has_linear_head, is_classifier, response_scores
from lightning_pref.models.reward_scores import load_reward_model, sequence_scores
from lightning_pref.rollouts.prompts import Prompt
from lightning_pref.rollouts.reward_functions import RewardFunction, function_named, further_parameters, names_function

# What a name on the command line may be: one reward, an ensemble of reward models, or weights by name.
RewardSpec = str | list[str] | dict[str, float]


class Answers(NamedTuple):
    """Sampled responses, as text and as tokens: P prompts with K responses each."""

    prompts: Sequence[Prompt]
    texts: Sequence[Sequence[str]]  # P x K, without special tokens
    groups: Sequence[PromptGroup]  # the same responses as token ids of the policy, the end token included where it was drawn
    ended: Sequence[Sequence[bool]]  # P x K, whether the end token was drawn

    @property
    def num_responses(self) -> int:
        return sum(map(len, self.texts))


class Reward(Protocol):
    """Gives every response a number, larger is better. One that cannot be told is `nan`: it is counted and teaches nothing."""

    def __call__(self, answers: Answers) -> Tensor:
        """Rewards of the responses, prompt by prompt, [P * K] float32, on any device."""
        ...

    def to(self, device: torch.device) -> None:
        """Move what has weights to a device."""


class Judged(NamedTuple):
    """Rewards, and how far those who gave them disagree; [P * K] each."""

    rewards: Tensor
    uncertainty: Tensor | None  # standard deviation between the members of an ensemble, in the unit of the rewards


@runtime_checkable
class EnsembleReward(Reward, Protocol):
    """A reward that can tell how certain it is."""

    def judged(self, answers: Answers) -> Judged:
        """Rewards of the responses with their uncertainty, where there is one."""
        ...


def judged(reward: Reward, answers: Answers) -> Judged:
    """Rewards of the responses, with their uncertainty where several members gave them."""
    return reward.judged(answers) if isinstance(reward, EnsembleReward) else Judged(reward(answers), None)


@dataclass(frozen=True)
class FunctionReward:
    """A Python function of (prompt, response) and, by the names of its further parameters, of columns of the row.

    Attributes:
        name: What messages call it.
        function: The prompt comes as the row has it, plain text or chat messages, the response as text.
    """

    name: str
    function: RewardFunction

    def __call__(self, answers: Answers) -> Tensor:
        columns = further_parameters(self.function)
        found = []
        for prompt, texts in zip(answers.prompts, answers.texts, strict=True):
            if lacking := [name for name in columns if name not in prompt.columns]:
                raise ValueError(
                    f"The reward {self.name!r} takes `{lacking[0]}`, but {prompt.row.place} has no such column; it has "
                    f"{', '.join(sorted(prompt.columns))}. Rename the parameter, or choose columns with `columns`."
                )
            given = {name: prompt.columns[name] for name in columns}
            found += [self._checked(self.function(prompt.text, text, **given)) for text in texts]
        return torch.tensor(found, dtype=torch.float32)

    def to(self, device: torch.device) -> None:
        """A function has no weights."""

    def _checked(self, score: object) -> float:
        if isinstance(score, bool) or not isinstance(score, Real):
            found = f"{score!r} ({type(score).__name__})"
            raise TypeError(f"{self.name!r} returned {found} for a response; it must return a number.")
        return float(score)


class ModelReward:
    """Reward models on the policy's own tokens where the tokenizers agree, else on the text.

    Members whose scale on validation data is known (see `ScoreScale`) are standardised before they are compared, and the result
    is put into their mean unit again: a zero of its own makes no member the worst case, and none uncertain.

    Args:
        models: Sequence classifiers, or implicit rewards; the labels of one and the models of several are members of one
            ensemble.
        tokenizer: Of the reward models; `None` where it is that of the policy.
        how: How the members' scores become one reward.
        coefficient: Weight of the variance in `uwo`.
        batch_size: Most responses of one forward pass.
    """

    def __init__(
        self,
        models: Sequence[PreTrainedModel | ImplicitReward],
        tokenizer: PreTrainedTokenizerBase | None = None,
        *,
        how: How = "mean",
        coefficient: float = 0.5,
        batch_size: int = 64,
    ) -> None:
        self.models = list(models)
        self.tokenizer = tokenizer
        self.how = how
        self.coefficient = coefficient
        self.batch_size = batch_size
        for model in self.models:
            model.train(False)
            model.requires_grad_(False)
        self.scale = _scale_of(self.models)

    @property
    def num_members(self) -> int:
        """Members of the ensemble, over all models."""
        return sum(1 if isinstance(model, ImplicitReward) else model.config.num_labels or 1 for model in self.models)

    def __call__(self, answers: Answers) -> Tensor:
        return self.judged(answers).rewards

    def judged(self, answers: Answers) -> Judged:
        """Rewards of the responses, and the standard deviation between the members where there are several."""
        groups = answers.groups if self.tokenizer is None else _retokenized(self.tokenizer, answers)
        members = torch.cat([self._scores(model, groups) for model in self.models])
        if len(members) == 1:
            return Judged(members[0], None)
        if self.scale is not None:
            mean, std = (values.to(members) for values in self.scale)
            members = standardized_members(members, mean, std) * std.mean() + mean.mean()
        return Judged(ensemble_reward(members, self.how, self.coefficient), ensemble_variance(members).sqrt())

    def to(self, device: torch.device) -> None:
        for model in self.models:
            model.to(device)  # type: ignore[arg-type]  # transformers wraps the method of torch

    def _scores(self, model: PreTrainedModel | ImplicitReward, groups: Sequence[PromptGroup]) -> Tensor:
        """Scores by the members that one model holds, [K, R]."""
        if isinstance(model, PreTrainedModel) and not has_linear_head(model):
            sequences = [[*group.prompt.tolist(), *ids.tolist()] for group in groups for ids in group.responses]
            return sequence_scores(model, sequences, batch_size=self.batch_size)[None].to(model.device)
        with evaluating(model):
            batches = [GroupBatch.from_groups(some).to(model.device) for some in _in_batches(groups, self.batch_size)]
            if isinstance(model, ImplicitReward):
                return torch.cat([model(batch) for batch in batches])[None]
            return torch.cat([response_scores(model, batch).members for batch in batches], dim=1)


def _scale_of(models: Sequence[PreTrainedModel | ImplicitReward]) -> ScoreScale | None:
    """The scales of all members; `None` where that of one is not known."""
    scales = [ScoreScale.recall(model.config) for model in models if isinstance(model, PreTrainedModel)]
    known = [scale for scale in scales if scale is not None]
    if len(known) < len(models):
        return None
    return ScoreScale(torch.cat([scale.mean for scale in known]), torch.cat([scale.std for scale in known]))


@dataclass(frozen=True)
class WeightedSum:
    """A sum of rewards, each with its weight; a term of weight 0 is not computed."""

    terms: Sequence[tuple[float, Reward]]

    def __call__(self, answers: Answers) -> Tensor:
        return self.judged(answers).rewards

    def judged(self, answers: Answers) -> Judged:
        """The sum, and the uncertainty of those terms that have one, taken as independent of each other."""
        found = [(weight, judged(term, answers)) for weight, term in self.terms if weight]
        rewards = torch.stack([weight * own.rewards.float().cpu() for weight, own in found]).sum(0)
        spreads = [weight * own.uncertainty.float().cpu() for weight, own in found if own.uncertainty is not None]
        return Judged(rewards, torch.stack(spreads).square().sum(0).sqrt() if spreads else None)

    def to(self, device: torch.device) -> None:
        for _, term in self.terms:
            term.to(device)


def load_reward(
    spec: RewardSpec,
    tokenization: Tokenization,
    *,
    how: How = "mean",
    coefficient: float = 0.5,
    flaw: Flaw | None = None,
    dtype: Dtype = "float32",
    batch_size: int = 64,
) -> Reward:
    """The reward that is named, see the table above.

    Args:
        spec: Name, list of names, or weights by name.
        tokenization: How prompts and responses of the policy are written, without limits of length.
        how: How the members of an ensemble become one reward.
        coefficient: Weight of the variance in `uwo`.
        flaw: Of `playground:proxy`.
        dtype: Of the weights of reward models.
        batch_size: Most responses of one forward pass of a reward model.
    """
    check_reward(spec)

    def load(names: str | list[str]) -> Reward:
        return _load_term(names, tokenization, how=how, coefficient=coefficient, flaw=flaw, dtype=dtype, batch_size=batch_size)

    if not isinstance(spec, Mapping):
        reward = load(spec)
        terms = [reward]
    else:
        weighted = [(float(weight), load(name)) for name, weight in spec.items() if weight]
        reward = WeightedSum(weighted)
        terms = [term for _, term in weighted]
    if how != "mean" and not any(isinstance(term, ModelReward) and term.num_members > 1 for term in terms):
        names = [spec] if isinstance(spec, str) else list(spec)
        raise ValueError(
            f"`aggregate: {how}` compares the members of an ensemble, but {', '.join(map(repr, names))} "
            f"{'has one' if len(names) == 1 else 'have one each'}. Give a list of reward models or one with several heads, or "
            "leave `aggregate` out."
        )
    return reward


def _load_term(
    spec: str | list[str],
    tokenization: Tokenization,
    *,
    how: How,
    coefficient: float,
    flaw: Flaw | None,
    dtype: Dtype,
    batch_size: int,
) -> Reward:
    """One reward, or one ensemble, of what `load_reward` loads."""
    given = [spec] if isinstance(spec, str) else list(spec)
    names = [member for name in given for member in member_folders(name)]
    functions = [function_named(name, flaw) for name in names]
    if len(functions) == 1 and functions[0] is not None:
        return FunctionReward(names[0], functions[0])
    if not names or any(function is not None for function in functions):
        raise ValueError(
            f"A list of rewards is an ensemble of reward models, folders or hub ids; got {names!r}. To add up other rewards give "
            "their weights: `{name: weight}`."
        )
    tokenizers = [load_tokenizer(name) for name in names]
    keys = [Tokenization(each).digest() for each in tokenizers]
    if len(set(keys)) > 1:
        raise ValueError(f"The reward models {', '.join(names)} have different tokenizers; an ensemble needs one.")
    own = None if keys[0] == tokenization.digest() else tokenizers[0]
    models = [_load_model(name, dtype) for name in names]
    for model, its in zip(models, tokenizers, strict=True):
        check_vocabulary(model.model if isinstance(model, ImplicitReward) else model, its)
    return ModelReward(models, own, how=how, coefficient=coefficient, batch_size=batch_size)


def check_reward(spec: RewardSpec | None) -> None:
    """Raise for weights that no rewards can be added up with."""
    if not isinstance(spec, Mapping):
        return
    for name, weight in spec.items():
        check_range(f"reward: {name}", weight)
    if not any(spec.values()):
        raise ValueError(f"The weighted reward {dict(spec)!r} has no term with a weight other than 0.")


def is_model_reward(spec: RewardSpec) -> bool:
    """Whether a name, or a list of names, stands for reward models and not for functions."""
    names = [spec] if isinstance(spec, str) else list(spec)
    return not any(map(names_function, names))


def _load_model(name: str, dtype: Dtype) -> PreTrainedModel | ImplicitReward:
    if implicit_settings(name) is not None:
        return ImplicitReward(name, dtype=dtype)
    with _explaining(name, trust_remote_code=False):
        config = AutoConfig.from_pretrained(name)
    # Every config has labels, a language model's too; that would get a random head below, and is refused here.
    if config.num_labels == 1 or not is_classifier(name):
        return load_reward_model(name, dtype=dtype)
    return build_reward_model(name, dtype=dtype)


def _in_batches(groups: Sequence[PromptGroup], batch_size: int) -> list[list[PromptGroup]]:
    """Whole groups, at most `batch_size` responses together unless one alone has more."""
    batches: list[list[PromptGroup]] = []
    room = 0
    for group in groups:
        if len(group.responses) > room:
            batches.append([])
            room = batch_size
        batches[-1].append(group)
        room -= len(group.responses)
    return batches


def _retokenized(tokenizer: PreTrainedTokenizerBase, answers: Answers) -> list[PromptGroup]:
    """Prompts and responses in the reward model's own tokens and template; only what ended has an end token."""
    tokenization = Tokenization(tokenizer)
    silent = np.array([tokenizer.eos_token_id], dtype=np.int32)
    found = []
    for prompt, texts, ended in zip(answers.prompts, answers.texts, answers.ended, strict=True):
        as_messages = not isinstance(prompt.text, str)
        # A policy may well say nothing; a row of the data may not.
        spoken = tuple(text for text in texts if text.strip())
        responses = tuple([{"role": "assistant", "content": text}] if as_messages else text for text in spoken)
        if spoken:
            bare = Row(
                place=prompt.row.place,
                prompt=prompt.text,
                responses=responses,
                tools=prompt.row.tools,
                chat_template_kwargs=prompt.row.chat_template_kwargs,
            )
            group = tokenization(bare, prompt.row_id)
            prompt_ids, ids_of = group.prompt, dict(zip(spoken, group.responses, strict=True))
        else:
            prompt_ids, ids_of = tokenization.prompt_ids(prompt.row), {}
        written = [ids_of.get(text, silent) for text in texts]
        cut = [ids if has_ended or len(ids) == 1 else ids[:-1] for ids, has_ended in zip(written, ended, strict=True)]
        found.append(PromptGroup(row_id=prompt.row_id, prompt=prompt_ids, responses=tuple(cut)))
    return found
