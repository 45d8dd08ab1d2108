"""`python -m lightning_pref ray`: a recipe on a Ray cluster."""

from __future__ import annotations

import os
from importlib import import_module
from typing import Literal

from lightning_pref.cli import RunResult
from lightning_pref.integrations.ray import RaySettings, Strategy, train_on_ray
from lightning_pref.run_folder import RUN_NAME_VARIABLE, name_by_time


def ray(
    recipe: Literal["sft", "reward", "dpo", "rlhf"],
    workers: int = 2,
    *,
    strategy: Strategy = "ddp",
    gpus: bool | None = None,
    cpus_per_worker: float = 1.0,
    address: str | None = None,
    max_failures: int = 0,
    storage: str | None = None,
    flags: list[str] = [],  # noqa: B006  # read only, and a list is what may be given several times
) -> RunResult:
    """Run a recipe on a Ray cluster; its own flags stand behind `--`.

    Args:
        recipe: Which one.
        workers: Processes, each with a part of every batch.
        strategy: How they share the work: a whole copy of the model each (`ddp`), or a shard of it each (`fsdp`).
        gpus: Whether each worker has a GPU of its own; if not said, where the cluster has any.
        cpus_per_worker: Cores that are reserved for each worker.
        address: Of the cluster, `auto` for the one this machine belongs to; if not given that of `RAY_ADDRESS`, or else one
            that is started on this machine for this run alone.
        max_failures: How often all workers are started again where one dies.
        storage: Folder or bucket for Ray's own records; `~/ray_results` if not given.
        flags: Of the recipe, as on its own command line.

    Returns:
        The run folder, the exported model and the metrics, as the recipe itself returns them.
    """
    settings = RaySettings(
        num_workers=workers,
        strategy=strategy,
        gpus=gpus,
        cpus_per_worker=cpus_per_worker,
        address=address,
        max_failures=max_failures,
        storage=storage,
    )
    # Workers would make up a name each, where none is given by a flag or a configuration.
    name = os.environ.get(RUN_NAME_VARIABLE, name_by_time())
    main = import_module(f"lightning_pref.recipes.{recipe}").main
    result: RunResult = train_on_ray(main, flags, settings, environment={RUN_NAME_VARIABLE: name})
    return result
