"""What any policy must do, whatever it decides: a test class to inherit from.

    class TestMine(hmmnet.testing.PolicyContract):
        policy = "mine"                             # as jobs name it, or what makes one, or one

A policy plans; it cannot lose data, whatever it plans. So half of the checks ask it for plans, for faults of every kind, and look at what
it answers; the other half run jobs under it on a simulated machine, where things go wrong that a policy does not see: mappings that end
where it would grow, memory that is full, pages that two devices want, a CPU that takes them back. Every result must be right, and every job
must end. With the marker ``seeds(20)`` on the class each check is played with twenty seeds.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from random import Random
from typing import Any, ClassVar, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt
import pytest
import trio

from hmmnet.errors import HmmnetError
from hmmnet.faults import Plan
from hmmnet.pages import PAGE_SIZE, PAGES_MAX, Words
from hmmnet.plugins import POLICIES, load, offered
from hmmnet.program import Process
from hmmnet.sim import SimulatedMachine
from hmmnet.topology.load import load as load_topology

from .case import Case
from .migrations import Migrations
from .story import Story
from .worlds import Simulate

STORY = "_hmmnet_story"
"""The fixture of hmmnet's plugin that has the story of a test."""
NAME = "under-test"
"""What a policy that is given as an object is called meanwhile."""
BATCHES = 60
"""Fault batches of one check."""
BATCH_PAGES = 256
"""Faults of one batch: nvidia-uvm's default, and that of `hmmnet.devices.faultbuffer`."""
AT = 1 << 32
"""Where the checks map memory."""
SMALL_BYTES = 64 * PAGE_SIZE
"""Memory of a device that is too small."""
LIMIT_S = 120.0
"""Virtual seconds of one check: jobs of some milliseconds, and the time until a lease is over many times."""
WORDS = PAGE_SIZE // 8

Mask: TypeAlias = npt.NDArray[np.bool_]
Faults: TypeAlias = tuple[Words, Mask]


class Plans(Protocol):
    """A policy as the checks ask it."""

    def ranges(self, pages: Words, write: Mask) -> list[tuple[int, int]]:
        """See `hmmnet.devices.policy.Policy.ranges`."""
        ...


Make: TypeAlias = Callable[[], Plans]
PlanCheck: TypeAlias = Callable[[Make, Random], None]
JobCheck: TypeAlias = Callable[[SimulatedMachine, str, Random], Awaitable[None]]


@contextmanager
def named(policy: Any) -> Iterator[str]:
    """The name under which jobs find `policy` while the block runs."""
    if isinstance(policy, str):
        yield policy
    else:
        with offered(POLICIES, NAME, policy):
            yield NAME


def maker(name: str) -> Make:
    """What makes the policy called `name`, for one context, as a device does. Raises HmmnetError when there is none."""
    make = load("hmmnet.device_service", "policy")
    if make is None:
        raise HmmnetError('devices are not installed; install hmmnet itself ("pip install ." or "pip install -e ." in its folder)')

    def made() -> Plans:
        policy: Plans | None = make(name)
        if policy is None:
            raise HmmnetError(f'no policy is called "{name}": register it, or offer it through the entry point group {POLICIES}')
        return policy

    return made


def batches(random: Random) -> Iterator[Faults]:
    """Faults as devices have them: single, scattered, dense, at both ends of the address space, reads and writes; the largest too."""
    yield batch([0], random)
    yield batch([PAGES_MAX - 1], random)
    yield batch(range(PAGES_MAX - BATCH_PAGES, PAGES_MAX), random)
    yield batch(range(BATCH_PAGES), random)
    yield batch(range(0, 512 * BATCH_PAGES, 512), random)
    for _ in range(BATCHES):
        span = random.choice((1, 16, 300, 4096, 1 << 24))
        first = random.randrange(PAGES_MAX - span)
        count = random.randint(1, min(span, BATCH_PAGES))
        yield batch(sorted(random.sample(range(first, first + span), count)), random)


def batch(pages: Any, random: Random) -> Faults:
    """One batch; arrays that nobody can write to."""
    numbers = np.array(list(pages), np.uint64)
    write = np.array([random.random() < 0.5 for _ in numbers], np.bool_)
    numbers.flags.writeable = write.flags.writeable = False
    return numbers, write


# --- plans ----------------------------------------------------------------------------------------------------------------------------


def answers_with_plans(make: Make, random: Random) -> None:
    """Ranges that are not empty, ascending, apart, inside the address space, and not too large. Arguments are left alone."""
    policy = make()
    for pages, write in batches(random):
        policy.ranges(pages, write)


def answers_with_plans_at_once(make: Make, random: Random) -> None:
    """A context's first fault may be any: a policy that needs to have seen others is wrong then."""
    for pages, write in batches(random):
        make().ranges(pages, write)


def depends_on_nothing_else(make: Make, random: Random) -> None:
    """Two of its kind that are asked the same answer the same: no clock, no chance of its own, nothing shared. So a run can be replayed."""
    asked = list(batches(random))
    first, second = make(), make()
    answers = [first.ranges(*faults) for faults in asked]
    for faults, answer in zip(asked, answers, strict=True):
        assert second.ranges(*faults) == answer, f"asked the same, it answers differently: {answer} before"


def keeps_contexts_apart(make: Make, random: Random) -> None:
    """What one process faults on changes nothing for another: policies of two contexts do not share what they remember."""
    asked, noise = list(batches(random)), list(batches(random))
    alone, beside, other = make(), make(), make()
    for faults, more in zip(asked, noise, strict=True):
        other.ranges(*more)
        assert beside.ranges(*faults) == alone.ranges(*faults), "what another context asked changes the answer"


# --- jobs -----------------------------------------------------------------------------------------------------------------------------


async def memory(machine: SimulatedMachine, pages: int, protection: str = "rw", at: int = AT) -> tuple[Process, npt.NDArray[np.int64]]:
    """A process with a mapping of `pages` at `at`, and what is written there."""
    process = await machine.create_process()
    await process.mmap(pages * PAGE_SIZE, address=at)
    values = np.arange(pages * WORDS, dtype="<i8")
    await process.write(at, values)
    await process.mprotect(at, pages * PAGE_SIZE, protection)
    return process, values


async def total(process: Process, policy: str, device: str, first: int, values: npt.NDArray[np.int64]) -> None:
    """The device's sum of the pages from the `first` on is the right one."""
    done = await process.launch("reduction", device, policy, a=AT + first * PAGE_SIZE, n=len(values), dtype="<i8")
    assert done.results == {"sum": int(values.sum())}, f"{device} sums pages from the {first + 1}th on wrongly: {done.results}"


async def reads_right_everywhere(machine: SimulatedMachine, policy: str, random: Random) -> None:
    """Every stretch of a mapping, in any order, from either device, also where growth would leave the mapping."""
    process, values = await memory(machine, 300, random.choice(("rw", "r")))
    for _ in range(12):
        first = random.randrange(300)
        count = random.choice((1, random.randint(1, 300 - first)))
        device = random.choice(machine.device_names)
        await total(process, policy, device, first, values[first * WORDS : (first + count) * WORDS])
    assert (await process.read_array(AT, "<i8", len(values)) == values).all()


async def writes_right_everywhere(machine: SimulatedMachine, policy: str, random: Random) -> None:
    """What one device writes the other reads, and the CPU; it writes in between."""
    process, values = await memory(machine, 64)
    for _ in range(12):
        first = random.randrange(64)
        part = slice(first * WORDS, random.randint(first + 1, 64) * WORDS)
        at, n = AT + first * PAGE_SIZE, part.stop - part.start
        device = random.choice(machine.device_names)
        if random.random() < 0.3:
            values[part] += 1
            await process.write(at, values[part])
        else:
            await process.launch("vector_add", device, policy, a=at, b=at, out=at, n=n, dtype="<i8")
            values[part] *= 2
        if random.random() < 0.3:
            assert (await process.read_array(at, "<i8", n) == values[part]).all()
    assert (await process.read_array(AT, "<i8", len(values)) == values).all()


async def ends_where_two_devices_want_the_same(machine: SimulatedMachine, policy: str, random: Random) -> None:
    """Both devices read the same pages at once, and the CPU takes them back meanwhile: every job ends, with the right sum."""
    process, values = await memory(machine, 48)
    errors: list[Exception] = []

    async def work(device: str) -> None:
        try:
            for _ in range(4):
                first = random.randrange(16)
                await total(process, policy, device, first, values[first * WORDS :])
        except (AssertionError, HmmnetError) as error:
            errors.append(error)

    async with trio.open_nursery() as nursery:
        for device in machine.device_names:
            nursery.start_soon(work, device)
        for _ in range(6):
            await trio.sleep(random.random() * 1e-4)
            at = random.randrange(48)
            assert await process.load(AT + at * PAGE_SIZE, "<i8") == values[at * WORDS]
    if errors:
        raise errors[0]


async def works_when_memory_is_full(machine: SimulatedMachine, policy: str, random: Random) -> None:
    """More data than the device has memory: what does not fit is used where it is."""
    process, values = await memory(machine, 4 * SMALL_BYTES // PAGE_SIZE)
    for _ in range(3):
        await total(process, policy, random.choice(machine.device_names), 0, values)


async def survives_holes(machine: SimulatedMachine, policy: str, random: Random) -> None:
    """Pages are unmapped between those that jobs use, and mapped anew, empty: sums are those of what is there."""
    process, values = await memory(machine, 128)
    for _ in range(6):
        hole = random.randrange(128)
        await process.munmap(AT + hole * PAGE_SIZE, PAGE_SIZE)
        for first, last in ((0, hole), (hole + 1, 128)):
            if first < last:
                await total(process, policy, random.choice(machine.device_names), first, values[first * WORDS : last * WORDS])
        await process.mmap(PAGE_SIZE, address=AT + hole * PAGE_SIZE)
        values[hole * WORDS : (hole + 1) * WORDS] = 0
    await total(process, policy, machine.device_names[0], 0, values)


async def serves_families(machine: SimulatedMachine, policy: str, random: Random) -> None:
    """After fork parent and child see their own stores only, whoever's device reads."""
    process, values = await memory(machine, 32)
    await total(process, policy, "gpu0", 0, values)
    child = await process.fork()
    page = random.randrange(32)
    await child.store(AT + page * PAGE_SIZE, -1, "<i8")
    own = values.copy()
    own[page * WORDS] = -1
    await total(child, policy, "gpu1", 0, own)
    await total(process, policy, random.choice(machine.device_names), 0, values)
    await child.exit()


PLAN_CHECKS: tuple[PlanCheck, ...] = (answers_with_plans, answers_with_plans_at_once, depends_on_nothing_else, keeps_contexts_apart)
JOB_CHECKS: tuple[JobCheck, ...] = (
    reads_right_everywhere,
    writes_right_everywhere,
    ends_where_two_devices_want_the_same,
    works_when_memory_is_full,
    survives_holes,
    serves_families,
)


def play_plans(check: PlanCheck, policy: Any, seed: int = 0) -> None:
    """Play one check of plans against `policy` (a name, what makes one, or one). AssertionError and HmmnetError say what does not hold."""
    with named(policy) as name:
        check(maker(name), Random(seed))  # noqa: S311 - chance, not secrecy


def play_jobs(check: JobCheck, policy: Any, seed: int = 0, story: Story | None = None) -> None:
    """Play one check of jobs against `policy` on a simulated machine of two devices, from `seed`; `story` hears what happens there."""
    machine = load_topology("two-gpus")
    if check is works_when_memory_is_full:
        machine = replace(machine, devices=tuple(replace(device, memory_bytes=SMALL_BYTES) for device in machine.devices))

    async def main(made: SimulatedMachine) -> None:
        await check(made, name, Random(seed))  # noqa: S311 - chance, not secrecy

    with named(policy) as name:
        case = Case(seed, machine, Plan(), LIMIT_S, Migrations(), story or Story())
        Simulate(case)(main, limit_s=LIMIT_S)


class PolicyContract:
    """Inherit from it, say which `policy`, and pytest plays every check against it."""

    policy: ClassVar[Any] = None
    """Its name, what makes one (a class, or a function wrapped in ``staticmethod``), or one."""

    @pytest.fixture
    def hmmnet_seed(self, request: pytest.FixtureRequest) -> int:
        """The test's seed; here too, so that the contract holds where the plugin is left out."""
        return int(getattr(request, "param", 0) or request.config.getoption("hmmnet_seed", None) or 0)

    def _policy(self) -> Any:
        assert self.policy is not None, f'{type(self).__name__}: say which policy, such as: policy = "mine"'
        return self.policy

    @pytest.mark.parametrize("check", PLAN_CHECKS, ids=lambda check: check.__name__)
    def test_plans(self, check: PlanCheck, hmmnet_seed: int) -> None:
        """What every policy must answer."""
        play_plans(check, self._policy(), hmmnet_seed)

    @pytest.mark.parametrize("check", JOB_CHECKS, ids=lambda check: check.__name__)
    def test_jobs(self, check: JobCheck, hmmnet_seed: int, request: pytest.FixtureRequest) -> None:
        """What every job must come to, whatever its policy."""
        story = request.getfixturevalue(STORY) if request.config.pluginmanager.hasplugin("hmmnet") else None
        play_jobs(check, self._policy(), hmmnet_seed, story)
