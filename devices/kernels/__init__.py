"""Kernels: generator functions that a device runs on virtual addresses.

A kernel takes its arguments by name, yields memory requests (`hmmnet.devices.access`) and returns a dictionary of results. Those that
come with hmmnet are found here by name; anybody's are found through the entry point group ``hmmnet.kernels``. Both are imported on
first use: a device process that runs no kernel loads none.
"""

from __future__ import annotations

from hmmnet.devices.access import Kernel
from hmmnet.plugins import KERNELS, load, names

BUILT_IN = {
    "vector_add": "hmmnet.devices.kernels.vector:vector_add",
    "reduction": "hmmnet.devices.kernels.vector:reduction",
    "list_walk": "hmmnet.devices.kernels.pointers:list_walk",
    "tree_search": "hmmnet.devices.kernels.pointers:tree_search",
    "word_count": "hmmnet.devices.kernels.text:word_count",
    "peek": "hmmnet.devices.kernels.probe:peek",
    "poke": "hmmnet.devices.kernels.probe:poke",
    "gather": "hmmnet.devices.kernels.probe:gather",
    "fetch_add": "hmmnet.devices.kernels.probe:fetch_add",
}


def load_kernel(name: str) -> Kernel | None:
    """The kernel called `name`, or None when there is none."""
    found: Kernel | None = load(KERNELS, name, BUILT_IN)
    return found


def kernel_names() -> list[str]:
    """Every kernel that there is, those of plugins too."""
    return names(KERNELS, BUILT_IN)
