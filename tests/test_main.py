from __future__ import annotations

import importlib
import inspect
import subprocess
import sys
from typing import Any

import pytest

from lightning_pref.__main__ import COMMANDS, main
from lightning_pref.cli import run_command


def test_without_a_command_the_commands_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    main([])
    shown = capsys.readouterr().out
    assert all(f"  {name} " in shown for name in COMMANDS)
    assert "python -m lightning_pref COMMAND" in shown


def test_an_unknown_command_is_named_beside_the_known_ones() -> None:
    with pytest.raises(SystemExit, match=r"error: unknown command 'chess'\.[\s\S]*ches "):
        main(["chess"])


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_every_command_is_a_documented_function_of_its_own_file(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    function = getattr(importlib.import_module(f"lightning_pref.commands.{name}"), name)
    assert inspect.getdoc(function)
    with pytest.raises(SystemExit) as exit_:
        main([name, "--help"])
    assert exit_.value.code == 0
    shown = capsys.readouterr().out
    for parameter in inspect.signature(function).parameters:
        assert f"--{parameter}" in shown


def test_flags_may_be_written_with_dashes_and_those_of_a_list_repeated() -> None:
    seen: dict[str, Any] = {}

    def command(names: list[str], drop_top: str = "0", num_rows: int = 1) -> None:
        """Keep what was given.

        Args:
            names: Some names.
            drop_top: A share.
            num_rows: A number.
        """
        seen.update(names=names, drop_top=drop_top, num_rows=num_rows)

    run_command(command, "keep", ["--names", "a-b", "--names=c", "--drop-top", "5%", "--num_rows=3"])
    assert seen == {"names": ["a-b", "c"], "drop_top": "5%", "num_rows": 3}


def test_a_mistake_ends_in_one_paragraph() -> None:
    with pytest.raises(SystemExit, match=r"^error: no such file or folder: .*pairs.jsonl"):
        main(["ches", "--model", "playground:tiny", "--data", "nowhere/pairs.jsonl"])


@pytest.mark.slow
def test_the_package_runs_as_a_module() -> None:
    done = subprocess.run([sys.executable, "-m", "lightning_pref"], capture_output=True, text=True, timeout=120, check=True)
    assert "COMMAND" in done.stdout
