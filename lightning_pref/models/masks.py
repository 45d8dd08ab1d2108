"""Who may attend to whom, said by positions and branches instead of places in a row."""

from collections.abc import Mapping

import torch
from torch import Tensor
from transformers import PreTrainedConfig

# The layer types whose attention is a rule about two positions. Whatever else a config lists in `layer_types`
# (linear attention, convolutions, sparse indexers) depends on more than that.
POSITIONAL_LAYER_TYPES = ("full_attention", "sliding_attention", "chunked_attention")


def attention_spans(config: PreTrainedConfig) -> dict[str, int | None]:
    """Each kind of layer in a model with its window or chunk in tokens, `None` where attention reaches back to the start.

    Configs without `layer_types` have one kind of layer, and it slides if they name a window.
    """
    text_config = config.get_text_config()
    window = getattr(text_config, "sliding_window", None)
    chunk = getattr(text_config, "attention_chunk_size", None)
    layer_types = getattr(text_config, "layer_types", None)
    if layer_types is None:
        only = "sliding_attention" if window is not None else "chunked_attention" if chunk is not None else "full_attention"
        layer_types = [only]
    spans = {"full_attention": None, "sliding_attention": window, "chunked_attention": chunk}
    return {name: spans.get(name) for name in dict.fromkeys(layer_types)}


def attention_masks(spans: Mapping[str, int | None], unit: Tensor, branch: Tensor, position_ids: Tensor) -> dict[str, Tensor]:
    """Boolean masks, `True` where the query (third dimension) attends to the key (fourth).

    A token attends to itself and to earlier tokens of its unit that are prompt or of its own response, within the span of
    the layer. Padding forms a unit of its own: it attends to padding, so no row of a mask is empty and no softmax is
    taken over nothing.

    Args:
        spans: Kinds of layers, see `attention_spans`.
        unit: Which run of tokens a slot belongs to, [rows, L]; -1 for padding.
        branch: Index of the response, -1 for prompt tokens, [rows, L].
        position_ids: Position inside prompt + response, [rows, L].

    Returns:
        For each kind of layer a mask, [rows, 1, L, L].
    """
    query_branch, key_branch = branch[:, None, :, None], branch[:, None, None, :]
    visible = (key_branch < 0) | (key_branch == query_branch)
    visible &= unit[:, None, :, None] == unit[:, None, None, :]
    visible = visible.tril_()
    query, key = position_ids[:, None, :, None], position_ids[:, None, None, :]
    masks = {}
    for name, span in spans.items():
        if name == "sliding_attention" and span is not None:
            masks[name] = visible & (query - key < span)
        elif name == "chunked_attention" and span is not None:
            masks[name] = visible & (query // span == key // span)
        else:
            masks[name] = visible
    return masks


def additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """The mask as a term on attention scores: 0 where `True`, else the most negative finite number of `dtype`."""
    zero = torch.zeros((), dtype=dtype, device=mask.device)
    return torch.where(mask, zero, torch.finfo(dtype).min)
