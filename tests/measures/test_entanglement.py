"""Inner products of head gradients against autograd, and first-order predictions against what a step really does."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import LlamaForCausalLM

from lightning_pref.data.groups import GroupBatch, PromptGroup
from lightning_pref.losses import PairLogps, preference_loss, sensitivities
from lightning_pref.measures.entanglement import (
    GradientProducts,
    Head,
    Scored,
    head_gradient_products,
    in_band,
    predicted_changes,
    regimes,
)
from lightning_pref.models.gradient_inputs import head_inputs

VOCABULARY, SIZE = 13, 5


def random_response(num_tokens: int, seed: int) -> Scored:
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(num_tokens, SIZE, generator=generator, dtype=torch.float64)
    return Scored(hidden, torch.randint(VOCABULARY, (num_tokens,), generator=generator))


def random_weight(seed: int = 0) -> Tensor:
    return torch.randn(VOCABULARY, SIZE, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def logp(response: Scored, head: Head) -> Tensor:
    return head.logits(response.hidden).log_softmax(-1).gather(1, response.tokens[:, None]).sum()


def by_autograd(responses: tuple[Scored, Scored], head: Head) -> list[float]:
    weight = head.weight.detach().clone().requires_grad_()
    gradients = [torch.autograd.grad(logp(response, head._replace(weight=weight)), weight)[0] for response in responses]
    pairs = ((0, 0), (1, 1), (0, 1))
    return [(gradients[i] * gradients[j]).sum().item() for i, j in pairs]


@pytest.mark.parametrize("chunk_elements", [1, 30, 2**20])
@pytest.mark.parametrize(
    "head",
    [
        Head(random_weight()),
        Head(random_weight(), bias=random_weight(1)[:, 0]),
        Head(random_weight(), scale=0.3, softcap=2.0),
        Head(random_weight(), low_rank=(random_weight(2)[:2], random_weight(3)[:, :2]), scale=2.0),
    ],
    ids=["plain", "bias", "softcap", "low_rank"],
)
def test_the_closed_form_is_the_gradient_of_the_head(head: Head, chunk_elements: int) -> None:
    responses = (random_response(4, 1), random_response(7, 2))
    found = head_gradient_products(*responses, head, chunk_elements=chunk_elements)
    assert found.tolist() == pytest.approx(by_autograd(responses, head), rel=1e-9)


def test_a_response_without_tokens_has_no_gradient() -> None:
    found = head_gradient_products(random_response(0, 1), random_response(3, 2), Head(random_weight()))
    assert found[0] == found[2] == 0.0
    assert found[1] > 0.0


def test_the_closed_form_equals_autograd_through_a_whole_model(
    tiny_model: Callable[..., LlamaForCausalLM], random_groups: Callable[..., list[PromptGroup]]
) -> None:
    model, groups = tiny_model().eval(), random_groups(3)
    inputs = head_inputs(model, GroupBatch.from_groups(groups))
    for i, group in enumerate(groups):
        gradients = []
        for response in group.responses:
            ids = torch.tensor([[*group.prompt.tolist(), *response.tolist()]])
            logits = model(ids).logits[0, len(group.prompt) - 1 : -1]
            total = logits.log_softmax(-1).gather(1, torch.tensor(response)[:, None]).sum()
            gradients.append(torch.autograd.grad(total, model.lm_head.weight)[0].double())
        expected = [(gradients[a] * gradients[b]).sum().item() for a, b in ((0, 0), (1, 1), (0, 1))]
        found = head_gradient_products(inputs.chosen[i], inputs.rejected[i], inputs.head)
        assert found.tolist() == pytest.approx(expected, rel=1e-5, abs=1e-5 * expected[0])
        assert inputs.logps.row_ids[i].item() == group.row_id


def products_of(chosen: Scored, rejected: Scored, head: Head) -> GradientProducts:
    return GradientProducts(*head_gradient_products(chosen, rejected, head)[:, None].unbind())


@pytest.mark.parametrize("loss", ["sigmoid", "hinge", "simpo", "dpop"])
def test_the_predicted_changes_of_a_gradient_step_are_right_to_first_order(loss: str) -> None:
    """Halving the step quarters what the prediction misses."""
    chosen, rejected = random_response(3, 1), random_response(5, 2)
    head = Head(random_weight())
    references = (torch.tensor([-9.0], dtype=torch.float64), torch.tensor([-14.0], dtype=torch.float64))
    lengths = (torch.tensor([3]), torch.tensor([5]))

    def pair(weight: Tensor) -> PairLogps:
        own = head._replace(weight=weight)
        return PairLogps(logp(chosen, own)[None], logp(rejected, own)[None], *references, *lengths)

    start = pair(head.weight)
    up, down = sensitivities(loss, start)
    misses = []
    for step_size in (1e-3, 5e-4, 2.5e-4):
        weight = nn.Parameter(head.weight.clone())
        optimizer = torch.optim.SGD([weight], lr=step_size)
        preference_loss(loss, pair(weight)).sum().backward()
        optimizer.step()
        after = pair(weight)
        predicted = predicted_changes(products_of(chosen, rejected, head), up, down, step_size)
        real = (after.chosen - start.chosen, after.rejected - start.rejected)
        assert predicted[0].item() == pytest.approx(real[0].item(), rel=0.05)
        misses.append(sum(abs(a.item() - b.item()) for a, b in zip(predicted, real, strict=True)))
    assert misses[0] / misses[1] == pytest.approx(4.0, rel=0.05)
    assert misses[1] / misses[2] == pytest.approx(4.0, rel=0.05)


def test_identical_responses_have_cosine_one_and_do_not_move_under_dpo() -> None:
    response = random_response(6, 1)
    products = products_of(response, response, Head(random_weight()))
    assert products.cosine().item() == pytest.approx(1.0)
    assert products.norm_ratio().item() == pytest.approx(1.0)
    assert products.cross.item() == pytest.approx(products.chosen.item())
    one = torch.ones(1, dtype=torch.float64)
    assert [change.item() for change in predicted_changes(products, one, one)] == pytest.approx([0.0, 0.0], abs=1e-12)


def test_one_contrasting_token_in_the_same_context_parts_and_a_shared_tail_drags_along() -> None:
    head = Head(random_weight() * 0.1)
    state = torch.randn(1, SIZE, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    sides = [Scored(state, torch.tensor([token])) for token in (2, 9)]
    alone = products_of(*sides, head)
    assert alone.cross.item() < 0
    one = torch.ones(1, dtype=torch.float64)
    assert in_band(alone, one, one).item()
    tail = random_response(8, 7)
    longer = [Scored(torch.cat([side.hidden, tail.hidden]), torch.cat([side.tokens, tail.tokens])) for side in sides]
    dragged = products_of(*longer, head)
    assert dragged.cross.item() > 0
    assert dragged.cosine().item() > 0.8


@settings(deadline=None, max_examples=200)
@given(st.floats(0.1, 10), st.floats(0.1, 10), st.floats(-0.999, 0.999), st.floats(0.1, 10))
def test_the_band_is_between_the_two_quotients(a: float, b: float, cosine: float, ratio: float) -> None:
    e = cosine * math.sqrt(a * b)
    products = GradientProducts(*(torch.tensor([value], dtype=torch.float64) for value in (a, b, e)))
    up, down = torch.tensor([ratio], dtype=torch.float64), torch.ones(1, dtype=torch.float64)
    expected = e / a <= ratio and ratio * e <= b
    boundaries = (ratio * a - e, ratio * e - b)
    if min(map(abs, boundaries)) > 1e-9:
        assert in_band(products, up, down).item() is expected
    # The middle of the band always lies in it.
    assert in_band(products, products.norm_ratio(), down).item()


@pytest.mark.parametrize(
    ("chosen", "rejected", "regime"),
    [(1.0, -1.0, 0), (0.0, 0.0, 0), (-1.0, -1.0, 1), (-1.0, 0.0, 1), (1.0, 1.0, 2), (-1.0, 1.0, 3)],
)
def test_every_pair_is_in_one_regime(chosen: float, rejected: float, regime: int) -> None:
    found = regimes(torch.tensor([chosen]), torch.tensor([rejected]))
    assert [value.item() for value in found] == [float(k == regime) for k in range(4)]


def test_a_change_that_is_not_known_has_no_regime() -> None:
    assert all(value.isnan() for value in regimes(torch.tensor([math.nan]), torch.tensor([1.0])))
