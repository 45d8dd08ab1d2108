"""How a planned batch is run through a backbone: which masks its attention gets, and whether it can take them.

This is the seam for attention backends. A plan (`layouts.py`) says who sits where; here that becomes arguments of the
backbone's forward. Padded rows need no more than the plain two-dimensional mask, which every backend understands; packed and
shared rows are given as explicit four-dimensional masks, which SDPA and eager attention understand.
"""

import inspect

from torch import Tensor
from transformers import PreTrainedModel

from lightning_pref.data.groups import GroupBatch
from lightning_pref.models.layouts import PADDING, LayoutPlan, TokenCosts
from lightning_pref.models.masks import POSITIONAL_LAYER_TYPES, additive, attention_masks, attention_spans

EXPLICIT_MASK_BACKENDS = ("sdpa", "eager")

# Masking, exponential and sum of one attention score, in multiply-adds of a matrix product that take as long
# (benchmarks/layouts.py on a CPU).
SCORE_OVERHEAD = 32


def predicting_hidden(backbone: PreTrainedModel, batch: GroupBatch, plan: LayoutPlan) -> Tensor:
    """Hidden state, after the final norm, that predicts each response token; [N, D].

    The state of a prompt's last token appears once for each response of the group.
    """
    return slot_states(backbone, batch, plan).index_select(0, plan.predictor.to(batch.input_ids.device))


def slot_states(backbone: PreTrainedModel, batch: GroupBatch, plan: LayoutPlan) -> Tensor:
    """Hidden state, after the final norm, of every slot of the plan, [rows * L, D]; what stands in padding means nothing.

    `plan.predictor` picks the states that predict the response tokens, `plan.place` those of the response tokens themselves.
    """
    plan = plan.to(batch.input_ids.device)
    position_ids = batch.position_ids[plan.source]
    arguments = {"input_ids": batch.input_ids[plan.source], "attention_mask": _attention_mask(backbone, plan, position_ids)}
    if takes_positions(backbone):
        arguments["position_ids"] = position_ids
    hidden: Tensor = backbone(**arguments, use_cache=False)[0]
    return hidden.flatten(0, 1)


def _attention_mask(backbone: PreTrainedModel, plan: LayoutPlan, position_ids: Tensor) -> Tensor | dict[str, Tensor]:
    if plan.layout == "padded":
        return (plan.unit != PADDING).long()
    masks = attention_masks(attention_spans(backbone.config), plan.unit, plan.branch, position_ids)
    if attention_backend(backbone) == "eager":
        masks = {name: additive(mask, backbone.dtype) for name, mask in masks.items()}
    # Models with layers of several kinds look their masks up by kind; the others know one mask only.
    return masks if len(masks) > 1 else next(iter(masks.values()))


def attention_backend(backbone: PreTrainedModel) -> str:
    """Name of the attention implementation that the model has been set to."""
    return str(getattr(backbone.config, "_attn_implementation", None) or "eager")


def mask_obstacle(backbone: PreTrainedModel) -> str | None:
    """Why a model cannot take packed or shared rows, judged by its class and config; `None` if nothing speaks against it."""
    layer_types = getattr(backbone.config.get_text_config(), "layer_types", None) or ()
    others = sorted(set(layer_types) - set(POSITIONAL_LAYER_TYPES))
    if others or getattr(backbone, "_is_stateful", False):
        return (
            f"it has layers ({', '.join(others) or 'state-space'}) that carry a state along the row and cannot be kept apart by "
            "an attention mask. Use layout='padded', or 'auto', which picks it"
        )
    if not getattr(backbone, "_supports_attention_backend", False) or not takes_positions(backbone):
        return (
            "its attention does not go through transformers' attention interface, so explicit masks and positions may not "
            "reach it. Use layout='padded', or 'auto', which picks it"
        )
    if attention_backend(backbone) not in EXPLICIT_MASK_BACKENDS:
        return (
            f"its attention implementation {attention_backend(backbone)!r} takes no explicit mask. Load the model with "
            "attn_implementation='sdpa' (or 'eager'), or use layout='padded'"
        )
    return None


def takes_positions(backbone: PreTrainedModel) -> bool:
    """Whether the forward of a model names `position_ids` among its arguments."""
    return "position_ids" in inspect.signature(type(backbone).forward).parameters


def token_costs(backbone: PreTrainedModel) -> TokenCosts:
    """Forward multiply-adds of a model by slot and by attention score, from the sizes in its config.

    A slot pays the weights of every layer, `2 d (H + H_kv) d_h + 3 d f`; a score pays `H (2 d_h + SCORE_OVERHEAD)` in every
    layer, with H heads of size d_h, H_kv of them for keys, hidden size d and feed-forward size f. Only the ratio matters.
    """
    config = backbone.config.get_text_config()
    hidden, heads = config.hidden_size, getattr(config, "num_attention_heads", None) or 1
    key_heads = getattr(config, "num_key_value_heads", None) or heads
    head_size = getattr(config, "head_dim", None) or hidden // heads
    feed_forward = getattr(config, "intermediate_size", None) or 4 * hidden
    slot = 2 * hidden * (heads + key_heads) * head_size + 3 * hidden * feed_forward
    return TokenCosts(slot=float(slot), score=float(heads * (2 * head_size + SCORE_OVERHEAD)))
