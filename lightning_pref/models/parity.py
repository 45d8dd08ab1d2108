"""Proof, once per model object, that our way through a model gives what the model itself gives.

New architectures appear faster than any list of exceptions grows. So each model answers a few tokens in its own way and in
ours before its numbers are trusted: head against the model's logits, packed and shared rows against padded rows.
The checks run in evaluation mode without gradients and without autocast; they draw no random numbers and leave no trace.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from weakref import WeakKeyDictionary

import numpy as np
import torch
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel

from lightning_pref.data.groups import GroupBatch, PromptGroup
from lightning_pref.functional.linear_logps import linear_logits
from lightning_pref.models.attention import attention_backend, mask_obstacle, predicting_hidden
from lightning_pref.models.backbones import evaluating
from lightning_pref.models.heads import LMHead, backbone_of, causal_lm_of, head_of
from lightning_pref.models.layouts import plan_layout
from lightning_pref.models.sharding import within_forward

# Relative deviation that rounding alone can explain. Of the logits, which take one matrix product on both sides:
HEAD_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}
# and of hidden states, which take the whole model in differently shaped batches.
LAYOUT_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-3, torch.float16: 3e-2, torch.bfloat16: 1e-1}
# Where float32 products may run in TensorFloat-32 they are no more exact than this.
TF32_TOLERANCE = 3e-3

# Rows of the head -> logits of the model; a resized vocabulary is a new head. Then attention backend -> obstacle.
_num_logits: WeakKeyDictionary[PreTrainedModel, dict[int, int]] = WeakKeyDictionary()
_obstacles: WeakKeyDictionary[PreTrainedModel, dict[str, str | None]] = WeakKeyDictionary()


def verified_head(model: PreTrainedModel | PeftModel, head: LMHead) -> LMHead:
    """The head, cut to the rows that the model's own logits have, after it has once been compared with those.

    Raises:
        ValueError: If the model's own logits differ from the head's by more than rounding explains.
    """
    known = _num_logits.setdefault(causal_lm_of(model), {})
    num_rows = head.weight.shape[0]
    if num_rows not in known:
        known[num_rows] = _compare_logits(model, head)
    return head if known[num_rows] == num_rows else head.first_rows(known[num_rows])


def layout_obstacle(model: PreTrainedModel | PeftModel) -> str | None:
    """Why a language model cannot take packed or shared rows, `None` where both give what padded rows give."""
    return backbone_obstacle(backbone_of(model))


def backbone_obstacle(backbone: PreTrainedModel) -> str | None:
    """Why the backbone of a model, whatever its head, cannot take packed or shared rows; `None` where nothing is wrong."""
    obstacle = mask_obstacle(backbone)
    if obstacle is not None:
        return obstacle
    known = _obstacles.setdefault(backbone, {})
    backend = attention_backend(backbone)
    if backend not in known:
        known[backend] = _compare_layouts(backbone)
    return known[backend]


def _compare_logits(model: PreTrainedModel | PeftModel, head: LMHead) -> int:
    """Check the head and return how many logits the model has."""
    seen: list[Tensor] = []
    name = type(causal_lm_of(model)).__name__
    backbone = backbone_of(model)
    handle = backbone.register_forward_hook(lambda _module, _inputs, outputs: seen.append(outputs[0]))
    try:
        with _undisturbed(model):
            ids = torch.arange(4, device=backbone.device)[None] % head.weight.shape[0]
            own = model(input_ids=ids, use_cache=False).logits.float()
            if not seen:
                raise ValueError(f"{name} makes its logits without calling its {type(backbone).__name__}. {_UNSUPPORTED}")
            hidden = seen[0]
            ours = within_forward(model, lambda: _logits_of_head(model, hidden, own.shape[-1]))
    finally:
        handle.remove()
    largest = own.abs().max().clamp_min(torch.finfo(own.dtype).tiny)
    deviation = ((ours - own).abs().max() / largest).item() if ours.shape == own.shape else float("inf")
    allowed = _tolerance(HEAD_TOLERANCE, hidden.dtype, head.weight.dtype)
    if not deviation <= allowed:
        raise ValueError(
            f"The logits of {name} are not those of its head: on {ids.shape[-1]} tokens they differ by {deviation:.2g} of the "
            f"largest logit, where rounding explains {allowed:.0e}. {_UNSUPPORTED}"
        )
    return int(own.shape[-1])


def _logits_of_head(model: PreTrainedModel | PeftModel, hidden: Tensor, num_rows: int) -> Tensor:
    rows = head_of(model).first_rows(num_rows)
    return linear_logits(hidden, rows.weight, bias=rows.bias, low_rank=rows.low_rank, scale=rows.scale, softcap=rows.softcap)


_UNSUPPORTED = (
    "The model does something to its logits beside linear map, bias, scale and soft-cap, or its backbone stops short of the "
    "final norm, and response log-probs that leave this out would be wrong. Use a supported architecture (docs/layouts.md), "
    "or teach lightning_pref/models/heads.py what this one does."
)


def _compare_layouts(backbone: PreTrainedModel) -> str | None:
    """Run a small batch in all three layouts; say what is wrong, if anything is."""
    batch = _probe_batch(backbone.config.get_text_config().vocab_size).to(backbone.device)
    with _undisturbed(backbone):
        oracle = predicting_hidden(backbone, batch, plan_layout(batch, "padded")).float()
        allowed = _tolerance(LAYOUT_TOLERANCE, backbone.dtype)
        for layout in ("packed", "shared"):
            try:
                hidden = predicting_hidden(backbone, batch, plan_layout(batch, layout)).float()
            # A probe exists to find out; what it found is reported, never swallowed.
            except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
                return f"its forward pass fails on explicit masks ({type(error).__name__}: {error}). Use layout='padded'"
            deviation = ((hidden - oracle).norm() / oracle.norm()).item()
            if not deviation <= allowed:
                return (
                    f"its hidden states in {layout} rows differ by {deviation:.2g} from those in padded rows, where rounding "
                    f"explains {allowed:.0e}: something in it looks at places in the row instead of mask and positions. "
                    "Use layout='padded', or 'auto', which picks it"
                )
    return None


def _probe_batch(vocab_size: int) -> GroupBatch:
    """Two prompts of different length, one with two responses: every rule of the masks is used."""
    ids = np.arange(16) % vocab_size
    first = PromptGroup(row_id=0, prompt=ids[:3], responses=(ids[3:7], ids[7:9]))
    second = PromptGroup(row_id=1, prompt=ids[9:10], responses=(ids[10:13],))
    return GroupBatch.from_groups([first, second])


def _tolerance(table: dict[torch.dtype, float], *dtypes: torch.dtype) -> float:
    allowed = max(table.get(dtype, table[torch.bfloat16]) for dtype in dtypes)
    return allowed if torch.get_float32_matmul_precision() == "highest" else max(allowed, TF32_TOLERANCE)


@contextmanager
def _undisturbed(model: PreTrainedModel | PeftModel) -> Iterator[None]:
    """Evaluation mode without gradients and without autocast."""
    with evaluating(model), torch.autocast(model.device.type, enabled=False):
        yield
