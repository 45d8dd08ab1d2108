"""What DPOModule tells the callbacks, through the same door as anyone's module."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from speakers import quiet_trainer
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import LlamaForCausalLM
from typing_extensions import override

from lightning_pref import Observation, Observer, PairHiddenObservation, PairObservation
from lightning_pref.data.groups import GroupBatch, PromptGroup, WindowCounts
from lightning_pref.modules import DPOModule
from lightning_pref.modules.optimisation import OptimizerSettings

TinyModel = Callable[..., LlamaForCausalLM]
RandomGroups = Callable[..., list[PromptGroup]]

STILL = OptimizerSettings(learning_rate=1e-12, schedule="constant", warmup=0)


class PairListener(Callback, Observer):
    consumes: Any = (PairObservation,)

    def __init__(self) -> None:
        self.heard: list[Any] = []

    @override
    def on_observation(self, trainer: L.Trainer, pl_module: L.LightningModule, observation: Observation, source: str) -> None:
        self.heard.append(observation)


class HiddenListener(PairListener):
    consumes = (PairHiddenObservation,)


class BothListener(PairListener):
    consumes = (PairObservation, PairHiddenObservation)


class Watching(DPOModule):
    """Notes what it asks of the forward."""

    wanted: list[set[str]]

    @override
    def policy_logps(self, batch: GroupBatch, want: Any = ()) -> Any:
        self.wanted.append(set(want))
        return super().policy_logps(batch, want)


def fit(folder: Path, module: DPOModule, batches: list[GroupBatch], callbacks: list[Callback], **settings: Any) -> DPOModule:
    if isinstance(module, Watching):
        module.wanted = []
    trainer = quiet_trainer(callbacks=callbacks, default_root_dir=folder, **settings)
    loader: DataLoader[Any] = DataLoader(batches, batch_size=None)  # type: ignore[arg-type]
    trainer.fit(module, loader)
    return module


@torch.no_grad()
def scored(model: LlamaForCausalLM, group: PromptGroup) -> list[tuple[float, Tensor]]:
    """Oracle: of each response alone behind its prompt, the summed log-prob and the summed states that predict its tokens."""
    found = []
    for response in group.responses:
        ids = torch.tensor([[*group.prompt.tolist(), *response.tolist()]])
        states = model.model(ids).last_hidden_state[0, len(group.prompt) - 1 : -1]
        logps = model.lm_head(states).log_softmax(-1).gather(1, ids[0, len(group.prompt) :, None])
        found.append((float(logps.sum()), states.sum(0)))
    return found


@pytest.mark.parametrize("layout", ["padded", "packed", "shared"])
def test_pairs_and_their_hidden_sums_are_those_of_the_rows_one_by_one(
    tiny_model: TinyModel, random_groups: RandomGroups, tmp_path: Path, layout: Any
) -> None:
    groups = random_groups()
    tiny_model(1).save_pretrained(tmp_path / "reference")
    listener = BothListener()
    module = DPOModule(tiny_model(), reference_model=str(tmp_path / "reference"), layout=layout, optimizer=STILL)
    fit(tmp_path, module, [GroupBatch.from_groups(groups)], [listener])
    pair, hidden = listener.heard
    policy, reference = ([scored(tiny_model(seed), group) for group in groups] for seed in (0, 1))
    sides = {"chosen": 0, "rejected": 1}
    assert pair.row_ids.tolist() == hidden.row_ids.tolist() == [0, 1, 2, 3]
    for side, place in sides.items():
        assert getattr(pair, f"{side}_logps").tolist() == pytest.approx([row[place][0] for row in policy], rel=1e-4)
        assert getattr(pair, f"ref_{side}_logps").tolist() == pytest.approx([row[place][0] for row in reference], rel=1e-4)
        lengths = [len(group.responses[place]) for group in groups]
        assert getattr(pair, f"{side}_lengths").tolist() == getattr(hidden, f"{side}_lengths").tolist() == lengths
        expected = torch.stack([row[place][1] for row in policy])
        assert torch.allclose(getattr(hidden, f"{side}_hidden"), expected, atol=1e-3, rtol=1e-4)


def test_without_a_reference_there_are_no_reference_log_probabilities(
    tiny_model: TinyModel, random_groups: RandomGroups, tmp_path: Path
) -> None:
    listener = PairListener()
    fit(tmp_path, DPOModule(tiny_model(), loss="simpo", optimizer=STILL), [GroupBatch.from_groups(random_groups())], [listener])
    (pair,) = listener.heard
    assert pair.ref_chosen_logps is None
    assert pair.ref_rejected_logps is None


def test_every_pair_of_a_ranked_prompt_is_told(tiny_model: TinyModel, random_groups: RandomGroups, tmp_path: Path) -> None:
    groups = random_groups(2, 3)
    listener = BothListener()
    fit(tmp_path, DPOModule(tiny_model(), optimizer=STILL), [GroupBatch.from_groups(groups)], [listener])
    pair, hidden = listener.heard
    assert pair.row_ids.tolist() == [0, 0, 0, 1, 1, 1]
    values = [[value for value, _ in scored(tiny_model(), group)] for group in groups]
    expected = [row[better] for row in values for better in (0, 0, 1)]
    assert pair.chosen_logps.tolist() == pytest.approx(expected, rel=1e-4)
    assert hidden.chosen_hidden.shape == (6, 32)


def test_sums_are_plain_where_the_loss_weighs_tails(tiny_model: TinyModel, random_groups: RandomGroups, tmp_path: Path) -> None:
    groups = random_groups()
    heard = []
    for tail_weight in (1.0, 0.0):
        listener = PairListener()
        module = DPOModule(tiny_model(), tail_weight=tail_weight, optimizer=STILL)
        fit(tmp_path, module, [GroupBatch.from_groups(groups)], [listener])
        heard.append(listener.heard[0])
    for name in ("chosen_logps", "rejected_logps", "ref_chosen_logps", "ref_rejected_logps"):
        assert torch.allclose(getattr(heard[0], name), getattr(heard[1], name), atol=1e-5)


def test_rows_that_only_fill_a_batch_are_not_told(tiny_model: TinyModel, random_groups: RandomGroups, tmp_path: Path) -> None:
    groups = random_groups(3)
    filler = PromptGroup(row_id=0, prompt=groups[0].prompt, responses=groups[0].responses, ranks=(0, 1), weight=0.0)
    update = WindowCounts(groups=4, responses=8, response_tokens=40)
    batches = [GroupBatch.from_groups(part, window=update) for part in ([*groups, filler], groups[:1], [filler])]
    listener = BothListener()
    fit(tmp_path, DPOModule(tiny_model(), optimizer=STILL), batches, [listener])
    assert [observation.row_ids.tolist() for observation in listener.heard] == [[0, 1, 2], [0, 1, 2], [0], [0]]


@pytest.mark.parametrize(
    ("listeners", "wanted"), [([], set()), ([PairListener], set()), ([HiddenListener], {"hidden"}), ([BothListener], {"hidden"})]
)
def test_hidden_states_are_made_only_where_someone_listens(
    tiny_model: TinyModel, random_groups: RandomGroups, tmp_path: Path, listeners: list[type[Callback]], wanted: set[str]
) -> None:
    module = Watching(tiny_model(), optimizer=STILL)
    fit(tmp_path, module, [GroupBatch.from_groups(random_groups())], [listener() for listener in listeners])
    assert module.wanted == [wanted]


@pytest.mark.parametrize("precision", ["32-true", "bf16-true"])
def test_a_listener_changes_no_weight(tiny_model: TinyModel, random_groups: RandomGroups, tmp_path: Path, precision: Any) -> None:
    batches = [GroupBatch.from_groups(random_groups(seed=seed)) for seed in range(3)]
    settings = OptimizerSettings(learning_rate=1e-2, schedule="constant", warmup=0)
    listener = BothListener()
    quiet, watched = (
        fit(tmp_path, DPOModule(tiny_model(), optimizer=settings), batches, callbacks, precision=precision)
        for callbacks in ([], [listener])
    )
    assert len(listener.heard) == 6
    assert all(observation.chosen_lengths.dtype == torch.int64 for observation in listener.heard)
    hidden = [observation for observation in listener.heard if isinstance(observation, PairHiddenObservation)]
    assert all(observation.chosen_hidden.dtype == torch.float32 for observation in hidden)
    for name, value in quiet.policy.state_dict().items():
        assert torch.equal(value, watched.policy.state_dict()[name]), name
