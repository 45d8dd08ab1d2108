"""Where the probability goes, on a planted case and against plain forward passes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from paired_vectors import Notebook, PairedVectors, random_pairs, row_loader
from speakers import quiet_trainer
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import LlamaForCausalLM

from lightning_pref.callbacks import Probe
from lightning_pref.callbacks.displacement import LikelihoodDisplacementTracker
from lightning_pref.callbacks.entanglement import EntanglementMonitor, entanglement_score
from lightning_pref.callbacks.mass_shift import MassShift
from lightning_pref.data.groups import GroupBatch, PromptGroup
from lightning_pref.data.playground_tokenizer import playground_tokenizer
from lightning_pref.models.first_difference import FirstDifferenceObservation, first_differences, with_candidates
from lightning_pref.models.gradient_inputs import head_inputs
from lightning_pref.modules import DPOModule
from lightning_pref.modules.optimisation import OptimizerSettings

TinyModel = Callable[..., LlamaForCausalLM]
RandomGroups = Callable[..., list[PromptGroup]]

# Probabilities of four tokens before and after: what "no" and "never" lose, "yes" gains.
BEFORE, AFTER = torch.tensor([0.40, 0.35, 0.05, 0.20]), torch.tensor([0.10, 0.02, 0.75, 0.13])


class Scripted(PairedVectors):
    """Says what a script has for the number of updates made."""

    def __init__(self, distributions: list[Tensor]) -> None:
        super().__init__(random_pairs(8))
        self.distributions = distributions

    def at_first_difference(self, rows: Tensor) -> FirstDifferenceObservation:
        now = self.distributions[min(self.trainer.global_step, len(self.distributions) - 1)]
        size = len(rows)
        # Candidate responses: chosen, rejected, and one other that only the first row has.
        candidates = torch.stack([now[0].expand(size), now[1].expand(size), torch.where(rows == 0, now[2], torch.nan)], 1)
        return FirstDifferenceObservation(
            row_ids=rows,
            position=torch.zeros_like(rows),
            chosen_tokens=torch.zeros_like(rows),
            rejected_tokens=torch.ones_like(rows),
            token_logps=now.log().expand(size, -1),
            candidate_logps=candidates.log(),
        )


def run(folder: Path, watcher: MassShift, distributions: list[Tensor], **settings: Any) -> tuple[Notebook, L.Trainer]:
    notebook = Notebook()
    score = lambda module, rows: module.at_first_difference(rows)  # noqa: E731
    probe = Probe("talk", [torch.arange(2), torch.arange(2, 3)], score, every_n_updates=1, budget=None)
    defaults: dict[str, Any] = {"logger": notebook, "default_root_dir": folder}
    trainer = quiet_trainer(callbacks=[probe, watcher], **{**defaults, **settings})
    trainer.fit(Scripted(distributions), row_loader(8))
    return notebook, trainer


def test_planted_displacement_is_found_and_the_token_is_named(tmp_path: Path) -> None:
    tokenizer = playground_tokenizer()
    watcher = MassShift(tokenizer=tokenizer)
    notebook, _ = run(tmp_path, watcher, [BEFORE, AFTER])
    change = (AFTER - BEFORE).double()
    expected = {
        "chosen_token": change[0],
        "rejected_token": change[1],
        "other_tokens": change[2] + change[3],
        "largest_gain": change[2],
        "chosen_response": change[0],
        "rejected_response": change[1],
        "other_responses": change[2],
    }
    first, *_, last = (values for _, values in notebook.entries if "probe/talk/mass_shift/chosen_token" in values)
    assert all(value == pytest.approx(0.0, abs=1e-7) for value in first.values())
    for name, value in expected.items():
        assert last[f"probe/talk/mass_shift/{name}"] == pytest.approx(value.item(), abs=1e-6), name
    assert [(shift.token, shift.text) for shift in watcher.gainers("probe/talk")] == [(2, tokenizer.decode([2]))]
    assert [shift.token for shift in watcher.losers("probe/talk")] == [1, 0, 3]
    (alert,) = watcher.alerts
    assert (alert.name, alert.source) == ("mass_shift/goes_elsewhere", "probe/talk")
    assert "(token 2) +0.700." in alert.evidence


def test_mass_that_goes_to_the_chosen_response_raises_nothing(tmp_path: Path) -> None:
    watcher = MassShift()
    run(tmp_path, watcher, [BEFORE, torch.tensor([0.80, 0.10, 0.04, 0.06])])
    assert watcher.alerts == []
    assert [shift.token for shift in watcher.gainers("probe/talk")] == [0]


def test_tables_go_to_tensorboard(tmp_path: Path) -> None:
    logger = TensorBoardLogger(tmp_path, name="", version="")
    watcher = MassShift()
    run(tmp_path, watcher, [BEFORE, AFTER], logger=logger)
    logger.finalize("success")
    events = EventAccumulator(str(tmp_path)).Reload()
    (tag,) = [tag for tag in events.Tags()["tensors"] if tag.startswith("mass_shift")]
    text = events.Tensors(tag)[0].tensor_proto.string_val[0].decode()
    assert text == watcher.report("probe/talk")
    assert "| token 2 | +0.7000 |" in text
    assert "| 0 | candidate 1 | -2.996 | -0.288 |" in text
    assert text.count("| chosen |") == 3


def test_a_run_resumed_keeps_its_anchors(tmp_path: Path) -> None:
    watcher = MassShift()
    run(tmp_path, watcher, [BEFORE, AFTER])
    torch.save(watcher.state_dict(), tmp_path / "state")
    other = MassShift()
    other.load_state_dict(torch.load(tmp_path / "state", weights_only=True))
    assert other.report("probe/talk") == watcher.report("probe/talk") != ""


@torch.no_grad()
def plain_logps(model: LlamaForCausalLM, group: PromptGroup, position: int) -> Tensor:
    ids = torch.tensor([[*group.prompt.tolist(), *group.responses[0].tolist()[:position]]])
    return model(ids).logits[0, -1].double().log_softmax(-1)


def test_on_our_module_the_shift_is_that_of_plain_forward_passes(
    tiny_model: TinyModel, random_groups: RandomGroups, tmp_path: Path
) -> None:
    groups, watcher, notebook = random_groups(4), MassShift(), Notebook()
    settings = OptimizerSettings(learning_rate=1e-2, schedule="constant", warmup=0)
    module = DPOModule(tiny_model(), optimizer=settings)
    fixed = [with_candidates(groups[0], [[3, 4]]), groups[1]]
    score = lambda module, batch: first_differences(module.policy, batch)  # noqa: E731
    probe = Probe("pairs", [GroupBatch.from_groups(fixed)], score, every_n_updates=100, budget=None)
    trainer = quiet_trainer(callbacks=[probe, watcher], logger=notebook, max_epochs=3, default_root_dir=tmp_path)
    loader: DataLoader[Any] = DataLoader([GroupBatch.from_groups(groups)], batch_size=None)  # type: ignore[arg-type]
    trainer.fit(module, loader)
    before, after = tiny_model().eval(), module.policy.eval()
    assert isinstance(after, LlamaForCausalLM)
    changes, sides = [], []
    for group in groups[:2]:
        chosen, rejected = (response.tolist() for response in group.responses)
        position = next(i for i in range(9) if chosen[i : i + 1] != rejected[i : i + 1])
        changes.append((plain_logps(after, group, position).exp() - plain_logps(before, group, position).exp()).numpy())
        sides.append((chosen[position], rejected[position]))
    for k, name in enumerate(("chosen_token", "rejected_token")):
        expected = np.mean([change[side[k]] for change, side in zip(changes, sides, strict=True)])
        (_, last) = notebook.series(f"probe/pairs/mass_shift/{name}")[-1]
        assert last == pytest.approx(expected, rel=1e-3, abs=1e-6)
    mean = np.mean(changes, axis=0)
    gained = watcher.gainers("probe/pairs", 3)
    assert [shift.token for shift in gained] == np.argsort(-mean)[:3].tolist()
    assert [shift.change for shift in gained] == pytest.approx(np.sort(mean)[::-1][:3], rel=1e-3)


def test_one_probe_feeds_all_monitors_of_pairs(tiny_model: TinyModel, random_groups: RandomGroups, tmp_path: Path) -> None:
    batch, notebook = GroupBatch.from_groups(random_groups(4)), Notebook()
    heads = entanglement_score(lambda module, batch: head_inputs(module.policy, batch))

    def score(module: DPOModule, batch: GroupBatch) -> list[Any]:
        return [*heads(module, batch), *first_differences(module.policy, batch)]

    probe = Probe("pairs", [batch], score, every_n_updates=1, budget=None)
    watchers: list[Any] = [LikelihoodDisplacementTracker(), MassShift(), EntanglementMonitor()]
    trainer = quiet_trainer(callbacks=[probe, *watchers], logger=notebook, max_epochs=2, default_root_dir=tmp_path)
    settings = OptimizerSettings(learning_rate=1e-2, schedule="constant", warmup=0)
    trainer.fit(DPOModule(tiny_model(), optimizer=settings), DataLoader([batch], batch_size=None))  # type: ignore[arg-type]
    for watcher in watchers:
        names = {f"probe/pairs/{key.name}" for key in watcher.keys if not key.text.startswith("With details")}
        reported = {key for _, values in notebook.entries for key in values if key.startswith(f"probe/pairs/{watcher.prefix}/")}
        assert reported == names
        assert all(len(notebook.series(name)) == 3 for name in names)


def test_silence_says_which_probe_to_attach(tmp_path: Path) -> None:
    trainer = quiet_trainer(callbacks=[MassShift()], default_root_dir=tmp_path)
    with pytest.raises(ValueError, match="MassShift received no observation of a probe in the first epoch"):
        trainer.fit(PairedVectors(random_pairs()), row_loader(8))


def test_too_many_pairs_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="MassShift keeps whole distributions of at most 2 pairs per source, and got 3"):
        run(tmp_path, MassShift(max_rows=2), [BEFORE])


def test_mistakes_are_named() -> None:
    with pytest.raises(ValueError, match="`num_tokens` must be at least 1, got 0."):
        MassShift(num_tokens=0)
    assert MassShift().gainers("probe/none") == []
    assert MassShift().report("probe/none") == ""
