import runpy
from collections.abc import Mapping
from pathlib import Path

import pytest

from lightning_pref.losses import FORGET_LOSSES, GROUP_LOSSES, PREFERENCE_LOSSES, UNPAIRED_LOSSES, LossSpec
from lightning_pref.losses.registry import ALSO_CALLED

DOCS = Path(__file__).parents[2] / "docs"
REGISTRIES: list[Mapping[str, LossSpec]] = [PREFERENCE_LOSSES, UNPAIRED_LOSSES, FORGET_LOSSES, GROUP_LOSSES]

# The names that other code and other people's configurations rely on.
NAMES_OF_TRL = {
    "sigmoid", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "aot", "aot_unpaired", "apo_zero",
    "apo_down", "discopop", "sft", "sigmoid_norm", "simpo", "alphapo", "orpo", "cpo",
}  # fmt: skip
NAMES_OF_PAPERS = {
    "cdpo", "slic_hf", "rrhf", "dpop", "rdpo", "rpo", "mpo", "flex", "inpo", "kto", "npo", "simnpo",
}  # fmt: skip


def test_the_public_names_are_there() -> None:
    assert set(PREFERENCE_LOSSES) >= NAMES_OF_TRL | NAMES_OF_PAPERS
    assert set(UNPAIRED_LOSSES) == {"kto", "bco", "apo_zero_unpaired"}
    assert set(FORGET_LOSSES) == {"npo", "simnpo"}


@pytest.mark.parametrize("registry", REGISTRIES)
def test_every_entry_says_what_it_is(registry: Mapping[str, LossSpec]) -> None:
    for name, spec in registry.items():
        assert spec.fn.__name__ == name
        assert spec.fn.__doc__, name
        assert spec.formula, name
        assert spec.source, name


def test_every_pairwise_loss_says_what_it_compares() -> None:
    assert all(spec.reward is not None for spec in PREFERENCE_LOSSES.values())


def test_hints_lead_to_names_that_exist_and_never_hide_one() -> None:
    assert set(ALSO_CALLED.values()) <= set(PREFERENCE_LOSSES)
    assert not set(ALSO_CALLED) & set(PREFERENCE_LOSSES)


def test_the_page_of_losses_is_up_to_date_and_lists_every_entry() -> None:
    text = (DOCS / "losses.md").read_text()
    assert text == runpy.run_path(str(DOCS / "make_losses.py"))["page"]()
    for registry in REGISTRIES:
        for name, spec in registry.items():
            assert f"### `{name}`" in text
            assert all(f"`{option}" in text for option in spec.options)
