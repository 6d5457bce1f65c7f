"""Faults of allocation: memory that cannot be had, on the device, at the host, in a cgroup, in large pieces."""

from __future__ import annotations

from .injector import PointFault
from .kinds import Fault, Kind
from .stepping import at_points


def _at(point: str) -> object:
    def makes(fault: Fault) -> list[PointFault]:
        return [at_points(fault, point, "fail")]

    return makes


def _kind(name: str, point: str, what: str, holds: str) -> Kind:
    return Kind(name, "allocation", what, holds, _at(point))  # type: ignore[arg-type]  # a function of a fault


KINDS = (
    _kind(
        "alloc.device",
        "device.alloc.small",
        "device memory (with test_hmm: the page that stands for it) cannot be had",
        "pages stay where they are and are used over the link",
    ),
    _kind("alloc.device_large", "device.alloc.large", "no large page on the device (fragmentation)", "the block arrives as small pages"),
    _kind("alloc.host", "host.alloc.frame", "no host frame for a process", "ENOMEM for who asked; nothing else changes"),
    _kind("alloc.host_large", "host.alloc.huge", "no huge page at the host (fragmentation)", "small pages instead"),
    _kind("alloc.home", "host.alloc.home", "no host frame for a page that comes home", "ENOMEM; the page is still on its device"),
    _kind("alloc.page_cache", "host.alloc.page_cache", "no frame for a file's page cache", "ENOMEM for who asked"),
    _kind("alloc.cgroup", "memcg.charge", "a memory cgroup is at its limit", "ENOMEM for its processes; others go on"),
)
