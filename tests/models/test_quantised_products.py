"""In which numbers 4-bit layers compute, with the real bitsandbytes."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from torch.utils.data import DataLoader
from transformers import LlamaForCausalLM
from typing_extensions import override

from lightning_pref.data.groups import GroupBatch, PromptGroup
from lightning_pref.models.adapters import LoraSettings
from lightning_pref.models.backbones import load_model
from lightning_pref.models.quantised import QuantizationSettings, dense_weight, quantized_layers
from lightning_pref.modules import SFTModule
from lightning_pref.modules.group_module import Loading
from lightning_pref.modules.optimisation import OptimizerSettings

missing = find_spec("bitsandbytes") is None or find_spec("accelerate") is None
pytestmark = pytest.mark.skipif(missing, reason="the extra 'bnb' is not installed")

Groups = Callable[..., list[PromptGroup]]


@pytest.fixture
def folder(tiny_model: Callable[..., LlamaForCausalLM], tmp_path: Path) -> str:
    """A random model whose layers have whole blocks of 64 inputs."""
    tiny_model(hidden_size=64, intermediate_size=192).save_pretrained(tmp_path / "base")
    return str(tmp_path / "base")


class Product(Callback):
    """Keeps what a layer of the first block is given and gives."""

    def __init__(self) -> None:
        self.seen: list[tuple[torch.dtype, torch.dtype]] = []

    @override
    def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        (layer,) = (layer for name, layer in quantized_layers(pl_module) if name.endswith("layers.0.mlp.up_proj.base_layer"))

        def keep(_: Any, given: Any, found: torch.Tensor) -> None:
            # Before training it is also called to see that parts of the model do what the whole does.
            if given[0].requires_grad:
                self.seen.append((given[0].dtype, found.dtype))

        layer.register_forward_hook(keep)


@pytest.mark.parametrize(
    ("precision", "dtype", "compute_dtype", "wanted"),
    [
        ("32-true", "float32", None, torch.float32),
        ("32-true", "float32", "bfloat16", torch.float32),
        ("32-true", "bfloat16", None, torch.bfloat16),
        ("bf16-mixed", "float32", None, torch.bfloat16),
        ("bf16-true", "float32", None, torch.bfloat16),
        ("bf16-true", "bfloat16", None, torch.bfloat16),
    ],
)
@pytest.mark.parametrize("preset", [False, True])
def test_a_4_bit_layer_computes_in_what_a_dense_one_would(
    folder: str, random_groups: Groups, tmp_path: Path, preset: bool, precision: Any, dtype: Any, compute_dtype: Any, wanted: Any
) -> None:
    quantization = QuantizationSettings(compute_dtype=compute_dtype)
    loading = Loading(dtype=dtype, quantization=quantization)
    module = SFTModule(
        "playground:tiny" if preset else folder,
        lora=LoraSettings(r=2),
        loading=loading,
        optimizer=OptimizerSettings(learning_rate=1e-2, warmup=0),
    )
    product = Product()
    trainer = L.Trainer(
        precision=precision,
        max_steps=1,
        accelerator="cpu",
        default_root_dir=tmp_path,
        logger=False,
        callbacks=[product],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    batches: Any = [GroupBatch.from_groups(random_groups(ranked=False))]
    trainer.fit(module, DataLoader(batches, batch_size=None))
    assert product.seen == [(wanted, wanted)]


@pytest.mark.parametrize("preset", [False, True])
def test_the_product_of_a_4_bit_layer_is_in_its_dtype(folder: str, preset: bool) -> None:
    """To the bit that of the dense weights with the same values, also under autocast."""
    model = load_model("playground:tiny" if preset else folder, quantization=QuantizationSettings())
    layer: Any = model.model.layers[0].mlp.up_proj
    weight = dense_weight(layer)
    for dtype in (torch.bfloat16, torch.float32):
        states = torch.randn(3, layer.in_features, generator=torch.Generator().manual_seed(0)).to(dtype)
        assert torch.equal(layer(states), torch.nn.functional.linear(states, weight.to(dtype)))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(layer(states), torch.nn.functional.linear(states, weight))
