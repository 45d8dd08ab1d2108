"""Where a command computes and where it writes, checked before hours of work."""

from __future__ import annotations

from pathlib import Path

import torch


def device_named(name: str) -> torch.device:
    """The device of a `--device` flag; `auto` is a GPU where there is one."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"Unknown device {name!r}; expected `auto`, `cpu`, `cuda`, `cuda:1`, ...") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"The device {name!r} was asked for, but torch sees no GPU here; use `--device cpu`.")
    return device


def output_file(path: str, name: str, *, suffix: str, inputs: tuple[str, ...] = ()) -> Path:
    """A file to be written.

    Args:
        path: As given.
        name: Of the flag, for messages.
        suffix: That the file must have.
        inputs: What is read; none of them may be overwritten.
    """
    file = Path(path)
    if file.suffix != suffix:
        raise ValueError(f"`{name}` is a file that ends with `{suffix}`, got {path!r}.")
    if not file.absolute().parent.is_dir():
        raise FileNotFoundError(f"There is no folder {file.absolute().parent} for `{name}` ({path}); make it first.")
    if any(file.resolve() == Path(source).resolve() for source in inputs):
        raise ValueError(f"`{name}` is {path}, which is read, too, and would be overwritten; give another name.")
    return file
