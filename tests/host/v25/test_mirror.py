"""hmm_mirror under v25: register, snapshot, fault, range_done, with the codes of the patch series."""

from __future__ import annotations

import errno

import numpy as np
import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from hmmnet.errors import KernelError
from hmmnet.host import v25
from hmmnet.host.mm.filemap import File
from hmmnet.host.mm.vma import VM_MIXEDMAP
from hmmnet.host.poison import memory_failure
from hmmnet.pages import PAGE_SIZE
from tests.host.fakes import Bench

from .dummy import Ground, Listener, refused

VALID, READ, WRITE = v25.HMM_PFN_VALID, v25.HMM_PFN_READ, v25.HMM_PFN_WRITE
MAPPED_RO, MAPPED = VALID | READ, VALID | READ | WRITE
ZERO = MAPPED_RO | v25.HMM_PFN_SPECIAL
AWAY = v25.HMM_PFN_DEVICE_UNADDRESSABLE


# --- register -------------------------------------------------------------------------------------------------------------------------


async def test_register_takes_a_mirror_with_ops_and_the_lock() -> None:
    """EINVAL for a null mirror, mm or ops, and without the mmap lock for writing; EBUSY for the second time."""
    ground = Ground()
    mirror = Listener().mirror
    async with ground.space.mmap_lock.write():
        for bad, mm in ((None, ground.space), (mirror, None), (v25.HmmMirror(None), ground.space)):
            with refused(errno.EINVAL):
                await v25.hmm_mirror_register(bad, mm)
        await v25.hmm_mirror_register(mirror, ground.space)
        with refused(errno.EBUSY, "registered already"):
            await v25.hmm_mirror_register(mirror, ground.space)
    for lock in (ground.space.mmap_lock.read(), trio.Lock()):
        async with lock:
            with refused(errno.EINVAL, "not held for writing"):
                await v25.hmm_mirror_register(Listener().mirror, ground.space)


@pytest.mark.parametrize(
    ("hardware", "named"),
    [
        (v25.Hardware(preempts=False), "preempts"),
        (v25.Hardware(read_only=False), "read_only"),
        (v25.Hardware(tracks_writes=False), "tracks_writes"),
        (v25.Hardware(page_bytes=65536), "page_bytes"),
    ],
)
async def test_hardware_that_lacks_something_is_refused(hardware: v25.Hardware, named: str) -> None:
    """Each of the four things that the cover letter takes for granted, by name; smaller pages than the CPU's are fine."""
    ground = Ground()
    async with ground.space.mmap_lock.write():
        with refused(errno.EOPNOTSUPP, named):
            await v25.hmm_mirror_register(v25.HmmMirror(Listener(), hardware), ground.space)
        await v25.hmm_mirror_register(v25.HmmMirror(Listener(), v25.Hardware(page_bytes=1024)), ground.space)


async def test_a_machine_of_today_has_no_such_calls() -> None:
    """They are refused, and say how to get them."""
    space = Bench().space()
    async with space.mmap_lock.write():
        with refused(errno.EOPNOTSUPP, 'personality="v25"'):
            await v25.hmm_mirror_register(Listener().mirror, space)


async def test_after_unregister_no_callback_runs() -> None:
    """It waits for a callback that runs, and none comes later; twice, or of another mm, is EINVAL; struct hmm stays."""
    ground = Ground()
    gate = trio.Event()
    slow = Listener("slow", during=gate.wait)
    await ground.register(slow)
    address = await ground.space.mmap(4 * PAGE_SIZE)
    removed = trio.Event()

    async def unregister() -> None:
        await v25.hmm_mirror_unregister(slow.mirror, ground.space)
        removed.set()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(ground.space.munmap, address, PAGE_SIZE)
        await wait_all_tasks_blocked()
        nursery.start_soon(unregister)
        await wait_all_tasks_blocked()
        assert not removed.is_set()
        gate.set()
    await ground.space.munmap(address + PAGE_SIZE, PAGE_SIZE)
    assert len(slow.log) == 1
    with refused(errno.EINVAL, "not registered"):
        await v25.hmm_mirror_unregister(slow.mirror, ground.space)
    await ground.register(slow)
    with refused(errno.EINVAL, "not registered"):
        await v25.hmm_mirror_unregister(slow.mirror, ground.bench.space(2))


async def test_unregister_from_a_callback_would_wait_for_itself() -> None:
    """EDEADLK, for the callback's own mirror and for others."""
    ground = Ground()
    other = Listener("other")
    found: list[int] = []

    async def unregister() -> None:
        for mirror in (other.mirror, listener.mirror):
            with pytest.raises(KernelError) as info:
                await v25.hmm_mirror_unregister(mirror, ground.space)
            found.append(info.value.code)

    listener = Listener("itself", during=unregister)
    await ground.register(other, listener)
    address = await ground.space.mmap(PAGE_SIZE)
    await ground.space.munmap(address, PAGE_SIZE)
    assert found == [errno.EDEADLK] * 2


# --- snapshot -------------------------------------------------------------------------------------------------------------------------


async def test_a_snapshot_says_what_each_entry_is_and_faults_nothing() -> None:
    """Never touched, the zero page, written, read-only, on a device (whoever owns it), poisoned."""
    ground = Ground()
    await ground.register()
    address = await ground.space.mmap(7 * PAGE_SIZE)
    await ground.space.load(address + PAGE_SIZE, 1)
    await ground.space.store(address + 2 * PAGE_SIZE, bytes(5 * PAGE_SIZE))
    await ground.to_device(address + 4 * PAGE_SIZE, 2)
    await ground.space.mprotect(address + 3 * PAGE_SIZE, 2 * PAGE_SIZE, "r")
    await memory_failure(ground.bench.homing.memory, ground.bench.homing.spaces, ground.space, (address >> 12) + 6, (address >> 12) + 7)
    seen = []
    for first, count in ((0, 3), (3, 2), (5, 2)):
        seen += await ground.bits(address + first * PAGE_SIZE, count)
    assert seen == [v25.HMM_PFN_EMPTY, ZERO, MAPPED, MAPPED_RO, MAPPED_RO | AWAY, MAPPED | AWAY, v25.HMM_PFN_ERROR]
    async with ground.space.mmap_lock.read():
        vma, tracked, pfns = ground.snapshot(address + 5 * PAGE_SIZE, 1)
        assert v25.hmm_pfn_to_frame(int(pfns[0])) == ground.dummy.table[address + 5 * PAGE_SIZE]
        assert v25.hmm_vma_range_done(vma, tracked)


async def test_memory_without_the_right_to_read_is_eperm_and_cleared() -> None:
    """PROT_NONE; nothing is tracked then."""
    ground = Ground()
    await ground.register()
    address = await ground.space.mmap(2 * PAGE_SIZE, "none")
    pfns, tracked = np.full(2, 99, np.uint64), v25.HmmRange()
    async with ground.space.mmap_lock.read():
        vma = ground.vma(address)
        with refused(errno.EPERM):
            v25.hmm_vma_get_pfns(vma, tracked, address, address + 2 * PAGE_SIZE, pfns)
        assert pfns.tolist() == [0, 0]
        pfns[:] = 99
        with refused(errno.EPERM):
            await v25.hmm_vma_fault(vma, tracked, address, address + 2 * PAGE_SIZE, pfns, write=False, block=True)
        assert pfns.tolist() == [0, 0]
        with refused(errno.EINVAL, "not tracked"):
            v25.hmm_vma_range_done(vma, tracked)


async def test_special_mappings_are_special_throughout() -> None:
    """hugetlb and mapped drivers' pages: EINVAL for a snapshot; success for a fault, which has to be done like any other."""
    ground = Ground()
    await ground.register()
    hugetlb = await ground.space.mmap_hugetlb(2 << 20, "rw", None)
    mixed = await ground.space.mmap(2 * PAGE_SIZE, flags=VM_MIXEDMAP, file=File(ground.bench.memory, 2 * PAGE_SIZE))
    for address in (hugetlb, mixed):
        pfns, tracked = np.zeros(2, np.uint64), v25.HmmRange()
        async with ground.space.mmap_lock.read():
            vma = ground.vma(address)
            with refused(errno.EINVAL, "special"):
                v25.hmm_vma_get_pfns(vma, tracked, address, address + 2 * PAGE_SIZE, pfns)
            assert pfns.tolist() == [v25.HMM_PFN_SPECIAL] * 2
            pfns[:] = 0
            await v25.hmm_vma_fault(vma, tracked, address, address + 2 * PAGE_SIZE, pfns, write=True, block=True)
            assert pfns.tolist() == [v25.HMM_PFN_SPECIAL] * 2
            assert v25.hmm_vma_range_done(vma, tracked)


async def test_what_is_no_range_of_a_mirrored_mapping_is_einval() -> None:
    """Nobody mirrors; the range leaves the VMA, is empty or unaligned; the array is short; no lock."""
    ground = Ground()
    address = await ground.space.mmap(2 * PAGE_SIZE)
    end = address + 2 * PAGE_SIZE
    pfns = np.zeros(2, np.uint64)
    async with ground.space.mmap_lock.read():
        vma = ground.vma(address)
        with refused(errno.EINVAL, "nobody mirrors"):
            v25.hmm_vma_get_pfns(vma, v25.HmmRange(), address, end, pfns)
    await ground.register()
    async with ground.space.mmap_lock.read():
        for low, high in ((address, end + PAGE_SIZE), (address - PAGE_SIZE, end), (address, address), (address + 1, end)):
            with refused(errno.EINVAL, "no range"):
                v25.hmm_vma_get_pfns(vma, v25.HmmRange(), low, high, pfns)
        for short in (pfns[:1], np.zeros(2, np.int32)):
            with refused(errno.EINVAL, "room for"):
                v25.hmm_vma_get_pfns(vma, v25.HmmRange(), address, end, short)  # type: ignore[arg-type]
    with refused(errno.EINVAL, "not held"):
        v25.hmm_vma_get_pfns(vma, v25.HmmRange(), address, end, pfns)


async def test_range_done_is_called_exactly_once() -> None:
    """Never begun, and twice, are EINVAL; a new snapshot into a range that is tracked is EBUSY."""
    ground = Ground()
    await ground.register()
    address = await ground.space.mmap(PAGE_SIZE)
    async with ground.space.mmap_lock.read():
        with refused(errno.EINVAL, "not tracked"):
            v25.hmm_vma_range_done(ground.vma(address), v25.HmmRange())
        vma, tracked, pfns = ground.snapshot(address, 1)
        with refused(errno.EBUSY, "hmm_vma_range_done first"):
            v25.hmm_vma_get_pfns(vma, tracked, address, address + PAGE_SIZE, pfns)
        assert v25.hmm_vma_range_done(vma, tracked)
        with refused(errno.EINVAL, "not tracked"):
            v25.hmm_vma_range_done(vma, tracked)
        v25.hmm_vma_get_pfns(vma, tracked, address, address + PAGE_SIZE, pfns)
        assert v25.hmm_vma_range_done(vma, tracked)


# --- fault ----------------------------------------------------------------------------------------------------------------------------


async def test_a_fault_brings_what_is_missing() -> None:
    """For reading the zero page will do; for writing there is a page, also where the zero page or a shared one was."""
    ground = Ground()
    await ground.register()
    address = await ground.space.mmap(3 * PAGE_SIZE)
    await ground.space.store(address + 2 * PAGE_SIZE, b"x")
    assert await ground.bits(address, 3, write=False) == [ZERO, ZERO, MAPPED]
    assert await ground.bits(address, 3, write=True) == [MAPPED] * 3
    child = ground.bench.spaces[2] = await ground.space.fork(2, ground.bench.new_hub())
    assert await ground.bits(address + 2 * PAGE_SIZE, 1) == [MAPPED_RO]
    assert await ground.bits(address + 2 * PAGE_SIZE, 1, write=True) == [MAPPED]
    assert await child.load(address + 2 * PAGE_SIZE, 1) == b"x"


async def test_device_memory_stays_where_it_is_unless_it_is_to_be_made_writable() -> None:
    """A fault reports it; a write fault on a read-only entry is a CPU's, and takes the page home."""
    ground = Ground()
    await ground.register()
    address = await ground.space.mmap(2 * PAGE_SIZE)
    await ground.space.store(address, b"a" * PAGE_SIZE + b"b" * PAGE_SIZE)
    await ground.to_device(address, 2)
    assert await ground.bits(address, 2, write=True) == [MAPPED | AWAY] * 2
    await ground.space.mprotect(address, 2 * PAGE_SIZE, "r")
    await ground.space.mprotect(address, 2 * PAGE_SIZE, "rw")
    assert await ground.bits(address, 2, write=False) == [MAPPED_RO | AWAY] * 2
    assert ground.dummy.freed == []
    assert await ground.bits(address, 1, write=True) == [MAPPED]
    assert len(ground.dummy.freed) == 1
    assert await ground.bits(address, 2) == [MAPPED, MAPPED_RO | AWAY]
    assert await ground.space.load(address, 1) == b"a"


async def test_a_page_that_cannot_be_had_is_an_error_of_its_own() -> None:
    """Behind the end of a file; its neighbours are there all the same. A write to read-only memory is an error for each."""
    ground = Ground()
    await ground.register()
    address = await ground.space.mmap(4 * PAGE_SIZE, shared=True, file=File(ground.bench.memory, 2 * PAGE_SIZE))
    assert await ground.bits(address, 4, write=True) == [MAPPED, MAPPED, v25.HMM_PFN_ERROR, v25.HMM_PFN_ERROR]
    fixed = await ground.space.mmap(2 * PAGE_SIZE, "r")
    assert await ground.bits(fixed, 2, write=True) == [v25.HMM_PFN_ERROR] * 2
    assert await ground.bits(fixed, 2, write=False) == [ZERO] * 2


async def test_memory_that_is_used_up_is_enomem() -> None:
    """Nothing is tracked then, and the entries are cleared."""
    ground = Ground(host_pages=4)
    await ground.register()
    address = await ground.space.mmap(8 * PAGE_SIZE)
    pfns, tracked = np.full(8, 99, np.uint64), v25.HmmRange()
    async with ground.space.mmap_lock.read():
        with refused(errno.ENOMEM):
            await v25.hmm_vma_fault(ground.vma(address), tracked, address, address + 8 * PAGE_SIZE, pfns, write=True, block=True)
    assert tracked.hmm is None
    assert pfns.tolist() == [0] * 8


async def test_without_blocking_a_fault_that_drops_the_lock_is_eagain() -> None:
    """A userfaultfd's page: the lock is free while it is waited for, and everything has to be looked up again. Blocking: an error entry."""
    ground = Ground()
    await ground.register()
    address = await ground.space.mmap(2 * PAGE_SIZE)
    registration = await ground.space.userfaultfd(address, 2 * PAGE_SIZE)
    assert await ground.bits(address, 2, write=False, block=True) == [v25.HMM_PFN_ERROR] * 2
    codes: list[int] = []

    async def fault() -> None:
        pfns, tracked = np.zeros(2, np.uint64), v25.HmmRange()
        async with ground.space.mmap_lock.read():
            with pytest.raises(KernelError) as info:
                await v25.hmm_vma_fault(ground.vma(address), tracked, address, address + 2 * PAGE_SIZE, pfns, write=False, block=False)
            assert tracked.hmm is None
        codes.append(info.value.code)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(fault)
        missing = await registration.read()
        await wait_all_tasks_blocked()
        assert not ground.space.mmap_lock.held
        await registration.copy(missing, b"u" * PAGE_SIZE)
    assert codes == [errno.EAGAIN]
    assert not ground.space.mmap_lock.held
    await registration.copy(address + PAGE_SIZE, b"v" * PAGE_SIZE)
    assert await ground.bits(address, 2, write=False, block=False) == [MAPPED] * 2


async def test_a_fault_waits_for_a_migration() -> None:
    """A snapshot sees nothing where a page is on its way; a fault sees where it has arrived."""
    ground = Ground()
    await ground.register()
    address = await ground.space.mmap(PAGE_SIZE)
    await ground.space.store(address, b"x")
    arrived, go = trio.Event(), trio.Event()

    async def copying() -> None:
        arrived.set()
        await go.wait()

    ground.dummy.during_copy = copying
    got: list[int] = []

    async def fault() -> None:
        got.extend(await ground.bits(address, 1, write=False))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(ground.to_device, address, 1)
        await arrived.wait()
        assert await ground.bits(address, 1) == [0]
        nursery.start_soon(fault)
        await wait_all_tasks_blocked()
        assert got == []
        go.set()
    assert got == [MAPPED | AWAY]
