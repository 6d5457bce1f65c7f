"""Tables on narrow terminals: nothing is cut, whatever the width."""

from __future__ import annotations

import io

import pytest
from rich.console import Console
from rich.table import Table

from hmmnet.observe.fitted import Fitted

ROWS = [
    ("two-gpus", "2", "A workstation with two GPUs on PCIe 4.0 x16."),
    ("a-rather-long-name", "64", "[green]Sixty-four[/] GPUs: supercalifragilisticexpialidocious"),
    ("bare", "", "31.5\n500 ns"),
]


def table(**more: object) -> Table:
    made = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), **more)  # type: ignore[arg-type]
    for heading in ("name", "devices", "what it is"):
        made.add_column(heading, justify="right" if heading == "devices" else "left")
    for row in ROWS:
        made.add_row(*row)
    return made


def printed(made: Table, width: int, key: int = 0) -> list[str]:
    console = Console(width=width, file=io.StringIO(), highlight=False)
    console.print(Fitted(made, key))
    assert isinstance(console.file, io.StringIO)
    return [line.rstrip() for line in console.file.getvalue().splitlines()]


@pytest.mark.parametrize("width", [10, 20, 30, 40, 44, 45, 50, 60, 80, 200])
@pytest.mark.parametrize("headed", [True, False])
def test_every_letter_is_there_at_every_width(width: int, headed: bool) -> None:
    """Folded, or in lines of its own; no line is longer than the terminal."""
    lines = printed(table(show_header=headed), width)
    assert max(map(len, lines)) <= width
    assert "…" not in "".join(lines)
    letters = sorted(letter for line in lines for letter in line if letter not in " ,:")
    wanted = "".join(cell.replace("[green]", "").replace("[/]", "") for row in ROWS for cell in row)
    for letter in set(wanted) - set(" ,:\n"):
        assert letters.count(letter) >= wanted.count(letter), letter


def test_what_fits_is_the_table_itself() -> None:
    """As it was."""
    console = Console(width=120, file=io.StringIO(), highlight=False)
    console.print(table())
    assert isinstance(console.file, io.StringIO)
    assert printed(table(), 120) == [line.rstrip() for line in console.file.getvalue().splitlines()]


def test_the_widest_column_folds_while_enough_of_it_is_left() -> None:
    """The others keep their lines."""
    lines = printed(table(), 50)
    assert lines[:3] == [
        "name                devices  what it is",
        "two-gpus                  2  A workstation with",
        "                             two GPUs on PCIe 4.0",
    ]


def test_where_nothing_can_fold_each_row_has_lines_of_its_own() -> None:
    """Headings before their cells; empty cells are left out, lines of a cell stand side by side."""
    assert printed(table(title="Machines"), 40) == [
        "Machines",
        "two-gpus",
        "  devices: 2",
        "  what it is: A workstation with two",
        "  GPUs on PCIe 4.0 x16.",
        "a-rather-long-name",
        "  devices: 64",
        "  what it is: Sixty-four GPUs:",
        "  supercalifragilisticexpialidocious",
        "bare",
        "  what it is: 31.5, 500 ns",
    ]


def test_another_column_may_head_the_lines() -> None:
    """Where the first says less."""
    assert printed(table(), 40, key=1)[:4] == ["2", "  name: two-gpus", "  what it is: A workstation with two", "  GPUs on PCIe 4.0 x16."]
