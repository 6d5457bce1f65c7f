"""What policies plan."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from hmmnet.devices.policy import BadPlan, make_policy, policy_names
from hmmnet.devices.policy.demand import Demand
from hmmnet.errors import RemoteError
from hmmnet.plugins import POLICIES, offered
from hmmnet.sim import SimulatedMachine, simulate


def plan(name: str, pages: list[int]) -> list[tuple[int, int]]:
    policy = make_policy(name)
    assert policy is not None
    return policy.ranges(np.array(pages, dtype=np.uint64), np.zeros(len(pages), dtype=np.bool_))


@pytest.mark.parametrize(
    ("pages", "ranges"),
    [
        ([], []),
        ([0], [(0, 16)]),
        ([17], [(16, 32)]),
        ([15, 16], [(0, 32)]),
        ([5, 40], [(0, 16), (32, 48)]),
        (list(range(256)), [(0, 256)]),
        ([(1 << 35) - 1], [((1 << 35) - 16, 1 << 35)]),
    ],
)
def test_demand_grows_to_64_kib(pages: list[int], ranges: list[tuple[int, int]]) -> None:
    """A fault moves its aligned group of sixteen pages; neighbouring groups are one range."""
    assert plan("demand", pages) == ranges


def test_remote_moves_nothing() -> None:
    """Remote placement never migrates."""
    assert plan("remote", [1, 2, 3]) == []


def test_group_size_is_a_parameter() -> None:
    """Growth can be switched off."""
    assert Demand(group_pages=1).ranges(np.array([3, 4, 9], dtype=np.uint64), np.zeros(3, dtype=np.bool_)) == [(3, 5), (9, 10)]


class Answers:
    """A policy that answers whatever it was made with."""

    def __init__(self, answer: Callable[[], Any]) -> None:
        self._answer = answer

    def ranges(self, pages: Any, write: Any) -> Any:
        return self._answer()


@pytest.mark.parametrize(
    ("answer", "complaint"),
    [
        ([(3, 3)], "must not be empty"),
        ([(9, 3)], "must not be empty"),
        ([(0, 4), (2, 6)], "ascending and apart"),
        ([(8, 9), (0, 1)], "ascending and apart"),
        ([(-1, 4)], "inside the address space"),
        ([(0, (1 << 36) + 1)], "inside the address space"),
        ([(0, 1 << 28)], "at most 134217728"),
        ([(0.5, 2)], "failed on the faults of pages 0x1, 0x2"),
        ([1, 2], "failed on the faults"),
        (None, "failed on the faults"),
    ],
)
def test_what_is_no_plan_is_refused(answer: Any, complaint: str) -> None:
    """By name, before anything moves."""
    with offered(POLICIES, "odd", Answers(lambda: answer)), pytest.raises(BadPlan, match=f'policy "odd".*{complaint}'):
        plan("odd", [1, 2])


def test_a_policy_is_made_for_each_context_or_shared() -> None:
    """A class or function makes one each time; an object is one for all. What is neither is refused, and so is what cannot be made."""
    with offered(POLICIES, "mine", lambda: Answers(lambda: [(1, 2)])):
        assert "mine" in policy_names()
        assert plan("mine", [1]) == [(1, 2)]
    assert "mine" not in policy_names()
    assert make_policy("mine") is None
    with offered(POLICIES, "mine", 3), pytest.raises(BadPlan, match="cannot be made"):
        make_policy("mine")
    with offered(POLICIES, "mine", dict), pytest.raises(BadPlan, match='is a dict without a method "ranges"'):
        make_policy("mine")
    with offered(POLICIES, "mine", Answers), pytest.raises(BadPlan, match="cannot be made: TypeError"):
        make_policy("mine")


def test_a_registered_name_hides_another_while_it_lasts() -> None:
    """Also one that is registered, and one that comes with hmmnet."""
    with offered(POLICIES, "remote", Answers(lambda: [(1, 2)])):
        with offered(POLICIES, "remote", Answers(lambda: [(3, 4)])):
            assert plan("remote", [1]) == [(3, 4)]
        assert plan("remote", [1]) == [(1, 2)]
    assert plan("remote", [1]) == []


def test_a_job_moves_by_a_policy_from_elsewhere_and_survives_a_bad_one() -> None:
    """One page moves where one faults; a policy that fails ends the job that waits for it and names itself; the next job runs."""

    class Exact:
        def ranges(self, pages: Any, write: Any) -> list[tuple[int, int]]:
            return [(int(page), int(page) + 1) for page in pages[:1]]

    def failing() -> Any:
        raise ZeroDivisionError("in my policy")

    async def main(machine: SimulatedMachine) -> None:
        process = await machine.create_process()
        address = await process.mmap(32 * 4096, address=1 << 32)
        await process.write(address, bytes(32 * 4096))
        done = await process.launch("reduction", "gpu0", "exact", a=address, n=512)
        assert done.results == {"sum": 0}
        assert done.counters["pages_in"] == 1
        with pytest.raises(RemoteError, match=r'policy "failing" failed on the faults of pages 0x.*in my policy'):
            await process.launch("reduction", "gpu0", "failing", a=address + 4096, n=512)
        done = await process.launch("reduction", "gpu0", "demand", a=address + 4096, n=512)
        assert done.counters["pages_in"] == 15

    with offered(POLICIES, "exact", Exact), offered(POLICIES, "failing", Answers(failing)):
        simulate(main)


def test_a_fault_can_grow_to_a_huge_page() -> None:
    """demand-2m: aligned blocks of 2 MiB, neighbours joined."""
    policy = make_policy("demand-2m")
    assert policy is not None
    pages = np.array([5, 600, 5000], np.uint64)
    assert policy.ranges(pages, np.zeros(3, np.bool_)) == [(0, 1024), (4608, 5120)]


def test_page_bytes_of_a_policy_is_a_whole_number() -> None:
    """Pages of 4 KiB, which every device has, when it says nothing; anything else than a number is no policy."""

    class Odd(Answers):
        page_bytes = "2 MiB"

    demand = make_policy("demand")
    huge = make_policy("demand-2m")
    assert demand is not None
    assert huge is not None
    assert (demand.page_bytes, huge.page_bytes) == (4096, 2 << 20)
    with offered(POLICIES, "odd", Odd(list)), pytest.raises(BadPlan, match=r"page_bytes of '2 MiB'"):
        make_policy("odd")
