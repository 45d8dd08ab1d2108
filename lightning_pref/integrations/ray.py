"""Training on a Ray cluster: Ray Train starts the processes of a run, and Lightning trains in them as everywhere.

This module imports without Ray; the extra `ray` installs it.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml

# Older versions do not hand back what a worker returns.
OLDEST = "2.58"
Strategy = Literal["ddp", "fsdp"]
STRATEGIES: Mapping[Strategy, str] = {"ddp": "RayDDPStrategy", "fsdp": "RayFSDPStrategy"}
# What Ray decides in place of the Trainer's settings, and the values that leave it open.
PLACE: Mapping[str, tuple[Any, ...]] = {  # Any: values of flags
    "accelerator": (None, "auto"),
    "devices": (None, "auto", 1),
    "num_nodes": (None, 1),
    "strategy": (None, "auto"),
    "plugins": (None, []),
}

Returned = TypeVar("Returned")


class WorkerRefusal(RuntimeError):
    """A message for the user that ended a worker; Ray carries it back to the process that started the run."""


@dataclass(frozen=True, kw_only=True)
class RaySettings:
    """Where Ray runs a training.

    Args:
        num_workers: Processes, each with a part of every batch, at least 1.
        strategy: How they share the work: a whole copy each (`ddp`), or a shard of the model each (`fsdp`).
        gpus: Whether each worker has a GPU of its own; `None` where the cluster has any.
        cpus_per_worker: Cores that are reserved for each worker, > 0.
        address: Of the cluster, `auto` for the one this machine belongs to; `None` for that of `RAY_ADDRESS` or else one
            started on this machine, for this run alone.
        max_failures: How often Ray starts all workers again where one dies; they begin as the command line says.
        storage: Folder or bucket for Ray's own records; its default, `~/ray_results`, if not given.
    """

    num_workers: int = 2
    strategy: Strategy = "ddp"
    gpus: bool | None = None
    cpus_per_worker: float = 1.0
    address: str | None = None
    max_failures: int = 0
    storage: str | None = None

    def __post_init__(self) -> None:
        if self.num_workers < 1:
            raise ValueError(f"A run on Ray has at least one worker, got `workers` {self.num_workers!r}.")
        if not self.cpus_per_worker > 0:
            raise ValueError(f"A worker needs a share of a core, got `cpus_per_worker` {self.cpus_per_worker!r}.")
        if self.max_failures < 0:
            raise ValueError(f"`max_failures` counts restarts, 0 or more, got {self.max_failures!r}.")


def train_on_ray(
    main: Callable[[Sequence[str]], Returned],
    args: Sequence[str],
    settings: RaySettings,
    *,
    environment: Mapping[str, str],
) -> Returned:
    """Run a recipe in the workers of a Ray Train job, and return what it returns in the first of them.

    Args:
        main: The `main` function of a recipe. Workers import it by its name, so the package must be installed where they are.
        args: Its command line, without what Ray decides. Relative paths are of this process's folder where workers have it.
        settings: The workers.
        environment: Variables that are set in every worker.
    """
    check_installed()
    check_place(args)
    # Any: Ray's own types want a worker that returns nothing, and know nothing of what it returns.
    ray: Any = import_module("ray")
    from ray.train import FailureConfig, RunConfig, ScalingConfig, WorkerGroupError

    TorchTrainer: Any = import_module("ray.train.torch").TorchTrainer  # a class

    is_ours = not ray.is_initialized()
    if is_ours:
        ray.init(address=settings.address)
    try:
        use_gpu = ray.cluster_resources().get("GPU", 0) > 0 if settings.gpus is None else settings.gpus
        check_room(settings, ray.cluster_resources(), use_gpu=use_gpu)
        worker = partial(
            run_in_worker,
            main,
            [*args, *place_flags(settings.strategy, use_gpu=use_gpu)],
            folder=str(Path.cwd()),
            environment=dict(environment),
        )
        trainer = TorchTrainer(
            worker,
            scaling_config=ScalingConfig(
                num_workers=settings.num_workers,
                use_gpu=use_gpu,
                resources_per_worker={"CPU": settings.cpus_per_worker, **({"GPU": 1} if use_gpu else {})},
            ),
            run_config=RunConfig(storage_path=settings.storage, failure_config=FailureConfig(max_failures=settings.max_failures)),
        )
        try:
            result = trainer.fit()
        except WorkerGroupError as error:
            raise_refusal(error.worker_failures)
            raise
        returned: Returned = result.return_value
        return returned
    finally:
        if is_ours:
            ray.shutdown()


def run_in_worker(
    main: Callable[[Sequence[str]], Returned],
    args: Sequence[str],
    *,
    folder: str,
    environment: Mapping[str, str],
) -> Returned:
    """What one worker does."""
    os.environ.update(environment)
    if Path(folder).is_dir():
        os.chdir(folder)
    try:
        return main(args)
    except SystemExit as end:
        # Ray would report the exit of a worker as a crash, without its message.
        raise WorkerRefusal(str(end)) from end


def place_flags(strategy: Strategy, *, use_gpu: bool) -> list[str]:
    """Flags of a recipe that let Lightning train in the processes that Ray has started."""
    return [
        f"--trainer.accelerator={'gpu' if use_gpu else 'cpu'}",
        "--trainer.devices=auto",
        "--trainer.num_nodes=1",
        f'--trainer.strategy={{"class_path": "ray.train.lightning.{STRATEGIES[strategy]}"}}',
        "--trainer.plugins=ray.train.lightning.RayLightningEnvironment",
    ]


def check_installed() -> None:
    """Refuse to go on without Ray."""
    if find_spec("ray") is None:
        raise ModuleNotFoundError(
            f"This needs Ray Train {OLDEST} or newer, which is not installed here. Install it on every machine of the "
            "cluster: `pip install 'lightning-pref[ray]'`."
        )


def check_place(args: Sequence[str]) -> None:
    """Refuse flags and configuration files that say where to train: Ray does."""
    configs = []
    for i, arg in enumerate(args):
        name, _, given = arg.partition("=")
        setting = name.removeprefix("--trainer.").partition(".")[0].removesuffix("+")
        if name.startswith("--trainer.") and setting in PLACE:
            raise ValueError(place_message(f"The flag `{arg}`"))
        if name in ("--config", "-c"):
            configs.append(given or (args[i + 1] if i + 1 < len(args) else ""))
    for config in filter(os.path.isfile, configs):
        try:
            settings = yaml.safe_load(Path(config).read_text(encoding="utf-8"))
        except (yaml.YAMLError, UnicodeDecodeError):
            continue  # the recipe says what is wrong with it
        trainer = settings.get("trainer") if isinstance(settings, dict) else None
        for setting, open_values in PLACE.items():
            value = trainer.get(setting) if isinstance(trainer, dict) else None
            if value not in open_values:
                raise ValueError(place_message(f"`trainer.{setting}: {value}` of {config}"))


def place_message(what: str) -> str:
    """Why it cannot be, and what to say instead."""
    return (
        f"{what} says where to train, which on a Ray cluster Ray decides. Leave it out, and choose by the options of "
        f"`python -m lightning_pref ray`: `--workers`, `--gpus`, `--strategy` ({', '.join(STRATEGIES)})."
    )


def check_room(settings: RaySettings, cluster: Mapping[str, float], *, use_gpu: bool) -> None:
    """Refuse what the cluster does not have: Ray would wait for it."""
    if settings.strategy == "fsdp" and not use_gpu:
        raise ValueError(
            "The strategy `fsdp` shards a model over GPUs, and the workers have none: the Ray cluster has no GPU, or `gpus` is "
            "off. Give each worker a GPU (`--gpus=true`), or use `--strategy=ddp`."
        )
    wanted = {"CPU": settings.cpus_per_worker, **({"GPU": 1.0} if use_gpu else {})}
    for resource, each in wanted.items():
        has = cluster.get(resource, 0.0)
        if settings.num_workers * each > has:
            raise ValueError(
                f"{settings.num_workers} workers with {each:g} {resource} each need {settings.num_workers * each:g}, and the "
                f"Ray cluster has {has:g}. Lower `--workers`"
                + (" or `--cpus_per_worker`." if resource == "CPU" else ", or train on CPUs with `--gpus=false`.")
            )


def raise_refusal(failures: Mapping[int, Exception]) -> None:
    """Raise the message that ended a worker, where it was one for the user."""
    for rank in sorted(failures):
        failure: Any = failures[rank]  # Any: Ray wraps what a worker raised, in a class of its own
        cause = getattr(failure, "_base_exc", failure)
        if isinstance(cause, WorkerRefusal):
            raise ValueError(str(cause).removeprefix("error: ")) from None
