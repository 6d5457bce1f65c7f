"""Small machines for tests, built without files."""

from __future__ import annotations

from hmmnet.topology.model import DeviceSpec, LinkSpec, MemoryNode, Switch, Topology

PCIE = 32e9
NVLINK = 100e9


def link(a: str, b: str, bandwidth_bytes_per_s: float = PCIE, latency_s: float = 1e-6, **others: object) -> LinkSpec:
    """A link called after its ends."""
    return LinkSpec(f"{a}-{b}", a, b, "pcie", bandwidth_bytes_per_s, latency_s, **others)  # type: ignore[arg-type]


def machine(links: list[LinkSpec], nodes: int = 1, devices: int = 2, switches: int = 0) -> Topology:
    """node0.., gpu0.., switch0.. joined by `links`."""
    return Topology(
        "test",
        "",
        tuple(MemoryNode(f"node{i}", 1 << 30) for i in range(nodes)),
        tuple(DeviceSpec(f"gpu{i}", "gpu", 1 << 30) for i in range(devices)),
        tuple(Switch(f"switch{i}") for i in range(switches)),
        tuple(links),
    )
