"""Rewards that are Python functions: the user's own, and those of the playground."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from importlib import import_module

from lightning_pref.data.playground import gold_reward, proxy_reward
from lightning_pref.data.playground_reward import Flaw, Text
from lightning_pref.data.playground_source import is_playground

# What it returns is checked: it is the user's.
RewardFunction = Callable[..., object]

_FUNCTION = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")
_PLAYGROUND = ("playground:gold", "playground:length", "playground:proxy")


def names_function(name: str) -> bool:
    """Whether a reward of this name is a function, and not a model."""
    return is_playground(name) or _FUNCTION.fullmatch(name) is not None


def function_named(name: str, flaw: Flaw | None = None) -> RewardFunction | None:
    """The function behind `module:function` or a reward of the playground; `None` for a model.

    Args:
        name: As on the command line.
        flaw: Of `playground:proxy`.
    """
    if is_playground(name):
        if name not in _PLAYGROUND:
            raise ValueError(f"Unknown reward {name!r} of the playground; known: {', '.join(_PLAYGROUND)}.")
        if name == "playground:gold":
            return gold_reward
        return _proxy("length" if name == "playground:length" else flaw)
    if not names_function(name):
        return None
    module_name, _, function_name = name.partition(":")
    try:
        module = import_module(module_name)
    except ModuleNotFoundError as error:
        raise ValueError(
            f"There is no Python module {module_name!r} for the reward {name!r}; run in its folder, or put that on PYTHONPATH."
        ) from error
    function = getattr(module, function_name, None)
    if not callable(function):
        raise ValueError(f"The module {module_name!r} has no function {function_name!r}, which the reward {name!r} names.")
    found: RewardFunction = function
    return found


def _proxy(flaw: Flaw | None) -> RewardFunction:
    def proxy(prompt: Text, response: str) -> float:
        return proxy_reward(prompt, response, flaw)

    return proxy


def further_parameters(function: RewardFunction) -> list[str]:
    """Names of the parameters behind prompt and response that have no default."""
    _, _, *rest = inspect.signature(function).parameters.values()
    variable = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return [p.name for p in rest if p.kind not in variable and p.default is inspect.Parameter.empty]
