"""One command line for every recipe: Lightning's own, with a run folder, a summary and a plain export around it."""

from __future__ import annotations

import hashlib
import logging
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, get_origin, get_type_hints

import lightning as L
from jsonargparse import Namespace, auto_cli
from lightning.pytorch.callbacks import Callback, Checkpoint, LearningRateMonitor, ProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.loggers import TensorBoardLogger
from typing_extensions import override

from lightning_pref.arguments import PlainErrors, RecipeParser, as_parsed, divided
from lightning_pref.callbacks import ExactResume, FaultAdvice, GoldReward, NonFiniteGuard, Throughput
from lightning_pref.callbacks.hosts import ALERTS_FILE, alerts_folder
from lightning_pref.callbacks.lost_updates import meter_for
from lightning_pref.callbacks.throughput import Work, group_work
from lightning_pref.checkpoints import read_manifest
from lightning_pref.data.datamodule import PreferenceData
from lightning_pref.data.playground_source import is_playground
from lightning_pref.help_text import ENDING, PlainHelp
from lightning_pref.mistakes import mistakes_in_one_paragraph, without_debug
from lightning_pref.models.presets import is_preset
from lightning_pref.modules.group_module import GroupModule
from lightning_pref.reports.console import LIGHTNING_LOG, RunProgressBar, StartLine, readable_terminal
from lightning_pref.reports.metrics_file import MetricsFile, read_metrics
from lightning_pref.reports.summary import (
    FirstLast,
    RunRecord,
    print_alerts,
    print_samples,
    print_summary,
    read_alerts,
    write_summary,
)
from lightning_pref.run_folder import RUN_NAME_VARIABLE, RunFolder, resume_point, run_name, warn_of_restarts

PACKAGE = Path(__file__).parent
CONFIGS = PACKAGE / "recipes" / "configs"
DEBUG_HELP = "--debug shows the traceback of an error as well."


@dataclass(frozen=True, kw_only=True)
class RunSettings:
    """Where a run lives.

    Args:
        root: Folder above all runs.
        name: Folder of this run below `<root>/<recipe>`; date and time if not given.
        resume: Checkpoint to go on from, or `auto` for the newest whole one of this run, if there is any; also `--resume`.
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
    about: str | None  # what `--help` begins with
    # Run before anything is built; may change the configuration (a first stage that trains the model to start from).
    before: Callable[[Namespace, Path], None] = lambda config, folder: None
    # Further callbacks for this configuration.
    callbacks: Callable[[Namespace], list[Callback]] = lambda config: []
    data: type[L.LightningDataModule] = PreferenceData
    # Size of a batch of that data, for the throughput.
    work: Callable[[Any], Work] = group_work  # Any: a batch of the recipe's own data
    # Adds to `--help` what is dealt with before the command line is parsed.
    explain: Callable[[LightningArgumentParser], None] = lambda parser: None


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
        self.claim: RunFolder | None = None
        self.checkpoint: Path | None = None  # to go on from
        self.record = RunRecord()
        try:
            super().__init__(
                recipe.module,
                recipe.data,
                parser_class=RecipeParser,
                seed_everything_default=0,
                save_config_callback=RunConfig,
                save_config_kwargs={"save_to_log_dir": False},
                parser_kwargs={
                    "prog": f"python -m lightning_pref.recipes.{recipe.name}",
                    "usage": "%(prog)s [--config FILE] [--FLAG VALUE ...]",
                    "description": recipe.about,
                    "epilog": f"{ENDING} {DEBUG_HELP}",
                    "formatter_class": PlainHelp,
                },
                run=False,
                auto_configure_optimizers=False,
                args=list(args),
            )
        except BaseException:
            self.release_folder()
            raise

    @override
    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_class_arguments(RunSettings, "run")
        self.recipe.explain(parser)
        parser.add_class_arguments(ExactResume, "checkpoint")
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
        runs = Path(self.config.run.root) / self.recipe.name
        self.folder = runs / run_name(self.config.run.name, runs)
        self.claim = RunFolder(self.folder, resumes=self.config.run.resume is not None)
        warn_of_restarts()
        self.checkpoint = resume_point(self.config.run.resume, self.folder, self._checkpoints)
        self._spread_seed()
        # The constructors refuse what cannot be meant; better so before a first stage than after it.
        parts = Namespace(model=self.config.model, data=self.config.data)  # type: ignore[no-untyped-call]
        self.parser.instantiate_classes(parts)
        if on_playground(self.config):
            _check_devices(self.config.trainer)
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

    def release_folder(self) -> None:
        """Let another run have the run folder."""
        if self.claim is not None:
            self.claim.release()

    @override
    def instantiate_trainer(self, **kwargs: Any) -> L.Trainer:
        asked = self.config_init.trainer
        if asked.logger in (None, True):
            # Both loggers write straight into the run folder: the version is the folder itself.
            root, version = str(self.folder.parent), self.folder.name
            manifest = None if self.checkpoint is None else read_manifest(self.checkpoint)
            # What was drawn after the checkpoint is drawn again.
            purge = None if manifest is None else manifest.step + 1
            board = TensorBoardLogger(root, name="", version=version, purge_step=purge)
            kwargs["logger"] = [board, MetricsFile(self.folder)]
        callbacks: list[Callback] = [
            StartLine(self.recipe.name, self.folder),
            NonFiniteGuard(),
            FaultAdvice(),
            Throughput(self.recipe.work),
            *self.recipe.callbacks(self.config),
            *meter_for(asked.precision, self.config.model.loading.dtype, asked.strategy),
        ]
        given = asked.callbacks if isinstance(asked.callbacks, list) else [asked.callbacks] if asked.callbacks else []
        if asked.logger is not False:
            callbacks.append(LearningRateMonitor(logging_interval="step"))
        if asked.enable_checkpointing is not False:
            self.config_init.checkpoint.digests = self._digests
            callbacks.append(self.config_init.checkpoint)
            # Else Lightning would add a ModelCheckpoint beside it.
            kwargs["enable_checkpointing"] = any(isinstance(c, Checkpoint) for c in given)
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

    @property
    def _checkpoints(self) -> Path:
        return Path(self.config.checkpoint.dirpath or self.folder / "checkpoints")

    def _digests(self) -> dict[str, str]:
        """What a run that goes on must have in common with the checkpoint; of the configuration it is told only."""
        settings = self.parser.dump(self._meant(), skip_none=False)
        config = hashlib.sha256(settings.encode()).hexdigest()
        return {"data": self.datamodule.digest, "tokenizer": self.datamodule.tokenizer_digest, "config": config}

    def _meant(self) -> Namespace:
        """The configuration without what may differ between the parts of one run: where it lies, and how long it goes on."""
        config: Namespace = self.config.clone()
        for key in ("run", "checkpoint", "config"):
            config.pop(key, None)
        for key in ("max_steps", "max_epochs", "max_time", "logger", "callbacks", "enable_progress_bar", "default_root_dir"):
            config.trainer.pop(key, None)
        config.data.pop("cache_dir", None)
        return config


def run_recipe(recipe: Recipe, args: Sequence[str] | None = None) -> RunResult:
    """Parse, train, export, summarise.

    Args:
        recipe: What to run.
        args: Command line; the process's own if not given.
    """
    started = time.monotonic()
    names_the_run = RUN_NAME_VARIABLE not in os.environ  # not so for a first stage, nor in a process Lightning started
    flags, debug = without_debug(sys.argv[1:] if args is None else args)
    flags = ["--run.resume" + flag.removeprefix("--resume") if flag.split("=")[0] == "--resume" else flag for flag in flags]
    try:
        with mistakes_in_one_paragraph(debug=debug) as progress, readable_terminal():
            cli = RecipeCLI(recipe, flags)
            progress.folder = cli.folder
            try:
                checkpoint = None if cli.checkpoint is None else str(cli.checkpoint)
                cli.trainer.fit(cli.model, cli.datamodule, ckpt_path=checkpoint, weights_only=True)
                return _finish(cli, time.monotonic() - started)
            finally:
                cli.release_folder()
    finally:
        if names_the_run:
            os.environ.pop(RUN_NAME_VARIABLE, None)


def run_command(command: Callable[..., object], name: str, args: Sequence[str]) -> None:
    """Call a function with flags that are its own parameters.

    Args:
        command: What to run; its docstring is the help.
        name: How it is called on the command line.
        args: Command line behind the name. Flags may be written with dashes; those of a list may be given several times.
            What stands behind `--` goes to a parameter `flags`, and so does `--config` where there is one.
    """
    types = get_type_hints(command)
    lists = {parameter for parameter, kind in types.items() if get_origin(kind) is list}
    given, debug = without_debug(args)
    with mistakes_in_one_paragraph(debug=debug), readable_terminal():
        own, handed_on = divided(given, lists)
        flags = [*(as_parsed(arg, lists) for arg in own), *handed_on]
        auto_cli(
            command,
            args=flags,
            parser_class=PlainErrors,
            prog=f"python -m lightning_pref {name}",
            epilog=DEBUG_HELP,
            formatter_class=PlainHelp,
            as_positional=False,
        )


def _check_devices(asked: Namespace) -> None:
    """Let Lightning refuse what it would refuse after the first stages."""
    strategy = asked.strategy if isinstance(asked.strategy, str) else "auto"
    chosen = {name: asked[name] for name in ("accelerator", "devices", "num_nodes", "precision") if asked[name] is not None}
    level = logging.getLogger(LIGHTNING_LOG).level
    logging.getLogger(LIGHTNING_LOG).setLevel(logging.WARNING)  # the trainer of the run says it again
    try:
        L.Trainer(strategy=strategy, logger=False, enable_checkpointing=False, enable_progress_bar=False, **chosen)
    finally:
        logging.getLogger(LIGHTNING_LOG).setLevel(level)


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _finish(cli: RecipeCLI, seconds: float) -> RunResult:
    """Write the export and the summary, and say where everything lies."""
    export = cli.folder / "export" if cli.config.run.export else None
    # A run that had ended already, and was resumed all the same, has measured nothing by itself.
    was_over = not cli.record.metrics
    result = RunResult(cli.folder, export, read_metrics(cli.folder) if was_over else cli.record.metrics)
    alerts_file = (alerts_folder(cli.trainer) or cli.folder) / ALERTS_FILE  # all processes are asked where it is
    if not cli.trainer.is_global_zero:
        return result
    module, data = cli.model, cli.datamodule
    if export is not None:
        module.save_pretrained(export, data.loaded_tokenizer)
    alerts = read_alerts(alerts_file)
    write_summary(
        cli.folder / "summary.json",
        recipe=cli.recipe.name,
        steps=cli.trainer.global_step,
        seconds=seconds,
        metrics=result.metrics,
        alerts=len(alerts),
        digests={"data": data.digest, **module.digests()},
    )
    places: dict[str, Path | str] = {
        "run folder": cli.folder,
        "config": cli.folder / "config.yaml",
        "metrics": cli.folder / "metrics.csv",
        "summary": cli.folder / "summary.json",
        "alerts": alerts_file,
        "checkpoints": cli.folder / "checkpoints",
        **({"model": export} if export is not None else {}),
        "TensorBoard": f"tensorboard --logdir {cli.folder}",
    }
    for callback in cli.trainer.callbacks:  # type: ignore[attr-defined]  # Lightning sets it outside __init__
        if isinstance(callback, GoldReward) and not was_over:
            print_samples(callback.first, callback.last)
    print_summary(
        title=f"{cli.recipe.name}: {_count(cli.trainer.global_step, 'update')} in {seconds:.0f} s",
        metrics=result.metrics,
        headline=cli.recipe.headline,
        places={name: place for name, place in places.items() if not isinstance(place, Path) or place.exists()},
    )
    print_alerts(alerts)
    return result
