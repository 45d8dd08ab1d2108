"""Text that nobody here has written (of data, of models), made harmless for where it is shown."""

from __future__ import annotations

import html

# What Markdown gives a meaning to, and the tables of its dialects.
_MARKDOWN = "\\`*_[]|~"


def on_terminal(text: str) -> str:
    r"""The text on one line, with everything spelled out that a terminal would obey or not show: no colours, no moving cursor.

    >>> on_terminal("a\n\x1b[2Jb")
    'a\\n\\x1b[2Jb'
    """
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def in_html(text: str) -> str:
    """The text as it reads in a browser, with no tag of its own; its lines are kept.

    >>> in_html("<b>a & b</b>")
    '&lt;b&gt;a &amp; b&lt;/b&gt;'
    """
    return html.escape("\n".join(map(on_terminal, text.split("\n"))))


def in_markdown(text: str) -> str:
    r"""The text as it reads in a cell of a Markdown table: no tag, no link, no further cell, no line of its own.

    >>> in_markdown("a | <b>\n`c`")
    'a &#124; &lt;b&gt; &#96;c&#96;'
    """
    line = on_terminal(text.replace("\n", " "))
    return "".join(f"&#{ord(c)};" if c in _MARKDOWN else html.escape(c, quote=False) for c in line)
