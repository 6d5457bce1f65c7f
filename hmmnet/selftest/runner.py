"""Plays the self-tests: each in a process of its own, all on one machine with two private and two coherent units.

A test that hangs, or breaks the machine, costs it: the next begins on a new one, as after a reboot.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import trio

from hmmnet.errors import HmmnetError, PeerError
from hmmnet.program import Process
from hmmnet.topology.model import Personality

from . import anonymous, atomics, faults, files, huge, migration, snapshots
from .case import TESTS, CheckFailed, Ground, Skipped

Result = Literal["pass", "fail", "skip"]

TOPOLOGY = "dmirror-4"
UNITS = {"private": (0, 1), "coherent": (2, 3)}
"""The two units of each kind."""
KINDS = tuple(UNITS)
PERSONALITIES = ("today", "v25")
MODERN_ONLY = frozenset({
    "anon_write_child", "anon_write_huge", "exclusive", "exclusive_mprotect", "exclusive_cow", "migrate_anon_huge_empty",
    "migrate_anon_huge_zero", "migrate_anon_huge_free", "migrate_anon_huge_fault", "migrate_partial_unmap_fault", "migrate_remap_fault",
    "migrate_anon_huge_err", "migrate_anon_huge_zero_err", "benchmark_thp_migration", "userfaultfd_read",
})  # fmt: skip
"""Tests of what v25 did not have: exclusive access, huge pages that migrate, COW broken for a device, faults that drop the lock."""
MODERN_COHERENT = frozenset({"hmm_gup_test"})
"""The same on coherent units: device-public memory knew no long-term pins, for which today's pages come home."""
MODERN = "modern only"
LIMIT_S = 60.0
"""What a test may take before it counts as hanging; the longest takes seconds."""
ROOMS = (anonymous, files, migration, snapshots, atomics, huge, faults)

ORDER = (
    "open_close", "anon_read", "anon_read_prot", "anon_write", "anon_write_prot", "anon_write_child", "anon_write_child_shared",
    "anon_write_huge", "anon_write_hugetlbfs", "file_read", "file_write", "migrate", "migrate_file_private", "migrate_fault",
    "migrate_release", "migrate_shared", "migrate_mixed", "migrate_multiple", "anon_read_multiple", "anon_teardown", "mixedmap",
    "snapshot", "compound", "double_map", "exclusive", "exclusive_mprotect", "exclusive_cow", "hmm_gup_test", "hmm_cow_in_device",
    "migrate_anon_huge_empty", "migrate_anon_huge_zero", "migrate_anon_huge_free", "migrate_anon_huge_fault",
    "migrate_partial_unmap_fault", "migrate_remap_fault", "migrate_anon_huge_err", "migrate_anon_huge_zero_err",
    "benchmark_thp_migration", "userfaultfd_read",
)  # fmt: skip
"""The kernel's tests, in its order."""


@dataclass(frozen=True)
class Case:
    """A test on units of one kind."""

    name: str
    kind: str


@dataclass(frozen=True)
class Outcome:
    """How a case ended. `why` is empty when it passed."""

    case: Case
    personality: str
    result: Result
    seconds: float
    why: str = ""
    notes: list[str] = field(default_factory=list)

    def as_json(self) -> dict[str, Any]:
        """The fields that programs read."""
        return {
            "name": self.case.name,
            "kind": self.case.kind,
            "personality": self.personality,
            "result": self.result,
            "seconds": round(self.seconds, 3),
        }


class World(Protocol):
    """A running machine: processes, and devices by unit number."""

    async def create_process(self) -> Process:
        """A new, empty process."""
        ...

    def device_of_unit(self, unit: int) -> str:
        """The device that has a unit number."""
        ...


def cases(names: Sequence[str] = (), kinds: Sequence[str] = KINDS) -> list[Case]:
    """Every case of `kinds`, or of the tests called `names`, in the kernel's order."""
    assert set(TESTS) == set(ORDER), f"tests and the kernel's list differ: {set(TESTS) ^ set(ORDER)}"
    return [Case(name, kind) for kind in kinds for name in ORDER if not names or name in names]


@asynccontextmanager
async def real_world(personality: Personality = "today") -> AsyncIterator[World]:
    """A machine of real processes while the block runs."""
    from hmmnet.play.world import real_world as launched

    async with launched(personality) as world:
        yield world


def is_modern(case: Case, personality: str) -> bool:
    """Whether this personality lacks what the case is about."""
    return personality == "v25" and (case.name in MODERN_ONLY or (case.kind == "coherent" and case.name in MODERN_COHERENT))


async def run_all(
    chosen: Sequence[Case],
    on_outcome: Callable[[Outcome], None],
    world: Callable[[], AbstractAsyncContextManager[World]] | None = None,
    personality: Personality = "today",
) -> list[Outcome]:
    """Play `chosen` on a machine of `personality` and tell `on_outcome` as each ends. Raises HmmnetError when there is no machine.

    `world` is where, when not on a machine of real processes.
    """
    outcomes: list[Outcome] = []
    waiting = deque(chosen)
    while waiting:
        async with world() if world is not None else real_world(personality) as machine:
            healthy = True
            while waiting and healthy:
                outcome, healthy = await _run(machine, waiting.popleft(), personality)
                outcomes.append(outcome)
                on_outcome(outcome)
    return outcomes


async def _run(machine: World, case: Case, personality: str) -> tuple[Outcome, bool]:
    """One case; whether the machine is fit for the next."""
    if is_modern(case, personality):
        return Outcome(case, personality, "skip", 0.0, MODERN), True
    process = await machine.create_process()
    first, second = UNITS[case.kind]
    ground = Ground(process, (machine.device_of_unit(first), machine.device_of_unit(second)), case.kind, personality)
    result: Result = "fail"
    why, healthy = f"it took longer than {LIMIT_S:g} s", True
    begun_s = time.perf_counter()
    with trio.move_on_after(LIMIT_S) as limit:
        try:
            await TESTS[case.name](ground)
            result, why = "pass", ""
        except Skipped as lacking:
            result, why = "skip", str(lacking)
        except PeerError as broken:
            why, healthy = f"the machine broke: {broken}", False
        except (HmmnetError, ExceptionGroup) as failed:
            why = "; ".join(dict.fromkeys(causes(failed)))
        await process.exit()
    if limit.cancelled_caught:
        healthy = False
    return Outcome(case, personality, result, time.perf_counter() - begun_s, why, ground.notes), healthy


def causes(error: BaseException) -> list[str]:
    """What went wrong in a group of nurseries, one sentence each."""
    if isinstance(error, BaseExceptionGroup):
        return [text for one in error.exceptions for text in causes(one)]
    return [str(error) if isinstance(error, CheckFailed) else f"{type(error).__name__}: {error}"]
