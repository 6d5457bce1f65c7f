"""What jobs must see and may do on any device model: the part of the device contract that is about loads, stores and atomics.

A load returns what was stored last, wherever the page is and whoever stored it; a store is there for everybody, and nothing is beside it;
an addition is done once. Translations are those of one context, have the rights that the host gave with them, and are good only as long as
the host has not said otherwise, also while they are on their way. What a job must not touch ends it, and nothing else.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from errno import EOPNOTSUPP
from functools import partial
from typing import Any, TypeAlias

import numpy as np
import trio

from hmmnet.errors import KernelError
from hmmnet.pages import PAGE_SIZE, Words, from_wire
from hmmnet.wire import messages as m

from .compared import same
from .scripted_host import PAGE, Model, ScriptedHost, results_of

JobCheck: TypeAlias = Callable[[ScriptedHost, Model], Awaitable[None]]
PLACEMENTS = {"remote": PAGE, "demand": PAGE + 256}
"""Across links, and in own memory; and where, for a page that is mapped stays where it is."""
WORDS = PAGE_SIZE // 8
PROMPT_S = 5.0
"""Virtual seconds for what a job does of itself: send a message, or end when it is told to. Much for any model; less than a whole check
may take, whose end tells no cause."""


async def new_words(host: ScriptedHost, page: int, pages: int, first: int = 0) -> Words:
    """Map pages, and have the CPU store different words there; those."""
    words = np.arange(first, first + pages * WORDS, dtype=np.uint64)
    await host.cpu_write(host.mmap(page, pages), words.tobytes())
    return words


def words_of(finished: m.Finished) -> Words:
    """The words that a job returned, which must have ended well."""
    return np.frombuffer(results_of(finished)["words"], np.uint64)


async def cpu_words(host: ScriptedHost, address: int, words: int) -> Words:
    """64-bit words, as the CPU sees them: their pages come home."""
    return np.frombuffer(await host.cpu_read(address, words * 8), np.uint64)


@asynccontextmanager
async def held_at(host: ScriptedHost, kind: type[m.Message], work: Callable[[], Awaitable[Any]]) -> AsyncIterator[None]:
    """Begin `work`; the block runs while the host holds the first message of that kind back (see `ScriptedHost.pauses`); both end.

    Raises AssertionError if no such message comes.
    """
    begun, goes_on = trio.Event(), trio.Event()

    async def held() -> None:
        host.pauses.pop(kind, None)
        begun.set()
        await goes_on.wait()

    host.pauses[kind] = held
    async with trio.open_nursery() as nursery:
        nursery.start_soon(work)
        with trio.move_on_after(PROMPT_S):
            await begun.wait()
        assert begun.is_set(), f"the job sent no {kind.__name__}"
        try:
            yield
        finally:
            goes_on.set()


async def stores_what_others_load(host: ScriptedHost, device: Model) -> None:
    """What a job stores, within a page and over its end, other jobs load, in ranges and one by one, and the CPU; nothing is beside it."""
    pages, value = 4, 1 << 40
    for placement, page in PLACEMENTS.items():
        at = page * PAGE_SIZE
        expected = await new_words(host, page, pages)
        for first, count in ((3, 2), (WORDS - 3, 7), (0, WORDS), (2 * WORDS - 1, WORDS + 2)):
            value += count
            stored = np.arange(value, value + count, dtype=np.uint64)
            expected[first : first + count] = stored
            await host.launch("poke", placement, a=at + 8 * first, words=stored.tobytes())
            same(await host.peek(at, pages * WORDS, placement), expected, f"{placement}: ")
        order = np.array([*range(pages * WORDS - 1, 0, -37), 5, 5], np.uint64)
        finished = await host.launch("gather", placement, addresses=(at + 8 * order).tobytes())
        same(words_of(finished), expected[order], f"{placement}, gathered: ")
        assert host.on_device(page, pages) == [placement == "demand"] * pages
        same(await cpu_words(host, at, pages * WORDS), expected, f"{placement}, as the CPU sees it: ")
        same(await host.peek(at, pages * WORDS, "remote"), expected, f"{placement}, when it is at home: ")


async def loads_what_the_cpu_has_stored(host: ScriptedHost, device: Model) -> None:
    """Also where it has loaded before: nothing is kept beside the page. A page that nobody had stored to is zero until somebody does."""
    for placement, page in PLACEMENTS.items():
        at = host.mmap(page, 1)
        assert (await host.peek(at, 2, placement)).tolist() == [0, 0]
        for value in (7, 8, 9):
            await host.cpu_write(at, value.to_bytes(8, "little"))
            assert (await host.peek(at, 2, placement)).tolist() == [value, 0]


async def adds_once(host: ScriptedHost, device: Model) -> None:
    """Additions of two jobs at the same time are all done, each once, and tell what was there before.

    On a device without atomics (``atomics = false``) they end their jobs with EOPNOTSUPP, and nothing is added.
    """
    at, pages = PAGE * PAGE_SIZE, 2
    count = pages * WORDS
    before = await new_words(host, PAGE, pages)
    ended: list[m.Finished] = []

    async def add(job: int) -> None:
        ended.append(await host.launch("fetch_add", job=job, a=at, n=count, by=3))

    async with trio.open_nursery() as nursery:
        for job in (1, 2):
            nursery.start_soon(add, job)
    if not host.spec.get("atomics", True):
        assert [finished.errno for finished in ended] == [EOPNOTSUPP] * 2, "a device without atomics must refuse them"
        same(await cpu_words(host, at, count), before, "no addition was to be done: ")
        return
    found = [words_of(finished) for finished in ended]
    same(await cpu_words(host, at, count), before + 6)
    same(np.minimum(*found), before, "what the first addition found: ")
    same(np.maximum(*found), before + 3, "what the second addition found: ")


async def keeps_to_rights(host: ScriptedHost, device: Model) -> None:
    """A store to memory that is read-only ends the job at its address, wherever the page is; loads go on, and nothing has changed."""
    for placement, first in PLACEMENTS.items():
        for page, on_device in ((first, False), (first + 16, True)):
            at = page * PAGE_SIZE
            words = await new_words(host, page, 2)
            if on_device:
                await host.launch("poke", a=at, words=words[:1].tobytes())
            await host.mprotect(page, 2, "r")
            same(await host.peek(at, 2 * WORDS, placement), words)
            finished = await host.launch("poke", placement, a=at + 40, words=b"\xff" * 8)
            assert finished.error, f"a store to a read-only page was done ({placement})"
            assert finished.fault_address == at + 40
            same(await host.peek(at, 2 * WORDS, placement), words)
            same(await cpu_words(host, at, 2 * WORDS), words)


async def asks_again_for_what_changed_meanwhile(host: ScriptedHost, device: Model) -> None:
    """hmm_range_fault's read_retry: words that were read before an invalidation which came sooner than they are good for nothing."""
    at = PAGE * PAGE_SIZE
    await new_words(host, PAGE, 1)
    seen: list[Words] = []

    async def job() -> None:
        seen.append(await host.peek(at, WORDS, "remote"))

    async with held_at(host, m.RangeFault, job):
        await host.munmap(PAGE, 1)
        words = await new_words(host, PAGE, 1, first=5000)
    assert len(host.sent(m.RangeFault)) > 1, "it uses words that were void when they came"
    same(seen[0], words)


async def asks_again_for_what_was_dropped_on_its_way(host: ScriptedHost, device: Model) -> None:
    """A page is moved here, and dropped before the device is told that it has it: that it has, and may not use before it has asked."""
    at = PAGE * PAGE_SIZE
    words = await new_words(host, PAGE, 1)
    asked = 0

    async def job() -> None:
        same(await host.peek(at, WORDS), words)

    async with held_at(host, m.Migrated, job), host.invalidated(PAGE, PAGE + 1, "soft_dirty"):
        asked = len(host.sent(m.Migrate)) + len(host.sent(m.RangeFault))
    assert len(host.sent(m.Migrate)) + len(host.sent(m.RangeFault)) > asked, "it uses a page that it was told to drop"


async def keeps_contexts_apart(host: ScriptedHost, device: Model) -> None:
    """What the host has told one context is not another's, at the same address: each asks for its own, and ends alone."""
    words = {page: await new_words(host, page, 2, first=page) for page in PLACEMENTS.values()}
    for placement, page in PLACEMENTS.items():
        same(await host.peek(page * PAGE_SIZE, 2 * WORDS, placement), words[page])
    await host.open(2, 11)
    before = len(host.messages)
    for placement, page in PLACEMENTS.items():
        same(await host.peek(page * PAGE_SIZE, 2 * WORDS, placement, context=2), words[page])
    asked = [message for message in host.messages[before:] if isinstance(message, m.RangeFault | m.Migrate)]
    assert {message.context for message in asked} == {2}, "context 2 uses what only context 1 was told, or asks in its name"
    held = {page: entry for page, entry in (await shown(host, 1)).items() if not host.on_device(page)[0]}
    await host.close(2)  # test_hmm's driver takes everything home then, of all contexts
    assert held.items() <= (await shown(host, 1)).items(), "context 1 has lost what it held, because context 2 was closed"
    for placement, page in PLACEMENTS.items():
        same(await host.peek(page * PAGE_SIZE, 2 * WORDS, placement), words[page])


async def shown(host: ScriptedHost, context: int, start: int = 0) -> dict[int, tuple[int, bool]]:
    """What a context's mirror holds, as the device says: page -> frame, whether it may be written."""
    told = await host.session.ask(m.ShowMirror(context, start), m.MirrorShown)
    entries = zip(from_wire(told.pages).tolist(), from_wire(told.entries).tolist(), strict=True)
    return {page: (entry >> 1, bool(entry & 1)) for page, entry in entries}


async def shows_what_it_holds(host: ScriptedHost, device: Model) -> None:
    """ShowMirror: every translation, with frame and right, from a page on; none that was dropped, none of a context that is not open."""
    at = PAGE * PAGE_SIZE
    await new_words(host, PAGE, 4)
    await host.peek(at, 2 * WORDS)
    await host.mprotect(PAGE, 4, "r")
    await host.peek(at, 4 * WORDS, "remote")
    held = {page: (host.table[page].frame, False) for page in range(PAGE, PAGE + 4)}
    assert await shown(host, 1) == held
    assert await shown(host, 1, PAGE + 3) == {PAGE + 3: held[PAGE + 3]}
    await host.munmap(PAGE + 3, 1)
    del held[PAGE + 3]
    assert await shown(host, 1) == held
    assert await shown(host, 9) == {}


async def ends_jobs(host: ScriptedHost, device: Model) -> None:
    """EndJob: the launch fails with EINTR, while the host still works on what the job has asked for. Its number is in use until then."""
    at = PAGE * PAGE_SIZE
    words = await new_words(host, PAGE, 1)
    ended: list[str] = []
    interrupted = trio.Event()

    async def job(number: int) -> None:
        try:
            await host.launch("peek", "remote", job=number, a=at, n=1)
        except KernelError as error:
            ended.append(error.name)
            if error.name == "EINTR":
                interrupted.set()

    async with held_at(host, m.RangeFault, partial(job, 5)):
        await job(5)
        assert ended == ["EEXIST"]
        host.session.note(m.EndJob(1, 5))
        with trio.move_on_after(PROMPT_S):
            await interrupted.wait()
        assert ended == ["EEXIST", "EINTR"], "a job that nobody waits for goes on"
    host.session.note(m.EndJob(1, 5))
    host.session.note(m.EndJob(9, 5))
    same(await host.peek(at, WORDS), words)


JOB_CHECKS: tuple[JobCheck, ...] = (
    stores_what_others_load,
    loads_what_the_cpu_has_stored,
    adds_once,
    keeps_to_rights,
    asks_again_for_what_changed_meanwhile,
    asks_again_for_what_was_dropped_on_its_way,
    keeps_contexts_apart,
    shows_what_it_holds,
    ends_jobs,
)
