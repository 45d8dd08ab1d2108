"""Reward models: a language model's backbone with a scalar head, read at the last token of a response in every layout."""

from __future__ import annotations

import copy
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Self
from weakref import WeakSet

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForSequenceClassification, PreTrainedConfig, PreTrainedModel

from lightning_pref.data.groups import GroupBatch
from lightning_pref.losses.ensemble import How, ensemble_reward, ensemble_variance, standardized_members
from lightning_pref.losses.reward import process_values
from lightning_pref.models.attention import slot_states
from lightning_pref.models.backbones import (
    AttentionImplementation,
    Dtype,
    _explaining,
    _resolved,
    evaluating,
    load_model,
)
from lightning_pref.models.forward import Layout, place_batch, response_logps
from lightning_pref.models.heads import causal_lm_of, head_of
from lightning_pref.models.layouts import PlacedLayout, plan_layout
from lightning_pref.models.parity import HEAD_TOLERANCE, TF32_TOLERANCE, verified_head
from lightning_pref.models.presets import is_preset
from lightning_pref.models.reward_heads import LinearRewardHead, RewardHead, ScoreHead
from lightning_pref.models.sharding import is_split, within_forward

ScoreQuantity = Literal["tokens", "hidden"]
SCORE_QUANTITIES: tuple[ScoreQuantity, ...] = ("tokens", "hidden")
CLASSIFIER = "ForSequenceClassification"

# Classifiers whose own scores were once compared with ours.
_verified: WeakSet[PreTrainedModel] = WeakSet()


@dataclass(frozen=True)
class ResponseScores:
    """Scores of the R responses of a batch by the K members of a reward model; K is 1 unless it is an ensemble."""

    members: Tensor  # [K, R] float32, read at the last token of each response
    lengths: Tensor  # [R] response tokens
    response: Tensor  # [N] index of the response each response token belongs to
    token_members: Tensor | None  # [K, N] float32, read at every response token: the value of the prefix that ends there
    hidden: Tensor | None  # [R, D] hidden state, after the final norm, at the last token of each response
    layout: PlacedLayout  # the layout that was used

    def rewards(self, how: How = "mean", *, coefficient: float = 0.5, scale: ScoreScale | None = None) -> Tensor:
        """One reward per response, [R]; see `losses.ensemble_reward`.

        Args:
            how: How the members' scores become one.
            coefficient: Weight of the variance in `uwo`.
            scale: Standardise the members by this first. Without it the worst case is that of the member with the lowest offset.
        """
        if scale is None:
            return ensemble_reward(self.members, how, coefficient)
        mean, std = (values.to(self.members) for values in scale)
        return ensemble_reward(standardized_members(self.members, mean, std), how, coefficient)

    @property
    def uncertainty(self) -> Tensor:
        """Standard deviation over the members, [R]; 0 where there is one."""
        return ensemble_variance(self.members).sqrt()


class ScoreScale(NamedTuple):
    """Where the scores of each member lie on answers it was validated on: what `losses.standardized_members` wants to know."""

    mean: Tensor  # [K]
    std: Tensor  # [K], positive

    def remember(self, config: PreTrainedConfig) -> None:
        """Write it into the config of a reward model, which takes it along into an export."""
        config.score_mean, config.score_std = self.mean.tolist(), self.std.tolist()

    @classmethod
    def recall(cls, config: PreTrainedConfig) -> Self | None:
        """Read it from the config of a reward model; `None` where nobody wrote it."""
        mean, std = getattr(config, "score_mean", None), getattr(config, "score_std", None)
        if mean is None or std is None:
            return None
        return cls(torch.tensor(mean, dtype=torch.float32), torch.tensor(std, dtype=torch.float32))

    @staticmethod
    def forget(config: PreTrainedConfig) -> None:
        """Take it out of the config of a reward model that it describes no longer."""
        for name in ("score_mean", "score_std"):
            if hasattr(config, name):
                delattr(config, name)


def response_scores(
    model: PreTrainedModel | PeftModel,
    batch: GroupBatch,
    *,
    layout: Layout = "auto",
    want: Collection[ScoreQuantity] = (),
    head: ScoreHead | None = None,
) -> ResponseScores:
    """Score every response at its last token, whatever the padding, the token ids or the rest of the batch.

    The first call with a sequence classifier also checks, on a few tokens, that transformers' own scores are the same.

    Args:
        model: A reward model, plain or with peft adapters; modes and autocast are as the caller has set them.
        batch: Groups, on the model's device.
        layout: How the batch goes through the backbone; `auto` takes the cheapest that the model can take.
        want: Further quantities to return: `tokens` the scores at every response token, `hidden` the states.
        head: How hidden states are scored; by the model's own linear head if not given.

    Raises:
        ValueError: If the model or the wish is not supported; the message says what is.
    """
    if unknown := sorted(set(want) - set(SCORE_QUANTITIES)):
        raise ValueError(f"Unknown quantity {unknown[0]!r} in `want`; known: {', '.join(SCORE_QUANTITIES)}.")
    head = head if head is not None else LinearRewardHead()
    if isinstance(head, LinearRewardHead):
        _verify(model)
    elif is_split(model):
        # The comparison runs the model itself, which its forward pass below cannot.
        verified_head(model, head_of(model))
    by_last, by_token, hidden, response, placed = within_forward(model, lambda: _scored(model, batch, layout, want, head))
    return ResponseScores(
        members=by_last.T,
        lengths=batch.response_lengths,
        response=response,
        token_members=None if by_token is None else by_token.T,
        hidden=hidden if "hidden" in want else None,
        layout=placed,
    )


def _scored(
    model: PreTrainedModel | PeftModel, batch: GroupBatch, layout: Layout, want: Collection[ScoreQuantity], head: ScoreHead
) -> tuple[Tensor, Tensor | None, Tensor, Tensor, PlacedLayout]:
    """Scores at last tokens and at all, states at last tokens, the response of each token, and the layout that was used."""
    trunk = head.trunk(model)
    placed = place_batch(trunk, batch, layout, name=type(causal_lm_of(model)).__name__)
    plan = plan_layout(batch, placed).to(batch.input_ids.device)
    states = slot_states(trunk, batch, plan)
    last = last_tokens(batch)
    hidden = states.index_select(0, plan.place[last])
    by_token = head.scores(model, states.index_select(0, plan.place)) if "tokens" in want else None
    by_last = head.scores(model, hidden) if by_token is None else by_token[last]
    return by_last, by_token, hidden, batch.response[plan.predicted], placed


def last_tokens(batch: GroupBatch) -> Tensor:
    """Place of each response's last token among the N response tokens of a batch, [R]."""
    return batch.response_lengths.cumsum(0) - 1


def step_labels(batch: GroupBatch) -> Tensor:
    """Label of each of the N response tokens, [N]: 0 or 1 on the last token of a step, negative elsewhere.

    Raises:
        ValueError: If the batch has no step marks.
    """
    if batch.step_labels is None:
        raise ValueError(
            "The rows have no step marks. Steps are scored on stepwise rows: `prompt`, `completions` (one text per step) and "
            "`labels` (true or false for each)."
        )
    return batch.step_labels[batch.response >= 0]


def implicit_process_values(
    model: PreTrainedModel | PeftModel, batch: GroupBatch, ref_token_logps: Tensor, *, beta: float, layout: Layout = "auto"
) -> Tensor:
    """Value of each prefix under an implicit reward (arXiv 2412.01981), [N] float32; `losses.step_rewards` cuts it into steps.

    Args:
        model: The causal language model that was trained.
        batch: Groups, on the model's device.
        ref_token_logps: Log-probability of each response token under its reference, [N], nats.
        beta: The one it was trained with.
        layout: How the batch goes through the backbone.
    """
    out = response_logps(model, batch, layout=layout)
    return process_values(out.token_logps, ref_token_logps, out.response, beta=beta)


def build_reward_model(
    model: str | PreTrainedModel,
    *,
    num_members: int | None = None,
    head_seed: int = 0,
    dtype: Dtype = "float32",
    attn_implementation: AttentionImplementation | None = None,
    trust_remote_code: bool = False,
    revision: str | None = None,
    seed: int = 0,
) -> PreTrainedModel:
    """A sequence classifier of transformers whose labels are the members of a reward model, in training mode.

    A checkpoint of a sequence classifier keeps its head, a language model gets a fresh one. The head is in float32 whatever
    the backbone. A checkpoint that is loaded in half precision has its head rounded to that once.

    Args:
        model: A folder written by `save_pretrained`, a hub id, a preset such as `playground:tiny`, or a model object, which is
            taken over.
        num_members: Heads on the one backbone; those of the checkpoint, and 1 for a fresh head, if not given.
        head_seed: Of the weights of a fresh head.
        dtype: Of the backbone's weights, where the model is given by name.
        attn_implementation: Of transformers; its own choice if not given.
        trust_remote_code: Run Python code that comes with the checkpoint.
        revision: Branch, tag or commit on the hub.
        seed: Of the random weights of a preset.
    """
    if num_members is not None and num_members < 1:
        raise ValueError(f"`num_members` must be at least 1, got {num_members!r}.")
    loaded = model
    if isinstance(loaded, str):
        if is_classifier(loaded, trust_remote_code=trust_remote_code, revision=revision):
            loaded = _load_classifier(loaded, dtype, attn_implementation, trust_remote_code, revision)
        else:
            loaded = load_model(
                loaded,
                dtype=dtype,
                attn_implementation=attn_implementation,
                trust_remote_code=trust_remote_code,
                revision=revision,
                seed=seed,
            )
    name = model if isinstance(model, str) else type(model).__name__
    built = _with_own_head(loaded, num_members, name) if has_linear_head(loaded) else _with_head(loaded, num_members, head_seed)
    built.train()
    return built


def _with_own_head(model: PreTrainedModel, num_members: int | None, name: str) -> PreTrainedModel:
    head = model.score
    assert isinstance(head, nn.Linear)
    found = head.weight.shape[0]
    if num_members is not None and num_members != found:
        raise ValueError(
            f"The reward model {name!r} has {found} head{'s' if found > 1 else ''}, but `num_members` is {num_members}. Leave "
            "`num_members` out to go on with those it has, or start from a language model."
        )
    bias: Tensor | None = head.bias  # typed as if it were always there
    model.score = RewardHead.around(head.weight, bias)
    return model


def _with_head(model: PreTrainedModel, num_members: int | None, seed: int) -> PreTrainedModel:
    """A classifier around the backbone of a language model, the object itself, with a fresh head."""
    causal_lm = causal_lm_of(model)
    config = copy.deepcopy(causal_lm.config)
    name_members(config, num_members or 1)
    try:
        with torch.device("meta"):
            classifier = AutoModelForSequenceClassification.from_config(config)  # type: ignore[no-untyped-call]
    except ValueError as error:
        raise ValueError(
            f"transformers has no sequence classifier for {type(causal_lm).__name__}, so no other program could load a reward "
            "model of it. Use a model that has one, such as Llama, Qwen, Gemma or Mistral, or the head 'implicit'."
        ) from error
    assert isinstance(classifier, PreTrainedModel)
    trunk = causal_lm.base_model
    if type(classifier.base_model) is not type(trunk) or not has_linear_head(classifier):
        raise ValueError(
            f"A {type(classifier).__name__} scores with more than a linear head `score` on a {type(trunk).__name__}; that is not "
            "supported. Use the head 'implicit', or another architecture."
        )
    setattr(classifier, classifier.base_model_prefix, trunk)
    classifier.score = RewardHead.fresh(_width(classifier), num_members or 1, seed=seed).to(causal_lm.device)
    return classifier


def name_members(config: PreTrainedConfig, num_members: int) -> None:
    """Write the number of members into a config, as the labels of a classifier."""
    names = ["reward"] if num_members == 1 else [f"member_{k}" for k in range(num_members)]
    config.id2label = dict(enumerate(names))
    config.label2id = {name: k for k, name in enumerate(names)}


def _width(classifier: PreTrainedModel) -> int:
    """Size of the states that the head reads; of few models not the hidden size."""
    head = classifier.score
    assert isinstance(head, nn.Linear)
    return head.in_features


def has_linear_head(model: PreTrainedModel) -> bool:
    """Whether a linear head named `score` reads the states of single tokens, as in all decoders of transformers."""
    return isinstance(getattr(model, "score", None), nn.Linear) and model.base_model is not model


def is_classifier(name: str, *, trust_remote_code: bool = False, revision: str | None = None) -> bool:
    """Whether a folder or hub id holds a sequence classifier, such as a reward model, and no language model."""
    if is_preset(name):
        return False
    place = _resolved(name, wanted=("config.json",))
    with _explaining(place, trust_remote_code):
        config = AutoConfig.from_pretrained(place, trust_remote_code=trust_remote_code, revision=revision)
    return any(kind.endswith(CLASSIFIER) for kind in config.architectures or [])


def _load_classifier(
    name: str, dtype: Dtype, attention: AttentionImplementation | None, trust_remote_code: bool, revision: str | None
) -> PreTrainedModel:
    place = _resolved(name, wanted=("config.json",))
    with _explaining(place, trust_remote_code):
        # Any: with `output_loading_info` the untyped auto class returns a pair.
        loaded: Any = AutoModelForSequenceClassification.from_pretrained(
            place,
            dtype=dtype,
            attn_implementation=attention,
            trust_remote_code=trust_remote_code,
            revision=revision,
            output_loading_info=True,
        )
    model, report = loaded
    assert isinstance(model, PreTrainedModel)
    if report["missing_keys"] or not has_linear_head(model):
        missing = sorted(report["missing_keys"])
        lacks = f"it lacks {missing[0]!r}" if missing else "its head is not a linear `score`"
        raise ValueError(
            f"The checkpoint {name!r} is a {type(model).__name__} that cannot be trained here: {lacks}. Give a reward model with "
            "a linear head called `score`, or a language model, which gets one."
        )
    return model


@torch.no_grad()
def _verify(model: PreTrainedModel | PeftModel) -> None:
    """Compare the classifier's own score of a few tokens with ours, once per model object."""
    classifier = causal_lm_of(model)
    if classifier in _verified:
        return
    head = LinearRewardHead()
    trunk = head.trunk(model)
    padding = classifier.config.get_text_config().pad_token_id
    vocabulary = trunk.config.get_text_config().vocab_size
    # Without the padding id, which transformers would take for the end of the row.
    ids = torch.tensor([[i for i in range(5) if i != padding]], device=trunk.device) % vocabulary
    with evaluating(classifier), torch.autocast(trunk.device.type, enabled=False):
        own = classifier(input_ids=ids, use_cache=False).logits.float()
        ours = within_forward(model, lambda: head.scores(model, trunk(input_ids=ids, use_cache=False)[0][:, -1])).float()
    allowed = HEAD_TOLERANCE.get(trunk.dtype, HEAD_TOLERANCE[torch.bfloat16])
    allowed = allowed if torch.get_float32_matmul_precision() == "highest" else max(allowed, TF32_TOLERANCE)
    deviation = float("inf") if own.shape != ours.shape else float((own - ours).abs().max() / own.abs().max().clamp_min(1e-30))
    if not deviation <= allowed:
        raise ValueError(
            f"The scores of {type(classifier).__name__} are not those of its head at the last token: on {ids.shape[1]} tokens "
            f"they differ by {deviation:.2g} of the largest, where rounding explains {allowed:.0e}. It does something else to "
            "its states or its scores, which would be lost here. Use another architecture."
        )
    _verified.add(classifier)
