"""What `--help` prints: a recipe has two hundred flags, and each is to be found and read."""

from __future__ import annotations

import re
import shutil
from argparse import Action

from jsonargparse import DefaultHelpFormatter
from typing_extensions import override

INDENT = 8
# Of the terminal; in a pipe 80 are assumed.
WIDEST = 120
# Said once, instead of twenty times.
ENDING = (
    "A group of settings can be read from a file of its own: `--model.optimizer my.yaml`. Where a class is taken, its settings "
    "follow its name, and `--trainer.strategy.help NAME` shows them; so for every flag that takes one."
)

_SUBCLASSES = re.compile(r",? ?known subclasses: [^)]*")
_OPTIONAL = re.compile(r"Optional\[Literal\[([^\]]*)\]\]")
_CHOICES = re.compile(r"type: Literal\[[^\]]*\](?:, )?")


class PlainHelp(DefaultHelpFormatter):
    """Leaves out what is said elsewhere: lists of every class there is, choices that the flag itself shows, flags for help."""

    def __init__(self, prog: str) -> None:
        width = min(shutil.get_terminal_size().columns, WIDEST) - 2
        super().__init__(prog, max_help_position=INDENT, width=width)  # type: ignore[no-untyped-call]

    @override
    def _format_action(self, action: Action) -> str:
        is_group = action.help == "Path to a configuration file." and "config" not in action.dest.split(".")
        return "" if is_group or any(flag.endswith(".help") for flag in action.option_strings) else super()._format_action(action)

    @override
    def _expand_help(self, action: Action) -> str:
        text = _OPTIONAL.sub(r"\1, null", _SUBCLASSES.sub("", super()._expand_help(action)))
        return _CHOICES.sub("", text) if action.metavar is None or "{" in str(action.metavar) else text
