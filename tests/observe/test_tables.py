"""What a profiler user reads: rows that are there even when nothing happened, and a picture whose columns add up."""

from __future__ import annotations

from hmmnet.observe.counters import CPU_FAULT, HOST_TO_DEVICE, Profile
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
