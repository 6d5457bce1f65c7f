"""Physical memory: allocation, references, bytes."""

from __future__ import annotations

from random import Random

import numpy as np
import pytest

from hmmnet.errors import HmmnetError
from hmmnet.host.mm import zones as zones_module
from hmmnet.host.mm.frames import PhysicalMemory
from hmmnet.host.mm.zones import ANON, HostZone
from hmmnet.pages import HUGE_PAGES, PAGE_SIZE, ZERO_FRAME, ZONE_SHIFT, is_one_run

from .machine import span, words


def memory_of(*nodes: int) -> PhysicalMemory:
    memory = PhysicalMemory()
    for i, pages in enumerate(nodes):
        memory.add_node(f"node{i}", pages)
    return memory


def test_fresh_frames_are_one_run_and_never_the_zero_page() -> None:
    """What a range gets is consecutive, so that DMA sees one run."""
    memory = memory_of(64)
    frames = memory.allocate(63)
    assert frames is not None
    assert is_one_run(frames)
    assert ZERO_FRAME not in frames.tolist()
    assert memory.allocate(1) is None
    assert memory.allocate_one(1, 0) is None


def test_reused_frames_are_zeroed_but_for_what_is_overwritten() -> None:
    """`keep` names positions that the caller fills anyway."""
    memory = memory_of(16)
    frames = memory.allocate(8)
    assert frames is not None
    memory.write(frames, 0, np.full(8 * PAGE_SIZE, 7, np.uint8))
    memory.put(frames)
    again = memory.allocate(8, keep=slice(2, 5))
    assert again is not None
    out = np.empty(8 * PAGE_SIZE, np.uint8)
    memory.read(again, 0, out)
    assert [int(page.max()) for page in out.reshape(8, -1)] == [0, 0, 7, 7, 7, 0, 0, 0]
    memory.put(again)
    one = memory.allocate_one(1, 0)
    assert one is not None
    assert memory.read_small(one, 0, PAGE_SIZE) == bytes(PAGE_SIZE)


def test_fields_of_frames_in_several_zones_come_in_their_order() -> None:
    """One array for each name, whether the frames lie in one zone, in several, in any order, or nowhere."""
    memory = memory_of(8, 8)
    for node in (0, 1):
        frames = memory.allocate(4, node)
        assert frames is not None
        memory.map_new(frames, 5 + node, frames + np.uint64(100))
    some = words(3, (1 << ZONE_SHIFT) + 2, 1, (1 << ZONE_SHIFT) + 7)
    mapping, index, refcount = memory.fields(some, "mapping", "index", "refcount")
    assert mapping.tolist() == [5, 6, 5, 0]
    assert index.tolist() == [103, (1 << ZONE_SHIFT) + 102, 101, 0]
    assert refcount.tolist() == [1, 1, 1, 0]
    assert memory.field(some[1::2], "mapping").tolist() == [6, 0]
    assert [values.tolist() for values in memory.fields(some[:0], "mapping", "index")] == [[], []]


def test_an_allocation_spills_to_other_nodes() -> None:
    """First the node that was asked for, then a node where all fits, then pieces of all."""
    memory = memory_of(8, 16)
    here = memory.allocate(4, node=1)
    assert here is not None
    assert set((here >> np.uint64(ZONE_SHIFT)).tolist()) == {1}
    whole = memory.allocate(10)
    assert whole is not None
    assert set((whole >> np.uint64(ZONE_SHIFT)).tolist()) == {1}
    pieces = memory.allocate(9)
    assert pieces is not None
    assert set((pieces >> np.uint64(ZONE_SHIFT)).tolist()) == {0, 1}
    assert memory.field(pieces, "refcount").tolist() == [1] * 9
    memory.put(np.concatenate([here, whole, pieces]))
    assert [node.allocator.used_count for node in memory.nodes] == [0, 0]


def test_last_reference_goes_to_the_driver() -> None:
    """folio_free is called once, with the frames that became idle, and not for those that somebody holds."""
    memory = memory_of(16)
    zone = memory.add_device(64, "private", "gpu0", 32)
    freed: list[int] = []
    zone.on_free = lambda frames: freed.extend(frames.tolist())
    frames = span(zone.base + 4, 4)
    assert zone.idle(frames)
    zone.refcount[4:8] = [1, 2, 1, 1]
    assert not zone.idle(frames)
    memory.put(frames)
    assert freed == [zone.base + 4, zone.base + 6, zone.base + 7]
    memory.put_one(zone.base + 5)
    assert freed[-1] == zone.base + 5
    assert zone.idle(frames)
    memory.remove_device(64)
    assert 64 not in memory.zones


def test_the_largest_memory_of_a_device_goes_without_a_look_at_all_of_it() -> None:
    """64 TiB: only what was ever offered is looked at."""
    memory = memory_of(16)
    zone = memory.add_device(64, "private", "gpu0", 1 << 34)
    zone.offered = 8
    zone.refcount[5] = 1
    with pytest.raises(AssertionError, match="zone 64 still has referenced frames"):
        memory.remove_device(64)
    zone.refcount[5] = 0
    memory.remove_device(64)
    assert 64 not in memory.zones


def test_idle_refuses_foreign_and_doubled_frames() -> None:
    """What a driver offers is checked: its own frames, each once."""
    zone = memory_of(4).add_device(65, "private", "gpu1", 8)
    assert not zone.idle(words(zone.base + 8))
    assert not zone.idle(words(3))
    assert not zone.idle(words(zone.base, zone.base))
    assert zone.idle(words())


def test_a_lost_zone_tells_no_driver() -> None:
    """Its device is gone: frames become idle in silence."""
    memory = memory_of(4)
    zone = memory.add_device(64, "private", "gpu0", 8)
    zone.on_free = lambda _: pytest.fail("told a dead driver")
    zone.refcount[0] = 1
    memory.zone_lost(64, "killed")
    memory.put(words(zone.base))
    assert zone.lost == "killed"


def test_much_free_memory_is_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """Beyond the limit, freed runs go to the operating system and read as zero."""
    monkeypatch.setattr(zones_module, "FREE_COMMITTED_PAGES_MAX", 16)
    memory = memory_of(128)
    frames = memory.allocate(64)
    assert frames is not None
    memory.write(frames, 0, np.full(64 * PAGE_SIZE, 7, np.uint8))
    memory.put(frames)
    out = np.empty(64 * PAGE_SIZE, np.uint8)
    memory.read(frames, 0, out)
    assert not out.any()


def test_map_and_unmap_keep_the_books() -> None:
    """One mapping, one reference, an owner and an index; gone with the mapping."""
    memory = memory_of(16)
    frames = memory.allocate(3)
    assert frames is not None
    memory.map_new(frames, 5, span(100, 3))
    assert memory.field(frames, "mapcount").tolist() == [1, 1, 1]
    assert memory.field(frames, "index").tolist() == [100, 101, 102]
    assert memory.field(frames, "flags").tolist() == [ANON] * 3
    memory.unmap(frames)
    assert not memory.field(frames, "mapping").any()
    assert memory.nodes[0].allocator.used_count == 0


@pytest.mark.parametrize("seed", range(24))
def test_bytes_go_where_they_belong_however_frames_lie(seed: int) -> None:
    """Runs, fragments, two zones, odd ends: read returns what write stored, and nothing beside it changed."""
    random = Random(seed)
    count, tail = random.choice((1, 2, 40, 150)), random.randrange(1, PAGE_SIZE + 1)
    offset = random.choice((0, 1, random.randrange(PAGE_SIZE)))
    memory = memory_of(128, 128)
    frames = [*range(1, 128), *range(1 << ZONE_SHIFT, (1 << ZONE_SHIFT) + 128)]
    random.shuffle(frames)
    if seed % 2:
        frames.sort()
    chosen = words(*frames[:count])
    length = max(1, (count - 1) * PAGE_SIZE + tail - offset)
    data = np.frombuffer(random.randbytes(length), np.uint8)
    memory.write(chosen, offset, data)
    out = np.empty(length, np.uint8)
    memory.read(chosen, offset, out)
    assert bytes(out) == bytes(data)
    whole = b"".join(_page(memory, frame) for frame in chosen.tolist())
    assert whole[offset : offset + length] == bytes(data)
    assert not any(whole[:offset])
    assert not any(whole[offset + length :])


def _page(memory: PhysicalMemory, frame: int) -> bytes:
    zone = memory.zone(frame)
    assert isinstance(zone, HostZone)
    return bytes(zone.arena.pages[frame - zone.base])


@pytest.mark.parametrize("name", ["refcount", "mapcount", "pincount", "flags", "mapping", "index"])
def test_cells_are_the_arrays(name: str) -> None:
    """A frame's state looked at alone is the one that arrays of frames have, in both directions, to the last bit."""
    zone = memory_of(16).nodes[0]
    array, cells = getattr(zone, name), getattr(zone.cells, name)
    top = int(np.iinfo(array.dtype).max)
    array[3] = top
    cells[4] = top - 1
    assert (cells[3], int(array[4])) == (top, top - 1)
    assert type(cells[3]) is int


def test_a_node_is_found_by_its_name_or_those_there_are_named() -> None:
    """The mistake, and the mend."""
    memory = memory_of(16, 16)
    assert [memory.node_named("node0"), memory.node_named("node1")] == [0, 1]
    with pytest.raises(HmmnetError, match='no host memory is called "node2"; there are node0, node1'):
        memory.node_named("node2")


def test_who_gets_no_memory_is_not_charged_for_it() -> None:
    """A host that is used up, for one page, for several, for a huge one: the group's usage is what it was, and nothing is allocated."""
    memory = memory_of(HUGE_PAGES)  # the zero page lies in the only aligned run
    group = memory.cgroups.create("job", None)
    assert memory.allocate_folio(0, group) is None
    assert memory.allocate_charged(group, HUGE_PAGES) is None
    assert memory.allocate_charged(group, HUGE_PAGES - 1) is not None
    assert memory.allocate_one(1, 0, 0, group) is None
    assert (group.usage_pages, group.refused) == (HUGE_PAGES - 1, 0)


def test_a_group_at_its_limit_gets_nothing_of_a_host_that_has_some() -> None:
    """Refused before anything is allocated, and counted."""
    memory = memory_of(3 * HUGE_PAGES)
    group = memory.cgroups.create("job", 2 * PAGE_SIZE)
    assert memory.allocate_folio(0, group) is None
    assert memory.allocate_charged(group, 3) is None
    assert memory.allocate_one(1, 0, 0, group) is not None
    assert memory.allocate_one(1, 1, 0, group) is not None
    assert memory.allocate_one(1, 2, 0, group) is None
    assert (group.usage_pages, group.refused) == (2, 3)
    assert memory.nodes[0].allocator.used_count == 2


def test_a_long_run_is_given_back_beyond_what_free_frames_may_keep(monkeypatch: pytest.MonkeyPatch) -> None:
    """FREE_COMMITTED_PAGES_MAX: frames of huge pages that are freed beyond it are zero when they come again, without being cleared."""
    monkeypatch.setattr(zones_module, "FREE_COMMITTED_PAGES_MAX", HUGE_PAGES)
    memory = memory_of(3 * HUGE_PAGES)
    heads = memory.allocate_folios(2)
    assert len(heads) == 2
    for head in heads.tolist():
        memory.nodes[0].arena.pages[head : head + HUGE_PAGES] = 7
    memory.put_folios(heads)
    assert memory.nodes[0].allocator.used_count == 0
    assert not memory.nodes[0].arena.pages[int(heads[1]) + 1 :].any(), "given back to the operating system"
    again = memory.allocate(2 * HUGE_PAGES)
    assert again is not None
    assert not memory.nodes[0].arena.pages[again.astype(np.intp)].any()


def test_folded_folios_of_a_lost_device_are_nobodys() -> None:
    """The driver is gone: their last reference calls nobody, and the books are right."""
    memory = memory_of(16)
    zone = memory.add_device(64, "private", "gpu0", 2 * HUGE_PAGES)
    freed: list[int] = []
    zone.on_free = lambda frames: freed.extend(frames.tolist())
    for lost in (False, True):
        if lost:
            memory.zone_lost(64, "pulled out")
        zone.refcount[HUGE_PAGES] = 1
        zone.set_folded(np.array([1]))
        memory.put_folios(words(zone.base + HUGE_PAGES))
        assert zone.folded_count == 0
    assert freed == list(range(zone.base + HUGE_PAGES, zone.base + 2 * HUGE_PAGES))
    zone.refcount[3] = 1
    memory.put_one(zone.base + 3)
    assert not zone.refcount.any()
