"""One command line for every recipe: Lightning's own, with a run folder, a summary and a plain export around it."""

from __future__ import annotations

import os
import sys
import time
import traceback
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple, get_origin, get_type_hints

import lightning as L
from jsonargparse import Namespace, auto_cli
from lightning.pytorch.callbacks import Callback, LearningRateMonitor, ModelCheckpoint, ProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from typing_extensions import override

from lightning_pref.callbacks import GoldReward, Throughput
from lightning_pref.callbacks.hosts import ALERTS_FILE
from lightning_pref.callbacks.throughput import Work, group_work
from lightning_pref.data.datamodule import PreferenceData
from lightning_pref.data.playground_source import is_playground
from lightning_pref.models.presets import is_preset
from lightning_pref.modules.group_module import GroupModule
from lightning_pref.reports.console import RunProgressBar, StartLine, readable_terminal
from lightning_pref.reports.summary import (
    FirstLast,
    RunRecord,
    print_alerts,
    print_samples,
    print_summary,
    read_alerts,
    write_summary,
)

PACKAGE = Path(__file__).parent
CONFIGS = PACKAGE / "recipes" / "configs"
# Processes that Lightning starts for further devices inherit it, so that all ranks agree on the folder.
RUN_NAME_VARIABLE = "LIGHTNING_PREF_RUN_NAME"
# All that a run leaves which ended before its first update; the next one may write over it.
START_FILES = ("config.yaml", "hparams.yaml", "events.out.tfevents.*")


@dataclass(frozen=True, kw_only=True)
class RunSettings:
    """Where a run lives.

    Args:
        root: Folder above all runs.
        name: Folder of this run below `<root>/<recipe>`; date and time if not given.
        resume: Checkpoint to go on from.
        export: Whether to write the trained model as a plain transformers folder at the end.
    """

    root: str = "runs"
    name: str | None = None
    resume: str | None = None
    export: bool = True


class Recipe(NamedTuple):
    """What one recipe file declares."""

    name: str
    module: type[GroupModule]
    defaults: dict[str, Any]  # Any: values of any flag, by its name
    headline: Sequence[str]  # metrics of the closing table
    # Run before anything is built; may change the configuration (a first stage that trains the model to start from).
    before: Callable[[Namespace, Path], None] = lambda config, folder: None
    # Further callbacks for this configuration.
    callbacks: Callable[[Namespace], list[Callback]] = lambda config: []
    data: type[L.LightningDataModule] = PreferenceData
    # Size of a batch of that data, for the throughput.
    work: Callable[[Any], Work] = group_work  # Any: a batch of the recipe's own data


class RunResult(NamedTuple):
    """What a finished run leaves."""

    folder: Path
    export: Path | None
    metrics: dict[str, FirstLast]


def trains_on_playground(config: Namespace) -> bool:
    """Whether all training data is the playground's."""
    train = config.data.train
    return all(map(is_playground, [train] if isinstance(train, str) else train))


def on_playground(config: Namespace) -> bool:
    """Whether both the model and the training data are the embedded ones, whose own defaults then apply."""
    return is_preset(str(config.model.model)) and trains_on_playground(config)


class RunConfig(SaveConfigCallback):
    """Writes the resolved configuration into the run folder, whichever loggers the run has."""

    @override
    def save_config(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        path = Path(trainer.default_root_dir) / self.config_filename
        self.parser.save(self.config, str(path), skip_none=False, overwrite=True)


class RecipeCLI(LightningCLI):
    """LightningCLI without subcommands: flags and YAML of the constructors' own names.

    On the playground, `configs/<recipe>_playground.yaml` holds the defaults; with a model or data of one's own the
    constructors' defaults do, so that settings made for half a million parameters never leak into a real run.
    """

    def __init__(self, recipe: Recipe, args: Sequence[str]) -> None:
        self.recipe = recipe
        self.folder = Path()
        self.record = RunRecord()
        super().__init__(
            recipe.module,
            recipe.data,
            seed_everything_default=0,
            save_config_callback=RunConfig,
            save_config_kwargs={"save_to_log_dir": False},
            parser_kwargs={"prog": f"python -m lightning_pref.recipes.{recipe.name}"},
            run=False,
            auto_configure_optimizers=False,
            args=list(args),
        )

    @override
    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_class_arguments(RunSettings, "run")
        parser.set_defaults(
            {
                "trainer.max_epochs": 1,
                "trainer.log_every_n_steps": 10,
                "trainer.gradient_clip_val": 1.0,
                # `StartLine` says what one wants of it.
                "trainer.enable_model_summary": False,
                **self.recipe.defaults,
            }
        )

    @override
    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        asked_only = [a for a in args if a not in ("-h", "--help") and not a.startswith("--print_config")]
        super().parse_arguments(parser, asked_only)
        if on_playground(self.config):
            parser.default_config_files = [CONFIGS / f"{self.recipe.name}_playground.yaml"]
        super().parse_arguments(parser, args)

    @override
    def before_instantiate_classes(self) -> None:
        self.folder = Path(self.config.run.root) / self.recipe.name / _run_name(self.config.run.name)
        self._claim_folder()
        self._spread_seed()
        # The constructors refuse what cannot be meant; better so before a first stage than after it.
        parts = Namespace(model=self.config.model, data=self.config.data)  # type: ignore[no-untyped-call]
        self.parser.instantiate_classes(parts)
        self.recipe.before(self.config, self.folder)
        if self.config.data.tokenizer is None:
            self.config.data.tokenizer = self.config.model.model

    def _spread_seed(self) -> None:
        """One seed for the run: what orders the data and makes fresh weights follows it, unless seeded otherwise than by 0."""
        seed = self.config.seed_everything
        if isinstance(seed, bool) or not isinstance(seed, int):
            return
        for part in (self.config.data, self.config.model.loading):
            part.seed = part.seed or seed

    def _claim_folder(self) -> None:
        """Make the run folder, and refuse one that holds another run: its metrics and configuration would be overwritten."""
        is_first_process = int(os.environ.get("LOCAL_RANK", "0")) == 0
        if is_first_process and self.config.run.resume is None and _holds_more_than_a_start(self.folder):
            last = self.folder / "checkpoints" / "last.ckpt"
            go_on = f" To go on with the run it holds: `--run.name {self.folder.name} --run.resume {last}`."
            raise ValueError(
                f"The run folder {self.folder} is not empty. Choose another `--run.name`, or remove the folder."
                + (go_on if last.exists() else "")
            )
        self.folder.mkdir(parents=True, exist_ok=True)

    @override
    def instantiate_trainer(self, **kwargs: Any) -> L.Trainer:
        asked = self.config_init.trainer
        if asked.logger in (None, True):
            # Both loggers write straight into the run folder: the version is the folder itself.
            root, version = str(self.folder.parent), self.folder.name
            kwargs["logger"] = [
                TensorBoardLogger(root, name="", version=version),
                CSVLogger(root, name="", version=version),
            ]
        callbacks: list[Callback] = [
            StartLine(self.recipe.name, self.folder),
            Throughput(self.recipe.work),
            *self.recipe.callbacks(self.config),
        ]
        given = asked.callbacks if isinstance(asked.callbacks, list) else [asked.callbacks] if asked.callbacks else []
        if asked.logger is not False:
            callbacks.append(LearningRateMonitor(logging_interval="step"))
        if asked.enable_checkpointing is not False and not any(isinstance(c, ModelCheckpoint) for c in given):
            callbacks.append(ModelCheckpoint(dirpath=self.folder / "checkpoints", save_last=True))
        if asked.enable_progress_bar is None and not any(isinstance(c, ProgressBar) for c in given):
            # In a file or a pipe a bar is a heap of control characters.
            kwargs["enable_progress_bar"] = sys.stdout.isatty()
            callbacks += [RunProgressBar()] if sys.stdout.isatty() else []
        # What the user gives with settings of their own takes the place of ours.
        mine = [callback for callback in callbacks if not any(type(callback) is type(other) for other in given)]
        self.trainer_defaults = {**self.trainer_defaults, "callbacks": mine}
        trainer = super().instantiate_trainer(default_root_dir=str(self.folder), **kwargs)
        trainer.loggers.append(self.record)
        return trainer


def _run_name(asked: str | None) -> str:
    if asked is not None:
        return asked
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and RUN_NAME_VARIABLE not in os.environ:
        raise ValueError(
            "This run has several processes that were started from outside (torchrun, SLURM), and each would make up "
            "a run name of its own. Name the run: `--run.name my-run`."
        )
    return os.environ.setdefault(RUN_NAME_VARIABLE, datetime.now().strftime("%Y%m%d-%H%M%S"))


def run_recipe(recipe: Recipe, args: Sequence[str] | None = None) -> RunResult:
    """Parse, train, export, summarise.

    Args:
        recipe: What to run.
        args: Command line; the process's own if not given.
    """
    started = time.monotonic()
    names_the_run = RUN_NAME_VARIABLE not in os.environ  # not so for a first stage, nor in a process Lightning started
    try:
        with _mistakes_in_one_paragraph(), readable_terminal():
            cli = RecipeCLI(recipe, sys.argv[1:] if args is None else args)
            cli.trainer.fit(cli.model, cli.datamodule, ckpt_path=cli.config.run.resume)
            return _finish(cli, time.monotonic() - started)
    finally:
        if names_the_run:
            os.environ.pop(RUN_NAME_VARIABLE, None)


def run_command(command: Callable[..., object], name: str, args: Sequence[str]) -> None:
    """Call a function with flags that are its own parameters.

    Args:
        command: What to run; its docstring is the help.
        name: How it is called on the command line.
        args: Command line behind the name. Flags may be written with dashes; those of a list may be given several times.
    """
    types = get_type_hints(command)
    lists = {parameter for parameter, kind in types.items() if get_origin(kind) is list}
    with _mistakes_in_one_paragraph(), readable_terminal():
        flags = [_flag(arg, lists) for arg in args]
        auto_cli(command, args=flags, prog=f"python -m lightning_pref {name}", as_positional=False)


def _flag(arg: str, lists: Collection[str]) -> str:
    """An argument as jsonargparse reads it: `--drop-top` is `--drop_top`, and what is a list is appended to.

    >>> _flag("--reward-model=a-b", {"reward_model"})
    '--reward_model+=a-b'
    """
    if not arg.startswith("--"):
        return arg
    name, equals, value = arg.partition("=")
    plain = name[2:].replace("-", "_")
    return f"--{plain}{'+' if plain in lists else ''}{equals}{value}"


@contextmanager
def _mistakes_in_one_paragraph() -> Iterator[None]:
    """What this package raises on purpose is written for the user: one paragraph, no traceback."""
    try:
        yield
    except (ValueError, TypeError, OSError) as error:
        if not _raised_by_us(error):
            raise
        raise SystemExit(f"error: {error}") from error


def _raised_by_us(error: Exception) -> bool:
    """Whether the line that raised is in this package, and not in a library below it."""
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    return Path(frame.f_code.co_filename).is_relative_to(PACKAGE)


def _holds_more_than_a_start(folder: Path) -> bool:
    entries = folder.iterdir() if folder.exists() else []
    return any(not any(entry.match(pattern) for pattern in START_FILES) for entry in entries)


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _finish(cli: RecipeCLI, seconds: float) -> RunResult:
    """Write the export and the summary, and say where everything lies."""
    export = cli.folder / "export" if cli.config.run.export else None
    result = RunResult(cli.folder, export, cli.record.metrics)
    if not cli.trainer.is_global_zero:
        return result
    module, data = cli.model, cli.datamodule
    if export is not None:
        module.save_pretrained(export, data.loaded_tokenizer)
    alerts = read_alerts(cli.folder / ALERTS_FILE)
    write_summary(
        cli.folder / "summary.json",
        recipe=cli.recipe.name,
        steps=cli.trainer.global_step,
        seconds=seconds,
        metrics=cli.record.metrics,
        alerts=len(alerts),
        digests={"data": data.digest, **module.digests()},
    )
    places: dict[str, Path | str] = {
        "run folder": cli.folder,
        "config": cli.folder / "config.yaml",
        "metrics": cli.folder / "metrics.csv",
        "summary": cli.folder / "summary.json",
        "alerts": cli.folder / ALERTS_FILE,
        "checkpoints": cli.folder / "checkpoints",
        **({"model": export} if export is not None else {}),
        "TensorBoard": f"tensorboard --logdir {cli.folder}",
    }
    for callback in cli.trainer.callbacks:  # type: ignore[attr-defined]  # Lightning sets it outside __init__
        if isinstance(callback, GoldReward):
            print_samples(callback.first, callback.last)
    print_summary(
        title=f"{cli.recipe.name}: {_count(cli.trainer.global_step, 'update')} in {seconds:.0f} s",
        metrics=cli.record.metrics,
        headline=cli.recipe.headline,
        places={name: place for name, place in places.items() if not isinstance(place, Path) or place.exists()},
    )
    print_alerts(alerts)
    return result
