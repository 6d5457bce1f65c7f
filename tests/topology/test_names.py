"""One name may stand for many things, and many things are written as one name."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hmmnet.topology.names import NAMES_MAX, compact, expand, spread, why_no_single_name


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("gpu0", ["gpu0"]),
        ("gpu[0-2]", ["gpu0", "gpu1", "gpu2"]),
        ("leaf[08-10]", ["leaf08", "leaf09", "leaf10"]),
        ("rack[1-2].gpu", ["rack1.gpu", "rack2.gpu"]),
        ("gpu[3-3]", ["gpu3"]),
    ],
)
def test_expand(text: str, names: list[str]) -> None:
    """A range counts up; leading zeros are kept."""
    assert expand(text) == names


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "no name"),
        ("-gpu", "no name"),
        ("gpu 0", "no name"),
        ("../gpu", "no name"),
        ("gpu\n", "no name"),
        ("gpu[2-1]", "ends before it begins"),
        ("gpu[0-99999999999]", f"at most {NAMES_MAX}"),
        ("g" * 65, "longer than 64"),
        ("a[0-1]b[0-1]", "no name"),
    ],
)
def test_what_is_no_name(text: str, why: str) -> None:
    """Names become file names and travel on the wire; a range is bounded before it is made."""
    with pytest.raises(ValueError, match=why):
        expand(text)
    assert why_no_single_name(text) is not None


@given(st.integers(0, 1000), st.integers(2, 20), st.sampled_from(["gpu", "a.b-", "x"]))
def test_compact_is_the_way_back(first: int, count: int, stem: str) -> None:
    """What was expanded is written as it stood in the file."""
    names = [f"{stem}{first + i}" for i in range(count)]
    assert expand(compact(names)) == names


def test_compact_of_names_that_do_not_count_up() -> None:
    """A few are listed; of many, first and last."""
    assert compact(["gpu0"]) == "gpu0"
    assert compact(["gpu0", "gpu2"]) == "gpu0, gpu2"
    assert compact(["a", "b", "c", "d", "e"]) == "a ... e (5)"


@given(st.lists(st.integers(), min_size=1, max_size=9), st.integers(1, 5))
def test_spread_in_groups(items: list[int], times: int) -> None:
    """Consecutive groups of equal size."""
    assert spread(items, len(items) * times) == [item for item in items for _ in range(times)]


def test_uneven_spread() -> None:
    """Two into three does not go."""
    with pytest.raises(ValueError, match="evenly"):
        spread([1, 2], 3)
