"""`python -m lightning_pref <command>`: tools beside the recipes."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from difflib import get_close_matches
from importlib import import_module

# Name -> what it does; `lightning_pref/commands/<name>.py` holds a function of the same name, whose signature is the flags.
COMMANDS: dict[str, str] = {
    "ches": "score preference pairs by how much displacement they are likely to cause, and drop the worst",
    "ray": "run a recipe on a Ray cluster",
    "sample": "sample responses of a model, the best of many, or pairs to be labelled",
    "teacher": "rank reward models by how well they would teach a policy",
    "verify_resume": "show on your own configuration that an interrupted and resumed run is the uninterrupted one, bit for bit",
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
    if given and given[0] not in ("-h", "--help"):
        from lightning_pref.mistakes import end

        near = get_close_matches(given[0].replace("-", "_"), COMMANDS, n=1)
        hint = f"Did you mean {near[0]!r}? " if near else ""
        known = "; ".join(f"{name} ({text})" for name, text in COMMANDS.items())
        end(f"unknown command {given[0]!r}. {hint}Known: {known}.")
    width = max(map(len, COMMANDS))
    listing = "\n".join(f"  {name.ljust(width)}  {text}" for name, text in COMMANDS.items())
    recipes = "Recipes: python -m lightning_pref.recipes.{sft,reward,dpo,rlhf} [--help]"
    usage = f"usage: python -m lightning_pref COMMAND [--help]\n\n{listing}\n\n{recipes}"
    try:
        sys.stdout.write(usage + "\n")
        sys.stdout.flush()
    except BrokenPipeError:
        # `... | head` has seen enough; what is left in the buffer would fail once more when Python ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


if __name__ == "__main__":
    main()
