"""Our losses against numbers that TRL's own code returned (tests/fixtures/make_trl_losses.py). TRL is not needed here."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_pref.losses import (
    PREFERENCE_LOSSES,
    LossMix,
    PairLogps,
    PreferenceLoss,
    ScoredTokens,
    apo_zero_unpaired,
    kto,
    kto_baseline,
    length_decoupled_sums,
    preference_loss,
    sensitivities,
    wpo_weights,
)

FIXTURE = json.loads((Path(__file__).parents[1] / "fixtures" / "trl_losses.json").read_text())
TOKENS: dict[str, list[list[float]]] = FIXTURE["tokens"]
BETA = 0.3

# TRL's case -> our loss and options, where the name or an option differs; options here replace the shared beta.
OURS: dict[str, tuple[PreferenceLoss, dict[str, Any]]] = {
    "sigmoid/forward_kl": ("sigmoid", {"beta": BETA, "f_divergence": "forward_kl"}),
    "sigmoid/js_divergence": ("sigmoid", {"beta": BETA, "f_divergence": "js_divergence"}),
    "sigmoid/alpha_divergence": ("sigmoid", {"beta": BETA, "f_divergence": 0.3}),
    # TRL 1.x accepts the option there and ignores it.
    "sigmoid/label_smoothing_ignored": ("sigmoid", {"beta": BETA}),
    "ipo/forward_kl": ("ipo", {"beta": BETA, "f_divergence": "forward_kl"}),
    "exo_pair": ("exo_pair", {"beta": BETA, "label_smoothing": 1e-3}),
    "robust": ("robust", {"beta": BETA, "label_smoothing": 0.2}),
    "aot": ("aot", {"beta": BETA, "label_smoothing": 0.1}),
    "aot_unpaired": ("aot_unpaired", {"beta": BETA, "label_smoothing": 0.1}),
    "sft": ("sft", {}),
    "sigmoid+bco_pair+sft": (
        LossMix([("sigmoid", 0.8, {"beta": BETA}), ("bco_pair", 0.2, {"beta": BETA}), ("sft", 1.0)]),
        {},
    ),
}
# Checked in tests of their own below.
SPECIAL = {"sigmoid/ld", "sigmoid/wpo", "sft/batched"}
DPO_NAMES = [name for name in FIXTURE["dpo"] if name not in SPECIAL]


def sums(key: str) -> Tensor:
    return torch.tensor([sum(row) for row in TOKENS[key]], dtype=torch.float64)


def lengths(side: str) -> Tensor:
    return torch.tensor([len(row) for row in TOKENS[f"{side}_logps"]])


def pair() -> PairLogps:
    keys = ("chosen_logps", "rejected_logps", "chosen_ref_logps", "rejected_ref_logps")
    return PairLogps(*map(sums, keys), lengths("chosen"), lengths("rejected"))


def without_reference() -> PairLogps:
    zeros = torch.zeros(6, dtype=torch.float64)
    return pair()._replace(ref_chosen=zeros, ref_rejected=zeros)


def trl(name: str, field: str) -> Tensor:
    batches = FIXTURE["dpo"][name]["batches"]
    values = [batch[field] if isinstance(batch[field], list) else [batch[field]] for batch in batches]
    return torch.tensor([value for batch in values for value in batch], dtype=torch.float64)


def scored(key: str) -> ScoredTokens:
    """Chosen and rejected responses in one flat run, the chosen first."""
    rows = TOKENS[f"chosen_{key}"] + TOKENS[f"rejected_{key}"]
    sizes = torch.tensor([len(row) for row in rows])
    flat = torch.tensor([value for row in rows for value in row], dtype=torch.float64)
    return ScoredTokens(flat, torch.arange(12).repeat_interleave(sizes), sizes)


def assert_close(ours: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_the_fixture_says_where_it_comes_from() -> None:
    assert FIXTURE["provenance"]["trl"] == "1.16.0"


def test_every_name_that_trl_shares_has_a_case() -> None:
    claimed = {name for name, spec in PREFERENCE_LOSSES.items() if f"TRL `{name}`" in spec.peers}
    assert claimed <= {name.partition("/")[0] for name in FIXTURE["dpo"]}


@pytest.mark.parametrize("name", DPO_NAMES)
def test_F1_loss_is_trls(name: str) -> None:
    loss, options = OURS.get(name, (name, {"beta": BETA} if name != "discopop" else {"beta": BETA, "tau": 0.05}))
    ours, theirs = preference_loss(loss, pair(), **options), trl(name, "loss")
    assert_close(ours.mean(0, keepdim=True) if len(theirs) == 1 else ours, theirs)


@pytest.mark.parametrize("name", DPO_NAMES)
def test_F1_gradient_is_trls(name: str) -> None:
    loss, options = OURS.get(name, (name, {"beta": BETA} if name != "discopop" else {"beta": BETA, "tau": 0.05}))
    d_c, d_r = sensitivities(loss, pair(), **options)
    assert_close(d_c, trl(name, "d_chosen"))
    assert_close(d_r, trl(name, "d_rejected"))


def test_F2_length_decoupled_dpo_is_trls() -> None:
    chosen, rejected = torch.arange(6), torch.arange(6, 12)
    sides = [length_decoupled_sums(scored(key), chosen, rejected, alpha=0.4) for key in ("logps", "ref_logps")]
    ours = preference_loss("sigmoid", PairLogps(*sides[0], *sides[1]), beta=BETA)
    assert_close(ours, trl("sigmoid/ld", "loss"))


def test_wpo_weights_are_trls() -> None:
    weights = wpo_weights(scored("logps"), scored("collision").token_logps)
    ours = preference_loss("sigmoid", pair(), beta=BETA) * weights[:6] * weights[6:]
    assert_close(ours, trl("sigmoid/wpo", "loss"))


def test_trls_sft_of_a_batch_weighs_tokens_and_ours_weighs_responses() -> None:
    """The difference that the registry's note on `sft` names: equal on one pair, apart on a batch of unequal lengths."""
    ours, n = preference_loss("sft", pair()), lengths("chosen")
    (theirs,) = trl("sft/batched", "loss")
    assert_close((ours * n).sum() / n.sum(), theirs)
    assert not torch.isclose(ours.mean(), theirs, rtol=1e-3)


@pytest.mark.parametrize(
    ("name", "ours", "options"),
    [
        ("sigmoid", "cpo", {"beta": BETA, "alpha": 0.0}),
        ("sigmoid/label_smoothing", "cdpo", {"beta": BETA, "label_smoothing": 0.2}),
        ("hinge", "hinge", {"beta": BETA}),
        ("ipo", "ipo", {"beta": BETA}),
        ("simpo", "simpo", {"beta": 2.0, "gamma": 0.5}),
        ("alphapo", "alphapo", {"beta": 2.0, "gamma": 0.5, "alpha": 0.25}),
    ],
)
def test_F1_cpo_family_is_trls(name: str, ours: str, options: dict[str, Any]) -> None:
    theirs = torch.tensor(FIXTURE["cpo"][name]["losses"], dtype=torch.float64)
    assert_close(preference_loss(ours, without_reference(), **options), theirs)


def test_F1_orpo_is_trls() -> None:
    assert_close(preference_loss("orpo", pair(), beta=BETA), torch.tensor(FIXTURE["orpo"], dtype=torch.float64))


def test_F1_kto_is_trls() -> None:
    case = FIXTURE["kto"]["kto"]
    mismatched = sums("rejected_logps") - sums("rejected_ref_logps")
    baseline = kto_baseline(mismatched.sum(), len(mismatched))
    assert baseline.item() == pytest.approx(case["baseline"])
    losses = kto(
        sums("chosen_logps"),
        sums("chosen_ref_logps"),
        torch.tensor(case["labels"]),
        baseline=baseline,
        beta=BETA,
        desirable_weight=1.2,
        undesirable_weight=0.9,
    )
    assert losses.mean().item() == pytest.approx(case["loss"], abs=1e-5)


def test_F1_apo_zero_unpaired_is_trls() -> None:
    case = FIXTURE["kto"]["apo_zero_unpaired"]
    labels = torch.tensor(case["labels"])
    losses = apo_zero_unpaired(sums("chosen_logps"), sums("chosen_ref_logps"), labels, beta=BETA)
    weighted = torch.where(labels, 1.2, 0.9) * losses
    assert weighted.mean().item() == pytest.approx(case["loss"], abs=1e-5)
