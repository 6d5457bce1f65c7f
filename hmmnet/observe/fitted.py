"""Tables on narrow terminals: nothing of them is cut.

What fits is a table. Else its widest column folds, if `FOLDED_MIN` of it remain; else each row is told in lines of its own::

    two-gpus
      devices: 2
      links: 2
      what it is: A workstation with two GPUs on PCIe 4.0 x16.
"""

from __future__ import annotations

from collections.abc import Iterator
from copy import copy
from dataclasses import replace

from rich.console import Console, ConsoleOptions, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

FOLDED_MIN = 16
"""Letters of a folded column: two or three words."""
WIDTH_MAX = 1 << 12
"""Wider than any table."""
INDENT = 2


class Fitted:
    """`table`, whose cells are markup, as the console has room for it."""

    def __init__(self, table: Table, key: int = 0) -> None:
        self.table = table
        self.key = key
        """The column that heads a row's lines."""

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[RenderableType]:
        excess = console.measure(self.table, options=options.update(max_width=WIDTH_MAX)).maximum - options.max_width
        if excess <= 0:
            yield self.table
            return
        columns = [[_text(console, cell) for cell in column.cells] for column in self.table.columns]
        headings = [_text(console, column.header) for column in self.table.columns]
        widths = [max(_width(text) for text in (heading, *cells)) for heading, cells in zip(headings, columns, strict=True)]
        widest = widths.index(max(widths))
        if widths[widest] - excess >= FOLDED_MIN:
            yield self._folded(widest, widths[widest] - excess)
            return
        if self.table.title:
            yield _text(console, self.table.title)
        for row in zip(*columns, strict=True):
            yield from self._told(headings, row)

    def _folded(self, at: int, width: int) -> Table:
        table = copy(self.table)
        table.columns = [
            replace(column, width=width, no_wrap=False, overflow="fold") if i == at else replace(column, no_wrap=True)
            for i, column in enumerate(self.table.columns)
        ]
        return table

    def _told(self, headings: list[Text], row: tuple[Text, ...]) -> Iterator[RenderableType]:
        first = row[self.key].copy()
        first.overflow = "fold"
        yield first
        for heading, cell in zip(headings, row, strict=True):
            if cell is not row[self.key] and cell.plain.strip():
                told = Text(", ").join(cell.split("\n"))
                named = self.table.show_header and heading.plain
                line = Text.assemble(f"{heading.plain}: ", told) if named else told
                line.overflow = "fold"
                yield Padding(line, (0, 0, 0, INDENT), expand=False)


def _text(console: Console, cell: RenderableType) -> Text:
    return cell if isinstance(cell, Text) else console.render_str(str(cell))


def _width(text: Text) -> int:
    return max((line.cell_len for line in text.split("\n")), default=0)
