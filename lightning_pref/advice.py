"""Words for the user on an error that a library raises and the run knows more about."""

from __future__ import annotations

# Python prints notes below the error's own text; by this one ours are known.
_MARK = "lightning_pref: "


def advise(error: BaseException, text: str) -> None:
    """Add what the user should know and do, for whoever shows the error.

    Args:
        error: On its way to the user.
        text: One paragraph.
    """
    error.add_note(_MARK + text)


def advice_of(error: BaseException) -> str | None:
    """What was advised on an error, or on one in whose wake it came; `None` if nothing was.

    >>> error = MemoryError()
    >>> advise(error, "Buy more.")
    >>> advice_of(error)
    'Buy more.'
    """
    seen: BaseException | None = error
    while seen is not None:
        for note in getattr(seen, "__notes__", ()):
            if note.startswith(_MARK):
                return str(note.removeprefix(_MARK))
        seen = seen.__cause__ or seen.__context__
    return None
