"""The tracker on real trainers: constructed diseases, a healthy run, and every number against NumPy."""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from paired_vectors import (
    APART,
    ENTANGLED,
    Eavesdropper,
    Notebook,
    PairedVectors,
    ResumableRows,
    names_of,
    random_pairs,
    row_loader,
    same_pairs,
)
from speakers import quiet_trainer
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader
from transformers import LlamaForCausalLM
from typing_extensions import override

from lightning_pref import PairHiddenObservation, PairObservation
from lightning_pref.alerts import ALERT_RULES
from lightning_pref.callbacks import Probe
from lightning_pref.callbacks.displacement import LikelihoodDisplacementTracker
from lightning_pref.commands.ches import ches
from lightning_pref.data.groups import GroupBatch, PromptGroup
from lightning_pref.losses import PREFERENCE_LOSSES
from lightning_pref.measures.pair_history import INTEGERS, REALS
from lightning_pref.models.pair_scores import pair_observation
from lightning_pref.modules import DPOModule
from lightning_pref.modules.optimisation import OptimizerSettings

TinyModel = Callable[..., LlamaForCausalLM]
RandomGroups = Callable[..., list[PromptGroup]]

NAMES = ("chosen_logp_change", "share", "rejected_logp_change", "both_fell", "margin_change", "chosen_logp_change_per_token")


def fit(
    folder: Path, module: L.LightningModule, *callbacks: Callback, rows: int = 8, resume: str | None = None, **settings: Any
) -> Notebook:
    notebook = Notebook()
    defaults: dict[str, Any] = {"logger": notebook, "max_epochs": 4, "log_every_n_steps": 2, "default_root_dir": folder}
    trainer = quiet_trainer(callbacks=list(callbacks), **{**defaults, **settings})
    trainer.fit(module, ResumableRows(rows), ckpt_path=resume, weights_only=True if resume else None)
    return notebook


@dataclass
class Ledger:
    """Oracle: anchors by row, and the numbers of a window, one row after the other."""

    use_reference: bool = True
    anchors: dict[int, tuple[float, float, bool]] = field(default_factory=dict)

    def window(self, heard: list[tuple[str, int, Any]]) -> dict[str, float]:
        rows, late, total = [], 0, 0
        for _, updates, seen in heard:
            for i, row in enumerate(seen.row_ids.tolist()):
                now = (seen.chosen_logps[i].item(), seen.rejected_logps[i].item())
                is_new = row not in self.anchors
                if is_new and self.use_reference and seen.ref_chosen_logps is not None:
                    self.anchors[row] = (seen.ref_chosen_logps[i].item(), seen.ref_rejected_logps[i].item(), False)
                elif is_new:
                    self.anchors[row] = (*now, updates > 0)
                anchor = self.anchors[row]
                total, late = total + 1, late + anchor[2]
                if not (is_new and anchor[2]):
                    rows.append((now[0] - anchor[0], now[1] - anchor[1], seen.chosen_lengths[i].item()))
        table = np.array(rows, dtype=np.float64).reshape(-1, 3)
        if not len(table):
            return {**dict.fromkeys(NAMES, math.nan), "late_anchors": late / total, "left_out": 0.0}
        chosen, rejected, lengths = table.T
        return {
            "chosen_logp_change": chosen.mean(),
            "share": (chosen < 0).mean(),
            "rejected_logp_change": rejected.mean(),
            "both_fell": ((chosen < 0) & (rejected < 0)).mean(),
            "margin_change": (chosen - rejected).mean(),
            "chosen_logp_change_per_token": (chosen / lengths).mean(),
            "late_anchors": late / total,
            "left_out": 0.0,
        }


@pytest.mark.parametrize("anchor", ["auto", "first", "reference"])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_every_logged_number_is_what_a_ledger_says(tmp_path: Path, anchor: Any, accumulate: int) -> None:
    tracker, ear = LikelihoodDisplacementTracker(anchor=anchor, every_n_updates=2), Eavesdropper()
    module = PairedVectors(random_pairs(16))
    notebook = fit(tmp_path, module, tracker, ear, rows=16, accumulate_grad_batches=accumulate)
    ledger, windows = Ledger(use_reference=anchor != "first"), 2 * accumulate
    parts = [ear.heard[start : start + windows] for start in range(0, len(ear.heard), windows)]
    assert len(notebook.entries) == len(parts) == 16 // windows
    for (_, found), part in zip(notebook.entries, parts, strict=True):
        expected = {f"displacement/{name}": value for name, value in ledger.window(part).items()}
        assert found == pytest.approx(expected, rel=1e-6, abs=1e-9, nan_ok=True)


def test_rows_seen_late_say_nothing_at_first_sight_and_the_tracker_tells_how_many_they_are(tmp_path: Path) -> None:
    tracker, ear = LikelihoodDisplacementTracker(every_n_updates=2), Eavesdropper()
    notebook = fit(tmp_path, PairedVectors(random_pairs(16), tells_reference=False), tracker, ear, rows=16)
    ledger = Ledger()
    parts = [ear.heard[start : start + 2] for start in range(0, len(ear.heard), 2)]
    for (_, found), part in zip(notebook.entries, parts, strict=True):
        expected = {f"displacement/{name}": value for name, value in ledger.window(part).items()}
        assert found == pytest.approx(expected, rel=1e-6, abs=1e-9, nan_ok=True)
    # The first batch of four was seen before the first update; the other twelve rows were not.
    assert [found["displacement/late_anchors"] for _, found in notebook.entries[-2:]] == [0.5, 1.0]
    (alert,) = tracker.alerts
    assert (alert.source, alert.name, alert.level) == ("train", "displacement/late_anchors", "info")
    # At the first report, after two batches of four.
    assert alert.evidence.endswith("Of 8 rows of this process 4 were first seen after an update, the last after 1.")


def test_planted_displacement_is_found_and_its_rows_are_named(tmp_path: Path) -> None:
    pairs = same_pairs(ENTANGLED)
    pairs[5] *= 1.3
    tracker = LikelihoodDisplacementTracker(ches=True)
    notebook = fit(tmp_path, PairedVectors(pairs), tracker)
    _, last = notebook.entries[-1]
    assert last["displacement/share"] == last["displacement/both_fell"] == 1.0
    assert last["displacement/margin_change"] > 0 > last["displacement/chosen_logp_change"]
    assert ("train", "displacement/chosen_falls") in names_of(tracker)
    (alert,) = [alert for alert in tracker.alerts if alert.name == "displacement/chosen_falls"]
    assert "Fell furthest: row 1005 (-" in alert.evidence
    assert "length-normalised CHES" in alert.evidence
    assert "--drop_top 5%" in alert.advice
    assert tracker.worst_rows()[0].row_id == 1005


def test_a_healthy_run_is_silent(tmp_path: Path) -> None:
    tracker = LikelihoodDisplacementTracker()
    notebook = fit(tmp_path, PairedVectors(same_pairs(APART)), tracker, max_epochs=10)
    assert notebook.entries[-1][1]["displacement/chosen_logp_change"] > 1
    assert tracker.alerts == []
    assert tracker.worst_rows() == ()


def test_unlearning_the_preference_is_critical(tmp_path: Path) -> None:
    tracker = LikelihoodDisplacementTracker()
    pairs = same_pairs(((1.5, 0.5), (1.0, 0.0)))
    fit(tmp_path, PairedVectors(pairs, sign=-1.0), tracker, max_epochs=8)
    (alert,) = [alert for alert in tracker.alerts if alert.name == "displacement/chosen_falls_faster"]
    assert alert.level == "critical"


def test_responses_that_both_fall_while_the_margin_grows_are_worth_an_info(tmp_path: Path) -> None:
    pairs = same_pairs(ENTANGLED)
    tracker = LikelihoodDisplacementTracker(thresholds={"displacement/chosen_falls/share": math.nan})
    fit(tmp_path, PairedVectors(pairs), tracker, max_epochs=20)
    assert [(alert.level, alert.name) for alert in tracker.alerts] == [("info", "displacement/both_fall")]


def test_details_agree_with_numpy(tmp_path: Path) -> None:
    tracker, ear = LikelihoodDisplacementTracker(ches=True, details=True, every_n_updates=4), Eavesdropper()
    pairs = random_pairs(16)
    notebook = fit(tmp_path, PairedVectors(pairs), tracker, ear, rows=16)
    series = []
    for (_, found), start in zip(notebook.entries, range(0, 16, 4), strict=True):
        seen = [observation for _, _, observation in ear.heard[start : start + 4]]
        chosen = np.concatenate([s.chosen_logps.numpy().astype(np.float64) + 20.0 for s in seen])
        rejected = np.concatenate([s.rejected_logps.numpy().astype(np.float64) + 20.0 for s in seen])
        rows = np.concatenate([s.row_ids.numpy() for s in seen]) - 1000
        tokens = np.concatenate([s.rejected_lengths.numpy() for s in seen])
        assert found["displacement/rejected_logp_change_per_token"] == pytest.approx((rejected / tokens).mean(), abs=1e-7)
        for name, level in (("q05", 0.05), ("median", 0.5), ("q95", 0.95)):
            assert found[f"displacement/chosen_logp_change_{name}"] == pytest.approx(np.quantile(chosen, level), abs=1e-7)
        sums = [(pairs[row, 0].double() / (row % 3 + 1), pairs[row, 1].double() / (row % 2 + 2)) for row in rows.tolist()]
        scores = np.array([((c * r).sum() - (c * c).sum()).item() for c, r in sums])
        if start:  # before the first update nothing has moved, so that ranks are all ties
            ranks = [np.argsort(np.argsort(values)) for values in (scores, chosen)]
            assert found["displacement/ches_correlation"] == pytest.approx(np.corrcoef(*ranks)[0, 1], abs=0.02)
        series.append(chosen.mean())
        falls = [before - after for i, before in enumerate([0.0, *series]) for after in [0.0, *series][i:]]
        assert found["displacement/max_drawdown"] == pytest.approx(max(falls), abs=1e-6)


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
def test_a_run_resumed_in_the_middle_keeps_its_anchors_and_ends_with_the_same_table(tmp_path: Path) -> None:
    pairs, settings = random_pairs(16), {"rows": 16, "log_every_n_steps": 3}
    whole, first, second = (LikelihoodDisplacementTracker(ches=True, details=True) for _ in range(3))
    straight = fit(tmp_path, PairedVectors(pairs, tells_reference=False), whole, **settings)
    checkpoint = ModelCheckpoint(dirpath=tmp_path / "saved", filename="middle", every_n_train_steps=7, save_top_k=-1)
    middle = tmp_path / "saved" / "middle.ckpt"
    module = PairedVectors(pairs, tells_reference=False)
    fit(tmp_path, module, first, checkpoint, max_steps=7, enable_checkpointing=True, **settings)
    resumed = fit(tmp_path, PairedVectors(pairs, tells_reference=False), second, resume=str(middle), **settings)
    for name in ("row_ids", "places", *INTEGERS, *REALS):
        assert torch.equal(whole.history().column(name).nan_to_num(), second.history().column(name).nan_to_num()), name
    assert whole.worst_rows() == second.worst_rows()
    # The window that the checkpoint cut in two is whole again.
    after = [(step, values) for step, values in straight.entries if step is not None and step > 7]
    assert [step for step, _ in resumed.entries] == [step for step, _ in after]
    for (_, found), (_, expected) in zip(resumed.entries, after, strict=True):
        assert found == pytest.approx(expected, nan_ok=True)


@pytest.mark.parametrize("layout", ["padded", "packed", "shared"])
def test_a_probe_of_our_module_shows_the_change_since_the_start(
    tiny_model: TinyModel, random_groups: RandomGroups, tmp_path: Path, layout: Any
) -> None:
    groups, fixed = random_groups(6), random_groups(3, seed=9)
    settings = OptimizerSettings(learning_rate=1e-2, schedule="constant", warmup=0)
    module = DPOModule(tiny_model(), optimizer=settings, layout=layout)
    batches = [GroupBatch.from_groups(fixed[:2]), GroupBatch.from_groups(fixed[2:])]
    score = lambda module, batch: pair_observation(module.policy, batch)  # noqa: E731
    probe = Probe("fixed", batches, score, every_n_updates=2, budget=None)
    tracker, notebook = LikelihoodDisplacementTracker(), Notebook()
    trainer = quiet_trainer(callbacks=[probe, tracker], logger=notebook, max_epochs=4, default_root_dir=tmp_path)
    loader: DataLoader[Any] = DataLoader(  # type: ignore[arg-type]
        [GroupBatch.from_groups(groups[:3]), GroupBatch.from_groups(groups[3:])], batch_size=None
    )
    trainer.fit(module, loader)

    @torch.no_grad()
    def summed(model: LlamaForCausalLM, group: PromptGroup, place: int) -> float:
        ids = torch.tensor([[*group.prompt.tolist(), *group.responses[place].tolist()]])
        logps = model(ids).logits[0, len(group.prompt) - 1 : -1].log_softmax(-1)
        return logps.gather(1, ids[0, len(group.prompt) :, None]).sum().item()

    after, before = module.policy.eval(), tiny_model().eval()
    assert isinstance(after, LlamaForCausalLM)
    changes = np.array([[summed(after, g, place) - summed(before, g, place) for place in (0, 1)] for g in fixed])
    series = notebook.series("probe/fixed/displacement/chosen_logp_change")
    assert [step for step, _ in series] == [0, 2, 4, 6, 8]
    assert series[0][1] == 0.0
    assert series[-1][1] == pytest.approx(changes[:, 0].mean(), rel=1e-3)
    rejected = notebook.series("probe/fixed/displacement/rejected_logp_change")
    assert rejected[-1][1] == pytest.approx(changes[:, 1].mean(), rel=1e-3)
    table = tracker.history("probe/fixed")
    assert table.column("row_ids").tolist() == [0, 1, 2]
    assert (table.column("last_chosen") - table.column("anchor_chosen")).tolist() == pytest.approx(changes[:, 0], rel=1e-3)
    # Training rows are compared with the reference, which is where this policy began.
    assert notebook.series("displacement/late_anchors")[-1][1] == 0.0
    assert tracker.history().column("anchor_step").tolist() == [-1] * 6


def test_all_pairs_of_a_ranked_row_are_followed_apart(tiny_model: TinyModel, random_groups: RandomGroups, tmp_path: Path) -> None:
    tracker = LikelihoodDisplacementTracker(anchor="first", ches=True)
    loader: DataLoader[Any] = DataLoader([GroupBatch.from_groups(random_groups(2, 3))], batch_size=None)  # type: ignore[arg-type]
    still = OptimizerSettings(learning_rate=1e-12, schedule="constant", warmup=0)
    trainer = quiet_trainer(callbacks=[tracker], max_epochs=2, default_root_dir=tmp_path)
    trainer.fit(DPOModule(tiny_model(), optimizer=still), loader)
    table = tracker.history()
    assert table.column("row_ids").tolist() == [0, 0, 0, 1, 1, 1]
    assert table.column("places").tolist() == [0, 1, 2, 0, 1, 2]
    assert table.column("num_sights").tolist() == [2] * 6
    assert torch.allclose(table.column("last_chosen"), table.column("anchor_chosen"), atol=1e-4)
    assert len(table.column("ches").unique()) == 6


def test_validation_has_a_table_and_keys_of_its_own(tmp_path: Path) -> None:
    tracker, notebook = LikelihoodDisplacementTracker(), Notebook()
    trainer = quiet_trainer(callbacks=[tracker], logger=notebook, max_epochs=2, default_root_dir=tmp_path)
    trainer.fit(PairedVectors(same_pairs(APART)), row_loader(8), row_loader(3))
    assert len(notebook.series("val/displacement/share")) == 2
    assert len(tracker.history("val")) == 3
    assert len(tracker.history()) == 8


class NoQuestions(TorchDispatchMode):
    """Raises where a value would be fetched, or a shape depend on one: on a GPU each of these waits for the device."""

    asking = ("_local_scalar_dense", "nonzero", "is_nonzero", "equal", "masked_select")

    @override
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        is_index = name == "index" and any(t is not None and t.dtype == torch.bool for t in args[1])
        assert name not in self.asking and not is_index, f"{name} asks the device for a value"
        return func(*args, **(kwargs or {}))


def test_M5_hearing_an_observation_asks_the_device_for_nothing() -> None:
    tracker = LikelihoodDisplacementTracker(ches=True, details=True)
    module = PairedVectors(random_pairs(8))
    rows = torch.arange(8)
    pair = module.pair(rows)
    hidden = PairHiddenObservation(
        chosen_hidden=torch.randn(8, 3),
        rejected_hidden=torch.randn(8, 3),
        chosen_lengths=rows + 1,
        rejected_lengths=rows + 1,
        row_ids=rows,
    )
    bare = replace(pair, chosen_lengths=None, rejected_lengths=None, ref_chosen_logps=None, ref_rejected_logps=None)
    with torch.no_grad(), NoQuestions():
        for observation in (pair, hidden, bare):
            tracker.receive(observation, "train")
    assert tracker.history().column("num_sights").tolist() == [2] * 8


def test_a_missing_reference_is_refused_where_it_is_the_anchor(tmp_path: Path) -> None:
    tracker = LikelihoodDisplacementTracker(anchor="reference")
    with pytest.raises(ValueError, match=r"\(anchor='reference'\) received a PairObservation without `ref_chosen_logps`"):
        fit(tmp_path, PairedVectors(random_pairs(), tells_reference=False), tracker)


def test_ches_without_hidden_states_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"\(ches=True\) received no PairHiddenObservation in an epoch of training"):
        fit(tmp_path, PairedVectors(random_pairs(), tells_hidden=False), LikelihoodDisplacementTracker(ches=True))


def test_hidden_states_are_asked_for_only_with_ches() -> None:
    assert LikelihoodDisplacementTracker().consumes == (PairObservation,)
    assert LikelihoodDisplacementTracker(ches=True).consumes == (PairObservation, PairHiddenObservation)


def test_rows_beyond_the_table_are_counted_and_said(tmp_path: Path) -> None:
    tracker = LikelihoodDisplacementTracker(anchor="first", max_rows=4)
    notebook = fit(tmp_path, PairedVectors(random_pairs()), tracker)
    assert {values["displacement/left_out"] for _, values in notebook.entries} == {0.5}
    (alert,) = [alert for alert in tracker.alerts if alert.name == "displacement/left_out"]
    assert alert.evidence.endswith("In this process 4 sights found no room, 0 were not finite.")
    assert len(tracker.history()) == 4


@pytest.mark.parametrize("prefix", ["displacement", "mass_shift", "entanglement"])
def test_losses_and_flags_that_alerts_advise_exist(prefix: str) -> None:
    advice = " ".join(rule.advice for name, rule in ALERT_RULES.items() if name.startswith(f"{prefix}/"))
    mixes = [part.split(":")[0].strip() for mix in re.findall(r"`loss: {(.*?)}`", advice) for part in mix.split(",")]
    named = [*mixes, *re.findall(r"`loss: (\w+)`", advice)]
    assert set(named) <= set(PREFERENCE_LOSSES)
    assert {"sigmoid", "sft"} <= set(named)
    flags = re.findall(r"--(\w+)", advice)
    assert set(flags) <= set(inspect.signature(ches).parameters)


def test_mistakes_are_named() -> None:
    with pytest.raises(ValueError, match="`num_worst` must be at least 1, got 0."):
        LikelihoodDisplacementTracker(num_worst=0)
    with pytest.raises(ValueError, match="`max_rows` must be at least 1, got -1."):
        LikelihoodDisplacementTracker(max_rows=-1)
    with pytest.raises(ValueError, match="No pairs were seen of 'val'; sources with pairs: none yet."):
        LikelihoodDisplacementTracker().history("val")
