"""The automatic rate of the clock: what this computer moves against what the model's links would."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from hmmnet.fabric.clock import EmulatedClock
from hmmnet.fabric.measure import (
    FLOWS_AT_ONCE_MAX,
    SAFE_PART,
    automatic_rate,
    choose_rate,
    demanded_bytes_per_s,
    measure_bytes_per_s,
)  # fmt: skip
from hmmnet.topology import Topology
from hmmnet.topology.load import load, parse
from hmmnet.wire.memory_transport import MemoryTransport
from hmmnet.wire.zmq_transport import ZmqTransport


def machine(devices: int, bandwidth: str = "10 GB/s", back: str = "10 GB/s") -> Topology:
    """Devices with a link of their own."""
    return parse(
        f"""
[[memory]]
name = "node0"
size = "1 GiB"
[[device]]
name = "gpu[0-{devices - 1}]"
memory = "1 GiB"
[[link]]
a = "node0"
b = "gpu[0-{devices - 1}]"
bandwidth = "{bandwidth}"
bandwidth_back = "{back}"
latency = "1 us"
"""
    )


def test_the_sum_of_the_busiest_devices_counts() -> None:
    """Each with its faster direction; some at once, not all of many."""
    assert demanded_bytes_per_s(machine(1)) == 10e9
    assert demanded_bytes_per_s(machine(2, "10 GB/s", "12 GB/s")) == 24e9
    assert demanded_bytes_per_s(machine(16)) == FLOWS_AT_ONCE_MAX * 10e9


def test_rates() -> None:
    """Slow links need no dilation; fast ones are slowed to a safe part of what was measured, to two digits."""
    assert choose_rate(machine(1, "1 MB/s", "1 MB/s"), 3e9) == 1.0
    assert choose_rate(machine(1), 3e9) == pytest.approx(3e9 * SAFE_PART / 10e9, rel=0.05)
    for name in ("two-gpus", "grace-hopper", "pcie-64"):
        assert 0 < choose_rate(load(name), 3e9) < 1


@pytest.mark.parametrize("ring", [False, True])
async def test_measured_over_sockets(ring: bool) -> None:
    """A figure that a computer can have, by its own clock, whatever the rate of the machine's; nothing is left behind."""
    with TemporaryDirectory(prefix="hmmnet-") as folder, ZmqTransport() as transport:
        for rate in (1.0, 0.01):
            measured = await measure_bytes_per_s(transport, f"ipc://{folder}/probe", EmulatedClock(rate), ring=ring)
            assert 20e6 < measured < 500e9
        assert not list(Path(folder).iterdir())


async def test_automatic() -> None:
    """Measured and chosen."""
    with MemoryTransport() as transport:
        assert 0 < await automatic_rate(machine(4, "900 GB/s", "900 GB/s"), transport, "mem://probe") < 1
