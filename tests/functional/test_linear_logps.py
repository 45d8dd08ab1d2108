import math

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_pref.functional.linear_logps import LowRank, linear_logits, linear_logps


def problem(num_rows: int = 11, vocabulary: int = 13, size: int = 5, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(dtype).requires_grad_()

    return {
        "hidden": normal(num_rows, size),
        "weight": normal(vocabulary, size),
        "bias": normal(vocabulary),
        "down": normal(2, size),
        "up": normal(vocabulary, 2),
        "targets": torch.randint(0, vocabulary, (num_rows,), generator=generator),
    }


def plain_logits(p: dict[str, Tensor], scale: float = 1.0, softcap: float | None = None) -> Tensor:
    """The whole [N, V] table at once, the product of the low-rank factors written out."""
    logits = (p["hidden"] @ (p["weight"] + p["up"] @ p["down"]).T + p["bias"]) * scale
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


class LargestTensor(TorchDispatchMode):
    """Counts the elements of the largest tensor that any operation returns."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # noqa: ANN001, ANN204  # the signature of torch
        outputs = func(*args, **(kwargs or {}))
        for value in outputs if isinstance(outputs, tuple | list) else [outputs]:
            if isinstance(value, Tensor):
                self.elements = max(self.elements, value.numel())
        return outputs


@pytest.mark.parametrize("chunk_elements", [1, 13 * 3, 13 * 4 + 1, 10**6])
@pytest.mark.parametrize(("scale", "softcap"), [(1.0, None), (0.25, None), (1.0, 2.0), (3.0, 1.5)])
def test_chunks_give_values_and_gradients_of_the_whole_table(chunk_elements: int, scale: float, softcap: float | None) -> None:
    p = problem()
    inputs = [p[name] for name in ("hidden", "weight", "bias", "down", "up")]
    weights = torch.linspace(-1, 2, 11)
    log_probs = plain_logits(p, scale, softcap).log_softmax(-1)
    expected = log_probs.gather(-1, p["targets"][:, None]).squeeze(-1)
    expected_entropy = -(log_probs.exp() * log_probs).sum(-1)
    expected_collision = log_probs.exp().square().sum(-1).log()
    expected_loss = (weights * (expected + expected_entropy - 0.5 * expected_collision)).sum()
    expected_gradients = torch.autograd.grad(expected_loss, inputs)

    out = linear_logps(
        p["hidden"],
        p["weight"],
        p["targets"],
        bias=p["bias"],
        low_rank=LowRank(p["down"], p["up"]),
        scale=scale,
        softcap=softcap,
        want_entropy=True,
        want_collision=True,
        chunk_elements=chunk_elements,
    )
    assert out.entropy is not None
    assert out.collision is not None
    torch.testing.assert_close(out.logps, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(out.entropy, expected_entropy, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(out.collision, expected_collision, rtol=1e-5, atol=1e-5)
    gradients = torch.autograd.grad((weights * (out.logps + out.entropy - 0.5 * out.collision)).sum(), inputs)
    for gradient, expected_gradient in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(gradient, expected_gradient, rtol=1e-4, atol=1e-5)


def test_no_tensor_is_larger_than_a_chunk_in_either_pass() -> None:
    p = problem(num_rows=64, vocabulary=40, size=4)
    chunk_elements = 40 * 8
    with LargestTensor() as largest:
        linear_logps(p["hidden"], p["weight"], p["targets"], chunk_elements=chunk_elements).logps.sum().backward()
    assert largest.elements <= chunk_elements < 64 * 40


def test_what_is_kept_for_the_backward_pass_is_no_larger_than_the_inputs() -> None:
    p = problem(num_rows=64, vocabulary=40, size=4)
    kept: list[int] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        linear_logps(p["hidden"], p["weight"], p["targets"], chunk_elements=40 * 8).logps.sum()
    assert max(kept, default=0) <= max(p["hidden"].numel(), p["weight"].numel())
    assert sum(kept) < 64 * 40


def test_no_rows_give_no_values_and_zero_gradients() -> None:
    p = problem()
    out = linear_logps(p["hidden"][:0], p["weight"], p["targets"][:0], want_entropy=True)
    assert out.logps.shape == (0,)
    assert out.entropy is not None
    assert out.entropy.shape == (0,)
    out.logps.sum().backward()
    assert p["weight"].grad is not None
    assert p["weight"].grad.abs().max() == 0


def test_quantities_nobody_wants_are_not_returned() -> None:
    p = problem()
    out = linear_logps(p["hidden"], p["weight"], p["targets"])
    assert out.entropy is None
    assert out.collision is None


def test_L4_bfloat16_inputs_are_reduced_in_float32() -> None:
    """Only the logits are rounded: the reduction of those rounded logits agrees with float64 to float32 precision."""
    p = problem(num_rows=16, vocabulary=4096, size=16, dtype=torch.bfloat16)
    out = linear_logps(p["hidden"], p["weight"], p["targets"], chunk_elements=4096 * 4)
    assert out.logps.dtype == torch.float32
    rounded = (p["hidden"] @ p["weight"].T).double()
    expected = rounded.log_softmax(-1).gather(-1, p["targets"][:, None]).squeeze(-1)
    torch.testing.assert_close(out.logps.double(), expected, rtol=1e-6, atol=1e-5)


def test_L4_autocast_changes_only_the_matrix_product() -> None:
    p = problem(num_rows=16, vocabulary=512, size=16)
    exact = linear_logps(p["hidden"], p["weight"], p["targets"]).logps
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = linear_logps(p["hidden"], p["weight"], p["targets"], chunk_elements=512 * 3).logps
    assert out.dtype == torch.float32
    # Eight bits of mantissa on logits of size about ten.
    torch.testing.assert_close(out, exact, rtol=0, atol=0.1)
    out.sum().backward()
    assert p["weight"].grad is not None
    assert p["weight"].grad.dtype == torch.float32


def test_hidden_states_of_another_precision_than_the_head_are_cast_to_it() -> None:
    p = problem()
    out = linear_logps(p["hidden"].double(), p["weight"], p["targets"])
    torch.testing.assert_close(out.logps, linear_logps(p["hidden"], p["weight"], p["targets"]).logps)


def test_the_softcap_acts_after_the_scale() -> None:
    logits = linear_logits(torch.tensor([[1.0]]), torch.tensor([[4.0]]), scale=0.5, softcap=3.0)
    assert logits.item() == pytest.approx(3.0 * math.tanh(2.0 / 3.0))


def test_a_chunk_of_no_elements_is_refused() -> None:
    p = problem()
    with pytest.raises(ValueError, match="`chunk_elements` must be at least 1, got 0"):
        linear_logps(p["hidden"], p["weight"], p["targets"], chunk_elements=0)


@pytest.mark.parametrize("temperature", [0.5, 1.7])
def test_L10_temperature_divides_the_capped_logits_once(temperature: float) -> None:
    generator = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(7, 4, generator=generator), 3 * torch.randn(11, 4, generator=generator)
    kept, targets = hidden.clone(), torch.arange(7)
    out = linear_logps(hidden, weight, targets, softcap=5.0, temperature=temperature, want_entropy=True, chunk_elements=22)
    logps = torch.log_softmax(5.0 * torch.tanh(hidden.double() @ weight.double().T / 5.0) / temperature, dim=-1)
    torch.testing.assert_close(out.logps.double(), logps[torch.arange(7), targets], atol=1e-5, rtol=1e-5)
    assert out.entropy is not None
    torch.testing.assert_close(out.entropy.double(), -(logps.exp() * logps).sum(-1), atol=1e-5, rtol=1e-5)
    assert torch.equal(hidden, kept)


def test_a_temperature_of_zero_is_refused() -> None:
    with pytest.raises(ValueError, match=r"`temperature` must be positive, got 0.0: at 0 every token but one is impossible"):
        linear_logps(torch.zeros(1, 2), torch.ones(4, 2), torch.tensor([3]), temperature=0.0)
