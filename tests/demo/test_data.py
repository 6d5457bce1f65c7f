"""What the demo stores: shares that together are the whole, on pages that two devices never share."""

from __future__ import annotations

import random
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from hmmnet.demo.answers import NOT_THERE, answers_for, fnv1a, word_at, wrong
from hmmnet.demo.data import Area, devices_used, read_input, store, subtrees
from hmmnet.pages import PAGE_SIZE
from hmmnet.workloads.shares import GROUP_BYTES

TEXT = (" ".join(f"word{i % 1200}_{i % 7} and" for i in range(6000)) + "\n").encode()


class Memory:
    """A process of which only mapping and storing is asked."""

    def __init__(self) -> None:
        self.data: dict[int, bytes] = {}
        self.end = 0x10000

    async def mmap(self, length: int, protection: str = "rw", address: int | None = None) -> int:
        at, self.end = self.end, self.end + -(-length // PAGE_SIZE) * PAGE_SIZE + 5 * PAGE_SIZE
        return at

    async def write(self, address: int, data: Any) -> None:
        self.data[address] = bytes(data)

    def word(self, address: int) -> int:
        start = max(at for at in self.data if at <= address)
        return int.from_bytes(self.data[start][address - start : address - start + 8], "little")


def groups(area: Area) -> range:
    assert area.address % GROUP_BYTES == area.size_bytes % GROUP_BYTES == 0
    return range(area.address // GROUP_BYTES, (area.address + area.size_bytes) // GROUP_BYTES)


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 8])
async def test_nothing_is_wanted_by_two_devices(count: int) -> None:
    """Every area of every share lies on 64 KiB groups of its own, those of both runs."""
    data = await store(Memory(), TEXT, [f"gpu{i}" for i in range(count)], random.Random(1))  # type: ignore[arg-type]
    assert len(data.shares) == {1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 8: 8}[count]
    areas = [area for share in data.shares for area in (share.text, share.words, share.tree, share.keys, share.counts, share.found)]
    areas += [area for share in data.again for area in (share.counts, share.found)]
    taken = Counter(group for area in areas for group in groups(area))
    assert max(taken.values()) == 1


async def test_shares_are_the_whole_text_and_every_search_ends_in_its_subtree() -> None:
    """The texts together hold every word; following the pointers that were stored finds what a dictionary finds."""
    memory = Memory()
    answers = answers_for(TEXT)
    data = await store(memory, TEXT, ["gpu0", "gpu1"], random.Random(2))  # type: ignore[arg-type]
    texts = [memory.data[s.text.address][: s.text_length] for s in data.shares]
    assert Counter(w for t in texts for w in re.findall(rb"\w+", t)) == Counter(re.findall(rb"\w+", TEXT))
    assert data.words.tolist() == sorted(answers.counts)
    for share in data.shares:
        found_some = missed_some = False
        for key in share.wanted[:300].tolist():
            at = share.root
            while at and memory.word(at) != key:
                at = memory.word(at + (8 if key < memory.word(at) else 16))
            assert (memory.word(at + 24) if at else NOT_THERE) == answers.search(key)
            found_some |= at != 0
            missed_some |= at == 0
            assert at == 0 or at // GROUP_BYTES in groups(share.tree)
        assert found_some
        assert missed_some


@pytest.mark.parametrize(("count", "parts"), [(1, 2), (2, 2), (3, 2), (50, 4), (1000, 8)])
def test_a_cut_through_the_tree_loses_no_key(count: int, parts: int) -> None:
    above, below = subtrees(count, parts)
    keys = sorted([*above, *(key for first, end in below for key in range(first, end))])
    assert keys == list(range(count))
    assert len(below) <= parts


async def test_what_a_device_needs_is_one_piece() -> None:
    """Input and the second run's results lie behind each other; the first run's results follow; all of it is in the mapping."""
    data = await store(Memory(), TEXT, ["gpu0", "gpu1"], random.Random(4))  # type: ignore[arg-type]
    for first, second in zip(data.shares, data.again, strict=True):
        assert first.input == second.input
        assert (first.input.end, second.output.end) == (second.output.address, first.output.address)
        assert second.output.size_bytes == first.output.size_bytes == first.counts.size_bytes + first.found.size_bytes
        assert data.whole.address <= first.input.address
        assert first.output.end <= data.whole.end


async def test_a_text_of_one_word() -> None:
    """One key, one device, one node."""
    data = await store(Memory(), b"lonely", ["gpu0", "gpu1"], random.Random(3))  # type: ignore[arg-type]
    assert [s.device for s in data.shares] == ["gpu0"]
    assert data.shares[0].root == data.shares[0].tree.address


def test_answers_are_plain_python() -> None:
    """Counts, first places, and a word recovered from the text."""
    answers = answers_for(b"a bb a ccc bb a")
    assert (answers.words, answers.counts[fnv1a(b"a")], answers.first_at[fnv1a(b"ccc")]) == (6, 3, 7)
    assert answers.search(1) == NOT_THERE
    assert answers.most_common(b"a bb a ccc bb a", 2, 1) == [("bb", 2), ("ccc", 1)]
    assert word_at(b"a bb a", 2) == "bb"
    assert wrong([1, 2, 3], [1, 5, 3]) == 1


def test_input(tmp_path: Path) -> None:
    """Files in order, cut at the limit; the standard library when none is named."""
    for name, text in (("one", "first "), ("two", "second"), ("none", "")):
        (tmp_path / name).write_text(text)
    given = read_input([tmp_path / "one", tmp_path / "two"], 10)
    assert (given.text, given.files, given.cut) == (b"first seco", 2, True)
    assert not read_input([tmp_path / "one", tmp_path / "two"], 12).cut
    in_turn = [tmp_path / name for name in ("two", "none", "one")]
    assert read_input(in_turn, 100).text == b"second\nfirst "  # no word goes over from file to file
    whole = [tmp_path / name for name in ("two", "none")]
    assert (read_input(whole, 6).text, read_input(whole, 6).cut) == (b"second", False)  # nothing comes behind it, no line feed either
    assert (read_input([*whole, tmp_path / "one"], 6).text, read_input([*whole, tmp_path / "one"], 6).cut) == (b"second", True)
    assert "standard library" in read_input([], 1000).source
    with pytest.raises(FileNotFoundError):
        read_input([tmp_path / "three"], 10)


def test_devices_used_are_a_power_of_two() -> None:
    assert devices_used(["a", "b", "c"]) == ("a", "b")
    assert len(devices_used([str(i) for i in range(64)])) == 8
