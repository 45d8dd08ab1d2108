"""The gold reward where prompts do not go evenly into the processes, and every forward pass is a joint act of all."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
import pytest
from gloo_ranks import launched
from rollouts import STILL
from shared_runs import loader, model, write_rows

from lightning_pref.callbacks import GoldReward
from lightning_pref.data.playground_tokenizer import playground_tokenizer
from lightning_pref.models.generation import sample_responses
from lightning_pref.models.sharding import is_split
from lightning_pref.modules import SFTModule
from lightning_pref.reports import RunRecord

pytestmark = [pytest.mark.slow, pytest.mark.timeout(180)]

# None for the second process; and two batches for the first where the second has one, which ends at another length.
PROMPTS = {"one prompt": ["Say it."], "three prompts": ["Say it.", "Say it once more", "Why?"]}


def answer(module: L.LightningModule, prompts: Sequence[str]) -> list[str]:
    """Greedily, in a batch for each prompt."""
    assert isinstance(module, SFTModule)
    tokenizer = playground_tokenizer()
    ids = [tokenizer(prompt, add_special_tokens=False)["input_ids"] for prompt in prompts]
    eos = int(tokenizer.eos_token_id)
    found = sample_responses(module.policy, ids, eos_token_id=eos, max_new_tokens=24, temperature=0.0, batch_size=1)
    return [str(tokenizer.decode(response)) for response in found]


def reward(prompt: str, response: str) -> float:
    return len(prompt) + len(response) / 100


def measured(strategy: str, folder: Path, rank: int, ranks: int) -> dict[str, Any]:
    """What a run that moves nothing logs for each set of prompts."""
    found: dict[str, Any] = {}
    for name, prompts in PROMPTS.items():
        gold, record = GoldReward(prompts, answer, reward), RunRecord()
        module = SFTModule(model(), optimizer=STILL)
        trainer = L.Trainer(
            accelerator="cpu",
            devices=ranks,
            strategy=strategy,
            max_steps=1,
            limit_val_batches=0,
            default_root_dir=folder,
            logger=[record],
            callbacks=[gold],
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(module, loader("sft", folder, rank, ranks, accumulate=1))
        assert is_split(module.policy) is (strategy == "fsdp2")
        found[name] = (record.metrics.get("gold_reward"), [sample.response for sample in gold.last])
    return found


def shared(folder: Path, rank: int, ranks: int) -> dict[str, Any]:
    return {strategy: measured(strategy, folder, rank, ranks) for strategy in ("fsdp2", "ddp")}


def test_the_gold_reward_of_any_number_of_prompts_is_that_of_one_process(tmp_path: Path) -> None:
    write_rows(tmp_path)
    alone = measured("auto", tmp_path, 0, 1)
    assert len({len(response) for response in alone["three prompts"][1]}) > 1, "some end before others"
    first, second = launched(shared, tmp_path, 2)
    for strategy in ("fsdp2", "ddp"):
        for name, ((before, after), responses) in alone.items():
            assert first[strategy][name][0] == pytest.approx((before, after), rel=1e-6)
            # Each answered the prompts that fall to it, and nothing that only fills a place is kept.
            assert first[strategy][name][1] == responses[::2]
            assert second[strategy][name][1] == responses[1::2]
