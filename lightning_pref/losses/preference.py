"""The door to the pairwise losses: by name, with the inputs and options of that loss checked."""

import difflib
import inspect
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_pref.losses.pair import PairLogps
from lightning_pref.losses.registry import ALSO_CALLED, PREFERENCE_LOSSES
from lightning_pref.losses.spec import LossSpec

# A name, a spec of one's own, or any function (pair, *, options) -> Tensor[B]; a `LossMix` is one.
PreferenceLoss = str | LossSpec | Callable[..., Tensor]

# Temperatures: at zero or below the loss is flat, undefined, or prefers the rejected response.
POSITIVE_OPTIONS = frozenset({"beta", "beta_chosen", "beta_rejected", "eta", "tau"})


def preference_loss(loss: PreferenceLoss, pair: PairLogps, **options: Any) -> Tensor:  # Any: each loss has its own options
    """Loss of each pair, not reduced.

    Args:
        loss: Name in `PREFERENCE_LOSSES`, or a function of the same shape.
        pair: Log-probabilities of B pairs; half precision is widened before anything is computed.
        options: The loss's own options; one it does not have raises.

    Returns:
        [B], float32 (float64 for float64 log-probs). For `aot` and `aot_unpaired` an entry is a slot of the sorted batch.

    >>> pair = PairLogps(torch.tensor([-4.0]), torch.tensor([-9.0]), torch.tensor([-4.0]), torch.tensor([-9.0]))
    >>> preference_loss("sigmoid", pair, beta=0.5)
    tensor([0.6931])
    """
    spec = _spec_of(loss)
    chosen = loss_options(loss, **options)
    pair = pair.checked()
    _check_inputs(_name_of(loss), spec, pair, chosen)
    return spec.fn(pair, **chosen)


def implicit_rewards(loss: PreferenceLoss, pair: PairLogps, **options: Any) -> tuple[Tensor, Tensor]:  # Any: as above
    """Rewards of the chosen and the rejected responses as the loss compares them, [B] each, without gradient.

    That is beta times the log-ratio for most losses with a reference, the scaled mean log-prob for SimPO, the log-odds for
    ORPO, and so on: accuracies and margins made of anything else do not describe what is being trained.

    >>> pair = PairLogps(torch.tensor([-4.0]), torch.tensor([-9.0]), torch.tensor([-5.0]), torch.tensor([-6.0]))
    >>> implicit_rewards("sigmoid", pair, beta=0.5)
    (tensor([0.5000]), tensor([-1.5000]))
    """
    if isinstance(loss, LossMix):
        loss_options(loss, **options)  # a mix has none of its own, and says so
        name, _, own_options = loss.terms[0]
        return implicit_rewards(name, pair, **own_options)
    spec = _spec_of(loss)
    if spec.reward is None:
        raise ValueError(f"Loss {_name_of(loss)!r} does not say what it compares; pass `LossSpec(fn=..., reward=...)`.")
    chosen = loss_options(loss, **options)
    pair = pair.checked()
    _check_inputs(_name_of(loss), spec, pair, chosen)
    rewards = spec.reward(pair, **{name: chosen[name] for name in spec.reward_options})
    return rewards[0].detach(), rewards[1].detach()


def sensitivities(loss: PreferenceLoss, pair: PairLogps, **options: Any) -> tuple[Tensor, Tensor]:  # Any: as above
    """d_c = -dL/dS_chosen and d_r = dL/dS_rejected of each pair, [B] each: how hard the loss pulls up and pushes down.

    The parameter gradient of every pairwise loss is -d_c * grad S_chosen + d_r * grad S_rejected. Works under `no_grad` and
    in inference mode. For losses that couple the batch, the derivative of the batch's summed loss.

    >>> pair = PairLogps(*torch.zeros(4, 1))
    >>> sensitivities("sigmoid", pair, beta=0.5)
    (tensor([0.2500]), tensor([0.2500]))
    """
    with torch.inference_mode(False), torch.enable_grad():
        # Tensors made in inference mode can take no part in autograd; their copies can.
        wide = pair.checked()._asdict()
        copies = {name: values.detach().clone() for name, values in wide.items() if values is not None}
        own = {name: value.clone() if isinstance(value, Tensor) else value for name, value in options.items()}
        leaves = PairLogps(**copies)
        sums = (leaves.chosen.requires_grad_(), leaves.rejected.requires_grad_())
        total = preference_loss(loss, leaves, **own).sum()
        up, down = torch.autograd.grad(total, sums, materialize_grads=True)
    return -up, down


def loss_options(loss: PreferenceLoss, **options: Any) -> dict[str, Any]:  # Any: each loss has its own options
    """All options of a loss, the given ones over its defaults. Call it once at construction to refuse a wrong one early.

    >>> loss_options("sigmoid", beta=0.2)
    {'beta': 0.2, 'f_divergence': 'reverse_kl'}
    """
    name, known = _name_of(loss), _spec_of(loss).options
    for option, value in options.items():
        if option not in known:
            raise ValueError(_no_such_option(name, option, known))
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if is_number and (not math.isfinite(value) or (option in POSITIVE_OPTIONS and value <= 0)):
            expected = "positive and finite" if option in POSITIVE_OPTIONS else "finite"
            raise ValueError(f"Option `{option}` of loss {name!r} must be {expected}, got {value!r}.")
    merged = {**known, **options}
    missing = [option for option, value in merged.items() if value is inspect.Parameter.empty]
    if missing:
        raise ValueError(f"Loss {name!r} needs {_quoted(missing)}, which {'has' if len(missing) == 1 else 'have'} no default.")
    return merged


class LossMix:
    """A weighted sum of losses, usable wherever a loss name is. Its rewards are those of its first term.

    >>> mix = LossMix([("sigmoid", 0.8), ("bco_pair", 0.2, {"beta": 0.1}), ("sft", 1.0)])
    >>> pair = PairLogps(*torch.zeros(4, 1), torch.tensor([2]), torch.tensor([3]))
    >>> preference_loss(mix, pair)
    tensor([0.8318])
    """

    def __init__(
        self,
        terms: Sequence[tuple[str, float] | tuple[str, float, Mapping[str, Any]]],  # Any: each loss has its own options
    ) -> None:
        """Terms are (name, weight) or (name, weight, options)."""
        if not terms:
            raise ValueError('A LossMix needs at least one term such as ("sigmoid", 1.0).')
        self.terms = tuple((name, weight, dict(rest[0]) if rest else {}) for name, weight, *rest in terms)
        for name, weight, options in self.terms:
            loss_options(name, **options)
            if not math.isfinite(weight):
                raise ValueError(f"Weight of {name!r} in a LossMix must be finite, got {weight!r}.")

    def __call__(self, pair: PairLogps) -> Tensor:
        losses = [weight * preference_loss(name, pair, **options) for name, weight, options in self.terms]
        return torch.stack(losses).sum(0)

    @property
    def needs_reference(self) -> bool:
        return any(PREFERENCE_LOSSES[name].needs_reference for name, _, _ in self.terms)

    @property
    def needs_lengths(self) -> bool:
        return any(PREFERENCE_LOSSES[name].needs_lengths(loss_options(name, **options)) for name, _, options in self.terms)


def _spec_of(loss: PreferenceLoss) -> LossSpec:
    if isinstance(loss, LossSpec):
        return loss
    if callable(loss):
        return LossSpec(fn=loss, formula="", source="")
    if loss in PREFERENCE_LOSSES:
        return PREFERENCE_LOSSES[loss]
    nearest = sorted(PREFERENCE_LOSSES, key=lambda name: -difflib.SequenceMatcher(None, name, loss).ratio())
    guess = ALSO_CALLED.get(loss.lower().replace("-", "_"), nearest[0])
    raise ValueError(f"Unknown preference loss {loss!r}; did you mean {guess!r}? Known, nearest first: {', '.join(nearest)}.")


def _name_of(loss: PreferenceLoss) -> str:
    if isinstance(loss, str):
        return loss
    function = loss.fn if isinstance(loss, LossSpec) else loss
    return str(getattr(function, "__name__", type(function).__name__))


def _check_inputs(name: str, spec: LossSpec, pair: PairLogps, options: Mapping[str, object]) -> None:
    if spec.needs_reference and not pair.has_reference:
        free = [other for other, entry in PREFERENCE_LOSSES.items() if not entry.needs_reference]
        raise ValueError(
            f"Loss {name!r} compares with a reference, but `ref_chosen` or `ref_rejected` is missing. Pass the reference's "
            f"log-probs, or choose a loss that needs none: {', '.join(free)}."
        )
    if spec.needs_lengths(options) and not pair.has_lengths:
        raise ValueError(
            f"Loss {name!r} counts tokens, but `chosen_lengths` or `rejected_lengths` is missing. Pass the number of response "
            "tokens behind each sum" + (", or set `length_normalize=False`." if spec.length == "option" else ".")
        )
    for option, value in options.items():
        if isinstance(value, Tensor) and value.shape not in (torch.Size([]), pair.chosen.shape):
            raise ValueError(
                f"Option `{option}` of loss {name!r} has shape {list(value.shape)}; a tensor here is one number, [], or one per "
                f"pair, {list(pair.chosen.shape)}."
            )


def _no_such_option(name: str, option: str, known: Mapping[str, object]) -> str:
    takers = [other for other, spec in PREFERENCE_LOSSES.items() if option in spec.options]
    has = f"its options are {_quoted(known)}" if known else "it has no options"
    elsewhere = f" `{option}` is an option of {', '.join(takers)}." if takers else ""
    return f"Loss {name!r} has no option `{option}`: it would change nothing. For this loss {has}.{elsewhere}"


def _quoted(names: Iterable[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)
