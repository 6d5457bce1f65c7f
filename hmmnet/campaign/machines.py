"""Machines of programs: a topology that was written down is read once, for all seeds and candidates that have it."""

from __future__ import annotations

from functools import cache, lru_cache

from hmmnet.topology.load import installed_models, parse
from hmmnet.topology.model import Topology


@lru_cache(maxsize=256)
def topology_of(text: str) -> Topology:
    """The topology in `text`, as TOML. Raises TopologyError."""
    return parse(text, models=_models() or None)


@cache
def _models() -> frozenset[str]:
    """Reading what is installed takes longer than starting a machine."""
    return installed_models()
