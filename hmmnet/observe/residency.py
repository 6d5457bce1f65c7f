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
COLOURS = ("#4c78a8", "#f58518", "#54a24b", "#e45756", "#72b7b2", "#b279a2", "#eeca3b", "#9d755d", "#ff9da6")
TERMINAL = ("blue", "yellow", "green", "red", "cyan", "magenta", "bright_yellow", "bright_red", "bright_cyan")
ABSENT_COLOUR = "#d0d0d0"
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


def _heights(sample: Sample, owners: Sequence[str], rows: int) -> list[int]:
    """Rows for each owner, by largest remainder, so that they add up to `rows` and nobody who holds a page vanishes unseen."""
    total = sum(sample.pages.values())
    if total == 0:
        return [0] * len(owners)
    exact = [sample.pages.get(owner, 0) * rows / total for owner in owners]
    heights = [int(share) for share in exact]
    by_remainder = sorted(range(len(owners)), key=lambda i: heights[i] - exact[i])
    for i in by_remainder[: rows - sum(heights)]:
        heights[i] += 1
    return heights


def terminal_picture(samples: Sequence[Sample], rows: int = 8, column_width: int = 3, labelled: bool = False) -> Text:
    """The picture for a terminal: one column for each sample, its number under it (or its label, when `labelled`), then a legend."""
    from rich.text import Text

    owners = owners_of(samples)
    letters = {owner: "." if owner == ABSENT else LETTERS[i % len(LETTERS)] for i, owner in enumerate(owners)}
    styles = {owner: "dim" if owner == ABSENT else TERMINAL[i % len(TERMINAL)] for i, owner in enumerate(owners)}
    stacks = []
    for sample in samples:
        heights = _heights(sample, owners, rows)
        stacks.append([owner for owner, height in zip(owners, heights, strict=True) for _ in range(height)])
    picture = Text()
    for row in reversed(range(rows)):
        for stack in stacks:
            owner = stack[row] if row < len(stack) else ""
            picture.append(f"{letters.get(owner, ' ') * column_width} ", style=styles.get(owner, ""))
        picture.append("\n")
    for number, sample in enumerate(samples, 1):
        caption = sample.label[:column_width] if labelled else str(number)
        picture.append(f"{caption:<{column_width}} ", style="dim")
    picture.append("\n")
    for i, owner in enumerate(owners):
        picture.append(("   " if i else "") + letters[owner], style=styles[owner])
        picture.append(f" {owner}")
    return picture


def svg_picture(samples: Sequence[Sample], width: int = 720, height: int = 220) -> str:
    """The picture as a stand-alone SVG document: stacked columns with labels and a legend."""
    owners = owners_of(samples)
    colours = {owner: ABSENT_COLOUR if owner == ABSENT else COLOURS[i % len(COLOURS)] for i, owner in enumerate(owners)}
    left, top, bottom = 10, 30, 60
    step = (width - 2 * left) / max(len(samples), 1)
    tall = height - top - bottom
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" viewBox="0 0 {width} {height}" font-family="sans-serif" font-size="11">',
        f'<rect width="{width}" height="{height}" fill="white"/>',
        f'<text x="{left}" y="18" font-size="13">Where the pages live</text>',
    ]
    for number, sample in enumerate(samples):
        x, y, total = left + number * step, float(top + tall), sum(sample.pages.values()) or 1
        for owner in owners:
            part = tall * sample.pages.get(owner, 0) / total
            y -= part
            parts.append(f'<rect x="{x:.1f}" y="{y:.1f}" width="{step * 0.9:.1f}" height="{part:.1f}" fill="{colours[owner]}"/>')
        parts.append(f'<text x="{x:.1f}" y="{top + tall + 14}">{escape(sample.label or show_time(sample.at_s))}</text>')
    for i, owner in enumerate(owners):
        x = left + i * 110
        parts.append(f'<rect x="{x}" y="{height - 22}" width="12" height="12" fill="{colours[owner]}"/>')
        parts.append(f'<text x="{x + 17}" y="{height - 12}">{escape(owner)}</text>')
    return "\n".join([*parts, "</svg>"]) + "\n"
