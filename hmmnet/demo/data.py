"""What the demo puts into memory: a text, a list of its words for each device, one search tree with pointers, and things to look for.

The text's words are keyed by their hash. The tree maps a word to the byte where it occurs first; its nodes lie in the order in which a
program reading the text would have allocated them, so a path from the root jumps all over the tree's pages. The top levels belong to the
CPU; below them each device searches a subtree of its own.

All is one mapping. After the top of the tree, each device has a stretch of it for everything that it touches, in whole 64 KiB groups, the
unit that devices fetch: nothing is wanted in two places at once, and what a device will need can be sent to it in one piece.

    | top | text words subtree searches results' results | text words subtree searches results' results | ...
            device 0: input,                first                device 1
            then room for two runs' results
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
from hmmnet.workloads.shares import reserve, whole_groups
from hmmnet.workloads.structures import TREE_NODE, as_bytes, build_tree
from hmmnet.workloads.text import as_array, cut_text, load_text

SEARCHES = 1 << 16
"""Words looked up, over all devices."""
MISSING_EVERY = 16
"""One search in so many is for a word that the text does not have."""
DEVICES_MAX = 8
"""More share the work no better in ten seconds."""
SUBTREE_KEYS_MIN = 3
"""A tree smaller than this is not cut further."""
NODE_BYTES = TREE_NODE.itemsize
MEBIBYTE = 1 << 20

Index = npt.NDArray[np.intp]


@dataclass(frozen=True)
class Area:
    """A stretch of the process's memory, in whole groups."""

    address: int
    size_bytes: int

    @property
    def end(self) -> int:
        """The first address behind it."""
        return self.address + self.size_bytes


def from_to(first: Area, last: Area) -> Area:
    """One area from the beginning of one to the end of another."""
    return Area(first.address, last.end - first.address)


@dataclass(frozen=True)
class Share:
    """What one device works on in one run. All addresses are the process's own."""

    device: str
    text: Area
    text_length: int
    words: Area
    tree: Area
    root: int
    keys: Area
    counts: Area
    found: Area
    wanted: Words = field(repr=False)
    """The hashes that `keys` holds."""

    @property
    def input(self) -> Area:
        """What the device reads."""
        return from_to(self.text, self.keys)

    @property
    def output(self) -> Area:
        """What the device writes."""
        return from_to(self.counts, self.found)


@dataclass(frozen=True)
class Input:
    """The text, before it is in anybody's memory."""

    text: bytes
    source: str
    files: int
    cut: bool = False
    """Whether the source has more text."""


@dataclass(frozen=True)
class Data:
    """Everything that was stored, and who works on what."""

    words: Words
    shares: tuple[Share, ...]
    again: tuple[Share, ...]
    """The same work with result areas of its own, for the second run; these lie right behind the input."""
    whole: Area


def read_input(paths: Sequence[Path], limit: int) -> Input:
    """Read the text. Raises OSError."""
    text = load_text(paths or None, limit + 1)
    source = ", ".join(str(p) for p in paths[:3]) + (" ..." if len(paths) > 3 else "") if paths else "Python's own standard library"
    return Input(text[:limit], source, len(paths), cut=len(text) > limit)


def devices_used(devices: Sequence[str]) -> tuple[str, ...]:
    """The first of `devices`, as many as there are subtrees at one level: a power of two, at most DEVICES_MAX."""
    count = min(len(devices), DEVICES_MAX)
    return tuple(devices[: 1 << (count.bit_length() - 1)])


def subtrees(count: int, parts: int) -> tuple[list[int], list[tuple[int, int]]]:
    """The keys above, and the intervals of keys below, a cut through the balanced tree of `count` keys: `parts` subtrees, a power of two.

    A small tree gives fewer. Follows `build_tree`: the root of an interval is its middle.
    """
    above: list[int] = []
    below = [(0, count)]
    for _ in range(parts.bit_length() - 1):
        if max(end - first for first, end in below) < SUBTREE_KEYS_MIN:
            break
        deeper: list[tuple[int, int]] = []
        for first, end in below:
            middle = (first + end) // 2
            above.append(middle)
            deeper += [(a, b) for a, b in ((first, middle), (middle + 1, end)) if a < b]
        below = deeper
    return above, below


def choose_searches(keys: Words, count: int, chance: random.Random) -> Words:
    """`count` hashes to look up among ascending `keys` and, now and then, beside them."""
    wanted = keys[np.array(chance.choices(range(len(keys)), k=count), dtype=np.intp)]
    wanted[::MISSING_EVERY] ^= np.uint64(1)
    return wanted


class Plan:
    """Who gets what, and where it will lie: everything is known before the first byte is stored."""

    def __init__(self, text: bytes, devices: Sequence[str], chance: random.Random, searches: int) -> None:
        words = tokenize(as_array(text))
        self.hashes, first_seen = np.unique(words.hashes, return_index=True)
        self.values = words.starts[first_seen].astype(np.uint64)
        self.order = first_seen
        self.above, self.intervals = subtrees(len(self.hashes), len(devices_used(devices)))
        self.devices = devices[: len(self.intervals)]
        cuts = cut_text(text, len(self.devices))
        self.texts = [as_array(text[a:b]) for a, b in cuts] + [as_array(b"")] * (len(self.devices) - len(cuts))
        each = searches // len(self.devices)
        self.wanted = [choose_searches(self.hashes[a:b], each, chance) for a, b in self.intervals]

    @property
    def size_bytes(self) -> int:
        """What all of it takes."""
        return self.shares(0)[1].end

    def shares(self, address: int) -> tuple[list[Share], Area]:
        """The first run's shares when the mapping is at `address`, with room for the second run's results left in each; and the whole."""
        at = address + whole_groups(len(self.above) * NODE_BYTES)

        def take(size_bytes: int) -> Area:
            nonlocal at
            area = Area(at, whole_groups(size_bytes))
            at = area.end
            return area

        shares = []
        for i, device in enumerate(self.devices):
            first, end = self.intervals[i]
            text, words = take(len(self.texts[i])), take(self.hashes.nbytes)
            tree, keys = take((end - first) * NODE_BYTES), take(self.wanted[i].nbytes)
            take(self.hashes.nbytes)
            take(self.wanted[i].nbytes)
            counts, found = take(self.hashes.nbytes), take(self.wanted[i].nbytes)
            shares.append(Share(device, text, len(self.texts[i]), words, tree, 0, keys, counts, found, self.wanted[i]))
        return shares, Area(address, at - address)


async def store(process: Process, text: bytes, devices: Sequence[str], chance: random.Random, searches: int = SEARCHES) -> Data:
    """Build everything with numpy and store it in the process's memory. `text` must have words."""
    plan = Plan(text, devices, chance, searches)
    address = await reserve(process, plan.size_bytes)
    shares, whole = plan.shares(address)
    places = np.zeros(len(plan.hashes), dtype=np.intp)
    places[plan.above] = np.arange(len(plan.above))
    for share, (first, end) in zip(shares, plan.intervals, strict=True):
        ranks = np.argsort(np.argsort(plan.order[first:end], kind="stable"), kind="stable")
        places[first:end] = (share.tree.address - address) // NODE_BYTES + ranks
    nodes = as_bytes(build_tree(address, plan.hashes, plan.values, places, whole.size_bytes // NODE_BYTES).nodes)
    await process.write(address, nodes[: whole_groups(len(plan.above) * NODE_BYTES)])
    rooted = []
    for share, part, (first, end) in zip(shares, plan.texts, plan.intervals, strict=True):
        for area, data in ((share.text, part), (share.words, as_bytes(plan.hashes)), (share.keys, as_bytes(share.wanted))):
            if len(data):
                await process.write(area.address, data)
        start = share.tree.address - address
        await process.write(share.tree.address, nodes[start : start + share.tree.size_bytes])
        rooted.append(replace(share, root=address + int(places[(first + end) // 2]) * NODE_BYTES))
    return Data(plan.hashes, tuple(rooted), tuple(map(second_run, rooted)), whole)


def second_run(share: Share) -> Share:
    """The share with its results in the room between the input and the first run's results."""
    back = share.output.size_bytes
    counts, found = (replace(area, address=area.address - back) for area in (share.counts, share.found))
    return replace(share, counts=counts, found=found)
