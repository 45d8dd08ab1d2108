"""A trained reward model as a folder that plain `AutoModelForSequenceClassification` loads, with the same scores.

transformers reads a score at the last token that is not the padding token. Where padding and EOS are one token, as in many
tokenizers, it would read the token before the EOS; so the exported tokenizer and config get a padding token of its own.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Literal

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from lightning_pref.models.exports import export, plain_model
from lightning_pref.models.folders import replaced_folder
from lightning_pref.models.heads import causal_lm_of, head_of
from lightning_pref.models.reward_heads import RewardHead, VerbalizerRewardHead
from lightning_pref.models.reward_members import active_member, member_names
from lightning_pref.models.reward_models import ScoreScale, build_reward_model, name_members

PADDING = "<|pad|>"

Member = int | Literal["all", "mean"]


def export_reward_model(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: str | Path,
    *,
    merge_adapter: bool = True,
    member: Member = "all",
    verbalizer: VerbalizerRewardHead | None = None,
    final_ids: Tensor | None = None,
) -> None:
    """Write the reward model and its tokenizer; an earlier export there is replaced, the model itself is not changed.

    Args:
        model: The trained model, not sharded.
        tokenizer: The tokenizer it was trained with.
        folder: Where to.
        merge_adapter: Write a plain model with the adapter added to its weights; otherwise the adapter with its head alone,
            for `PeftModel.from_pretrained`.
        member: Of an ensemble of heads: `all` writes every head, one label each; `mean` one head that gives exactly their mean
            score; a number that head alone. Programs that want `num_labels=1` take the latter two. Of adapters `all` writes a
            folder for each, `member_0` and so on, which `load_reward` takes for one ensemble; a number that member alone.
        verbalizer: The head of a language model that scores by two words; it becomes a linear head.
        final_ids: Which token ids were seen to end responses, [V] bool; a padding token among them is replaced.
    """
    if isinstance(model, PeftModel) and (names := member_names(model)):
        _export_members(model, tokenizer, Path(folder), names, merge_adapter=merge_adapter, member=member, final_ids=final_ids)
        return
    if not merge_adapter:
        if member != "all":
            raise ValueError(f"An adapter alone is written with all its heads; `member={member!r}` needs `merge_adapter=True`.")
        export(model, tokenizer, folder, merge_adapter=False)
        return
    num_members = 1 if verbalizer is not None else int(causal_lm_of(model).config.num_labels or 1)
    if isinstance(member, int) and not 0 <= member < num_members:
        raise ValueError(f"`member` must be below the number of heads, {num_members}, got {member!r}.")
    plain = plain_model(model)
    if verbalizer is not None:
        plain = _as_classifier(plain, verbalizer)
    if member != "all":
        head = plain.score
        assert isinstance(head, nn.Linear)
        bias: Tensor | None = head.bias  # typed as if it were always there
        plain.score = RewardHead.around(_one(head.weight, member), None if bias is None else _one(bias, member))
        name_members(plain.config, 1)
        _keep_scale(plain.config, member)
    _write(plain, tokenizer, Path(folder), final_ids)


def _write(plain: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path, final_ids: Tensor | None) -> None:
    tokenizer = copy.deepcopy(tokenizer)
    _set_padding(plain, tokenizer, final_ids)
    with replaced_folder(folder, replaces="config.json") as partial:
        plain.save_pretrained(partial)
        tokenizer.save_pretrained(partial)


def _export_members(
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    names: list[str],
    *,
    merge_adapter: bool,
    member: Member,
    final_ids: Tensor | None,
) -> None:
    """Members that are adapters: one classifier cannot hold them, so each gets a folder of its own, plain like any other."""
    if member == "mean":
        raise ValueError(
            "The mean of adapters is no single model: their scores are not linear in their weights. Export `member='all'`, a "
            "folder for each, or one of them by its number."
        )
    if isinstance(member, int) and not 0 <= member < len(names):
        raise ValueError(f"`member` must be below the number of members, {len(names)}, got {member!r}.")
    if not merge_adapter:
        if member != "all":
            raise ValueError(f"Adapters alone are written together; `member={member!r}` needs `merge_adapter=True`.")
        with replaced_folder(folder, replaces=names[0]) as partial:
            model.save_pretrained(str(partial), save_embedding_layers=False)
            tokenizer.save_pretrained(partial)
        return

    def write_member(number: int, place: Path) -> None:
        with active_member(model, names[number]):
            plain = plain_model(model)
        _keep_scale(plain.config, number)
        _write(plain, tokenizer, place, final_ids)

    if isinstance(member, int):
        write_member(member, folder)
        return
    with replaced_folder(folder, replaces=names[0]) as partial:
        for number, name in enumerate(names):
            write_member(number, partial / name)


def _keep_scale(config: PreTrainedConfig, member: int | Literal["mean"]) -> None:
    """The scale of the member that is left; how far a mean spreads does not follow from its members."""
    scale = ScoreScale.recall(config)
    if scale is not None and member != "mean":
        ScoreScale(scale.mean[member : member + 1], scale.std[member : member + 1]).remember(config)
    else:
        ScoreScale.forget(config)


def _one(weights: Tensor, member: int | Literal["mean"]) -> Tensor:
    """One head of several, [K, ...] -> [1, ...]; scores are linear in the head, so the mean head gives the mean score."""
    return weights.mean(0, keepdim=True) if member == "mean" else weights[member : member + 1]


def _as_classifier(plain: PreTrainedModel, verbalizer: VerbalizerRewardHead) -> PreTrainedModel:
    """A classifier whose head is the difference of the two words' rows."""
    rows = verbalizer.rows(head_of(plain))
    if rows.softcap is not None:
        raise ValueError(
            f"The logits of {type(plain).__name__} are soft-capped, so the difference of two is no linear score and cannot be "
            "exported as a sequence classifier. Use the head 'linear'."
        )
    weight = rows.scale * (rows.weight[:1].float() - rows.weight[1:].float())
    bias = None if rows.bias is None else rows.scale * (rows.bias[:1].float() - rows.bias[1:].float())
    if bias is not None and bool(bias.any()):
        raise ValueError(
            f"The head of {type(plain).__name__} has a bias, which a sequence classifier's has not: its scores would differ by a "
            "constant. Use the head 'linear'."
        )
    classifier = build_reward_model(plain)
    classifier.score = RewardHead.around(weight, None)
    return classifier


def _set_padding(plain: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, final_ids: Tensor | None) -> None:
    """Give tokenizer and config a padding token that ends no response; if need be a new one, with an embedding of zeros."""

    def ends_responses(token: int) -> bool:
        seen = final_ids is not None and token < len(final_ids) and bool(final_ids[token])
        return seen or token == tokenizer.eos_token_id

    if tokenizer.pad_token_id is None or ends_responses(int(tokenizer.pad_token_id)):
        name, vocabulary = PADDING, tokenizer.get_vocab()
        while name in vocabulary and ends_responses(vocabulary[name]):
            name = f"<{name}>"
        tokenizer.add_special_tokens({"pad_token": name})
    padding = int(tokenizer.pad_token_id)
    plain.config.get_text_config().pad_token_id = plain.config.pad_token_id = padding
    embedding = plain.get_input_embeddings()
    weight = embedding.weight
    assert isinstance(weight, Tensor)
    if padding >= weight.shape[0]:
        missing = weight.new_zeros(padding + 1 - weight.shape[0], weight.shape[1])
        embedding.weight = nn.Parameter(torch.cat([weight.detach(), missing]))
        plain.config.get_text_config().vocab_size = padding + 1
