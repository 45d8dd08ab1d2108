"""Causal language models and their tokenizers: loaded from a folder, the hub or a preset, and made ready for training."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from lightning_pref.data.playground_tokenizer import playground_tokenizer
from lightning_pref.models.full_precision import keeping_tables
from lightning_pref.models.presets import build_preset, is_preset
from lightning_pref.models.quantised import (
    QuantizationSettings,
    check_saved_quantization,
    made_exact,
    quantization_config,
    quantize,
)

Dtype = Literal["auto", "float32", "bfloat16", "float16"]
AttentionImplementation = Literal["eager", "sdpa", "flash_attention_2", "flex_attention"]

# One of these is in every folder that a tokenizer was saved to.
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")

# Of what a library says about a model that it cannot load.
SHOWN_CHARACTERS = 300

# Heads that a checkpoint of the right family may have been saved with instead.
OTHER_HEADS = ("ForSequenceClassification", "ForTokenClassification", "ForMaskedLM", "ForQuestionAnswering")

DROPOUT_MODULES = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)


def load_model(
    name_or_path: str,
    *,
    dtype: Dtype = "float32",
    attn_implementation: AttentionImplementation | None = None,
    trust_remote_code: bool = False,
    revision: str | None = None,
    seed: int = 0,
    quantization: QuantizationSettings | None = None,
) -> PreTrainedModel:
    """Load a causal language model, in training mode.

    Lightning keeps the mode it finds, and `from_pretrained` leaves eval mode, in which transformers skips gradient
    checkpointing without a word; so the mode is set here.

    Args:
        name_or_path: A folder written by `save_pretrained`, a hub id, or a preset such as `playground:tiny`.
        dtype: Of the weights. Half-precision weights lose small updates; `float32` with the Trainer's `bf16-mixed`
            precision does not. `auto` takes what the checkpoint was saved in.
        attn_implementation: Of transformers; its own choice if not given.
        trust_remote_code: Run Python code that comes with the checkpoint.
        revision: Branch, tag or commit on the hub.
        seed: Of the random weights of a preset; a checkpoint has none.
        quantization: Keep linear layers in 4 bit; only an adapter can be trained then.
    """
    if is_preset(name_or_path):
        model = _build_preset(name_or_path, dtype, attn_implementation, seed)
        if quantization is not None:
            quantize(model, quantization)
        model.train()
        return model
    place = _resolved(name_or_path, wanted=("config.json",))
    with _explaining(place, trust_remote_code):
        config = AutoConfig.from_pretrained(place, trust_remote_code=trust_remote_code, revision=revision)
    _check_causal(config, name_or_path)
    check_saved_quantization(config, quantization, name_or_path)
    # Not `None` where none is wished: a checkpoint that was saved in 4 bit says so itself.
    quantized = {} if quantization is None else {"quantization_config": quantization_config(quantization)}
    with _explaining(place, trust_remote_code):
        # Any: with `output_loading_info` the untyped auto class returns a pair.
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            place,
            config=config,
            dtype=dtype,
            attn_implementation=attn_implementation,
            trust_remote_code=trust_remote_code,
            revision=revision,
            output_loading_info=True,
            **quantized,
        )
    model, report = loaded
    assert isinstance(model, PreTrainedModel)
    if report["missing_keys"]:
        missing = sorted(report["missing_keys"])
        raise ValueError(
            f"The checkpoint {name_or_path!r} lacks {len(missing)} weights of a {type(model).__name__}, among them "
            f"{missing[0]!r}; they would start random. It was probably saved from another kind of model (a classifier, a "
            "reward model, a bare backbone). Give a checkpoint of a causal language model."
        )
    made_exact(model, quantization)
    model.train()
    return model


def load_tokenizer(name_or_path: str, *, trust_remote_code: bool = False, revision: str | None = None) -> PreTrainedTokenizerBase:
    """Load the tokenizer that belongs to `load_model(name_or_path)`.

    Nothing is added to it: a missing pad token is no obstacle, because all masks here come from lengths, and a new token
    would need a new embedding row.
    """
    if is_preset(name_or_path):
        return playground_tokenizer()
    place = _resolved(name_or_path, wanted=TOKENIZER_FILES)
    with _explaining(place, trust_remote_code):
        tokenizer = AutoTokenizer.from_pretrained(place, trust_remote_code=trust_remote_code, revision=revision)
    return tokenizer


def check_vocabulary(model: PreTrainedModel | PeftModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise if the tokenizer can produce an id for which the model has no embedding row.

    More rows than tokens are normal (tables are padded to a multiple of 64) and count in every log-softmax.
    """
    embeddings = model.get_input_embeddings()
    assert isinstance(embeddings.weight, Tensor)
    rows = embeddings.weight.shape[0]
    largest = max(tokenizer.get_vocab().values())
    if largest >= rows:
        raise ValueError(
            f"The tokenizer's largest token id is {largest}, but the model has only {rows} embedding rows. They do not "
            "belong together, or tokens were added after the model was saved. Give the model's own tokenizer, or call "
            "`model.resize_token_embeddings(len(tokenizer))` and save the model again; it is never resized here."
        )


def disable_dropout(model: nn.Module) -> None:
    """Set every dropout rate of the model to 0, in its modules, their attributes and its config.

    A preference loss compares the policy's log-probs with the reference's. Dropout in the policy alone would add noise
    of the size of the early margins, and step 0 would not start from the reference. The dropout of LoRA layers is kept:
    it is asked for by name in `LoraSettings`.
    """
    for name, module in model.named_modules():
        if "lora_dropout" in name.split("."):
            continue
        if isinstance(module, DROPOUT_MODULES):
            module.p = 0.0
        # Attention modules hand their rate to a kernel as a number, some read it from the config in every forward.
        holders = [module, module.config] if isinstance(module, PreTrainedModel) else [module]
        for holder in holders:
            for key in _dropout_rates(holder):
                setattr(holder, key, 0.0)


def enable_gradient_checkpointing(model: PreTrainedModel | PeftModel) -> None:
    """Recompute each layer in the backward pass instead of keeping its activations.

    The non-reentrant form, so that frozen inputs (LoRA) and hooks of DDP and FSDP work. It acts in training mode only.
    """
    base: Any = model.get_base_model() if isinstance(model, PeftModel) else model  # Any: a method was renamed, see below
    if not base.supports_gradient_checkpointing:
        raise ValueError(
            f"{type(base).__name__} does not support gradient checkpointing in transformers. Turn it off, and lower the "
            "token budget if memory runs short."
        )
    kwargs = {"use_reentrant": False}
    if hasattr(base, "activation_checkpointing_enable"):  # its name since transformers 5.20
        base.activation_checkpointing_enable(activation_checkpointing_kwargs=kwargs)
    else:
        base.gradient_checkpointing_enable(gradient_checkpointing_kwargs=kwargs)


def given_tokenizer(tokenizer: str | PreTrainedTokenizerBase | None) -> PreTrainedTokenizerBase:
    """The tokenizer of a setting that is a name or the object itself."""
    if tokenizer is None:
        raise ValueError("`tokenizer` is not set; give the folder or hub id of the model, or the tokenizer itself.")
    return load_tokenizer(tokenizer) if isinstance(tokenizer, str) else tokenizer


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode without gradients inside, the mode of every single module as it was afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, training in modes:
            module.training = training


def _build_preset(name: str, dtype: Dtype, attention: AttentionImplementation | None, seed: int) -> PreTrainedModel:
    model = build_preset(name, load_tokenizer(name), seed)
    if attention is not None:
        model.set_attn_implementation(attention)
    if dtype != "auto":
        with keeping_tables(model):
            model.to(getattr(torch, dtype))
    return model


def _dropout_rates(holder: object) -> list[str]:
    """Attributes that hold a rate above 0: `attention_dropout`, `attn_pdrop`, `hidden_dropout_prob`, `layerdrop`, ..."""
    return [key for key, value in vars(holder).items() if isinstance(value, float) and value > 0 and "drop" in key]


def _resolved(name_or_path: str, *, wanted: tuple[str, ...]) -> str:
    """The folder or hub id to load from; raises unless it is a folder with a wanted file, or can be a hub id."""
    path = Path(name_or_path).expanduser()
    if not path.exists():
        if path.is_absolute() or name_or_path.startswith(".") or name_or_path.count("/") > 1:
            raise FileNotFoundError(
                f"There is no folder {name_or_path!r} (looked at {path.resolve()}). Give a folder written by "
                "`save_pretrained`, a hub id such as 'Qwen/Qwen3-0.6B', or 'playground:tiny'."
            )
        return name_or_path
    if not path.is_dir():
        raise NotADirectoryError(f"{name_or_path!r} is a file; give the folder that `save_pretrained` wrote it to.")
    found = sorted(entry.name for entry in path.iterdir())
    if any(name in found for name in wanted):
        return str(path)
    if "adapter_config.json" in found:
        raise ValueError(
            f"The folder {name_or_path!r} holds a PEFT adapter without its base model. Merge it first: "
            "`AutoPeftModelForCausalLM.from_pretrained(folder).merge_and_unload().save_pretrained(new_folder)`."
        )
    listing = ", ".join(found[:8]) + (", ..." if len(found) > 8 else "") if found else "nothing"
    expected = " or ".join(repr(name) for name in wanted[:3])
    raise FileNotFoundError(
        f"The folder {name_or_path!r} holds {listing}; expected {expected}, as `save_pretrained` writes it. Give the "
        "folder of the model itself: of a run folder that is its 'export' sub-folder, not 'checkpoints'."
    )


def _check_causal(config: PreTrainedConfig, name: str) -> None:
    """Raise unless the checkpoint was saved from a decoder-only language model."""
    architectures = config.architectures or []
    known = type(config) in MODEL_FOR_CAUSAL_LM_MAPPING or "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {})
    both_sides = getattr(config, "is_encoder_decoder", False)
    if known and not both_sides and not any(kind.endswith(OTHER_HEADS) for kind in architectures):
        return
    kind = "an encoder-decoder" if both_sides else f"a {config.model_type!r} model"
    saved = f", saved as {', '.join(architectures)}" if architectures else ""
    raise ValueError(
        f"The checkpoint {name!r} is {kind}{saved}; that is no causal language model. Preference training needs one model "
        "that reads the prompt and writes the response, such as Llama, Qwen, Gemma, Mistral, GPT-2 or Phi."
    )


@contextmanager
def _explaining(place: str, trust_remote_code: bool) -> Iterator[None]:
    """Errors of the libraries that read a model's files, with what to do about them."""
    try:
        yield
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # a damaged file ends in any of them: safetensors', tokenizers', a KeyError, ...
        text = str(error)
        if "trust_remote_code" in text and not trust_remote_code:
            raise ValueError(
                f"{place!r} comes with Python code of its own, which would run on this machine. Read it, and if you trust "
                "it set `trust_remote_code: true` (with a fixed `revision`)."
            ) from error
        if isinstance(error, OSError) and not Path(place).exists():
            raise OSError(
                f"{place!r} is not a folder here, not in the local cache, and could not be fetched from the hub. Check the "
                "spelling and the network (a gated model needs `hf auth login`). Offline: on a machine with network run "
                f"`hf download {place} --local-dir FOLDER`, copy the folder, and give its path."
            ) from error
        if isinstance(error, RuntimeError) and "ignore_mismatched_sizes" in text:
            text = "weights of other sizes than `config.json` says"
        said = " ".join(text.split()) or "no reason given"
        finding = f"{type(error).__name__}: {said}" if isinstance(error, LookupError | AttributeError | TypeError) else said
        shown = finding if len(finding) <= SHOWN_CHARACTERS else f"{finding[:SHOWN_CHARACTERS]}..."
        raise ValueError(
            f"Could not load {place!r}: {shown} If a file of it is damaged or missing, save or download the model again."
        ) from error
