"""Recipes on a Ray cluster: two real workers on this machine, and what is refused before any is started."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest
from launched_runs import ROOT, UPDATES, check_same_as_alone, prepare, run_alone, shared

from lightning_pref.__main__ import main
from lightning_pref.cli import run_command
from lightning_pref.commands.ray import ray as run_on_ray
from lightning_pref.integrations.ray import RaySettings, check_place, check_room

HAS_RAY = find_spec("ray") is not None


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A Ray cluster of two cores, and a folder in which one process has trained on all rows."""
    ray = pytest.importorskip("ray")
    folder = tmp_path_factory.mktemp("ray")
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests" / "parts"), os.environ.get("PYTHONPATH", "")])
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        # Warnings of Ray's own imports are no business of ours.
        warnings.simplefilter("ignore")
        for name, value in {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "RAY_USAGE_STATS_ENABLED": "0"}.items():
            patch.setenv(name, value)
        ray.init(num_cpus=2, log_to_driver=False, include_dashboard=False)
        run_alone(prepare(folder), folder)
        yield folder
        ray.shutdown()


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.filterwarnings("ignore")
def test_N2_two_workers_of_ray_do_what_one_process_does(cluster: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(cluster)
    flags = shared(prepare(cluster), cluster, "ray", 2)
    relative = [flag.replace(f"{cluster}/", "") if "callbacks" not in flag else flag for flag in flags]
    result = run_on_ray("dpo", 2, storage=str(cluster / "records"), flags=relative)
    check_same_as_alone(cluster, "ray", 2)
    assert result.folder == Path("runs/dpo/ray"), "a worker sees the folder that the run was started in"
    assert result.export is not None and (result.export / "model.safetensors").exists()
    assert result.metrics["loss"].first != result.metrics["loss"].last
    assert UPDATES > 1


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.filterwarnings("ignore")
def test_a_mistake_that_a_worker_finds_ends_in_one_paragraph(
    cluster: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(cluster)
    storage = f"--storage={cluster / 'records'}"
    with pytest.raises(SystemExit):
        main(["ray", "--recipe=dpo", "--workers", "1", storage, "--", "--model.model", "model", "--model.betta", "1"])
    said = capsys.readouterr().err
    assert said.splitlines()[-1].startswith("error: There is no option `--model.betta`. Did you mean `--model.beta`")
    assert "Traceback" not in said


@pytest.mark.skipif(HAS_RAY, reason="Ray is installed")
def test_without_ray_the_extra_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["ray", "--recipe=dpo"])
    said = capsys.readouterr().err
    assert said.startswith("error: This needs Ray Train ")
    assert "`pip install 'lightning-pref[ray]'`" in said
    assert said.count("\n") == 1


@pytest.mark.parametrize(
    "flag",
    ["--trainer.strategy=ddp", "--trainer.devices", "--trainer.strategy.find_unused_parameters=true", "--trainer.plugins+=x"],
)
def test_a_flag_that_says_where_to_train_is_refused(flag: str) -> None:
    with pytest.raises(
        ValueError, match=r"The flag `--trainer\.\w+.*` says where to train, .* `--workers`, `--gpus`, `--strategy`"
    ):
        check_place(["--model.beta=0.1", flag, "2"])


def test_a_configuration_that_says_where_to_train_is_refused_and_one_that_leaves_it_open_is_not(tmp_path: Path) -> None:
    config = tmp_path / "mine.yaml"
    config.write_text("trainer: {accelerator: auto, devices: auto, num_nodes: 1, strategy: auto, plugins: null, max_steps: 3}\n")
    check_place(["--config", str(config), "--trainer.max_steps=4"])
    config.write_text("trainer: {strategy: ddp\n")
    check_place(["-c", str(config)])  # what is wrong with it the recipe will say
    config.write_text("trainer: {strategy: fsdp}\n")
    for args in (["--config", str(config)], [f"--config={config}"]):
        with pytest.raises(ValueError, match=r"^`trainer\.strategy: fsdp` of .*mine\.yaml says where to train"):
            check_place(args)


def test_what_stands_behind_two_dashes_is_handed_on_as_it_is() -> None:
    seen: dict[str, object] = {}

    def command(workers: int, flags: list[str] = []) -> None:  # noqa: B006
        """Keep what was given.

        Args:
            workers: A number.
            flags: What is handed on.
        """
        seen.update(workers=workers, flags=flags)

    given = ["--model.beta", "0.1", "--run.name=null", "--data.columns={a: b}", "3"]
    run_command(command, "keep", ["--workers=3", "--", *given])
    assert seen == {"workers": 3, "flags": given}


def test_more_than_the_cluster_has_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^3 workers with 2 CPU each need 6, and the Ray cluster has 4\. Lower `--workers` or"):
        check_room(RaySettings(num_workers=3, cpus_per_worker=2.0), {"CPU": 4.0}, use_gpu=False)
    with pytest.raises(ValueError, match=r"^2 workers with 1 GPU each need 2, and the Ray cluster has 1\..*`--gpus=false`\.$"):
        check_room(RaySettings(), {"CPU": 4.0, "GPU": 1.0}, use_gpu=True)
    check_room(RaySettings(), {"CPU": 2.0}, use_gpu=False)


def test_shards_need_gpus() -> None:
    with pytest.raises(ValueError, match=r"`fsdp` shards a model over GPUs.*`--gpus=true`.*`--strategy=ddp`"):
        check_room(RaySettings(strategy="fsdp"), {"CPU": 4.0}, use_gpu=False)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_workers": 0}, "at least one worker, got `workers` 0"),
        ({"cpus_per_worker": 0.0}, "a share of a core, got `cpus_per_worker` 0.0"),
        ({"max_failures": -1}, "`max_failures` counts restarts, 0 or more, got -1"),
    ],
)
def test_settings_that_mean_nothing_are_refused(settings: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RaySettings(**settings)  # type: ignore[arg-type]
