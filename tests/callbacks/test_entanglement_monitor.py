"""The monitor of gradient entanglement on real trainers: what it predicts, what it sees, and what is true."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from paired_vectors import (
    APART,
    ENTANGLED,
    Eavesdropper,
    Notebook,
    PairedVectors,
    names_of,
    random_pairs,
    row_loader,
    same_pairs,
)
from speakers import quiet_trainer
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import LlamaForCausalLM

from lightning_pref.callbacks import Probe
from lightning_pref.callbacks.entanglement import EntanglementMonitor, GradientObservation, entanglement_score
from lightning_pref.data.groups import GroupBatch, PromptGroup
from lightning_pref.models.gradient_inputs import head_inputs
from lightning_pref.modules import DPOModule
from lightning_pref.modules.optimisation import OptimizerSettings

TinyModel = Callable[..., LlamaForCausalLM]
RandomGroups = Callable[..., list[PromptGroup]]


def gradients(module: PairedVectors, rows: Tensor) -> list[Any]:
    """The log-probabilities are linear, so that features are gradients."""
    pair = module.pair(rows)
    chosen, rejected = module.pairs[rows].unbind(1)
    geometry = GradientObservation(
        row_ids=pair.row_ids,
        chosen_square=chosen.square().sum(-1),
        rejected_square=rejected.square().sum(-1),
        cross=(chosen * rejected).sum(-1),
        chosen_logps=pair.chosen_logps,
        rejected_logps=pair.rejected_logps,
        ref_chosen_logps=pair.ref_chosen_logps,
        ref_rejected_logps=pair.ref_rejected_logps,
    )
    return [pair, geometry]


def run(folder: Path, module: PairedVectors, *callbacks: L.Callback, score: Any = gradients, **settings: Any) -> Notebook:
    notebook = Notebook()
    probe = Probe("fixed", [torch.arange(5), torch.arange(5, 8)], score, every_n_updates=2, budget=None)
    trainer = quiet_trainer(
        callbacks=[probe, *callbacks], **{"logger": notebook, "max_epochs": 4, "default_root_dir": folder, **settings}
    )
    trainer.fit(module, row_loader(8))
    return notebook


def test_entangled_pairs_are_foretold_and_seen_to_fall_together(tmp_path: Path) -> None:
    monitor = EntanglementMonitor()
    notebook = run(tmp_path, PairedVectors(same_pairs(ENTANGLED)), monitor)
    found = {key: notebook.series(f"probe/fixed/entanglement/{key}") for key in ("in_band", "predicted_both_down")}
    assert {value for _, value in found["in_band"]} == {0.0}
    assert {value for _, value in found["predicted_both_down"]} == {1.0}
    both_down = notebook.series("probe/fixed/entanglement/regime_both_down")
    assert math.isnan(both_down[0][1])
    assert [value for _, value in both_down[1:]] == [1.0] * 4
    assert ("probe/fixed", "entanglement/both_down") in names_of(monitor)
    assert ("probe/fixed", "entanglement/out_of_band") in names_of(monitor)


def test_pairs_that_part_raise_nothing(tmp_path: Path) -> None:
    monitor = EntanglementMonitor()
    notebook = run(tmp_path, PairedVectors(same_pairs(APART)), monitor)
    assert {value for _, value in notebook.series("probe/fixed/entanglement/in_band")} == {1.0}
    assert [value for _, value in notebook.series("probe/fixed/entanglement/regime_up_down")[1:]] == [1.0] * 4
    assert monitor.alerts == []


def test_every_number_is_what_numpy_says(tmp_path: Path) -> None:
    pairs, ear = random_pairs(8), Eavesdropper()
    notebook = run(tmp_path, PairedVectors(pairs), EntanglementMonitor(loss_options={"beta": 0.3}), ear)
    x, y = pairs.double().numpy().transpose(1, 0, 2)
    a, b, e = (x * x).sum(-1), (y * y).sum(-1), (x * y).sum(-1)
    rounds = [seen for source, _, seen in ear.heard if source == "probe/fixed"]
    values: list[Any] = [(rounds[i], rounds[i + 1]) for i in range(0, len(rounds), 2)]
    logps = [
        np.stack([np.concatenate([getattr(seen, f"{side}_logps") for seen in both]) for side in ("chosen", "rejected")])
        for both in values
    ]
    entries = [values for _, values in notebook.entries if "probe/fixed/entanglement/cosine" in values]
    assert len(entries) == len(logps) == 5
    for number, found in enumerate(entries):
        expected = {
            "cosine": (e / np.sqrt(a * b)).mean(),
            "norm_ratio": np.sqrt(b / a).mean(),
            "sensitivity_ratio": 1.0,  # DPO pulls on both alike
            "in_band": (e <= np.minimum(a, b)).mean(),
            "predicted_both_down": (a < e).mean(),
        }
        moved = logps[number] - logps[number - 1] if number else np.full((2, 8), math.nan)
        up, down = moved[0] >= 0, moved[1] <= 0
        for name, mask in (("up_down", up & down), ("both_down", ~up & down), ("both_up", up & ~down)):
            expected[f"regime_{name}"] = mask.mean() if number else math.nan
        named = {f"probe/fixed/entanglement/{name}": value for name, value in expected.items()}
        assert found == pytest.approx(named, rel=1e-5, nan_ok=True)


def test_without_a_reference_the_first_measurement_stands_in(tmp_path: Path) -> None:
    """SPPO's pull on either side depends on how far it has moved from the reference."""
    series = []
    for tells in (True, False):
        module = PairedVectors(random_pairs(8), tells_reference=tells)
        notebook = run(tmp_path, module, EntanglementMonitor(loss="sppo_hard", loss_options={"beta": 0.1}))
        series.append([value for _, value in notebook.series("probe/fixed/entanglement/sensitivity_ratio")])
    assert series[1] == pytest.approx(series[0], rel=1e-5)
    assert series[0][0] == 1.0
    assert series[0][-1] != pytest.approx(1.0, rel=1e-3)


def test_training_batches_are_not_taken_for_the_fixed_set(tmp_path: Path) -> None:
    monitor = EntanglementMonitor()
    notebook = run(tmp_path, PairedVectors(random_pairs(8)), monitor, log_every_n_steps=1)
    assert not notebook.series("entanglement/regime_up_down")


def test_a_resumed_monitor_goes_on_from_the_last_measurement(tmp_path: Path) -> None:
    monitor = EntanglementMonitor()
    run(tmp_path, PairedVectors(random_pairs(8)), monitor)
    torch.save(monitor.state_dict(), tmp_path / "state")
    other = EntanglementMonitor()
    other.load_state_dict(torch.load(tmp_path / "state", weights_only=True))
    histories = [m.measured_state()["histories"]["probe/fixed"]["moved"]["columns"]["last_chosen"] for m in (monitor, other)]
    assert len(histories[0]) == 8
    assert torch.equal(*histories)


@pytest.mark.parametrize("tied", [False, True])
def test_on_our_module_cosine_and_band_are_those_of_autograd(
    tiny_model: TinyModel, random_groups: RandomGroups, tmp_path: Path, tied: bool
) -> None:
    groups, notebook = random_groups(3), Notebook()
    still = OptimizerSettings(learning_rate=1e-12, schedule="constant", warmup=0)
    module = DPOModule(tiny_model(tie_word_embeddings=tied), loss="simpo", optimizer=still)
    batch = GroupBatch.from_groups(groups)
    score = entanglement_score(lambda module, batch: head_inputs(module.policy, batch))
    probe = Probe("pairs", [batch], score, every_n_updates=10, budget=None)
    callbacks = [probe, EntanglementMonitor(loss="simpo")]
    trainer = quiet_trainer(callbacks=callbacks, logger=notebook, default_root_dir=tmp_path)
    trainer.fit(module, DataLoader([batch], batch_size=None))  # type: ignore[arg-type]
    model = tiny_model(tie_word_embeddings=tied).eval()
    cosines, inside, ratios = [], [], []
    for group in groups:
        found = []
        for response in group.responses:
            ids = torch.tensor([[*group.prompt.tolist(), *response.tolist()]])
            # Of the head alone: where it is tied, the embedding's part of the gradient is left out.
            states = model.model(ids).last_hidden_state[0, len(group.prompt) - 1 : -1].detach()
            logps = model.lm_head(states).log_softmax(-1).gather(1, torch.tensor(response)[:, None])
            found.append(torch.autograd.grad(logps.sum(), model.lm_head.weight)[0].double().flatten())
        a, b, e = found[0] @ found[0], found[1] @ found[1], found[0] @ found[1]
        ratio = len(group.responses[1]) / len(group.responses[0])  # SimPO: each side is divided by its length
        cosines.append((e / (a * b).sqrt()).item())
        inside.append(float(e <= ratio * a and ratio * e <= b))
        ratios.append(ratio)
    last = next(values for _, values in notebook.entries if "probe/pairs/entanglement/cosine" in values)
    assert last["probe/pairs/entanglement/cosine"] == pytest.approx(np.mean(cosines), rel=1e-4)
    assert last["probe/pairs/entanglement/in_band"] == np.mean(inside)
    assert last["probe/pairs/entanglement/sensitivity_ratio"] == pytest.approx(np.mean(ratios), rel=1e-5)


def test_silence_says_which_probe_to_attach(tmp_path: Path) -> None:
    trainer = quiet_trainer(callbacks=[EntanglementMonitor()], default_root_dir=tmp_path)
    with pytest.raises(ValueError, match="EntanglementMonitor received no observation of a probe in the first epoch of training"):
        trainer.fit(PairedVectors(random_pairs()), row_loader(8))


def test_an_option_that_the_loss_has_not_is_refused() -> None:
    with pytest.raises(ValueError, match="Loss 'sigmoid' has no option `gamma`"):
        EntanglementMonitor(loss_options={"gamma": 1.0})
