"""What a profiler user reads: rows that are there even when nothing happened, and a picture whose columns add up."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from hmmnet.observe.counters import CPU_FAULT, HOST_TO_DEVICE, Profile
from hmmnet.observe.links_table import LATE, links_table
from hmmnet.observe.profiler_table import profiler_table, rows
from hmmnet.observe.residency import Sample, svg_picture, terminal_picture


def test_rows_are_the_profilers() -> None:
    """Sums over devices, mean, least and most; kinds without an occurrence stand there with zero."""
    profile = Profile()
    profile.record(HOST_TO_DEVICE, 4096, 1e-6, "gpu0")
    profile.record(HOST_TO_DEVICE, 12288, 3e-6, "gpu1")
    profile.record(CPU_FAULT, 4096, 1e-6)
    by_kind = {row["kind"]: row for row in rows(profile)}
    assert len(by_kind) >= 4
    row = by_kind[HOST_TO_DEVICE]
    assert (row["count"], row["mean_bytes"], row["min_bytes"], row["max_bytes"]) == (2, 8192, 4096, 12288)
    assert by_kind["gpu_fault_group"]["count"] == 0
    assert profiler_table(profile).row_count == len(by_kind)


def test_pictures_hold_every_owner() -> None:
    """A legend names each owner, in the terminal and as SVG."""
    samples = [Sample(0.0, {"ram": 10, "gpu0": 0}, "start"), Sample(1.0, {"ram": 2, "gpu0": 8}, "moved")]
    text = terminal_picture(samples).plain
    picture = svg_picture(samples)
    for owner in ("ram", "gpu0"):
        assert owner in text
        assert owner in picture


@pytest.mark.parametrize(("reached", "kept_up", "noted"), [(29e9, True, False), (7e9, True, True), (7e9, False, False)])
def test_a_link_that_kept_up_far_below_what_was_asked_is_explained(reached: float, kept_up: bool, noted: bool) -> None:
    """Small transfers may be late: a table that said no more would seem to be wrong."""
    link = {"source": "gpu0", "target": "node0", "bytes_moved": 4096, "kept_up": kept_up}
    link |= {"capacity_bytes_per_s": 31e9, "asked_bytes_per_s": 30e9, "reached_bytes_per_s": reached}
    out = io.StringIO()
    Console(file=out, width=100).print(links_table([link], 100))
    assert (LATE in out.getvalue()) is noted
