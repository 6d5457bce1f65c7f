"""Data with pointers, built in bulk: linked lists and search trees as the bytes they are in memory.

A C program would allocate node by node; here all nodes of a structure are one numpy array and every pointer is computed, so that
millions of nodes cost milliseconds. What matters to a machine stays: pointers are absolute addresses, and nodes lie where the order of
*allocation* put them, not where the structure would like them, so that following pointers jumps from page to page.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from hmmnet.pages import Words

LIST_NODE = np.dtype([("next", "<u8"), ("value", "<u8")])
TREE_NODE = np.dtype([("key", "<u8"), ("left", "<u8"), ("right", "<u8"), ("value", "<u8")])
NULL = 0
NOT_FOUND = (1 << 64) - 1
"""What `tree_search` stores for a key that the tree does not hold."""

Nodes = npt.NDArray[np.void]
Index = npt.NDArray[np.intp]


class Lists(NamedTuple):
    """Linked lists: the nodes as they lie in memory, and the address of each list's first node."""

    nodes: Nodes
    heads: Words


class Tree(NamedTuple):
    """A binary search tree: the nodes as they lie in memory, and the address of the root (0: empty)."""

    nodes: Nodes
    root: int


def build_lists(address: int, values: Words, lengths: Index, places: Index, room: int | None = None) -> Lists:
    """`len(lengths)` lists over `values`, list after list; node *i* lies at place ``places[i]`` of the array at `address`.

    `room` is the length of that array when places are left empty (default: one for each value). An empty list has head 0.
    """
    addresses = np.uint64(address) + places.astype(np.uint64) * np.uint64(LIST_NODE.itemsize)
    following = np.append(addresses[1:], np.uint64(NULL))[: len(values)]
    ends = np.cumsum(lengths)
    following[ends[lengths > 0] - 1] = NULL
    nodes = np.zeros(len(values) if room is None else room, dtype=LIST_NODE)
    nodes["next"][places] = following
    nodes["value"][places] = values
    heads = np.zeros(len(lengths), dtype=np.uint64)
    heads[lengths > 0] = addresses[(ends - lengths)[lengths > 0]]
    return Lists(nodes, heads)


def build_tree(address: int, keys: Words, values: Words, places: Index, room: int | None = None) -> Tree:
    """A balanced search tree over ascending, distinct `keys`; the node of key *i* lies at place ``places[i]`` of the array at `address`.

    `room` is the length of that array when places are left empty (default: one for each key).

    Level by level: every subtree is an interval of keys, its root the middle one, its children the two halves.
    """
    n = len(keys)
    nodes = np.zeros(n if room is None else room, dtype=TREE_NODE)
    if n == 0:
        return Tree(nodes, NULL)
    addresses = np.uint64(address) + places.astype(np.uint64) * np.uint64(TREE_NODE.itemsize)
    children = {"left": np.zeros(n, dtype=np.uint64), "right": np.zeros(n, dtype=np.uint64)}
    low, high = np.zeros(1, dtype=np.intp), np.full(1, n, dtype=np.intp)
    while len(low):
        middle = (low + high) // 2
        for side, first, end in (("left", low, middle), ("right", middle + 1, high)):
            some = first < end
            children[side][middle[some]] = addresses[((first + end) // 2)[some]]
        first, end = np.concatenate((low, middle + 1)), np.concatenate((middle, high))
        low, high = first[first < end], end[first < end]
    for field, column in (("key", keys), ("value", values), ("left", children["left"]), ("right", children["right"])):
        nodes[field][places] = column
    return Tree(nodes, int(addresses[n // 2]))


def as_bytes(array: npt.NDArray[Any]) -> npt.NDArray[np.uint8]:
    """The bytes of an array, without a copy when it is contiguous."""
    return np.ascontiguousarray(array).view(np.uint8).reshape(-1)
