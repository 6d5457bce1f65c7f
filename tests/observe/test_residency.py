"""Where pages live, as a picture: columns that are full, and nobody who holds a page is left out."""

from __future__ import annotations

from xml.etree import ElementTree as ET

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hmmnet.observe.residency import ABSENT, OTHERS, OWNERS_MAX, Sample, folded, owners_of, svg_picture, terminal_picture

SVG = "{http://www.w3.org/2000/svg}"
OWNERS = st.sampled_from(["host", "gpu0", "gpu1", "gpu2", ABSENT])
SAMPLES = st.lists(st.dictionaries(OWNERS, st.integers(0, 10**6), max_size=5), min_size=1, max_size=6).map(
    lambda pages: [Sample(float(i), one, f"step {i}") for i, one in enumerate(pages)]
)


def columns(samples: list[Sample], rows: int) -> list[str]:
    """The stacks of the terminal picture, from top to bottom, with one letter a row."""
    lines = terminal_picture(samples, rows, 1).plain.splitlines()[:rows]
    return ["".join(line[2 * i] for line in lines) for i in range(len(samples))]


@given(SAMPLES, st.integers(5, 12))
def test_columns_are_full(samples: list[Sample], rows: int) -> None:
    """A column has a row for everybody who holds a page; nothing held, nothing drawn."""
    for sample, column in zip(samples, columns(samples, rows), strict=True):
        holders = [owner for owner, pages in sample.pages.items() if pages]
        if holders:
            assert " " not in column
            assert len({letter.upper() for letter in column}) == len(holders)
        else:
            assert column == " " * rows


def test_shares() -> None:
    """The first owner at the bottom, what is untouched on top; slivers in small letters, and that is said."""
    samples = [Sample(0.0, {"host": 50, "gpu0": 25, ABSENT: 25}), Sample(1.0, {"host": 1, "gpu0": 9999})]
    assert columns(samples, 4) == [".AHH", "AAAh"]
    assert "small letters" in terminal_picture(samples, 4).plain
    assert "small letters" not in terminal_picture(samples[:1], 4).plain


def test_labels_under_the_columns() -> None:
    """The step's name, cut to the column."""
    lines = terminal_picture([Sample(0.0, {"host": 1}, "migrated")], 2, 4, labelled=True).plain.splitlines()
    assert lines == ["HHHH ", "HHHH ", "migr ", "H host"]


def test_many_owners_are_folded() -> None:
    """More than can be told apart become one; no page is lost."""
    samples = [Sample(0.0, {f"gpu{i}": i + 1 for i in range(64)} | {ABSENT: 5})]
    few = folded(samples)
    assert len(owners_of(few)) == OWNERS_MAX + 1
    assert OTHERS in owners_of(few)
    assert sum(few[0].pages.values()) == sum(samples[0].pages.values())
    assert folded(few) == few


@given(SAMPLES)
def test_svg_columns_add_up(samples: list[Sample]) -> None:
    """Stacked shares fill the column's height."""
    root = ET.fromstring(svg_picture(samples))
    heights: dict[str, float] = {}
    for rect in root.iter(f"{SVG}rect"):
        if rect.find(f"{SVG}title") is not None:
            heights[rect.attrib["x"]] = heights.get(rect.attrib["x"], 0.0) + float(rect.attrib["height"])
    full = [height for height in heights.values() if height]
    assert len(full) == sum(any(sample.pages.values()) for sample in samples)
    assert all(height == pytest.approx(full[0], abs=0.5) for height in full)


def test_svg_is_safe_and_complete() -> None:
    """Names are escaped, counts stand in the titles, an empty run is a picture too."""
    picture = svg_picture([Sample(0.0, {"<x>": 1234}, "a & b")])
    ET.fromstring(picture)
    assert "&lt;x&gt;: 1,234 pages" in picture
    ET.fromstring(svg_picture([]))
