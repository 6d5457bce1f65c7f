"""hmm_range_fault's look: every row of table A3, and the vectorised walk against one that goes page by page."""

from __future__ import annotations

import errno
from random import Random

import numpy as np
import pytest

from hmmnet.host.interfaces import NO_OWNER
from hmmnet.host.mm import pte
from hmmnet.host.mm import walk as walk_module
from hmmnet.host.mm.frames import PhysicalMemory
from hmmnet.host.mm.mm import Mm
from hmmnet.host.mm.vma import VM_PFNMAP, VM_READ, VM_WRITE, Vma
from hmmnet.host.mm.walk import HMM_PFN_INOUT, walk
from hmmnet.pages import HMM_PFN_ERROR, HMM_PFN_REQ_FAULT, HMM_PFN_REQ_WRITE, HMM_PFN_VALID, HMM_PFN_WRITE, ZONE_SHIFT, Words

RW = VM_READ | VM_WRITE
OWNER, FOREIGN = 64, 65
READ = HMM_PFN_REQ_FAULT
READ_WRITE = HMM_PFN_REQ_FAULT | HMM_PFN_REQ_WRITE
HOST_FRAME, OWN_FRAME, FOREIGN_FRAME = 5, (OWNER << ZONE_SHIFT) + 7, (FOREIGN << ZONE_SHIFT) + 9
FAULT, WRITE_FAULT = "fault", "write fault"

ENTRIES = {
    "none": 0,
    "uffd marker": pte.entry(pte.MARKER, pte.MARKER_UFFD_WP),
    "read-only": pte.entry(pte.PRESENT, HOST_FRAME),
    "writable": pte.entry(pte.PRESENT, HOST_FRAME, pte.WRITE),
    "zero page": pte.entry(pte.PRESENT, 0, pte.SPECIAL),
    "swap": pte.entry(pte.SWAP, 3),
    "own": pte.entry(pte.DEVICE, OWN_FRAME, pte.WRITE),
    "own read-only": pte.entry(pte.DEVICE, OWN_FRAME),
    "foreign": pte.entry(pte.DEVICE, FOREIGN_FRAME, pte.WRITE),
    "exclusive": pte.entry(pte.EXCLUSIVE, HOST_FRAME, pte.WRITE),
    "migration": pte.entry(pte.MIGRATION, HOST_FRAME, pte.WRITE),
    "poison": pte.entry(pte.MARKER, pte.MARKER_POISON),
    "guard": pte.entry(pte.MARKER, pte.MARKER_GUARD),
}
VALID, WRITE = HMM_PFN_VALID, HMM_PFN_VALID | HMM_PFN_WRITE
TABLE = {  # entry: (without a request, R, R+W); a number is the word, a text the fault that is wanted, an OSError code the refusal
    "none": (0, FAULT, WRITE_FAULT),
    "uffd marker": (0, FAULT, WRITE_FAULT),
    "read-only": (VALID | HOST_FRAME, VALID | HOST_FRAME, WRITE_FAULT),
    "writable": (WRITE | HOST_FRAME, WRITE | HOST_FRAME, WRITE | HOST_FRAME),
    "zero page": (VALID, VALID, WRITE_FAULT),
    "swap": (0, FAULT, WRITE_FAULT),
    "own": (WRITE | OWN_FRAME, WRITE | OWN_FRAME, WRITE | OWN_FRAME),
    "own read-only": (VALID | OWN_FRAME, VALID | OWN_FRAME, VALID | OWN_FRAME),
    "foreign": (0, FAULT, WRITE_FAULT),
    "exclusive": (0, FAULT, WRITE_FAULT),
    "migration": (0, FAULT, WRITE_FAULT),
    "poison": (0, -errno.EFAULT, -errno.EFAULT),
    "guard": (0, -errno.EFAULT, -errno.EFAULT),
}


def mm_with(entries: list[int], flags: int = RW, start: int = 100) -> Mm:
    mm = Mm(1, PhysicalMemory())
    mm.vmas.add(Vma(start, start + len(entries), flags, start))
    mm.table.write(start, np.array(entries, dtype=np.uint64))
    return mm


@pytest.mark.parametrize("need", [0, 1, 2], ids=["look", "R", "R+W"])
@pytest.mark.parametrize("name", ENTRIES)
def test_table(name: str, need: int) -> None:
    """One entry, one kind of need: the word, the fault or the errno of table A3."""
    expected = TABLE[name][need]
    found = walk(mm_with([ENTRIES[name]]), 100, 101, None, (0, READ, READ_WRITE)[need], 0, OWNER)
    assert bool(found.read[0]) == (expected in {FAULT, WRITE_FAULT})
    assert bool(found.write[0]) == (expected == WRITE_FAULT)
    assert found.errno == (-expected if isinstance(expected, int) and expected < 0 else 0)
    if isinstance(expected, int) and expected >= 0:
        assert int(found.words[0]) == expected


@pytest.mark.parametrize(
    ("name", "code"),
    [("none", errno.EPERM), ("read-only", errno.EPERM), ("zero page", errno.EPERM), ("foreign", errno.EPERM), ("own read-only", 0)],
)
def test_write_wanted_in_a_read_only_vma(name: str, code: int) -> None:
    """EPERM when a fault has to be taken; an own device page needs none (recording h10: the device finds out itself)."""
    found = walk(mm_with([ENTRIES["read-only"], ENTRIES[name]], VM_READ, 100), 101, 102, None, READ_WRITE, 0, OWNER)
    assert found.errno == code
    assert found.failed == (101 if code else 0)


@pytest.mark.parametrize("flags", [0, VM_WRITE, RW | VM_PFNMAP], ids=["PROT_NONE", "write-only", "PFN map"])
def test_vma_that_cannot_be_looked_into(flags: int) -> None:
    """ERROR words without a request, else EFAULT at once; also where the CPU itself can read (h67)."""
    mm = mm_with([ENTRIES["writable"]] * 3, flags)
    assert walk(mm, 100, 103, None, 0, 0, OWNER).words.tolist() == [HMM_PFN_ERROR] * 3
    assert walk(mm, 101, 103, None, READ, 0, OWNER).errno == errno.EFAULT


def test_holes() -> None:
    """Before, between and behind VMAs: ERROR without a request, EFAULT with one; what lies before the failure is final."""
    mm = mm_with([ENTRIES["writable"]] * 2)
    mm.vmas.add(Vma(104, 106, RW, 104))
    found = walk(mm, 98, 108, None, 0, 0, OWNER).words.tolist()
    ok = WRITE | HOST_FRAME
    assert found == [HMM_PFN_ERROR] * 2 + [ok] * 2 + [HMM_PFN_ERROR] * 2 + [0] * 2 + [HMM_PFN_ERROR] * 2
    failed = walk(mm, 100, 108, None, READ, 0, OWNER)
    assert (failed.errno, failed.failed) == (errno.EFAULT, 102)
    assert failed.words.tolist() == [ok] * 2 + [0] * 6


def test_each_page_can_ask_for_itself() -> None:
    """`flags_mask` lets the input decide; what the caller put beyond the failing page stays."""
    mm = mm_with([ENTRIES["none"]] * 3 + [ENTRIES["poison"], ENTRIES["none"]])
    inputs = np.array([0, READ, READ_WRITE, READ, READ], dtype=np.uint64)
    found = walk(mm, 100, 105, inputs, 0, READ_WRITE, OWNER)
    assert found.read.tolist() == [False, True, True, False, False]
    assert found.write.tolist() == [False, False, True, False, False]
    assert (found.errno, found.failed) == (errno.EFAULT, 103)
    assert found.words[3:].tolist() == [READ, READ]
    assert not walk(mm, 100, 105, inputs, 0, 0, OWNER).read.any()


def test_sticky_bits_survive() -> None:
    """DMA_MAPPED and P2PDMA of the input are the driver's."""
    mm = mm_with([ENTRIES["writable"], ENTRIES["none"]])
    inputs = np.array([1 << 60, 1 << 58 | 1 << 3], dtype=np.uint64)
    assert walk(mm, 100, 103, np.append(inputs, np.uint64(1 << 59)), 0, 0, OWNER).words.tolist() == [
        WRITE | HOST_FRAME | 1 << 60,
        1 << 58,
        HMM_PFN_ERROR | 1 << 59,
    ]


def test_without_an_owner_no_device_page_is_seen() -> None:
    """NO_OWNER matches nobody."""
    assert walk(mm_with([ENTRIES["own"], ENTRIES["writable"]]), 100, 102, None, 0, 0, NO_OWNER).words.tolist() == [0, WRITE | HOST_FRAME]


def page_by_page(mm: Mm, start: int, end: int, inputs: Words, default: int, mask: int) -> tuple[list[int], list[int], int, int]:
    """(words, needs, errno, failing page), from the table above, one page after the other."""
    names = {entry: name for name, entry in ENTRIES.items()}
    words, needs = inputs.tolist(), [0] * (end - start)
    page = start
    while page < end:
        vma = mm.vmas.find(page)
        stop = min([end] + ([vma.end] if vma else [other.start for other in mm.vmas.all() if other.start > page]))
        asked = [int(word) & mask | default for word in inputs[page - start : stop - start]]
        if vma is None or not vma.flags & VM_READ:
            if any(ask & READ for ask in asked):
                return words, needs, errno.EFAULT, page
            for i in range(page - start, stop - start):
                words[i] = int(inputs[i]) & HMM_PFN_INOUT | HMM_PFN_ERROR
        else:
            for i, ask in zip(range(page - start, stop - start), asked, strict=True):
                need = (1 + bool(ask & HMM_PFN_REQ_WRITE)) if ask & READ else 0
                result = TABLE[names[mm.table.get(start + i)]][need]
                if isinstance(result, int) and result < 0:
                    return words, needs, -result, start + i
                if result == WRITE_FAULT and not vma.flags & VM_WRITE:
                    return words, needs, errno.EPERM, start + i
                needs[i] = need if isinstance(result, str) else 0
                if isinstance(result, int):
                    words[i] = int(inputs[i]) & HMM_PFN_INOUT | result
        page = stop
    return words, needs, 0, 0


@pytest.mark.parametrize("seed", range(120))
def test_walk_equals_page_by_page(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Random tables over several VMAs and leaves, with blocks of a few pages, so that every seam is crossed."""
    random = Random(seed)
    monkeypatch.setattr(walk_module, "BLOCK_PAGES", random.choice((1, 2, 5, 64)))
    base = (1 << 18) * 3 - 20
    mm = Mm(1, PhysicalMemory())
    page = base
    while page < base + 40:
        count = random.randrange(1, 9)
        if random.random() < 0.85:
            flags = random.choice((RW, RW, VM_READ, 0))
            mm.vmas.add(Vma(page, page + count, flags, page))
            kinds = random.choice((["writable"], ["read-only"], list(ENTRIES), ["own", "none", "foreign", "writable"]))
            for here in range(page, page + count):
                mm.table.set(here, ENTRIES[random.choice(kinds)])
        page += count
    default = random.choice((0, 0, READ, READ_WRITE, HMM_PFN_REQ_WRITE))
    mask = random.choice((0, READ_WRITE, READ))
    inputs = np.array([random.choice((0, 0, 0, READ, READ_WRITE)) | random.choice((0, 1 << 60)) for _ in range(40)], dtype=np.uint64)
    found = walk(mm, base, base + 40, inputs, default, mask, OWNER)
    words, needs, code, failed = page_by_page(mm, base, base + 40, inputs, default, mask)
    assert (found.errno, found.failed) == (code, failed)
    assert (found.read.astype(int) + found.write).tolist() == needs
    end = (failed - base) if code else 40
    final = [i for i in range(end) if not needs[i]]
    assert [int(found.words[i]) for i in final] == [words[i] for i in final]
    assert found.words[end:].tolist() == inputs[end:].tolist()
