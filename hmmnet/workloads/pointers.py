"""Pointers: the programs that only shared virtual addresses make possible without rewriting the data."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from hmmnet.program import Machine

from .registry import Report
from .shares import chosen_devices, cut, group_elements, mistakes_between, report_of, reserve, run_shares, store_array, whole_groups
from .structures import LIST_NODE, NOT_FOUND, TREE_NODE, as_bytes, build_lists, build_tree

WORD_BYTES = 8


async def list_walk(
    machine: Machine,
    n: int = 1 << 14,
    nodes: int = 1 << 18,
    devices: Sequence[str] | str | None = None,
    placement: str = "demand",
    seed: int = 1,
) -> Report:
    """Sum the values of `n` linked lists with `nodes` nodes in all; each device walks its share of the lists.

    The nodes of one device's lists lie together, in random order: neighbours in a list are far apart, but no group is wanted twice.
    """
    names = await chosen_devices(machine, devices)
    random = np.random.default_rng(seed)
    values = random.integers(0, 1 << 32, nodes, dtype=np.uint64)
    borders = np.sort(random.integers(0, nodes + 1, max(n - 1, 0)))
    lengths = np.diff(np.concatenate(([0], borders, [nodes]))) if n else np.zeros(0, dtype=np.intp)
    ends = np.cumsum(lengths)
    ranges = cut(n, len(names), group_elements(WORD_BYTES))
    places, room = _scatter([int(ends[b - 1]) - (int(ends[a - 1]) if a else 0) for a, b in ranges], random)
    process = await machine.create_process()
    address = await reserve(process, room * LIST_NODE.itemsize)
    lists = build_lists(address, values[: len(places)], lengths, places, room)
    if room:
        await process.write(address, as_bytes(lists.nodes))
    heads_at = await store_array(process, lists.heads)
    out_at = await reserve(process, n * WORD_BYTES)
    shares = {
        name: {"heads": heads_at + WORD_BYTES * a, "n": b - a, "out": out_at + WORD_BYTES * a}
        for name, (a, b) in zip(names, ranges, strict=False)
    }
    jobs = await run_shares(process, "list_walk", placement, shares)
    got = await process.read_array(out_at, "<u8", n)
    await process.exit()
    plain = iter(values.tolist())
    expected = np.array([sum(itertools.islice(plain, length)) for length in lengths.tolist()], dtype=np.uint64)
    return report_of("list_walk", jobs, mistakes_between(got, expected), lists=n, nodes=nodes)


def _scatter(counts: Sequence[int], random: np.random.Generator) -> tuple[npt.NDArray[np.intp], int]:
    """Places for the nodes of each device, mixed within groups of pages of its own; and how many places there are in all."""
    places: list[npt.NDArray[np.intp]] = [np.zeros(0, dtype=np.intp)]
    room = 0
    for count in counts:
        places.append(room + random.permutation(count))
        room += whole_groups(count * LIST_NODE.itemsize) // LIST_NODE.itemsize
    return np.concatenate(places), room


async def tree_search(
    machine: Machine,
    n: int = 1 << 16,
    keys: int = 1 << 16,
    devices: Sequence[str] | str | None = None,
    placement: str = "demand",
    seed: int = 1,
) -> Report:
    """Look `n` keys up in a search tree of `keys` keys for each device, half of them in vain; checked against a dictionary."""
    names = await chosen_devices(machine, devices)
    random = np.random.default_rng(seed)
    known = np.unique(random.integers(0, 1 << 62, keys, dtype=np.uint64)) * np.uint64(2)
    values = random.integers(0, 1 << 62, len(known), dtype=np.uint64)
    wanted = (random.choice(known, n) if len(known) else np.zeros(n, np.uint64)) + random.integers(0, 2, n, dtype=np.uint64)
    process = await machine.create_process()
    wanted_at = await store_array(process, wanted)
    out_at = await reserve(process, n * WORD_BYTES)
    shares = {}
    for name, (a, b) in zip(names, cut(n, len(names), group_elements(WORD_BYTES)), strict=False):
        address = await reserve(process, len(known) * TREE_NODE.itemsize)
        tree = build_tree(address, known, values, random.permutation(len(known)))
        if len(known):
            await process.write(address, as_bytes(tree.nodes))
        shares[name] = {"root": tree.root, "keys": wanted_at + WORD_BYTES * a, "n": b - a, "out": out_at + WORD_BYTES * a}
    jobs = await run_shares(process, "tree_search", placement, shares)
    got = await process.read_array(out_at, "<u8", n)
    await process.exit()
    table = dict(zip(known.tolist(), values.tolist(), strict=True))
    expected = np.array([table.get(key, NOT_FOUND) for key in wanted.tolist()], dtype=np.uint64)
    found = int(np.count_nonzero(expected != np.uint64(NOT_FOUND)))
    return report_of("tree_search", jobs, mistakes_between(got, expected), searches=n, keys=len(known), found=found)
