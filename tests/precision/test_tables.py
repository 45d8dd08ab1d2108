"""Weights in bfloat16 leave rotary frequencies in float32, so that a position means the same in training and in the export."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from reward_modules import trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from lightning_pref.data.groups import GroupBatch, PromptGroup
from lightning_pref.data.playground_tokenizer import playground_tokenizer
from lightning_pref.models.backbones import load_model
from lightning_pref.models.full_precision import keeping_tables
from lightning_pref.modules import DPOModule
from lightning_pref.modules.optimisation import OptimizerSettings

VOCABULARY = max(playground_tokenizer().get_vocab().values()) + 1
LONG = torch.arange(900).remainder(VOCABULARY - 10)[None] + 5


def frequencies(model: nn.Module) -> list[Tensor]:
    found = [buffer for name, buffer in model.named_buffers() if name.endswith("inv_freq")]
    assert found
    return found


@pytest.mark.filterwarnings("ignore:.*does not have many workers")
def test_a_run_in_bf16_true_exports_what_it_trained(
    tiny_model: Callable[..., LlamaForCausalLM], random_groups: Callable[..., list[PromptGroup]], tmp_path: Path
) -> None:
    """To the bit, at late positions: the policy by its logits, its reference by its frequencies."""
    start = tiny_model(vocab_size=VOCABULARY, max_position_embeddings=1024)
    expected = frequencies(tiny_model())[0].clone()
    module = DPOModule(start, reference="copy", optimizer=OptimizerSettings(learning_rate=1e-3, warmup=0))
    batches: Any = [GroupBatch.from_groups(random_groups())]
    trainer(tmp_path, precision="bf16-true", max_steps=1).fit(module, DataLoader(batches, batch_size=None))
    assert module.policy.dtype == torch.bfloat16
    assert all(torch.equal(found, expected) for found in frequencies(module))
    module.save_pretrained(tmp_path / "export", playground_tokenizer())
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "export", dtype=torch.bfloat16)
    with torch.no_grad():
        wanted = module.policy.eval()(LONG).logits
        assert torch.equal(exported(LONG).logits, wanted)
        rounded = exported.to(torch.bfloat16)
        assert not torch.equal(rounded(LONG).logits, wanted), "the plain cast would have been noticed"


def test_a_preset_in_bfloat16_is_what_it_is_after_it_was_saved(tmp_path: Path) -> None:
    model = load_model("playground:tiny", dtype="bfloat16")
    model.save_pretrained(tmp_path)
    again = load_model(str(tmp_path), dtype="bfloat16")
    with torch.no_grad():
        assert torch.equal(model(LONG).logits, again(LONG).logits)


def test_a_cast_to_wider_numbers_or_to_another_device_takes_tables_along() -> None:
    module = nn.Module()
    module.register_buffer("table", torch.ones(3), persistent=False)
    module.register_buffer("state", torch.ones(3))
    for cast, table, state in (
        (module.bfloat16, torch.float32, torch.bfloat16),
        (module.double, torch.float64, torch.float64),
    ):
        with keeping_tables(module):
            cast()
        assert (module.table.dtype, module.state.dtype) == (table, state)
    module.float()
    with keeping_tables(module):
        module.to("meta")
    assert module.table.device.type == "meta"
