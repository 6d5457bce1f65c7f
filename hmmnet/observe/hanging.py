"""Lists for a person, a line for each entry: where a terminal has no room for one, it goes on below itself::

    migrate.before_copy       host    the source is unmapped, and nothing is
                                      copied yet (delay, fail, crash)

What goes into a pipe or a file keeps one line for each entry, for those who search there; COLUMNS says otherwise.
"""

from __future__ import annotations

import shutil
import textwrap

UNBOUNDED = 1 << 16
"""Columns of what is no terminal."""
ROOM_MIN = 24
"""Columns beside the head that are worth going on in; with fewer, the rest goes on close to the margin."""
INDENT = 6


def hang(head: str, text: str) -> str:
    """`head` and `text`, which goes on below where it began."""
    columns = shutil.get_terminal_size((UNBOUNDED, 0)).columns
    indent = len(head) if columns - len(head) >= ROOM_MIN else INDENT
    told = textwrap.wrap(text, columns, initial_indent=head, subsequent_indent=" " * indent, break_long_words=False, break_on_hyphens=False)
    return "\n".join(told) or head.rstrip()
