"""The contracts find what is broken: each planted bug of a model or a policy fails the check that is there for it."""

from __future__ import annotations

import textwrap
from collections.abc import Awaitable, Coroutine
from errno import EINVAL
from itertools import count, product
from random import Random
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt
import pytest
import trio

from hmmnet.devices.mirror import Watch
from hmmnet.devices.models.base import Opened
from hmmnet.devices.models.gpu import Gpu
from hmmnet.devices.policy import Policy
from hmmnet.devices.policy.demand import Demand
from hmmnet.errors import HmmnetError, KernelError
from hmmnet.pages import HMM_PFN_WRITE, Words
from hmmnet.plugins import POLICIES, offered
from hmmnet.testing import PolicyContract, device_contract, job_checks, policy_contract
from hmmnet.testing.compared import same
from hmmnet.wire.messages import (
    Copied,
    CopyIn,
    CopyOut,
    EndJob,
    Finished,
    FreeFrames,
    Invalidate,
    Ioctl,
    IoctlDone,
    Launch,
    MirrorShown,
    ShowMirror,
)
from hmmnet.wire.session import Later

from .suites import run, write


class TestDemand(PolicyContract):
    """hmmnet's own policies keep the contract: this one by name,"""

    policy = "demand"


class TestRemote(PolicyContract):
    """and this one."""

    policy = "remote"


class TestOneForAll(PolicyContract):
    """A policy that remembers nothing may be one object."""

    policy = Demand(group_pages=1)


class Deaf(Gpu):
    """Answers invalidations and keeps its entries."""

    def invalidate(self, message: Invalidate) -> Awaitable[None] | None:
        return None


class Forgetful(Gpu):
    """Keeps its entries for pages that it gives back."""

    def copy_out(self, message: CopyOut) -> Copied | Awaitable[Copied] | Later | None:
        if message.stream == 0:
            return super().copy_out(message)
        self.copies.copy_out(message)
        return None


class Sluggish(Gpu):
    """Drops its entries when it comes to it."""

    def invalidate(self, message: Invalidate) -> Awaitable[None] | None:
        return self._later(message)

    async def _later(self, message: Invalidate) -> None:
        await trio.sleep(0.001)
        rest = super().invalidate(message)
        if rest is not None:
            await rest


class Hasty(Gpu):
    """Does not wait for its DMA."""

    def invalidate(self, message: Invalidate) -> Awaitable[None] | None:
        rest = super().invalidate(message)
        if isinstance(rest, Coroutine):
            rest.close()
        return None


class Clinging(Gpu):
    """Goes on as if the host were there."""

    def drop_mirrors(self) -> None:
        pass


class Tireless(Gpu):
    """Lets go of its entries, and has its jobs go on."""

    def fence(self) -> None:
        self.drop_mirrors()


class Lossy(Gpu):
    """Does not zero the pages that it is told to."""

    def copy_in(self, message: CopyIn) -> None:
        super().copy_in(CopyIn(message.stream, message.targets, b"") if message.stream else message)


class Hoarder(Gpu):
    """Frees nothing."""

    def free_frames(self, message: FreeFrames) -> None:
        return None


class Obliging(Gpu):
    """Takes any command for done."""

    async def ioctl(self, message: Ioctl) -> IoctlDone:
        try:
            return await super().ioctl(message)
        except KernelError as error:
            if error.code == EINVAL:
                return IoctlDone(0, 0)
            raise


class Trusting(Gpu):
    """Programs words without a look at what it was told meanwhile (no read_retry)."""

    async def opened(self, opened: Opened) -> None:
        opened.context.mirror.is_current = lambda *_: True  # type: ignore[method-assign]  # the planted bug


class Possessive(Gpu):
    """Uses pages that were moved here, though it was told to drop them before it had heard of that."""

    async def opened(self, opened: Opened) -> None:
        context = opened.context
        take_in = context._take_in

        def take(pages: Words, frames: Words, writable: npt.NDArray[np.bool_], watch: Watch) -> None:
            take_in(pages, frames, writable, Watch(watch.start, watch.end, watch.since))

        context._take_in = take  # type: ignore[method-assign]  # the planted bug


class Communal(Gpu):
    """Has one table for all contexts: it is found by page alone."""

    async def opened(self, opened: Opened) -> None:
        opened.context.mirror.table = next(iter(self.contexts.values())).context.mirror.table


class Generous(Gpu):
    """Maps own memory writable, whatever the host says."""

    async def opened(self, opened: Opened) -> None:
        mirror = opened.context.mirror
        program = mirror.program_own
        mirror.program_own = lambda pages, frames, writable: program(pages, frames, np.ones_like(writable))  # type: ignore[method-assign]  # the planted bug


class Presuming(Gpu):
    """The same for memory of the host."""

    async def opened(self, opened: Opened) -> None:
        mirror = opened.context.mirror
        program = mirror.program
        mirror.program = lambda start, words: program(start, words | np.uint64(HMM_PFN_WRITE))  # type: ignore[method-assign]  # the planted bug


class Unmoved(Gpu):
    """Takes a page that the CPU stores to for the zero page that it was."""

    def invalidate(self, message: Invalidate) -> Awaitable[None] | None:
        return None if message.event == "clear" else super().invalidate(message)


class Undoing(Gpu):
    """What a job stores in own memory is gone when it ends."""

    async def launch(self, message: Launch) -> Finished:
        before = self.memory.arena.bytes.copy()
        finished = await super().launch(message)
        if message.kernel != "peek":
            self.memory.arena.bytes[:] = before
        return finished


class Repeating(Gpu):
    """Runs jobs again, to be sure."""

    async def launch(self, message: Launch) -> Finished:
        await super().launch(message)
        return await super().launch(message)


class Stubborn(Gpu):
    """Ends no job."""

    def end_job(self, message: EndJob) -> None:
        return None


class Bold(Gpu):
    """Adds, though it has no atomics."""

    async def opened(self, opened: Opened) -> None:
        opened.engine._spec = msgspec.structs.replace(opened.engine._spec, atomics=True)


class Secretive(Gpu):
    """Shows nothing of what it holds."""

    def show_mirror(self, message: ShowMirror) -> MirrorShown:
        return MirrorShown(b"", b"")


@pytest.mark.parametrize(
    ("model", "check"),
    [
        (Deaf, device_contract.drops_what_is_invalidated),
        (Sluggish, device_contract.drops_at_once),
        (Hasty, device_contract.answers_when_its_dma_is_over),
        (Clinging, device_contract.lets_go_when_its_lease_is_over),
        (Tireless, device_contract.lets_go_when_its_lease_is_over),
        (Forgetful, device_contract.drops_before_it_copies_out),
        (Lossy, device_contract.zeroes_what_was_used),
        (Hoarder, device_contract.keeps_data_there_and_back),
        (Obliging, device_contract.refuses_unknown_commands),
        (Obliging, device_contract.refuses_ranges_that_are_none),
        (Trusting, job_checks.asks_again_for_what_changed_meanwhile),
        (Possessive, job_checks.asks_again_for_what_was_dropped_on_its_way),
        (Communal, job_checks.keeps_contexts_apart),
        (Generous, job_checks.keeps_to_rights),
        (Presuming, job_checks.keeps_to_rights),
        (Unmoved, job_checks.loads_what_the_cpu_has_stored),
        (Undoing, job_checks.stores_what_others_load),
        (Repeating, job_checks.adds_once),
        (Stubborn, job_checks.ends_jobs),
        (Secretive, job_checks.shows_what_it_holds),
    ],
)
def test_broken_models_are_found(model: type, check: device_contract.Check) -> None:
    """By the check that is there for it; the model that it was made from passes."""
    device_contract.play(check, Gpu, memory_bytes=800 << 12)
    with pytest.raises((AssertionError, HmmnetError, trio.TooSlowError)):
        device_contract.play(check, model, memory_bytes=800 << 12)


def test_a_device_without_atomics_keeps_the_contract() -> None:
    """Its additions are refused, by the capability that its topology says it lacks; one that adds all the same does not pass."""
    device_contract.play(job_checks.adds_once, Gpu, memory_bytes=800 << 12, atomics=False)
    with pytest.raises(AssertionError, match="a device without atomics must refuse them"):
        device_contract.play(job_checks.adds_once, Bold, memory_bytes=800 << 12, atomics=False)


@pytest.mark.parametrize(
    ("check", "cause"),
    [
        (job_checks.adds_once, "which cannot fault"),
        (device_contract.runs_jobs, "which cannot fault"),
        (job_checks.ends_jobs, "the job sent no RangeFault"),
    ],
)
def test_jobs_that_end_at_once_are_told_with_their_cause(check: device_contract.Check, cause: str) -> None:
    """Their own error, where a check wants their results; where it waits for what they should do, what they have not done."""
    with pytest.raises(AssertionError, match=cause):
        device_contract.play(check, Gpu, memory_bytes=800 << 12, fault_capable=False)


def test_words_and_bytes_are_not_compared() -> None:
    """They would be the same where the numbers are."""
    with pytest.raises(AssertionError, match="uint8 where uint64 is wanted"):
        same(bytes(512), np.zeros(512, np.uint64), "a page: ")


class Flipping(Gpu):
    """Spoils what it copies out."""

    def copy_out(self, message: CopyOut) -> Copied | Awaitable[Copied] | Later | None:
        self.memory.arena.bytes[:] ^= np.uint8(1)
        return super().copy_out(message)


def test_megabytes_that_differ_are_told_in_a_line() -> None:
    """By the first byte, in the words of the check itself: pytest's own takes minutes for so much, where it explains in full."""
    with pytest.raises(AssertionError, match=r"^byte 0 is 0x\w+ and not 0x\w+; \d+ of 2457600 differ$"):
        device_contract.play(device_contract.keeps_data_there_and_back, Flipping, memory_bytes=800 << 12)


class Backwards:
    """Answers in the wrong order."""

    def ranges(self, pages: Any, write: Any) -> list[tuple[int, int]]:
        return [(int(page), int(page) + 1) for page in reversed(pages)]


class Overflowing:
    """Grows beyond the end of the address space."""

    def ranges(self, pages: Any, write: Any) -> list[tuple[int, int]]:
        return [(int(pages[0]), int(pages[-1]) + 16)]


class Needy:
    """Expects that the first fault is at a group's start."""

    def __init__(self) -> None:
        self._last = -1

    def ranges(self, pages: Any, write: Any) -> list[tuple[int, int]]:
        if self._last < 0 and int(pages[0]) % 16 == 3:
            raise KeyError(int(pages[0]))
        self._last = int(pages[0])
        return []


class Writing:
    """Uses its arguments as scratch paper."""

    def ranges(self, pages: Any, write: Any) -> list[tuple[int, int]]:
        pages += np.uint64(1)
        return []


class Gambling:
    """Has chance of its own."""

    def __init__(self) -> None:
        self._chance = Random()

    def ranges(self, pages: Any, write: Any) -> list[tuple[int, int]]:
        return [(int(pages[0]), int(pages[0]) + 1)] if self._chance.random() < 0.5 else []


class Sharing:
    """All of its kind remember together."""

    numbers = count()

    def ranges(self, pages: Any, write: Any) -> list[tuple[int, int]]:
        return [(int(pages[0]), int(pages[0]) + 1)] if next(Sharing.numbers) % 2 else []


class Greedy:
    """Wants everything."""

    def ranges(self, pages: Any, write: Any) -> list[tuple[int, int]]:
        return [(0, 1 << 30)]


PLANS = policy_contract


@pytest.mark.parametrize(
    ("policy", "check", "complaint"),
    [
        (Backwards, PLANS.answers_with_plans, "ascending and apart"),
        (Overflowing, PLANS.answers_with_plans, "inside the address space"),
        (Greedy, PLANS.answers_with_plans, "at most 134217728"),
        (Writing, PLANS.answers_with_plans, "read-only"),
        (Needy, PLANS.answers_with_plans_at_once, "KeyError"),
        (Gambling, PLANS.depends_on_nothing_else, "asked the same, it answers differently"),
        (Sharing, PLANS.keeps_contexts_apart, "what another context asked changes the answer"),
    ],
)
def test_broken_policies_are_found(policy: type[Policy], check: policy_contract.PlanCheck, complaint: str) -> None:
    """By the check that is there for it, in words that say what is wrong."""
    policy_contract.play_plans(check, Demand)
    with pytest.raises((AssertionError, HmmnetError), match=complaint):
        policy_contract.play_plans(check, policy)


class Late:
    """Fails in the middle of a job."""

    def __init__(self) -> None:
        self._asked = 0

    def ranges(self, pages: Any, write: Any) -> list[tuple[int, int]]:
        self._asked += 1
        if self._asked > 1:
            raise IndexError("my table is full")
        return []


@pytest.mark.parametrize("check", policy_contract.JOB_CHECKS, ids=lambda check: check.__name__)
def test_jobs_show_what_plans_do_not(check: policy_contract.JobCheck) -> None:
    """A policy that fails later than a single plan shows is found by the jobs that wait for it, and named."""
    with pytest.raises(HmmnetError, match=r'policy "under-test" failed .*my table is full'):
        for seed in range(5):
            policy_contract.play_jobs(check, Late, seed)


def test_a_policy_that_is_not_there() -> None:
    """Says where policies come from."""
    with pytest.raises(HmmnetError, match=r'no policy is called "mine": register it, or .* hmmnet\.policies'):
        policy_contract.play_plans(policy_contract.answers_with_plans, "mine")
    with offered(POLICIES, "mine", Demand):
        policy_contract.play_plans(policy_contract.answers_with_plans, "mine")


SUITE = """
    import pytest
    from hmmnet.devices.models.gpu import Gpu
    from hmmnet.testing import DeviceContract, PolicyContract

    class Mine(Gpu):
        slab_pages = 16

    @pytest.mark.seeds(2)
    class TestMine(DeviceContract):
        model = Mine

    class TestForgotten(DeviceContract):
        pass

    class Rash:
        def ranges(self, pages, write):
            assert int(pages[0]) % 7
            return []

    @pytest.mark.seeds(range(4, 6))
    class TestRash(PolicyContract):
        policy = Rash
    """


IDLE = """
    @pytest.mark.{marker}
    class Base{number}:
        pass

    class Test{number}(Base{number}, {contract}):
        model = "gpu"
        policy = "demand"
    """


def test_a_marker_that_a_contract_has_no_use_for(pytester: pytest.Pytester) -> None:
    """Is said as the tests are collected, also of a base class: the checks would pass on another machine than it names."""
    markers = ['topology("nvlink-8")', "faults(loss=0.5)", "strict_migrations"]
    cases = list(enumerate(product(markers, ["DeviceContract", "PolicyContract"])))
    classes = [textwrap.dedent(IDLE).format(number=number, marker=marker, contract=contract) for number, (marker, contract) in cases]
    write(pytester, "\n".join(["import pytest", "from hmmnet.testing import DeviceContract, PolicyContract", *classes]))
    result = run(pytester)
    result.assert_outcomes(errors=len(cases))
    for number, (marker, _) in cases:
        name = marker.partition("(")[0]
        says = f"{name}(...) on a contract, which has machines of its own: leave it out; seeds(...) is what a contract takes"
        result.stdout.fnmatch_lines_random([f"test_mine.py::Test{number}::test_*: {says}"])


def test_a_marker_beside_a_contract(pytester: pytest.Pytester) -> None:
    """Of a module, of a class that has tests of its own, too, or a fixture with a machine: it is for those."""
    write(
        pytester,
        """
        import pytest
        from hmmnet.testing import PolicyContract

        pytestmark = pytest.mark.strict_migrations

        @pytest.mark.topology("nvlink-8")
        class TestMine(PolicyContract):
            policy = "demand"

            def test_eight(self, simulated_machine):
                assert len(simulated_machine.device_names) == 8

        class TestOther(PolicyContract):
            policy = "remote"

        @pytest.mark.topology("nvlink-8")
        class TestBeside(PolicyContract):
            policy = "remote"

            @pytest.fixture(autouse=True)
            def eight(self, simulated_machine):
                assert len(simulated_machine.device_names) == 8
        """,
    )
    run(pytester, "-k", "eight or at_once").assert_outcomes(passed=4)


FAILING = """
    from hmmnet.testing import DeviceContract, PolicyContract, outcomes
    from hmmnet.devices.models.gpu import Gpu

    class Late:
        def __init__(self):
            self.asked = 0

        def ranges(self, pages, write):
            self.asked += 1
            if self.asked > 3:
                raise IndexError("my table is full")
            return [(int(pages[0]), int(pages[-1]) + 1)]

    class TestLate(PolicyContract):
        policy = Late

    class Hoarder(Gpu):
        def free_frames(self, message):
            return None

    class TestHoarder(DeviceContract):
        model = Hoarder

    def test_lost(simulated_machine):
        process = simulated_machine.process()
        address = process.malloc(4096)
        process.write(address, bytes(4096))
        outcomes.lost(process, address, 4096)
    """


def test_failures_show_the_check_and_the_story_and_nothing_else_of_ours(pytester: pytest.Pytester) -> None:
    """The check with what it is there for, the policy's own line, and what happened on the machine; everything with --full-trace."""
    write(pytester, FAILING)
    chosen = "reads_right or keeps_data or answers_with_plans_at_once or depends_on or test_lost"
    result = run(pytester, "--hmmnet-strict", "-k", chosen, "-p", "no:logging")
    result.assert_outcomes(passed=1, failed=4)
    said = result.stdout.str()
    assert "hmmnet: what happened" in said.partition("reads_right_everywhere] __")[2].partition("] ___")[0]
    result.stdout.fnmatch_lines_random(
        [
            "*def reads_right_everywhere*",
            "*def frames_are_accounted_for*",
            '>*raise IndexError("my table is full")',
            ">*outcomes.lost(process, address, 4096)",
            "*host -> *",
        ]
    )
    for inside in ("play_jobs", "play_plans", "sim/run.py", "frozen.py", "policy/__init__.py:", "host/process.py", "session.py"):
        assert inside not in said, inside
    assert "frozen.py" in run(pytester, "--full-trace", "-k", "test_lost").stdout.str()


def test_in_a_suite_of_a_users_own(pytester: pytest.Pytester) -> None:
    """By inheritance; under seeds; a failure says how to see it again; a class that does not say which model says so."""
    write(pytester, SUITE)
    result = run(pytester, "-k", "keeps_data or refuses_bad_copies or answers_with_plans or reads_right")
    result.assert_outcomes(passed=5, failed=7)
    result.stdout.fnmatch_lines_random(
        [
            'E*AssertionError: TestForgotten: say which model, such as: model = "mine"*',
            'E*BadPlan: policy "under-test" failed on the faults of pages 0x0: AssertionError*',
            "pytest 'test_mine.py::TestRash::test_plans[[]answers_with_plans-seed4[]]' --hmmnet-seed 4",
        ]
    )
    run(
        pytester, "-p", "no:hmmnet", "-W", "default", "-o", "addopts=", "-k", "TestMine and keeps_data", "-o", "markers=seeds"
    ).assert_outcomes(passed=1)
