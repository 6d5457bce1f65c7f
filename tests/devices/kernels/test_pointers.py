"""Pointer kernels against plain Python."""

from __future__ import annotations

import numpy as np
import pytest

from hmmnet.devices.kernels.pointers import LANES, NOT_FOUND, list_walk, tree_search
from hmmnet.workloads.structures import LIST_NODE, TREE_NODE, build_lists, build_tree
from tests.devices.plain_memory import PlainMemory


def test_list_walk_sums_every_list() -> None:
    """Lists of different lengths, empty ones among them, nodes in random order."""
    plain = PlainMemory()
    random = np.random.default_rng(3)
    lengths = np.array([0, 1, 5, 0, 40, 3], dtype=np.intp)
    values = random.integers(0, 1 << 63, int(lengths.sum()), dtype=np.uint64) * np.uint64(2)
    at = plain.place(np.zeros(len(values), LIST_NODE))
    lists = build_lists(at, values, lengths, random.permutation(len(values)))
    plain.array(at, len(values), "|V16")[:] = lists.nodes.view("|V16")
    heads = plain.place(lists.heads)
    out = plain.place(np.full(len(lengths), 77, np.uint64))
    results = plain.drive(list_walk(heads, len(lengths), out))
    expected = [int(part.sum(dtype=np.uint64)) for part in np.split(values, np.cumsum(lengths)[:-1])]
    assert plain.array(out, len(lengths)).tolist() == expected
    assert results == {"steps": 40}


def test_more_lists_than_lanes() -> None:
    """Heads beyond one batch of lanes are walked too."""
    plain = PlainMemory()
    n = LANES + 3
    node = plain.place(np.array([0, 9], dtype=np.uint64))
    heads = plain.place(np.full(n, node, dtype=np.uint64))
    out = plain.place(np.zeros(n, np.uint64))
    plain.drive(list_walk(heads, n, out))
    assert (plain.array(out, n) == 9).all()


@pytest.mark.parametrize("n_keys", [0, 1, 2, 1000])
def test_tree_search(n_keys: int) -> None:
    """Every key that is there gives its value, every other one 2**64 - 1."""
    plain = PlainMemory()
    random = np.random.default_rng(n_keys)
    known = np.unique(random.integers(0, 1 << 62, n_keys, dtype=np.uint64)) * np.uint64(2)
    values = random.integers(0, 1 << 62, len(known), dtype=np.uint64)
    at = plain.place(np.zeros(len(known), TREE_NODE))
    tree = build_tree(at, known, values, random.permutation(len(known)))
    plain.array(at, len(known), "|V32")[:] = tree.nodes.view("|V32")
    wanted = np.concatenate((known, known + np.uint64(1), np.array([0xFFFF_FFFF_FFFF_FFFE], dtype=np.uint64)))
    keys, out = plain.place(wanted), plain.place(np.zeros(len(wanted), np.uint64))
    results = plain.drive(tree_search(tree.root, keys, len(wanted), out))
    table = dict(zip(known.tolist(), values.tolist(), strict=True))
    assert plain.array(out, len(wanted)).tolist() == [table.get(key, NOT_FOUND) for key in wanted.tolist()]
    assert results["found"] == len(known)


def test_search_of_a_deep_tree_takes_few_requests() -> None:
    """All queries walk at once: requests grow with the depth, not with the number of queries."""
    plain = PlainMemory()
    known = np.arange(1 << 12, dtype=np.uint64)
    at = plain.place(np.zeros(len(known), TREE_NODE))
    tree = build_tree(at, known, known, np.arange(len(known)))
    plain.array(at, len(known), "|V32")[:] = tree.nodes.view("|V32")
    keys, out = plain.place(known), plain.place(np.zeros(len(known), np.uint64))
    plain.drive(tree_search(tree.root, keys, len(known), out))
    assert plain.requests <= 3 * 14 + 2
