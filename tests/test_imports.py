"""The maths is usable anywhere and starts fast: what an import pulls in is part of the contract."""

from __future__ import annotations

import subprocess
import sys

import pytest

HEAVY = ("lightning", "transformers", "peft", "datasets", "torchmetrics", "tensorboard", "pyarrow")


def pulled_in_by(statement: str) -> set[str]:
    """Which heavy packages a fresh interpreter holds after a statement."""
    code = f"import sys\n{statement}\nprint(*[name for name in {HEAVY!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


@pytest.mark.parametrize(
    "statement",
    [
        "import lightning_pref",
        "from lightning_pref import PairObservation, observe, wants",
        "import lightning_pref as lp; lp.functional; lp.losses.preference_loss",
        "from lightning_pref.data import PromptGroup, GroupBatch",
    ],
)
def test_the_maths_and_the_nouns_need_torch_alone(statement: str) -> None:
    assert pulled_in_by(statement) == set()


def test_measures_add_torchmetrics_but_not_lightning() -> None:
    assert "lightning" not in pulled_in_by("import lightning_pref as lp; lp.measures.WeightedMeans")
    assert "torchmetrics" in pulled_in_by("import lightning_pref as lp; lp.measures.WeightedMeans")


def test_public_names_are_reachable_from_the_package() -> None:
    import lightning_pref as lp

    assert lp.modules.DPOModule.__name__ == "DPOModule"
    assert lp.modules.SFTModule.__name__ == "SFTModule"
    assert lp.data.PreferenceData.__name__ == "PreferenceData"
    assert lp.losses.PREFERENCE_LOSSES["sigmoid"].needs_reference
    assert {"losses", "data", "modules", "observe"} <= set(dir(lp))


def test_an_unknown_attribute_is_an_attribute_error() -> None:
    import lightning_pref as lp

    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        lp.nonsense  # noqa: B018
