import itertools
import math
import random
from typing import get_args

import pytest
import torch
from torch import Tensor

from lightning_pref.losses import PairLogps, PreferenceStructure, compile_structure, implicit_rewards, preference_loss
from lightning_pref.losses.links import Link
from lightning_pref.losses.logic import LINKS, STRUCTURES, all_structures

P, Q = 0.6, 0.3
# Ratio of good to bad probability, from the table of the paper.
RATIOS = {
    "cpo": P / Q,
    "orpo": P * (1 - Q) / (Q * (1 - P)),
    "constrained_cpo": P / ((1 - P) * Q),
    "implication": (1 - Q * (1 - P)) / (Q * (1 - P)),
    "chosen_only": P / (1 - P),
    "rejected_only": (1 - Q) / Q,
    "both": P * (1 - Q) / (1 - P * (1 - Q)),
}
MEANS = PairLogps(
    torch.tensor([-3.0, -4.0, -1.0], dtype=torch.float64),
    torch.tensor([-2.0, -9.0, -6.0], dtype=torch.float64),
    None,
    None,
    torch.tensor([2, 4, 1]),
    torch.tensor([4, 3, 2]),
)


def random_logps(size: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.empty(size, 2, dtype=torch.float64).uniform_(0.01, 0.99, generator=generator).log()


@pytest.mark.parametrize("name", STRUCTURES)
def test_log_ratio_of_a_named_structure_is_its_closed_form(name: str) -> None:
    ratio = STRUCTURES[name].log_ratio(torch.tensor([P, Q], dtype=torch.float64).log())
    assert ratio.item() == pytest.approx(math.log(RATIOS[name]))


def test_log_ratio_of_every_structure_is_its_enumeration() -> None:
    weights = {"".join(map(str, bits)): math.prod(p if b else 1 - p for b, p in zip(bits, (P, Q), strict=True))
               for bits in itertools.product((0, 1), repeat=2)}  # fmt: skip
    words = list(weights)
    subsets = [set(c) for n in range(1, 5) for c in itertools.combinations(words, n)]
    logps = torch.tensor([P, Q], dtype=torch.float64).log()
    for good, bad in itertools.product(subsets, subsets):
        expected = math.log(sum(weights[w] for w in good)) - math.log(sum(weights[w] for w in bad))
        assert PreferenceStructure.of(good, bad).log_ratio(logps).item() == pytest.approx(expected, abs=1e-12)


def test_there_are_256_structures_and_the_constant_ones_are_known() -> None:
    structures = list(all_structures())
    assert len(set(structures)) == 256
    logps = random_logps(50)
    for structure in structures:
        if structure.good and structure.bad:
            spread = structure.log_ratio(logps).std()
            assert (spread < 1e-12) == structure.is_constant


def test_entailed_structures_never_have_a_larger_loss() -> None:
    logps = random_logps(30)
    useful = [structure for structure in all_structures() if not structure.is_constant]
    entailing = [(x, y) for x, y in itertools.product(useful, useful) if x != y and x.entails(y)]
    for x, y in random.Random(0).sample(entailing, 200):
        for link in ("logistic", "hinge"):
            assert (LINKS[link](y.log_ratio(logps)) <= LINKS[link](x.log_ratio(logps)) + 1e-12).all()


def test_entailment_is_an_order() -> None:
    orpo, constrained, cpo = STRUCTURES["orpo"], STRUCTURES["constrained_cpo"], STRUCTURES["cpo"]
    assert orpo.entails(orpo)
    assert orpo.entails(constrained)
    assert cpo.entails(constrained)
    assert not constrained.entails(orpo)
    assert not constrained.entails(cpo)


def test_neighbours_differ_in_one_mark() -> None:
    neighbours = list(STRUCTURES["orpo"].neighbours())
    assert len(set(neighbours)) == 8
    assert all((n.good ^ STRUCTURES["orpo"].good).bit_count() + (n.bad ^ STRUCTURES["orpo"].bad).bit_count() == 1
               for n in neighbours)  # fmt: skip
    assert STRUCTURES["constrained_cpo"] in neighbours


def test_compiled_cpo_of_mean_log_probs_is_simpo_without_margin() -> None:
    compiled = compile_structure(STRUCTURES["cpo"])
    torch.testing.assert_close(preference_loss(compiled, MEANS, beta=2.0), preference_loss("simpo", MEANS, gamma=0.0))


def test_compiled_orpo_is_the_odds_ratio_term_of_orpo() -> None:
    odds_term = preference_loss("orpo", MEANS, beta=1.0) - preference_loss("sft", MEANS)
    torch.testing.assert_close(preference_loss(compile_structure(STRUCTURES["orpo"]), MEANS), odds_term)


def test_dpo_is_the_cpo_rule_on_conjunctions_with_the_reference() -> None:
    """C and J0 against J and C0: the atoms' log-probs add up, and the ratio is exp(z)."""
    chosen, rejected, ref_chosen, ref_rejected = -torch.tensor([[3.0], [5.0], [4.0], [2.5]], dtype=torch.float64)
    conjunctions = torch.stack([chosen + ref_rejected, rejected + ref_chosen], dim=-1)
    dpo_chosen, dpo_rejected = implicit_rewards("sigmoid", PairLogps(chosen, rejected, ref_chosen, ref_rejected), beta=1.0)
    torch.testing.assert_close(STRUCTURES["cpo"].log_ratio(conjunctions), dpo_chosen - dpo_rejected)


@pytest.mark.parametrize("link", get_args(Link))
def test_every_link_compiles_and_makes_another_loss(link: Link) -> None:
    ours = preference_loss(compile_structure(STRUCTURES["both"], link=link), MEANS)
    others = [preference_loss(compile_structure(STRUCTURES["both"], link=other), MEANS) for other in LINKS if other != link]
    assert not any(torch.allclose(ours, other) for other in others)


def test_structures_of_three_atoms_are_counted_over_eight_rows() -> None:
    first_or_second = PreferenceStructure.of(good={"100", "010", "110", "101", "011", "111"}, bad={"000", "001"})
    ratio = first_or_second.log_ratio(torch.tensor([0.5, 0.5, 0.123]).log())
    assert ratio.item() == pytest.approx(math.log(0.75 / 0.25), abs=1e-6)


@pytest.mark.parametrize(("good", "bad"), [({"10"}, {"1"}), ({"12"}, {"01"}), (set(), set())])
def test_rows_that_are_no_words_of_one_length_raise(good: set[str], bad: set[str]) -> None:
    with pytest.raises(ValueError, match="Rows must be words of one length over 0 and 1"):
        PreferenceStructure.of(good, bad)


@pytest.mark.parametrize(
    "structure", [PreferenceStructure(0b0101, 0b0101), PreferenceStructure(0, 3), PreferenceStructure(1, 2, 3)]
)
def test_structure_without_a_preference_does_not_compile(structure: PreferenceStructure) -> None:
    with pytest.raises(ValueError, match="makes no loss of pairs: it needs two atoms"):
        compile_structure(structure)
