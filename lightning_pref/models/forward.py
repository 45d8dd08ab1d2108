"""The one way from a model and a batch to the log-probability of every response token."""

from collections.abc import Collection
from dataclasses import dataclass
from typing import Literal

from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel

from lightning_pref.data.groups import GroupBatch
from lightning_pref.functional.linear_logps import LinearLogps, linear_logps
from lightning_pref.functional.masked import segment_sum
from lightning_pref.models.attention import predicting_hidden, token_costs
from lightning_pref.models.heads import backbone_of, causal_lm_of, head_of
from lightning_pref.models.layouts import PlacedLayout, choose_layout, plan_layout
from lightning_pref.models.parity import backbone_obstacle, verified_head
from lightning_pref.models.sharding import is_split, within_forward

Layout = Literal["auto", "padded", "packed", "shared"]
Quantity = Literal["entropy", "collision", "hidden"]

LAYOUTS: tuple[Layout, ...] = ("auto", "padded", "packed", "shared")
QUANTITIES: tuple[Quantity, ...] = ("entropy", "collision", "hidden")


@dataclass(frozen=True)
class ResponseLogps:
    """Log-probabilities of the N response tokens of a batch, in its flat order, and of its R responses."""

    token_logps: Tensor  # [N] float32, nats
    response: Tensor  # [N] index of the response each token belongs to
    logps: Tensor  # [R] float32, sums over response tokens
    lengths: Tensor  # [R] response tokens
    entropy: Tensor | None  # [N] float32, nats, of the distribution each token was drawn from
    collision: Tensor | None  # [N] float32, log sum_v pi(v)^2 of that distribution
    hidden: Tensor | None  # [N, D] hidden state, after the final norm, that predicts each token
    layout: PlacedLayout  # the layout that was used


def response_logps(
    model: PreTrainedModel | PeftModel,
    batch: GroupBatch,
    *,
    layout: Layout = "auto",
    want: Collection[Quantity] = (),
    temperature: float = 1.0,
    chunk_elements: int = 2**24,
) -> ResponseLogps:
    """Log-probability of every response token given its prompt and what came before it.

    The three layouts agree in values and gradients up to rounding; they differ in cost (docs/layouts.md). The first call
    with a model object also checks, on a few tokens, that its head and its layouts give what the model itself gives.

    Args:
        model: A decoder-only causal language model, plain or with peft adapters. Adapters, dropout mode, autocast and
            gradient checkpointing are as the caller has set them.
        batch: Groups, on the model's device.
        layout: How the batch goes through the backbone; `auto` takes the cheapest that the model can take.
        want: Further quantities to return.
        temperature: Divisor of the logits; log-probabilities, entropy and collision are those of the tempered distribution.
        chunk_elements: Logits that may exist at once, see `linear_logps`.

    Raises:
        ValueError: If the model or the wish is not supported; the message says what is.
    """
    if unknown := sorted(set(want) - set(QUANTITIES)):
        raise ValueError(f"Unknown quantity {unknown[0]!r} in `want`; known: {', '.join(QUANTITIES)}.")
    if is_split(model):
        # The comparison runs the model itself, which its forward pass below cannot.
        verified_head(model, head_of(model))
    scored, hidden, response, placed = within_forward(
        model, lambda: _scored(model, batch, layout, want, temperature, chunk_elements)
    )
    return ResponseLogps(
        token_logps=scored.logps,
        response=response,
        logps=segment_sum(scored.logps, response, batch.num_responses),
        lengths=batch.response_lengths,
        entropy=scored.entropy,
        collision=scored.collision,
        hidden=hidden if "hidden" in want else None,
        layout=placed,
    )


def _scored(
    model: PreTrainedModel | PeftModel,
    batch: GroupBatch,
    layout: Layout,
    want: Collection[Quantity],
    temperature: float,
    chunk_elements: int,
) -> tuple[LinearLogps, Tensor, Tensor, PlacedLayout]:
    """What the head says, the states it read, the response of each token, and the layout that was used."""
    backbone = backbone_of(model)
    head = verified_head(model, head_of(model))
    placed = place_batch(backbone, batch, layout, name=type(causal_lm_of(model)).__name__)
    plan = plan_layout(batch, placed).to(batch.input_ids.device)
    hidden = predicting_hidden(backbone, batch, plan)
    scored = linear_logps(
        hidden,
        head.weight,
        batch.input_ids[plan.predicted],
        bias=head.bias,
        low_rank=head.low_rank,
        scale=head.scale,
        softcap=head.softcap,
        temperature=temperature,
        want_entropy="entropy" in want,
        want_collision="collision" in want,
        chunk_elements=chunk_elements,
    )
    return scored, hidden, batch.response[plan.predicted], placed


def place_batch(backbone: PreTrainedModel, batch: GroupBatch, layout: Layout, *, name: str) -> PlacedLayout:
    """Turn `auto` into a layout and refuse what the backbone of a model called `name` cannot take."""
    if layout == "padded":
        return layout
    if layout not in LAYOUTS:
        raise ValueError(f"Unknown layout {layout!r}; known: {', '.join(LAYOUTS)}.")
    obstacle = backbone_obstacle(backbone)
    if obstacle is None:
        return choose_layout(batch, token_costs(backbone)) if layout == "auto" else layout
    if layout != "auto":
        raise ValueError(f"{name} cannot take {layout} rows: {obstacle}.")
    return "padded"
