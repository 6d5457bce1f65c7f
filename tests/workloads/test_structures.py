"""Pointers that were computed in bulk lead where pointers followed one by one should lead."""

from __future__ import annotations

import numpy as np
import pytest

from hmmnet.workloads.structures import LIST_NODE, NULL, TREE_NODE, as_bytes, build_lists, build_tree

ADDRESS = 0x7000_0000_0000


@pytest.mark.parametrize("n", [1, 2, 3, 10, 1000])
def test_every_key_is_found_and_the_tree_is_balanced(n: int) -> None:
    """Walking from the root finds each key's value in at most log2(n) + 1 steps, wherever the nodes lie."""
    random = np.random.default_rng(n)
    keys = np.unique(random.integers(0, 1 << 63, n, dtype=np.uint64))
    values = random.integers(0, 1 << 63, len(keys), dtype=np.uint64)
    tree = build_tree(ADDRESS, keys, values, random.permutation(len(keys)))

    def node(address: int) -> np.void:
        assert (address - ADDRESS) % TREE_NODE.itemsize == 0
        found: np.void = tree.nodes[(address - ADDRESS) // TREE_NODE.itemsize]
        return found

    for key, value in zip(keys.tolist(), values.tolist(), strict=True):
        at, steps = tree.root, 1
        while (here := node(at))["key"] != key:
            at = int(here["left"] if key < here["key"] else here["right"])
            steps += 1
            assert at != NULL
        assert here["value"] == value
        assert steps <= len(keys).bit_length()


def test_an_empty_tree_has_no_root() -> None:
    nothing = np.zeros(0, dtype=np.uint64)
    tree = build_tree(ADDRESS, nothing, nothing, nothing.astype(np.intp))
    assert (len(tree.nodes), tree.root) == (0, NULL)


def test_lists_end_and_empty_ones_have_no_head() -> None:
    """Each list holds its values in order and ends in NULL."""
    lengths = np.array([0, 3, 0, 1, 4, 0], dtype=np.intp)
    values = np.arange(100, 108, dtype=np.uint64)
    lists = build_lists(ADDRESS, values, lengths, np.random.default_rng(3).permutation(8))
    walked = []
    for head in lists.heads.tolist():
        found, at = [], head
        while at:
            node = lists.nodes[(at - ADDRESS) // LIST_NODE.itemsize]
            found.append(int(node["value"]))
            at = int(node["next"])
        walked.append(found)
    assert walked == [[], [100, 101, 102], [], [103], [104, 105, 106, 107], []]


def test_nodes_are_the_bytes_of_the_kernel_contract() -> None:
    """Little-endian {u64 next; u64 value} and {u64 key; u64 left; u64 right; u64 value}."""
    lists = build_lists(0x1000, np.array([7, 9], np.uint64), np.array([2], np.intp), np.array([0, 1], np.intp))
    assert as_bytes(lists.nodes).tobytes() == (0x1010).to_bytes(8, "little") + (7).to_bytes(8, "little") + bytes(8) + (9).to_bytes(
        8, "little"
    )
    tree = build_tree(0x1000, np.array([5, 6], np.uint64), np.array([1, 2], np.uint64), np.array([1, 0], np.intp))
    assert as_bytes(tree.nodes).view("<u8").tolist() == [6, 0x1020, 0, 2, 5, 0, 0, 1]
    assert tree.root == 0x1000
