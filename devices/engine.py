"""The job engine: runs kernels on virtual addresses, and replays the accesses that fault.

A kernel is a generator function. It yields memory requests (see `access`) for thousands of lanes at a time and is sent what was loaded, as
a warp is stalled on its loads and resumed with their values. Between requests it is plain numpy, so a kernel is as fast as numpy.

Jobs take turns at their requests: after each one other jobs and the host's messages are served. A job whose access cannot be served ends
with the fault address named; so does one whose kernel raises. The device goes on.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from inspect import Signature, signature
from typing import Any
from weakref import ref

import numpy as np
import trio

from hmmnet.errors import HmmnetError, KernelError
from hmmnet.pages import PAGE_SHIFT, Words
from hmmnet.sleeping import Completion
from hmmnet.wire import crashes

from .access import Access, AccessError, Array, JobError, Kernel, Load, LoadRange, Request, Steps, Update, open_access
from .context import Context
from .faultbuffer import Ticket
from .mirror import allows, frames_of
from .policy import BadPlan
from .servicing import FaultService
from .spec import Spec
from .traffic import Traffic

UPDATE_REPLAYS_MAX = 64
"""Replays of an atomic access: two devices that want a page which neither can have would take its mapping from each other for ever."""
CLAIMS_MAX = 8
"""Tries to bring a page here that an atomic access needs here: somebody may hold it for a moment."""
CLAIMS_AT_ONCE = 2
"""Of these without a nap in between: another device may want the page, too, and take it as fast."""
REPLAYS_MAX = 10_000
"""Replays of one access: pages that are taken away again faster than they can be used."""

log = logging.getLogger("hmmnet.devices")


def elsewhere(page: int) -> str:
    """Why an atomic access cannot be had."""
    return f"page 0x{page:x} is in other memory and does not come here: it cannot be updated atomically"


def _never_done(request: Request) -> AccessError | JobError:
    """Why an access is given up that was replayed so often."""
    if isinstance(request, Update):
        address = int(request.addresses[0])
        return AccessError(address, elsewhere(address >> PAGE_SHIFT), errno.EOPNOTSUPP)
    return JobError(f"an access was replayed {REPLAYS_MAX} times: its pages are taken away as fast as they come")


@dataclass
class JobCounters:
    """What a job cost. Seconds are emulated."""

    requests: int = 0
    replays: int = 0
    faults: int = 0
    fault_groups: int = 0
    fault_group_s: float = 0.0
    emulated_s: float = 0.0
    traffic: Traffic = field(default_factory=Traffic)

    def as_map(self) -> dict[str, Any]:
        """The counters as `Finished` carries them."""
        return {
            "requests": self.requests,
            "replays": self.replays,
            "faults": self.faults,
            "fault_groups": self.fault_groups,
            "fault_group_s": self.fault_group_s,
            "emulated_s": self.emulated_s,
            **self.traffic.as_map(),
        }


@dataclass(frozen=True)
class JobOutcome:
    """How a job ended. `error` is empty when it ended well."""

    results: Mapping[str, Any]
    counters: JobCounters
    error: str = ""
    fault_address: int | None = None
    errno: int = 0


_known: dict[int, tuple[ref[Kernel], Signature]] = {}
"""Of each kernel that lives, by `id`: a kernel is any object that can be called, whether it can be hashed or not."""


def parameters(kernel: Kernel) -> Signature:
    """`inspect.signature`, which takes longer than many a job; remembered for as long as the kernel lives, and not keeping it alive."""
    number = id(kernel)
    known = _known.get(number)
    if known is not None:
        return known[1]
    found = signature(kernel)
    with contextlib.suppress(TypeError):  # an object that nobody can refer to weakly is looked at for each job
        _known[number] = ref(kernel, lambda _: _known.pop(number, None)), found
    return found


class Engine:
    """Runs the jobs of one context, of the device of `spec`.

    Where the hardware cannot fault, a page that is not mapped ends the job; where it has no atomics, an atomic update does.
    """

    def __init__(self, context: Context, service: FaultService, clock_now: Callable[[], float], spec: Spec) -> None:
        self.running = 0
        self._spec = spec
        self._context = context
        self._service = service
        self._now = clock_now

    async def run(self, kernel: Kernel, arguments: Mapping[str, Any], placement: str) -> JobOutcome:
        """Run a kernel to its end. Raises nothing for what a kernel does or what its accesses meet; cancellation passes through."""
        counters = JobCounters()
        before = self._context.traffic.copy()
        began_s = self._now()
        self.running += 1
        error, address, code = "", None, 0
        results: Mapping[str, Any] = {}
        try:
            parameters(kernel).bind(**arguments)
            if self._context.points.armed:
                await self._context.at("device.job_start")
            results = await self._drive(kernel(**arguments), placement, counters)
        except AccessError as fault:
            error, address, code = str(fault), fault.address, fault.code
        except HmmnetError as failure:
            error, code = str(failure), failure.code if isinstance(failure, KernelError) else 0
        except Exception as failure:  # a kernel is a user's code: whatever it raises ends the job, not the device
            error = f"{type(failure).__name__}: {failure}"
            log.exception("a kernel crashed")
            crashes.tell(f"a kernel on {self._spec.name}", failure)
        finally:
            self.running -= 1
        if self._context.points.armed:
            await self._context.at("device.job_end")
        counters.emulated_s = self._now() - began_s
        counters.traffic = self._context.traffic.since(before)
        return JobOutcome(results, counters, error, address, code)

    async def _drive(self, steps: Steps, placement: str, counters: JobCounters) -> Mapping[str, Any]:
        try:
            request = next(steps)
            while True:
                loaded = await self._serve(request, placement, counters)
                request = steps.send(loaded)  # type: ignore[arg-type] # a store is answered with None, which its kernel ignores
        except StopIteration as end:
            return end.value or {}
        finally:
            steps.close()

    async def _serve(self, request: Request, placement: str, counters: JobCounters) -> Array | None:
        counters.requests += 1
        access = open_access(request)
        if isinstance(request, Update) and not self._spec.atomics:
            why = f'device "{self._spec.name}" has no atomic operations (atomics = false)'
            raise KernelError(errno.EOPNOTSUPP, "update", why)
        tries_max = UPDATE_REPLAYS_MAX if isinstance(request, Update) else REPLAYS_MAX
        for tries in itertools.count():
            if access.is_done:  # also by the last try
                break
            if tries == tries_max:
                raise _never_done(request)
            step = access.advance(self._context.mirror, self._context.memory)
            if step.foreign:
                await self._context.transfer(step.foreign)
            if len(step.missing):
                await self._fault(access, step.missing, placement, counters)
                counters.replays += 1
            if len(step.elsewhere):
                await self._claim(access, step.elsewhere)
                counters.replays += 1
        if self._context.points.armed:
            await self._context.at("device.job_step")
        await trio.lowlevel.checkpoint()
        if isinstance(request, Update):
            return access.result(request.values.dtype)
        return access.result(request.dtype) if isinstance(request, Load | LoadRange) else None

    async def _claim(self, access: Access, pages: Words) -> None:
        """Bring pages here that an atomic access needs here. Raises AccessError for one that will not come."""
        context = self._context
        for page in pages.tolist():
            for tries in range(CLAIMS_MAX):
                if tries >= CLAIMS_AT_ONCE:
                    await self._service.back_off()
                with contextlib.suppress(KernelError):  # what is wrong with the page its next fault says
                    await context.migrate_in(page, page + 1, "atomic")
                entry = context.mirror.translate(np.array([page], np.uint64))
                if not allows(entry, True).all() or context.memory.owns(frames_of(entry)).all():
                    break
                await trio.lowlevel.checkpoint()
            else:
                raise AccessError(access.first_address(page), elsewhere(page), errno.EOPNOTSUPP)

    async def _fault(self, access: Access, missing: Words, placement: str, counters: JobCounters) -> None:
        """Enter the misses in the fault buffer and wait until they were serviced. Raises AccessError when a page cannot be had."""
        if not self._spec.fault_capable:
            page = int(missing.min())
            why = (
                f"page 0x{page:x} is not mapped on this device, which cannot fault (fault_capable = false): migrate it there before the job"
            )
            raise AccessError(access.first_address(page), why)
        replayed = Completion()
        ticket = Ticket(missing, access.write, placement, replayed.set)
        self._service.buffer.push(ticket)
        self._service.interrupt()
        try:
            await replayed.wait()
        finally:
            self._service.buffer.withdraw(ticket)
        counters.faults += ticket.fault_count
        counters.fault_groups += ticket.group_count
        counters.fault_group_s += ticket.group_s
        if ticket.fatal:
            page = min(ticket.fatal)
            cause = ticket.fatal[page]
            if isinstance(cause, BadPlan):
                raise JobError(str(cause))  # nothing is wrong with the page
            raise AccessError(access.first_address(page), str(cause), cause.code if isinstance(cause, KernelError) else 0)
