"""Where pages live, over the time of a run: a small picture.

A sample counts the pages that each owner holds at one moment. The terminal picture has a column for each sample and, from bottom to top, a
stack of the owners' shares; the SVG is the same at full resolution. Both are meant to be read in two seconds: pages leave, pages
come home.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING

from hmmnet.units import show_time

if TYPE_CHECKING:
    from rich.text import Text

ABSENT = "untouched"
OTHERS = "others"
OWNERS_MAX = 9
"""More cannot be told apart by colour."""
COLOURS = ("#4c78a8", "#f58518", "#54a24b", "#e45756", "#72b7b2", "#b279a2", "#eeca3b", "#9d755d", "#ff9da6")
TERMINAL = ("blue", "yellow", "green", "red", "cyan", "magenta", "bright_yellow", "bright_red", "bright_cyan")
ABSENT_COLOUR = "#d0d0d0"
FEW = 0.5
"""Whoever holds less than this part of a row still gets the row, in small letters."""
SLIVER_PIXELS = 2
"""A single page is still seen."""
LABEL_WIDTH = 6.5
"""Pixels of a letter of a label."""
LETTERS = "HABCDEFGIJKLMNOPQRSTUVWXYZ"
"""A letter for each owner, so that the picture also reads without colours: H is the host, then A, B, C ..."""


@dataclass(frozen=True)
class Sample:
    """Pages by owner at emulated `at_s`; `label` says what had just happened."""

    at_s: float
    pages: Mapping[str, int]
    label: str = ""


def owners_of(samples: Sequence[Sample]) -> list[str]:
    """Every owner, in order of appearance, what is untouched last."""
    seen = dict.fromkeys(owner for sample in samples for owner in sample.pages if owner != ABSENT)
    return [*seen, ABSENT] if any(sample.pages.get(ABSENT) for sample in samples) else list(seen)


def folded(samples: Sequence[Sample]) -> list[Sample]:
    """The same samples with no more than `OWNERS_MAX` owners: those that appear last become `OTHERS`."""
    owners = [owner for owner in owners_of(samples) if owner != ABSENT]
    if len(owners) <= OWNERS_MAX:
        return list(samples)
    kept = {*owners[: OWNERS_MAX - 1], ABSENT}
    out = []
    for sample in samples:
        pages = {owner: count for owner, count in sample.pages.items() if owner in kept}
        rest = sum(count for owner, count in sample.pages.items() if owner not in kept)
        out.append(Sample(sample.at_s, {**pages, OTHERS: rest} if rest else pages, sample.label))
    return out


def _heights(sample: Sample, owners: Sequence[str], rows: int) -> list[int]:
    """Rows for each owner, which add up to `rows`: by largest remainder, but at least one for everybody who holds a page."""
    total = sum(sample.pages.values())
    if total == 0:
        return [0] * len(owners)
    exact = [sample.pages.get(owner, 0) * rows / total for owner in owners]
    holders = sum(share > 0 for share in exact)
    least = 1 if holders <= rows else 0
    heights = [max(int(share), least if share > 0 else 0) for share in exact]
    while sum(heights) < rows:
        heights[max(range(len(owners)), key=lambda i: exact[i] - heights[i])] += 1
    while sum(heights) > rows:
        heights[max((i for i in range(len(owners)) if heights[i] > least), key=lambda i: heights[i] - exact[i])] -= 1
    return heights


def terminal_picture(samples: Sequence[Sample], rows: int = 8, column_width: int = 3, labelled: bool = False) -> Text:
    """The picture for a terminal: one column for each sample, its number under it (or its label, when `labelled`), then a legend."""
    from rich.text import Text

    samples = folded(samples)
    owners = owners_of(samples)
    letters = {owner: "." if owner == ABSENT else LETTERS[i % len(LETTERS)] for i, owner in enumerate(owners)}
    styles = {owner: "dim" if owner == ABSENT else TERMINAL[i % len(TERMINAL)] for i, owner in enumerate(owners)}
    stacks, few = [], []
    for sample in samples:
        heights = _heights(sample, owners, rows)
        stacks.append([owner for owner, height in zip(owners, heights, strict=True) for _ in range(height)])
        few.append({owner for owner in owners if 0 < sample.pages.get(owner, 0) * rows < FEW * sum(sample.pages.values())})
    picture = Text()
    for row in reversed(range(rows)):
        for stack, slivers in zip(stacks, few, strict=True):
            owner = stack[row] if row < len(stack) else ""
            letter = letters.get(owner, " ")
            picture.append(f"{(letter.lower() if owner in slivers else letter) * column_width} ", style=styles.get(owner, ""))
        picture.append("\n")
    for number, sample in enumerate(samples, 1):
        caption = sample.label[:column_width] if labelled else str(number)
        picture.append(f"{caption:<{column_width}} ", style="dim")
    picture.append("\n")
    for i, owner in enumerate(owners):
        picture.append(("   " if i else "") + letters[owner], style=styles[owner])
        picture.append(f" {owner}")
    if any(few):
        picture.append("\nsmall letters: some pages, less than half a row", style="dim")
    return picture


def svg_picture(samples: Sequence[Sample], width: int = 720, height: int = 220) -> str:
    """The picture as a stand-alone SVG document: stacked columns with labels and a legend."""
    samples = folded(samples)
    owners = owners_of(samples)
    colours = {owner: ABSENT_COLOUR if owner == ABSENT else COLOURS[i % len(COLOURS)] for i, owner in enumerate(owners)}
    legend, legend_rows = _legend(owners, colours, width, height)
    left, top, bottom = 10, 30, 42 + 18 * legend_rows
    step = (width - 2 * left) / max(len(samples), 1)
    tall = height - top - bottom
    size = f'width="{width}" height="{height}" viewBox="0 0 {width} {height}"'
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="sans-serif" font-size="11">',
        f'<rect width="{width}" height="{height}" fill="white"/>',
        f'<text x="{left}" y="18" font-size="13">Where the pages live</text>',
    ]
    for number, sample in enumerate(samples):
        x, y = left + number * step, float(top + tall)
        for owner, share in zip(owners, _shares(sample, owners, SLIVER_PIXELS / tall), strict=True):
            y -= tall * share
            title = f"<title>{escape(owner)}: {sample.pages.get(owner, 0):,} pages</title>"
            parts.append(
                f'<rect x="{x:.1f}" y="{y:.1f}" width="{step * 0.9:.1f}" height="{tall * share:.1f}" fill="{colours[owner]}">{title}</rect>'
            )
        letters = max(1, int(step / LABEL_WIDTH))
        parts.append(f'<text x="{x:.1f}" y="{top + tall + 14}">{escape((sample.label or show_time(sample.at_s))[:letters])}</text>')
    return "\n".join([*parts, *legend, "</svg>"]) + "\n"


def _shares(sample: Sample, owners: Sequence[str], least: float) -> list[float]:
    """Shares that add up to 1 (0 for an empty sample), none of a holder smaller than `least`."""
    total = sum(sample.pages.values())
    if total == 0:
        return [0.0] * len(owners)
    shares = [max(least, pages / total) if (pages := sample.pages.get(owner, 0)) else 0.0 for owner in owners]
    return [share / sum(shares) for share in shares]


def _legend(owners: Sequence[str], colours: Mapping[str, str], width: int, height: int) -> tuple[list[str], int]:
    """The legend's elements, and in how many rows they stand."""
    step = 36 + LABEL_WIDTH * max((len(owner) for owner in owners), default=1)
    per_row = max(1, int((width - 20) / step))
    rows = max(1, -(-len(owners) // per_row))
    parts = []
    for i, owner in enumerate(owners):
        x, y = 10 + i % per_row * step, height - 22 - 18 * (rows - 1 - i // per_row)
        parts.append(f'<rect x="{x:.0f}" y="{y}" width="12" height="12" fill="{colours[owner]}"/>')
        parts.append(f'<text x="{x + 17:.0f}" y="{y + 10}">{escape(owner)}</text>')
    return parts, rows
