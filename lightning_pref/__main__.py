"""`python -m lightning_pref <command>`: tools beside the recipes."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module

# Name -> what it does; `lightning_pref/commands/<name>.py` holds a function of the same name, whose signature is the flags.
COMMANDS: dict[str, str] = {
    "ches": "score preference pairs by how much displacement they are likely to cause, and drop the worst",
    "sample": "sample responses of a model, the best of many, or pairs to be labelled",
    "teacher": "rank reward models by how well they would teach a policy",
}


def main(args: Sequence[str] | None = None) -> None:
    """Run a command; the process's own arguments if none are given."""
    given = list(sys.argv[1:] if args is None else args)
    name = given[0].replace("-", "_") if given else ""
    if name not in COMMANDS:
        _print_commands(given)
        return
    from lightning_pref.cli import run_command

    run_command(getattr(import_module(f"lightning_pref.commands.{name}"), name), name, given[1:])


def _print_commands(given: Sequence[str]) -> None:
    width = max(map(len, COMMANDS))
    listing = "\n".join(f"  {name.ljust(width)}  {text}" for name, text in COMMANDS.items())
    recipes = "Recipes: python -m lightning_pref.recipes.{sft,dpo} [--help]"
    usage = f"usage: python -m lightning_pref COMMAND [--help]\n\n{listing}\n\n{recipes}"
    if given and given[0] not in ("-h", "--help"):
        raise SystemExit(f"error: unknown command {given[0]!r}.\n\n{usage}")
    sys.stdout.write(usage + "\n")


if __name__ == "__main__":
    main()
