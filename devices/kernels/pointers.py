"""Kernels that follow pointers: what only shared virtual addresses make possible without copying and rewriting the data.

All lanes walk in step, one node a step, and a lane that is done drops out: as the threads of a GPU would, with numpy in place of warps.
"""

from __future__ import annotations

import numpy as np

from hmmnet.devices.access import Steps, load, load_range, store_range
from hmmnet.pages import Words

from .chunks import CHUNK_BYTES, counts

WORD_BYTES = 8
LANES = CHUNK_BYTES // WORD_BYTES
"""Lists or keys walked at once."""
NOT_FOUND = (1 << 64) - 1
NULL = np.uint64(0)

_LEFT = np.uint64(8)
_SIDE = np.uint64(8)
_VALUE = np.uint64(24)
_NEXT_TO_VALUE = np.uint64(8)


def list_walk(heads: int, n: int, out: int) -> Steps:
    """``out[i]`` = sum of the values of the list that begins at ``heads[i]`` (0: empty), modulo 2**64.

    Nodes are ``{u64 next; u64 value}``. A list without end never ends; closing the device does.
    """
    counts(heads=heads, n=n, out=out)
    steps = 0
    for first in range(0, n, LANES):
        nodes: Words = (yield load_range(heads + first * WORD_BYTES, min(LANES, n - first))).copy()
        sums = np.zeros(len(nodes), dtype=np.uint64)
        lanes = np.flatnonzero(nodes)
        nodes = nodes[lanes]
        while len(lanes):
            half = len(lanes)
            both = yield load(np.concatenate((nodes, nodes + _NEXT_TO_VALUE)))
            sums[lanes] += both[half:]
            alive = both[:half] != NULL
            nodes, lanes = both[:half][alive], lanes[alive]
            steps += 1
        yield store_range(out + first * WORD_BYTES, sums)
    return {"steps": steps}


def tree_search(root: int, keys: int, n: int, out: int) -> Steps:
    """``out[i]`` = value of the node with key ``keys[i]`` in the search tree at `root` (0: empty), or 2**64 - 1.

    Nodes are ``{u64 key; u64 left; u64 right; u64 value}``.
    """
    counts(root=root, keys=keys, n=n, out=out)
    found, depth_max = 0, 0
    for first in range(0, n, LANES):
        wanted: Words = (yield load_range(keys + first * WORD_BYTES, min(LANES, n - first))).copy()
        values = np.full(len(wanted), NOT_FOUND, dtype=np.uint64)
        lanes = np.arange(len(wanted)) if root else np.zeros(0, dtype=np.intp)
        nodes = np.full(len(lanes), root, dtype=np.uint64)
        depth = 0
        while len(lanes):
            here = yield load(nodes)
            hit = here == wanted
            if hit.any():
                values[lanes[hit]] = yield load(nodes[hit] + _VALUE)
                found += int(np.count_nonzero(hit))
                lanes, nodes, wanted, here = lanes[~hit], nodes[~hit], wanted[~hit], here[~hit]
            nodes = yield load(nodes + _LEFT + np.where(wanted > here, _SIDE, NULL))
            alive = nodes != NULL
            lanes, nodes, wanted = lanes[alive], nodes[alive], wanted[alive]
            depth += 1
        depth_max = max(depth_max, depth)
        yield store_range(out + first * WORD_BYTES, values)
    return {"found": found, "depth": depth_max}
