"""What a fault may cost, said in a line: data preserved, or lost and nothing else; a process killed; nothing leaked; devices usable; time.

Each is an `AssertionError` that says what is otherwise, at which address. With a machine whose methods are awaited these are awaited
(``async with``), with one that blocks they block (``with``); simulated or of real processes, as tests have them::

    async with outcomes.preserved(process, address, length):
        machine.add_fault("copy.corrupt", on="gpu0", nth=1)
        await process.migrate(address, length, "gpu0")
    await machine.kill_device("gpu0")
    await outcomes.lost(process, address, length, "gpu0")

What is looked at is touched as the CPU touches it: pages come home from devices. Limits are seconds of the loop: virtual ones of a
simulated machine.
"""

from __future__ import annotations

import errno
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import suppress
from functools import wraps
from types import TracebackType
from typing import Any

import numpy as np
import trio

from hmmnet.blocking import BlockingMachine, BlockingProcess
from hmmnet.errors import BusError, HmmnetError, KernelError, PeerError, SignalError
from hmmnet.pages import PAGE_SHIFT, PAGE_SIZE, page_range
from hmmnet.program import PM_GUARD_REGION, PM_PRESENT, PM_SWAP
from hmmnet.units import counted

LIMIT_S = 30.0
"""Leases, patience and repeats are over by then: what is not well will not be."""
LOOK_S = 0.02
PART_BYTES = 256 * PAGE_SIZE
"""Of a long range at a time."""
SHOWN_MAX = 8
"""Complaints that a failure shows."""
WORDS = np.arange(1, 4 * PAGE_SIZE // 8 + 1, dtype=np.uint64)
"""What a device is asked to add up and to store."""
TOUCHED, GUARDED = np.uint64(PM_PRESENT | PM_SWAP), np.uint64(PM_GUARD_REGION)
"""What /proc/PID/pagemap says of a page that is somewhere, or broken; and of one that nobody may touch."""


def _either(check: Callable[..., Awaitable[Any]]) -> Callable[..., Any]:
    """`check` of a process or machine; of one that blocks it blocks, too."""

    @wraps(check)
    def checked(of: Any, *arguments: Any, **keywords: Any) -> Any:
        __tracebackhide__ = True
        if isinstance(of, BlockingProcess):
            return of._loop.call(check, of._process, *arguments, **keywords)  # noqa: SLF001 - the process that is meant lives in its loop
        return of.run(check, *arguments, **keywords) if isinstance(of, BlockingMachine) else check(of, *arguments, **keywords)

    return checked


def _fail(complaints: list[str]) -> None:
    """Raises AssertionError with the first of them, if there are any."""
    __tracebackhide__ = True
    if complaints:
        more = [f"and {len(complaints) - SHOWN_MAX} more"] if len(complaints) > SHOWN_MAX else []
        raise AssertionError("\n".join([*complaints[:SHOWN_MAX], *more]))


# --- data -----------------------------------------------------------------------------------------------------------------------------


class Preserved:
    """See `preserved`."""

    def __init__(self, process: Any, address: int, length: int, data: bytes | None) -> None:
        if length <= 0 or (data is not None and len(data) != length):
            raise HmmnetError(f"{length} bytes are to be preserved" + ("" if data is None else f", and data has {len(data)}"))
        self._process, self._address, self._length, self._data = process, address, length, data

    async def __aenter__(self) -> None:
        if self._data is None:
            self._data = await self._process.read(self._address, self._length)

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        __tracebackhide__ = True
        if kind is None:
            await _holds(self._process, self._address, self._data)

    def __enter__(self) -> None:
        if self._data is None:
            self._data = self._process.read(self._address, self._length)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        __tracebackhide__ = True
        if kind is None:
            _holds(self._process, self._address, self._data)


def preserved(process: Any, address: int, length: int, data: bytes | None = None) -> Preserved:
    """Around what is to leave `length` bytes from `address` on as they are.

    They are read at the beginning, which brings pages home from devices: give `data`, what they hold, where that must not be. Afterwards
    AssertionError names the first byte that is another, or the page that cannot be read. Raises HmmnetError for a range of nothing.
    """
    return Preserved(process, address, length, data)


@_either
async def _holds(process: Any, address: int, data: bytes) -> None:
    __tracebackhide__ = True
    for at in range(0, len(data), PART_BYTES):
        wanted = data[at : at + PART_BYTES]
        try:
            found = await process.read(address + at, len(wanted))
        except (SignalError, KernelError) as error:
            raise AssertionError(f"0x{address:x}+{len(data)} is not preserved: {error}") from None
        differs = np.flatnonzero(np.frombuffer(wanted, np.uint8) != np.frombuffer(found, np.uint8))
        if len(differs):
            first = int(differs[0])
            where, others = address + at + first, f"{counted(len(differs), 'byte')} of {len(wanted)} there"
            what = f"0x{where:x} (page 0x{where >> PAGE_SHIFT:x}) holds 0x{found[first]:02x} where 0x{wanted[first]:02x} was"
            raise AssertionError(f"0x{address:x}+{len(data)} is not preserved: {what}; {others} differ")


@_either
async def lost(process: Any, address: int, length: int, device: str = "") -> None:
    """Every page of the range is lost: SIGBUS that names the page, and `device` (empty: none, as of broken memory). Nothing else is.

    Everything else that the process has touched and may read is read. Raises AssertionError, HmmnetError for a range of nothing.
    """
    __tracebackhide__ = True
    if length <= 0:
        raise HmmnetError(f"{length} bytes from 0x{address:x} on cannot be lost; give their length in bytes")
    first, end = page_range(address, length)
    complaints = [said for page in range(first, end) if (said := await _not_lost(process, page, device))]
    try:
        for start, stop in await _touched(process, first, end):
            complaints += [said async for said in _unreadable(process, start, stop)]
    except KernelError as error:  # it has ended
        complaints.append(f"what else the process has cannot be seen: {error}")
    _fail(complaints)


async def _not_lost(process: Any, page: int, device: str) -> str:
    """What is otherwise."""
    try:
        await process.read(page << PAGE_SHIFT, 1)
    except BusError as error:
        named = error.address >> PAGE_SHIFT == page and (not device or re.search(rf'device "?{re.escape(device)}\b', error.why))
        return "" if named else f"page 0x{page:x} is lost, and what says so does not name it{f' and {device}' if device else ''}: {error}"
    except (SignalError, KernelError) as error:
        return f"page 0x{page:x} is not lost with a SIGBUS: {error}"
    return f"page 0x{page:x} (0x{page << PAGE_SHIFT:x}) is not lost: it can be read"


async def _touched(process: Any, first: int, end: int) -> list[tuple[int, int]]:
    """Runs of pages outside [first, end) that were touched and may be read."""
    found: list[tuple[int, int]] = []
    for mapping in await process.smaps():
        if "r" in mapping.rights:
            start, stop = mapping.start >> PAGE_SHIFT, mapping.end >> PAGE_SHIFT
            words = await process.pagemap_words(mapping.start, stop - start)
            there = (words & TOUCHED != 0) & (words & GUARDED == 0)
            there[max(first - start, 0) : max(end - start, 0)] = False
            bounds = np.flatnonzero(np.diff(np.concatenate(([False], there, [False]))))
            found += [(start + int(begin), start + int(over)) for begin, over in bounds.reshape(-1, 2)]
    return found


async def _unreadable(process: Any, start: int, stop: int) -> AsyncIterator[str]:
    """What cannot be read in pages [start, stop), each page once."""
    while start < stop:
        part = min(stop - start, PART_BYTES >> PAGE_SHIFT)
        try:
            await process.read(start << PAGE_SHIFT, part << PAGE_SHIFT)
            start += part
        except (SignalError, KernelError) as error:
            page = error.address >> PAGE_SHIFT if isinstance(error, SignalError) else start
            yield f"page 0x{page:x} is lost, too: {error}"
            start = max(page, start) + 1


# --- processes and machines -----------------------------------------------------------------------------------------------------------


@_either
async def killed(process: Any, limit_s: float = LIMIT_S) -> None:
    """The process has ended (ESRCH), within `limit_s`. Raises AssertionError."""
    __tracebackhide__ = True

    async def lives() -> list[str]:
        try:
            await process.read(0, 1)
        except KernelError as error:
            return [] if error.code == errno.ESRCH else [f"process {process.pid} lives: {error}"]
        except SignalError:
            pass
        return [f"process {process.pid} lives"]

    await _until(lives, limit_s)


@_either
async def sound(machine: Any, limit_s: float = LIMIT_S) -> None:
    """I1 to I8 hold, no device has used what it may not; and no frame is in use when no process is left. Raises AssertionError.

    What is freed late, or on its way, has `limit_s` to be.
    """
    __tracebackhide__ = True

    async def unsound() -> list[str]:
        found, report = await machine.check(), await machine.report()
        complaints = list(found["complaints"]) + [f"{name} does not tell its mirror: {why}" for name, why in found["unseen"].items()]
        for name, figures in report["devices"].items():
            if figures["iommu_refused"]:
                complaints.append(f"{name} used {figures['iommu_refused']} translations that it must not use: {figures['iommu_last']}")
        return complaints if found["processes"] else complaints + list(_left_over(machine, report))

    await _until(unsound, limit_s)


def _left_over(machine: Any, report: dict[str, Any]) -> Iterator[str]:
    """Frames of devices that are in use without a process, by their own books; the host's own are looked at in every check."""
    inside = getattr(machine, "left_over", None)
    if inside is not None:
        yield from inside()
    elif not report["poisoned_pages"]:  # broken frames stay what they are
        for name, figures in report["devices"].items():
            used = max(figures["pages_used"], (figures["telemetry"] or {}).get("pages_used", 0))
            if used:
                yield f"{name}: {counted(used, 'frame')} of its memory are left over"


@_either
async def usable(machine: Any, device: str, limit_s: float = LIMIT_S) -> None:
    """Within `limit_s` a new process moves pages to `device`, has it load and store, and finds what it should. Raises AssertionError."""
    __tracebackhide__ = True

    async def unusable() -> list[str]:
        try:
            with trio.move_on_after(limit_s) as scope:
                return await _use(machine, device)
        except (KernelError, PeerError, SignalError) as error:
            return [f"{device} is not usable: {error}"]
        assert scope.cancelled_caught
        return [f"{device} is not usable: it does not answer"]

    await _until(unusable, limit_s)


async def _use(machine: Any, device: str) -> list[str]:
    """What is wrong with what it does. Raises what that raises."""
    process = await machine.create_process()
    try:
        source, target = [await process.mmap(WORDS.nbytes) for _ in range(2)]
        await process.write(source, WORDS.tobytes())
        await process.migrate(source, WORDS.nbytes, device)
        await process.launch("vector_add", device, a=source, b=source, out=target, n=len(WORDS), dtype="<u8")
        found = await process.read_array(target, "<u8", len(WORDS))
        wrong = np.flatnonzero(found != 2 * WORDS)
        kept = await process.read(source, WORDS.nbytes) == WORDS.tobytes()
    finally:
        with trio.CancelScope(shield=True), suppress(HmmnetError):
            await process.exit()
    if len(wrong):
        word = int(wrong[0])
        return [f"{device} is not usable: it stored {int(found[word])} at 0x{target + 8 * word:x} where {2 * int(WORDS[word])} is the sum"]
    return [] if kept else [f"{device} is not usable: what moved there came back as something else (0x{source:x}+{WORDS.nbytes})"]


async def _until(wrong: Callable[[], Awaitable[list[str]]], limit_s: float) -> None:
    """Look until nothing is wrong. Raises AssertionError with what is wrong after `limit_s`."""
    __tracebackhide__ = True
    over_s = trio.current_time() + limit_s
    while complaints := await wrong():
        if trio.current_time() >= over_s:
            _fail([f"{complaint} (after {limit_s:g} s)" for complaint in complaints])
        await trio.sleep(LOOK_S)


# --- time -----------------------------------------------------------------------------------------------------------------------------


class Within:
    """See `within`."""

    def __init__(self, machine: Any, seconds: float) -> None:
        self._machine, self._seconds = machine, seconds
        self._scope = trio.CancelScope()
        self._began_s = 0.0

    async def __aenter__(self) -> None:
        self._began_s = self._machine.emulated_s()
        self._scope.__enter__()
        self._scope.deadline = trio.current_time() + self._seconds / (self._machine.rate or 1.0)

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> bool:
        __tracebackhide__ = True
        swallowed = bool(self._scope.__exit__(kind, error, trace))
        if swallowed or kind is None:
            self._judge(given_up=self._scope.cancelled_caught)
        return swallowed

    def __enter__(self) -> None:
        self._began_s = self._machine.emulated_s()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        __tracebackhide__ = True
        if kind is None:
            self._judge(given_up=False)

    def _judge(self, *, given_up: bool) -> None:
        __tracebackhide__ = True
        took_s = self._machine.emulated_s() - self._began_s
        if given_up or took_s > self._seconds:
            raise AssertionError(f"not within {self._seconds:g} s: {'given up after' if given_up else 'it took'} {took_s:g} s (emulated)")


def within(machine: Any, seconds: float) -> Within:
    """Around what must be over after so many emulated seconds of `machine`. One that is awaited is given up then. Raises AssertionError."""
    return Within(machine, seconds)
