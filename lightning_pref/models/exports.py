"""A trained model as a folder that plain transformers (or peft) loads, with the same log-probs."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path

import torch
from peft import PeftModel
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from lightning_pref.models.adapters import plain_state
from lightning_pref.models.folders import replaced_folder
from lightning_pref.models.quantised import dense_state


def export(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: str | Path,
    *,
    merge_adapter: bool = True,
) -> None:
    """Write the model, its generation config, its tokenizer and chat template; an earlier export there is replaced.

    The model itself is not changed, and the folder appears complete or not at all.

    Args:
        model: The trained model, not sharded.
        tokenizer: The tokenizer it was trained with.
        folder: Where to.
        merge_adapter: Write a plain model with the adapter added to its weights, for
            `AutoModelForCausalLM.from_pretrained`; otherwise the adapter alone, for `PeftModel.from_pretrained`.
    """
    if not merge_adapter and not isinstance(model, PeftModel):
        raise ValueError("`merge_adapter=False` writes an adapter alone, but the model has none; leave it `True`.")
    replaces = "config.json" if merge_adapter else "adapter_config.json"
    with replaced_folder(Path(folder), replaces=replaces) as partial:
        if isinstance(model, PeftModel) and not merge_adapter:
            # Embeddings are never resized here, so they are saved only where `modules_to_save` names them.
            model.save_pretrained(str(partial), save_embedding_layers=False)
        else:
            plain_model(model).save_pretrained(partial)
        tokenizer.save_pretrained(partial)


def plain_model(model: PreTrainedModel | PeftModel, *, merged: bool = True) -> PreTrainedModel:
    """A dense model of the plain class around the trained tensors.

    A new object, because `save_pretrained` writes into the configs of the model it is called on.

    Args:
        model: Plain or adapted; it is not changed.
        merged: With its adapter added to the weights; else as it was before it had one.
    """
    if isinstance(model, PeftModel):
        base, state = model.get_base_model(), plain_state(model, merged=merged, dense=True)
    else:
        base, state = model, dense_state(model)
    if not isinstance(base, PreTrainedModel):
        raise TypeError(f"Expected a transformers model, got {type(base).__name__}.")
    plain = _empty_like(base, tied=True)
    if not _ties_hold(plain, state):
        # The adapter changed the head and not the embedding, or the other way round: they are two weights now.
        plain = _empty_like(base, tied=False)
    plain.load_state_dict(state, assign=True)
    # On its way from a GPU a tied weight became two tensors.
    plain.tie_weights()
    if base.can_generate():
        plain.generation_config = _valid_generation(base.generation_config)
    return plain


def _empty_like(model: PreTrainedModel, *, tied: bool) -> PreTrainedModel:
    config = copy.deepcopy(model.config)
    config.tie_word_embeddings = config.tie_word_embeddings and tied
    if hasattr(config, "quantization_config"):  # what was in 4 bit is dense now
        del config.quantization_config
    with torch.device("meta"):
        return type(model)(config)


def _ties_hold(plain: PreTrainedModel, state: dict[str, Tensor]) -> bool:
    """Whether all names of one tied parameter still have equal tensors."""
    first: dict[int, str] = {}
    names = ((name, first.setdefault(id(weight), name)) for name, weight in plain.named_parameters(remove_duplicate=False))
    return all(torch.equal(state[name], state[other]) for name, other in names if name != other)


def _valid_generation(config: GenerationConfig | None) -> GenerationConfig:
    """A copy that transformers agrees to save: sampling numbers without `do_sample` get it."""
    valid = copy.deepcopy(config) if config is not None else GenerationConfig()  # type: ignore[no-untyped-call]
    try:
        valid.validate(strict=True)
    except ValueError:
        valid.do_sample = True
        warnings.warn(
            "The generation config sets sampling options (temperature, top_p, ...) but not `do_sample`; the exported one "
            "has `do_sample: true`, because transformers refuses to save the contradiction.",
            stacklevel=2,
        )
    return valid
