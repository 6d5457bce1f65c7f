"""Recordings of a real kernel, played on the address space: every script about anonymous private memory is identical, line by line.

The recordings lie in tests/conformance. What stands between them and the address space here is a test device in one piece
(`dmirror.py`), so a difference is a difference in memory semantics. A KERNEL WARNING is a driver's bug: it is played, not compared.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import trio

from hmmnet.errors import BusError, KernelError, SegmentationFault
from hmmnet.host.mm.space import Space
from hmmnet.pages import PAGE_SIZE, Words

from .dmirror import Handle
from .machine import Machine

RECORDINGS = Path(__file__).parents[2] / "conformance" / "recordings"
REGIONS_BASE, REGIONS_APART = 0x10000000000, 0x8000000
NOT_PLAYED = re.compile(r"\b(shared|file=|memfd|thp|hugetlb|mmapdev|uffd)\b|open \w+ [23]")
"""Files, shared memory, huge pages, device mappings, userfaultfd and coherent units."""


@dataclass(frozen=True)
class Script:
    """One recording: the lines, and what the kernel printed."""

    name: str
    lines: list[str]
    recorded: list[str]


def load() -> list[Script]:
    """Every recorded script."""
    scripts = []
    for path in sorted(RECORDINGS.glob("*.traces")):
        for block in path.read_text().split("=== ")[1:]:
            name, _, rest = block.partition("\n")
            script, _, recorded = rest.partition("--- recorded\n")
            lines = [line for line in recorded.splitlines() if re.match(r"\d+: ", line)]
            scripts.append(Script(name, script.splitlines(), lines))
    return scripts


SCRIPTS = load()
PLAYED = [script for script in SCRIPTS if not NOT_PLAYED.search("\n".join(script.lines))]
PROFILES = sorted({script.name.partition("-")[2] for script in PLAYED if script.name.startswith("r")})


def token(data: bytes) -> str:
    """A page as the recordings show it."""
    if data == bytes(PAGE_SIZE):
        return "z"
    return f"u{data[0]:02x}" if data == data[:1] * PAGE_SIZE else f"{zlib.crc32(data):08x}"


def tokens(pages: list[bytes]) -> str:
    return " ".join(token(page) for page in pages)


@dataclass
class Context:
    """What a process of a script has."""

    space: Space
    handles: dict[str, Handle] = field(default_factory=dict)
    regions: dict[str, tuple[int, int]] = field(default_factory=dict)
    made: int = 0


class Player:
    """Plays one script; `output` is what the recording should say."""

    def __init__(self) -> None:
        self.machine = Machine(host_pages=1024, device_pages=512)
        self.machine.on_copy_out = self._dropped
        self.context = Context(self.machine.process())
        self.outer: list[Context] = []
        self.handles: list[Handle] = []
        self.pinned: Words | None = None
        self.referenced: Words | None = None
        self.output: list[str] = []

    def _dropped(self, space: Space, pages: Words) -> None:
        for handle in self.handles:
            handle.drop(space, pages)

    async def play(self, script: Script) -> list[str]:
        """The output of `script`."""
        for number, line in enumerate(script.lines, 1):
            words = line.split()
            if not words or words[0].startswith("#"):
                continue
            try:
                result = await self.operation(words[0], words[1:])
            except KernelError as error:
                result = f"ERR {error.name}"
            self.output.append(f"{number}: {' '.join(words)} => {result}")
            if not script.name.startswith("r"):
                self.machine.check()
        self.machine.check()
        return self.output

    async def operation(self, name: str, words: list[str]) -> str:
        """One operation; its result."""
        operate: Callable[[list[str]], Awaitable[str]] = getattr(self, f"op_{name}")
        return await operate(words)

    def place(self, region: str, page: str) -> int:
        """The byte address of a page of a region."""
        return self.context.regions[region][0] + int(page, 0) * PAGE_SIZE

    def span(self, words: list[str]) -> tuple[int, int]:
        """Address and page count of ``R p [n]``."""
        return self.place(words[0], words[1]), int(words[2], 0) if len(words) > 2 else 1

    def region(self, name: str, pages: int) -> int:
        """A new region; its address."""
        address = REGIONS_BASE + self.context.made * REGIONS_APART
        self.context.made += 1
        self.context.regions[name] = (address, pages)
        return address

    # --- address space ------------------------------------------------------------------------------------------------------------

    async def op_mmap(self, words: list[str]) -> str:
        pages = int(words[1], 0)
        rights = next((word for word in words[2:] if word in {"rw", "r", "rx", "w", "none"}), "rw")
        address = self.region(words[0], pages)
        await self.context.space.mmap(pages * PAGE_SIZE, rights, address)
        if "populate" in words:
            await self.context.space.madvise(address, pages * PAGE_SIZE, "POPULATE_WRITE" if "w" in rights else "POPULATE_READ")
        return "ok"

    async def op_hole(self, words: list[str]) -> str:
        self.region(words[0], int(words[1], 0))
        return "ok"

    async def op_munmap(self, words: list[str]) -> str:
        address, count = self.span(words)
        await self.context.space.munmap(address, count * PAGE_SIZE)
        return "ok"

    async def op_mprotect(self, words: list[str]) -> str:
        address, count = self.span(words)
        await self.context.space.mprotect(address, count * PAGE_SIZE, words[3])
        return "ok"

    async def op_madvise(self, words: list[str]) -> str:
        address, count = self.span(words)
        await self.context.space.madvise(address, count * PAGE_SIZE, words[3])
        return "ok"

    async def op_mlock(self, words: list[str]) -> str:
        address, count = self.span(words)
        await self.context.space.mlock(address, count * PAGE_SIZE)
        return "ok"

    async def op_munlock(self, words: list[str]) -> str:
        address, count = self.span(words)
        await self.context.space.munlock(address, count * PAGE_SIZE)
        return "ok"

    async def op_mremap(self, words: list[str]) -> str:
        address, count = self.span(words)
        pages = int(words[3], 0)
        target = self.region(words[4], pages)
        await self.context.space.mremap(address, count * PAGE_SIZE, pages * PAGE_SIZE, target, dontunmap="dontunmap" in words)
        return "ok"

    async def op_grow(self, words: list[str]) -> str:
        address, size = self.context.regions[words[0]]
        pages = int(words[1], 0)
        await self.context.space.mremap(address, size * PAGE_SIZE, pages * PAGE_SIZE, may_move=False)
        self.context.regions[words[0]] = (address, pages)
        return "ok"

    # --- CPU ----------------------------------------------------------------------------------------------------------------------

    async def op_write(self, words: list[str]) -> str:
        try:
            await self.context.space.store(self.place(words[0], words[1]) + int(words[2], 0), bytes([int(words[3], 0) & 255]))
        except SegmentationFault:
            return "SEGV"
        return "ok"

    async def op_read(self, words: list[str]) -> str:
        try:
            return "ok " + (await self.context.space.load(self.place(words[0], words[1]) + int(words[2], 0), 1)).hex()
        except SegmentationFault:
            return "SEGV"

    async def op_fill(self, words: list[str]) -> str:
        address, count = self.span(words)
        failed = 0
        for i in range(count):
            try:
                await self.context.space.store(address + i * PAGE_SIZE, bytes([int(words[3], 0) + i & 255]) * PAGE_SIZE)
            except SegmentationFault:
                failed += 1
        return f"SEGV wrote={count - failed} failed={failed}" if failed else "ok"

    async def op_sum(self, words: list[str]) -> str:
        address, count = self.span(words)
        found = []
        for i in range(count):
            try:
                found.append(token(await self.context.space.load(address + i * PAGE_SIZE, PAGE_SIZE)))
            except SegmentationFault:
                found.append("SEGV")
            except BusError:
                found.append("BUS")
        return f"[{' '.join(found)}]"

    async def op_pte(self, words: list[str]) -> str:
        address, count = self.span(words)
        letters = self.context.space.pagemap(address, count)
        return f"[{' '.join(chr(letter & 0x7F) + ('x' if letter & 0x80 else '') for letter in letters)}]"

    # --- processes ----------------------------------------------------------------------------------------------------------------

    async def op_fork(self, _words: list[str]) -> str:
        parent = self.context
        space = await self.machine.fork(parent.space)
        for handle in parent.handles.values():
            handle.users += 1
        self.outer.append(parent)
        self.context = Context(space, dict(parent.handles), dict(parent.regions), parent.made)
        return "child"

    async def op_exit(self, _words: list[str]) -> str:
        child = self.context
        self.context = self.outer.pop()
        await self.machine.exit(child.space)
        for name in list(child.handles):
            await self._close(child, name)
        return "status 0"

    # --- device -------------------------------------------------------------------------------------------------------------------

    def handle(self, name: str) -> Handle:
        if name not in self.context.handles:
            raise KernelError(9, "ioctl", "not open")
        return self.context.handles[name]

    async def op_open(self, words: list[str]) -> str:
        if int(words[1]) > 1:
            raise KernelError(2, "open", "no such unit")
        handle = self.context.handles[words[0]] = Handle(self.machine, int(words[1]), self.context.space)
        self.handles.append(handle)
        return "ok"

    async def _close(self, context: Context, name: str) -> None:
        handle = context.handles.pop(name)
        handle.users -= 1
        if not handle.users:
            self.handles.remove(handle)
            await self.machine.evict(handle.zone)

    async def op_close(self, words: list[str]) -> str:
        self.handle(words[0])
        await self._close(self.context, words[0])
        return "ok"

    async def op_release(self, words: list[str]) -> str:
        await self.machine.evict(self.handle(words[0]).zone)
        return "ok"

    def on_device(self, words: list[str]) -> tuple[Handle, int, int]:
        """Handle, first page, count of ``D R p n``."""
        handle = self.handle(words[0])
        address, count = self.span(words[1:])
        if count <= 0:
            raise KernelError(22, "ioctl", "no pages")
        return handle, address // PAGE_SIZE, count

    async def op_dread(self, words: list[str]) -> str:
        handle, start, count = self.on_device(words)
        faults, pages = await handle.read(start, count)
        return f"ok cpages={count} faults={faults} [{tokens(pages)}]"

    async def op_dwrite(self, words: list[str]) -> str:
        handle, start, count = self.on_device(words)
        return f"ok cpages={count} faults={await handle.write(start, count, int(words[4], 0))}"

    async def op_todev(self, words: list[str]) -> str:
        handle, start, count = self.on_device(words)
        return f"ok cpages={count} [{tokens(await handle.migrate_to_device(start, count))}]"

    async def op_tosys(self, words: list[str]) -> str:
        handle, start, count = self.on_device(words)
        return f"ok cpages={await handle.migrate_to_system(start, count)}"

    async def op_snap(self, words: list[str]) -> str:
        handle, start, count = self.on_device(words)
        return f"ok cpages={count} [{' '.join(await handle.snapshot(start, count))}]"

    async def op_excl(self, words: list[str]) -> str:
        handle, start, count = self.on_device(words)
        return f"ok cpages={count} [{tokens(await handle.exclusive(start, count))}]"

    async def op_chkex(self, words: list[str]) -> str:
        handle, start, count = self.on_device(words)
        handle.check_exclusive(start, count)
        return "ok"

    # --- references ---------------------------------------------------------------------------------------------------------------

    async def op_pin(self, words: list[str]) -> str:
        if self.pinned is not None:
            raise KernelError(22, "pin", "one pin set at a time")
        address, count = self.span(words)
        frames = await self.context.space.get_pages(address // PAGE_SIZE, count, write="w" in words[3:], pin=True, longterm=True)
        if len(frames) < count:
            self.context.space.put_pages(frames, pin=True)
            raise KernelError(14, "pin", "not all of it")
        self.pinned = frames
        return "ok"

    async def op_unpin(self, _words: list[str]) -> str:
        if self.pinned is not None:
            self.context.space.put_pages(self.pinned, pin=True)
        self.pinned = None
        return "ok"

    async def op_pinread(self, words: list[str]) -> str:
        if self.pinned is None:
            raise KernelError(22, "pinread", "nothing is pinned")
        return f"ok [{tokens([self.machine.bytes_of(frame) for frame in self.pinned[: int(words[0], 0)].tolist()])}]"

    async def _get_and_put(self, words: list[str], *, pin: bool) -> str:
        address, count = self.span(words)
        got = 0
        for i in range(count):
            try:
                frames = await self.context.space.get_pages(address // PAGE_SIZE + i, 1, write="w" in words[3:], pin=pin)
            except KernelError:
                break
            self.context.space.put_pages(frames, pin=pin)
            got += 1
        return f"ok got={got}"

    async def op_gup(self, words: list[str]) -> str:
        return await self._get_and_put(words, pin=False)

    async def op_pup(self, words: list[str]) -> str:
        return await self._get_and_put(words, pin=True)

    async def op_getref(self, words: list[str]) -> str:
        address, count = self.span(words)
        frames = await self.context.space.get_pages(address // PAGE_SIZE, count)
        self.referenced = frames if self.referenced is None else np.concatenate([self.referenced, frames])
        return f"ok got={len(frames)}"

    async def op_putref(self, _words: list[str]) -> str:
        frames = self.referenced if self.referenced is not None else np.zeros(0, np.uint64)
        shown = f"ok [{tokens([self.machine.bytes_of(frame) for frame in frames.tolist()])}]"
        for frame in frames.tolist():
            self.context.space.put_pages(np.array([frame], np.uint64))
        self.referenced = None
        return shown


def differences(script: Script) -> list[str]:
    """The lines of `script` that came out differently."""

    async def main() -> list[str]:
        return await Player().play(script)

    played = trio.run(main)
    return [f"{script.name}: {want!r}, played {have!r}" for want, have in zip(script.recorded, played, strict=True) if want != have]


HAND = [script for script in PLAYED if not script.name.startswith("r")]


@pytest.mark.parametrize("script", [pytest.param(script, id=script.name) for script in HAND])
def test_hand_script(script: Script) -> None:
    """One piece of semantics each."""
    assert differences(script) == []


@pytest.mark.parametrize("profile", PROFILES)
def test_random_scripts(profile: str) -> None:
    """Generated scripts of one profile."""
    scripts = [script for script in PLAYED if script.name.startswith("r") and script.name.endswith(f"-{profile}")]
    assert len(scripts) > 50
    assert [line for script in scripts for line in differences(script)] == []
