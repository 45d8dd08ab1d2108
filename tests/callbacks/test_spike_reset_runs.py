"""Mode `spam` in the life of a run: float16, checkpoints, logs, alerts, 8-bit optimisers, and what is refused."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from jsonargparse import ArgumentParser
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.plugins import MixedPrecision
from spiky import SHORT_SPAM, Gradients, Regression, TwoOptimizers, adamw, batches, fit, short_spam, weights
from torch import Tensor
from torch.optim import Optimizer
from torch.utils._python_dispatch import TorchDispatchMode
from typing_extensions import override

from lightning_pref.callbacks import update_parts
from lightning_pref.callbacks.spike_reset import SpikeAwareOptimizerReset

# float16 and its loss scaler.


class Halves(Regression):
    """Its loss overflows in some batches, and in one it has none."""

    overflows: tuple[int, ...] = ()
    silent: int = -1

    @override
    def training_step(self, batch: Tensor, batch_idx: int) -> Any:
        if batch_idx == self.silent:
            return None
        loss = super().training_step(batch, batch_idx)
        return loss * math.inf if batch_idx in self.overflows else loss


def fit_halves(folder: Path, module: Regression, callbacks: list[Callback], data: list[Tensor], **settings: Any) -> L.Trainer:
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    return fit(folder, module, callbacks, data, plugins=[MixedPrecision("16-mixed", "cpu", scaler)], **settings)


def test_O1_an_update_that_the_scaler_skips_changes_and_counts_nothing(tmp_path: Path) -> None:
    data = batches(26)
    without = [batch for i, batch in enumerate(data) if i not in (5, 11, 12)]
    found, counts = [], []
    for batch_list, overflows in ((data, (5, 11, 12)), (without, ())):
        module = Halves()
        module.overflows = overflows
        callback = short_spam()
        trainer = fit_halves(tmp_path, module, [callback], batch_list)
        found.append(weights(module))
        counts.append((callback.updates, callback.state_dict()["measured"]["tracks"]))
        steps = {int(state["step"]) for state in trainer.optimizers[0].state.values()}
        assert steps == {callback.state_dict()["measured"]["tracks"][0]["updates"]} == {23}
    # The scale differs afterwards (each overflow halves it), and float16 rounds scaled gradients; counts are exact.
    assert counts[0] == counts[1]
    assert torch.allclose(*found, rtol=1e-2, atol=1e-3)


def test_O1_learning_rate_and_schedule_do_not_see_an_overflow_on_a_ramp(tmp_path: Path) -> None:
    """Updates 12 to 16 are ramped; batches 12 and 13 overflow in the middle of it."""
    seen = []
    for callbacks in ([], [short_spam()]):
        module = Halves(schedule=lambda o: torch.optim.lr_scheduler.ExponentialLR(o, 0.95))
        module.overflows = (12, 13)
        gradients = Gradients()
        fit_halves(tmp_path, module, [*callbacks, gradients], batches(20))
        seen.append(gradients.after_batch)
    assert seen[0] == seen[1]


@pytest.mark.filterwarnings("ignore:`training_step` returned `None`")
def test_O1_a_batch_without_a_loss_in_an_accumulated_update_leaves_the_rates_alone(tmp_path: Path) -> None:
    """Lightning then calls the hook, with gradients of the other micro-batches, and does not step."""
    module = Halves()
    module.silent = 25  # the second half of update 13, on the ramp
    gradients, callback = Gradients(), short_spam()
    fit_halves(tmp_path, module, [callback, gradients], batches(40), accumulate_grad_batches=2)
    assert set(gradients.after_batch) == {(0.01, 0.0)}
    assert callback.state_dict()["measured"]["tracks"][0]["updates"] == 19


def test_O1_skipped_updates_are_logged(tmp_path: Path) -> None:
    module = Halves()
    module.overflows = (2,)
    trainer = fit_halves(tmp_path, module, [short_spam()], batches(6))
    assert trainer.callback_metrics["spike/skipped"] == 1


def test_O1_a_fused_optimizer_under_a_scaler_is_refused(tmp_path: Path) -> None:
    message = r"A fused AdamW takes the loss scale out of the gradients by itself.*Build it with `fused=False`, or train with"
    with pytest.raises(ValueError, match=message):
        fit_halves(tmp_path, Regression(lambda p: adamw(p, fused=True)), [short_spam()], batches(3))


# Resume.


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
@pytest.mark.parametrize("stop", [2, 11, 12, 13, 18, 23, 24])
def test_C5_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(tmp_path: Path, stop: int) -> None:
    data = batches(30)

    def build() -> tuple[Regression, SpikeAwareOptimizerReset]:
        schedule = lambda o: torch.optim.lr_scheduler.ExponentialLR(o, 0.97)  # noqa: E731
        return Regression(lambda p: adamw(p, weight_decay=0.1), spikes=[5, 20], schedule=schedule), short_spam(threshold=2.0)

    module, whole = build()
    full = fit(tmp_path / "whole", module, [whole], data)
    first, begun = build()
    checkpoint = ModelCheckpoint(dirpath=tmp_path / "kept", filename="part", every_n_train_steps=stop)
    fit(tmp_path / "first", first, [begun, checkpoint], data, max_steps=stop, enable_checkpointing=True)
    second, resumed = build()
    rest = fit(tmp_path / "second", second, [resumed], data, ckpt_path=str(tmp_path / "kept" / "part.ckpt"))
    assert torch.equal(weights(module), weights(second))
    assert whole.state_dict() == resumed.state_dict()
    assert full.callback_metrics.keys() == rest.callback_metrics.keys()
    for key, value in full.callback_metrics.items():
        assert torch.equal(value.nan_to_num(), rest.callback_metrics[key].nan_to_num()), key


def test_a_state_of_other_optimizers_is_refused(tmp_path: Path) -> None:
    callback = short_spam()
    fit(tmp_path, TwoOptimizers(), [callback], batches(3))
    other = short_spam()
    other.load_state_dict(callback.state_dict())
    with pytest.raises(ValueError, match=r"holds spike states of 2 optimisers, and training has 1\. Resume with the optimisers"):
        fit(tmp_path, Regression(), [other], batches(3))


def test_a_second_run_begins_anew(tmp_path: Path) -> None:
    callback = short_spam()
    fit(tmp_path, Regression(), [callback], batches(15))
    assert callback.state_dict()["measured"]["tracks"][0]["updates"] == 15
    fit(tmp_path, Regression(), [callback], batches(4))
    assert callback.state_dict()["measured"]["tracks"][0]["updates"] == 4


# What is logged.


def logged(folder: Path) -> list[dict[str, float]]:
    lines = (folder / "lightning_logs" / "version_0" / "metrics.csv").read_text().splitlines()
    names = lines[0].split(",")
    return [{n: float(v) for n, v in zip(names, line.split(","), strict=True) if v} for line in lines[1:]]


def test_what_is_logged_is_what_happened(tmp_path: Path) -> None:
    gradients, plain = Gradients(), Gradients()
    callback = short_spam(threshold=50.0)
    fit(tmp_path, Regression(spikes=[20]), [plain, callback, gradients], batches(24), log_every_n_steps=4)
    rows = logged(tmp_path)
    assert [int(row["step"]) for row in rows] == [4, 8, 12, 16, 20, 24]
    assert [row["spike/reset"] for row in rows] == [0, 0, 1, 0, 0, 1]
    assert [row["spike/phi"] for row in rows] == pytest.approx(
        [1.0, 1.0, 0.01, 1 - 0.495 * (1 + math.cos(4 * math.pi / 6)), 1, 0.01]
    )
    for i, row in enumerate(rows):
        updates = range(4 * i, 4 * i + 4)
        changed = sum(int((plain.before_step[u] != gradients.before_step[u]).sum()) for u in updates)
        active = sum(65 for u in updates if (u + 1) % 12 >= 3)
        assert row["spike/clipped_fraction"] == pytest.approx(changed / active)
        squares = [plain.before_step[u].double().square().sum().item() for u in updates]
        assert row["spike/grad_norm"] == pytest.approx(math.sqrt(sum(squares) / 4))
        assert row["spike/skipped"] == 0
    assert rows[4]["spike/max_ratio"] > 1e6
    assert rows[4]["spike/clipped_fraction"] > 0.2
    keys = {key for key in rows[0] if key.startswith("spike/")}
    assert keys <= {key.name for key in callback.keys}
    assert len(keys) == 7


def test_the_effective_learning_rate_says_what_keeping_the_bias_correction_does(tmp_path: Path) -> None:
    last = {}
    for correction in ("keep", "restart"):
        trainer = fit(tmp_path, Regression(), [short_spam(bias_correction=correction)], batches(20))
        last[correction] = {key: value.item() for key, value in trainer.callback_metrics.items()}
    # Update 20 is the 9th since the reset and past the ramp; the correction assumes 20.
    size = {n: (1 - 0.9**n) / math.sqrt(1 - 0.999**n) for n in (9, 20)}
    assert last["keep"]["spike/effective_lr_multiplier"] == pytest.approx(size[9] / size[20], rel=1e-5)
    assert last["restart"]["spike/effective_lr_multiplier"] == last["restart"]["spike/phi"] == 1.0


class CountsQuestions(TorchDispatchMode):
    """Counts operations that bring a value of a tensor to the host, or need one for a shape."""

    asked: int = 0

    @override
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default):
            self.asked += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("correction", ["keep", "restart"])
def test_M5_between_reports_the_device_is_asked_for_nothing(
    tmp_path: Path, correction: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(update_parts, "FREE_TO_READ", ())  # as on a GPU
    counts = CountsQuestions()

    class Counted(SpikeAwareOptimizerReset):
        @override
        def before_update(self, host: Any, optimizer: Optimizer) -> None:
            with counts:
                super().before_update(host, optimizer)

        @override
        def after_batch(self, host: Any, outputs: Any, batch: Any, updated: bool) -> None:
            with counts:
                super().after_batch(host, outputs, batch, updated)

    callback = Counted(**{**SHORT_SPAM, "bias_correction": correction})
    # A capturable or fused optimiser counts on the device; on the CPU that is the fused one.
    fit(tmp_path, Regression(lambda p: adamw(p, fused=True)), [callback], batches(30), log_every_n_steps=100)
    assert callback.updates == 30
    assert counts.asked == 0


def test_the_alert_on_too_much_clipping(tmp_path: Path) -> None:
    callback = short_spam(threshold=0.01)
    fit(tmp_path, Regression(), [callback], batches(24), log_every_n_steps=4)
    (alert,) = [alert for alert in callback.alerts if alert.name == "spike/clipped_fraction"]
    assert "raise `threshold`" in alert.advice
    quiet = short_spam(threshold=0.01, thresholds={"spike/clipped_fraction": math.nan})
    fit(tmp_path, Regression(), [quiet], batches(24), log_every_n_steps=4)
    assert not quiet.alerts


def test_the_alert_on_the_gradient_norm_can_be_set_for_sampled_rewards(tmp_path: Path) -> None:
    for limit, names in ((10.0, ["spike/gradient_norm"]), (1e9, [])):
        callback = short_spam(threshold=0.0, thresholds={"spike/gradient_norm": limit})
        fit(tmp_path, Regression(spikes=range(1, 21), size=1e3), [callback], batches(20), log_every_n_steps=4)
        assert [alert.name for alert in callback.alerts] == names


def test_a_healthy_run_raises_no_alert(tmp_path: Path) -> None:
    callback = SpikeAwareOptimizerReset(reset_every=50, warmup_steps=15, guard_steps=10)
    fit(tmp_path, Regression(), [callback], batches(150))
    assert callback.alerts == []


# 8 bit.


@pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")
@pytest.mark.parametrize("kind", ["AdamW8bit", "PagedAdamW8bit"])
def test_O3_eight_bit_training_goes_on_through_resets_and_spikes(tmp_path: Path, kind: str) -> None:
    bnb = pytest.importorskip("bitsandbytes")
    losses = {}
    for name, callbacks in {"plain": [], "spam": [short_spam(bias_correction="restart", threshold=400.0)]}.items():
        module = Regression(lambda p: getattr(bnb.optim, kind)(p, lr=0.01, min_8bit_size=16), spikes=[20], size=1e5)
        fit(tmp_path, module, callbacks, batches(60))
        losses[name] = sum(module.losses[-10:]) / 10
        assert weights(module).isfinite().all()
    assert losses["spam"] < 0.7 * losses["plain"]


# What is refused.


def test_moments_in_half_precision_are_refused(tmp_path: Path) -> None:
    data = [batch.bfloat16() for batch in batches(8)]
    message = r"AdamW keeps in torch.bfloat16 here: in that precision a decay of 0.999 rounds back to 1"
    with pytest.raises(ValueError, match=message):
        fit(tmp_path, Regression(), [short_spam()], data, precision="bf16-true")
    callback = short_spam(threshold=0.0)
    fit(tmp_path, Regression(), [callback], data, precision="bf16-true")
    assert callback.updates == 8


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mode": "sgd"}, r"`mode` is 'spam' or 'evidence', got 'sgd'"),
        (
            {"reset_every": 150},
            r"`reset_every` must be larger than `warmup_steps`, got 150 and 150: the learning rate would never",
        ),
        ({"reset_every": 15, "warmup_steps": 5}, r"`guard_steps` must be smaller than `reset_every`, got 20 and 15"),
        ({"guard_steps": 0}, r"`guard_steps` must be at least 1: on the update that resets there is no second moment"),
        ({"guard_steps": -1}, r"`guard_steps` must be at least 0, got -1"),
        ({"warmup_steps": -1}, r"`warmup_steps` must be at least 0, got -1"),
        ({"threshold": -1.0}, r"`threshold` must be at least 0, got -1.0"),
        ({"max_events": 0}, r"`max_events` must be at least 1, got 0"),
        ({"reset_every": -5}, r"`reset_every` must be at least 0 or None, got -5"),
        ({"every_n_updates": 0}, r"`every_n_updates` must be at least 1 or None, got 0"),
        ({"bias_correction": "drop"}, r"`bias_correction` is 'keep' or 'restart', got 'drop'"),
        ({"order": "never"}, r"`order` is 'before_norm_clip' or 'after_norm_clip', got 'never'"),
        ({"horizon": 7}, r"`horizon` acts in mode 'evidence' only; leave it out in mode 'spam', or change the mode"),
        ({"mode": "evidence", "threshold": 7.0}, r"`threshold` acts in mode 'spam' only; leave it out in mode 'evidence'"),
        ({"mode": "evidence", "strict": True}, r"`strict` acts in mode 'spam' only"),
        ({"thresholds": {"spike/clipped": 1.0}}, r"Unknown threshold 'spike/clipped' of spike. Did you mean"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SpikeAwareOptimizerReset(**settings)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, {"reset_every": 500, "restart": False}),
        ({"mode": "spam", "reset_every": None, "threshold": 100}, {"reset_every": None, "threshold": 100.0}),
        ({"mode": "evidence", "ladder": ["skip", "ramp"], "watch": ["loss"]}, {"ladder": ("skip", "ramp"), "watch": ("loss",)}),
    ],
)
def test_a_configuration_file_may_say_as_much_or_little_as_it_likes(settings: dict[str, Any], expected: dict[str, Any]) -> None:
    """What is left out is filled in by the parser, tuples as lists, and must not count as a setting of the other mode."""
    path = f"{SpikeAwareOptimizerReset.__module__}.{SpikeAwareOptimizerReset.__name__}"
    parser = ArgumentParser()
    parser.add_argument("--callbacks", type=list[Callback])
    config = parser.parse_object({"callbacks": [{"class_path": path, "init_args": settings}]})
    build = getattr(parser, "instantiate", None) or parser.instantiate_classes
    (callback,) = build(config).callbacks
    assert {name: vars(callback.policy)[name] for name in expected} == expected


def test_never_resetting_can_be_said_in_two_ways() -> None:
    for never in (None, 0):
        callback = SpikeAwareOptimizerReset(reset_every=never)
        assert callback.policy.reset_every is None  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("make", "settings", "message"),
    [
        (
            lambda p: torch.optim.SGD(p, momentum=0.9),
            {},
            r"SPAM clips by the running mean of squared gradients, and SGD keeps none",
        ),
        (torch.optim.Adamax, {}, r"and Adamax keeps none. Set `threshold=0` for resets without clipping"),
        (
            torch.optim.RMSprop,
            {"bias_correction": "restart"},
            r"RMSprop has no bias correction to restart; set `bias_correction='keep'`",
        ),
        (torch.optim.Adagrad, {}, r"cannot reset torch.optim.adagrad.Adagrad: its sum of squares"),
        (adamw, {"order": "after_norm_clip"}, r"order='after_norm_clip' has nothing to come after"),
    ],
)
def test_optimizers_and_trainers_that_do_not_fit_are_refused(
    tmp_path: Path, make: Any, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        fit(tmp_path, Regression(make), [SpikeAwareOptimizerReset(**settings)], batches(2))


@pytest.mark.parametrize("correction", ["keep", "restart"])
def test_a_look_ahead_changes_neither_weights_nor_reports(
    tmp_path: Path, correction: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where numbers are free to read, most tensors are not clipped at all; nothing else may differ."""

    def run() -> tuple[dict[str, Tensor], dict[str, float]]:
        callback = SpikeAwareOptimizerReset(**{**SHORT_SPAM, "bias_correction": correction})
        module = Regression(spikes=(20, 33))
        trainer = fit(tmp_path, module, [callback], batches(40), log_every_n_steps=100)
        told = {key: value.item() for key, value in trainer.callback_metrics.items() if key.startswith("spike/")}
        return {name: value.clone() for name, value in module.state_dict().items()}, told

    quick_weights, quick = run()
    monkeypatch.setattr(update_parts, "FREE_TO_READ", ())
    exact_weights, exact = run()
    assert all(torch.equal(quick_weights[name], exact_weights[name]) for name in exact_weights)
    assert 0 < exact["spike/clipped_fraction"] < 1
    assert quick == pytest.approx(exact, rel=1e-6)
