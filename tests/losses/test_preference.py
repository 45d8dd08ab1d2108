from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_pref.losses import (
    PREFERENCE_LOSSES,
    LossMix,
    LossSpec,
    PairLogps,
    implicit_rewards,
    loss_options,
    preference_loss,
    sensitivities,
)

# Rows on both sides of every kink, at moderate margins, so that every option of every loss shows.
PAIR = PairLogps(
    torch.tensor([-12.0, -5.5, -6.0]),
    torch.tensor([-10.5, -9.0, -4.0]),
    torch.tensor([-11.2, -7.0, -6.9]),
    torch.tensor([-12.5, -8.1, -4.4]),
    torch.tensor([5, 3, 4]),
    torch.tensor([6, 3, 2]),
)
REQUIRED: dict[str, dict[str, Any]] = {
    "inpo": {"previous_chosen": torch.zeros(3), "previous_rejected": torch.zeros(3), "eta": 0.5, "tau": 0.2},
}
# Another legal value of each option.
OTHER_VALUES: dict[str, Any] = {
    "beta": 0.37,
    "beta_chosen": 0.37,
    "beta_rejected": 0.37,
    "f_divergence": "forward_kl",
    "label_smoothing": 0.23,
    "length_normalize": False,
    "tau": 0.31,
    "eta": 0.71,
    "alpha": 0.37,
    "gamma": 0.37,
    "delta": 0.37,
    "penalty": 3.7,
    "preference": 0.7,
    "baseline": 1.37,
    "desirable_weight": 1.37,
    "undesirable_weight": 1.37,
    "previous_chosen": torch.ones(3),
    "previous_rejected": torch.ones(3),
}
ALL_OPTIONS = [(name, option) for name, spec in PREFERENCE_LOSSES.items() for option in spec.options]
NAMES_WITH_REFERENCE = [name for name, spec in PREFERENCE_LOSSES.items() if spec.needs_reference]
NAMES_WITH_LENGTHS = [name for name, spec in PREFERENCE_LOSSES.items() if spec.length != "sum"]


def loss(name: str, pair: PairLogps = PAIR, **options: Any) -> Tensor:
    return preference_loss(name, pair, **REQUIRED.get(name, {}) | options)


@pytest.mark.parametrize(("name", "option"), ALL_OPTIONS)
def test_every_option_changes_its_loss(name: str, option: str) -> None:
    assert not torch.allclose(loss(name).sort().values, loss(name, **{option: OTHER_VALUES[option]}).sort().values)


@pytest.mark.parametrize("name", PREFERENCE_LOSSES)
def test_F4_label_smoothing_acts_or_raises(name: str) -> None:
    if "label_smoothing" in PREFERENCE_LOSSES[name].options:
        assert not torch.allclose(loss(name, label_smoothing=0.2), loss(name, label_smoothing=0.3))
    else:
        with pytest.raises(ValueError, match=r"has no option `label_smoothing`: it would change nothing. .*option of cdpo"):
            loss(name, label_smoothing=0.2)


@pytest.mark.parametrize("name", ["cdpo", "robust", "exo_pair", "aot", "aot_unpaired"])
@pytest.mark.parametrize("label_smoothing", [0.5, 0.9, -0.1])
def test_label_smoothing_beyond_one_half_raises(name: str, label_smoothing: float) -> None:
    with pytest.raises(ValueError, match=r"`label_smoothing` must be in \[0, 0.5\), got"):
        loss(name, label_smoothing=label_smoothing)


def test_exo_refuses_hard_labels() -> None:
    with pytest.raises(ValueError, match="must be above 0 here: the KL to a hard label is infinite"):
        loss("exo_pair", label_smoothing=0.0)


def test_unknown_option_names_the_legal_ones() -> None:
    with pytest.raises(
        ValueError, match=r"'simpo' has no option `delta`.*its options are `beta`, `gamma`\. `delta` is an option"
    ):
        loss("simpo", delta=1.0)
    with pytest.raises(ValueError, match=r"'sft' has no option `rate`: it would change nothing. For this loss it has no options"):
        loss("sft", rate=1.0)


@pytest.mark.parametrize(
    ("typed", "meant"), [("dpo", "sigmoid"), ("r-dpo", "rdpo"), ("DPO", "sigmoid"), ("sigmod", "sigmoid"), ("hing", "hinge")]
)
def test_unknown_name_guesses_what_was_meant(typed: str, meant: str) -> None:
    with pytest.raises(ValueError, match=f"Unknown preference loss '{typed}'; did you mean '{meant}'\\? Known, nearest first: "):
        loss(typed)


@pytest.mark.parametrize("value", [0.0, -0.1, float("nan"), float("inf")])
def test_beta_must_be_positive_and_finite(value: float) -> None:
    with pytest.raises(ValueError, match="Option `beta` of loss 'sigmoid' must be positive and finite, got"):
        loss("sigmoid", beta=value)


def test_other_numbers_must_be_finite() -> None:
    with pytest.raises(ValueError, match="Option `gamma` of loss 'simpo' must be finite, got nan"):
        loss("simpo", gamma=float("nan"))


def test_unknown_divergence_names_the_known_ones() -> None:
    with pytest.raises(ValueError, match="`f_divergence` must be 'reverse_kl', 'forward_kl', 'js_divergence' or a number"):
        loss("sigmoid", f_divergence="alpha_divergence")


def test_missing_required_options_raise() -> None:
    with pytest.raises(ValueError, match="'inpo' needs `previous_chosen`, `previous_rejected`, `eta`, `tau`, which have no"):
        preference_loss("inpo", PAIR)


@pytest.mark.parametrize("name", NAMES_WITH_REFERENCE)
@pytest.mark.parametrize("missing", ["ref_chosen", "ref_rejected"])
def test_missing_reference_raises_and_names_losses_without_one(name: str, missing: str) -> None:
    with pytest.raises(ValueError, match=f"'{name}' compares with a reference, but .* is missing.*simpo"):
        loss(name, PAIR._replace(**{missing: None}))


@pytest.mark.parametrize("name", sorted(set(PREFERENCE_LOSSES) - set(NAMES_WITH_REFERENCE)))
def test_loss_without_reference_does_not_look_at_one(name: str) -> None:
    torch.testing.assert_close(loss(name), loss(name, PAIR._replace(ref_chosen=None, ref_rejected=None)))


@pytest.mark.parametrize("name", NAMES_WITH_LENGTHS)
def test_missing_lengths_raise(name: str) -> None:
    with pytest.raises(ValueError, match=f"'{name}' counts tokens, but `chosen_lengths` or `rejected_lengths` is missing"):
        loss(name, PAIR._replace(chosen_lengths=None))


@pytest.mark.parametrize("name", sorted(set(PREFERENCE_LOSSES) - set(NAMES_WITH_LENGTHS)))
def test_loss_of_sums_does_not_look_at_lengths(name: str) -> None:
    torch.testing.assert_close(loss(name), loss(name, PAIR._replace(chosen_lengths=None, rejected_lengths=None)))


def test_ipo_of_sums_needs_no_lengths_and_the_error_says_so() -> None:
    bare = PAIR._replace(chosen_lengths=None, rejected_lengths=None)
    assert loss("ipo", bare, length_normalize=False).shape == (3,)
    with pytest.raises(ValueError, match="or set `length_normalize=False`"):
        loss("ipo", bare)


@pytest.mark.parametrize("field", PairLogps._fields)
def test_F5_a_trailing_dimension_never_broadcasts_to_all_pairs(field: str) -> None:
    column = getattr(PAIR, field).unsqueeze(1)
    with pytest.raises(ValueError, match=r"has shape \[3(, 1)?\]; every field must be \[B\]"):
        loss("sigmoid", PAIR._replace(**{field: column}))


def test_F5_a_column_of_options_never_broadcasts_to_all_pairs() -> None:
    with pytest.raises(ValueError, match=r"Option `delta` of loss 'bco_pair' has shape \[3, 1\]; a tensor here is one number"):
        loss("bco_pair", delta=torch.zeros(3, 1))


def test_F5_options_per_pair_act_on_their_pair_only() -> None:
    betas = torch.tensor([0.1, 0.5, 2.0])
    each = [loss("sigmoid", PairLogps(*(v[i : i + 1] for v in PAIR if v is not None)), beta=betas[i].item()) for i in range(3)]
    torch.testing.assert_close(loss("sigmoid", beta=betas), torch.cat(each))


@pytest.mark.parametrize("name", ["kto", "bco_pair", "sppo_hard"])
def test_F5_targets_per_pair_act_on_their_pair_only(name: str) -> None:
    option = {"kto": "baseline", "bco_pair": "delta", "sppo_hard": "preference"}[name]
    targets = torch.tensor([0.2, 0.9, 0.6])
    each = [loss(name, PairLogps(*(v[i : i + 1] for v in PAIR if v is not None)), **{option: targets[i]}) for i in range(3)]
    torch.testing.assert_close(loss(name, **{option: targets}), torch.cat(each))


def test_scalar_logps_raise_rather_than_lose_the_batch_dimension() -> None:
    with pytest.raises(ValueError, match=r"PairLogps.chosen has shape \[\]"):
        loss("simpo", PairLogps(torch.tensor(-1.0), torch.tensor(-2.0)))


def test_integer_logps_raise() -> None:
    with pytest.raises(TypeError, match="PairLogps.rejected must hold floating point log-probabilities, got torch.int64"):
        loss("sigmoid", PAIR._replace(rejected=torch.tensor([1, 2, 3])))


def test_inputs_are_left_as_they_were() -> None:
    before = [values.clone() for values in PAIR if values is not None]
    for name in PREFERENCE_LOSSES:
        loss(name)
        sensitivities(name, PAIR, **REQUIRED.get(name, {}))
    after = [values for values in PAIR if values is not None]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert not any(values.requires_grad for values in after)


def test_loss_options_are_the_defaults_with_the_given_ones_over_them() -> None:
    assert loss_options("simpo", gamma=0.7) == {"beta": 2.0, "gamma": 0.7}


def test_a_function_of_ones_own_is_checked_like_a_named_loss() -> None:
    def exponential(pair: PairLogps, *, beta: float = 0.1) -> Tensor:
        return (-beta * (pair.chosen - pair.rejected)).exp()

    expected = (-0.2 * (PAIR.chosen - PAIR.rejected)).exp()
    torch.testing.assert_close(preference_loss(exponential, PAIR, beta=0.2), expected)
    with pytest.raises(ValueError, match="'exponential' has no option `gamma`"):
        preference_loss(exponential, PAIR, gamma=0.2)
    with pytest.raises(ValueError, match=r"every field must be \[B\]"):
        preference_loss(exponential, PAIR._replace(rejected=PAIR.rejected[:, None]))
    with pytest.raises(ValueError, match="'exponential' does not say what it compares"):
        implicit_rewards(exponential, PAIR)


def test_a_spec_of_ones_own_works_everywhere_a_name_does() -> None:
    spec = LossSpec(
        fn=lambda pair, *, beta=0.1: -beta * pair.chosen,
        reward=lambda pair, *, beta: (beta * pair.chosen, beta * pair.rejected),
        formula="-beta * S_c",
        source="this test",
    )
    torch.testing.assert_close(preference_loss(spec, PAIR, beta=0.5), -0.5 * PAIR.chosen)
    torch.testing.assert_close(implicit_rewards(spec, PAIR)[1], 0.1 * PAIR.rejected)
    torch.testing.assert_close(sensitivities(spec, PAIR)[0], torch.full((3,), 0.1))


def test_sensitivities_work_in_inference_mode_on_tensors_made_there() -> None:
    expected = sensitivities("bco_pair", PAIR, delta=torch.tensor(0.5), beta=torch.tensor(0.2))
    with torch.inference_mode():
        copies = PairLogps(*(values.clone() for values in PAIR if values is not None))
        found = sensitivities("bco_pair", copies, delta=torch.tensor(0.5), beta=torch.tensor(0.2))
    torch.testing.assert_close(found, expected)
    assert not found[0].requires_grad


@pytest.mark.parametrize("name", PREFERENCE_LOSSES)
def test_implicit_rewards_carry_no_gradient_and_have_one_entry_per_pair(name: str) -> None:
    live = PAIR._replace(chosen=PAIR.chosen.clone().requires_grad_())
    for reward in implicit_rewards(name, live, **REQUIRED.get(name, {})):
        assert reward.shape == (3,)
        assert not reward.requires_grad


# What a margin of implicit rewards has to be, given that the loss is a function of it alone: (link of the margin, terms added).
MARGIN_LOSSES: dict[str, Any] = {
    "sigmoid": lambda m: torch.nn.functional.softplus(-m),
    "sigmoid_norm": lambda m: torch.nn.functional.softplus(-m),
    "hinge": lambda m: (1 - m).clamp(min=0),
    "ipo": lambda m: (m - 0.5).square() / 0.01,
    "simpo": lambda m: torch.nn.functional.softplus(0.5 - m),
    "alphapo": lambda m: torch.nn.functional.softplus(0.1 - m),
    "orpo": lambda m: 0.1 * torch.nn.functional.softplus(-m) - PAIR.chosen / 5,
    "cpo": lambda m: torch.nn.functional.softplus(-m) - PAIR.chosen,
    "slic_hf": lambda m: (1 - m).clamp(min=0) - 0.1 * PAIR.chosen,
    "dpop": lambda m: torch.nn.functional.softplus(-m),
    "rdpo": lambda m: torch.nn.functional.softplus(-m),
    "flex": lambda m: torch.nn.functional.softplus(-m),
}


@pytest.mark.parametrize("name", MARGIN_LOSSES)
def test_the_logged_reward_is_what_the_loss_compares(name: str) -> None:
    pair = PAIR._replace(chosen_lengths=torch.tensor([5, 5, 5]))
    chosen, rejected = implicit_rewards(name, pair)
    torch.testing.assert_close(loss(name, pair), MARGIN_LOSSES[name](chosen - rejected))


def test_loss_mix_is_the_weighted_sum_and_mpo_is_one() -> None:
    mix = LossMix([("sigmoid", 0.8), ("bco_pair", 0.2, {"beta": 0.1}), ("sft", 1.0)])
    torch.testing.assert_close(preference_loss(mix, PAIR), loss("mpo"))
    for ours, expected in zip(sensitivities(mix, PAIR), sensitivities("mpo", PAIR), strict=True):
        torch.testing.assert_close(ours, expected)


def test_loss_mix_has_the_rewards_of_its_first_term() -> None:
    mix = LossMix([("simpo", 0.5, {"beta": 3.0}), ("sigmoid", 0.5)])
    torch.testing.assert_close(implicit_rewards(mix, PAIR), implicit_rewards("simpo", PAIR, beta=3.0))


def test_loss_mix_takes_no_options_beside_those_of_its_terms() -> None:
    mix = LossMix([("sigmoid", 1.0)])
    for function in (preference_loss, implicit_rewards, sensitivities):
        with pytest.raises(ValueError, match="'LossMix' has no option `beta`: it would change nothing"):
            function(mix, PAIR, beta=0.5)


def test_loss_mix_needs_what_its_terms_need() -> None:
    assert LossMix([("simpo", 1.0)]).needs_reference is False
    assert LossMix([("simpo", 1.0), ("hinge", 1.0)]).needs_reference is True
    assert LossMix([("hinge", 1.0)]).needs_lengths is False
    assert LossMix([("ipo", 1.0, {"length_normalize": False})]).needs_lengths is False
    assert LossMix([("hinge", 1.0), ("ipo", 1.0)]).needs_lengths is True


def test_loss_mix_refuses_at_construction_what_it_cannot_compute() -> None:
    with pytest.raises(ValueError, match="did you mean 'sigmoid'"):
        LossMix([("dpo", 1.0)])
    with pytest.raises(ValueError, match="has no option `gamma`"):
        LossMix([("sigmoid", 1.0, {"gamma": 1.0})])
    with pytest.raises(ValueError, match="needs at least one term"):
        LossMix([])
    with pytest.raises(ValueError, match="Weight of 'sft' in a LossMix must be finite, got nan"):
        LossMix([("sft", float("nan"))])
