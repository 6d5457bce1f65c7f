"""What the demo puts into memory: a text, a list of its words for each device, one search tree with pointers, and things to look for.

The text's words are keyed by their hash. The tree maps a word to the byte where it occurs first; its nodes lie in the order in which a
program reading the text would have allocated them, so a path from the root jumps all over the tree's pages. The top levels belong to the
CPU; below them each device searches a subtree of its own. Whatever a device touches lies on 64 KiB groups of its own, the unit that
devices fetch, so that nothing is wanted in two places at once.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from hmmnet.pages import Words
from hmmnet.program import Process
from hmmnet.words import tokenize
from hmmnet.workloads.shares import GROUP_BYTES, reserve, whole_groups
from hmmnet.workloads.structures import TREE_NODE, as_bytes, build_tree
from hmmnet.workloads.text import as_array, cut_text, load_text

SEARCHES = 1 << 16
"""Words looked up, over all devices."""
MISSING_EVERY = 16
"""One search in so many is for a word that the text does not have."""
DEVICES_MAX = 8
"""More share the work no better in ten seconds."""
NODES_PER_GROUP = GROUP_BYTES // TREE_NODE.itemsize

Index = npt.NDArray[np.intp]


@dataclass(frozen=True)
class Area:
    """A named stretch of the process's memory."""

    name: str
    address: int
    size_bytes: int


@dataclass
class Share:
    """What one device works on. All addresses are the process's own."""

    device: str
    text: Area
    text_length: int
    words: Area
    counts: Area
    root: int
    keys: Area
    found: Area
    tree: Area
    wanted: Words = field(repr=False)
    """The hashes that `keys` holds."""

    def inputs(self) -> tuple[Area, ...]:
        """What this device reads."""
        return (self.text, self.words, self.tree, self.keys)

    def outputs(self) -> tuple[Area, ...]:
        """What this device writes."""
        return (self.counts, self.found)


@dataclass(frozen=True)
class Input:
    """The text, before it is in anybody's memory."""

    text: bytes
    source: str
    files: int


@dataclass(frozen=True)
class Data:
    """Everything that was stored, and who works on what."""

    words: Words
    shares: tuple[Share, ...]
    again: tuple[Share, ...]
    """The same work with result areas of its own, for the second run."""
    tree: Area
    """The whole tree; its first group holds the levels above the subtrees."""
    areas: tuple[Area, ...]
    """The memory as one picture shows it: text, words, tree, searches, results."""


def read_input(paths: Sequence[Path], limit: int) -> Input:
    """Read the text. Raises OSError."""
    text = load_text(paths or None, limit)
    source = ", ".join(str(p) for p in paths[:3]) + (" ..." if len(paths) > 3 else "") if paths else "Python's own standard library"
    return Input(text, source, len(paths))


def subtrees(count: int, parts: int) -> tuple[list[int], list[tuple[int, int]]]:
    """The keys above and the intervals of keys below a cut through the balanced tree of `count` keys, deep enough for `parts` subtrees.

    Follows `build_tree`: the root of an interval is its middle.
    """
    above: list[int] = []
    below = [(0, count)]
    while len(below) < parts and any(end - first > 2 for first, end in below):
        deeper: list[tuple[int, int]] = []
        for first, end in below:
            middle = (first + end) // 2
            above.append(middle)
            deeper += [(a, b) for a, b in ((first, middle), (middle + 1, end)) if a < b]
        below = deeper
    return above, below


@dataclass(frozen=True)
class Layout:
    """Where the nodes lie: `places` by key, and for each subtree its interval of keys and its first place and end."""

    places: Index
    room: int
    intervals: list[tuple[int, int]]
    spans: list[tuple[int, int]]

    def root(self, subtree: int, address: int) -> int:
        """Where the root of a subtree lies when the nodes begin at `address`."""
        first, end = self.intervals[subtree]
        return address + int(self.places[(first + end) // 2]) * TREE_NODE.itemsize

    def subtree(self, subtree: int, address: int) -> Area:
        """The groups of pages of a subtree."""
        start, end = self.spans[subtree]
        return Area("tree", address + start * TREE_NODE.itemsize, whole_groups((end - start) * TREE_NODE.itemsize))


def lay_out(order: Index, parts: int) -> Layout:
    """Places for the nodes: the levels above first, then each subtree in a group of its own, in it by `order` (first met, first placed)."""
    above, intervals = subtrees(len(order), parts)
    places = np.zeros(len(order), dtype=np.intp)
    places[above] = np.arange(len(above))
    spans: list[tuple[int, int]] = []
    at = -(-len(above) // NODES_PER_GROUP) * NODES_PER_GROUP
    for first, end in intervals:
        ranks = np.argsort(np.argsort(order[first:end], kind="stable"), kind="stable")
        places[first:end] = at + ranks
        spans.append((at, at + end - first))
        at = -(-(at + end - first) // NODES_PER_GROUP) * NODES_PER_GROUP
    return Layout(places, max(at, 1), intervals, spans)


def choose_searches(keys: Words, count: int, chance: random.Random) -> Words:
    """`count` hashes to look up among ascending `keys` and, now and then, beside them."""
    if len(keys) == 0:
        return np.zeros(0, dtype=np.uint64)
    wanted = keys[np.array(chance.choices(range(len(keys)), k=count), dtype=np.intp)]
    wanted[::MISSING_EVERY] ^= np.uint64(1)
    return wanted


def devices_used(devices: Sequence[str]) -> tuple[str, ...]:
    """The first of `devices`, as many as there are subtrees at one level: a power of two, at most DEVICES_MAX."""
    count = min(len(devices), DEVICES_MAX)
    return tuple(devices[: 1 << (count.bit_length() - 1)])


async def store(process: Process, text: bytes, devices: Sequence[str], chance: random.Random, searches: int = SEARCHES) -> Data:
    """Build everything with numpy and store it in the process's memory; each device's part lies on groups of its own. `text` has words."""
    words = tokenize(as_array(text))
    hashes, first_seen = np.unique(words.hashes, return_index=True)
    layout = lay_out(first_seen, len(devices_used(devices)))
    used = devices_used(devices)[: min(len(layout.intervals), len(cut_text(text, len(devices))))]
    n = len(used)
    cuts = cut_text(text, n)
    texts = await _store_parts(process, "text", [as_array(text[a:b]) for a, b in cuts])
    lists = await _store_parts(process, "word lists", [as_bytes(hashes)] * n)
    tree = await _store_tree(process, hashes, words.starts[first_seen].astype(np.uint64), layout)
    wanted = [choose_searches(hashes[first:end], searches // n, chance) for first, end in layout.intervals[:n]]
    keys = await _store_parts(process, "searches", [as_bytes(w) for w in wanted])
    results = await _reserve(process, "results", ([hashes.nbytes] * n + [w.nbytes for w in wanted]) * 2)
    shares = [
        Share(
            device=used[i],
            text=texts[i],
            text_length=cuts[i][1] - cuts[i][0],
            words=lists[i],
            counts=results[i],
            root=layout.root(i, tree.address),
            keys=keys[i],
            found=results[n + i],
            tree=layout.subtree(i, tree.address),
            wanted=wanted[i],
        )
        for i in range(n)
    ]
    again = tuple(replace(share, counts=results[2 * n + i], found=results[3 * n + i]) for i, share in enumerate(shares))
    return Data(
        hashes,
        tuple(shares),
        again,
        tree,
        (span("text", texts), span("word lists", lists), tree, span("searches", keys), span("results", results)),
    )


def span(name: str, areas: Sequence[Area]) -> Area:
    """One area around others."""
    start = min(a.address for a in areas)
    return Area(name, start, max(a.address + a.size_bytes for a in areas) - start)


async def _store_parts(process: Process, name: str, parts: Sequence[npt.NDArray[np.uint8]]) -> list[Area]:
    areas = await _reserve(process, name, [len(part) for part in parts])
    for area, part in zip(areas, parts, strict=True):
        if len(part):
            await process.write(area.address, part)
    return areas


async def _reserve(process: Process, name: str, sizes: Sequence[int]) -> list[Area]:
    address = await reserve(process, sum(map(whole_groups, sizes)))
    areas = []
    for size in sizes:
        areas.append(Area(name, address, whole_groups(size)))
        address += whole_groups(size)
    return areas


async def _store_tree(process: Process, keys: Words, values: Words, layout: Layout) -> Area:
    size_bytes = whole_groups(layout.room * TREE_NODE.itemsize)
    area = Area("tree", await reserve(process, size_bytes), size_bytes)
    await process.write(area.address, as_bytes(build_tree(area.address, keys, values, layout.places, layout.room).nodes))
    return area
