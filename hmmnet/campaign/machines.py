"""Machines of programs: a topology that was written down is read once, for all seeds and candidates that have it."""

from __future__ import annotations

import re
from functools import cache, lru_cache

from hmmnet.topology.load import installed_models, parse
from hmmnet.topology.model import Topology


@lru_cache(maxsize=256)
def topology_of(text: str) -> Topology:
    """The topology in `text`, as TOML. Raises TopologyError."""
    return parse(text, "machine", models=_models() or None)


@cache
def _models() -> frozenset[str]:
    """Reading what is installed takes longer than starting a machine."""
    return installed_models()


def devices_of(text: str) -> tuple[str, ...]:
    """The names of its devices, in their order. Raises TopologyError."""
    return topology_of(text).device_names


def without_device(text: str, device: str) -> str:
    """The topology in `text` without a device and the links to it."""
    head, *tables = re.split(r"^(?=\[\[)", text, flags=re.MULTILINE)
    mentioned = re.compile(rf'^(name|a|b) = "{re.escape(device)}"$', re.MULTILINE)
    return head + "".join(table for table in tables if not mentioned.search(table))
